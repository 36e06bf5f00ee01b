// Fills the shift of the queries, from p.lse or from q and k.
#pragma once
#include "streamed_scores.cuh"

namespace xai {

const char* launch_shift(const AttentionScores& p, const ScoreArrays<float>& w, void* stream);
const char* launch_shift(const AttentionScores& p, const ScoreArrays<double>& w, void* stream);

}  // namespace xai
