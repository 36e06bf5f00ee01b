// Bindings of the relevance family.
#include "relevance.h"

#include <ATen/ops/cat.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/zeros_like.h>

#include <tuple>

#include "common.h"
#include "workspace.h"

namespace xai {
namespace {

using OptionalTensor = std::optional<Tensor>;

void check_same(const Tensor& x, const Tensor& like, const char* name) {
  TORCH_CHECK_VALUE(x.scalar_type() == like.scalar_type() && x.device() == like.device(), name, ": expected ",
                    like.scalar_type(), " on ", like.device(), ", got ", x.scalar_type(), " on ", x.device());
}

void check_shape(const Tensor& x, at::IntArrayRef shape, const Tensor& like, const char* name) {
  check_same(x, like, name);
  TORCH_CHECK_VALUE(x.sizes() == shape, name, ": expected shape ", shape, ", got ", x.sizes());
}

// (B,Hkv,N,D) with Hkv a divisor of `heads`.
void check_value(const Tensor& value, int64_t batch, int64_t heads, int64_t keys, const Tensor& like) {
  check_same(value, like, "value");
  TORCH_CHECK_VALUE(value.dim() == 4 && value.size(0) == batch && value.size(1) > 0 && heads % value.size(1) == 0 &&
                        value.size(2) == keys && value.size(3) > 0,
                    "value: expected shape (B, Hkv, N, D) with Hkv a divisor of ", heads, ", got ", value.sizes());
}

// Rows of the last dimension.
int64_t rows_of(const Tensor& x) { return x.numel() / x.size(-1); }

const void* pointer_or_null(const Tensor& x) { return x.defined() ? x.const_data_ptr() : nullptr; }

Tensor contiguous_or_none(const OptionalTensor& x) { return x ? x->contiguous() : Tensor(); }

// Elementwise and row kernels: the launcher on a GPU, else the items over the threads.
template <class P>
void run_items(const P& p, const Tensor& like, int64_t items, void (*cpu)(const P&, int64_t, int64_t),
               const char* (*launch)(const P&, void*)) {
  if (items == 0) return;
  if (on_gpu(like)) return check_launch(launch(p, current_stream(like)));
  const pybind11::gil_scoped_release release;
  parallel(items, double(like.numel()), [&](int64_t i, int64_t j) { cpu(p, i, j); });
}

// ---- products ----------------------------------------------------------------------------------------------------------

template <class P>
void run_plan(P& p, const WorkPlan& plan, double work, void (*cpu)(const P&, int64_t, int64_t),
              void (*reduce)(const P&, int64_t, int64_t)) {
  const pybind11::gil_scoped_release release;
  parallel(plan.items, work, [&](int64_t i, int64_t j) { cpu(p, i, j); });
  parallel(plan.reduce_items, double(plan.workspace_bytes), [&](int64_t i, int64_t j) { reduce(p, i, j); });
}

std::tuple<Tensor, Tensor> av_relevance(const Tensor& attention_in, const Tensor& value_in, const Tensor& relevance_in,
                                        double lam, double eps) {
  TORCH_CHECK_VALUE(
      attention_in.dim() == 4 && attention_in.size(1) > 0 && attention_in.size(2) > 0 && attention_in.size(3) > 0,
      "attention: expected shape (B, H, Nq, Nk), got ", attention_in.sizes());
  const int64_t batch = attention_in.size(0), heads = attention_in.size(1);
  const int64_t queries = attention_in.size(2), keys = attention_in.size(3);
  check_value(value_in, batch, heads, keys, attention_in);
  check_shape(relevance_in, {batch, heads, queries, value_in.size(3)}, attention_in, "relevance");
  const c10::DeviceGuard guard(attention_in.device());
  const Tensor attention = with_unit_columns(attention_in), value = with_unit_columns(value_in);
  const Tensor relevance = with_unit_columns(relevance_in);
  const Tensor attention_out = at::empty(attention.sizes(), attention.options());
  const Tensor value_out = at::empty(value.sizes(), value.options());
  AvRelevance p{view_of(attention),
                view_of(value),
                view_of(relevance),
                attention_out.mutable_data_ptr(),
                value_out.mutable_data_ptr(),
                nullptr,
                batch,
                heads,
                value.size(1),
                queries,
                keys,
                value.size(3),
                lam,
                eps,
                dtype_of(attention)};
  if (batch == 0) return {attention_out, value_out};
  const bool gpu = on_gpu(attention);
  const WorkPlan plan = gpu ? WorkPlan{} : av_plan_cpu(p);
  const Workspace workspace(gpu ? av_workspace_cuda(p) : plan.workspace_bytes, attention);
  p.workspace = workspace.data();
  if (gpu)
    check_launch(launch_av_relevance(p, current_stream(attention)));
  else
    run_plan(p, plan, double(attention.numel()) * double(p.dim), av_relevance_cpu, av_reduce_cpu);
  return {attention_out, value_out};
}

// In gradient form with lam = 0 the first two results have no elements; in relevance form they are zeros.
Tensor score_result(const Tensor& like, double lam, bool gradient_form) {
  if (lam != 0) return at::empty(like.sizes(), like.options());
  return gradient_form ? at::empty({0}, like.options()) : at::zeros_like(like, {}, {}, {}, {}, at::MemoryFormat::Contiguous);
}

std::tuple<Tensor, Tensor, Tensor> attention_relevance(const Tensor& query_in, const Tensor& key_in, const Tensor& value_in,
                                                       const Tensor& upstream_in, const OptionalTensor& output_in,
                                                       const OptionalTensor& mask_in, std::optional<double> scale,
                                                       bool is_causal, double lam, double eps, bool gradient_form,
                                                       const OptionalTensor& lse_in) {
  check_scores(query_in, key_in, mask_in, lse_in);
  check_value(value_in, query_in.size(0), key_in.size(1), key_in.size(2), query_in);
  const auto shape = {query_in.size(0), query_in.size(1), query_in.size(2), value_in.size(3)};
  check_shape(upstream_in, shape, query_in, "relevance");
  if (output_in) check_shape(*output_in, shape, query_in, "output");
  const c10::DeviceGuard guard(query_in.device());
  const Tensor query = with_unit_columns(query_in), key = with_unit_columns(key_in), value = with_unit_columns(value_in);
  const Tensor upstream = with_unit_columns(upstream_in), output = output_in ? with_unit_columns(*output_in) : Tensor();
  const Tensor query_out = score_result(query, lam, gradient_form), key_out = score_result(key, lam, gradient_form);
  const Tensor value_out = at::empty(value.sizes(), value.options());
  AttentionRelevance p{};
  Tensor mask;
  fill_scores(p, query, key, mask_in, mask, scale, is_causal);
  p.value = view_of(value);
  p.upstream = view_of(upstream);
  if (output_in) p.output = view_of(output);
  const Tensor lse = lse_in ? in_dtype(*lse_in, accumulate_type(query)).contiguous() : Tensor();
  p.lse = pointer_or_null(lse);
  p.query_out = lam == 0 ? nullptr : query_out.mutable_data_ptr();
  p.key_out = lam == 0 ? nullptr : key_out.mutable_data_ptr();
  p.value_out = value_out.mutable_data_ptr();
  p.value_dim = value.size(3);
  p.lam = lam;
  p.eps = eps;
  p.gradient_form = gradient_form;
  if (p.batch == 0) return {query_out, key_out, value_out};
  const bool gpu = on_gpu(query);
  const WorkPlan plan = gpu ? WorkPlan{} : attention_plan_cpu(p);
  const Workspace workspace(gpu ? attention_workspace_cuda(p) : plan.workspace_bytes, query);
  p.workspace = workspace.data();
  if (gpu)
    check_launch(launch_attention_relevance(p, current_stream(query)));
  else
    run_plan(p, plan, double(query.numel()) * double(p.keys), attention_relevance_cpu, attention_reduce_cpu);
  return {query_out, key_out, value_out};
}

void run_targeted(TargetedRows& p, const Tensor& query) {
  const bool gpu = on_gpu(query);
  const WorkPlan plan = gpu ? WorkPlan{} : targeted_plan_cpu(p);
  const Workspace workspace(gpu ? targeted_workspace_cuda(p) : plan.workspace_bytes, query);
  p.workspace = workspace.data();
  if (gpu) return check_launch(launch_targeted_rows(p, current_stream(query)));
  const double work = double(query.numel()) * double(p.keys);
  if (p.normalize) {
    const pybind11::gil_scoped_release release;
    parallel(plan.items, work, [&](int64_t i, int64_t j) { targeted_sums_cpu(p, i, j); });
    parallel(p.batch, double(p.batch * p.heads * p.tokens), [&](int64_t i, int64_t j) { targeted_factors_cpu(p, i, j); });
  }
  run_plan(p, plan, work, targeted_rows_cpu, targeted_reduce_cpu);
}

Tensor targeted_rows(const Tensor& query_in, const Tensor& key_in, const Tensor& value_in, const Tensor& grad_in,
                     const Tensor& rows_in, const OptionalTensor& mask_in, const OptionalTensor& lse_in,
                     const OptionalTensor& relevance_in, const OptionalTensor& output_in, std::optional<double> scale,
                     bool is_causal, const std::string& head_fusion, bool clamp, double residual, bool normalize, double lam,
                     double eps) {
  check_scores(query_in, key_in, mask_in, lse_in);
  const int64_t batch = query_in.size(0), heads = query_in.size(1), tokens = query_in.size(2);
  TORCH_CHECK_VALUE(tokens == key_in.size(2), "key: expected as many keys as queries");
  check_value(value_in, batch, key_in.size(1), tokens, query_in);
  check_rows(rows_in, batch, tokens, query_in);
  const auto shape = {batch, heads, tokens, value_in.size(3)};
  check_shape(grad_in, shape, query_in, "grad_out");
  if (relevance_in) check_shape(*relevance_in, shape, query_in, "relevance_out");
  if (output_in) check_shape(*output_in, shape, query_in, "output");
  const c10::DeviceGuard guard(query_in.device());
  const Tensor query = with_unit_columns(query_in), key = with_unit_columns(key_in), value = with_unit_columns(value_in);
  const Tensor grad = with_unit_columns(grad_in), rows = rows_for(rows_in, query);
  const Tensor relevance = relevance_in ? with_unit_columns(*relevance_in) : Tensor();
  const Tensor output = output_in ? with_unit_columns(*output_in) : Tensor();
  const Tensor lse = lse_in ? lse_in->to(rows.scalar_type()).contiguous() : Tensor();
  const Tensor out = at::empty({batch, rows.size(1), tokens}, rows.options());
  TargetedRows p{};
  Tensor mask;
  fill_scores(p, query, key, mask_in, mask, scale, is_causal);
  p.lse = pointer_or_null(lse);
  p.value = view_of(value);
  p.grad_out = view_of(grad);
  if (relevance_in) p.relevance = view_of(relevance);
  if (output_in) p.output = view_of(output);
  p.rows = rows.const_data_ptr();
  p.out = out.mutable_data_ptr();
  p.value_dim = value.size(3);
  p.n_rows = rows.size(1);
  p.residual = residual;
  p.lam = lam;
  p.eps = eps;
  p.clamp = clamp;
  p.normalize = normalize;
  p.fusion = fusion_of(head_fusion);
  TORCH_CHECK_VALUE(p.fusion == Fusion::mean || p.fusion == Fusion::sum, "head_fusion: expected 'mean' or 'sum'");
  if (out.numel() > 0) run_targeted(p, query);
  return in_dtype(out, rows_in.scalar_type());
}

// ---- rows and elements -------------------------------------------------------------------------------------------------

Tensor softmax_relevance(const Tensor& logits_in, const Tensor& probs_in, const Tensor& relevance_in) {
  check_shape(probs_in, logits_in.sizes(), logits_in, "probs");
  check_shape(relevance_in, logits_in.sizes(), logits_in, "relevance");
  const c10::DeviceGuard guard(logits_in.device());
  const Tensor logits = logits_in.contiguous(), probs = probs_in.contiguous(), relevance = relevance_in.contiguous();
  const Tensor out = at::empty(logits.sizes(), logits.options());
  if (out.numel() == 0) return out;
  const SoftmaxRelevance p{logits.const_data_ptr(), probs.const_data_ptr(), relevance.const_data_ptr(),
                           out.mutable_data_ptr(),  rows_of(logits),        logits.size(-1),
                           dtype_of(logits)};
  run_items(p, logits, p.rows, softmax_relevance_cpu, launch_softmax_relevance);
  return out;
}

std::tuple<Tensor, Tensor> skip_relevance(const Tensor& x_in, const Tensor& y_in, const Tensor& relevance_in,
                                          const std::string& rule, double eps) {
  check_shape(y_in, x_in.sizes(), x_in, "y");
  check_shape(relevance_in, x_in.sizes(), x_in, "relevance");
  const c10::DeviceGuard guard(x_in.device());
  const Tensor x = x_in.contiguous(), y = y_in.contiguous(), relevance = relevance_in.contiguous();
  const Tensor out_x = at::empty(x.sizes(), x.options()), out_y = at::empty(x.sizes(), x.options());
  if (x.numel() == 0) return {out_x, out_y};
  const bool ratio = rule == "ratio";
  const int64_t batch = ratio && x.dim() > 0 ? x.size(0) : 1, elements = x.numel() / batch;
  const int64_t items = batch * skip_chunks(elements);
  const Tensor sums = ratio ? at::empty({items, 3}, x.options().dtype(at::kDouble)) : Tensor();
  const SkipRelevance p{x.const_data_ptr(),
                        y.const_data_ptr(),
                        relevance.const_data_ptr(),
                        out_x.mutable_data_ptr(),
                        out_y.mutable_data_ptr(),
                        ratio ? sums.mutable_data_ptr() : nullptr,
                        batch,
                        elements,
                        eps,
                        ratio,
                        dtype_of(x)};
  if (ratio && !on_gpu(x)) run_items(p, x, items, skip_sums_cpu, launch_skip_relevance);
  run_items(p, x, items, skip_relevance_cpu, launch_skip_relevance);
  return {out_x, out_y};
}

Tensor norm_relevance(const Tensor& x_in, const OptionalTensor& weight_in, const OptionalTensor& bias_in,
                      const Tensor& upstream_in, double norm_eps, double eps, bool rms, bool detach_mean,
                      bool gradient_form) {
  TORCH_CHECK_VALUE(x_in.dim() > 0, "x: expected at least one dimension");
  check_shape(upstream_in, x_in.sizes(), x_in, "upstream");
  if (weight_in) check_shape(*weight_in, {x_in.size(-1)}, x_in, "weight");
  if (bias_in) check_shape(*bias_in, {x_in.size(-1)}, x_in, "bias");
  const c10::DeviceGuard guard(x_in.device());
  const Tensor x = x_in.contiguous(), upstream = upstream_in.contiguous();
  const Tensor weight = contiguous_or_none(weight_in), bias = contiguous_or_none(bias_in);
  const Tensor out = at::empty(x.sizes(), x.options());
  if (out.numel() == 0) return out;
  const NormRelevance p{x.const_data_ptr(),
                        upstream.const_data_ptr(),
                        pointer_or_null(weight),
                        pointer_or_null(bias),
                        out.mutable_data_ptr(),
                        rows_of(x),
                        x.size(-1),
                        norm_eps,
                        eps,
                        rms,
                        detach_mean,
                        gradient_form,
                        dtype_of(x)};
  run_items(p, x, p.rows, norm_relevance_cpu, launch_norm_relevance);
  return out;
}

Tensor gradient_factor(const Tensor& grad_in, const Tensor& x_in, const Tensor& y_in, double parameter, GradientRule rule) {
  check_shape(x_in, grad_in.sizes(), grad_in, "x");
  check_shape(y_in, grad_in.sizes(), grad_in, "y");
  const c10::DeviceGuard guard(grad_in.device());
  const Tensor grad = grad_in.contiguous(), x = x_in.contiguous(), y = y_in.contiguous();
  const Tensor out = at::empty(grad.sizes(), grad.options());
  const GradientFactor p{
      grad.const_data_ptr(), x.const_data_ptr(), y.const_data_ptr(), out.mutable_data_ptr(), grad.numel(), parameter, rule,
      dtype_of(grad)};
  run_items(p, grad, p.elements, gradient_factor_cpu, launch_gradient_factor);
  return out;
}

Tensor stabilized_gradient(const Tensor& grad, const Tensor& y, double eps) {
  return gradient_factor(grad, y, y, eps, GradientRule::stabilized);
}

Tensor identity_gradient(const Tensor& grad, const Tensor& x, const Tensor& y, double at_zero) {
  return gradient_factor(grad, x, y, at_zero, GradientRule::identity);
}

// ---- linear layers -----------------------------------------------------------------------------------------------------

// The operands of one linear layer as matrices: x (rows,K) and R (rows,O) as given, the weight (O,K) in the accumulate type.
struct LinearOperands {
  Tensor x, weight, bias, relevance;

  int64_t rows() const { return x.size(0); }
  Tensor wide_x() const { return in_dtype(x, weight.scalar_type()); }
  Tensor empty(int64_t columns) const { return at::empty({rows(), columns}, weight.options()); }
};

// [x+, x-] (rows, 2K)
Tensor split_signs(const Tensor& x) {
  const Tensor out = at::empty({x.size(0), 2 * x.size(1)}, x.options().dtype(accumulate_type(x)));
  const SignSplit p{x.const_data_ptr(), out.mutable_data_ptr(), x.size(0), x.size(1), dtype_of(x)};
  run_items(p, x, p.rows, sign_split_cpu, launch_sign_split);
  return out;
}

// x o plain + x+ o by_sign[:, :K] + x- o by_sign[:, K:]
Tensor combine(const Tensor& x, const Tensor& plain, const Tensor& by_sign) {
  const Tensor out = at::empty(x.sizes(), x.options());
  const LinearReturn p{
      x.const_data_ptr(), pointer_or_null(plain), pointer_or_null(by_sign), out.mutable_data_ptr(), x.size(0), x.size(1),
      dtype_of(x)};
  run_items(p, x, p.rows, linear_return_cpu, launch_linear_return);
  return out;
}

LinearShare share_of(const LinearOperands& at_, LinearRule rule, double eps, double gamma, double alpha, double beta) {
  LinearShare p{};
  p.bias = pointer_or_null(at_.bias);
  p.relevance = at_.relevance.const_data_ptr();
  p.rows = at_.rows();
  p.columns = at_.weight.size(0);
  p.stride = p.columns;
  p.eps = eps;
  p.gamma = gamma;
  p.alpha = alpha;
  p.beta = beta;
  p.rule = rule;
  p.dtype = dtype_of(at_.x);
  return p;
}

void run_share(const LinearShare& p, const LinearOperands& at_) {
  run_items(p, at_.relevance, p.rows, linear_share_cpu, launch_linear_share);
}

Tensor linear_epsilon(const LinearOperands& at_, double eps) {
  LinearShare p = share_of(at_, LinearRule::epsilon, eps, 0, 0, 0);
  const Tensor z = at_.wide_x().matmul(at_.weight.t()), share = at_.empty(p.columns);
  p.z = z.const_data_ptr();
  p.share = share.mutable_data_ptr();
  run_share(p, at_);
  return combine(at_.x, share.matmul(at_.weight), Tensor());
}

Tensor linear_zplus(const LinearOperands& at_, double eps) {
  LinearShare p = share_of(at_, LinearRule::zplus, eps, 0, 0, 0);
  const Tensor by_sign = at::cat({at_.weight.clamp_min(0), at_.weight.clamp_max(0)}, 1);  // (O, 2K)
  const Tensor up = split_signs(at_.x).matmul(by_sign.t()), share = at_.empty(p.columns);
  p.up = up.const_data_ptr();
  p.share = share.mutable_data_ptr();
  run_share(p, at_);
  return combine(at_.x, Tensor(), share.matmul(by_sign));
}

// Rules with sums of both signs. Their weights by sign: [[W+, W-], [W-, W+]], so that [x+, x-] times the transpose is
// [up, down] and [share_up, share_down] times it is what x+ and x- are multiplied by.
struct BothSigns {
  Tensor up, down, weights, shares;

  explicit BothSigns(const LinearOperands& at_) {
    const Tensor above = at_.weight.clamp_min(0), below = at_.weight.clamp_max(0), split = split_signs(at_.x);
    const Tensor first = at::cat({above, below}, 1), second = at::cat({below, above}, 1);
    up = split.matmul(first.t());
    down = split.matmul(second.t());
    weights = at::cat({first, second}, 0);
    shares = at_.empty(2 * at_.weight.size(0));
  }

  void attach(LinearShare& p) const {
    p.up = up.const_data_ptr();
    p.down = down.const_data_ptr();
    p.stride = 2 * p.columns;
  }
  void* share(int64_t half) const {
    return static_cast<char*>(shares.mutable_data_ptr()) + half * shares.size(1) / 2 * shares.element_size();
  }
};

Tensor linear_alpha_beta(const LinearOperands& at_, double eps, double alpha, double beta) {
  LinearShare p = share_of(at_, LinearRule::alphabeta, eps, 0, alpha, beta);
  const BothSigns signs(at_);
  signs.attach(p);
  p.share = signs.share(0);
  p.share_down = signs.share(1);
  run_share(p, at_);
  return combine(at_.x, Tensor(), signs.shares.matmul(signs.weights));
}

Tensor linear_gamma(const LinearOperands& at_, double eps, double gamma) {
  LinearShare p = share_of(at_, LinearRule::gamma, eps, gamma, 0, 0);
  const BothSigns signs(at_);
  const Tensor z = at_.wide_x().matmul(at_.weight.t()), share = at_.empty(2 * p.columns);
  signs.attach(p);
  p.z = z.const_data_ptr();
  p.share = share.mutable_data_ptr();
  p.share_up = signs.share(0);
  p.share_down = signs.share(1);
  run_share(p, at_);
  const Tensor plain = share.slice(1, 0, p.columns).matmul(at_.weight);
  return combine(at_.x, plain, signs.shares.matmul(signs.weights));
}

// Returns nothing defined for the rules that need no kernel between their products.
Tensor linear_relevance(const Tensor& x_in, const Tensor& weight_in, const OptionalTensor& bias_in,
                        const Tensor& relevance_in, const std::string& rule, double eps, double gamma, double alpha,
                        double beta) {
  TORCH_CHECK_VALUE(weight_in.dim() == 2 && x_in.dim() > 0 && x_in.size(-1) == weight_in.size(1) && weight_in.numel() > 0,
                    "x, weight: expected (..., K) and (O, K), got ", x_in.sizes(), " and ", weight_in.sizes());
  check_same(weight_in, x_in, "weight");
  check_same(relevance_in, x_in, "relevance");
  const int64_t inputs = weight_in.size(1), outputs = weight_in.size(0);
  TORCH_CHECK_VALUE(relevance_in.numel() == x_in.numel() / inputs * outputs, "relevance: expected shape (..., O)");
  if (bias_in) check_shape(*bias_in, {outputs}, x_in, "bias");
  const c10::DeviceGuard guard(x_in.device());
  const LinearOperands at_{x_in.reshape({-1, inputs}).contiguous(), in_dtype(weight_in, accumulate_type(x_in)),
                           contiguous_or_none(bias_in), relevance_in.reshape({-1, outputs}).contiguous()};
  Tensor out;
  if (rule == "epsilon")
    out = linear_epsilon(at_, eps);
  else if (rule == "zplus")
    out = linear_zplus(at_, eps);
  else if (rule == "alphabeta")
    out = linear_alpha_beta(at_, eps, alpha, beta);
  else if (rule == "gamma")
    out = linear_gamma(at_, eps, gamma);
  else
    TORCH_CHECK_VALUE(false, "rule: expected epsilon, zplus, alphabeta or gamma, got ", rule);
  return out.reshape(x_in.sizes());
}

}  // namespace

void bind_relevance(pybind11::module_& m) {
  bind_op(m, "av_relevance", &av_relevance);
  using pybind11::arg;
  bind_op(m, "attention_relevance", &attention_relevance, arg("query"), arg("key"), arg("value"), arg("upstream"),
          arg("output"), arg("attn_mask"), arg("scale"), arg("is_causal"), arg("lam"), arg("eps"), arg("gradient_form"),
          arg("lse") = pybind11::none());
  bind_op(m, "targeted_rows", &targeted_rows);
  bind_op(m, "softmax_relevance", &softmax_relevance);
  bind_op(m, "skip_relevance", &skip_relevance);
  bind_op(m, "norm_relevance", &norm_relevance);
  bind_op(m, "stabilized_gradient", &stabilized_gradient);
  bind_op(m, "identity_gradient", &identity_gradient);
  bind_op(m, "linear_relevance", &linear_relevance);
}

}  // namespace xai
