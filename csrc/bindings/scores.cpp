// Attention scores: checks and the part of the contract that every streamed op fills alike.
#include "common.h"

#include <ATen/Context.h>

namespace xai {

void check_scores(const Tensor& query, const Tensor& key, const std::optional<Tensor>& mask,
                  const std::optional<Tensor>& lse) {
  TORCH_CHECK_VALUE(query.dim() == 4 && key.dim() == 4 && key.size(2) > 0 && query.size(3) == key.size(3) &&
                        query.size(0) == key.size(0) && key.size(1) > 0 && query.size(1) % key.size(1) == 0 &&
                        query.size(1) > 0 && query.size(2) > 0 && query.size(3) > 0,
                    "query, key: expected (B, H, N, D) and (B, Hkv, N, D) with H a multiple of Hkv, got ", query.sizes(),
                    " and ", key.sizes());
  TORCH_CHECK_VALUE(query.scalar_type() == key.scalar_type() && query.device() == key.device(),
                    "key: expected the dtype and device of query");
  TORCH_CHECK_VALUE(!mask || mask->device() == query.device(), "attn_mask: expected the device of query");
  TORCH_CHECK_VALUE(!lse || (lse->device() == query.device() && lse->sizes() == query.sizes().slice(0, 3)),
                    "lse: expected shape (B, H, N) on the device of query");
}

void fill_scores(AttentionScores& p, const Tensor& query, const Tensor& key, const std::optional<Tensor>& mask_in,
                 Tensor& mask, std::optional<double> scale, bool is_causal) {
  p.query = view_of(query);
  p.key = view_of(key);
  p.batch = query.size(0);
  p.heads = query.size(1);
  p.kv_heads = key.size(1);
  p.tokens = query.size(2);
  p.keys = key.size(2);
  p.dim = query.size(3);
  p.scale = scale ? *scale : 1.0 / std::sqrt(double(p.dim));
  p.causal = is_causal;
  // Not allowTF32CuBLAS(), which throws once the newer switches of torch have been used.
  p.tf32 =
      at::globalContext().float32Precision(at::Float32Backend::CUDA, at::Float32Op::MATMUL) == at::Float32Precision::TF32;
  p.dtype = dtype_of(query);
  if (!mask_in) return;
  mask = mask_in->expand({p.batch, p.heads, p.tokens, p.keys});
  p.mask = view_of(mask);
  p.mask_kind = mask.scalar_type() == at::kBool ? MaskKind::boolean : MaskKind::additive;
  p.mask_dtype = p.mask_kind == MaskKind::boolean ? Dtype::f32 : dtype_of(mask);
}

}  // namespace xai
