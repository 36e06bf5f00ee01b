// CUDA side of ../ihvp.h: random projection by signs that are computed where they are needed.
#include <cmath>

#include "../philox.h"
#include "dispatch.cuh"
#include "row_step.cuh"

namespace xai {
namespace {

constexpr int kWarps = 8, kThreads = kWarps * kWarp;
constexpr int kGroup = 128, kWords = kGroup / kWarp;  // outputs that one call of Philox gives the signs of
constexpr int kMostBatch = 8;                         // rows of x that share the signs

// What a warp shares: the bits of 32 inputs, and the elements of x that they sign.
template <class Acc, int BATCH>
struct SignedTile {
  alignas(16) uint32_t bits[kWarp][kWords];
  alignas(16) Acc x[kWarp][BATCH];
};

// Inputs first + lane into the tile, zeros behind `end`.
template <class T, class Acc, int BATCH>
__device__ void load_tile(const Projection& p, int64_t first, int64_t end, int64_t group, int64_t row, int rows,
                          SignedTile<Acc, BATCH>& tile) {
  const int lane = threadIdx.x % kWarp;
  const Words words = projection_bits(p.seed, p.offset + first + lane, group);
#pragma unroll
  for (int w = 0; w < kWords; ++w) tile.bits[lane][w] = words.word[w];
  const T* x = static_cast<const T*>(p.x) + row * p.row_stride + first + lane;
#pragma unroll
  for (int b = 0; b < BATCH; ++b)
    tile.x[lane][b] = b < rows && first + lane < end ? to_accumulate<Acc>(x[b * p.row_stride]) : Acc(0);
}

// x (batch,inputs) -> partial (slots,batch,outputs). A block takes a slot of inputs, 128 outputs and BATCH rows; its warps
// take every eighth 32 inputs, and a lane the outputs lane, lane + 32, ...: one bit of every word.
// blockIdx.x = (slot * groups + group) * row tiles + row tile
template <class T, int BATCH>
__global__ void __launch_bounds__(kThreads) projection_kernel(const Projection p) {
  using Acc = Accumulate<T>;
  const int64_t groups = (p.outputs + kGroup - 1) / kGroup, tiles = (p.batch + BATCH - 1) / BATCH;
  const int64_t row = blockIdx.x % tiles * BATCH, group = blockIdx.x / tiles % groups, slot = blockIdx.x / tiles / groups;
  const int64_t begin = slot * p.inputs / p.slots, end = (slot + 1) * p.inputs / p.slots;
  const int rows = int(min(int64_t(BATCH), p.batch - row)), lane = threadIdx.x % kWarp;
  auto& tile = dynamic_smem<SignedTile<Acc, BATCH>>()[warp_index()];
  Acc sums[kWords][BATCH] = {};
  for (int64_t first = begin + warp_index() * kWarp; first < end; first += kThreads) {
    load_tile<T>(p, first, end, group, row, rows, tile);
    __syncwarp();
#pragma unroll 4
    for (int i = 0; i < kWarp; ++i) {
#pragma unroll
      for (int w = 0; w < kWords; ++w) {
        const Acc sign = with_sign(Acc(1), tile.bits[i][w] >> lane & 1);
#pragma unroll
        for (int b = 0; b < BATCH; ++b) sums[w][b] += sign * tile.x[i][b];
      }
    }
    __syncwarp();
  }
  // The warps' sums are added in order, where their tiles were.
  __syncthreads();
  Acc* total = dynamic_smem<Acc>();  // (BATCH,128)
  for (int turn = 0; turn < kWarps; ++turn) {
    if (turn == warp_index())
#pragma unroll
      for (int b = 0; b < BATCH; ++b)
#pragma unroll
        for (int w = 0; w < kWords; ++w) {
          Acc& target = total[b * kGroup + w * kWarp + lane];
          target = turn == 0 ? sums[w][b] : target + sums[w][b];
        }
    __syncthreads();
  }
  Acc* partial = static_cast<Acc*>(p.partial) + (slot * p.batch + row) * p.outputs + group * kGroup;
  const int64_t columns = min(int64_t(kGroup), p.outputs - group * kGroup);
  for (int e = threadIdx.x; e < rows * kGroup; e += kThreads)
    if (e % kGroup < columns) partial[e / kGroup * p.outputs + e % kGroup] = total[e];
}

template <class T, int BATCH>
const char* launch_partial(const Projection& p, void* stream) {
  using Acc = Accumulate<T>;
  const int64_t groups = (p.outputs + kGroup - 1) / kGroup, tiles = (p.batch + BATCH - 1) / BATCH;
  const size_t shared = kWarps * sizeof(SignedTile<Acc, BATCH>);
  static_assert(kWarps * sizeof(SignedTile<Acc, BATCH>) >= BATCH * kGroup * sizeof(Acc), "the sums lie there later");
  return launch(projection_kernel<T, BATCH>, grid_of(p.slots * groups * tiles), kThreads, shared, stream, p);
}

}  // namespace

const char* launch_projection(const Projection& p, void* stream) {
  if (p.batch == 0 || p.outputs == 0) return nullptr;
  return with_dtype(p.dtype, [&](auto element) -> const char* {
    using T = typename decltype(element)::type;
    using Acc = Accumulate<T>;
    const char* error = p.batch == 1 ? launch_partial<T, 1>(p, stream) : launch_partial<T, kMostBatch>(p, stream);
    if (error) return error;
    return launch(sum_partial_kernel<Acc>, grid_of(p.batch * ((p.outputs + kWarp - 1) / kWarp)), kReduceWarps * kWarp,
                  kReduceWarps * kWarp * sizeof(Acc), stream, static_cast<const Acc*>(p.partial), static_cast<Acc*>(p.out),
                  nullptr, 0, p.slots, p.batch, p.outputs, 0, 1 / std::sqrt(double(p.outputs)));
  });
}

}  // namespace xai
