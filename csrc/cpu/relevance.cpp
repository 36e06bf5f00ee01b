// CPU side of the relevance family: the cut into work items, workspace layout and the choice of the vector body. The
// arithmetic is in relevance.inc, compiled once per instruction set.
#include "../relevance.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <memory>
#include <new>
#include <type_traits>

#include "blocks.h"
#include "simd.h"

namespace xai {
namespace {

constexpr int64_t kKeyBlock = 64;         // keys that are worked on together: whole panels
constexpr int64_t kItemsWanted = 12;      // work items per call, if there are queries enough; units alone often are
constexpr int64_t kQueriesPerSlot = 192;  // at least; every slot packs the keys and has its own partial result

// A key head of one sample is a unit; its queries are cut into slots when there are few units.
int64_t slots_of(int64_t units, int64_t queries) {
  const int64_t wanted = pieces_of(kItemsWanted, std::max<int64_t>(units, 1));
  return std::max<int64_t>(1, std::min(wanted, queries / kQueriesPerSlot));
}

int64_t av_slots(const AvRelevance& p) { return slots_of(p.batch * p.kv_heads, p.queries); }

int64_t attention_slots(const AttentionRelevance& p) { return slots_of(p.batch * p.kv_heads, p.tokens); }

// Elements of a row in whole vectors of any body.
int64_t padded(int64_t dim, Dtype dtype) { return round_up(dim, 64 / accumulate_bytes(dtype)); }

// Where things lie in the workspace of a targeted step.
struct TargetedLayout {
  int64_t slots;
  int64_t sums_at, factors_at, partial_at, bytes;  // offsets in bytes

  explicit TargetedLayout(const TargetedRows& p) {
    const int64_t size = accumulate_bytes(p.dtype), per_token = p.normalize ? size * p.tokens : 0;
    slots = slots_of(p.batch * p.kv_heads, p.tokens);
    sums_at = 0;
    factors_at = round_up(sums_at + p.batch * p.heads * per_token, 64);
    partial_at = round_up(factors_at + p.batch * per_token, 64);
    bytes = partial_at + p.batch * p.kv_heads * slots * p.n_rows * p.tokens * size;
  }

  template <class T>
  T* at(const TargetedRows& p, int64_t offset) const {
    return reinterpret_cast<T*>(static_cast<char*>(p.workspace) + offset);
  }
};

template <class P>
using Body = void (*)(const P&, int64_t, int64_t);

struct Bodies {
  Body<AvRelevance> av, av_reduce;
  Body<AttentionRelevance> attention, attention_reduce;
  Body<TargetedRows> targeted_sums, targeted_factors, targeted, targeted_reduce;
  Body<SoftmaxRelevance> softmax;
  Body<SkipRelevance> skip_sums, skip;
  Body<NormRelevance> norm;
  Body<GradientFactor> gradient_factor;
  Body<SignSplit> sign_split;
  Body<LinearShare> linear_share;
  Body<LinearReturn> linear_return;
};

#define XAI_WITH_MATRIX_UNIT 1
#define XAI_BODIES(ISA)                                                                            \
  {ISA::av_relevance,      ISA::av_reduce,        ISA::attention_relevance, ISA::attention_reduce, \
   ISA::targeted_sums,     ISA::targeted_factors, ISA::targeted_rows,       ISA::targeted_reduce,  \
   ISA::softmax_relevance, ISA::skip_sums,        ISA::skip_relevance,      ISA::norm_relevance,   \
   ISA::gradient_factor,   ISA::sign_split,       ISA::linear_share,        ISA::linear_return}

#define XAI_BODY_FILE "relevance.inc"
#include "bodies.inc"

}  // namespace

WorkPlan av_plan_cpu(const AvRelevance& p) {
  const int64_t slots = av_slots(p), units = p.batch * p.kv_heads;
  const int64_t partial = slots == 1 ? 0 : units * slots * p.keys * padded(p.dim, p.dtype) * accumulate_bytes(p.dtype);
  return {units * slots, slots == 1 ? 0 : units, partial};
}

WorkPlan attention_plan_cpu(const AttentionRelevance& p) {
  const int64_t slots = attention_slots(p), units = p.batch * p.kv_heads;
  const int64_t row = padded(p.value_dim, p.dtype) + (p.lam == 0 ? 0 : padded(p.dim, p.dtype));
  const int64_t partial = slots == 1 ? 0 : units * slots * p.keys * row * accumulate_bytes(p.dtype);
  return {units * slots, slots == 1 ? 0 : units, partial};
}

WorkPlan targeted_plan_cpu(const TargetedRows& p) {
  const TargetedLayout at(p);
  return {p.batch * p.kv_heads * at.slots, p.batch * p.n_rows, at.bytes};
}

void av_relevance_cpu(const AvRelevance& p, int64_t begin, int64_t end) { bodies().av(p, begin, end); }
void av_reduce_cpu(const AvRelevance& p, int64_t begin, int64_t end) { bodies().av_reduce(p, begin, end); }
void attention_relevance_cpu(const AttentionRelevance& p, int64_t begin, int64_t end) { bodies().attention(p, begin, end); }
void attention_reduce_cpu(const AttentionRelevance& p, int64_t begin, int64_t end) {
  bodies().attention_reduce(p, begin, end);
}
void targeted_sums_cpu(const TargetedRows& p, int64_t begin, int64_t end) { bodies().targeted_sums(p, begin, end); }
void targeted_factors_cpu(const TargetedRows& p, int64_t begin, int64_t end) { bodies().targeted_factors(p, begin, end); }
void targeted_rows_cpu(const TargetedRows& p, int64_t begin, int64_t end) { bodies().targeted(p, begin, end); }
void targeted_reduce_cpu(const TargetedRows& p, int64_t begin, int64_t end) { bodies().targeted_reduce(p, begin, end); }
void softmax_relevance_cpu(const SoftmaxRelevance& p, int64_t begin, int64_t end) { bodies().softmax(p, begin, end); }
void skip_sums_cpu(const SkipRelevance& p, int64_t begin, int64_t end) { bodies().skip_sums(p, begin, end); }
void skip_relevance_cpu(const SkipRelevance& p, int64_t begin, int64_t end) { bodies().skip(p, begin, end); }
void norm_relevance_cpu(const NormRelevance& p, int64_t begin, int64_t end) { bodies().norm(p, begin, end); }
void gradient_factor_cpu(const GradientFactor& p, int64_t begin, int64_t end) { bodies().gradient_factor(p, begin, end); }
void sign_split_cpu(const SignSplit& p, int64_t begin, int64_t end) { bodies().sign_split(p, begin, end); }
void linear_share_cpu(const LinearShare& p, int64_t begin, int64_t end) { bodies().linear_share(p, begin, end); }
void linear_return_cpu(const LinearReturn& p, int64_t begin, int64_t end) { bodies().linear_return(p, begin, end); }

}  // namespace xai
