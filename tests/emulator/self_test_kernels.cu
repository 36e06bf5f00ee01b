// Small kernels, right and wrong ones, through which test_emulator.py examines the emulator. Each exported function
// launches one kernel and returns null, the launch error, or the message of the emulator's exception.
#include "mma.cuh"

namespace {

__global__ void warp_operations_kernel(const int* x, int* out) {  // x (32), out (7,32)
  const int lane = threadIdx.x, value = x[lane];
  out[0 * 32 + lane] = __shfl_sync(~0u, value, 5);
  out[1 * 32 + lane] = __shfl_xor_sync(~0u, value, 3);
  out[2 * 32 + lane] = __shfl_down_sync(~0u, value, 4);
  out[3 * 32 + lane] = __shfl_up_sync(~0u, value, 4, 16);
  out[4 * 32 + lane] = int(__ballot_sync(~0u, value % 2));
  out[5 * 32 + lane] = __any_sync(~0u, value == 7);
  out[6 * 32 + lane] = __all_sync(~0u, value >= 0);
}

__global__ void block_reductions_kernel(const int* x, int* out) {  // x (gridDim, blockDim), out (gridDim, 5)
  __shared__ int total;
  const int value = x[blockIdx.x * blockDim.x + threadIdx.x];
  if (threadIdx.x == 0) total = 0;
  __syncthreads();
  atomicAdd(&total, value);
  const int odd = __syncthreads_count(value % 2);
  const int any = __syncthreads_or(value == 7), all = __syncthreads_and(value > 0);
  if (threadIdx.x != 0) return;
  int* row = out + blockIdx.x * 5;
  row[0] = total, row[1] = odd, row[2] = any, row[3] = all, row[4] = int(blockIdx.x + gridDim.x);
}

template <bool WITH_BARRIER>
__global__ void reverse_kernel(const float* x, float* y) {  // y[i] = x[n - 1 - i]
  float* shared = xai::dynamic_smem<float>();
  shared[threadIdx.x] = x[threadIdx.x];
  if (WITH_BARRIER) __syncthreads();
  y[threadIdx.x] = shared[blockDim.x - 1 - threadIdx.x];
}

__global__ void read_fresh_shared_kernel(float* y) { y[threadIdx.x] = xai::dynamic_smem<float>()[threadIdx.x]; }

__global__ void write_shared_kernel(int index) { xai::dynamic_smem<float>()[index] = 1.0f; }

__global__ void divergent_barrier_kernel() {
  if (threadIdx.x < 16) __syncthreads();
}

__global__ void barrier_against_warp_kernel() {
  if (threadIdx.x < 16)
    __syncthreads();
  else
    __syncwarp();
}

__global__ void exited_lane_kernel(int* out) {
  if (threadIdx.x >= 16) return;
  out[threadIdx.x] = __shfl_sync(~0u, int(threadIdx.x), 0);
}

__global__ void empty_kernel() {}

// y = x through shared memory by asynchronous copies; 4 floats a thread, zeros from `valid` on
template <bool WAIT>
__global__ void async_copy_kernel(const float* x, float* y, int valid) {
  float* shared = xai::dynamic_smem<float>() + 4 * threadIdx.x;
  xai::copy_async_16(shared, x + 4 * threadIdx.x, int(threadIdx.x) < valid);
  if (WAIT) xai::copy_async_wait();
  for (int i = 0; i < 4; ++i) y[4 * threadIdx.x + i] = shared[i];
}

// Uses the destination of a copy before the copy has arrived.
template <bool WAIT>
__global__ void write_under_copy_kernel(const float* x) {
  float* shared = xai::dynamic_smem<float>();
  xai::copy_async_16(shared, x, true);
  shared[1] = 1;
  if (WAIT) xai::copy_async_wait();
}

// d (16,8) = a (16,K) b (8,K)^T with K = 32 bytes; fragments by ldmatrix
template <class T>
__global__ void mma_kernel(const T* a, const T* b, float* d) {
  constexpr int K = 32 / sizeof(T);
  const int lane = threadIdx.x, g = lane / 4, t = lane % 4;
  T* shared = xai::dynamic_smem<T>();  // a, then b twice
  for (int i = lane; i < 16 * K; i += 32) shared[i] = a[i];
  for (int i = lane; i < 8 * K; i += 32) shared[16 * K + i] = shared[24 * K + i] = b[i];
  __syncwarp();
  uint32_t fa[4], fb[4];
  xai::ldmatrix_x4(fa, shared + lane % 16 * K + lane / 16 * (K / 2));
  xai::ldmatrix_x4(fb, shared + (16 + lane / 16 * 8 + lane % 8) * K + lane / 8 % 2 * (K / 2));
  const uint32_t first[2] = {fb[0], fb[1]};
  float fd[4] = {};
  xai::mma<T>(fd, fa, first);
  for (int i = 0; i < 4; ++i) d[(g + i / 2 * 8) * 8 + 2 * t + i % 2] = fd[i];
}

template <class... Parameters, class... Arguments>
const char* run(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes, Arguments... arguments) {
  static std::string message;
  try {
    return xai::launch(kernel, grid, block, shared_bytes, nullptr, arguments...);
  } catch (const std::exception& error) {
    message = error.what();
    return message.c_str();
  }
}

}  // namespace

extern "C" {

void set_schedule_seed(int seed) { emulator::schedule_seed = seed; }

const char* warp_operations(const int* x, int* out) { return run(warp_operations_kernel, 1, 32, 0, x, out); }
const char* block_reductions(const int* x, int* out, int blocks, int threads) {
  return run(block_reductions_kernel, blocks, threads, 0, x, out);
}
const char* reverse(const float* x, float* y, int n, bool with_barrier) {
  return run(with_barrier ? reverse_kernel<true> : reverse_kernel<false>, 1, n, n * sizeof(float), x, y);
}
const char* read_fresh_shared(float* y, int n) { return run(read_fresh_shared_kernel, 1, n, n * sizeof(float), y); }
const char* write_shared(int floats, int index) { return run(write_shared_kernel, 1, 1, floats * sizeof(float), index); }
const char* divergent_barrier() { return run(divergent_barrier_kernel, 1, 32, 0); }
const char* barrier_against_warp() { return run(barrier_against_warp_kernel, 1, 32, 0); }
const char* exited_lane(int* out) { return run(exited_lane_kernel, 1, 32, 0, out); }
const char* launch_empty(unsigned grid, unsigned grid_y, unsigned threads, size_t shared_bytes) {
  return run(empty_kernel, dim3(grid, grid_y), threads, shared_bytes);
}
const char* async_copy(const float* x, float* y, int threads, int valid, bool wait) {
  return run(wait ? async_copy_kernel<true> : async_copy_kernel<false>, 1, threads, threads * 16, x, y, valid);
}
const char* write_under_copy(const float* x, bool wait) {
  return run(wait ? write_under_copy_kernel<true> : write_under_copy_kernel<false>, 1, 1, 16, x);
}
const char* mma_half(const __half* a, const __half* b, float* d) {
  return run(mma_kernel<__half>, 1, 32, 32 * 16 * sizeof(__half), a, b, d);
}
const char* mma_bfloat16(const __nv_bfloat16* a, const __nv_bfloat16* b, float* d) {
  return run(mma_kernel<__nv_bfloat16>, 1, 32, 32 * 16 * sizeof(__nv_bfloat16), a, b, d);
}
const char* mma_tf32(const float* a, const float* b, float* d) {
  return run(mma_kernel<float>, 1, 32, 32 * 8 * sizeof(float), a, b, d);
}
uint32_t round_to_tf32(uint32_t x) { return xai::round_to_tf32(x); }
}
