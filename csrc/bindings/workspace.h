// The memory in which a call keeps what it computes on the way.
#pragma once
#include <utility>

#include "common.h"

namespace xai {

// On a CPU it stays with its thread for the calls that follow. Memory fresh from the system is zeroed page by page as it is
// touched, which can take as long as the work of the call. For a GPU torch keeps what is freed.
class Workspace {
 public:
  Workspace(int64_t bytes, const Tensor& like) {
    Tensor& kept = kept_here();
    const bool fits = like.is_cpu() && kept.defined() && kept.numel() >= bytes;
    memory_ = fits ? std::exchange(kept, Tensor()) : at::empty({bytes}, like.options().dtype(at::kByte));
  }

  ~Workspace() {
    Tensor& kept = kept_here();
    const bool is_larger = !kept.defined() || kept.numel() < memory_.numel();
    if (memory_.is_cpu() && memory_.numel() <= kMostKept && is_larger) kept = std::move(memory_);
  }

  Workspace(const Workspace&) = delete;
  Workspace& operator=(const Workspace&) = delete;

  void* data() const { return memory_.mutable_data_ptr(); }

  // Gives back what this thread keeps.
  static void release() { kept_here() = Tensor(); }

 private:
#ifdef XAI_EMULATE
  static constexpr int64_t kMostKept = -1;  // the sanitizers see where the memory of every call ends
#else
  static constexpr int64_t kMostKept = 32 << 20;
#endif

  static Tensor& kept_here() {
    thread_local Tensor kept;
    return kept;
  }

  Tensor memory_;
};

}  // namespace xai
