// CPU side of the rollout family: slots, workspace layout and the choice of the vector body. The arithmetic is in
// rollout.inc, compiled once per instruction set.
#include "../rollout.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <iterator>
#include <limits>
#include <memory>
#include <new>
#include <type_traits>

#include "blocks.h"
#include "simd.h"

namespace xai {
namespace {

constexpr int64_t kSlotsWanted = 64;      // work pieces per call, over the whole batch: plenty for load balance
constexpr int64_t kSlotsMost = 32;        // per sample: bounds the partial results
constexpr int64_t kPackBytes = 16 << 20;  // packed keys of one group

int64_t slots_for(int64_t batch, int64_t pieces) {
  const int64_t wanted = (kSlotsWanted + batch - 1) / std::max<int64_t>(batch, 1);
  return std::max<int64_t>(1, std::min({wanted, kSlotsMost, pieces}));
}

constexpr int64_t kQueriesPerSlot = 24;  // at least

PanelSize key_panel(Dtype dtype, int64_t dim);

// Where things lie in the workspace of a streamed step. `Unit` is a key head of one sample.
struct StreamLayout {
  PanelSize panel;
  int64_t panels, unit_bytes, units_per_group, groups, slots;
  int64_t active_at, count_at, partial_at, packed_at, bytes;  // offsets in bytes

  explicit StreamLayout(const StreamedRowStep& p) {
    const int64_t size = accumulate_bytes(p.dtype);
    const int64_t units = p.batch * p.kv_heads;
    panel = key_panel(p.dtype, p.dim);
    panels = pieces_of(p.tokens, panel.columns);
    unit_bytes = panels * panel.bytes;
    units_per_group = std::max<int64_t>(1, kPackBytes / std::max<int64_t>(1, unit_bytes));
    // max and min fuse the heads inside a tile, so a group holds whole samples.
    if (p.fusion == Fusion::max || p.fusion == Fusion::min) units_per_group = round_up(units_per_group, p.kv_heads);
    units_per_group = std::min(units_per_group, std::max<int64_t>(units, 1));
    groups = (units + units_per_group - 1) / units_per_group;
    slots = slots_for(p.batch, p.heads * pieces_of(p.tokens, kQueriesPerSlot));
    active_at = 0;
    count_at = round_up(active_at + p.batch * p.tokens * int64_t{8}, 64);
    partial_at = round_up(count_at + p.batch * int64_t{8}, 64);
    packed_at = round_up(partial_at + p.batch * slots * p.n_rows * p.tokens * size, 64);
    bytes = packed_at + units_per_group * unit_bytes;
  }

  template <class T>
  T* at(const StreamedRowStep& p, int64_t offset) const {
    return reinterpret_cast<T*>(static_cast<char*>(p.workspace) + offset);
  }
  int64_t* active(const StreamedRowStep& p, int64_t b) const { return at<int64_t>(p, active_at) + b * p.tokens; }
  int64_t* count(const StreamedRowStep& p) const { return at<int64_t>(p, count_at); }
};

// How much of Abar one work item of the matrix unit's product of many rows reads.
constexpr int64_t kProductBytes = 1 << 20;

struct Bodies {
  PanelSize (*key_panel)(Dtype, int64_t);
  void (*row_step)(const RowStep&, int64_t, int64_t);
  void (*add_slots)(const RowStep&, int64_t, int64_t);
  void (*fuse_heads)(const FuseHeads&, int64_t, int64_t);
  void (*prepare)(const StreamedRowStep&);
  void (*pack)(const StreamedRowStep&, int64_t, int64_t, int64_t);
  void (*step)(const StreamedRowStep&, int64_t, int64_t, int64_t);
  void (*reduce)(const StreamedRowStep&, int64_t, int64_t);
  RowProductPlan (*product_plan)(const RowProduct&);  // null without a matrix unit, as the next four
  void (*product_split)(const RowProduct&, const void*, int64_t, int64_t);
  void (*product_start)(const RowProduct&, int64_t, int64_t);
  void (*product_fuse)(const RowProduct&, int64_t, int64_t);
  void (*product)(const RowProduct&, int64_t, int64_t);
};

#define XAI_WITH_MATRIX_UNIT 1
#define XAI_BODIES(ISA)                                                                                    \
  {ISA::panel_size,    ISA::row_step,      ISA::add_slots,       ISA::fuse_heads,   ISA::streamed_prepare, \
   ISA::streamed_pack, ISA::streamed_step, ISA::streamed_reduce, ISA::kProductPlan, ISA::kProductSplit,    \
   ISA::kProductStart, ISA::kProductFuse,  ISA::kProduct}

#define XAI_BODY_FILE "rollout.inc"
#include "bodies.inc"

PanelSize key_panel(Dtype dtype, int64_t dim) { return bodies().key_panel(dtype, dim); }

}  // namespace

int64_t row_step_slots_cpu(int64_t batch, int64_t tokens) { return slots_for(batch, (tokens + 7) / 8); }

void row_step_cpu(const RowStep& p, int64_t begin, int64_t end) { bodies().row_step(p, begin, end); }

void add_slots_cpu(const RowStep& p, int64_t begin, int64_t end) { bodies().add_slots(p, begin, end); }

void fuse_heads_cpu(const FuseHeads& p, int64_t begin, int64_t end) { bodies().fuse_heads(p, begin, end); }

bool has_row_product_cpu(Dtype dtype) { return bodies().product != nullptr && dtype != Dtype::f64; }

RowProductPlan row_product_plan_cpu(const RowProduct& p) { return bodies().product_plan(p); }

void row_product_split_cpu(const RowProduct& p, const void* rows, int64_t begin, int64_t end) {
  bodies().product_split(p, rows, begin, end);
}

void row_product_start_cpu(const RowProduct& p, int64_t begin, int64_t end) { bodies().product_start(p, begin, end); }

void row_product_fuse_cpu(const RowProduct& p, int64_t begin, int64_t end) { bodies().product_fuse(p, begin, end); }

void row_product_cpu(const RowProduct& p, int64_t begin, int64_t end) { bodies().product(p, begin, end); }

StreamPlan streamed_plan_cpu(const StreamedRowStep& p) {
  const StreamLayout layout(p);
  return {layout.groups, layout.units_per_group * layout.panels, p.batch * layout.slots, p.batch * p.n_rows, layout.bytes};
}

void streamed_prepare_cpu(const StreamedRowStep& p) { bodies().prepare(p); }

void streamed_pack_cpu(const StreamedRowStep& p, int64_t group, int64_t begin, int64_t end) {
  bodies().pack(p, group, begin, end);
}

void streamed_step_cpu(const StreamedRowStep& p, int64_t group, int64_t begin, int64_t end) {
  bodies().step(p, group, begin, end);
}

void streamed_reduce_cpu(const StreamedRowStep& p, int64_t begin, int64_t end) { bodies().reduce(p, begin, end); }

}  // namespace xai
