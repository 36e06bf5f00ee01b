// CUDA side of ../metrics.h: noise that is uniform in a ball.
#include <cmath>

#include "../metrics.h"
#include "../philox.h"
#include "dispatch.cuh"
#include "launch.cuh"
#include "row_sums.cuh"

namespace xai {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / kWarp;
constexpr int kRun = 4;  // entries of one counter
constexpr int64_t kSlotEntries = 1 << 13;

#ifdef XAI_EMULATE
inline void sincospif(float x, float* sine, float* cosine) {
  const double angle = 3.14159265358979323846 * double(x);
  *sine = float(std::sin(angle));
  *cosine = float(std::cos(angle));
}
#endif

// Uniform in (0, 1]
__device__ inline float share_of(uint32_t word) { return float((word >> 8) + 1) * 0x1p-24f; }

// The noise of entries 4 counter .. 4 counter + 3, before it is scaled.
__device__ inline void make_noise(const Perturb& p, int64_t e, int64_t counter, float (&noise)[kRun]) {
  const Words words =
      philox(p.seed, uint32_t(counter), uint32_t(p.draw[e]), uint32_t(p.first_sample + p.sample[e]), kPerturbStream);
  if (p.ball == Ball::linf) {
#pragma unroll
    for (int k = 0; k < kRun; ++k) noise[k] = float(2 * int(words.word[k] >> 8) + 1 - (1 << 24)) * 0x1p-24f;
    return;
  }
#pragma unroll
  for (int k = 0; k < kRun; k += 2) {
    const float length = sqrtf(-2.0f * logf(share_of(words.word[k])));
    float sine, cosine;
    sincospif(float(words.word[k + 1] >> 8) * 0x1p-23f, &sine, &cosine);
    noise[k] = length * cosine;
    noise[k + 1] = length * sine;
  }
}

// f(first entry, count) for the counters of this thread in the block's slot. blockIdx.x = example * slots + slot
template <class F>
__device__ void in_counters(const Perturb& p, int64_t slot, F f) {
  const int64_t begin = slot * kSlotEntries, end = min(p.entries, begin + kSlotEntries);
  for (int64_t i = begin + int64_t(threadIdx.x) * kRun; i < end; i += kThreads * kRun) f(i, min(int64_t(kRun), end - i));
}

// partial[e,slot] = sum of the squares of g
__global__ void __launch_bounds__(kThreads) measure_kernel(const Perturb p) {
  const int64_t e = blockIdx.x / p.slots;
  double squares = 0;
  in_counters(p, blockIdx.x - e * p.slots, [&](int64_t i, int64_t count) {
    float noise[kRun];
    make_noise(p, e, i / kRun, noise);
#pragma unroll
    for (int k = 0; k < kRun; ++k)
      if (k < count) squares += double(noise[k]) * double(noise[k]);
  });
  squares = RowThreads<kThreads>::sum(squares, dynamic_smem<double>());
  if (threadIdx.x == 0) p.partial[blockIdx.x] = squares;
}

// partial[e,0] = what scales g, a warp an example.
__global__ void __launch_bounds__(kThreads) scale_kernel(const Perturb p) {
  const int64_t e = int64_t(blockIdx.x) * kWarps + warp_index();
  const int lane = threadIdx.x % kWarp;
  if (e >= p.examples) return;
  double squares = 0;
  for (int64_t slot = lane; slot < p.slots; slot += kWarp) squares += p.partial[e * p.slots + slot];
  squares = warp_sum(squares);
  if (lane != 0) return;
  const Words words =
      philox(p.seed, kRadiusCounter, uint32_t(p.draw[e]), uint32_t(p.first_sample + p.sample[e]), kPerturbStream);
  const double length = p.radius * pow(double(share_of(words.word[0])), 1 / double(p.entries));
  p.partial[e * p.slots] = squares > 0 ? length / sqrt(squares) : 0.0;
}

// out = x + factor noise. The normals are made again: that costs less than to write and to read them.
template <class T>
__global__ void __launch_bounds__(kThreads) add_noise_kernel(const Perturb p, bool vector) {
  using Acc = Accumulate<T>;
  const int64_t e = blockIdx.x / p.slots;
  const Acc factor = Acc(p.ball == Ball::l2 ? p.partial[e * p.slots] : p.radius);
  const T* source = static_cast<const T*>(p.x) + p.sample[e] * p.entries;
  T* out = static_cast<T*>(p.out) + e * p.entries;
  in_counters(p, blockIdx.x - e * p.slots, [&](int64_t i, int64_t count) {
    float noise[kRun];
    Acc x[kRun];
    make_noise(p, e, i / kRun, noise);
    load_run(source + i, count, vector, x);
#pragma unroll
    for (int k = 0; k < kRun; ++k) x[k] += factor * Acc(noise[k]);
    store_run(out + i, count, vector, x);
  });
}

}  // namespace

int64_t perturb_slots_cuda(int64_t entries) { return (entries + kSlotEntries - 1) / kSlotEntries; }

const char* launch_perturb(const Perturb& p, void* stream) {
  const unsigned blocks = grid_of(p.examples * p.slots);
  if (p.ball == Ball::l2) {
    const char* error = launch(measure_kernel, blocks, kThreads, kWarps * sizeof(double), stream, p);
    if (!error) error = launch(scale_kernel, blocks_for(p.examples, kWarps), kThreads, 0, stream, p);
    if (error) return error;
  }
  return with_dtype(p.dtype, [&](auto element) -> const char* {
    using T = typename decltype(element)::type;
    return launch(add_noise_kernel<T>, blocks, kThreads, 0, stream, p, can_move_runs<kRun, T>(p.entries, {p.x, p.out}));
  });
}

}  // namespace xai
