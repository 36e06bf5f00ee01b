// launch() and dynamic_smem(): how a kernel is started and gets its shared memory, under nvcc and under the emulator.
// launch_repeated(): the same launches many times over.
#pragma once
#include <algorithm>
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

// Multiprocessors of a large GPU, and blocks that fill it once with three on each. Constants, not properties of the device,
// so that results do not depend on the device.
constexpr int64_t kMultiprocessors = 132;
constexpr int64_t kResidentBlocks = 3 * kMultiprocessors;

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

template <class Body>
const char* launch_repeated(void* stream, int64_t times, Body body) {
  for (int64_t i = 0; i < times; ++i)
    if (const char* error = body(stream)) return error;
  return nullptr;
}

inline size_t most_shared_bytes() { return emulator::kMaxSharedBytes; }

template <class T>
T* dynamic_smem() {
  return reinterpret_cast<T*>(emulator::active->shared.data());
}

#else

constexpr size_t kSharedBytesByDefault = 48 * 1024;

// What a block of the current device can have: 227 KB on sm_90, 163 KB on sm_80, 99 KB on sm_86 and sm_89.
inline size_t most_shared_bytes() {
  int device = 0, bytes = 0;
  const bool known = cudaGetDevice(&device) == cudaSuccess &&
                     cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device) == cudaSuccess;
  return known ? size_t(bytes) : kSharedBytesByDefault;
}

// Null, or the message of the CUDA runtime.
template <class... Parameters, class... Arguments>
const char* launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes, void* stream,
                   Arguments... arguments) {
  cudaError_t error = cudaSuccess;
  cudaGetLastError();  // an error that an earlier call has reported already
  if (shared_bytes > kSharedBytesByDefault && shared_bytes > most_shared_bytes())
    return "this GPU has less shared memory than sm_80, which the kernel for these shapes needs";
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

constexpr int64_t kGraphSteps = 64;        // steps in one graph: its launch costs little next to them
constexpr int64_t kLeastGraphSteps = 128;  // fewer are sooner launched than captured

// Launches `steps` calls of body as one graph, `times` times on `stream`. capture: a stream that nothing else uses.
template <class Body>
const char* launch_graph(cudaStream_t capture, cudaStream_t stream, int64_t steps, int64_t times, Body body) {
  if (steps == 0 || times == 0) return nullptr;
  cudaGraph_t graph = nullptr;
  cudaGraphExec_t executable = nullptr;
  const char* message = nullptr;
  cudaError_t error = cudaStreamBeginCapture(capture, cudaStreamCaptureModeRelaxed);
  if (error != cudaSuccess) return cudaGetErrorString(error);
  for (int64_t i = 0; i < steps && !message; ++i) message = body(capture);
  error = cudaStreamEndCapture(capture, &graph);
  if (!message && error == cudaSuccess) error = cudaGraphInstantiate(&executable, graph, 0);
  for (int64_t i = 0; i < times && !message && error == cudaSuccess; ++i) error = cudaGraphLaunch(executable, stream);
  if (executable) cudaGraphExecDestroy(executable);  // CUDA keeps it until it has run
  if (graph) cudaGraphDestroy(graph);
  if (message || error == cudaSuccess) return message;
  return cudaGetErrorString(error);
}

// Calls body(stream) `times` times, in effect. body issues the launches of one step, the same ones every time, and returns
// null or a message. Many steps become graphs: a launch of a graph costs as much as that of one kernel.
template <class Body>
const char* launch_repeated(void* stream, int64_t times, Body body) {
  const auto target = static_cast<cudaStream_t>(stream);
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  cudaError_t error = cudaStreamIsCapturing(target, &status);
  if (error == cudaSuccess && (times < kLeastGraphSteps || status != cudaStreamCaptureStatusNone)) {
    for (int64_t i = 0; i < times; ++i)
      if (const char* message = body(stream)) return message;
    return nullptr;
  }
  cudaStream_t capture = nullptr;
  if (error == cudaSuccess) error = cudaStreamCreateWithFlags(&capture, cudaStreamNonBlocking);
  if (error != cudaSuccess) return cudaGetErrorString(error);
  const char* message = launch_graph(capture, target, kGraphSteps, times / kGraphSteps, body);
  cudaStreamDestroy(capture);
  for (int64_t i = 0; i < times % kGraphSteps && !message; ++i) message = body(stream);
  return message;
}

template <class T>
__device__ T* dynamic_smem() {
  extern __shared__ __align__(16) unsigned char dynamic_shared_memory[];
  return reinterpret_cast<T*>(dynamic_shared_memory);
}

#endif

}  // namespace xai
