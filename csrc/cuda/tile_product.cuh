// Products of tiles in shared memory, computed by a whole block; the sums stay in its registers.
//
//   multiply     X (S,M) = A B^T       A (S,width) and B (M,width): scores of the pairs of a stationary and a moving tile
//   accumulate   C (S,width) += X B    X (S,M) or its transpose in shared memory, B (M,width): sums over the moving rows
//
// S stationary rows, M moving rows, width: up to DIM columns, a multiple of 8. Two back ends with one distribution of rows:
//   plain FMA   exact f32 and f64
//   TENSOR      mma.sync m16n8k8 on floats that are rounded to TF32 before they reach shared memory (16-bit inputs are
//   exact)
// A thread holds rows row(i) and, of X, columns column(j); of C, columns sum_column(j). The rows of A and B lie kPitch
// elements apart, 4 words more than a multiple of 32: then eight rows at four columns, and eight columns at every other row,
// fall into different banks. Every other row, because accumulate() pairs step k of an mma with row 2k or 2k + 1.
#pragma once
#include <type_traits>

#include "streamed_scores.cuh"

namespace xai {

constexpr size_t kMostSharedBytes = 160 * 1024;  // sm_80 has 163 KB

template <class ACC, int DIM, int STATIONARY, int MOVING, int WARPS_DOWN, int WARPS_ACROSS, bool TENSOR>
struct TileProduct {
  using Acc = ACC;
  static constexpr bool kTensor = TENSOR;
  static constexpr int kDim = DIM, kStationary = STATIONARY, kMoving = MOVING, kWarpsAcross = WARPS_ACROSS;
  static constexpr int kThreads = WARPS_DOWN * WARPS_ACROSS * kWarp;
  static constexpr int kPitch = DIM + kPiece<Acc>, kPairPitch = MOVING + 8;
  static constexpr int kWarpRows = STATIONARY / WARPS_DOWN, kWarpColumns = MOVING / WARPS_ACROSS;
  static constexpr int kWarpSumColumns = DIM / WARPS_ACROSS;
  static constexpr int kRows = kWarpRows / 8, kColumns = kWarpColumns / 4, kSumColumns = kWarpSumColumns / 4;
  static constexpr int kBlocksPerMultiprocessor = DIM == 64 ? 2 : 1;  // that the registers must allow
  // Buffers for moving tiles, given the shared memory that two would take. Narrow heads: other blocks work while one waits.
  static constexpr int buffers(size_t bytes_of_two) { return DIM == 128 && bytes_of_two <= kMostSharedBytes ? 2 : 1; }
  // Elements of shared memory.
  static constexpr int kStationaryTile = STATIONARY * kPitch, kMovingTile = MOVING * kPitch;
  static constexpr int kPairTile = STATIONARY * kPairPitch;
  static_assert(kWarpRows % (TENSOR ? 16 : 8) == 0 && kWarpColumns % (TENSOR ? 8 : 4) == 0, "whole fragments");
  static_assert(kWarpSumColumns % (4 * kPiece<Acc>) == 0 && MOVING % 8 == 0, "whole fragments");
  static_assert(!TENSOR || std::is_same_v<Acc, float>, "the tensor cores take floats");

  using Pairs = Acc[kRows][kColumns];
  using Sums = Acc[kRows][kSumColumns];

  static __device__ int row(int i) { return warp_index() / WARPS_ACROSS * kWarpRows + i * 8 + lane_row(); }
  static __device__ int column(int j) {
    const int first = warp_index() % WARPS_ACROSS * kWarpColumns;
    return first + (TENSOR ? j / 2 * 8 + 2 * lane_column() + j % 2 : j * 4 + lane_column());
  }
  static __device__ int sum_column(int j) {
    constexpr int piece = TENSOR ? 2 : kPiece<Acc>;
    return first_sum_column() + j / piece * 4 * piece + lane_column() * piece + j % piece;
  }

  // What the back end can multiply.
  static __device__ Acc operand(Acc x) {
    if constexpr (TENSOR) return __uint_as_float(round_to_tf32(__float_as_uint(x)));
    return x;
  }

  static __device__ void multiply(const Acc* a, const Acc* b, int width, Pairs& x) {
#pragma unroll
    for (int i = 0; i < kRows; ++i)
#pragma unroll
      for (int j = 0; j < kColumns; ++j) x[i][j] = 0;
    if constexpr (TENSOR)
      multiply_tensor(a, b, width, x);
    else
      multiply_plain(a, b, width, x);
  }

  // TRANSPOSED: x is (M,S) in shared memory.
  template <bool TRANSPOSED = false>
  static __device__ void accumulate(const Acc* x, int x_pitch, const Acc* b, int width, Sums& sums) {
    if constexpr (TENSOR)
      accumulate_tensor<TRANSPOSED>(x, x_pitch, b, width, sums);
    else
      accumulate_plain<TRANSPOSED>(x, x_pitch, b, width, sums);
  }

 private:
  static __device__ int first_sum_column() { return warp_index() % WARPS_ACROSS * kWarpSumColumns; }
  static __device__ uint32_t word(const Acc* x) { return __float_as_uint(*x); }

  static __device__ void multiply_tensor(const Acc* a, const Acc* b, int width, Pairs& x) {
    constexpr int row_tiles = kRows / 2, column_tiles = kColumns / 2;
    float d[row_tiles][column_tiles][4] = {};
    const Acc* a_lane = a + row(0) * kPitch + lane_column();
    const Acc* b_lane = b + (warp_index() % WARPS_ACROSS * kWarpColumns + lane_row()) * kPitch + lane_column();
#pragma unroll 2
    for (int k = 0; k < width; k += 8) {
      uint32_t left[row_tiles][4];
#pragma unroll
      for (int m = 0; m < row_tiles; ++m)
#pragma unroll
        for (int part = 0; part < 4; ++part)
          left[m][part] = word(a_lane + (m * 16 + part % 2 * 8) * kPitch + k + part / 2 * 4);
#pragma unroll
      for (int n = 0; n < column_tiles; ++n) {
        const uint32_t right[2] = {word(b_lane + n * 8 * kPitch + k), word(b_lane + n * 8 * kPitch + k + 4)};
#pragma unroll
        for (int m = 0; m < row_tiles; ++m) mma<float>(d[m][n], left[m], right);
      }
    }
#pragma unroll
    for (int i = 0; i < kRows; ++i)
#pragma unroll
      for (int j = 0; j < kColumns; ++j) x[i][j] = d[i / 2][j / 2][i % 2 * 2 + j % 2];
  }

  static __device__ void multiply_plain(const Acc* a, const Acc* b, int width, Pairs& x) {
#pragma unroll 1
    for (int k = 0; k < width; k += kPiece<Acc>) {
      Acc left[kRows][kPiece<Acc>];
#pragma unroll
      for (int i = 0; i < kRows; ++i) load_piece(a + row(i) * kPitch + k, left[i]);
#pragma unroll
      for (int j = 0; j < kColumns; ++j) {
        Acc right[kPiece<Acc>];
        load_piece(b + column(j) * kPitch + k, right);
#pragma unroll
        for (int i = 0; i < kRows; ++i)
#pragma unroll
          for (int e = 0; e < kPiece<Acc>; ++e) x[i][j] += left[i][e] * right[e];
      }
    }
  }

  template <bool TRANSPOSED>
  static __device__ void accumulate_tensor(const Acc* x, int x_pitch, const Acc* b, int width, Sums& sums) {
    constexpr int row_tiles = kRows / 2, column_tiles = kSumColumns / 2;
    const int step = 2 * lane_column(), first = first_sum_column();
    const Acc* b_lane = b + step * kPitch + first + lane_row();
#pragma unroll 2
    for (int k = 0; k < MOVING; k += 8) {
      uint32_t left[row_tiles][4];
#pragma unroll
      for (int m = 0; m < row_tiles; ++m)
#pragma unroll
        for (int part = 0; part < 4; ++part) {
          const int r = row(2 * m + part % 2), c = k + step + part / 2;
          left[m][part] = word(TRANSPOSED ? x + c * x_pitch + r : x + r * x_pitch + c);
        }
#pragma unroll
      for (int n = 0; n < column_tiles; ++n) {
        if (first + n * 8 >= width) break;
        const uint32_t right[2] = {word(b_lane + k * kPitch + n * 8), word(b_lane + (k + 1) * kPitch + n * 8)};
#pragma unroll
        for (int m = 0; m < row_tiles; ++m) {
          float d[4];
#pragma unroll
          for (int e = 0; e < 4; ++e) d[e] = sums[2 * m + e / 2][2 * n + e % 2];
          mma<float>(d, left[m], right);
#pragma unroll
          for (int e = 0; e < 4; ++e) sums[2 * m + e / 2][2 * n + e % 2] = d[e];
        }
      }
    }
  }

  template <bool TRANSPOSED>
  static __device__ void accumulate_plain(const Acc* x, int x_pitch, const Acc* b, int width, Sums& sums) {
    constexpr int piece = kPiece<Acc>;
#pragma unroll 1
    for (int k = 0; k < MOVING; k += piece) {
      Acc left[kRows][piece];
#pragma unroll
      for (int i = 0; i < kRows; ++i) load_left<TRANSPOSED>(x, x_pitch, row(i), k, left[i]);
#pragma unroll
      for (int j = 0; j < kSumColumns; j += piece) {
        const int c = sum_column(j);
        if (c >= width) break;
#pragma unroll
        for (int step = 0; step < piece; ++step) {
          Acc right[piece];
          load_piece(b + (k + step) * kPitch + c, right);
#pragma unroll
          for (int i = 0; i < kRows; ++i)
#pragma unroll
            for (int e = 0; e < piece; ++e) sums[i][j + e] += left[i][step] * right[e];
        }
      }
    }
  }

  // left[step] = X(row, k + step)
  template <bool TRANSPOSED>
  static __device__ void load_left(const Acc* x, int x_pitch, int row, int k, Acc (&left)[kPiece<Acc>]) {
    if constexpr (TRANSPOSED) {
#pragma unroll
      for (int step = 0; step < kPiece<Acc>; ++step) left[step] = x[(k + step) * x_pitch + row];
    } else {
      load_piece(x + row * x_pitch + k, left);
    }
  }
};

// Fills `rows` rows of a tile from rows of `width` elements that follow one another. In shared memory after
// copy_async_wait().
template <class Product>
__device__ void copy_tile(typename Product::Acc* tile, const typename Product::Acc* source, int rows, int width) {
  constexpr int piece = kPiece<typename Product::Acc>, lanes = 8;
#pragma unroll 2
  for (int row = threadIdx.x / lanes; row < rows; row += Product::kThreads / lanes)
    for (int c = threadIdx.x % lanes * piece; c < width; c += lanes * piece)
      copy_async_16(tile + row * Product::kPitch + c, source + int64_t(row) * width + c, true);
}

// Meets the tiles `tile`, next(tile + 1), ... below `end`: load(tile, buffer) starts copies, use(tile, buffer) works on
// them. With two buffers a tile is copied while the one before is used. Copies that the caller has started arrive with the
// first. The buffers must be free on entry; they are free again after the caller's next __syncthreads().
template <int BUFFERS, class Next, class Load, class Use>
__device__ void stream_tiles(int64_t tile, int64_t end, Next next, Load load, Use use) {
  if (tile >= end) return;
  load(tile, 0);
  for (int buffer = 0; tile < end; buffer ^= BUFFERS - 1) {
    const int64_t following = next(tile + 1);
    copy_async_wait();
    __syncthreads();
    if (BUFFERS == 2 && following < end) load(following, buffer ^ 1);
    use(tile, buffer);
    if (BUFFERS == 1 && following < end) {
      __syncthreads();
      load(following, 0);
    }
    tile = following;
  }
}

// Calls f(Type<Product>) with the tile products for heads of `widest` elements. With narrow heads several blocks share a
// multiprocessor; with wide ones a block needs its shared memory alone.
template <class F>
auto with_products(Dtype dtype, bool tf32, int64_t widest, F f) {
  if (dtype == Dtype::f64) return f(Type<TileProduct<double, 256, 16, 16, 2, 4, false>>());
  if (dtype != Dtype::f32 || tf32) {
    if (widest <= 64) return f(Type<TileProduct<float, 64, 64, 32, 2, 2, true>>());
    if (widest <= 128) return f(Type<TileProduct<float, 128, 64, 32, 2, 4, true>>());
    return f(Type<TileProduct<float, 256, 32, 32, 2, 4, true>>());
  }
  if (widest <= 64) return f(Type<TileProduct<float, 64, 64, 32, 2, 2, false>>());
  if (widest <= 128) return f(Type<TileProduct<float, 128, 64, 32, 2, 4, false>>());
  return f(Type<TileProduct<float, 256, 32, 32, 2, 4, false>>());
}

}  // namespace xai
