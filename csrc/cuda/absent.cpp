// Stands in for the .cu files in a build without CUDA: every launcher says so. The Python side never calls them then.
#include "../rollout.h"

namespace xai {

static const char* const kAbsent = "this build has no CUDA kernels; install nvcc and rebuild with XAI_FAST_CUDA=1";

int64_t row_step_slots_cuda(int64_t, int64_t) { return 1; }
const char* launch_row_step(const RowStep&, void*) { return kAbsent; }
const char* launch_fuse_heads(const FuseHeads&, void*) { return kAbsent; }
int64_t streamed_workspace_cuda(const StreamedRowStep&) { return 0; }
const char* launch_streamed_row_step(const StreamedRowStep&, void*) { return kAbsent; }

}  // namespace xai
