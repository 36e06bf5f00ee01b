// Attention probabilities that are built from q and k where they are needed, never stored: what every streamed op begins
// with.
//
//   x_hij = scale q_hi k_hj                                    the scaled score
//   P[b,h,i,j] = exp(x_hij + mask_ij - LSE_i),   LSE_i = log sum_j exp(x_hij + mask_ij)
//
// A query whose keys are all removed by the mask has P = 0. Query head h reads key head h / (H / Hkv). causal keeps j <= i
// and may be combined with a mask.
#pragma once
#include "types.h"

namespace xai {

struct AttentionScores {
  View4 query;      // (B,H,Nq,D) of `dtype`, column stride 1
  View4 key;        // (B,Hkv,Nk,D) of `dtype`, column stride 1
  View4 mask;       // (B,H,Nq,Nk), broadcast by stride 0; boolean: one byte; additive: of `mask_dtype`
  const void* lse;  // (B,H,Nq) contiguous, accumulate type, or null: computed here
  int64_t batch, heads, kv_heads, tokens, keys, dim;  // tokens = Nq, keys = Nk
  double scale;
  bool causal;
  bool tf32;  // CUDA, f32 inputs: products may round their inputs to TF32
  MaskKind mask_kind;
  Dtype dtype, mask_dtype;
};

}  // namespace xai
