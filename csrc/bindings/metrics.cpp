// Bindings of the metrics family.
#include "metrics.h"

#include <ATen/ops/argsort.h>
#include <ATen/ops/nan_to_num.h>

#include <limits>

#include "common.h"

namespace xai {
namespace {

void check_matrix(const Tensor& x, const char* name) {
  TORCH_CHECK_VALUE(x.dim() == 2 && x.size(1) > 0, name, ": expected shape (B, n), got ", x.sizes());
}

void check_sample(const Tensor& sample, int64_t examples, int64_t below, const Tensor& like, const char* name = "sample") {
  check_tensor(sample, {examples}, at::kLong, like, name);
  check_places(sample, below, name);
}

Tensor rank_features(const Tensor& scores_in) {
  check_matrix(scores_in, "scores");
  TORCH_CHECK_TYPE(scores_in.scalar_type() == at::kFloat || scores_in.scalar_type() == at::kDouble,
                   "scores: expected float32 or float64, got ", scores_in.scalar_type());
  TORCH_CHECK_VALUE(scores_in.size(1) < int64_t{1} << 31, "scores: expected fewer than 2^31 features");
  const c10::DeviceGuard guard(scores_in.device());
  const Tensor scores = scores_in.contiguous();
  const Tensor ranks = at::empty(scores.sizes(), scores.options().dtype(at::kInt));
  RankFeatures p{scores.const_data_ptr(), nullptr,        ranks.mutable_data_ptr<int32_t>(),
                 scores.size(0),          scores.size(1), dtype_of(scores)};
  if (ranks.numel() == 0) return ranks;
  if (on_gpu(scores)) {
    constexpr double kInfinity = std::numeric_limits<double>::infinity();
    const Tensor cleared = at::nan_to_num(scores, -kInfinity, kInfinity, -kInfinity).add_(0.0);  // -0 + 0 = 0
    const Tensor order = at::argsort(cleared, /*stable=*/true, /*dim=*/1, /*descending=*/true).contiguous();
    p.order = order.const_data_ptr<int64_t>();
    check_launch(launch_invert_order(p, current_stream(scores)));
    return ranks;
  }
  const pybind11::gil_scoped_release release;
  parallel(p.batch, 8.0 * double(scores.numel()), [&](int64_t i, int64_t j) { rank_features_cpu(p, i, j); });
  return ranks;
}

Tensor replace_ranked(const Tensor& x_in, const Tensor& baseline_in, const Tensor& ranks_in, const Tensor& sample_in,
                      const Tensor& first_in, const Tensor& last_in, const std::optional<Tensor>& ranking_in) {
  TORCH_CHECK_VALUE(x_in.dim() == 4, "x: expected shape (B, C, P, D), got ", x_in.sizes());
  TORCH_CHECK_VALUE(sample_in.dim() == 1, "sample: expected shape (E), got ", sample_in.sizes());
  TORCH_CHECK_TYPE(x_in.element_size() <= 8, "x: expected elements of at most 8 bytes, got ", x_in.scalar_type());
  const int64_t batch = x_in.size(0), examples = sample_in.size(0);
  check_tensor(baseline_in.expand(x_in.sizes()), x_in.sizes(), x_in.scalar_type(), x_in, "baseline");
  const int64_t rankings = ranking_in ? ranks_in.size(0) : batch;
  check_tensor(ranks_in, {rankings, x_in.size(2)}, at::kInt, x_in, "ranks");
  check_sample(sample_in, examples, batch, x_in);
  if (ranking_in) check_sample(*ranking_in, examples, rankings, x_in, "ranking");
  check_tensor(first_in, {examples}, at::kInt, x_in, "first");
  check_tensor(last_in, {examples}, at::kInt, x_in, "last");
  const c10::DeviceGuard guard(x_in.device());
  const Tensor x = x_in.contiguous(), baseline = baseline_in.expand(x.sizes()), ranks = ranks_in.contiguous(),
               sample = sample_in.contiguous(), first = first_in.contiguous(), last = last_in.contiguous(),
               ranking = ranking_in ? ranking_in->contiguous() : sample;
  const Tensor out = at::empty({examples, x.size(1), x.size(2), x.size(3)}, x.options());
  const ReplaceRanked p{x.const_data_ptr(),
                        view_of(baseline),
                        ranks.const_data_ptr<int32_t>(),
                        sample.const_data_ptr<int64_t>(),
                        ranking.const_data_ptr<int64_t>(),
                        first.const_data_ptr<int32_t>(),
                        last.const_data_ptr<int32_t>(),
                        out.mutable_data_ptr(),
                        examples,
                        x.size(1),
                        x.size(2),
                        x.size(3),
                        int64_t(x.element_size())};
  if (out.numel() == 0) return out;
  if (on_gpu(x)) {
    check_launch(launch_replace_ranked(p, current_stream(x)));
    return out;
  }
  const pybind11::gil_scoped_release release;
  parallel(replace_ranked_items_cpu(p), double(out.numel()), [&](int64_t i, int64_t j) { replace_ranked_cpu(p, i, j); });
  return out;
}

Ball ball_of(const std::string& name) {
  if (name == "linf") return Ball::linf;
  if (name == "l2") return Ball::l2;
  TORCH_CHECK_VALUE(false, "ball: expected 'l2' or 'linf', got '", name, "'");
}

constexpr int64_t kDraws = int64_t{1} << 32;  // the noise counts them in 32 bits

Tensor perturb(const Tensor& x_in, const Tensor& sample_in, const Tensor& draw_in, const std::string& ball, double radius,
               int64_t seed, int64_t first_sample) {
  check_matrix(x_in, "x");
  TORCH_CHECK_VALUE(x_in.size(1) <= int64_t{1} << 33, "x: expected at most 2^33 entries in a sample");
  TORCH_CHECK_VALUE(sample_in.dim() == 1, "sample: expected shape (E), got ", sample_in.sizes());
  const int64_t examples = sample_in.size(0), entries = x_in.size(1);
  check_sample(sample_in, examples, x_in.size(0), x_in);
  check_sample(draw_in, examples, kDraws, x_in, "draw");
  const c10::DeviceGuard guard(x_in.device());
  const Tensor x = x_in.contiguous(), sample = sample_in.contiguous(), draw = draw_in.contiguous();
  const Tensor out = at::empty({examples, entries}, x.options());
  Perturb p{};
  p.ball = ball_of(ball);
  p.dtype = dtype_of(x);
  if (examples == 0) return out;
  const bool gpu = on_gpu(x);
  p.slots = gpu ? perturb_slots_cuda(entries) : perturb_slots_cpu(entries);
  const Tensor partial = at::empty({p.ball == Ball::l2 ? examples * p.slots : 0}, x.options().dtype(at::kDouble));
  p.x = x.const_data_ptr();
  p.sample = sample.const_data_ptr<int64_t>();
  p.draw = draw.const_data_ptr<int64_t>();
  p.out = out.mutable_data_ptr();
  p.partial = partial.mutable_data_ptr<double>();
  p.examples = examples;
  p.entries = entries;
  p.first_sample = first_sample;
  p.radius = radius;
  p.seed = uint64_t(seed);
  if (gpu) {
    check_launch(launch_perturb(p, current_stream(x)));
    return out;
  }
  const pybind11::gil_scoped_release release;
  const double work = 4.0 * double(out.numel());
  parallel(examples * p.slots, work, [&](int64_t i, int64_t j) { perturb_cpu(p, i, j); });
  if (p.ball == Ball::l2) parallel(examples * p.slots, work, [&](int64_t i, int64_t j) { perturb_finish_cpu(p, i, j); });
  return out;
}

Norm norm_of(const std::string& name) {
  if (name == "l1") return Norm::l1;
  if (name == "l2") return Norm::l2;
  if (name == "linf") return Norm::linf;
  TORCH_CHECK_VALUE(false, "norm: expected 'l1', 'l2' or 'linf', got '", name, "'");
}

Tensor map_distances(const Tensor& maps_in, const Tensor& centre_in, const Tensor& sample_in, const std::string& norm) {
  check_matrix(maps_in, "maps");
  check_matrix(centre_in, "centre");
  const int64_t examples = maps_in.size(0), entries = maps_in.size(1);
  check_tensor(centre_in, {centre_in.size(0), entries}, maps_in.scalar_type(), maps_in, "centre");
  check_sample(sample_in, examples, centre_in.size(0), maps_in);
  const c10::DeviceGuard guard(maps_in.device());
  const Tensor maps = maps_in.contiguous(), centre = centre_in.contiguous(), sample = sample_in.contiguous();
  const bool gpu = on_gpu(maps);
  const int64_t slots = gpu ? map_distances_slots_cuda(entries) : map_distances_slots_cpu(entries);
  const auto options = maps.options().dtype(at::kDouble);
  const Tensor out = at::empty({examples}, options), partial = at::empty({examples, slots}, options);
  const MapDistances p{maps.const_data_ptr(),
                       centre.const_data_ptr(),
                       sample.const_data_ptr<int64_t>(),
                       partial.mutable_data_ptr<double>(),
                       out.mutable_data_ptr<double>(),
                       examples,
                       entries,
                       slots,
                       norm_of(norm),
                       dtype_of(maps)};
  if (examples == 0) return out;
  if (gpu) {
    check_launch(launch_map_distances(p, current_stream(maps)));
    return out;
  }
  const pybind11::gil_scoped_release release;
  parallel(examples * slots, double(maps.numel()), [&](int64_t i, int64_t j) { map_distances_cpu(p, i, j); });
  parallel(examples, double(partial.numel()), [&](int64_t i, int64_t j) { map_distances_finish_cpu(p, i, j); });
  return out;
}

Tensor conciseness(const Tensor& maps_in, double threshold, bool gini) {
  check_matrix(maps_in, "maps");
  TORCH_CHECK_VALUE(maps_in.size(1) < int64_t{1} << 32, "maps: expected fewer than 2^32 entries in a map");
  const c10::DeviceGuard guard(maps_in.device());
  const bool gpu = on_gpu(maps_in);
  Tensor maps = maps_in.contiguous();
  const int64_t batch = maps.size(0), entries = maps.size(1);
  if (gpu && gini) maps = std::get<0>(maps.abs().sort(1)).contiguous();
  const int64_t slots = gpu ? conciseness_slots_cuda(batch, entries) : 0;
  const auto options = maps.options().dtype(at::kDouble);
  const Tensor out = at::empty({batch, 3}, options), partial = at::empty({batch, slots, 4}, options);
  const Conciseness p{maps.const_data_ptr(),
                      partial.mutable_data_ptr<double>(),
                      out.mutable_data_ptr<double>(),
                      batch,
                      entries,
                      slots,
                      threshold,
                      gini,
                      dtype_of(maps)};
  if (batch == 0) return out;
  if (gpu) {
    check_launch(launch_conciseness(p, current_stream(maps)));
    return out;
  }
  const pybind11::gil_scoped_release release;
  parallel(batch, 8.0 * double(maps.numel()), [&](int64_t i, int64_t j) { conciseness_cpu(p, i, j); });
  return out;
}

Tensor row_norms(const Tensor& x_in) {
  check_matrix(x_in, "x");
  const c10::DeviceGuard guard(x_in.device());
  const Tensor x = x_in.contiguous();
  const auto type = x.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
  const Tensor out = at::empty({x.size(0)}, x.options().dtype(type));
  const RowNorms p{x.const_data_ptr(), out.mutable_data_ptr(), x.size(0), x.size(1), dtype_of(x)};
  if (p.rows == 0) return out;
  if (on_gpu(x)) {
    check_launch(launch_row_norms(p, current_stream(x)));
    return out;
  }
  const pybind11::gil_scoped_release release;
  parallel(p.rows, double(x.numel()), [&](int64_t i, int64_t j) { row_norms_cpu(p, i, j); });
  return out;
}

}  // namespace

void bind_metrics(pybind11::module_& m) {
  bind_op(m, "rank_features", &rank_features);
  using pybind11::arg;
  bind_op(m, "replace_ranked", &replace_ranked, arg("x"), arg("baseline"), arg("ranks"), arg("sample"), arg("first"),
          arg("last"), arg("ranking") = pybind11::none());
  bind_op(m, "perturb", &perturb);
  bind_op(m, "map_distances", &map_distances);
  bind_op(m, "conciseness", &conciseness);
  bind_op(m, "row_norms", &row_norms);
}

}  // namespace xai
