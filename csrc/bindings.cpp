// The only file that knows torch and pybind11: checks for memory safety, allocation, stream, threads.
// Arguments have been checked with the user's words in xai_fast/ops; the checks here keep a wrong call from crashing.
//
// Built three ways: CPU only; with csrc/cuda/*.cu compiled by nvcc (XAI_WITH_CUDA); and for the tests with the same .cu
// files compiled for the CPU emulator (XAI_EMULATE), where CPU tensors go through the CUDA launchers.
#include <ATen/Context.h>
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/any.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/full.h>
#include <c10/core/DeviceGuard.h>
#include <c10/core/GradMode.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <c10/core/impl/VirtualGuardImpl.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/utils/pybind.h>
#include <torch/version.h>

#include <cmath>
#include <optional>
#include <string>

#include "cpu/simd.h"
#include "rollout.h"

#ifdef XAI_EMULATE
#include "cuda_emulator.h"
#endif

namespace xai {
namespace {

using at::Tensor;

constexpr bool kBuiltWithCuda = sizeof(XAI_CUDA_ARCHS) > 1;

Dtype dtype_of(const Tensor& x) {
  switch (x.scalar_type()) {
    case at::kFloat: return Dtype::f32;
    case at::kDouble: return Dtype::f64;
    case at::kHalf: return Dtype::f16;
    case at::kBFloat16: return Dtype::bf16;
    default: TORCH_CHECK_TYPE(false, "expected a float32, float64, float16 or bfloat16 tensor, got ", x.scalar_type());
  }
}

at::ScalarType accumulate_type(const Tensor& x) { return x.scalar_type() == at::kDouble ? at::kDouble : at::kFloat; }

Fusion fusion_of(const std::string& name) {
  if (name == "mean") return Fusion::mean;
  if (name == "sum") return Fusion::sum;
  if (name == "max") return Fusion::max;
  if (name == "min") return Fusion::min;
  TORCH_CHECK_VALUE(false, "head_fusion: expected 'mean', 'sum', 'max' or 'min', got '", name, "'");
}

#ifdef XAI_EMULATE
bool emulate_cuda = true;  // off: the module runs its CPU kernels, built with the same sanitizers
#endif

bool on_gpu([[maybe_unused]] const Tensor& x) {
#ifdef XAI_EMULATE
  return emulate_cuda;
#else
  return x.is_cuda();
#endif
}

void* current_stream([[maybe_unused]] const Tensor& x) {
#ifdef XAI_EMULATE
  return nullptr;
#else
  return c10::impl::VirtualGuardImpl(c10::DeviceType::CUDA).getStream(x.device()).native_handle();
#endif
}

// Dense strided memory on a device with kernels, and no wrapper around it (subclass, fake, batched, functional, lazy
// negation).
bool is_plain(const Tensor& x) {
  constexpr c10::DispatchKeySet kOrdinary =
      c10::DispatchKeySet({c10::DispatchKey::Dense, c10::DispatchKey::ADInplaceOrView}) | c10::autograd_dispatch_keyset |
      c10::autocast_dispatch_keyset;
  const uint64_t wrappers = (x.key_set() - kOrdinary).raw_repr() & ~uint64_t{c10::full_backend_mask};
  return wrappers == 0 && (x.is_cpu() || (x.is_cuda() && kBuiltWithCuda));
}

// True if a kernel may be called without torch.library: no tensor subclass, fake or batched tensor, no mode that traces or
// transforms, no gradient to record, and a device with kernels.
bool callable_directly(const pybind11::tuple& args) {
  const auto modes = c10::impl::tls_local_dispatch_key_set().included_ - c10::autocast_dispatch_keyset -
                     c10::DispatchKeySet({c10::DispatchKey::BackendSelect, c10::DispatchKey::ADInplaceOrView});
  if (!modes.empty()) return false;
  const bool grad = c10::GradMode::is_enabled();
  for (const auto& arg : args) {
    PyObject* const object = arg.ptr();
    // THPVariable_Check asks Python for every other object, which costs more than the rest of this function.
    if (object == Py_None || PyFloat_Check(object) || PyBool_Check(object) || PyUnicode_Check(object)) continue;
    if (!THPVariable_Check(object)) continue;
    const Tensor& x = THPVariable_Unpack(object);
    if (!is_plain(x) || (grad && x.requires_grad())) return false;
  }
  return true;
}

void check_launch(const char* message) { TORCH_CHECK(message == nullptr, "xai_fast CUDA kernel: ", message); }

void check_square_4d(const Tensor& x, const char* name) {
  TORCH_CHECK_VALUE(x.dim() == 4 && x.size(2) == x.size(3) && x.size(1) > 0 && x.size(2) > 0, name,
                    ": expected shape (B, H, N, N) with H, N >= 1, got ", x.sizes());
}

void check_rows(const Tensor& rows, int64_t batch, int64_t tokens, const Tensor& like) {
  TORCH_CHECK_VALUE(rows.dim() == 3 && rows.size(0) == batch && rows.size(2) == tokens, "rows: expected shape (B, R, N) = (",
                    batch, ", R, ", tokens, "), got ", rows.sizes());
  TORCH_CHECK_VALUE(rows.device() == like.device(), "rows: expected device ", like.device(), ", got ", rows.device());
}

// The kernels read the last dimension as one run.
Tensor with_unit_columns(const Tensor& x) { return x.size(3) == 1 || x.stride(3) == 1 ? x : x.contiguous(); }

View4 view_of(const Tensor& x) { return {x.const_data_ptr(), x.stride(0), x.stride(1), x.stride(2), x.stride(3)}; }

Tensor in_dtype(const Tensor& x, at::ScalarType dtype) { return x.scalar_type() == dtype ? x : x.to(dtype); }

Tensor rows_for(const Tensor& rows, const Tensor& like) { return in_dtype(rows, accumulate_type(like)).contiguous(); }

// Work items over the threads of torch; small work stays on the calling thread.
template <class F>
void parallel(int64_t items, double operations, F work) {
  constexpr double kWorthThreads = 1 << 16;
  at::parallel_for(0, items, operations < kWorthThreads ? items : 1, work);
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

Tensor fuse_heads(const Tensor& attention_in, const std::string& head_fusion, double residual, bool normalize) {
  check_square_4d(attention_in, "attention");
  const c10::DeviceGuard guard(attention_in.device());
  const Tensor attention = with_unit_columns(attention_in);
  const int64_t batch = attention.size(0), heads = attention.size(1), tokens = attention.size(2);
  const Tensor out = at::empty({batch, tokens, tokens}, attention.options());
  const FuseHeads p{view_of(attention),     out.mutable_data_ptr(), batch, heads, tokens, residual, normalize,
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

// The usual case of the Python checks, at a tenth of their time: plain tensors of fitting shapes, one dtype, one device.
// False asks for a closer look; it is no error.
bool is_usual_streamed(pybind11::handle query_in, pybind11::handle key_in, pybind11::handle rows_in) {
  for (const auto& x : {query_in, key_in, rows_in})
    if (!THPVariable_CheckExact(x.ptr())) return false;
  const Tensor& query = THPVariable_Unpack(query_in.ptr());
  const Tensor& key = THPVariable_Unpack(key_in.ptr());
  const Tensor& rows = THPVariable_Unpack(rows_in.ptr());
  if (!is_plain(query) || !is_plain(key) || !is_plain(rows)) return false;
  const bool typed = at::isFloatingType(query.scalar_type()) && query.element_size() >= 2 &&
                     query.options().type_equal(key.options()) && query.options().type_equal(rows.options()) &&
                     query.device() == key.device() && query.device() == rows.device();
  return typed && query.dim() == 4 && query.sizes() == key.sizes() && query.numel() > 0 && rows.dim() == 3 &&
         rows.size(0) == query.size(0) && rows.size(2) == query.size(2);
}

void check_streamed(const Tensor& query, const Tensor& key, const std::optional<Tensor>& mask,
                    const std::optional<Tensor>& lse) {
  TORCH_CHECK_VALUE(query.dim() == 4 && key.dim() == 4 && query.size(2) == key.size(2) && query.size(3) == key.size(3) &&
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

// Allocates the workspace and runs the step on the device of `query`.
void run_streamed(StreamedRowStep& p, const Tensor& query) {
  const bool gpu = on_gpu(query);
  const StreamPlan plan = gpu ? StreamPlan{} : streamed_plan_cpu(p);
  const int64_t bytes = gpu ? streamed_workspace_cuda(p) : plan.workspace_bytes;
  const Tensor workspace = at::empty({bytes}, query.options().dtype(at::kByte));
  p.workspace = workspace.mutable_data_ptr();
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
  check_streamed(query_in, key_in, mask_in, lse_in);
  const int64_t batch = query_in.size(0), heads = query_in.size(1), tokens = query_in.size(2), dim = query_in.size(3);
  check_rows(rows_in, batch, tokens, query_in);
  const c10::DeviceGuard guard(query_in.device());
  const Tensor query = with_unit_columns(query_in), key = with_unit_columns(key_in);
  const Fusion fusion = fusion_of(head_fusion);
  const bool summed = fusion == Fusion::mean || fusion == Fusion::sum;
  Tensor rows = rows_for(rows_in, query);
  if (summed && normalize && mask_in) rows = rows.mul(inverse_row_sums(query, *mask_in, is_causal, fusion, residual));

  StreamedRowStep p{};
  p.query = view_of(query);
  p.key = view_of(key);
  Tensor mask;
  if (mask_in) {
    mask = mask_in->expand({batch, heads, tokens, tokens});
    p.mask = view_of(mask);
    p.mask_kind = mask.scalar_type() == at::kBool ? MaskKind::boolean : MaskKind::additive;
    p.mask_dtype = p.mask_kind == MaskKind::boolean ? Dtype::f32 : dtype_of(mask);
  }
  const Tensor lse = lse_in ? lse_in->to(rows.scalar_type()).contiguous() : Tensor();
  const Tensor out = at::empty({batch, rows.size(1), tokens}, rows.options());
  p.lse = lse.defined() ? lse.const_data_ptr() : nullptr;
  p.rows = rows.const_data_ptr();
  p.out = out.mutable_data_ptr();
  p.batch = batch;
  p.heads = heads;
  p.kv_heads = key.size(1);
  p.tokens = tokens;
  p.dim = dim;
  p.n_rows = rows.size(1);
  p.scale = scale ? *scale : 1.0 / std::sqrt(double(dim));
  p.residual = residual;
  p.rows_factor = summed && normalize && !mask_in ? inverse_row_sum(fusion, heads, residual) : 1.0;
  p.causal = is_causal;
  p.normalize = normalize && !summed;  // done above for the others
  p.tf32 = at::globalContext().allowTF32CuBLAS();
  p.fusion = fusion;
  p.dtype = dtype_of(query);
  if (out.numel() > 0) run_streamed(p, query);
  return in_dtype(out, rows_in.scalar_type());
}

}  // namespace
}  // namespace xai

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  m.attr("torch_version") = TORCH_VERSION;
  m.attr("cuda_archs") = XAI_CUDA_ARCHS;
  m.attr("build_flags") = XAI_BUILD_FLAGS;
  m.def("callable_directly", &xai::callable_directly);
  m.def("is_usual_streamed", &xai::is_usual_streamed);
  m.def("cpu_capability", &xai::cpu_capability_name);
  m.def("rollout_rows", &xai::rollout_rows);
  m.def("fuse_heads", &xai::fuse_heads);
  m.def("rollout_rows_qk", &xai::rollout_rows_qk);
#ifdef XAI_EMULATE
  m.def("set_schedule_seed", [](int seed) { emulator::schedule_seed = seed; });
  m.def("emulate_cuda", [](bool on) { xai::emulate_cuda = on; });
#endif
}
