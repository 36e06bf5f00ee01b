// CUDA side of ../relevance.h: the rules that read each element a few times: softmax, norms, skip connections, elementwise
// factors, and what lies between the matrix products of linear layers. All are bound by memory.
#include "../relevance.h"

#include "dispatch.cuh"
#include "operands.cuh"
#include "row_sums.cuh"

namespace xai {
namespace {

constexpr int kThreads = 256;
constexpr int64_t kWarpColumns = 1024;  // rows up to this long are given to a warp, longer ones to a block

// Rows: a block of kThreads takes one row, or each of its warps.
template <class Acc, bool BLOCK>
struct Row {
  using Threads = RowThreads<BLOCK ? kThreads : kWarp>;
  static constexpr int kCount = BLOCK ? kThreads : kWarp, kRows = BLOCK ? 1 : kThreads / kWarp;
  static constexpr size_t kSharedBytes = BLOCK ? Threads::kWarps * sizeof(Acc) : 0;
  static __device__ int64_t index() { return int64_t(blockIdx.x) * kRows + (BLOCK ? 0 : warp_index()); }
  static __device__ int thread() { return threadIdx.x % kCount; }
  static __device__ Acc sum(Acc value) { return Threads::sum(value, dynamic_smem<Acc>()); }

  // Calls f(first, count) for the runs of N columns of this thread.
  template <int N, class F>
  static __device__ void for_runs(int64_t columns, F f) {
    for (int64_t first = int64_t(thread()) * N; first < columns; first += kCount * N) f(first, columns - first);
  }
};

// Calls f(Type<T>, Row) with rows for a warp or a block.
template <class F>
const char* with_rows(Dtype dtype, int64_t columns, F f) {
  return with_dtype(dtype, [&](auto element) {
    using Acc = Accumulate<typename decltype(element)::type>;
    return columns <= kWarpColumns ? f(element, Row<Acc, false>()) : f(element, Row<Acc, true>());
  });
}

// ---- softmax --------------------------------------------------------------------------------------------------------

// logits, probs, relevance (rows,columns) -> out:  x o (R - A rowsum(R)), 0 where x is removed
template <class T, class R>
__global__ void __launch_bounds__(kThreads) softmax_kernel(const SoftmaxRelevance p, bool vector) {
  using Acc = Accumulate<T>;
  constexpr int n = kPiece<T>;
  const int64_t row = R::index(), offset = row * p.columns;
  if (row >= p.rows) return;
  const T* relevance = static_cast<const T*>(p.relevance) + offset;
  Acc sum = 0;
  R::template for_runs<n>(p.columns, [&](int64_t first, int64_t count) {
    Acc r[n];
    load_run(relevance + first, count, vector, r);
#pragma unroll
    for (int e = 0; e < n; ++e) sum += r[e];
  });
  sum = R::sum(sum);
  R::template for_runs<n>(p.columns, [&](int64_t first, int64_t count) {
    Acc x[n], a[n], r[n];
    load_run(static_cast<const T*>(p.logits) + offset + first, count, vector, x);
    load_run(static_cast<const T*>(p.probs) + offset + first, count, vector, a);
    load_run(relevance + first, count, vector, r);
#pragma unroll
    for (int e = 0; e < n; ++e) x[e] = x[e] <= Acc(kRemovedBelow) ? Acc(0) : x[e] * (r[e] - a[e] * sum);
    store_run(static_cast<T*>(p.out) + offset + first, count, vector, x);
  });
}

// ---- LayerNorm and RMSNorm ------------------------------------------------------------------------------------------

// x, upstream (rows,columns) -> out. The row stays in the cache between the passes.
template <class T, class R>
__global__ void __launch_bounds__(kThreads, 1) norm_kernel(const NormRelevance p, bool vector) {
  using Acc = Accumulate<T>;
  constexpr int n = kPiece<T>;
  const int64_t row = R::index(), offset = row * p.columns;
  if (row >= p.rows) return;
  const T *x_row = static_cast<const T*>(p.x) + offset, *upstream = static_cast<const T*>(p.upstream) + offset;
  const T *weights = static_cast<const T*>(p.weight), *biases = static_cast<const T*>(p.bias);
  const Acc columns = Acc(p.columns), eps = Acc(p.eps);
  const auto mean_of = [&](auto f) {
    Acc sum = 0;
    R::template for_runs<n>(p.columns, [&](int64_t first, int64_t count) {
      Acc x[n];
      load_run(x_row + first, count, vector, x);
#pragma unroll
      for (int e = 0; e < n; ++e)
        if (e < count) sum += f(x[e]);
    });
    return R::sum(sum) / columns;
  };
  const Acc mean = p.rms ? Acc(0) : mean_of([](Acc x) { return x; });
  const Acc variance = mean_of([=](Acc x) { return (x - mean) * (x - mean); });
  const Acc inverse = Acc(1) / sqrt(variance + Acc(p.norm_eps));

  // w S of a run; x is read on the way
  const auto passed = [&](int64_t first, int64_t count, Acc(&x)[n], Acc(&ws)[n]) {
    Acc weight[n], bias[n];
    load_run(x_row + first, count, vector, x);
    load_run(upstream + first, count, vector, ws);
    if (weights) load_run(weights + first, count, vector, weight);
    if (biases) load_run(biases + first, count, vector, bias);
#pragma unroll
    for (int e = 0; e < n; ++e) {
      const Acc w = weights ? weight[e] : Acc(1);
      const Acc y = (x[e] - mean) * inverse * w + (biases ? bias[e] : Acc(0));
      ws[e] = w * (p.gradient_form ? ws[e] * damping(y, eps) : stabilized_ratio(ws[e], y, eps));
    }
  };
  Acc centre = 0;
  if (!p.rms && !p.detach_mean) {
    R::template for_runs<n>(p.columns, [&](int64_t first, int64_t count) {
      Acc x[n], ws[n];
      passed(first, count, x, ws);
#pragma unroll
      for (int e = 0; e < n; ++e)
        if (e < count) centre += ws[e];
    });
    centre = R::sum(centre) / columns;
  }
  R::template for_runs<n>(p.columns, [&](int64_t first, int64_t count) {
    Acc x[n], ws[n];
    passed(first, count, x, ws);
#pragma unroll
    for (int e = 0; e < n; ++e) {
      const Acc scaled = (ws[e] - centre) * inverse;
      x[e] = p.gradient_form ? scaled : x[e] * scaled;
    }
    store_run(static_cast<T*>(p.out) + offset + first, count, vector, x);
  });
}

// ---- skip connection ------------------------------------------------------------------------------------------------

// x, y, relevance (batch,elements): the shares of a run of `count` elements from `at` on, before rounding
template <class T, class Acc, int N>
__device__ void skip_shares(const SkipRelevance& p, int64_t at, int64_t count, bool vector, Acc (&r)[N], Acc (&to_x)[N],
                            Acc (&to_y)[N]) {
  load_run(static_cast<const T*>(p.x) + at, count, vector, to_x);
  load_run(static_cast<const T*>(p.y) + at, count, vector, to_y);
  load_run(static_cast<const T*>(p.relevance) + at, count, vector, r);
#pragma unroll
  for (int e = 0; e < N; ++e) {
    const Acc share = stabilized_ratio(r[e], to_x[e] + to_y[e], Acc(p.eps));
    to_x[e] *= share;
    to_y[e] *= share;
  }
}

struct Chunk {
  int64_t sample, first, end;
};
__device__ inline Chunk chunk_of_block(const SkipRelevance& p, int64_t chunks) {
  const int64_t first = blockIdx.x % chunks * kSkipChunk;
  return {blockIdx.x / chunks, first, min(p.elements, first + kSkipChunk)};
}

using DoubleSums = RowThreads<kThreads>;
constexpr size_t kDoubleSumBytes = DoubleSums::kWarps * sizeof(double);

// x, y, relevance (batch,elements) -> sums (batch,chunks,3). A block takes a chunk.
template <class T>
__global__ void __launch_bounds__(kThreads) skip_sums_kernel(const SkipRelevance p, int64_t chunks, bool vector) {
  using Acc = Accumulate<T>;
  constexpr int n = kPiece<T>;
  const Chunk chunk = chunk_of_block(p, chunks);
  double sums[3] = {};
  for (int64_t first = chunk.first + int64_t(threadIdx.x) * n; first < chunk.end; first += kThreads * n) {
    Acc r[n], to_x[n], to_y[n];
    skip_shares<T>(p, chunk.sample * p.elements + first, chunk.end - first, vector, r, to_x, to_y);
#pragma unroll
    for (int e = 0; e < n; ++e)
      if (first + e < chunk.end) {
        sums[0] += double(r[e]);
        sums[1] += double(to_x[e]);
        sums[2] += double(to_y[e]);
      }
  }
#pragma unroll
  for (int k = 0; k < 3; ++k) {
    const double sum = DoubleSums::sum(sums[k], dynamic_smem<double>());
    if (threadIdx.x == 0) static_cast<double*>(p.sums)[int64_t(blockIdx.x) * 3 + k] = sum;
  }
}

// sums of the sample -> what its shares of x and y are multiplied by
__device__ inline void ratio_factors(const SkipRelevance& p, int64_t chunks, int64_t sample, double& of_x, double& of_y) {
  const double* parts = static_cast<const double*>(p.sums) + sample * chunks * 3;
  double sums[3] = {};
  for (int64_t c = threadIdx.x; c < chunks; c += kThreads)
    for (int k = 0; k < 3; ++k) sums[k] += parts[c * 3 + k];
  for (double& sum : sums) sum = DoubleSums::sum(sum, dynamic_smem<double>());
  const auto sign = [](double x) { return double((x > 0) - (x < 0)); };
  const double weight = stabilized_ratio(sums[0], fabs(sums[1]) + fabs(sums[2]), 0.0);
  of_x = weight * sign(sums[1]);
  of_y = weight * sign(sums[2]);
}

// x, y, relevance (batch,elements) -> out_x, out_y. A block takes a chunk.
template <class T>
__global__ void __launch_bounds__(kThreads) skip_kernel(const SkipRelevance p, int64_t chunks, bool vector) {
  using Acc = Accumulate<T>;
  constexpr int n = kPiece<T>;
  const Chunk chunk = chunk_of_block(p, chunks);
  double of_x = 1, of_y = 1;
  if (p.ratio) ratio_factors(p, chunks, chunk.sample, of_x, of_y);
  for (int64_t first = chunk.first + int64_t(threadIdx.x) * n; first < chunk.end; first += kThreads * n) {
    const int64_t at = chunk.sample * p.elements + first, count = chunk.end - first;
    Acc r[n], to_x[n], to_y[n];
    skip_shares<T>(p, at, count, vector, r, to_x, to_y);
#pragma unroll
    for (int e = 0; e < n; ++e) {
      to_x[e] *= Acc(of_x);
      to_y[e] *= Acc(of_y);
    }
    store_run(static_cast<T*>(p.out_x) + at, count, vector, to_x);
    store_run(static_cast<T*>(p.out_y) + at, count, vector, to_y);
  }
}

// ---- elementwise rules ------------------------------------------------------------------------------------------------

// grad, x, y -> out:  g |y| / (|y| + eps), or g y / x and g at_zero where x = 0. A thread takes 16 bytes.
template <class T>
__global__ void __launch_bounds__(kThreads) gradient_factor_kernel(const GradientFactor p, bool vector) {
  using Acc = Accumulate<T>;
  constexpr int n = kPiece<T>;
  const int64_t first = (int64_t(blockIdx.x) * kThreads + threadIdx.x) * n, count = p.elements - first;
  if (count <= 0) return;
  vector &= count >= n;
  Acc grad[n], x[n], y[n];
  load_run(static_cast<const T*>(p.grad) + first, count, vector, grad);
  load_run(static_cast<const T*>(p.y) + first, count, vector, y);
  const Acc parameter = Acc(p.parameter);
  if (p.rule == GradientRule::stabilized) {
#pragma unroll
    for (int e = 0; e < n; ++e) grad[e] *= damping(y[e], parameter);
  } else {
    load_run(static_cast<const T*>(p.x) + first, count, vector, x);
#pragma unroll
    for (int e = 0; e < n; ++e) grad[e] *= x[e] == 0 ? parameter : y[e] / x[e];
  }
  store_run(static_cast<T*>(p.out) + first, count, vector, grad);
}

// ---- linear layers ----------------------------------------------------------------------------------------------------

constexpr int kRun = 4;  // elements of a thread: 16 bytes of the wide arrays

// A thread's run of columns: blockIdx.x = row * column blocks + column block.
struct Run {
  int64_t row, first, count;
};
__device__ inline Run run_of_thread(int64_t columns) {
  const int64_t blocks = (columns + kThreads * kRun - 1) / (kThreads * kRun);
  const int64_t first = (blockIdx.x % blocks * kThreads + threadIdx.x) * kRun;
  return {blockIdx.x / blocks, first, columns - first};
}
inline unsigned run_blocks(int64_t rows, int64_t columns) {
  return grid_of(rows * blocks_for(columns, int64_t(kThreads) * kRun));
}

// max(x, 0) and min(x, 0); a NaN stays, as in torch.clamp
template <class Acc>
__device__ Acc positive_part(Acc x) {
  return x < 0 ? Acc(0) : x;
}
template <class Acc>
__device__ Acc negative_part(Acc x) {
  return x > 0 ? Acc(0) : x;
}

// x (rows,columns) -> out (rows,2 columns) = [x+, x-]
template <class T>
__global__ void __launch_bounds__(kThreads) sign_split_kernel(const SignSplit p, bool vector) {
  using Acc = Accumulate<T>;
  const Run run = run_of_thread(p.columns);
  if (run.count <= 0) return;
  Acc x[kRun], up[kRun], down[kRun];
  load_run(static_cast<const T*>(p.x) + run.row * p.columns + run.first, run.count, vector, x);
#pragma unroll
  for (int e = 0; e < kRun; ++e) up[e] = positive_part(x[e]), down[e] = negative_part(x[e]);
  Acc* out = static_cast<Acc*>(p.out) + run.row * 2 * p.columns + run.first;
  store_run(out, run.count, vector, up);
  store_run(out + p.columns, run.count, vector, down);
}

// z, up, down, relevance (rows,columns), bias (columns) -> share, share_up, share_down: the formulas of ../relevance.h
template <class T>
__global__ void __launch_bounds__(kThreads) linear_share_kernel(const LinearShare p, bool vector) {
  using Acc = Accumulate<T>;
  const Run run = run_of_thread(p.columns);
  if (run.count <= 0) return;
  const int64_t at = run.row * p.columns + run.first, out_at = run.row * p.stride + run.first;
  const Acc eps = Acc(p.eps);
  Acc r[kRun], bias[kRun] = {}, z[kRun] = {}, up[kRun] = {}, down[kRun] = {};
  const auto load = [&](const void* from, Acc(&into)[kRun]) {
    if (from) load_run(static_cast<const Acc*>(from) + at, run.count, vector, into);
  };
  const auto store = [&](void* to, const Acc(&from)[kRun]) {
    if (to) store_run(static_cast<Acc*>(to) + out_at, run.count, vector, from);
  };
  load_run(static_cast<const T*>(p.relevance) + at, run.count, vector, r);
  if (p.bias) load_run(static_cast<const T*>(p.bias) + run.first, run.count, vector, bias);
  if (p.rule == LinearRule::epsilon || p.rule == LinearRule::gamma) load(p.z, z);
  if (p.rule != LinearRule::epsilon) load(p.up, up);
  if (p.rule == LinearRule::alphabeta || p.rule == LinearRule::gamma) load(p.down, down);
  switch (p.rule) {
    case LinearRule::epsilon:
#pragma unroll
      for (int e = 0; e < kRun; ++e) r[e] = stabilized_ratio(r[e], z[e] + bias[e], eps);
      break;
    case LinearRule::zplus:
#pragma unroll
      for (int e = 0; e < kRun; ++e) r[e] = stabilized_ratio(r[e], up[e], eps);
      break;
    case LinearRule::alphabeta:
#pragma unroll
      for (int e = 0; e < kRun; ++e) {
        down[e] = -Acc(p.beta) * stabilized_ratio(r[e], down[e] + negative_part(bias[e]), eps);
        r[e] = Acc(p.alpha) * stabilized_ratio(r[e], up[e] + positive_part(bias[e]), eps);
      }
      store(p.share_down, down);
      break;
    case LinearRule::gamma:
#pragma unroll
      for (int e = 0; e < kRun; ++e) {
        const Acc out = z[e] + bias[e], gamma = Acc(p.gamma);
        const Acc favoured = out > 0 ? up[e] + positive_part(bias[e]) : down[e] + negative_part(bias[e]);
        r[e] = out == 0 ? Acc(0) : stabilized_ratio(r[e], out + gamma * favoured, eps);
        up[e] = out > 0 ? gamma * r[e] : Acc(0);
        down[e] = out < 0 ? gamma * r[e] : Acc(0);
      }
      store(p.share_up, up);
      store(p.share_down, down);
      break;
  }
  store(p.share, r);
}

// x, plain (rows,columns), by_sign (rows,2 columns) -> out = x o plain + x+ o by_sign[:, :columns] + x- o by_sign[:,
// columns:]
template <class T>
__global__ void __launch_bounds__(kThreads) linear_return_kernel(const LinearReturn p, bool vector) {
  using Acc = Accumulate<T>;
  const Run run = run_of_thread(p.columns);
  if (run.count <= 0) return;
  const int64_t at = run.row * p.columns + run.first;
  Acc x[kRun], out[kRun] = {}, part[kRun];
  load_run(static_cast<const T*>(p.x) + at, run.count, vector, x);
  if (p.plain) {
    load_run(static_cast<const Acc*>(p.plain) + at, run.count, vector, part);
#pragma unroll
    for (int e = 0; e < kRun; ++e) out[e] = x[e] * part[e];
  }
  if (p.by_sign) {
    const Acc* up = static_cast<const Acc*>(p.by_sign) + run.row * 2 * p.columns + run.first;
    load_run(up, run.count, vector, part);
#pragma unroll
    for (int e = 0; e < kRun; ++e) out[e] += positive_part(x[e]) * part[e];
    load_run(up + p.columns, run.count, vector, part);
#pragma unroll
    for (int e = 0; e < kRun; ++e) out[e] += negative_part(x[e]) * part[e];
  }
  store_run(static_cast<T*>(p.out) + at, run.count, vector, out);
}

}  // namespace

// ---- the contract ---------------------------------------------------------------------------------------------------

const char* launch_softmax_relevance(const SoftmaxRelevance& p, void* stream) {
  if (p.rows == 0 || p.columns == 0) return nullptr;
  return with_rows(p.dtype, p.columns, [&](auto element, auto row) {
    using T = typename decltype(element)::type;
    using R = decltype(row);
    const bool vector = can_move_runs<kPiece<T>, T>(p.columns, {p.logits, p.probs, p.relevance, p.out});
    return launch(softmax_kernel<T, R>, grid_of((p.rows + R::kRows - 1) / R::kRows), kThreads, R::kSharedBytes, stream, p,
                  vector);
  });
}

const char* launch_norm_relevance(const NormRelevance& p, void* stream) {
  if (p.rows == 0 || p.columns == 0) return nullptr;
  return with_rows(p.dtype, p.columns, [&](auto element, auto row) {
    using T = typename decltype(element)::type;
    using R = decltype(row);
    const bool vector = can_move_runs<kPiece<T>, T>(p.columns, {p.x, p.upstream, p.weight, p.bias, p.out});
    return launch(norm_kernel<T, R>, grid_of((p.rows + R::kRows - 1) / R::kRows), kThreads, R::kSharedBytes, stream, p,
                  vector);
  });
}

const char* launch_skip_relevance(const SkipRelevance& p, void* stream) {
  if (p.batch == 0 || p.elements == 0) return nullptr;
  return with_dtype(p.dtype, [&](auto element) -> const char* {
    using T = typename decltype(element)::type;
    const bool vector = can_move_runs<kPiece<T>, T>(p.elements, {p.x, p.y, p.relevance, p.out_x, p.out_y});
    const int64_t chunks = skip_chunks(p.elements);
    const unsigned blocks = grid_of(p.batch * chunks);
    if (p.ratio)
      if (const char* error = launch(skip_sums_kernel<T>, blocks, kThreads, kDoubleSumBytes, stream, p, chunks, vector))
        return error;
    return launch(skip_kernel<T>, blocks, kThreads, kDoubleSumBytes, stream, p, chunks, vector);
  });
}

const char* launch_gradient_factor(const GradientFactor& p, void* stream) {
  if (p.elements == 0) return nullptr;
  return with_dtype(p.dtype, [&](auto element) {
    using T = typename decltype(element)::type;
    const bool vector = can_move_runs<kPiece<T>, T>(0, {p.grad, p.x, p.y, p.out});
    const int64_t per_block = int64_t(kThreads) * kPiece<T>;
    return launch(gradient_factor_kernel<T>, grid_of((p.elements + per_block - 1) / per_block), kThreads, 0, stream, p,
                  vector);
  });
}

const char* launch_sign_split(const SignSplit& p, void* stream) {
  if (p.rows == 0 || p.columns == 0) return nullptr;
  return with_dtype(p.dtype, [&](auto element) {
    using T = typename decltype(element)::type;
    const bool vector = can_move_runs<kRun, T>(p.columns, {p.x}) && can_move_runs<kRun, Accumulate<T>>(p.columns, {p.out});
    return launch(sign_split_kernel<T>, run_blocks(p.rows, p.columns), kThreads, 0, stream, p, vector);
  });
}

const char* launch_linear_share(const LinearShare& p, void* stream) {
  if (p.rows == 0 || p.columns == 0) return nullptr;
  return with_dtype(p.dtype, [&](auto element) {
    using T = typename decltype(element)::type;
    using Acc = Accumulate<T>;
    const bool vector = can_move_runs<kRun, T>(p.columns, {p.bias, p.relevance}) &&
                        can_move_runs<kRun, Acc>(p.stride, {p.z, p.up, p.down}) &&
                        can_move_runs<kRun, Acc>(p.stride, {p.share, p.share_up, p.share_down});
    return launch(linear_share_kernel<T>, run_blocks(p.rows, p.columns), kThreads, 0, stream, p, vector);
  });
}

const char* launch_linear_return(const LinearReturn& p, void* stream) {
  if (p.rows == 0 || p.columns == 0) return nullptr;
  return with_dtype(p.dtype, [&](auto element) {
    using T = typename decltype(element)::type;
    using Acc = Accumulate<T>;
    const bool vector =
        can_move_runs<kRun, T>(p.columns, {p.x, p.out}) && can_move_runs<kRun, Acc>(p.columns, {p.plain, p.by_sign});
    return launch(linear_return_kernel<T>, run_blocks(p.rows, p.columns), kThreads, 0, stream, p, vector);
  });
}

}  // namespace xai
