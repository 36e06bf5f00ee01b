// Types that every kernel family shares. No torch, no CUDA: csrc/bindings, csrc/cpu and csrc/cuda all include this file.
#pragma once
#include <cstdint>

#ifdef __CUDACC__
#define XAI_HOST_DEVICE __host__ __device__
#else
#define XAI_HOST_DEVICE
#endif

namespace xai {

// Element type of the large inputs. Sums are kept in accumulate type: double for f64, float for the others.
enum class Dtype { f32, f64, f16, bf16 };

// How the heads of one layer become one matrix.
enum class Fusion { mean, sum, max, min };

// mask[i,j] of a boolean mask: true keeps the pair. An additive mask is added to the scaled score; a value of at most
// kRemovedBelow, which stands for -inf (models write the lowest finite float), removes the pair.
enum class MaskKind { none, boolean, additive };
constexpr float kRemovedBelow = -1.7e38f;

// A strided view of a 4-D tensor: element (b,h,i,j) lies at data[b*batch + h*head + i*row + j*column].
// A stride of 0 broadcasts that dimension.
struct View4 {
  const void* data = nullptr;
  int64_t batch = 0, head = 0, row = 0, column = 1;
};

}  // namespace xai
