// Relevance splitting (LRP): the contract of the family.
//
//   stab(x) = x + eps sign(x), sign(0) = +1;   R / stab(x) is taken as 0 where stab(x) = 0
//
// An op of `gradient_form` takes and gives modified gradients g instead of relevances R = x g. Its division R / stab(O)
// becomes g |O| / (|O| + eps), and its last product with the input falls away.
//
// CPU functions do the work items [begin, end) of a WorkPlan on the calling thread; csrc/bindings spreads them over threads.
// The cut into items depends on shapes alone. CUDA functions launch on `stream` and return null, or a message.
#pragma once
#include "scores.h"

namespace xai {

// `items` fill the outputs or partial results in the workspace; then `reduce_items` add partial results in a fixed order.
struct WorkPlan {
  int64_t items, reduce_items, workspace_bytes;
};

// ---- O = A V with A given ------------------------------------------------------------------------------------------------
//   S = R / stab(A V),   attention_out = lam A o (S V^T),   value_out = (1 - lam) V o sum_{h of the group} A_h^T S_h
struct AvRelevance {
  View4 attention;      // (B,H,Nq,Nk) of `dtype`, column stride 1
  View4 value;          // (B,Hkv,Nk,D) of `dtype`, column stride 1
  View4 relevance;      // (B,H,Nq,D) of `dtype`, column stride 1
  void* attention_out;  // (B,H,Nq,Nk) contiguous, of `dtype`
  void* value_out;      // (B,Hkv,Nk,D) contiguous, of `dtype`
  void* workspace;
  int64_t batch, heads, kv_heads, queries, keys, dim;
  double lam, eps;
  Dtype dtype;
};
WorkPlan av_plan_cpu(const AvRelevance& p);
void av_relevance_cpu(const AvRelevance& p, int64_t begin, int64_t end);
void av_reduce_cpu(const AvRelevance& p, int64_t begin, int64_t end);
int64_t av_workspace_cuda(const AvRelevance& p);
const char* launch_av_relevance(const AvRelevance& p, void* stream);

// ---- fused attention -----------------------------------------------------------------------------------------------------
//   S = R / stab(O),   O = P V
//   value_out = (1 - lam) V o P^T S
//   G = P o (S V^T - rowsum(S o O)) o |x| / (|x| + eps)        x the scaled score, without the mask
//   query_out = lam/2 scale Q o G K,   key_out = lam/2 scale K o G^T Q
// Sums over the query heads of a key head. gradient_form: without the factors V o, Q o, K o. Queries whose row of `upstream`
// is 0 are not computed. lam = 0: query_out and key_out are null and only P^T S is computed.
struct AttentionRelevance : AttentionScores {
  View4 value;      // (B,Hkv,Nk,Dv) of `dtype`, column stride 1
  View4 upstream;   // (B,H,Nq,Dv) of `dtype`, column stride 1: R, or g in gradient form
  View4 output;     // (B,H,Nq,Dv) of `dtype`, column stride 1; data null: computed here
  void* query_out;  // (B,H,Nq,D) contiguous, of `dtype`
  void* key_out;    // (B,Hkv,Nk,D) contiguous, of `dtype`
  void* value_out;  // (B,Hkv,Nk,Dv) contiguous, of `dtype`
  void* workspace;
  int64_t value_dim;
  double lam, eps;
  bool gradient_form;
};
WorkPlan attention_plan_cpu(const AttentionRelevance& p);
void attention_relevance_cpu(const AttentionRelevance& p, int64_t begin, int64_t end);
void attention_reduce_cpu(const AttentionRelevance& p, int64_t begin, int64_t end);
int64_t attention_workspace_cuda(const AttentionRelevance& p);
const char* launch_attention_relevance(const AttentionRelevance& p, void* stream);

// ---- targeted row step
// -----------------------------------------------------------------------------------------------------
//   E_ij = fuse_h max(0, dP_hij W_hij),   dP = dO V^T,   W = P, or lam P o (S V^T) with S = R_O / stab(O) if R_O is given
//   out[b,r,:] = sum_i rows[b,r,i] norm(w I + E)[i,:]          Nq = Nk = N; fuse is mean or sum; clamp off: without max(0,
//   .)
// Queries i with rows[b,:,i] = 0 for every r are not computed. normalize: two passes, the first for the row sums of w I + E.
struct TargetedRows : AttentionScores {
  View4 value;       // (B,Hkv,N,Dv) of `dtype`, column stride 1
  View4 grad_out;    // (B,H,N,Dv) of `dtype`, column stride 1
  View4 relevance;   // (B,H,N,Dv) of `dtype`, column stride 1; data null: W = P
  View4 output;      // (B,H,N,Dv) of `dtype`, column stride 1; data null: computed here if it is needed
  const void* rows;  // (B,R,N) contiguous, accumulate type
  void* out;         // (B,R,N) contiguous, accumulate type
  void* workspace;
  int64_t value_dim, n_rows;
  double residual, lam, eps;
  bool clamp, normalize;
  Fusion fusion;
};
// CPU: if `normalize`, sums and factors first; then rows, then reduce.
WorkPlan targeted_plan_cpu(const TargetedRows& p);
void targeted_sums_cpu(const TargetedRows& p, int64_t begin, int64_t end);     // the plan's items
void targeted_factors_cpu(const TargetedRows& p, int64_t begin, int64_t end);  // items: the B samples
void targeted_rows_cpu(const TargetedRows& p, int64_t begin, int64_t end);
void targeted_reduce_cpu(const TargetedRows& p, int64_t begin, int64_t end);  // fills out
int64_t targeted_workspace_cuda(const TargetedRows& p);
const char* launch_targeted_rows(const TargetedRows& p, void* stream);

// ---- softmax, Taylor rule ------------------------------------------------------------------------------------------------
//   out = x o (R - A rowsum(R)), 0 where x is removed by a mask (at most kRemovedBelow)
struct SoftmaxRelevance {
  const void *logits, *probs, *relevance;  // (rows,columns) contiguous, of `dtype`
  void* out;                               // (rows,columns) contiguous, of `dtype`
  int64_t rows, columns;
  Dtype dtype;
};
void softmax_relevance_cpu(const SoftmaxRelevance& p, int64_t begin, int64_t end);  // items: the rows
const char* launch_softmax_relevance(const SoftmaxRelevance& p, void* stream);

// ---- skip connection
// -------------------------------------------------------------------------------------------------------
//   out_x = X o R / stab(X + Y), out_y = Y o R / stab(X + Y)
//   ratio: out_x is then multiplied by sign(a) sum(R) / (|a| + |b|) per sample, out_y by sign(b) sum(R) / (|a| + |b|), with
//   a, b the sums of out_x and out_y over the sample before rounding to `dtype`
struct SkipRelevance {
  const void *x, *y, *relevance;  // (batch,elements) contiguous, of `dtype`
  void *out_x, *out_y;            // (batch,elements) contiguous, of `dtype`
  void* sums;                     // ratio: (batch, skip_chunks(elements), 3) workspace of double, sums of R, out_x, out_y
  int64_t batch, elements;
  double eps;
  bool ratio;
  Dtype dtype;
};
constexpr int64_t kSkipChunk = 16384;  // elements of a sample that one work item takes
inline int64_t skip_chunks(int64_t elements) { return (elements + kSkipChunk - 1) / kSkipChunk; }
void skip_sums_cpu(const SkipRelevance& p, int64_t begin, int64_t end);       // ratio only; items: batch * skip_chunks
void skip_relevance_cpu(const SkipRelevance& p, int64_t begin, int64_t end);  // items: batch * skip_chunks
const char* launch_skip_relevance(const SkipRelevance& p, void* stream);

// ---- LayerNorm and RMSNorm over the columns, their scale taken as a constant
// -----------------------------------------------
//   y = w o (x - mu) / sigma + b,   S = R / stab(y),   out = x o (w S - mean(w S)) / sigma
//   rms: mu = 0 and no mean is taken; detach_mean: mu is a constant, so no mean of w S is taken; gradient_form: without x o
struct NormRelevance {
  const void *x, *upstream;   // (rows,columns) contiguous, of `dtype`
  const void *weight, *bias;  // (columns) contiguous, of `dtype`, or null
  void* out;                  // (rows,columns) contiguous, of `dtype`
  int64_t rows, columns;
  double norm_eps, eps;
  bool rms, detach_mean, gradient_form;
  Dtype dtype;
};
void norm_relevance_cpu(const NormRelevance& p, int64_t begin, int64_t end);  // items: the rows
const char* launch_norm_relevance(const NormRelevance& p, void* stream);

// ---- elementwise rules in gradient form
// --------------------------------------------------------------------------------------
//   stabilized: out = grad |y| / (|y| + eps)          identity: out = grad y / x, grad at_zero where x = 0
enum class GradientRule { stabilized, identity };
struct GradientFactor {
  const void *grad, *x, *y;  // contiguous, of `dtype`; x null for stabilized
  void* out;                 // contiguous, of `dtype`
  int64_t elements;
  double parameter;  // eps or at_zero
  GradientRule rule;
  Dtype dtype;
};
void gradient_factor_cpu(const GradientFactor& p, int64_t begin, int64_t end);  // items: elements
const char* launch_gradient_factor(const GradientFactor& p, void* stream);

// ---- linear layers: what lies between the matrix products
// -------------------------------------------------------------------- The products with the weights are left to the GEMM of
// torch. The rules that treat products x w by their sign work on the columns [x+, x-] = [max(x,0), min(x,0)] and give the
// sums `up` and `down` of the positive and the negative products.
//   split:    out (rows, 2 columns) = [x+, x-]
struct SignSplit {
  const void* x;  // (rows,columns) contiguous, of `dtype`
  void* out;      // (rows,2 columns) contiguous, accumulate type
  int64_t rows, columns;
  Dtype dtype;
};
void sign_split_cpu(const SignSplit& p, int64_t begin, int64_t end);  // items: the rows
const char* launch_sign_split(const SignSplit& p, void* stream);

//   epsilon:   share = R / stab(z + b)
//   zplus:     share = R / stab(up)
//   alphabeta: share = alpha R / stab(up + b+),  share_down = -beta R / stab(down + b-)
//   gamma:     O = z + b,  f = O > 0 ? up + b+ : down + b-,  s = O == 0 ? 0 : R / stab(O + gamma f)
//              share = s,  share_up = O > 0 ? gamma s : 0,  share_down = O < 0 ? gamma s : 0
enum class LinearRule { epsilon, zplus, alphabeta, gamma };
struct LinearShare {
  const void *z, *up, *down;            // (rows,columns) contiguous, accumulate type; those that the rule reads
  const void *bias, *relevance;         // (columns) or null, (rows,columns): contiguous, of `dtype`
  void *share, *share_up, *share_down;  // (rows,columns), accumulate type, rows `stride` apart; those that the rule writes
  int64_t rows, columns, stride;
  double eps, gamma, alpha, beta;
  LinearRule rule;
  Dtype dtype;
};
void linear_share_cpu(const LinearShare& p, int64_t begin, int64_t end);  // items: the rows
const char* launch_linear_share(const LinearShare& p, void* stream);

//   out = x o plain + x+ o signed[:, :columns] + x- o signed[:, columns:]          null parts are left out
struct LinearReturn {
  const void* x;                // (rows,columns) contiguous, of `dtype`
  const void *plain, *by_sign;  // (rows,columns), (rows,2 columns): contiguous, accumulate type, or null
  void* out;                    // (rows,columns) contiguous, of `dtype`
  int64_t rows, columns;
  Dtype dtype;
};
void linear_return_cpu(const LinearReturn& p, int64_t begin, int64_t end);  // items: the rows
const char* launch_linear_return(const LinearReturn& p, void* stream);

}  // namespace xai
