// Rows of attention that is given, fused over the heads.
//
// A block takes a few rows of one image at a time. Pass 1: its warps fuse the heads of 32-lane segments of the rows, leave
// the fused values in shared memory and sum them. Pass 2: the values are used, now that the row sums are known. So A is
// read once, although a row's coefficient depends on the whole row.
#pragma once
#include <algorithm>

#include "numeric.cuh"

namespace xai {

constexpr int kRowThreads = 256;      // three blocks a multiprocessor
constexpr int kLongRowThreads = 768;  // one block: a long row fills the shared memory
constexpr size_t kRowTileBytes = 48 * 1024;
constexpr size_t kLongRowBytes =
    152 * 1024;  // with the sums of segments it fits sm_80; columns beyond are fused again in pass 2
constexpr int kMaxTileRows = 32;
constexpr int kHeadsInFlight = 3;  // more would leave registers for fewer blocks
constexpr int kRowGroup = 4;       // rows r whose sums one thread keeps

// Shapes of the shared memory: fused (rows,pitch), segment_sums (rows,segments), inverse (rows).
struct RowTileShape {
  int rows, pitch, segments;
};

struct FusedRows {
  View4 attention;
  int64_t batch, heads, tokens;
  double residual;
  bool normalize;
  Fusion fusion;
};

// Elements of a row that one lane fuses together. VECTOR: one piece, else one element from each of several 32-column runs.
template <class T, bool VECTOR>
struct Segment {
  static constexpr int kElements = kPiece<T>;
  static constexpr int kColumns = kWarp * kElements;
  static __device__ int64_t column(int64_t first, int e) {
    const int lane = threadIdx.x % kWarp;
    return first + (VECTOR ? lane * kElements + e : e * kWarp + lane);
  }
  static __device__ void load(const T* row, int64_t first, int64_t tokens, T (&x)[kElements]) {
    if (VECTOR && column(first, kElements - 1) < tokens) return load_whole<kPieceBytes>(x, row + column(first, 0));
#pragma unroll
    for (int e = 0; e < kElements; ++e) x[e] = column(first, e) < tokens ? row[column(first, e)] : T(0.0f);
  }
};

template <int N, class T, class Acc>
__device__ void fuse(Acc (&fused)[N], const T (&x)[N], Fusion fusion) {
  if (fusion == Fusion::max) {
#pragma unroll
    for (int e = 0; e < N; ++e) fused[e] = larger(fused[e], Acc(x[e]));
  } else if (fusion == Fusion::min) {
#pragma unroll
    for (int e = 0; e < N; ++e) fused[e] = smaller(fused[e], Acc(x[e]));
  } else {
#pragma unroll
    for (int e = 0; e < N; ++e) fused[e] += Acc(x[e]);
  }
}

// fused[e] = w [column e is i] + fuse_h A[b,h,i,column e]; zeros beyond the row
template <class Lanes, class T, class Acc, int N>
__device__ void fuse_segment(const FusedRows& p, int64_t b, int64_t i, int64_t first, Acc (&fused)[N]) {
  const T* row = static_cast<const T*>(p.attention.data) + b * p.attention.batch + i * p.attention.row;
#pragma unroll
  for (int e = 0; e < N; ++e) fused[e] = empty_fusion<Acc>(p.fusion);
  for (int64_t h = 0; h < p.heads; h += kHeadsInFlight) {
    T x[kHeadsInFlight][N];
#pragma unroll
    for (int u = 0; u < kHeadsInFlight; ++u)
      if (h + u < p.heads) Lanes::load(row + (h + u) * p.attention.head, first, p.tokens, x[u]);
#pragma unroll
    for (int u = 0; u < kHeadsInFlight; ++u)
      if (h + u < p.heads) fuse(fused, x[u], p.fusion);
  }
  const Acc factor = p.fusion == Fusion::mean ? Acc(1) / Acc(p.heads) : Acc(1);
#pragma unroll
  for (int e = 0; e < N; ++e) {
    const int64_t column = Lanes::column(first, e);
    fused[e] = fused[e] * factor + (column == i ? Acc(p.residual) : Acc(0));
    if (column >= p.tokens) fused[e] = 0;
  }
}

// One element, for the columns that shared memory does not hold.
template <class T>
struct OneColumn {
  static __device__ int64_t column(int64_t first, int) { return first; }
  static __device__ void load(const T* row, int64_t first, int64_t, T (&x)[1]) { x[0] = row[first]; }
};

template <class T, bool VECTOR>
class RowTile {
  using Acc = Accumulate<T>;
  using Lanes = Segment<T, VECTOR>;

 public:
  static size_t shared_bytes(RowTileShape s) { return sizeof(Acc) * s.rows * (size_t(s.pitch) + s.segments + 1); }

  __device__ RowTile(const FusedRows& p, RowTileShape shape)
      : p_(p),
        shape_(shape),
        fused_(dynamic_smem<Acc>()),
        segment_sums_(fused_ + shape.rows * shape.pitch),
        inverse_(segment_sums_ + shape.rows * shape.segments) {}

  // Pass 1 for the rows [begin, begin + count) of image b. Starts and ends with a barrier.
  __device__ void load(int64_t b, int64_t begin, int count) {
    b_ = b, begin_ = begin;
    __syncthreads();
    for (int item = warp_index(); item < count * shape_.segments; item += blockDim.x / kWarp)
      load_segment(item / shape_.segments, item % shape_.segments);
    __syncthreads();
    for (int row = warp_index(); row < count; row += blockDim.x / kWarp) invert_sum(row);
    __syncthreads();
  }

  // Calls use(j, value) for the columns of this thread, where value(row) is element j of a fused row before normalisation:
  // from shared memory as far as that reaches, else fused again.
  template <class Use>
  __device__ void for_columns(Use use) const {
    int64_t j = threadIdx.x;
    for (; j < min(p_.tokens, int64_t(shape_.pitch)); j += blockDim.x)
      use(j, [&](int row) { return fused_[row * shape_.pitch + j]; });
    for (; j < p_.tokens; j += blockDim.x)
      use(j, [&](int row) {
        Acc value[1];
        fuse_segment<OneColumn<T>, T>(p_, b_, begin_ + row, j, value);
        return value[0];
      });
  }
  __device__ Acc inverse(int row) const { return inverse_[row]; }

 private:
  __device__ void load_segment(int row, int segment) {
    constexpr int n = Lanes::kElements;
    const int64_t first = int64_t(segment) * Lanes::kColumns;
    Acc values[n], sum = 0;
    fuse_segment<Lanes, T>(p_, b_, begin_ + row, first, values);
#pragma unroll
    for (int e = 0; e < n; ++e) sum += values[e];
    store(fused_ + row * shape_.pitch, first, values);
    sum = warp_sum(sum);
    if (threadIdx.x % kWarp == 0) segment_sums_[row * shape_.segments + segment] = sum;
  }

  __device__ void store(Acc* row, int64_t first, const Acc (&values)[Lanes::kElements]) {
#pragma unroll
    for (int e = 0; e < Lanes::kElements; e += VECTOR ? kPiece<Acc> : 1) {
      const int64_t column = Lanes::column(first, e);
      if (column >= shape_.pitch) continue;
      if (VECTOR)
        store_shared_16(row + column, values + e);
      else
        row[column] = values[e];
    }
  }

  // A row that sums to 0 stays zero: its inverse is 0.
  __device__ void invert_sum(int row) {
    Acc sum = 0;
    for (int s = threadIdx.x % kWarp; s < shape_.segments; s += kWarp) sum += segment_sums_[row * shape_.segments + s];
    sum = warp_sum(sum);
    if (threadIdx.x % kWarp == 0) inverse_[row] = !p_.normalize ? Acc(1) : sum == 0 ? Acc(0) : 1 / sum;
  }

  const FusedRows& p_;
  RowTileShape shape_;
  int64_t b_ = 0, begin_ = 0;
  Acc *fused_, *segment_sums_, *inverse_;
};

template <class T, bool VECTOR>
RowTileShape row_tile_shape(int64_t tokens, int64_t rows) {
  using Acc = Accumulate<T>;
  const int64_t padded = (tokens + kPiece<T> - 1) / kPiece<T> * kPiece<T>;
  RowTileShape shape;
  shape.pitch = int(std::min<int64_t>(padded, kLongRowBytes / sizeof(Acc)));
  shape.rows = int(std::min<int64_t>(rows, kRowTileBytes / (shape.pitch * sizeof(Acc))));
  shape.rows = std::max(1, std::min(shape.rows, kMaxTileRows));
  shape.segments = int((tokens + Segment<T, VECTOR>::kColumns - 1) / Segment<T, VECTOR>::kColumns);
  return shape;
}

inline unsigned row_threads(size_t shared_bytes) { return shared_bytes > 2 * kRowTileBytes ? kLongRowThreads : kRowThreads; }

}  // namespace xai
