// Measures of explanations: the contract of the family.
//
// A measure runs a model on many changed copies of its inputs, or reads many maps once. Nothing here knows a model: the
// kernels make the copies and read the maps. An example e of a chunk is a copy of sample[e]; what is done to it follows from
// e's own numbers alone, so that results do not depend on how a run is cut into chunks.
//
// CPU functions do the work items [begin, end) on the calling thread; csrc/bindings spreads them over threads.
// CUDA functions launch on `stream` (a cudaStream_t) and return null, or a message that says what failed.
#pragma once
#include "types.h"

namespace xai {

// ---- ranks ---------------------------------------------------------------------------------------------------------------
//   ranks[b,i] = how many features of sample b come before i when they are sorted by falling score, ties by rising index
// +0 and -0 are equal, NaN counts as -inf. features < 2^31. On CUDA the caller sorts (order[b,r] = the feature of rank r,
// by torch's own stable sort) and the kernel inverts.
struct RankFeatures {
  const void* scores;    // (B,F) contiguous, f32 or f64 (CPU)
  const int64_t* order;  // (B,F) contiguous (CUDA)
  int32_t* ranks;        // (B,F) contiguous
  int64_t batch, features;
  Dtype dtype;
};
void rank_features_cpu(const RankFeatures& p, int64_t begin, int64_t end);  // items: the B samples
const char* launch_invert_order(const RankFeatures& p, void* stream);

// ---- removal -------------------------------------------------------------------------------------------------------------
//   out[e,c,i,d] = first[e] <= ranks[r,i] < last[e] ? baseline[b,c,i,d] : x[b,c,i,d],     b = sample[e], r = ranking[e]
// i runs over the positions that have a rank; c and d over entries that share one (channels before, embedding behind).
// Copies elements of 1, 2, 4 or 8 bytes: any dtype.
struct ReplaceRanked {
  const void* x;                    // (B,C,P,D) contiguous
  View4 baseline;                   // (B,C,P,D), any strides, in elements; 0 broadcasts
  const int32_t* ranks;             // (R,P) contiguous
  const int64_t *sample, *ranking;  // (E)
  const int32_t *first, *last;      // (E)
  void* out;                        // (E,C,P,D) contiguous
  int64_t examples, channels, positions, depth;
  int64_t element_bytes;
};
int64_t replace_ranked_items_cpu(const ReplaceRanked& p);
void replace_ranked_cpu(const ReplaceRanked& p, int64_t begin, int64_t end);
const char* launch_replace_ranked(const ReplaceRanked& p, void* stream);

// ---- perturbation --------------------------------------------------------------------------------------------------------
//   out[e,i] = x[b,i] + noise_i,   b = sample[e], noise of draw[e] for the sample's number first_sample + b
// linf: noise_i = radius u_i, u uniform in (-1, 1).  l2: noise = radius U^(1/D) g / |g|, uniform in the ball, g normal.
// Counters of Philox (csrc/philox.h): entries 4k .. 4k+3 take the four words of counter (k, draw, number, stream), so that
// a noise depends on seed, sample number, draw and entry alone. u = (2 (word >> 8) + 1) / 2^24 - 1, exact in float.
// Normals: Box and Muller (1958) in float, words (0,1) -> entries 4k, 4k+1 and (2,3) -> 4k+2, 4k+3:
//   radius = sqrt(-2 log v), v = ((word_a >> 8) + 1) / 2^24 in (0, 1];   angle = 2 pi (word_b >> 8) / 2^24;   cos first,
//   then sin
// U = ((word_0 of counter (0xffffffff, draw, number, stream) >> 8) + 1) / 2^24. u and g are floats, also for f64 x; what
// scales them and the sum with x are in the accumulate type. entries <= 2^33.
constexpr uint32_t kPerturbStream = 0x70657274;  // "pert"
constexpr uint32_t kRadiusCounter = 0xffffffff;
enum class Ball { linf, l2 };
struct Perturb {
  const void* x;                 // (B,D) contiguous, of `dtype`
  const int64_t *sample, *draw;  // (E); draw < 2^32
  void* out;                     // (E,D) contiguous, of `dtype`
  double* partial;               // (E,slots): sums of squares of g (l2)
  int64_t examples, entries, slots, first_sample;
  double radius;
  uint64_t seed;
  Ball ball;
  Dtype dtype;
};
int64_t perturb_slots_cpu(int64_t entries);
void perturb_cpu(const Perturb& p, int64_t begin, int64_t end);         // items: E*slots; l2: g -> out (not 16 bit), partial
void perturb_finish_cpu(const Perturb& p, int64_t begin, int64_t end);  // items: E*slots; l2 only: g -> out
int64_t perturb_slots_cuda(int64_t entries);
const char* launch_perturb(const Perturb& p, void* stream);

// ---- distances between maps ----------------------------------------------------------------------------------------------
//   out[e] = |maps[e] - centre[sample[e]]|_ord,  ord 1, 2 or inf; sums in double, slots added in order
enum class Norm { l1, l2, linf };
struct MapDistances {
  const void* maps;       // (E,D) contiguous, of `dtype`
  const void* centre;     // (B,D) contiguous, of `dtype`
  const int64_t* sample;  // (E)
  double* partial;        // (E,slots)
  double* out;            // (E)
  int64_t examples, entries, slots;
  Norm norm;
  Dtype dtype;
};
int64_t map_distances_slots_cpu(int64_t entries);
void map_distances_cpu(const MapDistances& p, int64_t begin, int64_t end);         // items: E*slots
void map_distances_finish_cpu(const MapDistances& p, int64_t begin, int64_t end);  // items: E
int64_t map_distances_slots_cuda(int64_t entries);
const char* launch_map_distances(const MapDistances& p, void* stream);

// ---- conciseness ---------------------------------------------------------------------------------------------------------
// Of a = |map|, S = sum a, in double, one read of the map (and of its sorted values):
//   size = #{a > threshold}     entropy = log S - (1/S) sum a log a, 0 log 0 = 0     gini = sum_i (2i - n - 1) a_(i) / (n
//   S), i from 1
// All 0: 0, 0, 0. A NaN in the map, or an S that is not finite, gives a NaN entropy and Gini. n < 2^32. On CUDA the caller
// hands sorted |map| if Gini is wanted.
struct Conciseness {
  const void* maps;  // (B,n) contiguous, of `dtype`; CUDA with `gini`: |maps| sorted, rising, NaN last
  double* partial;   // CUDA: (B,slots,4) workspace
  double* out;       // (B,3)
  int64_t batch, entries, slots;
  double threshold;
  bool gini;  // false: out[:,2] = NaN
  Dtype dtype;
};
void conciseness_cpu(const Conciseness& p, int64_t begin, int64_t end);  // items: the B maps
int64_t conciseness_slots_cuda(int64_t batch, int64_t entries);
const char* launch_conciseness(const Conciseness& p, void* stream);

// ---- norms of rows -------------------------------------------------------------------------------------------------------
//   out[r] = |x[r]|, in one read; sums in the accumulate type, in double where they leave kLeastSquares .. kMostSquares, so
// that a float norm neither overflows nor loses what is small
constexpr float kLeastSquares = 0x1p-60f, kMostSquares = 0x1p120f;
struct RowNorms {
  const void* x;  // (R,D) contiguous, of `dtype`
  void* out;      // (R), of the accumulate type
  int64_t rows, entries;
  Dtype dtype;
};
void row_norms_cpu(const RowNorms& p, int64_t begin, int64_t end);  // items: the R rows
const char* launch_row_norms(const RowNorms& p, void* stream);

}  // namespace xai
