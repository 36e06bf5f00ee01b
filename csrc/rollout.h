// Attention rollout (Abnar & Zuidema 2020): the contract of the family.
//
//   Abar = norm(w I + fuse_h A_h)        A (B,H,N,N), query i, key j; w the residual weight; norm divides a row by its sum
//   rollout = Abar^L ... Abar^1          later layers on the left
//
// Row form: one row r of the product needs only r <- r Abar^l for l = L..1, so a step reads A once and writes O(N).
// A row of w I + fuse_h A_h whose sum is 0 is left as zeros by the normalisation.
//
// Determinism: the work of a step is cut into `slots` pieces that depend on the shapes alone; each piece writes its own
// partial result and the pieces are added in order. No result depends on the number of threads or on atomics.
//
// CPU functions do the work items [begin, end) on the calling thread; csrc/bindings spreads them over threads.
// CUDA functions launch on `stream` (a cudaStream_t) and return null, or a message that says what failed.
#pragma once
#include "scores.h"

namespace xai {

// ---- row step, attention given ---------------------------------------------------------------------------------------
//   out[b,r,:] = sum_i rows[b,r,i] Abar[b,i,:]
struct RowStep {
  View4 attention;   // (B,H,N,N) of `dtype`, column stride 1
  const void* rows;  // (B,R,N) contiguous, accumulate type
  void* partial;     // (B,slots,R,N) workspace, accumulate type
  void* out;         // (B,R,N) contiguous, accumulate type
  int64_t batch, heads, tokens, n_rows, slots;
  double residual;  // w >= 0
  bool normalize;
  Fusion fusion;
  Dtype dtype;
};
int64_t row_step_slots_cpu(int64_t batch, int64_t tokens);
void row_step_cpu(const RowStep& p, int64_t begin, int64_t end);   // items: B*slots, fills partial
void add_slots_cpu(const RowStep& p, int64_t begin, int64_t end);  // items: B*R, partial -> out
int64_t row_step_slots_cuda(int64_t batch, int64_t tokens);
const char* launch_row_step(const RowStep& p, void* stream);  // fills partial and out

// ---- full form: the fused matrix ---------------------------------------------------------------------------------------
//   out[b] = Abar[b]
struct FuseHeads {
  View4 attention;  // (B,H,N,N) of `dtype`, column stride 1
  void* out;        // (B,N,N) contiguous, of `dtype`, or of the accumulate type if `wide`
  int64_t batch, heads, tokens;
  double residual;
  bool normalize, wide;
  Fusion fusion;
  Dtype dtype;
};
void fuse_heads_cpu(const FuseHeads& p, int64_t begin, int64_t end);  // items: the B*N rows
const char* launch_fuse_heads(const FuseHeads& p, void* stream);

// ---- many rows, attention given, on a CPU with a matrix unit -----------------------------------------------------------
//   out[b] = rows[b] Abar[b], as the row step. The operands exist as operands of the unit only: `start_items` make `rows` of
//   given rows (split) or, where the product starts with Abar itself, of the attention of the first layer (start). Then,
//   layer after layer, `fuse_items` make `fused` of its attention and `items` make `next`, the `rows` of the following
//   layer, or in the last layer `out`.
struct RowProduct {
  View4 attention;    // (B,H,N,N) of `dtype`, column stride 1
  void *rows, *next;  // rows_bytes each, 64-byte aligned
  void* fused;        // fused_bytes, 64-byte aligned
  void* out;          // (B,R,N) contiguous, float; null before the last layer
  int64_t batch, heads, tokens, n_rows;
  double residual;
  bool normalize;
  Fusion fusion;
  Dtype dtype;  // not f64
};
struct RowProductPlan {
  int64_t start_items, fuse_items, items, rows_bytes, fused_bytes;
};
bool has_row_product_cpu(Dtype dtype);
RowProductPlan row_product_plan_cpu(const RowProduct& p);
void row_product_split_cpu(const RowProduct& p, const void* rows, int64_t begin, int64_t end);  // rows (B,R,N) of float
void row_product_start_cpu(const RowProduct& p, int64_t begin, int64_t end);                    // R = N
void row_product_fuse_cpu(const RowProduct& p, int64_t begin, int64_t end);
void row_product_cpu(const RowProduct& p, int64_t begin, int64_t end);

// ---- row step, streamed from q and k -------------------------------------------------------------------------------------
//   out[b,r,:] = w c[b,r,:] + sum_i c[b,r,i] fuse_h P[b,h,i,:],     c[b,r,i] = rows_factor rows[b,r,i],   Nq = Nk = N
// mean and sum: the caller has divided by the row sums of Abar, which are known before any score is computed (in rows_factor
// or in rows), and `normalize` is not read. max and min: if `normalize`, the kernel divides by the row sums that it finds.
// Queries i with rows[b,:,i] = 0 for every r are not computed.
struct StreamedRowStep : AttentionScores {
  const void* rows;  // (B,R,N) contiguous, accumulate type
  void* out;         // (B,R,N) contiguous, accumulate type
  void* workspace;   // streamed_workspace_{cpu,cuda}(p) bytes, 64-byte aligned
  int64_t n_rows;
  double residual, rows_factor;
  bool normalize;
  Fusion fusion;
};

// CPU: prepare, then for each group of key heads pack and step, then reduce. Groups bound the packed keys to a few MB.
struct StreamPlan {
  int64_t groups, pack_items, step_items,
      reduce_items;  // items of one group: pack_items, step_items; of the whole: reduce_items
  int64_t workspace_bytes;
};
StreamPlan streamed_plan_cpu(const StreamedRowStep& p);
void streamed_prepare_cpu(const StreamedRowStep& p);  // serial, O(B R N)
void streamed_pack_cpu(const StreamedRowStep& p, int64_t group, int64_t begin, int64_t end);
void streamed_step_cpu(const StreamedRowStep& p, int64_t group, int64_t begin, int64_t end);
void streamed_reduce_cpu(const StreamedRowStep& p, int64_t begin, int64_t end);  // fills out

int64_t streamed_workspace_cuda(const StreamedRowStep& p);
const char* launch_streamed_row_step(const StreamedRowStep& p, void* stream);

}  // namespace xai
