// What the row steps out = rows Abar of both families share: coefficients of the rows, and the ordered sum of partial
// results.
#pragma once
#include "numeric.cuh"
#include "streamed_scores.cuh"

namespace xai {

// ---- coefficients ---------------------------------------------------------------------------------------------------

// rows (B,R,N) -> coefficient (B,R,padded) = factor rows, active (B,padded/32). A thread takes one query.
template <class Acc>
__global__ void __launch_bounds__(kPrepareThreads)
    prepare_rows_kernel(const Acc* rows, Acc* coefficient, uint32_t* active, int64_t n_rows, int64_t tokens, int64_t padded,
                        double factor) {
  const int64_t item = int64_t(blockIdx.x) * kPrepareThreads + threadIdx.x;
  const int64_t b = item / padded, i = item % padded;
  bool needed = false;
  for (int64_t r = 0; r < n_rows; ++r) {
    const Acc row = i < tokens ? rows[(b * n_rows + r) * tokens + i] : Acc(0);
    needed |= row != 0;
    coefficient[(b * n_rows + r) * padded + i] = row * Acc(factor);
  }
  const unsigned word = __ballot_sync(kAllLanes, needed);
  if (threadIdx.x % kWarp == 0) active[item / kWarp] = word;
}

// row_sums (B,sum_slots,N) -> coefficient /= w + factor row sum, or 0 where that is 0. A thread takes one query.
template <class Acc>
__global__ void __launch_bounds__(kPrepareThreads)
    normalize_coefficients_kernel(const Acc* row_sums, Acc* coefficient, int64_t batch, int64_t n_rows, int64_t tokens,
                                  int64_t padded, int64_t sum_slots, double residual, double factor) {
  const int64_t item = int64_t(blockIdx.x) * kPrepareThreads + threadIdx.x;
  const int64_t b = item / tokens, i = item % tokens;
  if (b >= batch) return;
  Acc sum = Acc(residual);
  for (int64_t slot = 0; slot < sum_slots; ++slot) sum += Acc(factor) * row_sums[(b * sum_slots + slot) * tokens + i];
  for (int64_t r = 0; r < n_rows; ++r) {
    Acc& value = coefficient[(b * n_rows + r) * padded + i];
    value = sum == 0 ? Acc(0) : value / sum;
  }
}

// ---- ordered sum of partial results ---------------------------------------------------------------------------------

constexpr int kReduceWarps = 16;

// partial (outer,slots,inner) -> out (outer,inner):  out = residual * own + factor * sum_slots partial
// own (outer,own_pitch) or null. `inner` is one row of N elements. A block takes 32 columns; its warps add sixteenths of
// the slots, so that many loads are in flight, and the sixteenths are added in order.
template <class Acc>
__global__ void __launch_bounds__(kReduceWarps* kWarp)
    sum_partial_kernel(const Acc* partial, Acc* out, const Acc* own, int64_t own_pitch, int64_t slots, int64_t n_rows,
                       int64_t tokens, Acc residual, Acc factor) {
  const int64_t columns = (tokens + kWarp - 1) / kWarp;
  const int64_t row = blockIdx.x / columns;  // of B*R
  const int64_t token = blockIdx.x % columns * kWarp + threadIdx.x % kWarp;
  const int warp = threadIdx.x / kWarp;
  Acc sum = 0;
  if (token < tokens) {
    const Acc* source = partial + (row / n_rows * slots * n_rows + row % n_rows) * tokens + token;
    const int64_t end = (warp + 1) * slots / kReduceWarps;
#pragma unroll 8
    for (int64_t slot = warp * slots / kReduceWarps; slot < end; ++slot) sum += source[slot * n_rows * tokens];
  }
  Acc* sums = dynamic_smem<Acc>();
  sums[threadIdx.x] = sum;
  __syncthreads();
  if (warp != 0 || token >= tokens) return;
  for (int w = 1; w < kReduceWarps; ++w) sum += sums[w * kWarp + threadIdx.x];
  sum *= factor;
  if (own) sum += residual * own[row * own_pitch + token];
  out[row * tokens + token] = sum;
}

}  // namespace xai
