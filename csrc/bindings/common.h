// What the bindings of all families share: checks for memory safety, dtypes, views, stream, threads. Arguments have been
// checked with the user's words in xai_fast/ops; the checks here keep a wrong call from crashing.
//
// Only the files of this folder know torch and pybind11. They are built three ways: CPU only; with csrc/cuda/*.cu compiled
// by nvcc (XAI_WITH_CUDA); and for the tests with the same .cu files compiled for the CPU emulator (XAI_EMULATE), where CPU
// tensors go through the CUDA launchers.
#pragma once
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/_assert_async.h>
#include <ATen/ops/aminmax.h>
#include <ATen/ops/empty.h>
#include <c10/core/DeviceGuard.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <c10/core/impl/VirtualGuardImpl.h>
#include <torch/csrc/utils/pybind.h>

#include <algorithm>
#include <cmath>
#include <optional>
#include <string>

#include "scores.h"

namespace xai {

using at::Tensor;

// Binds an op. Its sums keep their dtype under autocast, which would hand 16-bit products to code that reads 32-bit ones.
template <class R, class... Args, class... Extra>
void bind_op(pybind11::module_& m, const char* name, R (*op)(Args...), const Extra&... extra) {
  m.def(
      name,
      [op](Args... args) -> R {
        const c10::impl::ExcludeDispatchKeyGuard guard(c10::autocast_dispatch_keyset);
        return op(std::forward<Args>(args)...);
      },
      extra...);
}

void bind_rollout(pybind11::module_& m);
void bind_relevance(pybind11::module_& m);
void bind_ihvp(pybind11::module_& m);
void bind_metrics(pybind11::module_& m);

inline Dtype dtype_of(const Tensor& x) {
  switch (x.scalar_type()) {
    case at::kFloat: return Dtype::f32;
    case at::kDouble: return Dtype::f64;
    case at::kHalf: return Dtype::f16;
    case at::kBFloat16: return Dtype::bf16;
    default: TORCH_CHECK_TYPE(false, "expected a float32, float64, float16 or bfloat16 tensor, got ", x.scalar_type());
  }
}

inline at::ScalarType accumulate_type(const Tensor& x) { return x.scalar_type() == at::kDouble ? at::kDouble : at::kFloat; }

inline Fusion fusion_of(const std::string& name) {
  if (name == "mean") return Fusion::mean;
  if (name == "sum") return Fusion::sum;
  if (name == "max") return Fusion::max;
  if (name == "min") return Fusion::min;
  TORCH_CHECK_VALUE(false, "head_fusion: expected 'mean', 'sum', 'max' or 'min', got '", name, "'");
}

#ifdef XAI_EMULATE
inline bool emulate_cuda = true;  // off: the module runs its CPU kernels, built with the same sanitizers
#endif

inline bool on_gpu([[maybe_unused]] const Tensor& x) {
#ifdef XAI_EMULATE
  return emulate_cuda;
#else
  return x.is_cuda();
#endif
}

inline void* current_stream([[maybe_unused]] const Tensor& x) {
#ifdef XAI_EMULATE
  return nullptr;
#else
  return c10::impl::VirtualGuardImpl(c10::DeviceType::CUDA).getStream(x.device()).native_handle();
#endif
}

inline void check_launch(const char* message) { TORCH_CHECK(message == nullptr, "xai_fast CUDA kernel: ", message); }

inline void check_tensor(const Tensor& x, at::IntArrayRef shape, at::ScalarType dtype, const Tensor& like,
                         const char* name) {
  TORCH_CHECK_VALUE(x.sizes() == shape, name, ": expected shape ", shape, ", got ", x.sizes());
  TORCH_CHECK_TYPE(x.scalar_type() == dtype, name, ": expected dtype ", dtype, ", got ", x.scalar_type());
  TORCH_CHECK_VALUE(x.device() == like.device(), name, ": expected device ", like.device(), ", got ", x.device());
}

// Places among `below`, int64 and checked by check_tensor. A look at those on the GPU would wait for it and end a graph
// capture; where nobody looked in Python (xai_fast/ops does, but not in compiled code) the device stops before it reads out
// of bounds.
inline void check_places(const Tensor& places_in, int64_t below, const char* name) {
  if (places_in.numel() == 0) return;
  if (places_in.is_cuda()) {
    const auto [low, high] = at::aminmax(places_in);
    return at::_assert_async(low.ge(0).logical_and_(high.lt(below)), std::string(name) + ": out of range");
  }
  const Tensor places = places_in.contiguous();
  const int64_t* const first = places.const_data_ptr<int64_t>();
  const auto [low, high] = std::minmax_element(first, first + places.numel());
  TORCH_CHECK_VALUE(*low >= 0 && *high < below, name, ": expected numbers from 0 to ", below - 1, ", got ", *low, " to ",
                    *high);
}

inline void check_rows(const Tensor& rows, int64_t batch, int64_t tokens, const Tensor& like) {
  TORCH_CHECK_VALUE(rows.dim() == 3 && rows.size(0) == batch && rows.size(2) == tokens, "rows: expected shape (B, R, N) = (",
                    batch, ", R, ", tokens, "), got ", rows.sizes());
  TORCH_CHECK_VALUE(rows.device() == like.device(), "rows: expected device ", like.device(), ", got ", rows.device());
}

// The kernels read the last dimension as one run.
inline Tensor with_unit_columns(const Tensor& x) { return x.size(3) == 1 || x.stride(3) == 1 ? x : x.contiguous(); }

inline View4 view_of(const Tensor& x) { return {x.const_data_ptr(), x.stride(0), x.stride(1), x.stride(2), x.stride(3)}; }

inline Tensor in_dtype(const Tensor& x, at::ScalarType dtype) { return x.scalar_type() == dtype ? x : x.to(dtype); }

inline Tensor rows_for(const Tensor& rows, const Tensor& like) { return in_dtype(rows, accumulate_type(like)).contiguous(); }

// Work items over the threads of torch; small work stays on the calling thread.
template <class F>
void parallel(int64_t items, double operations, F work) {
  constexpr double kWorthThreads = 1 << 16;
  at::parallel_for(0, items, operations < kWorthThreads ? items : 1, work);
}

// Fills the part that every streamed op has. `query`, `key` and `mask` must outlive the call; `mask` receives the expanded
// mask.
void fill_scores(AttentionScores& p, const Tensor& query, const Tensor& key, const std::optional<Tensor>& mask_in,
                 Tensor& mask, std::optional<double> scale, bool is_causal);
void check_scores(const Tensor& query, const Tensor& key, const std::optional<Tensor>& mask,
                  const std::optional<Tensor>& lse);

}  // namespace xai
