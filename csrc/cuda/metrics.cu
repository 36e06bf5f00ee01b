// CUDA side of ../metrics.h, without perturbation, which is in perturb.cu.
#include "../metrics.h"

#include <cmath>

#include "dispatch.cuh"
#include "launch.cuh"
#include "row_sums.cuh"

namespace xai {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / kWarp;

// ---- ranks --------------------------------------------------------------------------------------------------------------

// order (B,F) -> ranks (B,F), a thread an entry.
__global__ void __launch_bounds__(kThreads) invert_order_kernel(const RankFeatures p) {
  const int64_t item = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (item >= p.batch * p.features) return;
  const int64_t start = item / p.features * p.features;
  p.ranks[start + p.order[item]] = int32_t(item - start);
}

// ---- removal ------------------------------------------------------------------------------------------------------------

constexpr int kCopyRuns = 4;  // of one thread

// Entries i .. i + V of a channel: those whose rank is in the interval come from the baseline.
template <bool FLAT, int V, class Word>
__device__ void replace_run(const ReplaceRanked& p, const int32_t* ranks, const Word* baseline, int64_t i, int32_t first,
                            int32_t last, Word (&run)[V]) {
  if (FLAT) {  // an entry a position
    int32_t rank[V];
    memcpy(rank, __builtin_assume_aligned(static_cast<const void*>(ranks + i), kRunAlignment<V, int32_t>), sizeof rank);
#pragma unroll
    for (int v = 0; v < V; ++v)
      if (rank[v] >= first && rank[v] < last) run[v] = baseline[(i + v) * p.baseline.row];
    return;
  }
  int64_t position = i / p.depth, d = i - position * p.depth;
#pragma unroll
  for (int v = 0; v < V; ++v) {
    const int32_t rank = ranks[position];
    if (rank >= first && rank < last) run[v] = baseline[position * p.baseline.row + d * p.baseline.column];
    if (++d == p.depth) ++position, d = 0;
  }
}

// A group of `lanes` threads, a power of two, takes kCopyRuns * lanes runs of V entries of one channel of one example.
// blockIdx.x = group of rows (E,C) * pieces + piece of the row
template <bool FLAT, int V, class Word>
__global__ void __launch_bounds__(kThreads) replace_ranked_kernel(const ReplaceRanked p, int lanes, int64_t pieces) {
  const int64_t block = blockIdx.x / pieces, piece = blockIdx.x - block * pieces;
  const int64_t row = block * (kThreads / lanes) + threadIdx.x / lanes, entries = p.positions * p.depth;
  if (row >= p.examples * p.channels) return;
  const int64_t e = row / p.channels, c = row - e * p.channels, b = p.sample[e];
  const Word* x = static_cast<const Word*>(p.x) + (b * p.channels + c) * entries;
  const Word* baseline = static_cast<const Word*>(p.baseline.data) + b * p.baseline.batch + c * p.baseline.head;
  const int32_t first = p.first[e], last = p.last[e];
#pragma unroll
  for (int k = 0; k < kCopyRuns; ++k) {
    const int64_t i = ((piece * kCopyRuns + k) * lanes + threadIdx.x % lanes) * V;
    if (i >= entries) return;
    Word run[V];
    memcpy(run, __builtin_assume_aligned(static_cast<const void*>(x + i), kRunAlignment<V, Word>), sizeof run);
    replace_run<FLAT, V>(p, p.ranks + p.ranking[e] * p.positions, baseline, i, first, last, run);
    void* out = static_cast<Word*>(p.out) + row * entries + i;
    memcpy(__builtin_assume_aligned(out, kRunAlignment<V, Word>), run, sizeof run);
  }
}

template <int V, class Word>
const char* launch_replace(const ReplaceRanked& p, void* stream) {
  const int64_t runs = (p.positions * p.depth + V - 1) / V;
  int lanes = 1;
  while (lanes < kThreads && lanes * kCopyRuns < runs) lanes *= 2;
  const int64_t pieces = (runs + lanes * kCopyRuns - 1) / (lanes * kCopyRuns), rows_per_block = kThreads / lanes;
  const unsigned grid = grid_of((p.examples * p.channels + rows_per_block - 1) / rows_per_block * pieces);
  if (p.depth == 1) return launch(replace_ranked_kernel<true, V, Word>, grid, kThreads, 0, stream, p, lanes, pieces);
  return launch(replace_ranked_kernel<false, V, Word>, grid, kThreads, 0, stream, p, lanes, pieces);
}

template <class Word>
const char* launch_replace_words(const ReplaceRanked& p, void* stream) {
  constexpr int V = kPiece<Word> < 8 ? kPiece<Word> : 8;  // 16 ranks a run spill registers
  const bool vector = can_move_runs<V, Word>(p.positions * p.depth, {p.x, p.out}) && is_piece_aligned(p.ranks);
  return vector ? launch_replace<V, Word>(p, stream) : launch_replace<1, Word>(p, stream);
}

// ---- sums over a slot of a map ------------------------------------------------------------------------------------------

constexpr int64_t kSlotEntries = 1 << 14;

int64_t slots_of(int64_t entries) { return (entries + kSlotEntries - 1) / kSlotEntries; }

// f(i, count) for the runs of N entries of this thread in [begin, end).
template <int N, class F>
__device__ void in_runs(int64_t begin, int64_t end, F f) {
  for (int64_t i = begin + int64_t(threadIdx.x) * N; i < end; i += kThreads * N) f(i, min(int64_t(N), end - i));
}

struct Add {
  __device__ double operator()(double a, double b) const { return a + b; }
};
struct Larger {
  __device__ double operator()(double a, double b) const { return larger(a, b); }
};

// Over the threads of the block, in a fixed order, for all of them. shared: kWarps elements.
template <class Combine>
__device__ double block_result(double value, double* shared, Combine combine) {
#pragma unroll
  for (int bits = kWarp / 2; bits; bits /= 2) value = combine(value, __shfl_xor_sync(kAllLanes, value, bits));
  __syncthreads();  // the result before has been read
  if (threadIdx.x % kWarp == 0) shared[warp_index()] = value;
  __syncthreads();
  value = shared[0];
#pragma unroll
  for (int warp = 1; warp < kWarps; ++warp) value = combine(value, shared[warp]);
  return value;
}

// ---- distances ----------------------------------------------------------------------------------------------------------

// maps (E,D) -> partial (E,slots), a block a slot. blockIdx.x = example * slots + slot
template <class T>
__global__ void __launch_bounds__(kThreads) distance_kernel(const MapDistances p, bool vector) {
  constexpr int N = kPiece<T>;
  const int64_t e = blockIdx.x / p.slots, slot = blockIdx.x - e * p.slots;
  const int64_t begin = slot * kSlotEntries, end = min(p.entries, begin + kSlotEntries);
  const T* map = static_cast<const T*>(p.maps) + e * p.entries;
  const T* centre = static_cast<const T*>(p.centre) + p.sample[e] * p.entries;
  double total = 0;
  in_runs<N>(begin, end, [&](int64_t i, int64_t count) {
    double x[N], y[N];
    load_run(map + i, count, vector, x);
    load_run(centre + i, count, vector, y);
#pragma unroll
    for (int k = 0; k < N; ++k) {
      const double apart = x[k] - y[k];
      if (p.norm == Norm::l2)
        total += apart * apart;
      else
        total = p.norm == Norm::l1 ? total + fabs(apart) : larger(total, fabs(apart));
    }
  });
  double* shared = dynamic_smem<double>();
  total = p.norm == Norm::linf ? block_result(total, shared, Larger()) : block_result(total, shared, Add());
  if (threadIdx.x == 0) p.partial[blockIdx.x] = total;
}

// partial (E,slots) -> out (E), a thread an example.
__global__ void __launch_bounds__(kThreads) finish_distance_kernel(const MapDistances p) {
  const int64_t e = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (e >= p.examples) return;
  double total = 0;
  for (int64_t slot = 0; slot < p.slots; ++slot) {
    const double part = p.partial[e * p.slots + slot];
    total = p.norm == Norm::linf ? larger(total, part) : total + part;
  }
  p.out[e] = p.norm == Norm::l2 ? sqrt(total) : total;
}

// ---- conciseness --------------------------------------------------------------------------------------------------------

constexpr int kSums = 4;  // #{a > t}, sum a, sum a log a, sum (2i - n - 1) a_(i)

// log a, a > 0. Only the logarithm of the mantissa, below 0.35, is rounded to float.
__device__ inline double log_of(float a) {
  constexpr double kLog2 = 0.6931471805599453;
  int exponent;
  float mantissa = frexpf(a, &exponent);
  if (mantissa < 0.70710678f) mantissa *= 2, --exponent;
  return kLog2 * exponent + double(logf(mantissa));
}
__device__ inline double log_of(double a) { return log(a); }

// maps (B,n) -> partial (B,slots,4), a block a slot. blockIdx.x = map * slots + slot
template <class T>
__global__ void __launch_bounds__(kThreads) conciseness_kernel(const Conciseness p, bool vector) {
  constexpr int N = kPiece<T>;
  const int64_t b = blockIdx.x / p.slots, slot = blockIdx.x - b * p.slots, n = p.entries;
  const int64_t begin = slot * kSlotEntries, end = min(n, begin + kSlotEntries);
  const T* map = static_cast<const T*>(p.maps) + b * n;
  double sums[kSums] = {};
  in_runs<N>(begin, end, [&](int64_t i, int64_t count) {
    Accumulate<T> x[N];
    load_run(map + i, count, vector, x);
#pragma unroll
    for (int k = 0; k < N; ++k) {
      const double a = fabs(double(x[k]));
      if (k < count) sums[0] += a > p.threshold;  // behind the end there are zeros
      sums[1] += a;
      if (a != 0) sums[2] += a * log_of(Accumulate<T>(a));
      sums[3] += double(2 * (i + k) + 1 - n) * a;
    }
  });
  double* partial = p.partial + blockIdx.x * int64_t(kSums);
#pragma unroll
  for (int k = 0; k < kSums; ++k) {
    const double total = block_result(sums[k], dynamic_smem<double>(), Add());
    if (threadIdx.x == 0) partial[k] = total;
  }
}

// partial (B,slots,4) -> out (B,3), a thread a map.
__global__ void __launch_bounds__(kThreads) finish_conciseness_kernel(const Conciseness p) {
  const int64_t b = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (b >= p.batch) return;
  double sums[kSums] = {};
  for (int64_t slot = 0; slot < p.slots; ++slot)
#pragma unroll
    for (int k = 0; k < kSums; ++k) sums[k] += p.partial[(b * p.slots + slot) * kSums + k];
  const double nan = infinity<double>() - infinity<double>(), total = sums[1];
  const bool finite = total < infinity<double>(), some = total > 0;
  double* out = p.out + 3 * b;
  out[0] = sums[0];
  out[1] = !finite ? nan : some ? log(total) - sums[2] / total : 0.0;
  out[2] = !finite || !p.gini ? nan : some ? sums[3] / (double(p.entries) * total) : 0.0;
}

// ---- norms of rows ------------------------------------------------------------------------------------------------------

// Over the threads of a warp, for all of them.
template <class Acc, class T>
__device__ Acc sum_of_squares(const T* row, int64_t entries, bool vector) {
  constexpr int N = kPiece<T>;
  Acc part[N] = {};  // short chains: less waiting, smaller rounding
  for (int64_t i = int64_t(threadIdx.x % kWarp) * N; i < entries; i += kWarp * N) {
    Acc x[N];
    load_run(row + i, min(int64_t(N), entries - i), vector, x);
#pragma unroll
    for (int k = 0; k < N; ++k) part[k] += x[k] * x[k];
  }
#pragma unroll
  for (int k = 1; k < N; ++k) part[0] += part[k];
  return warp_sum(part[0]);
}

// x (R,D) -> out (R), a warp a row.
template <class T>
__global__ void __launch_bounds__(kThreads) row_norms_kernel(const RowNorms p, bool vector) {
  using Acc = Accumulate<T>;
  const int64_t r = int64_t(blockIdx.x) * kWarps + threadIdx.x / kWarp;
  if (r >= p.rows) return;
  const T* row = static_cast<const T*>(p.x) + r * p.entries;
  const Acc total = sum_of_squares<Acc>(row, p.entries, vector);
  Acc norm = sqrt(total);
  if (sizeof(Acc) == sizeof(float) && !(total >= kLeastSquares && total <= kMostSquares))
    norm = Acc(sqrt(sum_of_squares<double>(row, p.entries, vector)));
  if (threadIdx.x % kWarp == 0) static_cast<Acc*>(p.out)[r] = norm;
}

}  // namespace

const char* launch_invert_order(const RankFeatures& p, void* stream) {
  const int64_t items = p.batch * p.features;
  return launch(invert_order_kernel, grid_of((items + kThreads - 1) / kThreads), kThreads, 0, stream, p);
}

const char* launch_replace_ranked(const ReplaceRanked& p, void* stream) {
  switch (p.element_bytes) {
    case 1: return launch_replace_words<uint8_t>(p, stream);
    case 2: return launch_replace_words<uint16_t>(p, stream);
    case 4: return launch_replace_words<uint32_t>(p, stream);
    default: return launch_replace_words<uint64_t>(p, stream);
  }
}

int64_t map_distances_slots_cuda(int64_t entries) { return slots_of(entries); }

const char* launch_map_distances(const MapDistances& p, void* stream) {
  const char* error = with_dtype(p.dtype, [&](auto element) -> const char* {
    using T = typename decltype(element)::type;
    const bool vector = can_move_runs<kPiece<T>, T>(p.entries, {p.maps, p.centre});
    return launch(distance_kernel<T>, grid_of(p.examples * p.slots), kThreads, kWarps * sizeof(double), stream, p, vector);
  });
  return error ? error : launch(finish_distance_kernel, blocks_for(p.examples, kThreads), kThreads, 0, stream, p);
}

int64_t conciseness_slots_cuda(int64_t, int64_t entries) { return slots_of(entries); }

const char* launch_conciseness(const Conciseness& p, void* stream) {
  const char* error = with_dtype(p.dtype, [&](auto element) -> const char* {
    using T = typename decltype(element)::type;
    const bool vector = can_move_runs<kPiece<T>, T>(p.entries, {p.maps});
    return launch(conciseness_kernel<T>, grid_of(p.batch * p.slots), kThreads, kWarps * sizeof(double), stream, p, vector);
  });
  return error ? error : launch(finish_conciseness_kernel, blocks_for(p.batch, kThreads), kThreads, 0, stream, p);
}

const char* launch_row_norms(const RowNorms& p, void* stream) {
  return with_dtype(p.dtype, [&](auto element) -> const char* {
    using T = typename decltype(element)::type;
    const bool vector = can_move_runs<kPiece<T>, T>(p.entries, {p.x});
    return launch(row_norms_kernel<T>, grid_of((p.rows + kWarps - 1) / kWarps), kThreads, 0, stream, p, vector);
  });
}

}  // namespace xai
