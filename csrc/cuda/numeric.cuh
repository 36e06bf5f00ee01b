// Element types, 16-byte pieces, fusion of heads and sums over a warp.
#pragma once
#include "../types.h"
#include "mma.cuh"

namespace xai {

template <class T>
struct AccumulateOf {
  using type = float;
};
template <>
struct AccumulateOf<double> {
  using type = double;
};
template <class T>
using Accumulate = typename AccumulateOf<T>::type;

template <class Acc, class T>
__device__ Acc to_accumulate(T x) {
  return Acc(static_cast<Accumulate<T>>(x));
}

constexpr double kLog2e = 1.4426950408889634;
template <class Acc>
__device__ constexpr Acc infinity() {
  return Acc(__builtin_huge_val());
}

__device__ inline float exp2_of(float x) { return fast_exp2(x); }
__device__ inline double exp2_of(double x) { return exp2(x); }
__device__ inline float log2_of(float x) { return log2f(x); }
__device__ inline double log2_of(double x) { return log2(x); }

// ---- 16-byte pieces: one memory instruction each --------------------------------------------------------------------

constexpr int kPieceBytes = 16;
template <class T>
constexpr int kPiece = kPieceBytes / int(sizeof(T));

template <class T>
__device__ inline void load_piece(const T* source, T (&piece)[kPiece<T>]) {
  memcpy(piece, __builtin_assume_aligned(static_cast<const void*>(source), kPieceBytes), kPieceBytes);
}
template <class T>
__device__ inline void store_piece(T* destination, const T* piece) {
  memcpy(__builtin_assume_aligned(static_cast<void*>(destination), kPieceBytes), piece, kPieceBytes);
}

__host__ __device__ inline bool is_piece_aligned(const void* pointer) {
  return reinterpret_cast<uintptr_t>(pointer) % kPieceBytes == 0;
}
inline bool is_piece_multiple(int64_t elements, size_t element_bytes) {
  return elements * int64_t(element_bytes) % kPieceBytes == 0;
}
// Every row of the view starts at a multiple of 16 bytes.
inline bool rows_are_aligned(const View4& view, size_t element_bytes) {
  return is_piece_aligned(view.data) && is_piece_multiple(view.batch, element_bytes) &&
         is_piece_multiple(view.head, element_bytes) && is_piece_multiple(view.row, element_bytes);
}

// ---- fusion of heads ------------------------------------------------------------------------------------------------

inline bool is_extreme(Fusion fusion) { return fusion == Fusion::max || fusion == Fusion::min; }

template <class Acc>
__device__ Acc empty_fusion(Fusion fusion) {
  if (fusion == Fusion::max) return -infinity<Acc>();
  return fusion == Fusion::min ? infinity<Acc>() : Acc(0);
}
// A NaN wins over every number, as in torch.amax.
template <class Acc>
__device__ Acc larger(Acc a, Acc b) {
  return b > a || b != b ? b : a;
}
template <class Acc>
__device__ Acc smaller(Acc a, Acc b) {
  return b < a || b != b ? b : a;
}

// ---- warps ----------------------------------------------------------------------------------------------------------

constexpr int kWarp = 32;
constexpr unsigned kAllLanes = ~0u;

__device__ inline int warp_index() { return threadIdx.x / kWarp; }

template <class Acc>
__device__ Acc warp_sum(Acc value) {
#pragma unroll
  for (int bits = kWarp / 2; bits; bits /= 2) value += __shfl_xor_sync(kAllLanes, value, bits);
  return value;
}

}  // namespace xai
