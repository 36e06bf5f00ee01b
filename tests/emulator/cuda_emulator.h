// Runs CUDA C++ kernels on one CPU thread, for tests. Each thread of a block is a fiber; blocks run one after another.
//
// What it checks beyond the numbers:
//   - every barrier is reached by every thread of the block, every warp operation by every lane of its mask;
//   - dynamic shared memory is a heap allocation of the exact size (AddressSanitizer sees every access outside it;
//     without the sanitizer, guard bytes around it are checked after each block) and starts as NaN in each block;
//   - an asynchronous copy gives no data before it is waited for;
//   - launch limits (threads, grid, shared memory).
// A failed check throws emulator::Error out of launch(), naming the block and the thread.
//
// schedule_seed picks the order in which threads run between barriers: 0 forward, 1 reverse, above 1 shuffled. A kernel
// that lacks a barrier gives different results for different seeds.
//
// Not covered: the memory model (a barrier-free handshake between threads may pass here and fail on a GPU), speed, and
// the last bits of fast intrinsics. A static __shared__ variable keeps its value from block to block; dynamic does not.
//
// Compile with -U_FORTIFY_SOURCE: the fortified longjmp refuses to change stacks.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <functional>
#include <memory>
#include <mutex>
#include <numeric>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

namespace emulator {

inline int schedule_seed = 0;

constexpr unsigned kWarpSize = 32;
constexpr size_t kMaxThreads = 1024;
constexpr size_t kMaxSharedBytes = 163 * 1024;  // sm_80, the smallest of the GPUs that the kernels are for
constexpr size_t kGuardBytes = 64;
#ifdef __SANITIZE_ADDRESS__
constexpr bool kAddressSanitizer = true;
constexpr size_t kStackBytes = 256 << 10;
#else
constexpr bool kAddressSanitizer = false;
constexpr size_t kStackBytes = 64 << 10;
#endif

struct Error : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// ---- state of the block that is running -----------------------------------------------------------------------------

struct AsyncCopy {
  void* destination;
  std::vector<char> bytes;
};

struct Thread {
  uint3 index;
  bool started = false, finished = false;
  const unsigned* waits_on = nullptr;  // generation counter of the barrier this thread waits at; null if it can run
  unsigned waits_since = 0;            // the value it had on arrival
  const char* waits_at = "";           // name of that barrier, for messages
  std::vector<AsyncCopy> async_copies;
  jmp_buf context;
  ucontext_t first_context;
  std::unique_ptr<char[]> stack{new char[kStackBytes]};
};

struct BlockBarrier {
  unsigned generation = 0, arrived = 0;
  int count = 0, last_count = 0;  // threads whose predicate is true
};

struct Warp {
  unsigned generation = 0, arrived = 0, mask = 0, alive = 0;
  const char* operation = "";
  void* argument[kWarpSize];
};

// Dynamic shared memory. Under AddressSanitizer malloc's own red zones guard it.
class SharedMemory {
 public:
  explicit SharedMemory(size_t bytes)
      : bytes_(bytes),
        guard_(kAddressSanitizer ? 0 : kGuardBytes),
        memory_(static_cast<unsigned char*>(std::malloc(bytes + 2 * guard_)), std::free) {
    std::memset(memory_.get(), kGuard, bytes + 2 * guard_);
  }
  unsigned char* data() const { return memory_.get() + guard_; }
  void poison() const { std::memset(data(), 0xff, bytes_); }  // all ones is a NaN in every floating type
  bool intact() const {
    const auto is_guard = [](unsigned char byte) { return byte == kGuard; };
    return std::all_of(memory_.get(), data(), is_guard) && std::all_of(data() + bytes_, data() + bytes_ + guard_, is_guard);
  }

 private:
  static constexpr unsigned char kGuard = 0xa5;
  size_t bytes_, guard_;
  std::unique_ptr<unsigned char, void (*)(void*)> memory_;
};

struct Launch {
  Launch(dim3 grid_, dim3 block_, size_t shared_bytes)
      : grid(grid_), block(block_), threads(size_t(block_.x) * block_.y * block_.z), shared(shared_bytes) {}
  dim3 grid, block;
  uint3 block_index{};
  std::vector<Thread> threads;
  std::vector<Warp> warps;
  BlockBarrier barrier;
  SharedMemory shared;
  std::function<void()> kernel;
  size_t running = 0;  // index of the current thread
  size_t alive = 0;
  std::exception_ptr failure;
  jmp_buf scheduler;
};

inline Launch* active = nullptr;
inline std::mutex one_launch_at_a_time;

inline Thread& current_thread() { return active->threads[active->running]; }
inline unsigned current_lane() { return active->running % kWarpSize; }
inline Warp& current_warp() { return active->warps[active->running / kWarpSize]; }

inline std::string text(uint3 v) {
  return "(" + std::to_string(v.x) + "," + std::to_string(v.y) + "," + std::to_string(v.z) + ")";
}

[[noreturn]] inline void fail(const std::string& why) {
  throw Error("CUDA emulator: block " + text(active->block_index) + " thread " + text(current_thread().index) + ": " + why);
}

// ---- fibers ---------------------------------------------------------------------------------------------------------
// A fiber's first switch uses ucontext to get onto its stack; later ones use _setjmp, which makes no system call.

// AddressSanitizer must know which stack is in use.
inline void leave_stack_for(const void* bottom, size_t bytes) {
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_start_switch_fiber(nullptr, bottom, bytes);
#else
  (void)bottom, (void)bytes;
#endif
}
inline const void* scheduler_stack = nullptr;
inline size_t scheduler_stack_bytes = 0;
inline void arrived_on_fiber() {
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_finish_switch_fiber(nullptr, &scheduler_stack, &scheduler_stack_bytes);
#endif
}
inline void arrived_on_scheduler() {
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_finish_switch_fiber(nullptr, nullptr, nullptr);
#endif
}

[[noreturn]] inline void switch_to_scheduler() {
  leave_stack_for(scheduler_stack, scheduler_stack_bytes);
  _longjmp(active->scheduler, 1);
}

inline void wait_for(const unsigned& generation, const char* name) {
  Thread& thread = current_thread();
  thread.waits_on = &generation;
  thread.waits_since = generation;
  thread.waits_at = name;
  if (_setjmp(thread.context) == 0) switch_to_scheduler();
  arrived_on_fiber();
  current_thread().waits_on = nullptr;
}

// Copies that have not been waited for must find their destination as they left it.
inline void check_async_copies() {
  for (const AsyncCopy& copy : current_thread().async_copies)
    for (size_t i = 0; i < copy.bytes.size(); ++i)
      if (static_cast<const unsigned char*>(copy.destination)[i] != 0xff)
        fail("shared memory was written while an asynchronous copy to it was under way");
}

inline void fiber_main() {
  arrived_on_fiber();
  try {
    active->kernel();
    check_async_copies();
  } catch (...) {
    active->failure = std::current_exception();
  }
  current_thread().finished = true;
  --active->alive;
  current_warp().alive &= ~(1u << current_lane());
  switch_to_scheduler();
}

inline void resume(size_t index) {
  active->running = index;
  Thread& thread = active->threads[index];
  if (_setjmp(active->scheduler) == 0) {
    leave_stack_for(thread.stack.get(), kStackBytes);
    if (thread.started) _longjmp(thread.context, 1);
    thread.started = true;
    setcontext(&thread.first_context);
  }
  arrived_on_scheduler();
}

// ---- the scheduler --------------------------------------------------------------------------------------------------

inline bool can_run(const Thread& thread) {
  return !thread.finished && (!thread.waits_on || *thread.waits_on != thread.waits_since);
}

inline void start_thread(size_t index) {
  Thread& thread = active->threads[index];
  const dim3 block = active->block;
  thread.index = {unsigned(index % block.x), unsigned(index / block.x % block.y), unsigned(index / block.x / block.y)};
  thread.started = thread.finished = false;
  thread.waits_on = nullptr;
  thread.async_copies.clear();
#ifdef __SANITIZE_ADDRESS__
  ASAN_UNPOISON_MEMORY_REGION(thread.stack.get(), kStackBytes);  // left by the frames of the block before
#endif
  getcontext(&thread.first_context);
  thread.first_context.uc_stack.ss_sp = thread.stack.get();
  thread.first_context.uc_stack.ss_size = kStackBytes;
  thread.first_context.uc_link = nullptr;
  makecontext(&thread.first_context, fiber_main, 0);
  active->warps[index / kWarpSize].alive |= 1u << (index % kWarpSize);
}

[[noreturn]] inline void report_deadlock() {
  size_t waiting = 0, first = 0;
  for (size_t i = active->threads.size(); i-- > 0;) {
    if (active->threads[i].finished) continue;
    ++waiting;
    first = i;
  }
  active->running = first;
  fail("deadlock: " + std::to_string(waiting) + " threads wait, this one at " + current_thread().waits_at + ", and " +
       std::to_string(active->threads.size() - waiting) + " have exited");
}

inline void run_block(std::mt19937& random) {
  const size_t n = active->threads.size();
  active->alive = n;
  active->barrier = {};
  active->warps.assign((n + kWarpSize - 1) / kWarpSize, {});
  active->shared.poison();
  for (size_t i = 0; i < n; ++i) start_thread(i);
  std::vector<size_t> order(n);
  std::iota(order.begin(), order.end(), 0);
  if (schedule_seed == 1) std::reverse(order.begin(), order.end());
  while (active->alive) {
    if (schedule_seed > 1) std::shuffle(order.begin(), order.end(), random);
    bool progress = false;
    for (size_t i : order) {
      if (!can_run(active->threads[i])) continue;
      progress = true;
      resume(i);
      if (active->failure) std::rethrow_exception(active->failure);
    }
    if (!progress) report_deadlock();
  }
  if (!active->shared.intact()) fail("a write outside dynamic shared memory");
}

inline const char* launch_error(dim3 grid, dim3 block, size_t shared_bytes) {
  if (!grid.x || !grid.y || !grid.z || grid.x > 0x7fffffffu || grid.y > 65535 || grid.z > 65535)
    return "invalid configuration argument: grid";
  const size_t threads = size_t(block.x) * block.y * block.z;
  if (threads == 0 || threads > kMaxThreads || block.z > 64) return "invalid configuration argument: block";
  if (shared_bytes > kMaxSharedBytes) return "invalid argument: more than 163 KB of dynamic shared memory";
  return nullptr;
}

// Returns null, or what a GPU would refuse. Throws Error if the kernel itself is wrong.
template <class... Parameters, class... Arguments>
const char* launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes, Arguments... arguments) {
  if (const char* error = launch_error(grid, block, shared_bytes)) return error;
  const std::lock_guard<std::mutex> lock(one_launch_at_a_time);
  Launch state(grid, block, shared_bytes);
  state.kernel = [&] { kernel(Parameters(arguments)...); };
  struct Activate {
    explicit Activate(Launch* launch) { active = launch; }
    ~Activate() { active = nullptr; }
  } activate(&state);
  std::mt19937 random(schedule_seed);
  for (unsigned z = 0; z < grid.z; ++z)
    for (unsigned y = 0; y < grid.y; ++y)
      for (unsigned x = 0; x < grid.x; ++x) {
        state.block_index = {x, y, z};
        run_block(random);
      }
  return nullptr;
}

// ---- barriers and warp operations -----------------------------------------------------------------------------------

// Every thread of the block must arrive, exited ones included: stricter than the hardware, as the CUDA manual asks.
inline int sync_block(int predicate, const char* name) {
  BlockBarrier& barrier = active->barrier;
  barrier.count += predicate != 0;
  if (++barrier.arrived < active->threads.size()) {
    wait_for(barrier.generation, name);
  } else {
    barrier.last_count = barrier.count;
    barrier.arrived = barrier.count = 0;
    ++barrier.generation;
  }
  return barrier.last_count;
}

// All lanes of `mask` bring an argument; the last to arrive runs complete(arguments) for all of them.
template <class Complete>
void warp_collective(unsigned mask, const char* name, void* argument, Complete complete) {
  Warp& warp = current_warp();
  const unsigned self = 1u << current_lane();
  if (!(mask & self)) fail(std::string(name) + " by a lane that its mask leaves out");
  if (mask & ~warp.alive) fail(std::string(name) + " with a mask that names an absent or exited lane");
  if (warp.arrived && (warp.mask != mask || std::strcmp(warp.operation, name) != 0))
    fail(std::string(name) + " meets " + warp.operation + " of another lane of the warp, or another mask");
  warp.mask = mask;
  warp.operation = name;
  warp.argument[current_lane()] = argument;
  warp.arrived |= self;
  if (warp.arrived != mask) return wait_for(warp.generation, name);
  complete(warp.argument);
  warp.arrived = 0;
  ++warp.generation;
}

template <class T>
T shuffle(unsigned mask, const char* name, T value, int source) {
  struct Exchange {
    T value, result;
    int source;
  } mine{value, value, source};
  warp_collective(mask, name, &mine, [&](void** lanes) {
    for (unsigned lane = 0; lane < kWarpSize; ++lane) {
      if (!(mask >> lane & 1)) continue;
      Exchange& exchange = *static_cast<Exchange*>(lanes[lane]);
      if (!(mask >> exchange.source & 1)) fail(std::string(name) + " reads a lane outside its mask");
      exchange.result = static_cast<Exchange*>(lanes[exchange.source])->value;
    }
  });
  return mine.result;
}

inline unsigned ballot(unsigned mask, const char* name, int predicate) {
  struct Vote {
    bool yes;
    unsigned result;
  } mine{predicate != 0, 0};
  warp_collective(mask, name, &mine, [&](void** lanes) {
    unsigned votes = 0;
    for (unsigned lane = 0; lane < kWarpSize; ++lane)
      if (mask >> lane & 1) votes |= unsigned(static_cast<Vote*>(lanes[lane])->yes) << lane;
    for (unsigned lane = 0; lane < kWarpSize; ++lane)
      if (mask >> lane & 1) static_cast<Vote*>(lanes[lane])->result = votes;
  });
  return mine.result;
}

// ---- asynchronous copies to shared memory ---------------------------------------------------------------------------
// The destination is NaN until the issuing thread waits, whatever order the hardware would have taken.

inline void async_copy(void* destination, const void* source, size_t source_bytes, size_t bytes) {
  if (reinterpret_cast<uintptr_t>(destination) % bytes || reinterpret_cast<uintptr_t>(source) % bytes)
    fail("a misaligned asynchronous copy");
  AsyncCopy copy{destination, std::vector<char>(bytes, 0)};
  std::memcpy(copy.bytes.data(), source, source_bytes);
  std::memset(destination, 0xff, bytes);
  current_thread().async_copies.push_back(std::move(copy));
}

inline void async_wait_all() {
  check_async_copies();
  for (const AsyncCopy& copy : current_thread().async_copies)
    std::memcpy(copy.destination, copy.bytes.data(), copy.bytes.size());
  current_thread().async_copies.clear();
}

}  // namespace emulator

// ---- the names kernels use ------------------------------------------------------------------------------------------

#undef __shared__
#undef __launch_bounds__
#undef __grid_constant__
#define __shared__ static
#define __launch_bounds__(...)
#define __grid_constant__
#define threadIdx (emulator::current_thread().index)
#define blockIdx (emulator::active->block_index)
#define blockDim (emulator::active->block)
#define gridDim (emulator::active->grid)
#define warpSize 32

inline void __syncthreads() { emulator::sync_block(0, "__syncthreads"); }
inline int __syncthreads_count(int p) { return emulator::sync_block(p, "__syncthreads_count"); }
inline int __syncthreads_or(int p) { return emulator::sync_block(p, "__syncthreads_or") != 0; }
inline int __syncthreads_and(int p) {
  return emulator::sync_block(p, "__syncthreads_and") == int(emulator::active->threads.size());
}
inline void __syncwarp(unsigned mask = ~0u) {
  emulator::warp_collective(mask, "__syncwarp", nullptr, [](void**) {});
}

template <class T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32) {
  const int first = emulator::current_lane() & ~(width - 1);
  return emulator::shuffle(mask, "__shfl_sync", value, first + (source & (width - 1)));
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int bits, int width = 32) {
  const int lane = emulator::current_lane(), source = lane ^ bits;
  return emulator::shuffle(mask, "__shfl_xor_sync", value, source / width > lane / width ? lane : source);
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32) {
  const int lane = emulator::current_lane();
  const bool inside = lane % width + int(delta) < width;
  return emulator::shuffle(mask, "__shfl_down_sync", value, inside ? lane + int(delta) : lane);
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32) {
  const int lane = emulator::current_lane();
  return emulator::shuffle(mask, "__shfl_up_sync", value, lane % width >= int(delta) ? lane - int(delta) : lane);
}
inline unsigned __ballot_sync(unsigned mask, int p) { return emulator::ballot(mask, "__ballot_sync", p); }
inline int __any_sync(unsigned mask, int p) { return emulator::ballot(mask, "__any_sync", p) != 0; }
inline int __all_sync(unsigned mask, int p) { return emulator::ballot(mask, "__all_sync", p) == mask; }

// Only one fiber runs at a time, so plain read-modify-write is atomic.
template <class T>
T atomicAdd(T* address, T value) {
  const T old = *address;
  *address = old + value;
  return old;
}
template <class T>
T atomicMax(T* address, T value) {
  const T old = *address;
  *address = std::max(old, value);
  return old;
}
template <class T>
T atomicMin(T* address, T value) {
  const T old = *address;
  *address = std::min(old, value);
  return old;
}
template <class T>
T atomicExch(T* address, T value) {
  const T old = *address;
  *address = value;
  return old;
}
template <class T>
T atomicCAS(T* address, T expected, T value) {
  const T old = *address;
  if (old == expected) *address = value;
  return old;
}
inline void __threadfence() {}
inline void __threadfence_block() {}

template <class T>
T __ldg(const T* address) {
  return *address;
}
inline float __expf(float x) { return std::exp(x); }
inline float __logf(float x) { return std::log(x); }
inline float __log2f(float x) { return std::log2(x); }
inline float __fdividef(float x, float y) { return x / y; }
inline float __frcp_rn(float x) { return 1.0f / x; }
inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }
inline double rsqrt(double x) { return 1.0 / std::sqrt(x); }
inline float __saturatef(float x) { return x > 0.0f ? std::min(x, 1.0f) : 0.0f; }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __popcll(unsigned long long x) { return __builtin_popcountll(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __clz(int x) { return x ? __builtin_clz(unsigned(x)) : 32; }
template <class To, class From>
To emulator_bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From), "bit casts keep the size");
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}
inline float __int_as_float(int x) { return emulator_bit_cast<float>(x); }
inline float __uint_as_float(unsigned x) { return emulator_bit_cast<float>(x); }
inline int __float_as_int(float x) { return emulator_bit_cast<int>(x); }
inline unsigned __float_as_uint(float x) { return emulator_bit_cast<unsigned>(x); }
inline double __longlong_as_double(long long x) { return emulator_bit_cast<double>(x); }
inline long long __double_as_longlong(double x) { return emulator_bit_cast<long long>(x); }
using std::max;
using std::min;
