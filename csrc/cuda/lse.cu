// The shift of every query: log2 of the sum of its exponentials, for all streamed kernels.
#include "lse.cuh"

#include <algorithm>
#include <type_traits>

namespace xai {
namespace {

template <class Acc>
__device__ Acc shift_of(Acc lse) {
  return lse == -infinity<Acc>() ? infinity<Acc>() : lse * Acc(kLog2e);
}

// lse (B,H,Nq) -> shift. A thread takes one query of one head.
template <class Acc>
__global__ void __launch_bounds__(kPrepareThreads) prepare_lse_kernel(const AttentionScores p, ScoreArrays<Acc> w) {
  const int64_t item = int64_t(blockIdx.x) * kPrepareThreads + threadIdx.x;
  const int64_t bh = item / w.padded, i = item % w.padded;
  const bool needed = i < p.tokens && is_active(w, bh / p.heads, bh % p.heads, i);
  w.shift[item] = needed ? shift_of(static_cast<const Acc*>(p.lse)[bh * p.tokens + i]) : infinity<Acc>();
}

// Sum of 2^x over values that arrive in any order, kept relative to the largest so far.
template <class Acc>
struct LogSum {
  Acc largest = -infinity<Acc>(), sum = 0;

  template <int N>
  __device__ void add(const Acc (&x)[N]) {
    Acc top = x[0];
#pragma unroll
    for (int j = 1; j < N; ++j) top = max(top, x[j]);
    if (top > largest) raise(top);
    const Acc origin = largest == -infinity<Acc>() ? Acc(0) : largest;
#pragma unroll
    for (int j = 0; j < N; ++j) sum += exp2_of(x[j] - origin);
  }
  __device__ void merge(Acc other_largest, Acc other_sum) {
    if (other_largest > largest) raise(other_largest);
    if (other_largest > -infinity<Acc>()) other_sum *= exp2_of(other_largest - largest);
    sum += other_sum;
  }
  __device__ void merge_lanes(int bits) {
    merge(__shfl_xor_sync(kAllLanes, largest, bits), __shfl_xor_sync(kAllLanes, sum, bits));
  }
  // log2 of the sum, +inf if it is 0
  __device__ Acc shift() const { return sum == 0 ? infinity<Acc>() : largest + log2_of(sum); }

 private:
  __device__ void raise(Acc to) {
    sum *= exp2_of(largest - to);
    largest = to;
  }
};

// query (B,H,Nq,D), key (B,Hkv,Nk,D) -> shift (B,H,Nq):  shift_i = log2 sum_j 2^{x_ij}
// A block keeps its queries of one head and meets the keys. Each lane follows its own maximum, so that lanes exchange
// nothing until the end and the rescaling, which is rare, is a branch.
template <class Tile>
__global__ void __launch_bounds__(kTileThreads, Tile::kBlocksPerMultiprocessor)
    lse_kernel(const AttentionScores p, const ScoreArrays<typename Tile::Acc> w) {
  using Acc = typename Tile::Acc;
  const int64_t query_blocks = (p.tokens + Tile::kStationary - 1) / Tile::kStationary;
  const int64_t block = query_blocks - 1 - blockIdx.x % query_blocks;  // causal: the longest first
  const int64_t h = blockIdx.x / query_blocks % p.heads, b = blockIdx.x / query_blocks / p.heads;
  const int64_t query0 = block * Tile::kStationary;
  if (!any_active(w, b, h, query0, Tile::kStationary)) return;
  const int64_t end = p.causal ? min(p.keys, query0 + Tile::kStationary) : p.keys;

  Scores<Tile, false> scores(p, w, dynamic_smem<char>(), b, query0);
  LogSum<Acc> sums[Tile::kRows];
  scores.load_stationary(h);
  scores.load_moving(h, 0, 0);
  int buffer = 0;
  for (int64_t key0 = 0; key0 < end; key0 += Tile::kMoving, buffer ^= 1) {
    scores.tile.wait_moving(buffer);
    if (key0 + Tile::kMoving < end) scores.load_moving(h, key0 + Tile::kMoving, buffer ^ 1);
#pragma unroll 1
    for (int column0 = 0; column0 < Tile::kMoving; column0 += kScoreColumns) {
      const auto no_shift = [](int, int) { return Acc(0); };
      scores.logits(h, key0, buffer, column0, no_shift, [&](const auto& x) {
#pragma unroll
        for (int i = 0; i < Tile::kRows; ++i) sums[i].add(x[i]);
      });
    }
  }

  Acc* shift = w.shift + (b * p.heads + h) * w.padded + query0;
#pragma unroll
  for (int i = 0; i < Tile::kRows; ++i) {
    sums[i].merge_lanes(1);
    sums[i].merge_lanes(2);
    const int row = Tile::row(i);
    if (lane_column() == 0) shift[row] = is_active(w, b, h, query0 + row) ? sums[i].shift() : infinity<Acc>();
  }
}

template <class Tile, class Acc = typename Tile::Acc>
const char* launch_lse(const AttentionScores& p, const ScoreArrays<Acc>& w, void* stream) {
  const int64_t blocks = p.batch * p.heads * blocks_for(p.tokens, Tile::kStationary);
  return launch(lse_kernel<Tile>, grid_of(blocks), kTileThreads, Scores<Tile, false>::shared_bytes(p.dim), stream, p, w);
}

template <class Acc>
const char* launch_shift_as(const AttentionScores& p, const ScoreArrays<Acc>& w, void* stream) {
  if (p.lse)
    return launch(prepare_lse_kernel<Acc>, blocks_for(p.batch * p.heads * w.padded, kPrepareThreads), kPrepareThreads, 0,
                  stream, p, w);
  return with_tiles(p, [&](auto tile, auto) -> const char* {
    using Tile = typename decltype(tile)::type;
    if constexpr (std::is_same_v<typename Tile::Acc, Acc>) return launch_lse<Tile>(p, w, stream);
    return "the workspace is not of the accumulate type";
  });
}

}  // namespace

const char* launch_shift(const AttentionScores& p, const ScoreArrays<float>& w, void* stream) {
  return launch_shift_as(p, w, stream);
}
const char* launch_shift(const AttentionScores& p, const ScoreArrays<double>& w, void* stream) {
  return launch_shift_as(p, w, stream);
}

}  // namespace xai
