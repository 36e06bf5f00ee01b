// Inverse-Hessian-vector products of generalised linear models: the contract of the family.
//
//   H = (1/n) sum_i s_i (x_i x_i^T) (x) W_i + l2 I + damping I      x_i row i of X (n,D), followed by a 1 with `intercept`
//   H v = (1/n) sum_i x_i (s_i W_i(v^T x_i))^T + (l2 + damping) v   l2 not on the intercept
//
// W_i is the curvature of the loss in the outputs z = theta^T x:
//   softmax      W(z') = p o (z' - <p, z'>)       weights: the probabilities p (n,C)
//   the others   W(z') = w z', one output         weights: the curvatures w (n,1)
//                linear 1, logistic p (1-p), Poisson exp(z), smooth hinge h (1-h) / t with h = sigmoid((1 - y z) / t)
// Sources: Koh & Liang 2017 (influence functions, smooth hinge); Agarwal, Bullins & Hazan 2017 (LiSSA).
//
// Parameters lie as `columns` = M C vectors of `params` = D + intercept numbers each: column m C + c is output c of
// right-hand side m. Kernels compute in `accumulate` (f32 or f64), whatever the type of X.
//
// Determinism: sums over rows are cut into pieces that depend on the shapes alone and are added in order. Batches are a
// function of (seed, step) alone: element k of a step is row floor(r n / 2^64), where r are 64 bits of Philox4x32-10 (Salmon
// et al. 2011) with key = seed and counter = (k / 2, step, 0, kSampleStream), the lower half of the output for even k.
//
// CPU functions do the work items [begin, end) on the calling thread; csrc/bindings spreads them over threads.
// CUDA functions launch on `stream` (a cudaStream_t) and return null, or a message that says what failed.
#pragma once
#include "types.h"

namespace xai {

enum class Family { linear, logistic, poisson, smooth_hinge, softmax };

constexpr uint32_t kSampleStream = 0x73616d70, kProjectionStream = 0x70726f6a;

// The rows of a problem: row i is x[index ? index[i] : i].
struct GlmRows {
  const void* x;               // (n,D) of `dtype`, column stride 1
  const int64_t* index;        // (rows) or null: all n
  const void* sample_weight;   // (n) of `accumulate`, or null: 1
  int64_t row_stride;          // elements
  int64_t rows, dim, classes;  // rows that are visited; D; C
  bool intercept;
  Dtype dtype, accumulate;

  XAI_HOST_DEVICE int64_t params() const { return dim + (intercept ? 1 : 0); }
};

// How z becomes the curvature: `weights`, or computed from the logits theta^T x where `theta` is given.
struct GlmCurvature {
  const void* weights;  // (n,C) of `accumulate`, or null
  const void* theta;    // (C,params) of `accumulate`, or null
  const void* target;   // (n) of `accumulate`, +1 or -1; smooth hinge with theta only
  double smoothing;     // t of the smooth hinge
  Family family;
};

// ---- Hessian-vector product: one pass over X --------------------------------------------------------------------------
struct GlmHvp : GlmRows, GlmCurvature {
  const void* vectors;  // (columns,params)
  void* partial;        // (slots,columns,params) workspace
  void* out;            // (columns,params)
  int64_t columns, slots;
  double l2, damping;
};
int64_t glm_slots_cpu(int64_t rows, int64_t columns, int64_t params);
void glm_hvp_cpu(const GlmHvp& p, int64_t begin, int64_t end);         // items: slots, fills partial
void glm_hvp_reduce_cpu(const GlmHvp& p, int64_t begin, int64_t end);  // items: columns, partial -> out
int64_t glm_slots_cuda(int64_t rows, int64_t columns, int64_t params);
const char* launch_glm_hvp(const GlmHvp& p, void* stream);  // fills partial and out

// ---- between two matrix products: Z = X V in, s W(Z) out, in place ------------------------------------------------------
// Row i of z belongs to row first + i of the visited rows.
struct GlmCurve : GlmRows, GlmCurvature {
  void* z;             // (count,columns)
  const void* logits;  // (count,C) in place of theta, or null
  int64_t columns, first, count;
};
void glm_curve_cpu(const GlmCurve& p, int64_t begin, int64_t end);  // items: rows of z
const char* launch_glm_curve(const GlmCurve& p, void* stream);

// ---- LiSSA: the whole stochastic loop ---------------------------------------------------------------------------------
//   v <- g + v - H_B v / sigma        H_B over `batch` rows drawn with replacement, with l2 and damping
// for steps first_step .. first_step + steps - 1. All right-hand sides share the batch. `average` is the mean of the
// iterates after the first `skip` steps. `weights` must be given. rows = n: every row may be drawn; index is null.
struct Lissa : GlmRows, GlmCurvature {
  const void* gradient;  // g (columns,params)
  void* state;           // v (columns,params): the start in, the last iterate out
  void* average;         // (columns,params)
  void* gathered;        // (batch,params) workspace
  void* outputs;         // (batch,columns) workspace
  int64_t* counter;      // (2) workspace, CUDA
  int64_t columns, batch, first_step, steps, skip;
  int64_t panel_columns;  // CPU: 0, or g, v and average are panels (see below)
  uint64_t seed;
  double l2, damping, sigma;
};
// Where columns are many, lanes of the CPU kernels run along them: g, v and average lie as panels of (params,panel_columns),
// the columns in the order (class, right-hand side), with columns of zeros at the end.
struct LissaPlan {
  int64_t row_items, update_items, panel_columns, panels;
  int64_t gathered_elements, output_elements;
};
LissaPlan lissa_plan_cpu(const Lissa& p);
// Items: update_items. vectors (M,params,C).
void lissa_pack_cpu(const Lissa& p, const void* vectors, void* panels, int64_t begin, int64_t end);
void lissa_unpack_cpu(const Lissa& p, const void* panels, void* vectors, int64_t begin, int64_t end);
void lissa_rows_cpu(const Lissa& p, int64_t step, int64_t begin, int64_t end);    // gathers, multiplies, applies W
void lissa_update_cpu(const Lissa& p, int64_t step, int64_t begin, int64_t end);  // multiplies back and steps
const char* launch_lissa(const Lissa& p, void* stream);                           // all steps

void sample_rows_cpu(int64_t* out, int64_t rows, int64_t count, uint64_t seed, int64_t step);
const char* launch_sample_rows(int64_t* out, int64_t rows, int64_t count, uint64_t seed, int64_t step, void* stream);

// ---- scores of test points against rows, and the k extreme ones -------------------------------------------------------
//   score[m,i] = sum_c delta[i,c] <x_i, solution[m C + c]>
// Neither the (tests, rows) matrix nor the (rows, M C) products are stored. Order: largest first if `largest`, else smallest
// first; of equal scores the earlier visited row first. Lists that find fewer than k rows end in index -1.
struct InfluenceScores : GlmRows {
  const void* delta;      // (n,C) of `accumulate`
  const void* solutions;  // (columns,params), columns = tests C
  void* panels;           // workspace of the CPU kernels: scores_plan_cpu(p).panel_bytes, on 64 bytes
  void* out;              // (tests,rows), or null if the extreme ones are asked for
  void* list_values;      // (slots,tests,k) workspace
  int64_t* list_rows;     // (slots,tests,k) workspace: positions among the visited rows
  void* values;           // (tests,k)
  int64_t* found;         // (tests,k): rows of X
  int64_t columns, tests, k, slots;
  bool largest;
};
struct ScoresPlan {
  int64_t slots, panel_items, panel_bytes;
};
ScoresPlan scores_plan_cpu(const InfluenceScores& p);
void scores_pack_cpu(const InfluenceScores& p, int64_t begin, int64_t end);   // items: panel_items
void scores_cpu(const InfluenceScores& p, int64_t begin, int64_t end);        // items: slots
void scores_merge_cpu(const InfluenceScores& p, int64_t begin, int64_t end);  // items: tests

// CUDA: the products X S come from a matrix product of a chunk of rows; this contracts them with delta and updates the
// lists.
struct ScoreChunk : GlmRows {
  const void* delta;     // (n,C)
  const void* products;  // (columns,count) of `accumulate`: place i belongs to visited row first + i
  void* out;             // (tests,rows): columns first .. first + count - 1 are filled; or null
  void* values;          // (tests,k): the lists so far, in order; all -1 in `found` at the start
  int64_t* found;        // (tests,k): rows of X
  int64_t columns, tests, k, first, count;
  bool largest;
};
const char* launch_score_chunk(const ScoreChunk& p, void* stream);

// ---- random projection --------------------------------------------------------------------------------------------------
//   out[b,j] = (1/sqrt(K)) sum_p x[b,p] r[offset + p, j],     r = +1 or -1, never stored
// r[p,j] is + where bit j % 32 of word j / 32 % 4 of Philox4x32-10 with key = seed and counter = (p low, p high, j / 128,
// kProjectionStream) is set.
struct Projection {
  const void* x;  // (batch,inputs) of `dtype`, column stride 1
  void* partial;  // (slots,batch,outputs) workspace, accumulate type of dtype
  void* out;      // (batch,outputs) accumulate type of dtype
  int64_t batch, row_stride, inputs, outputs, offset, slots;
  uint64_t seed;
  Dtype dtype;
};
int64_t projection_slots(int64_t inputs, int64_t outputs);
void projection_cpu(const Projection& p, int64_t begin, int64_t end);         // items: slots, fills partial
void projection_reduce_cpu(const Projection& p, int64_t begin, int64_t end);  // items: batch rows, partial -> out
const char* launch_projection(const Projection& p, void* stream);             // fills partial and out

}  // namespace xai
