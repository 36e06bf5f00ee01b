// From an element type that is known at run time to a template argument.
#pragma once
#include "numeric.cuh"

namespace xai {

template <class T>
struct Type {
  using type = T;
};

// Calls f(Type<T>) for the element type.
template <class F>
auto with_dtype(Dtype dtype, F f) {
  switch (dtype) {
    case Dtype::f64: return f(Type<double>());
    case Dtype::f16: return f(Type<__half>());
    case Dtype::bf16: return f(Type<__nv_bfloat16>());
    default: return f(Type<float>());
  }
}

}  // namespace xai
