// CPU side of the metrics family: how work is cut, and the choice of the vector body. The arithmetic is in metrics.inc,
// compiled once per instruction set.
#include "../metrics.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <type_traits>
#include <utility>
#include <vector>

#include "../philox.h"
#include "blocks.h"
#include "simd.h"

#ifdef XAI_X86_BODIES
#include <immintrin.h>
#endif

namespace xai {
namespace {

// Work items: large enough that starting one costs nothing beside it.
constexpr int64_t kCopyBytes = 1 << 15;     // of a row of replace_ranked
constexpr int64_t kNoiseEntries = 1 << 13;  // of an example of perturb; a multiple of every body's block
constexpr int64_t kDistanceEntries = 1 << 14;

// log(1 + f) = f - f^2 / 2 + f^3 P(f) on [sqrt(1/2) - 1, sqrt(2) - 1]; sin(pi t / 2) = t P(t^2) and cos(pi t / 2) = P(t^2)
// on |t| <= 1/2. Minimax (6e-9, 7e-12, 5e-11), by the Remez exchange.
constexpr float kLog[] = {0.33333316784104294f, -0.25000796564247723f, 0.2000228254691909f,  -0.16624969890776075f,
                          0.14181419707926322f, -0.13125294439733147f, 0.12879202868920198f, -0.078654555157735101f};
constexpr float kSin[] = {1.5707963267881133f, -0.6459640961485153f, 0.07969258276002254f, -0.0046812664768053758f,
                          0.00015820674367428615f};
constexpr float kCos[] = {0.9999999999526005f, -1.233700540647375f, 0.25366920393930219f, -0.020860071318794848f,
                          0.00090363170305597413f};

// Positions of one work item of replace_ranked.
int64_t positions_of_item(const ReplaceRanked& p) {
  return std::clamp<int64_t>(kCopyBytes / (p.depth * p.element_bytes), 1, std::max<int64_t>(1, p.positions));
}

struct Bodies {
  void (*rank_features)(const RankFeatures&, int64_t, int64_t);
  void (*replace_ranked)(const ReplaceRanked&, int64_t, int64_t);
  void (*perturb)(const Perturb&, int64_t, int64_t);
  void (*perturb_finish)(const Perturb&, int64_t, int64_t);
  void (*map_distances)(const MapDistances&, int64_t, int64_t);
  void (*conciseness)(const Conciseness&, int64_t, int64_t);
  void (*row_norms)(const RowNorms&, int64_t, int64_t);
};

#define XAI_BODIES(ISA)                                                         \
  {ISA::rank_features, ISA::replace_ranked, ISA::perturb,  ISA::perturb_finish, \
   ISA::map_distances, ISA::conciseness,    ISA::row_norms}

#define XAI_BODY_FILE "metrics.inc"
#include "bodies.inc"

}  // namespace

void rank_features_cpu(const RankFeatures& p, int64_t begin, int64_t end) { bodies().rank_features(p, begin, end); }

int64_t replace_ranked_items_cpu(const ReplaceRanked& p) {
  return p.examples * p.channels * pieces_of(p.positions, positions_of_item(p));
}
void replace_ranked_cpu(const ReplaceRanked& p, int64_t begin, int64_t end) { bodies().replace_ranked(p, begin, end); }

int64_t perturb_slots_cpu(int64_t entries) { return pieces_of(entries, kNoiseEntries); }
void perturb_cpu(const Perturb& p, int64_t begin, int64_t end) { bodies().perturb(p, begin, end); }
void perturb_finish_cpu(const Perturb& p, int64_t begin, int64_t end) { bodies().perturb_finish(p, begin, end); }

int64_t map_distances_slots_cpu(int64_t entries) { return pieces_of(entries, kDistanceEntries); }
void map_distances_cpu(const MapDistances& p, int64_t begin, int64_t end) { bodies().map_distances(p, begin, end); }
void map_distances_finish_cpu(const MapDistances& p, int64_t begin, int64_t end) {
  for (int64_t e = begin; e < end; ++e) {
    const double* const partial = p.partial + e * p.slots;
    double total = 0;
    for (int64_t slot = 0; slot < p.slots; ++slot)
      total = p.norm != Norm::linf                                      ? total + partial[slot]
              : partial[slot] > total || partial[slot] != partial[slot] ? partial[slot]
                                                                        : total;
    p.out[e] = p.norm == Norm::l2 ? std::sqrt(total) : total;
  }
}

void conciseness_cpu(const Conciseness& p, int64_t begin, int64_t end) { bodies().conciseness(p, begin, end); }

void row_norms_cpu(const RowNorms& p, int64_t begin, int64_t end) { bodies().row_norms(p, begin, end); }

}  // namespace xai
