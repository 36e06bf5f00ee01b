// Bindings of the rollout family.
#include "rollout.h"

#include <ATen/ops/any.h>
#include <ATen/ops/full.h>

#include <optional>
#include <utility>
#include <vector>

#include "common.h"
#include "workspace.h"

namespace xai {
namespace {

void check_square_4d(const Tensor& x, const char* name) {
  TORCH_CHECK_VALUE(x.dim() == 4 && x.size(2) == x.size(3) && x.size(1) > 0 && x.size(2) > 0, name,
                    ": expected shape (B, H, N, N) with H, N >= 1, got ", x.sizes());
}

Tensor rollout_rows(const Tensor& attention_in, const Tensor& rows_in, const std::string& head_fusion, double residual,
                    bool normalize) {
  check_square_4d(attention_in, "attention");
  const int64_t batch = attention_in.size(0), heads = attention_in.size(1), tokens = attention_in.size(2);
  check_rows(rows_in, batch, tokens, attention_in);
  const c10::DeviceGuard guard(attention_in.device());
  const Tensor attention = with_unit_columns(attention_in), rows = rows_for(rows_in, attention);
  const int64_t n_rows = rows.size(1);
  const bool gpu = on_gpu(attention);
  const int64_t slots = gpu ? row_step_slots_cuda(batch, tokens) : row_step_slots_cpu(batch, tokens);
  const Tensor out = at::empty({batch, n_rows, tokens}, rows.options());
  const Tensor partial = at::empty({batch, slots, n_rows, tokens}, rows.options());
  const RowStep p{view_of(attention),
                  rows.const_data_ptr(),
                  partial.mutable_data_ptr(),
                  out.mutable_data_ptr(),
                  batch,
                  heads,
                  tokens,
                  n_rows,
                  slots,
                  residual,
                  normalize,
                  fusion_of(head_fusion),
                  dtype_of(attention)};
  if (out.numel() == 0) return in_dtype(out, rows_in.scalar_type());
  if (gpu) {
    check_launch(launch_row_step(p, current_stream(attention)));
  } else {
    const pybind11::gil_scoped_release release;
    parallel(batch * slots, double(attention.numel()), [&](int64_t i, int64_t j) { row_step_cpu(p, i, j); });
    parallel(batch * n_rows, double(partial.numel()), [&](int64_t i, int64_t j) { add_slots_cpu(p, i, j); });
  }
  return in_dtype(out, rows_in.scalar_type());
}

bool has_row_product(const Tensor& attention) { return !on_gpu(attention) && has_row_product_cpu(dtype_of(attention)); }

// rows (B,R,N) times Abar of one layer after the other, for the samples [first, first + p.batch); null rows: the product of
// the Abar alone. run(items, work) does the work items of a step.
template <class Run>
void multiply_layers(RowProduct p, const RowProductPlan& plan, const std::vector<Tensor>& layers, const float* rows,
                     float* out, int64_t first, Run run) {
  const int64_t offset = first * p.n_rows * p.tokens;
  const auto attend = [&](const Tensor& layer) {
    p.attention = view_of(layer);
    p.attention.data = static_cast<const char*>(p.attention.data) + first * p.attention.batch * layer.element_size();
    p.heads = layer.size(1);
    p.dtype = dtype_of(layer);
  };
  size_t k = 0;
  if (rows) {
    run(plan.start_items, [&](int64_t i, int64_t j) { row_product_split_cpu(p, rows + offset, i, j); });
  } else {
    attend(layers[k++]);
    run(plan.start_items, [&](int64_t i, int64_t j) { row_product_start_cpu(p, i, j); });
  }
  for (; k < layers.size(); ++k) {
    attend(layers[k]);
    if (k + 1 == layers.size()) p.out = out + offset;
    run(plan.fuse_items, [&](int64_t i, int64_t j) { row_product_fuse_cpu(p, i, j); });
    run(plan.items, [&](int64_t i, int64_t j) { row_product_cpu(p, i, j); });
    std::swap(p.rows, p.next);
  }
}

// The operands lie in memory of bytes_of(plan).
int64_t bytes_of(const RowProductPlan& plan) { return 2 * plan.rows_bytes + plan.fused_bytes; }

RowProduct with_operands(RowProduct p, const RowProductPlan& plan, const Workspace& memory) {
  p.rows = memory.data();
  p.next = static_cast<char*>(p.rows) + plan.rows_bytes;
  p.fused = static_cast<char*>(p.next) + plan.rows_bytes;
  return p;
}

void multiply_batch(RowProduct p, const std::vector<Tensor>& layers, const float* rows, float* out, int64_t batch) {
  const bool share_samples = batch < at::get_num_threads();
  p.batch = share_samples ? batch : 1;
  const RowProductPlan plan = row_product_plan_cpu(p);
  if (share_samples) {
    const Workspace memory(bytes_of(plan), layers[0]);
    const auto together = [](int64_t items, auto work) { at::parallel_for(0, items, 1, work); };
    return multiply_layers(with_operands(p, plan, memory), plan, layers, rows, out, 0, together);
  }
  // A sample's operands stay in the cache of its thread from layer to layer.
  at::parallel_for(0, batch, 1, [&](int64_t i, int64_t j) {
    const Workspace memory(bytes_of(plan), layers[0]);
    const auto alone = [](int64_t items, auto work) { work(0, items); };
    for (; i < j; ++i) multiply_layers(with_operands(p, plan, memory), plan, layers, rows, out, i, alone);
  });
}

// rollout_rows of many rows by one layer after the other, where has_row_product of each; without rows, of all tokens.
Tensor row_product(const std::vector<Tensor>& layers_in, const std::optional<Tensor>& rows_in,
                   const std::string& head_fusion, double residual, bool normalize) {
  const size_t least = rows_in ? 1 : 2;
  TORCH_CHECK_VALUE(layers_in.size() >= least, "layers: expected at least ", least, ", got ", layers_in.size());
  std::vector<Tensor> layers;
  for (const Tensor& layer : layers_in) {
    check_square_4d(layer, "attention");
    TORCH_CHECK_VALUE(layer.size(0) == layers_in[0].size(0) && layer.size(2) == layers_in[0].size(2),
                      "layers: expected one batch size and one number of tokens, got ", layer.sizes());
    if (rows_in) check_rows(*rows_in, layer.size(0), layer.size(2), layer);
    TORCH_CHECK(has_row_product(layer), "row_product: no matrix unit for this device and dtype");
    layers.push_back(with_unit_columns(layer));
  }
  const Tensor& first = layers[0];
  const int64_t batch = first.size(0), tokens = first.size(2);
  const Tensor rows = rows_in ? rows_for(*rows_in, first) : Tensor();
  const Tensor out = at::empty({batch, rows_in ? rows.size(1) : tokens, tokens}, first.options().dtype(at::kFloat));
  RowProduct p{};
  p.n_rows = out.size(1), p.tokens = tokens;
  p.residual = residual, p.normalize = normalize, p.fusion = fusion_of(head_fusion);
  if (out.numel() > 0) {
    const pybind11::gil_scoped_release release;
    multiply_batch(p, layers, rows_in ? rows.const_data_ptr<float>() : nullptr, out.mutable_data_ptr<float>(), batch);
  }
  return rows_in ? in_dtype(out, rows_in->scalar_type()) : out;
}

Tensor fuse_heads(const Tensor& attention_in, const std::string& head_fusion, double residual, bool normalize, bool wide) {
  check_square_4d(attention_in, "attention");
  const c10::DeviceGuard guard(attention_in.device());
  const Tensor attention = with_unit_columns(attention_in);
  const int64_t batch = attention.size(0), heads = attention.size(1), tokens = attention.size(2);
  const Tensor out = at::empty({batch, tokens, tokens},
                               attention.options().dtype(wide ? accumulate_type(attention) : attention.scalar_type()));
  const FuseHeads p{view_of(attention),     out.mutable_data_ptr(), batch, heads, tokens, residual, normalize, wide,
                    fusion_of(head_fusion), dtype_of(attention)};
  if (out.numel() == 0) return out;
  if (on_gpu(attention)) {
    check_launch(launch_fuse_heads(p, current_stream(attention)));
  } else {
    const pybind11::gil_scoped_release release;
    parallel(batch * tokens, double(attention.numel()), [&](int64_t i, int64_t j) { fuse_heads_cpu(p, i, j); });
  }
  return out;
}

// ---- streamed from q and k -------------------------------------------------------------------------------------------

// 1 / the row sum of w I + fuse_h P for mean and sum without a mask, where every head adds 1; 0 for an empty row.
double inverse_row_sum(Fusion fusion, int64_t heads, double residual) {
  const double total = residual + (fusion == Fusion::mean ? 1.0 : double(heads));
  return total == 0 ? 0.0 : 1.0 / total;
}

// The same per query (B,1,N) under a mask: a head adds nothing where all keys of the query are masked.
Tensor inverse_row_sums(const Tensor& query, const Tensor& mask, bool causal, Fusion fusion, double residual) {
  const int64_t batch = query.size(0), heads = query.size(1), tokens = query.size(2);
  const Tensor keep = mask.scalar_type() == at::kBool ? mask : mask.gt(double(kRemovedBelow));
  Tensor any;
  if (!causal) {
    any = keep.any(-1);
  } else if (keep.size(2) == 1) {  // the same keys for every query: is one of those up to i kept?
    any = keep.squeeze(2).expand({-1, -1, tokens}).to(at::kInt).cumsum(-1).gt(0);
  } else {
    any = keep.expand({-1, -1, tokens, tokens}).tril().any(-1);
  }
  const double per_head = fusion == Fusion::mean ? 1.0 / double(heads) : 1.0;
  const Tensor heads_left = any.expand({batch, heads, tokens}).to(accumulate_type(query)).sum(1, /*keepdim=*/true);
  const Tensor total = heads_left.mul(per_head).add(residual);
  return total.reciprocal().masked_fill(total.eq(0), 0);
}

// Allocates the workspace and runs the step on the device of `query`.
void run_streamed(StreamedRowStep& p, const Tensor& query) {
  const bool gpu = on_gpu(query);
  const StreamPlan plan = gpu ? StreamPlan{} : streamed_plan_cpu(p);
  const int64_t bytes = gpu ? streamed_workspace_cuda(p) : plan.workspace_bytes;
  const Workspace workspace(bytes, query);
  p.workspace = workspace.data();
  if (gpu) return check_launch(launch_streamed_row_step(p, current_stream(query)));
  const pybind11::gil_scoped_release release;
  const double work = double(p.batch) * double(p.heads) * double(p.tokens) * double(p.tokens) * double(p.dim);
  streamed_prepare_cpu(p);
  for (int64_t group = 0; group < plan.groups; ++group) {
    parallel(plan.pack_items, work, [&](int64_t i, int64_t j) { streamed_pack_cpu(p, group, i, j); });
    parallel(plan.step_items, work, [&](int64_t i, int64_t j) { streamed_step_cpu(p, group, i, j); });
  }
  parallel(plan.reduce_items, double(bytes), [&](int64_t i, int64_t j) { streamed_reduce_cpu(p, i, j); });
}

Tensor rollout_rows_qk(const Tensor& query_in, const Tensor& key_in, const Tensor& rows_in,
                       const std::optional<Tensor>& mask_in, const std::optional<Tensor>& lse_in,
                       std::optional<double> scale, bool is_causal, const std::string& head_fusion, double residual,
                       bool normalize) {
  check_scores(query_in, key_in, mask_in, lse_in);
  TORCH_CHECK_VALUE(query_in.size(2) == key_in.size(2), "key: expected as many keys as queries");
  const int64_t batch = query_in.size(0), heads = query_in.size(1), tokens = query_in.size(2);
  check_rows(rows_in, batch, tokens, query_in);
  const c10::DeviceGuard guard(query_in.device());
  const Tensor query = with_unit_columns(query_in), key = with_unit_columns(key_in);
  const Fusion fusion = fusion_of(head_fusion);
  const bool summed = fusion == Fusion::mean || fusion == Fusion::sum;
  Tensor rows = rows_for(rows_in, query), mask;
  if (summed && normalize && mask_in) rows = rows.mul(inverse_row_sums(query, *mask_in, is_causal, fusion, residual));

  StreamedRowStep p{};
  fill_scores(p, query, key, mask_in, mask, scale, is_causal);
  const Tensor lse = lse_in ? lse_in->to(rows.scalar_type()).contiguous() : Tensor();
  const Tensor out = at::empty({batch, rows.size(1), tokens}, rows.options());
  p.lse = lse.defined() ? lse.const_data_ptr() : nullptr;
  p.rows = rows.const_data_ptr();
  p.out = out.mutable_data_ptr();
  p.n_rows = rows.size(1);
  p.residual = residual;
  p.rows_factor = summed && normalize && !mask_in ? inverse_row_sum(fusion, heads, residual) : 1.0;
  p.normalize = normalize && !summed;  // done above for the others
  p.fusion = fusion;
  if (out.numel() > 0) run_streamed(p, query);
  return in_dtype(out, rows_in.scalar_type());
}

}  // namespace

void bind_rollout(pybind11::module_& m) {
  bind_op(m, "rollout_rows", &rollout_rows);
  m.def("has_row_product", &has_row_product);
  bind_op(m, "row_product", &row_product);
  bind_op(m, "fuse_heads", &fuse_heads);
  bind_op(m, "rollout_rows_qk", &rollout_rows_qk);
}

}  // namespace xai
