// The compiled module: what it says about itself, when it may be called directly, and the functions of the families.
#include <c10/core/GradMode.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/version.h>

#include "common.h"
#include "cpu/simd.h"
#include "workspace.h"

#ifdef XAI_EMULATE
#include "cuda_emulator.h"
#endif

namespace xai {
namespace {

constexpr bool kBuiltWithCuda = sizeof(XAI_CUDA_ARCHS) > 1;

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

}  // namespace
}  // namespace xai

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  m.attr("torch_version") = TORCH_VERSION;
  m.attr("cuda_archs") = XAI_CUDA_ARCHS;
  m.attr("build_flags") = XAI_BUILD_FLAGS;
  m.def("callable_directly", &xai::callable_directly);
  m.def("is_usual_streamed", &xai::is_usual_streamed);
  m.def("cpu_capability", &xai::cpu_capability_name);
  m.def("release_workspace", &xai::Workspace::release);
  xai::bind_rollout(m);
  xai::bind_relevance(m);
  xai::bind_ihvp(m);
  xai::bind_metrics(m);
#ifdef XAI_EMULATE
  m.def("set_schedule_seed", [](int seed) { emulator::schedule_seed = seed; });
  m.def("emulate_cuda", [](bool on) { xai::emulate_cuda = on; });
#endif
}
