// Bindings of the ihvp family. Python sees vectors as (M,P,C); the kernels as (M C, P): see ihvp.h.
#include "ihvp.h"

#include <ATen/ops/addmm.h>
#include <ATen/ops/full.h>
#include <ATen/ops/zeros.h>

#include <tuple>

#include "common.h"
#include "workspace.h"

namespace xai {
namespace {

using OptionalTensor = std::optional<Tensor>;

// CUDA: up to this many columns one fused pass over X beats two matrix products a chunk of rows. On the CPU the pass is
// always taken: MKL's products round differently with the number of threads.
constexpr int64_t kFusedColumnsCuda = 16;
constexpr int64_t kChunkBytes = 32 << 20;  // of the outputs Z of a chunk

Family family_of(const std::string& name) {
  if (name == "linear") return Family::linear;
  if (name == "logistic") return Family::logistic;
  if (name == "poisson") return Family::poisson;
  if (name == "smooth_hinge") return Family::smooth_hinge;
  if (name == "softmax") return Family::softmax;
  TORCH_CHECK_VALUE(false, "family: expected linear, logistic, poisson, smooth_hinge or softmax, got ", name);
}

const void* data_or_null(const OptionalTensor& x) { return x ? x->const_data_ptr() : nullptr; }

void check_optional(const OptionalTensor& x, at::IntArrayRef shape, at::ScalarType dtype, const Tensor& like,
                    const char* name) {
  if (x) check_tensor(*x, shape, dtype, like, name);
}

void check_design(const Tensor& X, const Tensor& vectors, bool intercept, const char* name) {
  TORCH_CHECK_VALUE(X.dim() == 2 && X.numel() > 0, "X: expected shape (n, D), got ", X.sizes());
  TORCH_CHECK_VALUE(vectors.dim() == 3 && vectors.numel() > 0 && vectors.size(1) == X.size(1) + intercept, name,
                    ": expected shape (M, ", X.size(1) + intercept, ", C), got ", vectors.sizes());
  TORCH_CHECK_TYPE(vectors.scalar_type() == at::kDouble || vectors.scalar_type() == at::kFloat, name,
                   ": expected float32 or float64, got ", vectors.scalar_type());
  TORCH_CHECK_TYPE(X.scalar_type() != at::kDouble || vectors.scalar_type() == at::kDouble, name,
                   ": expected float64 for X of float64");
  TORCH_CHECK_VALUE(vectors.device() == X.device(), name, ": expected device ", X.device(), ", got ", vectors.device());
}

void check_indices(const OptionalTensor& index, const Tensor& X, const char* name) {
  if (!index) return;
  check_tensor(*index, {index->numel()}, at::kLong, X, name);
  check_places(*index, X.size(0), name);
}

// The kernels read a row as one run.
Tensor with_unit_rows(const Tensor& X) { return X.size(1) == 1 || X.stride(1) == 1 ? X : X.contiguous(); }

Tensor columns_of(const Tensor& vectors) { return vectors.transpose(1, 2).contiguous(); }  // (M,P,C) -> (M,C,P)
Tensor vectors_of(const Tensor& columns) { return columns.transpose(1, 2).contiguous(); }

OptionalTensor contiguous(const OptionalTensor& x) { return x ? OptionalTensor(x->contiguous()) : x; }

void fill_rows(GlmRows& p, const Tensor& X, const OptionalTensor& index, const OptionalTensor& sample_weight,
               int64_t classes, bool intercept, at::ScalarType accumulate) {
  p.x = X.const_data_ptr();
  p.index = index ? index->const_data_ptr<int64_t>() : nullptr;
  p.sample_weight = data_or_null(sample_weight);
  p.row_stride = X.size(0) == 1 ? X.size(1) : X.stride(0);
  p.rows = index ? index->numel() : X.size(0);
  p.dim = X.size(1);
  p.classes = classes;
  p.intercept = intercept;
  p.dtype = dtype_of(X);
  p.accumulate = accumulate == at::kDouble ? Dtype::f64 : Dtype::f32;
}

// ---- Hessian-vector product ---------------------------------------------------------------------------------------------

// What a product needs besides the vectors, with its memory.
struct GlmOperands {
  Tensor X, theta;  // theta: (C,P), undefined if weights are given
  OptionalTensor weights, target, sample_weight, index;
  Family family;
  bool intercept;
  double smoothing, l2, damping;

  void fill(GlmRows& rows, GlmCurvature& curvature, int64_t classes, at::ScalarType accumulate) const {
    fill_rows(rows, X, index, sample_weight, classes, intercept, accumulate);
    curvature.weights = data_or_null(weights);
    curvature.theta = theta.defined() ? theta.const_data_ptr() : nullptr;
    curvature.target = data_or_null(target);
    curvature.smoothing = smoothing;
    curvature.family = family;
  }
};

// One pass over X.
Tensor fused_hvp(const GlmOperands& given, const Tensor& columns) {
  GlmHvp p{};
  const int64_t classes = columns.size(1), params = columns.size(2);
  given.fill(p, p, classes, columns.scalar_type());
  p.columns = columns.size(0) * classes;
  const bool gpu = on_gpu(given.X);
  p.slots = gpu ? glm_slots_cuda(p.rows, p.columns, params) : glm_slots_cpu(p.rows, p.columns, params);
  const Tensor partial = at::empty({p.slots, p.columns, params}, columns.options()),
               out = at::empty(columns.sizes(), columns.options());
  p.vectors = columns.const_data_ptr();
  p.partial = partial.mutable_data_ptr();
  p.out = out.mutable_data_ptr();
  p.l2 = given.l2;
  p.damping = given.damping;
  if (gpu) {
    check_launch(launch_glm_hvp(p, current_stream(given.X)));
    return out;
  }
  const pybind11::gil_scoped_release release;
  const double work = 4.0 * double(p.rows) * double(params) * double(p.columns);
  parallel(p.slots, work, [&](int64_t i, int64_t j) { glm_hvp_cpu(p, i, j); });
  parallel(p.columns, double(partial.numel()), [&](int64_t i, int64_t j) { glm_hvp_reduce_cpu(p, i, j); });
  return out;
}

// X [V; bias] for the matrix V (P,K).
Tensor affine(const Tensor& X, const Tensor& matrix, bool intercept) {
  if (!intercept) return X.matmul(matrix);
  return at::addmm(matrix.slice(0, X.size(1)), X, matrix.slice(0, 0, X.size(1)));
}

void run_curve(const GlmCurve& p, const Tensor& z) {
  if (on_gpu(z)) return check_launch(launch_glm_curve(p, current_stream(z)));
  const pybind11::gil_scoped_release release;
  parallel(p.count, double(z.numel()), [&](int64_t i, int64_t j) { glm_curve_cpu(p, i, j); });
}

// Two matrix products a chunk of rows, with the curvature between them.
Tensor product_hvp(const GlmOperands& given, const Tensor& columns) {
  const int64_t classes = columns.size(1), params = columns.size(2), all = columns.size(0) * classes;
  const Tensor matrix = columns.view({all, params}).t(), total = at::zeros({params, all}, columns.options());
  GlmCurve p{};
  given.fill(p, p, classes, columns.scalar_type());
  p.columns = all;
  const int64_t dim = given.X.size(1);
  const bool copies = given.index || given.X.scalar_type() != columns.scalar_type();
  const int64_t made = (copies ? std::max(all, dim) : all) * int64_t(columns.element_size());  // bytes a row
  const int64_t chunk = std::max<int64_t>(256, kChunkBytes / made);
  for (p.first = 0; p.first < p.rows; p.first += chunk) {
    p.count = std::min(chunk, p.rows - p.first);
    const Tensor picked = given.index ? given.X.index_select(0, given.index->slice(0, p.first, p.first + p.count))
                                      : given.X.slice(0, p.first, p.first + p.count);
    const Tensor X = in_dtype(picked, columns.scalar_type()), z = affine(X, matrix, given.intercept).contiguous();
    Tensor logits;
    if (given.theta.defined()) logits = affine(X, given.theta.t(), given.intercept).contiguous();
    p.z = z.mutable_data_ptr();
    p.logits = logits.defined() ? logits.const_data_ptr() : nullptr;
    run_curve(p, z);
    total.slice(0, 0, dim).addmm_(X.t(), z);
    if (given.intercept) total.select(0, dim).add_(z.sum(0));
  }
  const Tensor ridge = at::full({params, 1}, given.l2 + given.damping, columns.options());
  if (given.intercept) ridge.slice(0, dim).fill_(given.damping);
  return total.div_(double(p.rows)).add_(matrix.mul(ridge)).t().reshape(columns.sizes());
}

Tensor glm_hvp_route(const Tensor& X, const Tensor& vectors, const OptionalTensor& theta, const OptionalTensor& weights,
                     const OptionalTensor& y, const OptionalTensor& sample_weight, const OptionalTensor& batch,
                     const std::string& family, bool intercept, double smoothing, double l2, double damping,
                     const std::string& route) {
  check_design(X, vectors, intercept, "vectors");
  const int64_t n = X.size(0), classes = vectors.size(2);
  const at::ScalarType dtype = vectors.scalar_type();
  const Family kind = family_of(family);
  TORCH_CHECK_VALUE(kind == Family::softmax || classes == 1, "vectors: expected one output, got ", classes);
  TORCH_CHECK_VALUE(weights || theta || kind == Family::linear, "theta, weights: expected one of them");
  TORCH_CHECK_VALUE(weights || kind != Family::smooth_hinge || y, "y: expected labels");
  check_optional(theta, {vectors.size(1), classes}, dtype, X, "theta");
  check_optional(weights, {n, classes}, dtype, X, "weights");
  check_optional(y, {n}, dtype, X, "y");
  check_optional(sample_weight, {n}, dtype, X, "sample_weight");
  check_indices(batch, X, "batch");
  const c10::DeviceGuard guard(X.device());
  const GlmOperands given{with_unit_rows(X),
                          theta && !weights ? theta->t().contiguous() : Tensor(),
                          contiguous(weights),
                          contiguous(y),
                          contiguous(sample_weight),
                          contiguous(batch),
                          kind,
                          intercept,
                          smoothing,
                          l2,
                          damping};
  const Tensor columns = columns_of(vectors);
  const bool few = !on_gpu(X) || vectors.size(0) * classes <= kFusedColumnsCuda;
  const bool fused = route == "fused" || (route == "auto" && few);
  return vectors_of(fused ? fused_hvp(given, columns) : product_hvp(given, columns));
}

Tensor glm_hvp(const Tensor& X, const Tensor& vectors, const OptionalTensor& theta, const OptionalTensor& weights,
               const OptionalTensor& y, const OptionalTensor& sample_weight, const OptionalTensor& batch,
               const std::string& family, bool intercept, double smoothing, double l2, double damping) {
  return glm_hvp_route(X, vectors, theta, weights, y, sample_weight, batch, family, intercept, smoothing, l2, damping,
                       "auto");
}

// ---- LiSSA --------------------------------------------------------------------------------------------------------------

// A copy of vectors (M,P,C) as the loop keeps them: see LissaPlan.
Tensor lissa_form(const Lissa& p, const LissaPlan& plan, const Tensor& vectors) {
  if (!plan.panel_columns) return vectors.transpose(1, 2).clone(at::MemoryFormat::Contiguous);
  const Tensor from = vectors.contiguous(), to = at::empty({plan.panels, p.params(), plan.panel_columns}, from.options());
  const pybind11::gil_scoped_release release;
  parallel(plan.update_items, double(to.numel()),
           [&](int64_t i, int64_t j) { lissa_pack_cpu(p, from.const_data_ptr(), to.mutable_data_ptr(), i, j); });
  return to;
}

Tensor lissa_vectors(const Lissa& p, const LissaPlan& plan, const Tensor& form, at::IntArrayRef shape) {
  if (!plan.panel_columns) return vectors_of(form);
  const Tensor to = at::empty(shape, form.options());
  const pybind11::gil_scoped_release release;
  parallel(plan.update_items, double(to.numel()),
           [&](int64_t i, int64_t j) { lissa_unpack_cpu(p, form.const_data_ptr(), to.mutable_data_ptr(), i, j); });
  return to;
}

void run_lissa(const Lissa& p, const LissaPlan& plan) {
  const double work = 2.0 * double(p.batch) * double(p.params()) * double(p.columns);
  const pybind11::gil_scoped_release release;
  for (int64_t step = p.first_step; step < p.first_step + p.steps; ++step) {
    parallel(plan.row_items, work, [&](int64_t i, int64_t j) { lissa_rows_cpu(p, step, i, j); });
    parallel(plan.update_items, work, [&](int64_t i, int64_t j) { lissa_update_cpu(p, step, i, j); });
  }
}

std::tuple<Tensor, Tensor> lissa(const Tensor& X_in, const Tensor& gradient, const Tensor& weights_in,
                                 const OptionalTensor& sample_weight_in, const Tensor& start, const std::string& family,
                                 bool intercept, double l2, double damping, double sigma, int64_t batch_size,
                                 int64_t first_step, int64_t steps, int64_t skip, int64_t seed) {
  check_design(X_in, gradient, intercept, "gradient");
  const int64_t n = X_in.size(0), classes = gradient.size(2), params = gradient.size(1);
  const at::ScalarType dtype = gradient.scalar_type();
  TORCH_CHECK_VALUE(family == "softmax" || classes == 1, "gradient: expected one output, got ", classes);
  TORCH_CHECK_VALUE(n < int64_t{1} << 31 && batch_size > 0 && steps > 0 && skip >= 0 && skip < steps && sigma > 0,
                    "rows, batch_size, steps, skip, sigma: out of range");
  check_tensor(weights_in, {n, classes}, dtype, X_in, "weights");
  check_tensor(start, gradient.sizes(), dtype, X_in, "start");
  check_optional(sample_weight_in, {n}, dtype, X_in, "sample_weight");
  const c10::DeviceGuard guard(X_in.device());
  const Tensor X = with_unit_rows(X_in), weights = weights_in.contiguous();
  const OptionalTensor sample_weight = contiguous(sample_weight_in);
  Lissa p{};
  fill_rows(p, X, std::nullopt, sample_weight, classes, intercept, dtype);
  p.columns = gradient.size(0) * classes;
  p.batch = batch_size;
  const LissaPlan plan = on_gpu(X) ? LissaPlan{.gathered_elements = p.batch * params, .output_elements = p.batch * p.columns}
                                   : lissa_plan_cpu(p);
  p.panel_columns = plan.panel_columns;
  const Tensor state = lissa_form(p, plan, start), average = at::empty(state.sizes(), state.options());
  Tensor g = lissa_form(p, plan, gradient), gathered = at::empty({plan.gathered_elements}, g.options()),
         outputs = at::empty({plan.output_elements}, g.options());
  const Tensor counter = at::empty({2}, g.options().dtype(at::kLong));
  p.weights = weights.const_data_ptr();
  p.smoothing = 1;
  p.family = family_of(family);
  p.gradient = g.const_data_ptr();
  p.state = state.mutable_data_ptr();
  p.average = average.mutable_data_ptr();
  p.gathered = gathered.mutable_data_ptr();
  p.outputs = outputs.mutable_data_ptr();
  p.counter = counter.mutable_data_ptr<int64_t>();
  p.first_step = first_step;
  p.steps = steps;
  p.skip = skip;
  p.seed = uint64_t(seed);
  p.l2 = l2;
  p.damping = damping;
  p.sigma = sigma;
  if (on_gpu(X))
    check_launch(launch_lissa(p, current_stream(X)));
  else
    run_lissa(p, plan);
  // The results may then live in their memory, whose pages are there.
  g = gathered = outputs = Tensor();
  return {lissa_vectors(p, plan, state, start.sizes()), lissa_vectors(p, plan, average, start.sizes())};
}

Tensor sample_rows(const Tensor& like, int64_t rows, int64_t count, int64_t seed, int64_t step) {
  TORCH_CHECK_VALUE(rows > 0 && rows < int64_t{1} << 31 && count >= 0, "rows, count: out of range");
  const c10::DeviceGuard guard(like.device());
  const Tensor out = at::empty({count}, like.options().dtype(at::kLong));
  int64_t* const to = out.mutable_data_ptr<int64_t>();
  if (count == 0) return out;
  if (on_gpu(like))
    check_launch(launch_sample_rows(to, rows, count, uint64_t(seed), step, current_stream(like)));
  else
    sample_rows_cpu(to, rows, count, uint64_t(seed), step);
  return out;
}

// ---- scores -------------------------------------------------------------------------------------------------------------

struct ScoreOperands {
  Tensor X, delta, columns;  // columns: (M,C,P)
  OptionalTensor rows;
  bool intercept;

  ScoreOperands(const Tensor& X_in, const Tensor& delta_in, const Tensor& solutions, const OptionalTensor& rows_in,
                bool with_intercept)
      : intercept(with_intercept) {
    check_design(X_in, solutions, intercept, "solutions");
    check_tensor(delta_in, {X_in.size(0), solutions.size(2)}, solutions.scalar_type(), X_in, "delta");
    check_indices(rows_in, X_in, "rows");
    X = with_unit_rows(X_in);
    delta = delta_in.contiguous();
    columns = columns_of(solutions);
    rows = contiguous(rows_in);
  }
  int64_t tests() const { return columns.size(0); }
  int64_t count() const { return rows ? rows->numel() : X.size(0); }
  void fill(GlmRows& p) const { fill_rows(p, X, rows, std::nullopt, columns.size(1), intercept, columns.scalar_type()); }
};

void run_scores_cpu(InfluenceScores& p, const Tensor& like) {
  const ScoresPlan plan = scores_plan_cpu(p);
  p.slots = plan.slots;
  const int64_t places = p.out ? 0 : p.slots * p.tests * p.k;
  const Workspace panels(plan.panel_bytes, like);
  const Tensor list_values = at::empty({places}, like.options());
  const Tensor list_rows = at::empty({places}, like.options().dtype(at::kLong));
  p.panels = panels.data();
  p.list_values = list_values.mutable_data_ptr();
  p.list_rows = list_rows.mutable_data_ptr<int64_t>();
  const double work = 2.0 * double(p.rows) * double(p.params()) * double(p.columns);
  const pybind11::gil_scoped_release release;
  parallel(plan.panel_items, double(plan.panel_bytes), [&](int64_t i, int64_t j) { scores_pack_cpu(p, i, j); });
  parallel(p.slots, work, [&](int64_t i, int64_t j) { scores_cpu(p, i, j); });
  if (!p.out) parallel(p.tests, double(places), [&](int64_t i, int64_t j) { scores_merge_cpu(p, i, j); });
}

InfluenceScores cpu_scores(const ScoreOperands& given) {
  InfluenceScores p{};
  given.fill(p);
  p.delta = given.delta.const_data_ptr();
  p.solutions = given.columns.const_data_ptr();
  p.tests = given.tests();
  p.columns = p.tests * p.classes;
  p.k = 1;
  return p;
}

// The products X S of a chunk of rows at a time, and what `finish` fills in of the rest.
template <class Finish>
void run_score_chunks(const ScoreOperands& given, Finish finish) {
  ScoreChunk p{};
  given.fill(p);
  p.delta = given.delta.const_data_ptr();
  p.tests = given.tests();
  p.columns = p.tests * p.classes;
  finish(p);
  const Tensor matrix = given.columns.view({p.columns, given.columns.size(2)});
  const int64_t chunk = std::max<int64_t>(256, 4 * kChunkBytes / (p.columns * int64_t(matrix.element_size())));
  for (p.first = 0; p.first < p.rows; p.first += chunk) {
    p.count = std::min(chunk, p.rows - p.first);
    const Tensor picked = given.rows ? given.X.index_select(0, given.rows->slice(0, p.first, p.first + p.count))
                                     : given.X.slice(0, p.first, p.first + p.count);
    // S X^T, not X S^T: neighbouring threads then read neighbouring rows of one test.
    const Tensor Xt = in_dtype(picked, matrix.scalar_type()).t();
    const Tensor products =
        (given.intercept ? at::addmm(matrix.slice(1, p.dim), matrix.slice(1, 0, p.dim), Xt) : matrix.matmul(Xt))
            .contiguous();
    p.products = products.const_data_ptr();
    check_launch(launch_score_chunk(p, current_stream(given.X)));
  }
}

Tensor influence_scores(const Tensor& X, const Tensor& delta, const Tensor& solutions, const OptionalTensor& rows,
                        bool intercept) {
  const ScoreOperands given(X, delta, solutions, rows, intercept);
  const c10::DeviceGuard guard(X.device());
  const Tensor out = at::empty({given.tests(), given.count()}, solutions.options());
  if (out.numel() == 0) return out;
  if (on_gpu(X)) {
    run_score_chunks(given, [&](ScoreChunk& p) { p.out = out.mutable_data_ptr(); });
    return out;
  }
  InfluenceScores p = cpu_scores(given);
  p.out = out.mutable_data_ptr();
  run_scores_cpu(p, solutions);
  return out;
}

std::tuple<Tensor, Tensor> influence_top_k(const Tensor& X, const Tensor& delta, const Tensor& solutions,
                                           const OptionalTensor& rows, bool intercept, int64_t k, bool largest) {
  const ScoreOperands given(X, delta, solutions, rows, intercept);
  TORCH_CHECK_VALUE(k > 0 && k <= given.count(), "k: expected 1 to ", given.count(), ", got ", k);
  const c10::DeviceGuard guard(X.device());
  const Tensor values = at::full({given.tests(), k}, std::nan(""), solutions.options());
  const Tensor found = at::full({given.tests(), k}, -1, solutions.options().dtype(at::kLong));
  const auto attach = [&](auto& p) {
    p.values = values.mutable_data_ptr();
    p.found = found.mutable_data_ptr<int64_t>();
    p.k = k;
    p.largest = largest;
  };
  if (on_gpu(X)) {
    run_score_chunks(given, attach);
  } else {
    InfluenceScores p = cpu_scores(given);
    attach(p);
    run_scores_cpu(p, solutions);
  }
  return {values, found};
}

// ---- random projection
// ----------------------------------------------------------------------------------------------------

Tensor random_projection(const Tensor& x_in, int64_t outputs, int64_t seed, int64_t offset) {
  TORCH_CHECK_VALUE(x_in.dim() == 2 && x_in.size(1) > 0 && outputs > 0, "x: expected shape (B, P), got ", x_in.sizes());
  const c10::DeviceGuard guard(x_in.device());
  const Tensor x = with_unit_rows(x_in);
  const int64_t batch = x.size(0), inputs = x.size(1), slots = projection_slots(inputs, outputs);
  const auto options = x.options().dtype(accumulate_type(x));
  const Tensor out = at::empty({batch, outputs}, options);
  if (out.numel() == 0) return out;
  const Tensor partial = at::empty({slots, batch, outputs}, options);
  const Projection p{x.const_data_ptr(),
                     partial.mutable_data_ptr(),
                     out.mutable_data_ptr(),
                     batch,
                     batch == 1 ? inputs : x.stride(0),
                     inputs,
                     outputs,
                     offset,
                     slots,
                     uint64_t(seed),
                     dtype_of(x)};
  if (on_gpu(x)) {
    check_launch(launch_projection(p, current_stream(x)));
    return out;
  }
  const pybind11::gil_scoped_release release;
  const double work = double(inputs) * double(outputs) * double(batch);
  parallel(slots, work, [&](int64_t i, int64_t j) { projection_cpu(p, i, j); });
  parallel(batch, double(partial.numel()), [&](int64_t i, int64_t j) { projection_reduce_cpu(p, i, j); });
  return out;
}

}  // namespace

void bind_ihvp(pybind11::module_& m) {
  bind_op(m, "glm_hvp", &glm_hvp);
  bind_op(m, "glm_hvp_route", &glm_hvp_route);
  bind_op(m, "lissa", &lissa);
  bind_op(m, "sample_rows", &sample_rows);
  bind_op(m, "influence_scores", &influence_scores);
  bind_op(m, "influence_top_k", &influence_top_k);
  bind_op(m, "random_projection", &random_projection);
}

}  // namespace xai
