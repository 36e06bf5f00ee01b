// CUDA side of ../ihvp.h: the Hessian-vector product in one pass over X, and the curvature between two matrix products.
// The rest of the family lies in lissa.cu, influence_scores.cu and projection.cu.
#include "glm_tile.cuh"

namespace xai {
namespace {

// ---- what a block works on --------------------------------------------------------------------------------------------

constexpr int kMostColumns = 16;  // of a block whose sums stay in registers
constexpr int kWideColumns = 8;   // at a time in the kernel for long rows and many classes
constexpr int kWideRows = 16;
constexpr size_t kTwoBlocksShared = 112 * 1024;     // two blocks of this size fit on an H100
constexpr int64_t kMostBlocks = 264;                // two on each multiprocessor of an H100
constexpr int64_t kMostPartial = int64_t(1) << 27;  // elements of the workspace

// Right-hand sides are cut into groups: blockIdx.x = slot * groups + group.
struct SideGroups {
  unsigned groups;
  int64_t sides, per_group;
};
SideGroups side_groups(const GlmHvp& p) {
  const int64_t sides = p.columns / p.classes;
  const int64_t most = p.classes < kMostColumns ? kMostColumns / p.classes : 1;
  const unsigned groups = blocks_for(sides, most);
  return {groups, sides, (sides + groups - 1) / groups};
}

struct HvpBlock {
  int64_t slot, first_side, begin, end;  // rows begin .. end - 1
  int sides, columns;
  __device__ HvpBlock(const GlmHvp& p, const SideGroups& q)
      : slot(blockIdx.x / q.groups), first_side(blockIdx.x % q.groups * q.per_group) {
    begin = slot * p.rows / p.slots;
    end = (slot + 1) * p.rows / p.slots;
    sides = int(max(int64_t(0), min(q.per_group, q.sides - first_side)));
    columns = sides * int(p.classes);
  }
  template <class Acc>
  __device__ const Acc* vectors(const GlmHvp& p) const {
    return static_cast<const Acc*>(p.vectors) + first_side * p.classes * p.params();
  }
  template <class Acc>
  __device__ Acc* partial(const GlmHvp& p) const {
    return static_cast<Acc*>(p.partial) + (slot * p.columns + first_side * p.classes) * p.params();
  }
};

// Weights and s of the rows of a tile: element e of row r = e / (C + 1) is weight e % (C + 1), or s behind the weights.
template <class Acc>
__device__ Acc row_value(const GlmHvp& p, int64_t first, int count, int e) {
  const int per_row = int(p.classes) + 1, r = e / per_row, c = e % per_row;
  if (r >= count) return 0;
  const int64_t row = visited_row(p, first + r);
  if (c == p.classes) return sample_weight_of<Acc>(p, row);
  return from_theta(p) ? Acc(0) : weight_of<Acc>(p, p, row, c);
}
template <class Acc>
__device__ void put_row_value(const GlmHvp& p, const GlmTile& shape, int e, Acc value, Acc* z, Acc* scales) {
  const int per_row = int(p.classes) + 1, r = e / per_row, c = e % per_row;
  if (c == p.classes)
    scales[r] = value;
  else if (!from_theta(p))
    z[r * shape.z_pitch + shape.z_columns + c] = value;
}

// sums[c][e] += sum_r u[r,c] tile[r, at + e] over every step-th row
template <int COLUMNS, class Acc>
__device__ void accumulate_run(const GlmTile& shape, const Acc* tile, const Acc* u, int at, int first, int count, int step,
                               Acc (&sums)[COLUMNS][kPiece<Acc>]) {
  constexpr int n = kPiece<Acc>;
#pragma unroll 2
  for (int r = first; r < count; r += step) {
    Acc x[n];
    load_piece(tile + r * shape.pitch + at, x);
#pragma unroll
    for (int c = 0; c < COLUMNS; c += n) {
      Acc of_row[n];
      load_piece(u + r * shape.z_pitch + c, of_row);
#pragma unroll
      for (int k = 0; k < n; ++k)
        if (c + k < COLUMNS)
#pragma unroll
          for (int e = 0; e < n; ++e) sums[c + k][e] += of_row[k] * x[e];
    }
  }
}

// ---- sums in registers --------------------------------------------------------------------------------------------------

// Runs of 16 bytes of every column that a thread sums up: what the registers hold.
template <class Acc, int COLUMNS>
constexpr int kRuns = COLUMNS <= 2                            ? 4
                      : COLUMNS <= (sizeof(Acc) == 4 ? 6 : 8) ? 2
                                                              : 1;
constexpr int kMostParts = 16;  // threads that share a run of short rows

// Threads that a row takes, as a power of two; the others take other rows.
inline __host__ __device__ int run_threads(int pitch, int piece) {
  int threads = kGlmThreads / kMostParts;
  while (threads < kGlmThreads && threads * piece < pitch) threads *= 2;
  return threads;
}

template <class Acc, int COLUMNS>
struct ResidentShared {
  Acc *vectors, *theta, *tiles, *z, *scales;
  __device__ ResidentShared(const GlmTile& shape, bool with_theta, Acc* base) : vectors(base) {
    theta = vectors + COLUMNS * shape.pitch;
    tiles = theta + (with_theta ? COLUMNS * shape.pitch : 0);
    z = tiles + 2 * shape.rows * shape.pitch;
    scales = z + shape.z_elements();
  }
  static size_t bytes(const GlmTile& shape, bool with_theta) {
    const size_t staged = (with_theta ? 2 : 1) * COLUMNS + 2 * shape.rows;
    return (staged * shape.pitch + shape.z_elements() + shape.rows) * sizeof(Acc);
  }
};

// The sums of the threads that share a run are added in order, in the place of the vectors; then the block writes its slot.
template <class Acc, int COLUMNS>
__device__ void store_resident(const GlmHvp& p, const GlmTile& shape, const HvpBlock& block, int threads,
                               Acc (&sums)[kRuns<Acc, COLUMNS>][COLUMNS][kPiece<Acc>], Acc* total) {
  constexpr int n = kPiece<Acc>;
  const int part = threadIdx.x / threads;
  for (int turn = 0; turn < kGlmThreads / threads; ++turn) {
    __syncthreads();
    if (turn != part) continue;
#pragma unroll
    for (int j = 0; j < kRuns<Acc, COLUMNS>; ++j) {
      const int at = (threadIdx.x % threads + j * threads) * n;
      if (at >= shape.pitch) break;
#pragma unroll
      for (int c = 0; c < COLUMNS; ++c)
#pragma unroll
        for (int e = 0; e < n; ++e) {
          Acc& target = total[c * shape.pitch + at + e];
          target = turn == 0 ? sums[j][c][e] : target + sums[j][c][e];
        }
    }
  }
  __syncthreads();
  Acc* partial = block.partial<Acc>(p);
  for (int c = warp_index(); c < block.columns; c += kGlmWarps)
    for (int64_t d = lane_index(); d < p.params(); d += kWarp) partial[c * p.params() + d] = total[c * shape.pitch + d];
}

// X (n,D), vectors -> partial (slots,columns,params):  partial[slot] = sum_{i in slot} u_i x_i^T,  u_i = s_i W_i(v^T x_i)
// While a tile of rows is worked on, the next one is copied.
template <class Acc, int COLUMNS>
__global__ void __launch_bounds__(kGlmThreads, sizeof(Acc) == 4 && COLUMNS <= 10 ? 2 : 1)
    glm_hvp_kernel(const GlmHvp p, const SideGroups groups, const GlmTile shape) {
  const HvpBlock block(p, groups);
  const bool with_theta = from_theta(p);
  const ResidentShared<Acc, COLUMNS> shared(shape, with_theta, dynamic_smem<Acc>());
  const int threads = run_threads(shape.pitch, kPiece<Acc>);
  const unsigned row_values = shape.rows * (shape.classes + 1);
  const auto load = [&](int64_t first, int buffer) {
    const int count = int(min(int64_t(shape.rows), block.end - first));
    stage_rows(
        p, shape, 0, count, [&](int r) { return visited_row(p, first + r); },
        shared.tiles + buffer * shape.rows * shape.pitch);
  };
  stage_vectors<false>(block.vectors<Acc>(p), p.params(), 0, block.columns, shape.pitch, shared.vectors);
  if (with_theta) stage_vectors<false>(p.theta, p.params(), 0, shape.classes, shape.pitch, shared.theta);
  if (block.begin < block.end) load(block.begin, 0);
  Acc sums[kRuns<Acc, COLUMNS>][COLUMNS][kPiece<Acc>] = {};
  int buffer = 0;
  for (int64_t first = block.begin; first < block.end; first += shape.rows, buffer ^= 1) {
    const int count = int(min(int64_t(shape.rows), block.end - first));
    const Acc* tile = shared.tiles + buffer * shape.rows * shape.pitch;
    copy_async_wait();
    __syncthreads();
    if (first + shape.rows < block.end) load(first + shape.rows, buffer ^ 1);
    const Acc held = row_value<Acc>(p, first, count, threadIdx.x);  // arrives while the product is computed
    multiply_tile<COLUMNS>(shape, tile, shared.vectors, block.columns, false, shared.z);
    if (with_theta) multiply_tile<COLUMNS>(shape, tile, shared.theta, shape.classes, false, shared.z + shape.z_columns);
    if (threadIdx.x < row_values) put_row_value(p, shape, threadIdx.x, held, shared.z, shared.scales);
    __syncthreads();
    curve_tile<true>(
        p, shape, count, block.sides, [&](int r) { return visited_row(p, first + r); }, shared.scales, shared.z);
    __syncthreads();
#pragma unroll
    for (int j = 0; j < kRuns<Acc, COLUMNS>; ++j) {
      const int at = (threadIdx.x % threads + j * threads) * kPiece<Acc>;
      if (at < shape.pitch)
        accumulate_run(shape, tile, shared.z, at, threadIdx.x / threads, count, kGlmThreads / threads, sums[j]);
    }
  }
  store_resident<Acc, COLUMNS>(p, shape, block, threads, sums, shared.vectors);
}

// Whether the sums fit into registers and the tiles into shared memory; the tile then is the largest that does. A thread
// holds one weight at most.
template <class Acc, int COLUMNS>
bool resident_tile(const GlmHvp& p, GlmTile& tile) {
  const int64_t pitch = glm_padded(p.params());
  if (pitch > int64_t(kGlmThreads) * kPiece<Acc> * kRuns<Acc, COLUMNS>) return false;
  const bool with_theta = from_theta(p);
  const size_t most = most_shared_bytes();
  for (const size_t limit : {std::min(kTwoBlocksShared, most), std::min(kGlmMostShared, most)})
    for (int rows = kGlmWarps * kWarpRows<Acc>; rows >= kWarpRows<Acc>; rows /= 2) {
      tile = glm_tile<Acc>(p, rows, pitch, kGlmWarps * kWarpRows<Acc> / rows, COLUMNS);
      if (rows * (p.classes + 1) <= kGlmThreads && ResidentShared<Acc, COLUMNS>::bytes(tile, with_theta) <= limit)
        return true;
    }
  return false;
}

// ---- long rows and many classes: sums in global memory ------------------------------------------------------------------

template <class Acc>
struct WideShared {
  Acc *vectors, *tile, *z, *scales;
  __device__ WideShared(const GlmTile& shape, Acc* base) : vectors(base) {
    tile = vectors + kWideColumns * shape.pitch;
    z = tile + shape.rows * shape.pitch;
    scales = z + shape.z_elements();
  }
  static size_t bytes(const GlmTile& shape) {
    return (size_t(kWideColumns + shape.rows) * shape.pitch + shape.z_elements() + shape.rows) * sizeof(Acc);
  }
};

// z (+)= tile vectors^T for any number of columns. The tile arrives with the first vectors.
template <class Acc>
__device__ void multiply_columns(const GlmTile& shape, const Acc* source, int64_t params, int64_t first, int columns,
                                 const WideShared<Acc>& shared, Acc* z) {
  for (int c = 0; c < columns; c += kWideColumns) {
    const int count = min(kWideColumns, columns - c);
    __syncthreads();  // the vectors before have been used
    stage_vectors<true>(source + c * params, params, first, count, shape.pitch, shared.vectors);
    copy_async_wait();
    __syncthreads();
    multiply_tile<kWideColumns>(shape, shared.tile, shared.vectors, count, first > 0, z + c);
  }
}

// partial (+)= u^T tile. A thread owns a run of params.
template <class Acc>
__device__ void add_to_partial(const GlmHvp& p, const GlmTile& shape, int columns, int64_t first, int count, bool add,
                               const WideShared<Acc>& shared, Acc* partial) {
  constexpr int n = kPiece<Acc>;
  for (int at = threadIdx.x * n; at < shape.pitch; at += kGlmThreads * n)
    for (int c0 = 0; c0 < columns; c0 += kWideColumns) {
      Acc sums[kWideColumns][n] = {};
      accumulate_run(shape, shared.tile, shared.z + c0, at, 0, count, 1, sums);
#pragma unroll
      for (int c = 0; c < kWideColumns; ++c)
#pragma unroll
        for (int e = 0; e < n; ++e) {
          if (c0 + c >= columns || first + at + e >= p.params()) continue;
          Acc& target = partial[(c0 + c) * p.params() + first + at + e];
          target = add ? target + sums[c][e] : sums[c][e];
        }
    }
}

// As glm_hvp_kernel, for rows that are staged piece by piece. Between tiles the sums rest in `partial`, in the L2 cache.
template <class Acc>
__global__ void __launch_bounds__(kGlmThreads, 1)
    glm_hvp_wide_kernel(const GlmHvp p, const SideGroups groups, const GlmTile shape) {
  const HvpBlock block(p, groups);
  const WideShared<Acc> shared(shape, dynamic_smem<Acc>());
  Acc* partial = block.partial<Acc>(p);
  const int64_t last_piece = (p.params() - 1) / shape.pitch * shape.pitch;
  for (int64_t first = block.begin; first < block.end; first += shape.rows) {
    const int count = int(min(int64_t(shape.rows), block.end - first));
    const auto row_of = [&](int r) { return visited_row(p, first + r); };
    for (int64_t piece = 0; piece <= last_piece; piece += shape.pitch) {
      __syncthreads();  // the piece before has been used
      stage_rows(p, shape, piece, count, row_of, shared.tile);
      multiply_columns(shape, block.vectors<Acc>(p), p.params(), piece, block.columns, shared, shared.z);
      if (from_theta(p))
        multiply_columns(shape, static_cast<const Acc*>(p.theta), p.params(), piece, shape.classes, shared,
                         shared.z + shape.z_columns);
    }
    for (int e = threadIdx.x; e < shape.rows * (shape.classes + 1); e += kGlmThreads)
      put_row_value(p, shape, e, row_value<Acc>(p, first, count, e), shared.z, shared.scales);
    __syncthreads();
    curve_tile<true>(p, shape, count, block.sides, row_of, shared.scales, shared.z);
    __syncthreads();
    for (int64_t piece = last_piece; piece >= 0; piece -= shape.pitch) {  // the last one is still there
      if (piece != last_piece) {
        __syncthreads();
        stage_rows(p, shape, piece, count, row_of, shared.tile);
        copy_async_wait();
        __syncthreads();
      }
      add_to_partial(p, shape, block.columns, piece, count, first > block.begin, shared, partial);
    }
  }
}

template <class Acc>
bool wide_tile(const GlmHvp& p, int64_t columns, GlmTile& tile) {
  const int64_t pitch = std::min(glm_padded(p.params()), int64_t(kGlmThreads) * kPiece<Acc>);
  const size_t most = most_shared_bytes();
  for (int rows = kWideRows; rows >= kWarpRows<Acc>; rows /= 2)
    for (const int splits : {kGlmWarps * kWarpRows<Acc> / rows, 1}) {
      tile = glm_tile<Acc>(p, rows, pitch, splits, columns);
      if (columns < (1 << 20) && p.classes < (1 << 20) && WideShared<Acc>::bytes(tile) <= std::min(kGlmMostShared, most))
        return true;
    }
  return false;
}

// ---- ordered sum of the slots -------------------------------------------------------------------------------------------

constexpr int kReduceParts = 8;

// partial (slots,columns,params) -> out = sum / rows + (l2 + damping) v. A block takes 32 elements; its warps add parts of
// the slots, so that many loads are in flight, and the parts are added in order.
template <class Acc>
__global__ void __launch_bounds__(kReduceParts* kWarp) glm_reduce_kernel(const GlmHvp p) {
  const int64_t elements = p.columns * p.params(), at = int64_t(blockIdx.x) * kWarp + lane_index();
  const Acc* source = static_cast<const Acc*>(p.partial) + at;
  const int warp = warp_index();
  Acc sum = 0;
  if (at < elements) {
    const int64_t end = (warp + 1) * p.slots / kReduceParts;
#pragma unroll 8
    for (int64_t slot = warp * p.slots / kReduceParts; slot < end; ++slot) sum += source[slot * elements];
  }
  Acc* sums = dynamic_smem<Acc>();
  sums[threadIdx.x] = sum;
  __syncthreads();
  if (warp != 0 || at >= elements) return;
  for (int w = 1; w < kReduceParts; ++w) sum += sums[w * kWarp + lane_index()];
  const bool of_intercept = p.intercept && at % p.params() == p.dim;
  const Acc ridge = Acc(of_intercept ? p.damping : p.l2 + p.damping);
  static_cast<Acc*>(p.out)[at] = sum / Acc(p.rows) + ridge * static_cast<const Acc*>(p.vectors)[at];
}

// Calls f with the smallest number of columns that a kernel is compiled for and that holds `columns`.
template <class F>
auto with_columns(int64_t columns, F f) {
  if (columns <= 1) return f(std::integral_constant<int, 1>());
  if (columns <= 2) return f(std::integral_constant<int, 2>());
  if (columns <= 4) return f(std::integral_constant<int, 4>());
  if (columns <= 6) return f(std::integral_constant<int, 6>());
  if (columns <= 8) return f(std::integral_constant<int, 8>());
  if (columns <= 10) return f(std::integral_constant<int, 10>());
  if (columns <= 12) return f(std::integral_constant<int, 12>());
  return f(std::integral_constant<int, kMostColumns>());
}

template <class Acc>
const char* launch_partial(const GlmHvp& p, void* stream) {
  const SideGroups groups = side_groups(p);
  const int64_t columns = groups.per_group * p.classes;
  const unsigned blocks = grid_of(p.slots * groups.groups);
  return with_columns(columns, [&](auto constant) -> const char* {
    constexpr int count = decltype(constant)::value;
    GlmTile tile;
    if (columns <= count && resident_tile<Acc, count>(p, tile))
      return launch(glm_hvp_kernel<Acc, count>, blocks, kGlmThreads, ResidentShared<Acc, count>::bytes(tile, from_theta(p)),
                    stream, p, groups, tile);
    if (!wide_tile<Acc>(p, columns, tile)) return "too many classes for the product in one pass; take matrix products";
    return launch(glm_hvp_wide_kernel<Acc>, blocks, kGlmThreads, WideShared<Acc>::bytes(tile), stream, p, groups, tile);
  });
}

// ---- curvature alone ----------------------------------------------------------------------------------------------------

// z (count,columns) -> s W(z). `lane_count` lanes take a row of a right-hand side.
template <class Acc>
__global__ void __launch_bounds__(kGlmThreads) glm_curve_kernel(const GlmCurve p, int lane_count) {
  const int64_t sides = p.columns / p.classes;
  const int64_t item = (int64_t(blockIdx.x) * kGlmThreads + threadIdx.x) / lane_count;
  const Lanes lanes{int(threadIdx.x) % lane_count, lane_count, item < p.count * sides};
  const int64_t i = lanes.valid ? item / sides : 0, row = visited_row(p, p.first + i);
  Acc* z = static_cast<Acc*>(p.z) + (lanes.valid ? item : 0) * p.classes;
  const Acc scale = sample_weight_of<Acc>(p, row);
  const auto logit = [&](int64_t c) { return static_cast<const Acc*>(p.logits)[i * p.classes + c]; };
  const bool softmax = p.family == Family::softmax;
  if (!p.logits) {
    apply_curvature(lanes, p.classes, softmax, scale, [&](int64_t c) { return weight_of<Acc>(p, p, row, c); }, z);
  } else if (softmax) {
    const SoftmaxTerms<Acc> terms = softmax_terms<Acc>(lanes, p.classes, logit);
    apply_curvature(lanes, p.classes, true, scale, [&](int64_t c) { return terms(logit(c)); }, z);
  } else {
    apply_curvature(lanes, p.classes, false, scale, [&](int64_t c) { return curvature_of<Acc>(p, logit(c), row); }, z);
  }
}

}  // namespace

// ---- the contract -------------------------------------------------------------------------------------------------------

int64_t glm_slots_cuda(int64_t rows, int64_t columns, int64_t params) {
  const int64_t groups = (columns + kMostColumns - 1) / kMostColumns;
  const int64_t rows_of_slot = std::max(int64_t(kWideRows), 2 * columns);  // so that partial sums are not more than X
  int64_t slots = std::min(rows / rows_of_slot, std::max(int64_t(1), kMostBlocks / groups));
  slots = std::min(slots, kMostPartial / (columns * params));
  return std::max(int64_t(1), slots);
}

const char* launch_glm_hvp(const GlmHvp& p, void* stream) {
  return with_accumulate(p.accumulate, [&](auto accumulate) {
    using Acc = typename decltype(accumulate)::type;
    if (const char* error = launch_partial<Acc>(p, stream)) return error;
    const int64_t elements = p.columns * p.params();
    return launch(glm_reduce_kernel<Acc>, grid_of((elements + kWarp - 1) / kWarp), kReduceParts * kWarp,
                  kReduceParts * kWarp * sizeof(Acc), stream, p);
  });
}

const char* launch_glm_curve(const GlmCurve& p, void* stream) {
  if (p.count == 0 || p.columns == 0) return nullptr;
  if (from_theta(p) && !p.logits) return "the curvature of theta needs its logits";
  return with_accumulate(p.accumulate, [&](auto accumulate) {
    using Acc = typename decltype(accumulate)::type;
    const int lanes = curvature_lanes(p.classes);
    const int64_t threads = p.count * (p.columns / p.classes) * lanes;
    return launch(glm_curve_kernel<Acc>, grid_of((threads + kGlmThreads - 1) / kGlmThreads), kGlmThreads, 0, stream, p,
                  lanes);
  });
}

}  // namespace xai
