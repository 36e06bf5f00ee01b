// Elements in runs of 16 bytes, and sums over a row by the threads that share it.
#pragma once
#include <initializer_list>

#include "numeric.cuh"

namespace xai {

// The alignment that a run of N elements needs to be moved whole.
template <int N, class T>
constexpr size_t kRunAlignment = N * sizeof(T) < kPieceBytes ? N * sizeof(T) : kPieceBytes;

// `count` elements from `source` on into x, zeros behind them. vector: in as few memory instructions as possible; the caller
// has checked the alignment of the address and that N elements exist.
template <int N, class T, class Acc>
__device__ void load_run(const T* source, int64_t count, bool vector, Acc (&x)[N]) {
  T run[N];
  if (vector) {
    constexpr int step = int(kRunAlignment<N, T> / sizeof(T));
#pragma unroll
    for (int e = 0; e < N; e += step) load_whole<kRunAlignment<N, T>>(run + e, source + e);
  } else {
#pragma unroll
    for (int e = 0; e < N; ++e) run[e] = e < count ? source[e] : T(0.0f);
  }
#pragma unroll
  for (int e = 0; e < N; ++e) x[e] = to_accumulate<Acc>(run[e]);
}
template <int N, class T, class Acc>
__device__ void store_run(T* destination, int64_t count, bool vector, const Acc (&x)[N]) {
  T run[N];
#pragma unroll
  for (int e = 0; e < N; ++e) run[e] = T(x[e]);
  if (vector) {
    constexpr int step = int(kRunAlignment<N, T> / sizeof(T));
#pragma unroll
    for (int e = 0; e < N; e += step) store_whole<kRunAlignment<N, T>>(destination + e, run + e);
  } else {
#pragma unroll
    for (int e = 0; e < N; ++e)
      if (e < count) destination[e] = run[e];
  }
}

// Whether runs of N elements can be moved whole; a null pointer can.
template <int N, class T>
bool can_move_runs(int64_t row_elements, std::initializer_list<const void*> pointers) {
  bool aligned = row_elements % N == 0;
  for (const void* pointer : pointers) aligned &= reinterpret_cast<uintptr_t>(pointer) % kRunAlignment<N, T> == 0;
  return aligned;
}

// The threads that share a row: a warp, or a block of THREADS.
template <int THREADS>
struct RowThreads {
  static constexpr int kWarps = THREADS / kWarp;

  // Sum over the row's threads, in a fixed order, for all of them. shared: kWarps elements.
  template <class Acc>
  static __device__ Acc sum(Acc value, Acc* shared) {
    value = warp_sum(value);
    if (kWarps == 1) return value;
    __syncthreads();  // the sum before has been read
    if (threadIdx.x % kWarp == 0) shared[warp_index()] = value;
    __syncthreads();
    value = shared[0];
#pragma unroll
    for (int warp = 1; warp < kWarps; ++warp) value += shared[warp];
    return value;
  }
};

}  // namespace xai
