// launch() and dynamic_smem(): how a kernel is started and gets its shared memory, under nvcc and under the emulator.
#pragma once
#include <cstddef>
#include <cstdint>

#ifdef XAI_EMULATE
#include "cuda_emulator.h"
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#endif

namespace xai {

// Blocks that fill a large GPU once: 132 multiprocessors with three blocks each. A constant, not a property of the device,
// so that results do not depend on the device.
constexpr int64_t kResidentBlocks = 396;

// Blocks that cover `items` when each takes `per_block`.
inline unsigned blocks_for(int64_t items, int64_t per_block) { return unsigned((items + per_block - 1) / per_block); }

// A grid counted in 64 bits; the launch refuses what no grid can hold.
inline unsigned grid_of(int64_t blocks) { return blocks > 0x7fffffff ? ~0u : unsigned(blocks); }

#ifdef XAI_EMULATE

template <class... Parameters, class... Arguments>
const char* launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes, void*,
                   Arguments... arguments) {
  return emulator::launch(kernel, grid, block, shared_bytes, arguments...);
}

template <class T>
T* dynamic_smem() {
  return reinterpret_cast<T*>(emulator::active->shared.data());
}

#else

constexpr size_t kSharedBytesByDefault = 48 * 1024;

// Null, or the message of the CUDA runtime.
template <class... Parameters, class... Arguments>
const char* launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes, void* stream,
                   Arguments... arguments) {
  cudaError_t error = cudaSuccess;
  if (shared_bytes > kSharedBytesByDefault)
    error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(shared_bytes));
  if (error == cudaSuccess) {
    // clang-format off
    kernel<<<grid, block, shared_bytes, static_cast<cudaStream_t>(stream)>>>(Parameters(arguments)...);
    // clang-format on
    error = cudaGetLastError();
  }
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

template <class T>
__device__ T* dynamic_smem() {
  extern __shared__ __align__(16) unsigned char dynamic_shared_memory[];
  return reinterpret_cast<T*>(dynamic_shared_memory);
}

#endif

}  // namespace xai
