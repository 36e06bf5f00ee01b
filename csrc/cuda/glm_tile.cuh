// Tiles of rows of a generalised linear model, what ihvp.cu and lissa.cu share: rows and vectors staged in shared memory
// in the accumulate type, their products by warps, and the curvature between the two products.
//
//   tile (rows,pitch)         params first .. first + pitch - 1 of every row, the intercept's 1 included; zeros behind
//   vectors (columns,pitch)   the same params of every vector
//   z (splits,rows,z_pitch)   v^T x over the params of each split: z_columns places, then C logits or weights
#pragma once
#include "../ihvp.h"
#include "dispatch.cuh"
#include "row_sums.cuh"

namespace xai {

constexpr int kGlmThreads = 256, kGlmWarps = kGlmThreads / kWarp;
constexpr int kGlmPadding = 8;                 // elements: whole 16-byte pieces of every type
constexpr size_t kGlmMostShared = 160 * 1024;  // sm_80 has 163 KB

inline __host__ __device__ int64_t glm_padded(int64_t elements) {
  return (elements + kGlmPadding - 1) / kGlmPadding * kGlmPadding;
}

// Rows that a warp multiplies at a time: as many as values that warp_sums() adds up.
template <class Acc>
constexpr int kWarpRows = kPiece<Acc>;

struct GlmTile {
  int rows, pitch, splits;          // rows of a tile; elements of a row that are staged; warps that share a row's product
  int z_columns, z_pitch, classes;  // elements of a row of z
  int lanes;                        // that share the classes of a row
  bool vector;                      // rows of X can be read in 16-byte pieces

  __host__ __device__ size_t z_elements() const { return size_t(splits) * rows * z_pitch; }
};

inline bool can_stage_pieces(const GlmRows& p) {
  const size_t bytes = p.dtype == Dtype::f64 ? 8 : p.dtype == Dtype::f32 ? 4 : 2;
  return is_piece_aligned(p.x) && is_piece_multiple(p.row_stride, bytes);
}

// The power of two that holds the classes, at most a warp.
inline int curvature_lanes(int64_t classes) {
  int lanes = 1;
  while (lanes < classes && lanes < kWarp) lanes *= 2;
  return lanes;
}

template <class Acc>
GlmTile glm_tile(const GlmRows& p, int rows, int64_t pitch, int splits, int64_t columns) {
  const int64_t z_columns = glm_padded(columns);
  return {rows,
          int(pitch),
          splits,
          int(z_columns),
          int(z_columns + glm_padded(p.classes)),
          int(p.classes),
          curvature_lanes(p.classes),
          can_stage_pieces(p)};
}

template <class F>
const char* with_accumulate(Dtype accumulate, F f) {
  return accumulate == Dtype::f64 ? f(Type<double>()) : f(Type<float>());
}

__device__ inline int lane_index() { return threadIdx.x % kWarp; }
__device__ inline int64_t visited_row(const GlmRows& p, int64_t i) { return p.index ? p.index[i] : i; }

// ---- staging ----------------------------------------------------------------------------------------------------------

template <class T, class Acc, class RowOf>
__device__ void stage_rows_of(const GlmRows& p, const GlmTile& shape, int64_t first, int count, RowOf row_of, Acc* tile) {
  constexpr int n = kPiece<T>;
  for (int r = warp_index(); r < count; r += blockDim.x / kWarp) {
    const T* source = static_cast<const T*>(p.x) + row_of(r) * p.row_stride + first;
    for (int at = lane_index() * n; at < shape.pitch; at += kWarp * n) {
      Acc* target = tile + r * shape.pitch + at;
      const int64_t left = p.dim - first - at;
      const bool whole = shape.vector && left >= n;
      if (std::is_same_v<T, Acc> && whole) {
        copy_async_16(target, source + at, true);
        continue;
      }
      Acc x[n];
      load_run(source + at, left, whole, x);
#pragma unroll
      for (int e = 0; e < n; ++e)
        if (p.intercept && e == left) x[e] = 1;
#pragma unroll
      for (int e = 0; e < n; e += kPiece<Acc>) store_piece(target + e, x + e);
    }
  }
}

// Rows row_of(0 .. count - 1) of X into the tile; float64 rows need float64 sums. In shared memory after copy_async_wait()
// and a barrier.
template <class Acc, class RowOf>
__device__ void stage_rows(const GlmRows& p, const GlmTile& shape, int64_t first, int count, RowOf row_of, Acc* tile) {
  switch (p.dtype) {
    case Dtype::f64:
      if constexpr (std::is_same_v<Acc, double>) stage_rows_of<double>(p, shape, first, count, row_of, tile);
      return;
    case Dtype::f16: return stage_rows_of<__half>(p, shape, first, count, row_of, tile);
    case Dtype::bf16: return stage_rows_of<__nv_bfloat16>(p, shape, first, count, row_of, tile);
    default: return stage_rows_of<float>(p, shape, first, count, row_of, tile);
  }
}

// source (columns,params). ASYNC, for what is staged again and again: in shared memory after copy_async_wait() and a
// barrier.
template <bool ASYNC, class Acc>
__device__ void stage_vectors(const void* source, int64_t params, int64_t first, int columns, int pitch, Acc* vectors) {
  constexpr int n = kPiece<Acc>;
  const bool whole = ASYNC && is_piece_aligned(source) && params % n == 0;  // `first` is a multiple
  for (int c = warp_index(); c < columns; c += blockDim.x / kWarp) {
    const Acc* vector = static_cast<const Acc*>(source) + c * params + first;
    Acc* target = vectors + c * pitch;
    if (whole) {
      for (int at = lane_index() * n; at < pitch; at += kWarp * n)
        copy_async_16(target + at, vector + at, first + at < params);
    } else {
#pragma unroll 4
      for (int at = lane_index(); at < pitch; at += kWarp) target[at] = first + at < params ? vector[at] : Acc(0);
    }
  }
}

// ---- products ---------------------------------------------------------------------------------------------------------

// Sums over the warp of N values, N a power of two: lane l receives that of values[l % N]. N + 5 - log2 N shuffles or fewer.
template <int N, class Acc>
__device__ Acc warp_sums(Acc (&values)[N]) {
#pragma unroll
  for (int half = N / 2; half; half /= 2) {
    const bool upper = threadIdx.x & half;
#pragma unroll
    for (int i = 0; i < half; ++i) {
      const Acc sent = upper ? values[i] : values[i + half], kept = upper ? values[i + half] : values[i];
      values[i] = kept + __shfl_xor_sync(kAllLanes, sent, half);
    }
  }
  Acc sum = values[0];
#pragma unroll
  for (int bits = N; bits < kWarp; bits *= 2) sum += __shfl_xor_sync(kAllLanes, sum, bits);
  return sum;
}

// z[split,row,c] (+)= sum over the split's params of tile[row] vectors[c], c below `columns`; `vectors` has room for
// COLUMNS. A warp takes kWarpRows rows and one split.
template <int COLUMNS, class Acc>
__device__ void multiply_tile(const GlmTile& shape, const Acc* tile, const Acc* vectors, int columns, bool add, Acc* z) {
  constexpr int n = kPiece<Acc>, R = kWarpRows<Acc>;
  const int groups = shape.rows / R, group = warp_index() % groups, split = warp_index() / groups;
  if (split >= shape.splits) return;
  tile += group * R * shape.pitch;
  Acc sums[COLUMNS][R] = {};
#pragma unroll 1
  for (int at = (split * kWarp + lane_index()) * n; at < shape.pitch; at += shape.splits * kWarp * n) {
    Acc x[R][n];
#pragma unroll
    for (int i = 0; i < R; ++i) load_piece(tile + i * shape.pitch + at, x[i]);
#pragma unroll
    for (int c = 0; c < COLUMNS; ++c) {
      Acc v[n];
      load_piece(vectors + c * shape.pitch + at, v);
#pragma unroll
      for (int i = 0; i < R; ++i)
#pragma unroll
        for (int e = 0; e < n; ++e) sums[c][i] += x[i][e] * v[e];
    }
  }
  z += (split * shape.rows + group * R) * shape.z_pitch;
#pragma unroll
  for (int c = 0; c < COLUMNS; ++c) {
    const Acc sum = warp_sums(sums[c]);
    if (c >= columns || lane_index() >= R) continue;
    Acc& target = z[lane_index() * shape.z_pitch + c];
    target = add ? target + sum : sum;
  }
}

// ---- curvature --------------------------------------------------------------------------------------------------------

template <class Acc>
__device__ Acc lanes_sum(Acc value, int lanes) {
  for (int bits = lanes / 2; bits; bits /= 2) value += __shfl_xor_sync(kAllLanes, value, bits);
  return value;
}
template <class Acc>
__device__ Acc lanes_max(Acc value, int lanes) {
  for (int bits = lanes / 2; bits; bits /= 2) value = larger(value, __shfl_xor_sync(kAllLanes, value, bits));
  return value;
}

// p (1 - p) for p = sigmoid(x), without cancellation.
template <class Acc>
__device__ Acc sigmoid_slope(Acc x) {
  const Acc e = exp(x < 0 ? x : -x);
  return e / ((1 + e) * (1 + e));
}

// The curvature of one-output families.
template <class Acc>
__device__ Acc curvature_of(const GlmCurvature& p, Acc logit, int64_t row) {
  const Acc smoothing = Acc(p.smoothing);
  switch (p.family) {
    case Family::logistic: return sigmoid_slope(logit);
    case Family::poisson: return exp(logit);
    case Family::smooth_hinge:
      return sigmoid_slope((1 - static_cast<const Acc*>(p.target)[row] * logit) / smoothing) / smoothing;
    default: return Acc(1);
  }
}

// The lanes that share a row, and which of them this thread is. Lanes with `valid` off only take part in the shuffles.
struct Lanes {
  int lane, count;
  bool valid;
  template <class F>
  __device__ void for_classes(int64_t classes, F f) const {
    if (valid)
      for (int64_t c = lane; c < classes; c += count) f(c);
  }
};

// exp(logit - largest) * inverse is the probability of a class.
template <class Acc>
struct SoftmaxTerms {
  Acc largest, inverse;
  __device__ Acc operator()(Acc logit) const { return exp(logit - largest) * inverse; }
};
template <class Acc, class Logit>
__device__ SoftmaxTerms<Acc> softmax_terms(const Lanes& lanes, int64_t classes, Logit logit) {
  Acc largest = -infinity<Acc>(), sum = 0;
  lanes.for_classes(classes, [&](int64_t c) { largest = larger(largest, logit(c)); });
  largest = lanes_max(largest, lanes.count);
  lanes.for_classes(classes, [&](int64_t c) { sum += exp(logit(c) - largest); });
  return {largest, 1 / lanes_sum(sum, lanes.count)};
}

// z (classes) -> scale W(z), in place
template <class Acc, class Weight>
__device__ void apply_curvature(const Lanes& lanes, int64_t classes, bool softmax, Acc scale, Weight weight, Acc* z) {
  Acc inner = 0;
  if (softmax) {
    lanes.for_classes(classes, [&](int64_t c) { inner += weight(c) * z[c]; });
    inner = lanes_sum(inner, lanes.count);
  }
  lanes.for_classes(classes, [&](int64_t c) { z[c] = scale * (weight(c) * (z[c] - inner)); });
}

inline __host__ __device__ bool from_theta(const GlmCurvature& p) { return !p.weights && p.theta; }

template <class Acc>
__device__ Acc sample_weight_of(const GlmRows& p, int64_t row) {
  return p.sample_weight ? static_cast<const Acc*>(p.sample_weight)[row] : Acc(1);
}
template <class Acc>
__device__ Acc weight_of(const GlmRows& p, const GlmCurvature& q, int64_t row, int64_t c) {
  return q.weights ? static_cast<const Acc*>(q.weights)[row * p.classes + c] : Acc(1);
}

// z of `sides` right-hand sides -> u = s W(z) in the first split. Behind z stand the weights, or the logits of every split.
// row_of(r): row of X; scales (rows): s. WITH_THETA off: the weights are always given.
template <bool WITH_THETA, class Acc, class RowOf>
__device__ void curve_tile(const GlmCurvature& p, const GlmTile& shape, int count, int sides, RowOf row_of,
                           const Acc* scales, Acc* z) {
  const int at_once = blockDim.x / shape.lanes, classes = shape.classes;
  for (int first = 0; first < count; first += at_once) {
    const int r = first + threadIdx.x / shape.lanes;
    const Lanes lanes{int(threadIdx.x) % shape.lanes, shape.lanes, r < count};
    Acc* row = z + (lanes.valid ? r : 0) * shape.z_pitch;
    const auto add_splits = [&](Acc* values) {
      lanes.for_classes(classes, [&](int64_t c) {
        for (int split = 1; split < shape.splits; ++split) values[c] += values[split * shape.rows * shape.z_pitch + c];
      });
    };
    Acc* weights = row + shape.z_columns;
    const auto weight = [&](int64_t c) { return weights[c]; };
    if constexpr (WITH_THETA)
      if (from_theta(p)) {
        add_splits(weights);
        if (p.family == Family::softmax) {
          const SoftmaxTerms<Acc> terms = softmax_terms<Acc>(lanes, classes, weight);
          lanes.for_classes(classes, [&](int64_t c) { weights[c] = terms(weights[c]); });
        } else if (lanes.valid) {
          weights[0] = curvature_of(p, weights[0], row_of(r));
        }
      }
    for (int side = 0; side < sides; ++side) {
      add_splits(row + side * classes);
      apply_curvature(lanes, classes, p.family == Family::softmax, lanes.valid ? scales[r] : Acc(0), weight,
                      row + side * classes);
    }
  }
}

}  // namespace xai
