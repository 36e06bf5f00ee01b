// CUDA side of ../ihvp.h: scores of a chunk of rows from the products X S, written out or sifted into lists.
#include "glm_tile.cuh"

namespace xai {
namespace {

// sum_c delta[row,c] products[test C + c, i] for visited row first + i
template <class Acc>
__device__ Acc score_of(const ScoreChunk& p, int64_t i, int64_t test) {
  const Acc* delta = static_cast<const Acc*>(p.delta) + visited_row(p, p.first + i) * p.classes;
  const Acc* products = static_cast<const Acc*>(p.products) + test * p.classes * p.count + i;
  Acc score = 0;
#pragma unroll 4
  for (int64_t c = 0; c < p.classes; ++c) score += delta[c] * products[c * p.count];
  return score;
}

// ---- all scores -------------------------------------------------------------------------------------------------------

constexpr int kSquare = 32, kSquareWarps = 8;

// products (columns,count), delta -> out (tests,rows). A block takes 32 rows of 32 tests.
template <class Acc>
__global__ void __launch_bounds__(kSquareWarps* kWarp) scores_kernel(const ScoreChunk p) {
  const int64_t across = (p.tests + kSquare - 1) / kSquare;
  const int64_t first_row = blockIdx.x / across * kSquare, first_test = blockIdx.x % across * kSquare;
  for (int t = warp_index(); t < kSquare; t += kSquareWarps) {
    const int64_t i = first_row + lane_index(), test = first_test + t;
    if (i < p.count && test < p.tests) static_cast<Acc*>(p.out)[test * p.rows + p.first + i] = score_of<Acc>(p, i, test);
  }
}

// ---- the extreme ones -------------------------------------------------------------------------------------------------

constexpr int kListThreads = 512, kListWarps = kListThreads / kWarp;
constexpr int kRowsOfThread = 4;  // whose scores are loaded together
constexpr int kMostCandidates = 2 * kListThreads;
constexpr int kShare = kMostCandidates / kListThreads;

// Whether a comes strictly before b. A NaN comes before nothing.
template <class Acc>
__device__ bool precedes(bool largest, Acc a, Acc b) {
  return largest ? a > b : a < b;
}

// The list of one test: positions 0 .. filled - 1 in order. All threads of the block call its functions.
template <class Acc>
class List {
 public:
  static constexpr size_t kBytes = kMostCandidates * (sizeof(int) + 2 * sizeof(Acc)) + kListWarps * sizeof(int);

  __device__ List(const ScoreChunk& chunk, int64_t test)
      : p_(chunk),
        values_(static_cast<Acc*>(chunk.values) + test * chunk.k),
        found_(chunk.found + test * chunk.k),
        candidates_(dynamic_smem<Acc>()),
        sorted_(candidates_ + kMostCandidates),
        rows_(reinterpret_cast<int*>(sorted_ + kMostCandidates)),
        warp_counts_(rows_ + kMostCandidates) {
    filled_ = first_place(p_.k, [&](int64_t place) { return found_[place] < 0; });
    read_last();
  }

  // Whether a score can enter; the list may have better ones by the time it is merged.
  __device__ bool admits(Acc score) const {
    return score == score && (filled_ < p_.k || precedes(p_.largest, score, last_));
  }

  // Takes the score of row i of the chunk from every thread with `chosen`.
  __device__ void add(bool chosen, Acc score, int i) {
    if (pending_ + kListThreads > kMostCandidates) merge();
    const unsigned votes = __ballot_sync(kAllLanes, chosen);
    __syncthreads();  // the counts before have been read
    if (lane_index() == 0) warp_counts_[warp_index()] = __popc(votes);
    __syncthreads();
    int at = pending_ + __popc(votes & ((1u << lane_index()) - 1));
    for (int warp = 0; warp < kListWarps; ++warp) {
      if (warp < warp_index()) at += warp_counts_[warp];
      pending_ += warp_counts_[warp];
    }
    if (!chosen) return;
    candidates_[at] = score;
    rows_[at] = i;
  }

  // Puts the candidates in order, moves the entries that they precede towards the end, and writes them between.
  __device__ void merge() {
    __syncthreads();
    if (pending_ == 0) return;
    int64_t places[kShare];
    sort(places);
    __syncthreads();
    move_entries();
#pragma unroll
    for (int e = 0; e < kShare; ++e) {
      const int c = threadIdx.x + e * kListThreads;
      if (c >= pending_ || places[e] >= p_.k) continue;
      values_[places[e]] = candidates_[c];
      found_[places[e]] = visited_row(p_, p_.first + rows_[c]);
    }
    filled_ = min(p_.k, filled_ + pending_);
    pending_ = 0;
    __syncthreads();
    read_last();
  }

 private:
  // The first of `count` places that satisfies `beyond`, which holds from there on; `count` if there is none.
  template <class F>
  static __device__ int64_t first_place(int64_t count, F beyond) {
    int64_t low = 0, high = count;
    while (low < high) {
      const int64_t middle = (low + high) / 2;
      if (beyond(middle))
        high = middle;
      else
        low = middle + 1;
    }
    return low;
  }

  __device__ void read_last() {
    if (filled_ == p_.k) last_ = values_[p_.k - 1];
  }

  // Sorts the candidates by counting who precedes each; `places`: where this thread's own go in the list. Of equal scores
  // the earlier row comes first, and the rows of the list are earlier than all candidates.
  __device__ void sort(int64_t (&places)[kShare]) {
#pragma unroll
    for (int e = 0; e < kShare; ++e) {
      const int c = threadIdx.x + e * kListThreads;
      if (c >= pending_) continue;
      const Acc score = candidates_[c];
      int rank = 0;
      for (int other = 0; other < pending_; ++other)
        rank += precedes(p_.largest, candidates_[other], score) || (candidates_[other] == score && rows_[other] < rows_[c]);
      sorted_[rank] = score;
      places[e] = rank + first_place(filled_, [&](int64_t place) { return precedes(p_.largest, score, values_[place]); });
    }
  }

  // Entry j moves by the number of candidates that precede it. Blocks of entries from the end, so that none is overwritten
  // before it has been read.
  __device__ void move_entries() {
    const int64_t first =
        first_place(filled_, [&](int64_t place) { return precedes(p_.largest, sorted_[0], values_[place]); });
    for (int64_t end = filled_; end > first; end -= kListThreads) {
      const int64_t j = end - 1 - threadIdx.x;
      Acc value = 0;
      int64_t row = 0, target = p_.k;
      if (j >= first) {
        value = values_[j];
        row = found_[j];
        target = j + first_place(pending_, [&](int64_t c) { return !precedes(p_.largest, sorted_[c], value); });
      }
      __syncthreads();
      if (target < p_.k) {
        values_[target] = value;
        found_[target] = row;
      }
      __syncthreads();
    }
  }

  const ScoreChunk& p_;
  Acc* values_;
  int64_t* found_;
  Acc *candidates_, *sorted_;
  int *rows_, *warp_counts_;
  int64_t filled_;
  Acc last_ = 0;
  int pending_ = 0;
};

// products (columns,count), delta -> values, found (tests,k). A block keeps the list of one test.
template <class Acc>
__global__ void __launch_bounds__(kListThreads) lists_kernel(const ScoreChunk p) {
  const int64_t test = blockIdx.x;
  List<Acc> list(p, test);
  for (int64_t first = 0; first < p.count; first += kListThreads * kRowsOfThread) {
    Acc scores[kRowsOfThread];
    bool any = false;
#pragma unroll
    for (int e = 0; e < kRowsOfThread; ++e) {
      const int64_t i = first + e * kListThreads + threadIdx.x;
      scores[e] = i < p.count ? score_of<Acc>(p, i, test) : Acc(NAN);
      any |= list.admits(scores[e]);
    }
    if (!__syncthreads_or(any)) continue;
#pragma unroll
    for (int e = 0; e < kRowsOfThread; ++e)
      list.add(list.admits(scores[e]), scores[e], int(first + e * kListThreads + threadIdx.x));
  }
  list.merge();
}

}  // namespace

const char* launch_score_chunk(const ScoreChunk& p, void* stream) {
  if (p.count == 0 || p.tests == 0) return nullptr;
  return with_accumulate(p.accumulate, [&](auto accumulate) -> const char* {
    using Acc = typename decltype(accumulate)::type;
    if (!p.out) return launch(lists_kernel<Acc>, grid_of(p.tests), kListThreads, List<Acc>::kBytes, stream, p);
    const int64_t blocks = (p.count + kSquare - 1) / kSquare * ((p.tests + kSquare - 1) / kSquare);
    return launch(scores_kernel<Acc>, grid_of(blocks), kSquareWarps * kWarp, 0, stream, p);
  });
}

}  // namespace xai
