// Stands in for the .cu files in a build without CUDA: every launcher says so. The Python side never calls them then.
#include "../ihvp.h"
#include "../metrics.h"
#include "../relevance.h"
#include "../rollout.h"

namespace xai {

static const char* const kAbsent = "this build has no CUDA kernels; install nvcc and rebuild with XAI_FAST_CUDA=1";

int64_t row_step_slots_cuda(int64_t, int64_t) { return 1; }
const char* launch_row_step(const RowStep&, void*) { return kAbsent; }
const char* launch_fuse_heads(const FuseHeads&, void*) { return kAbsent; }
int64_t streamed_workspace_cuda(const StreamedRowStep&) { return 0; }
const char* launch_streamed_row_step(const StreamedRowStep&, void*) { return kAbsent; }

int64_t av_workspace_cuda(const AvRelevance&) { return 0; }
const char* launch_av_relevance(const AvRelevance&, void*) { return kAbsent; }
int64_t attention_workspace_cuda(const AttentionRelevance&) { return 0; }
const char* launch_attention_relevance(const AttentionRelevance&, void*) { return kAbsent; }
int64_t targeted_workspace_cuda(const TargetedRows&) { return 0; }
const char* launch_targeted_rows(const TargetedRows&, void*) { return kAbsent; }
const char* launch_softmax_relevance(const SoftmaxRelevance&, void*) { return kAbsent; }
const char* launch_skip_relevance(const SkipRelevance&, void*) { return kAbsent; }
const char* launch_norm_relevance(const NormRelevance&, void*) { return kAbsent; }
const char* launch_gradient_factor(const GradientFactor&, void*) { return kAbsent; }
const char* launch_sign_split(const SignSplit&, void*) { return kAbsent; }
const char* launch_linear_share(const LinearShare&, void*) { return kAbsent; }
const char* launch_linear_return(const LinearReturn&, void*) { return kAbsent; }

int64_t glm_slots_cuda(int64_t, int64_t, int64_t) { return 1; }
const char* launch_glm_hvp(const GlmHvp&, void*) { return kAbsent; }
const char* launch_glm_curve(const GlmCurve&, void*) { return kAbsent; }
const char* launch_lissa(const Lissa&, void*) { return kAbsent; }
const char* launch_sample_rows(int64_t*, int64_t, int64_t, uint64_t, int64_t, void*) { return kAbsent; }
const char* launch_score_chunk(const ScoreChunk&, void*) { return kAbsent; }
const char* launch_projection(const Projection&, void*) { return kAbsent; }

const char* launch_invert_order(const RankFeatures&, void*) { return kAbsent; }
const char* launch_replace_ranked(const ReplaceRanked&, void*) { return kAbsent; }
int64_t perturb_slots_cuda(int64_t) { return 1; }
const char* launch_perturb(const Perturb&, void*) { return kAbsent; }
int64_t map_distances_slots_cuda(int64_t) { return 1; }
const char* launch_map_distances(const MapDistances&, void*) { return kAbsent; }
int64_t conciseness_slots_cuda(int64_t, int64_t) { return 1; }
const char* launch_conciseness(const Conciseness&, void*) { return kAbsent; }
const char* launch_row_norms(const RowNorms&, void*) { return kAbsent; }

}  // namespace xai
