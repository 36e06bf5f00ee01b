// CUDA side of ../ihvp.h: the LiSSA recursion and its sampler. A step is two kernels (three with many classes): one draws
// the rows and multiplies them with the iterate, one multiplies back and steps.
#include "../philox.h"
#include "glm_tile.cuh"

namespace xai {
namespace {

constexpr int kManyColumns = 128;  // from here on products of square tiles; below, few rows a block to fill the GPU
constexpr int kMostColumns = 16;   // of such a block of few rows
constexpr int kUpdateWarps = 16, kUpdateColumns = 4;

// ---- the number of the step -------------------------------------------------------------------------------------------
// counter[0] is written by the update alone and counter[1] by the rows kernel alone, so no block reads what another writes.

__global__ void start_kernel(int64_t* counter) { counter[0] = counter[1] = 0; }

__device__ inline int64_t step_of_rows(const Lissa& p) { return p.counter[0]; }
__device__ inline int64_t step_of_update(const Lissa& p) { return p.counter[1] - 1; }
__device__ inline void finish_rows(const Lissa& p, int64_t step) {
  if (blockIdx.x == 0 && threadIdx.x == 0) p.counter[1] = step + 1;
}
__device__ inline void finish_update(const Lissa& p, int64_t step) {
  if (blockIdx.x == 0 && threadIdx.x == 0) p.counter[0] = step + 1;
}
__device__ inline int64_t drawn_row(const Lissa& p, int64_t step, int64_t k) {
  return sampled_row(p.seed, p.first_step + step, k, p.rows);
}

// ---- rows: few columns --------------------------------------------------------------------------------------------------

// Right-hand sides are cut into groups: blockIdx.x = tile of rows * groups + group.
struct LissaGroups {
  unsigned groups;
  int64_t sides, per_group;
};

// What a block of the kernel below shares.
template <class Acc>
struct RowsShared {
  Acc *vectors, *tile, *z, *scales;
  __device__ RowsShared(const GlmTile& shape, int columns, Acc* base) : vectors(base) {
    tile = vectors + columns * shape.pitch;
    z = tile + shape.rows * shape.pitch;
    scales = z + shape.z_elements();
  }
  static size_t bytes(const GlmTile& shape, int columns) {
    return (size_t(columns + shape.rows) * shape.pitch + shape.z_elements() + shape.rows) * sizeof(Acc);
  }
};

// X (n,D), state -> gathered (batch,params), outputs (batch,columns) = s W(V^T x). The warps share the params of a row.
template <class Acc, int COLUMNS>
__global__ void __launch_bounds__(kGlmThreads, sizeof(Acc) * COLUMNS <= 64 ? 2 : 1)
    lissa_rows_kernel(const Lissa p, const LissaGroups groups, const GlmTile shape) {
  const int64_t step = step_of_rows(p), params = p.params();
  const int64_t first = int64_t(blockIdx.x / groups.groups) * shape.rows, group = blockIdx.x % groups.groups;
  const int64_t first_side = group * groups.per_group;
  const int sides = int(max(int64_t(0), min(groups.per_group, groups.sides - first_side)));
  const int count = int(min(int64_t(shape.rows), p.batch - first)), columns = sides * shape.classes;
  const RowsShared<Acc> shared(shape, COLUMNS, dynamic_smem<Acc>());
  const Acc* state = static_cast<const Acc*>(p.state) + first_side * p.classes * params;
  const auto row_of = [&](int r) { return drawn_row(p, step, first + r); };
  // Weights and s of the rows; they arrive while the product is computed. 4 rows of at most 16 classes: one a thread.
  const int value_row = threadIdx.x / (shape.classes + 1), value_class = threadIdx.x % (shape.classes + 1);
  Acc held = 0;
  if (value_row < count) {
    const int64_t row = row_of(value_row);
    held = value_class == shape.classes ? sample_weight_of<Acc>(p, row) : weight_of<Acc>(p, p, row, value_class);
  }
  for (int64_t piece = 0; piece < params; piece += shape.pitch) {
    __syncthreads();
    stage_rows(p, shape, piece, count, row_of, shared.tile);
    stage_vectors<true>(state, params, piece, columns, shape.pitch, shared.vectors);
    copy_async_wait();
    __syncthreads();
    multiply_tile<COLUMNS>(shape, shared.tile, shared.vectors, columns, piece > 0, shared.z);
    if (group != 0) continue;
    Acc* gathered = static_cast<Acc*>(p.gathered) + first * params + piece;
    const int staged = int(min(int64_t(shape.pitch), params - piece));
    for (int at = threadIdx.x; at < staged; at += kGlmThreads)
#pragma unroll
      for (int r = 0; r < kWarpRows<Acc>; ++r)
        if (r < count) gathered[r * params + at] = shared.tile[r * shape.pitch + at];
  }
  if (value_row < count && value_class == shape.classes)
    shared.scales[value_row] = held;
  else if (value_row < count)
    shared.z[value_row * shape.z_pitch + shape.z_columns + value_class] = held;
  __syncthreads();
  curve_tile<false>(p, shape, count, sides, row_of, shared.scales, shared.z);
  __syncthreads();
  Acc* outputs = static_cast<Acc*>(p.outputs) + first * p.columns + first_side * p.classes;
  for (int e = threadIdx.x; e < count * columns; e += kGlmThreads)
    outputs[e / columns * p.columns + e % columns] = shared.z[e / columns * shape.z_pitch + e % columns];
  finish_rows(p, step);
}

template <class Acc, int COLUMNS>
const char* launch_few_rows(const Lissa& p, const LissaGroups& groups, void* stream) {
  const int64_t pitch = std::min(glm_padded(p.params()), int64_t(256) * kPiece<Acc>);
  const GlmTile shape = glm_tile<Acc>(p, kWarpRows<Acc>, pitch, kGlmWarps, COLUMNS);
  const int64_t tiles = (p.batch + shape.rows - 1) / shape.rows;
  return launch(lissa_rows_kernel<Acc, COLUMNS>, grid_of(tiles * groups.groups), kGlmThreads,
                RowsShared<Acc>::bytes(shape, COLUMNS), stream, p, groups, shape);
}

// ---- products of square tiles -------------------------------------------------------------------------------------------

constexpr int kDown = 32, kAcross = 64, kDepth = 16, kMicro = 4, kProductThreads = kDown * kAcross / (kMicro * kMicro);
constexpr int kDownPitch = kDown + 4, kAcrossPitch = kAcross + 4;
// Elements of shared memory: the staged tiles, later the product.
constexpr int kProductElements = std::max(kDepth * (kDownPitch + kAcrossPitch), kDown* kAcrossPitch);

// Element e of a thread's share of a tile of WIDTH by kDepth. DEPTH_FIRST: neighbours along the depth are so in memory.
template <int WIDTH, bool DEPTH_FIRST>
struct StagedElement {
  int k, i;
  __device__ explicit StagedElement(int e) {
    const int at = threadIdx.x + e * kProductThreads;
    k = DEPTH_FIRST ? at % kDepth : at / WIDTH;
    i = DEPTH_FIRST ? at / kDepth : at % WIDTH;
  }
};

// sums[i][j] = sum_k a(k, 4 y + i) b(k, 4 x + j) for thread (y, x) of 8 by 16. a and b give 0 outside their matrix. The next
// tile is loaded while one is worked on.
template <bool DEPTH_FIRST, class Acc, class A, class B>
__device__ void tile_product(int64_t depth, A a, B b, Acc* shared, Acc (&sums)[kMicro][kMicro]) {
  constexpr int a_share = kDown * kDepth / kProductThreads, b_share = kAcross * kDepth / kProductThreads;
  using ElementA = StagedElement<kDown, DEPTH_FIRST>;
  using ElementB = StagedElement<kAcross, DEPTH_FIRST>;
  Acc *a_tile = shared, *b_tile = shared + kDepth * kDownPitch, a_next[a_share], b_next[b_share];
  const int y = threadIdx.x / (kAcross / kMicro), x = threadIdx.x % (kAcross / kMicro);
  const auto fetch = [&](int64_t first) {
#pragma unroll
    for (int e = 0; e < a_share; ++e) a_next[e] = a(first + ElementA(e).k, ElementA(e).i);
#pragma unroll
    for (int e = 0; e < b_share; ++e) b_next[e] = b(first + ElementB(e).k, ElementB(e).i);
  };
  fetch(0);
  for (int64_t first = 0; first < depth; first += kDepth) {
    __syncthreads();
#pragma unroll
    for (int e = 0; e < a_share; ++e) a_tile[ElementA(e).k * kDownPitch + ElementA(e).i] = a_next[e];
#pragma unroll
    for (int e = 0; e < b_share; ++e) b_tile[ElementB(e).k * kAcrossPitch + ElementB(e).i] = b_next[e];
    __syncthreads();
    if (first + kDepth < depth) fetch(first + kDepth);
#pragma unroll 4
    for (int k = 0; k < kDepth; ++k) {
      Acc left[kMicro], right[kMicro];
      load_run(a_tile + k * kDownPitch + y * kMicro, kMicro, true, left);
      load_run(b_tile + k * kAcrossPitch + x * kMicro, kMicro, true, right);
#pragma unroll
      for (int i = 0; i < kMicro; ++i)
#pragma unroll
        for (int j = 0; j < kMicro; ++j) sums[i][j] += left[i] * right[j];
    }
  }
}

// ---- rows: many columns -------------------------------------------------------------------------------------------------

// What of the columns a block takes: whole right-hand sides where they fit, so that it can apply the curvature.
struct ColumnTiles {
  int64_t count;
  int width;
  bool whole;
};
ColumnTiles column_tiles(const Lissa& p) {
  const bool whole = p.classes <= kAcross;
  const int width = whole ? int(kAcross / p.classes * p.classes) : kAcross;
  return {(p.columns + width - 1) / width, width, whole};
}

template <class Acc>
__device__ Acc element_of(const GlmRows& p, int64_t row, int64_t d) {
  if (d >= p.dim) return Acc(p.intercept && d == p.dim);
  const int64_t at = row * p.row_stride + d;
  switch (p.dtype) {
    case Dtype::f64: return to_accumulate<Acc>(static_cast<const double*>(p.x)[at]);
    case Dtype::f16: return to_accumulate<Acc>(static_cast<const __half*>(p.x)[at]);
    case Dtype::bf16: return to_accumulate<Acc>(static_cast<const __nv_bfloat16*>(p.x)[at]);
    default: return to_accumulate<Acc>(static_cast<const float*>(p.x)[at]);
  }
}

// product (kDown,kAcrossPitch) of `sides` right-hand sides -> s W(product), in place
template <class Acc>
__device__ void curve_product(const Lissa& p, int count, int sides, const int64_t* drawn, int lane_count, Acc* product) {
  const int items = count * sides;
  for (int first = 0; first < items; first += kProductThreads / lane_count) {
    const int item = first + threadIdx.x / lane_count;
    const Lanes lanes{int(threadIdx.x) % lane_count, lane_count, item < items};
    const int r = lanes.valid ? item / sides : 0, side = lanes.valid ? item % sides : 0;
    const int64_t row = drawn[r];
    apply_curvature(
        lanes, p.classes, p.family == Family::softmax, sample_weight_of<Acc>(p, row),
        [&](int64_t c) { return weight_of<Acc>(p, p, row, c); }, product + r * kAcrossPitch + side * p.classes);
  }
}

// As lissa_rows_kernel. blockIdx.x = tile of rows * column tiles + column tile; without whole right-hand sides in a tile it
// leaves V^T x for lissa_curve_kernel.
template <class Acc>
__global__ void __launch_bounds__(kProductThreads)
    lissa_many_rows_kernel(const Lissa p, const ColumnTiles tiles, int lane_count) {
  const int64_t step = step_of_rows(p), params = p.params();
  const int64_t first = blockIdx.x / tiles.count * kDown, column_tile = blockIdx.x % tiles.count;
  const int64_t first_column = column_tile * tiles.width;
  const int count = int(min(int64_t(kDown), p.batch - first));
  const int columns = int(min(int64_t(tiles.width), p.columns - first_column));
  Acc* shared = dynamic_smem<Acc>();
  int64_t* drawn = reinterpret_cast<int64_t*>(shared + kProductElements);
  for (int r = threadIdx.x; r < count; r += kProductThreads) drawn[r] = drawn_row(p, step, first + r);
  __syncthreads();
  const Acc* state = static_cast<const Acc*>(p.state) + first_column * params;
  Acc* gathered = static_cast<Acc*>(p.gathered) + first * params;
  const auto element = [&](int64_t k, int r) {
    if (r >= count || k >= params) return Acc(0);
    const Acc x = element_of<Acc>(p, drawn[r], k);
    if (column_tile == 0) gathered[r * params + k] = x;
    return x;
  };
  const auto vector = [&](int64_t k, int c) { return c < columns && k < params ? state[c * params + k] : Acc(0); };
  Acc sums[kMicro][kMicro] = {};
  tile_product<true>(params, element, vector, shared, sums);
  __syncthreads();
  const int y = threadIdx.x / (kAcross / kMicro), x = threadIdx.x % (kAcross / kMicro);
#pragma unroll
  for (int i = 0; i < kMicro; ++i) store_run(shared + (y * kMicro + i) * kAcrossPitch + x * kMicro, kMicro, true, sums[i]);
  __syncthreads();
  if (tiles.whole) {
    curve_product(p, count, columns / int(p.classes), drawn, lane_count, shared);
    __syncthreads();
  }
  Acc* outputs = static_cast<Acc*>(p.outputs) + first * p.columns + first_column;
  for (int e = threadIdx.x; e < count * columns; e += kProductThreads)
    outputs[e / columns * p.columns + e % columns] = shared[e / columns * kAcrossPitch + e % columns];
  finish_rows(p, step);
}

// outputs (batch,columns): V^T x -> s W(V^T x). A warp takes a row of a right-hand side.
template <class Acc>
__global__ void __launch_bounds__(kGlmThreads) lissa_curve_kernel(const Lissa p) {
  const int64_t sides = p.columns / p.classes, item = int64_t(blockIdx.x) * kGlmWarps + warp_index();
  const Lanes lanes{lane_index(), kWarp, item < p.batch * sides};
  const int64_t row = drawn_row(p, step_of_update(p), lanes.valid ? item / sides : 0);
  apply_curvature(
      lanes, p.classes, p.family == Family::softmax, sample_weight_of<Acc>(p, row),
      [&](int64_t c) { return weight_of<Acc>(p, p, row, c); },
      static_cast<Acc*>(p.outputs) + (lanes.valid ? item : 0) * p.classes);
}

template <class Acc>
const char* launch_many_rows(const Lissa& p, void* stream) {
  const ColumnTiles tiles = column_tiles(p);
  const size_t shared = kProductElements * sizeof(Acc) + kDown * sizeof(int64_t);
  if (const char* error = launch(lissa_many_rows_kernel<Acc>, grid_of((p.batch + kDown - 1) / kDown * tiles.count),
                                 kProductThreads, shared, stream, p, tiles, curvature_lanes(p.classes)))
    return error;
  if (tiles.whole) return nullptr;
  const int64_t items = p.batch * (p.columns / p.classes);
  return launch(lissa_curve_kernel<Acc>, grid_of((items + kGlmWarps - 1) / kGlmWarps), kGlmThreads, 0, stream, p);
}

// ---- update -------------------------------------------------------------------------------------------------------------

// One parameter: v <- g + v - (sum / batch + ridge v) / sigma. The mean of the iterates is their sum until the last step.
template <class Acc>
__device__ void update_param(const Lissa& p, int64_t step, int64_t column, int64_t d, Acc sum) {
  const int64_t at = column * p.params() + d;
  const Acc ridge = Acc(p.intercept && d == p.dim ? p.damping : p.l2 + p.damping);
  Acc *state = static_cast<Acc*>(p.state), *average = static_cast<Acc*>(p.average);
  const Acc v = state[at], g = static_cast<const Acc*>(p.gradient)[at];
  const Acc before = step > p.skip ? average[at] : Acc(0);  // with the others: one wait
  const Acc curved = sum / Acc(p.batch) + ridge * v;
  const Acc next = g + v - curved / Acc(p.sigma);
  state[at] = next;
  if (step < p.skip) return;
  const Acc total = step == p.skip ? next : before + next;
  average[at] = step == p.steps - 1 ? total / Acc(p.steps - p.skip) : total;
}

// gathered (batch,params), outputs (batch,columns) -> state, average. A block takes 32 params of kUpdateColumns columns; its
// warps share the batch, and their sums are added in order.
template <class Acc>
__global__ void __launch_bounds__(kUpdateWarps* kWarp) lissa_update_kernel(const Lissa p) {
  const int64_t step = step_of_update(p), params = p.params(), tiles = (params + kWarp - 1) / kWarp;
  const int64_t d = blockIdx.x % tiles * kWarp + lane_index(), first_column = blockIdx.x / tiles * kUpdateColumns;
  const int warp = warp_index(), columns = int(min(int64_t(kUpdateColumns), p.columns - first_column));
  const Acc* gathered = static_cast<const Acc*>(p.gathered) + d;
  const Acc* outputs = static_cast<const Acc*>(p.outputs) + first_column;
  Acc sums[kUpdateColumns] = {};
  if (d < params) {
    const int64_t end = (warp + 1) * p.batch / kUpdateWarps;
#pragma unroll 8
    for (int64_t b = warp * p.batch / kUpdateWarps; b < end; ++b) {
      const Acc x = gathered[b * params];
#pragma unroll
      for (int c = 0; c < kUpdateColumns; ++c)
        if (c < columns) sums[c] += outputs[b * p.columns + c] * x;
    }
  }
  Acc* shared = dynamic_smem<Acc>();  // (warps,columns,32)
#pragma unroll
  for (int c = 0; c < kUpdateColumns; ++c) shared[(warp * kUpdateColumns + c) * kWarp + lane_index()] = sums[c];
  __syncthreads();
  if (warp < columns && d < params) {
    Acc sum = 0;
    for (int w = 0; w < kUpdateWarps; ++w) sum += shared[(w * kUpdateColumns + warp) * kWarp + lane_index()];
    update_param(p, step, first_column + warp, d, sum);
  }
  finish_update(p, step);
}

// As lissa_update_kernel, by tiles of kDown columns and kAcross params.
template <class Acc>
__global__ void __launch_bounds__(kProductThreads) lissa_many_update_kernel(const Lissa p) {
  const int64_t params = p.params(), tiles = (params + kAcross - 1) / kAcross;
  const int64_t first_param = blockIdx.x % tiles * kAcross, first_column = blockIdx.x / tiles * kDown;
  const auto output = [&](int64_t b, int c) {
    const bool inside = b < p.batch && first_column + c < p.columns;
    return inside ? static_cast<const Acc*>(p.outputs)[b * p.columns + first_column + c] : Acc(0);
  };
  const auto element = [&](int64_t b, int d) {
    const bool inside = b < p.batch && first_param + d < params;
    return inside ? static_cast<const Acc*>(p.gathered)[b * params + first_param + d] : Acc(0);
  };
  Acc sums[kMicro][kMicro] = {};
  tile_product<false>(p.batch, output, element, dynamic_smem<Acc>(), sums);
  const int64_t column = first_column + threadIdx.x / (kAcross / kMicro) * kMicro;
  const int64_t d = first_param + threadIdx.x % (kAcross / kMicro) * kMicro, step = step_of_update(p);
#pragma unroll
  for (int i = 0; i < kMicro; ++i)
#pragma unroll
    for (int j = 0; j < kMicro; ++j)
      if (column + i < p.columns && d + j < params) update_param(p, step, column + i, d + j, sums[i][j]);
  finish_update(p, step);
}

// ---- one step -----------------------------------------------------------------------------------------------------------

template <class Acc>
const char* launch_many_step(const Lissa& p, void* stream) {
  if (const char* error = launch_many_rows<Acc>(p, stream)) return error;
  const int64_t blocks = (p.params() + kAcross - 1) / kAcross * ((p.columns + kDown - 1) / kDown);
  return launch(lissa_many_update_kernel<Acc>, grid_of(blocks), kProductThreads, kProductElements * sizeof(Acc), stream, p);
}

template <class Acc>
const char* launch_few_step(const Lissa& p, void* stream) {
  const int64_t sides = p.columns / p.classes, most = kMostColumns / p.classes;
  const unsigned count = blocks_for(sides, most);
  const LissaGroups groups{count, sides, (sides + count - 1) / count};
  const int64_t columns = groups.per_group * p.classes;
  const char* error = columns <= 1    ? launch_few_rows<Acc, 1>(p, groups, stream)
                      : columns <= 4  ? launch_few_rows<Acc, 4>(p, groups, stream)
                      : columns <= 10 ? launch_few_rows<Acc, 10>(p, groups, stream)
                                      : launch_few_rows<Acc, kMostColumns>(p, groups, stream);
  if (error) return error;
  const int64_t blocks = (p.params() + kWarp - 1) / kWarp * ((p.columns + kUpdateColumns - 1) / kUpdateColumns);
  return launch(lissa_update_kernel<Acc>, grid_of(blocks), kUpdateWarps * kWarp,
                kUpdateWarps * kWarp * kUpdateColumns * sizeof(Acc), stream, p);
}

constexpr int kSampleThreads = 256;

__global__ void __launch_bounds__(kSampleThreads)
    sample_rows_kernel(int64_t* out, int64_t rows, int64_t count, uint64_t seed, int64_t step) {
  const int64_t k = int64_t(blockIdx.x) * kSampleThreads + threadIdx.x;
  if (k < count) out[k] = sampled_row(seed, step, k, rows);
}

}  // namespace

// ---- the contract -------------------------------------------------------------------------------------------------------

const char* launch_lissa(const Lissa& p, void* stream) {
  if (const char* error = launch(start_kernel, 1, 1, 0, stream, p.counter)) return error;
  return with_accumulate(p.accumulate, [&](auto accumulate) {
    using Acc = typename decltype(accumulate)::type;
    const bool many = p.columns >= kManyColumns || p.classes > kMostColumns;
    return launch_repeated(stream, p.steps, [&](void* target) {
      return many ? launch_many_step<Acc>(p, target) : launch_few_step<Acc>(p, target);
    });
  });
}

const char* launch_sample_rows(int64_t* out, int64_t rows, int64_t count, uint64_t seed, int64_t step, void* stream) {
  if (count == 0) return nullptr;
  return launch(sample_rows_kernel, grid_of((count + kSampleThreads - 1) / kSampleThreads), kSampleThreads, 0, stream, out,
                rows, count, seed, step);
}

}  // namespace xai
