// Operands of the relevance kernels: rows in accumulate type, zero-padded, contiguous and, for the tensor cores, rounded.
// Packing reads each input once; the kernels that meet every pair of tiles then copy whole aligned rows and nothing else.
#pragma once
#include "../scores.h"
#include "streamed_scores.cuh"

namespace xai {

constexpr int64_t kRowPadding = 64;  // rows of the largest tile
constexpr int64_t kWidthPadding = 8;

// (batch * heads, rows, width)
template <class Acc>
struct PackedRows {
  Acc* data;
  int64_t heads, rows;
  int width;
  __host__ __device__ int64_t elements(int64_t batch) const { return batch * heads * rows * width; }
  __device__ Acc* at(int64_t b, int64_t h, int64_t row) const { return data + ((b * heads + h) * rows + row) * width; }
};

template <class Acc>
PackedRows<Acc> packed_rows(int64_t heads, int64_t rows, int64_t dim) {
  return {nullptr, heads, round_up(rows, kRowPadding), int(round_up(dim, kWidthPadding))};
}

// R / stab(x); 0 where that divides by 0.
template <class Acc>
__device__ Acc stabilized_ratio(Acc relevance, Acc x, Acc eps) {
  const Acc stabilized = x < 0 ? x - eps : x + eps;
  return stabilized == 0 ? Acc(0) : relevance / stabilized;
}
// |x| / (|x| + eps), which is x / stab(x); 1 for eps = 0.
template <class Acc>
__device__ Acc damping(Acc x, Acc eps) {
  const Acc size = x < 0 ? -x : x;
  return eps > 0 ? size / (size + eps) : Acc(1);
}

// ---- attention ------------------------------------------------------------------------------------------------------

// What the kernels of streamed attention read.
template <class Acc>
struct AttentionOperands : ScoreArrays<Acc> {
  PackedRows<Acc> query, key, value;  // (B,H,Nq,D), (B,Hkv,Nk,D), (B,Hkv,Nk,Dv); queries that are not needed are zeros
  PackedRows<Acc> share;              // (B,H,Nq,Dv): S
  Acc* delta;                         // (B,H,padded): rowsum(S o O)
};

// S = R / stab(O), or g |O| / (|O| + eps) in gradient form.
struct Sharing {
  View4 upstream;  // (B,H,Nq,Dv)
  View4 output;    // (B,H,Nq,Dv); data null: O is computed
  double eps;
  bool gradient_form, needs_output;
};

// Sizes of the operands. by_head: each head has its own set of needed queries.
template <class Acc>
void size_operands(const AttentionScores& p, int64_t value_dim, bool by_head, AttentionOperands<Acc>& w) {
  w.padded = round_up(p.tokens, kTokenPadding);
  w.active_head = by_head ? w.padded / kWarp : 0;
  w.active_batch = by_head ? p.heads * w.active_head : w.padded / kWarp;
  w.scale = Acc(p.scale * kLog2e);
  switch (p.dtype) {
    case Dtype::f16:
    case Dtype::bf16: w.aligned = can_copy_pieces<__half>(p); break;
    case Dtype::f64: w.aligned = can_copy_pieces<double>(p); break;
    default: w.aligned = can_copy_pieces<float>(p);
  }
  w.query = packed_rows<Acc>(p.heads, p.tokens, p.dim);
  w.key = packed_rows<Acc>(p.kv_heads, p.keys, p.dim);
  w.value = packed_rows<Acc>(p.kv_heads, p.keys, value_dim);
  w.share = packed_rows<Acc>(p.heads, p.tokens, value_dim);
}

template <class Acc>
void take_operands(const AttentionScores& p, bool with_share, AttentionOperands<Acc>& w, Workspace& space) {
  space.take(w.shift, p.batch * p.heads * w.padded);
  space.take(w.active, p.batch * w.active_batch);
  space.take(w.query.data, w.query.elements(p.batch));
  space.take(w.key.data, w.key.elements(p.batch));
  space.take(w.value.data, w.value.elements(p.batch));
  space.take(w.share.data, with_share ? w.share.elements(p.batch) : 0);
  space.take(w.delta, with_share ? p.batch * p.heads * w.padded : 0);
}

// The launchers below live in operands.cu, for Acc float and double. `tensor`: round to TF32.

// x (B,heads,rows,dim) of `dtype` -> out. Rows that `scores` does not need, if given, and the padding become zeros.
template <class Acc>
const char* launch_pack(const View4& x, Dtype dtype, int64_t batch, int64_t rows, int64_t dim, const PackedRows<Acc>& out,
                        bool tensor, const ScoreArrays<Acc>* scores, void* stream);

// x (B,H,Nq,dim) -> active: the queries whose row is not zero.
template <class Acc>
const char* launch_mark_active(const View4& x, Dtype dtype, int64_t batch, int64_t heads, int64_t rows, int64_t dim,
                               const ScoreArrays<Acc>& w, void* stream);

// active -> shift, query, key, value of w.
template <class Acc>
const char* launch_operands(const AttentionScores& p, const View4& value, int64_t value_dim, const AttentionOperands<Acc>& w,
                            bool tensor, void* stream);

// O, given or computed from the operands -> share, delta.
template <class Acc>
const char* launch_share(const AttentionScores& p, int64_t value_dim, const Sharing& sharing,
                         const AttentionOperands<Acc>& w, bool tensor, void* stream);

// share (holding O where no output is given) -> share, delta (B,H,delta_pitch) or null. active null: every row is needed.
template <class Acc>
const char* launch_divide(const Sharing& sharing, Dtype dtype, int64_t batch, int64_t heads, int64_t rows, int64_t dim,
                          const ScoreArrays<Acc>* scores, const PackedRows<Acc>& share, Acc* delta, bool tensor,
                          void* stream);

// partial (slots,B,heads,rows,width) -> out (B,heads,rows,dim) of `dtype`:  out = factor [input o] sum_slots partial
template <class Acc>
const char* launch_finish(const PackedRows<Acc>& partial, int64_t slots, const View4* input, Dtype dtype, int64_t batch,
                          int64_t rows, int64_t dim, double factor, void* out, void* stream);

}  // namespace xai
