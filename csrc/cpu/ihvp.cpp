// CPU side of the ihvp family: how work is cut, and the choice of the vector body. The arithmetic is in ihvp.inc, compiled
// once per instruction set.
#include "../ihvp.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <iterator>
#include <limits>
#include <memory>
#include <new>
#include <optional>
#include <type_traits>
#include <vector>

#include "../philox.h"
#include "../scores.h"
#include "blocks.h"
#include "simd.h"

namespace xai {
namespace {

constexpr int64_t kMostSlots = 64;                      // pieces of a sum over rows
constexpr int64_t kSlotRows = 256;                      // rows that are worth a piece
constexpr int64_t kMostPartials = int64_t{1} << 25;     // numbers in all partial sums
constexpr int64_t kMostListEntries = int64_t{1} << 24;  // places in the lists of all pieces

// Work items of a LiSSA step: rows of the batch; columns and parameters of the state.
constexpr int64_t kLissaRows = 16, kLissaColumns = 12, kLissaRange = 128;
constexpr int64_t kLissaTile = 12;          // the same for panels: rows; parameters. A multiple of every kTileRows
constexpr int64_t kLissaManyColumns = 128;  // from here on panels are faster

constexpr int64_t kProjectionInputs = 2048;  // inputs that are worth a piece

int64_t element_bytes(Dtype d) { return d == Dtype::f64 ? 8 : d == Dtype::f32 ? 4 : 2; }

struct Bodies {
  void (*glm_hvp)(const GlmHvp&, int64_t, int64_t);
  void (*glm_hvp_reduce)(const GlmHvp&, int64_t, int64_t);
  void (*glm_curve)(const GlmCurve&, int64_t, int64_t);
  void (*lissa_pack)(const Lissa&, const void*, void*, int64_t, int64_t);
  void (*lissa_unpack)(const Lissa&, const void*, void*, int64_t, int64_t);
  void (*lissa_rows)(const Lissa&, int64_t, int64_t, int64_t);
  void (*lissa_update)(const Lissa&, int64_t, int64_t, int64_t);
  PanelSize (*panel_size)(Dtype, int64_t);
  void (*scores_pack)(const InfluenceScores&, int64_t, int64_t);
  void (*scores)(const InfluenceScores&, int64_t, int64_t);
  void (*scores_merge)(const InfluenceScores&, int64_t, int64_t);
  void (*projection)(const Projection&, int64_t, int64_t);
  void (*projection_reduce)(const Projection&, int64_t, int64_t);
};

#define XAI_WITH_MATRIX_UNIT 1
#define XAI_BODIES(ISA)                                                                                \
  {ISA::glm_hvp,      ISA::glm_hvp_reduce, ISA::glm_curve,        ISA::lissa_pack,  ISA::lissa_unpack, \
   ISA::lissa_rows,   ISA::lissa_update,   ISA::panel_size,       ISA::scores_pack, ISA::scores,       \
   ISA::scores_merge, ISA::projection,     ISA::projection_reduce}

#define XAI_BODY_FILE "ihvp.inc"
#include "bodies.inc"

}  // namespace

int64_t glm_slots_cpu(int64_t rows, int64_t columns, int64_t params) {
  const int64_t by_memory = std::max<int64_t>(1, kMostPartials / (columns * params));
  return std::max<int64_t>(1, std::min({kMostSlots, pieces_of(rows, kSlotRows), by_memory}));
}

void glm_hvp_cpu(const GlmHvp& p, int64_t begin, int64_t end) { bodies().glm_hvp(p, begin, end); }
void glm_hvp_reduce_cpu(const GlmHvp& p, int64_t begin, int64_t end) { bodies().glm_hvp_reduce(p, begin, end); }
void glm_curve_cpu(const GlmCurve& p, int64_t begin, int64_t end) { bodies().glm_curve(p, begin, end); }

LissaPlan lissa_plan_cpu(const Lissa& p) {
  const int64_t params = p.params();
  if (p.columns < kLissaManyColumns)
    return {pieces_of(p.batch, kLissaRows),
            pieces_of(p.columns, kLissaColumns) * pieces_of(params, kLissaRange),
            0,
            0,
            p.batch * params,
            p.batch * p.columns};
  const int64_t width = panel_columns_of(accumulate_bytes(p.accumulate));
  const int64_t row_tiles = pieces_of(p.batch, kLissaTile), param_tiles = pieces_of(params, kLissaTile);
  return {row_tiles,
          param_tiles,
          width,
          pieces_of(p.columns, width),
          row_tiles * param_tiles * kLissaTile * kLissaTile,
          row_tiles * kLissaTile * panel_pitch_of(p.columns, width)};
}
void lissa_pack_cpu(const Lissa& p, const void* vectors, void* panels, int64_t begin, int64_t end) {
  bodies().lissa_pack(p, vectors, panels, begin, end);
}
void lissa_unpack_cpu(const Lissa& p, const void* panels, void* vectors, int64_t begin, int64_t end) {
  bodies().lissa_unpack(p, panels, vectors, begin, end);
}
void lissa_rows_cpu(const Lissa& p, int64_t step, int64_t begin, int64_t end) { bodies().lissa_rows(p, step, begin, end); }
void lissa_update_cpu(const Lissa& p, int64_t step, int64_t begin, int64_t end) {
  bodies().lissa_update(p, step, begin, end);
}

void sample_rows_cpu(int64_t* out, int64_t rows, int64_t count, uint64_t seed, int64_t step) {
  for (int64_t k = 0; k < count; ++k) out[k] = sampled_row(seed, step, k, rows);
}

ScoresPlan scores_plan_cpu(const InfluenceScores& p) {
  const PanelSize panel = bodies().panel_size(p.accumulate, p.params());
  const int64_t panels = pieces_of(p.tests, panel.columns) * p.classes;
  const int64_t by_memory = std::max<int64_t>(1, kMostListEntries / std::max<int64_t>(1, p.tests * p.k));
  const int64_t slots = std::max<int64_t>(1, std::min({kMostSlots, pieces_of(p.rows, kSlotRows), by_memory}));
  return {slots, panels, panels * panel.bytes};
}
void scores_pack_cpu(const InfluenceScores& p, int64_t begin, int64_t end) { bodies().scores_pack(p, begin, end); }
void scores_cpu(const InfluenceScores& p, int64_t begin, int64_t end) { bodies().scores(p, begin, end); }
void scores_merge_cpu(const InfluenceScores& p, int64_t begin, int64_t end) { bodies().scores_merge(p, begin, end); }

int64_t projection_slots(int64_t inputs, int64_t) {
  return std::clamp<int64_t>(inputs / kProjectionInputs, 1, kMostSlots / 2);
}
void projection_cpu(const Projection& p, int64_t begin, int64_t end) { bodies().projection(p, begin, end); }
void projection_reduce_cpu(const Projection& p, int64_t begin, int64_t end) { bodies().projection_reduce(p, begin, end); }

}  // namespace xai
