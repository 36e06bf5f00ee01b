// CUDA side of ../rollout.h: attention given (row step and full form), and streamed from q and k.
#include "../rollout.h"

#include <algorithm>

#include "lse.cuh"
#include "row_step.cuh"
#include "row_tile.cuh"
#include "streamed_scores.cuh"

namespace xai {
namespace {

// ---- attention given ------------------------------------------------------------------------------------------------

struct RowStepBlocks {
  const void* rows;
  void* partial;
  int64_t n_rows, slots;
};

// attention (B,H,N,N), rows (B,R,N) -> partial (B,slots,R,N):  partial[b,s,r,j] = sum_{i in slot s} rows[b,r,i] Abar[b,i,j]
// A thread owns columns j; between tiles its sums rest in `partial`, which stays in the L2 cache.
template <class T, bool VECTOR>
__global__ void __launch_bounds__(kLongRowThreads)
    row_step_kernel(const FusedRows p, const RowStepBlocks q, const RowTileShape shape) {
  using Acc = Accumulate<T>;
  const int64_t b = blockIdx.x / q.slots, slot = blockIdx.x % q.slots;
  const int64_t begin = slot * p.tokens / q.slots, end = (slot + 1) * p.tokens / q.slots;
  const Acc* rows = static_cast<const Acc*>(q.rows) + b * q.n_rows * p.tokens;
  Acc* partial = static_cast<Acc*>(q.partial) + int64_t(blockIdx.x) * q.n_rows * p.tokens;
  RowTile<T, VECTOR> tile(p, shape);
  for (int64_t i0 = begin; i0 < end; i0 += shape.rows) {
    const int count = int(min(int64_t(shape.rows), end - i0));
    tile.load(b, i0, count);
    tile.for_columns([&](int64_t j, auto value) {
      for (int64_t r0 = 0; r0 < q.n_rows; r0 += kRowGroup) {
        const int group = int(min(int64_t(kRowGroup), q.n_rows - r0));
        Acc sums[kRowGroup] = {};
#pragma unroll 2
        for (int i = 0; i < count; ++i) {
          const Acc normalized = tile.inverse(i) * value(i);
#pragma unroll
          for (int r = 0; r < kRowGroup; ++r)
            if (r < group) sums[r] += rows[(r0 + r) * p.tokens + i0 + i] * normalized;
        }
#pragma unroll
        for (int r = 0; r < kRowGroup; ++r)
          if (r < group) {
            Acc& total = partial[(r0 + r) * p.tokens + j];
            total = i0 == begin ? sums[r] : total + sums[r];
          }
      }
    });
  }
}

// attention (B,H,N,N) -> out (B,N,N):  out[b,i,:] = Abar[b,i,:]
template <class T, bool VECTOR, class Out>
__global__ void __launch_bounds__(kLongRowThreads)
    fuse_heads_kernel(const FusedRows p, void* out, const RowTileShape shape) {
  const int64_t tiles = (p.tokens + shape.rows - 1) / shape.rows;
  const int64_t b = blockIdx.x / tiles, begin = blockIdx.x % tiles * shape.rows;
  const int count = int(min(int64_t(shape.rows), p.tokens - begin));
  RowTile<T, VECTOR> tile(p, shape);
  tile.load(b, begin, count);
  Out* rows = static_cast<Out*>(out) + (b * p.tokens + begin) * p.tokens;
  tile.for_columns([&](int64_t j, auto value) {
    for (int i = 0; i < count; ++i) rows[i * p.tokens + j] = Out(value(i) * tile.inverse(i));
  });
}

template <class T, bool VECTOR>
const char* launch_row_step_as(const RowStep& p, void* stream) {
  using Acc = Accumulate<T>;
  const FusedRows fused{p.attention, p.batch, p.heads, p.tokens, p.residual, p.normalize, p.fusion};
  const RowTileShape shape = row_tile_shape<T, VECTOR>(p.tokens, (p.tokens + p.slots - 1) / p.slots);
  const size_t shared = RowTile<T, VECTOR>::shared_bytes(shape);
  const RowStepBlocks blocks{p.rows, p.partial, p.n_rows, p.slots};
  if (const char* error = launch(row_step_kernel<T, VECTOR>, unsigned(p.batch * p.slots), row_threads(shared), shared,
                                 stream, fused, blocks, shape))
    return error;
  return launch(sum_partial_kernel<Acc>, unsigned(p.batch * p.n_rows) * blocks_for(p.tokens, kWarp), kReduceWarps * kWarp,
                kReduceWarps * kWarp * sizeof(Acc), stream, static_cast<const Acc*>(p.partial), static_cast<Acc*>(p.out),
                nullptr, 0, p.slots, p.n_rows, p.tokens, 0, 1);
}

template <class T, bool VECTOR, class Out>
const char* launch_fuse_heads_as(const FuseHeads& p, void* stream) {
  const FusedRows fused{p.attention, p.batch, p.heads, p.tokens, p.residual, p.normalize, p.fusion};
  const RowTileShape shape = row_tile_shape<T, VECTOR>(p.tokens, kRowThreads / kWarp);
  const size_t shared = RowTile<T, VECTOR>::shared_bytes(shape);
  return launch(fuse_heads_kernel<T, VECTOR, Out>, unsigned(p.batch) * blocks_for(p.tokens, shape.rows), row_threads(shared),
                shared, stream, fused, p.out, shape);
}

// ---- streamed from q and k: workspace ---------------------------------------------------------------------------------

// Arrays along the queries are padded to `padded` tokens; all heads need the same queries.
template <class Acc>
struct StreamedArrays : ScoreArrays<Acc> {
  Acc* coefficient;  // (B,R,padded): c, zero in the padding
  Acc* partial;      // (B,slots,R,N)
  Acc* row_sums;     // (B,sum_slots,N): partial row sums of the fused P, for max and min with normalisation
  int64_t slots, sum_slots;
};

inline bool needs_row_sums(const StreamedRowStep& p) { return is_extreme(p.fusion) && p.normalize; }

constexpr int kStreamRowGroup = 8;  // rows r whose sums one block keeps in registers
inline int row_group(const StreamedRowStep& p) { return p.n_rows == 1 ? 1 : kStreamRowGroup; }

// Lays the arrays out from `base` and returns the bytes they take.
template <class Tile, class ExtremeTile, class Acc = typename Tile::Acc>
int64_t streamed_arrays(const StreamedRowStep& p, char* base, StreamedArrays<Acc>& w) {
  const bool extreme = is_extreme(p.fusion);
  const int64_t stationary = extreme ? ExtremeTile::kStationary : Tile::kStationary;
  const int64_t moving_tiles = blocks_for(p.tokens, extreme ? ExtremeTile::kMoving : Tile::kMoving);
  const int64_t blocks = p.batch * blocks_for(p.tokens, stationary);
  w.padded = round_up(p.tokens, kTokenPadding);
  w.active_batch = w.padded / kWarp;
  w.active_head = 0;
  w.slots = streamed_slots(blocks * blocks_for(p.n_rows, row_group(p)), moving_tiles * (extreme ? 1 : p.heads), p.causal);
  w.scale = Acc(p.scale * kLog2e);
  w.aligned = can_copy_pieces<typename Tile::Element>(p);
  w.sum_slots = needs_row_sums(p) ? streamed_slots(blocks, moving_tiles, p.causal) : 0;
  Workspace space{base};
  space.take(w.coefficient, p.batch * p.n_rows * w.padded);
  space.take(w.shift, p.batch * p.heads * w.padded);
  space.take(w.active, p.batch * w.padded / kWarp);
  space.take(w.partial, p.batch * w.slots * p.n_rows * p.tokens);
  space.take(w.row_sums, p.batch * w.sum_slots * p.tokens);
  return space.used;
}

// ---- streamed from q and k: kernels ---------------------------------------------------------------------------------

// What a block of the kernels below works on: blockIdx.x = ((b * row groups + group) * slots + slot) * blocks + block.
struct BlockIndex {
  int64_t b, first_row, slot, stationary0;
};
template <class Tile>
__device__ BlockIndex block_index(int64_t tokens, int64_t slots, int64_t n_rows, int rows_per_group) {
  const int64_t blocks = (tokens + Tile::kStationary - 1) / Tile::kStationary;
  const int64_t groups = (n_rows + rows_per_group - 1) / rows_per_group;
  const int64_t outer = blockIdx.x / blocks / slots;
  return {outer / groups, outer % groups * rows_per_group, blockIdx.x / blocks % slots,
          blockIdx.x % blocks * Tile::kStationary};
}

template <class Tile, int R>
__device__ void add_weighted(typename Tile::Acc (&sums)[R][Tile::kRows],
                             const typename Tile::Acc (&probability)[Tile::kRows][Tile::kColumns],
                             const typename Tile::Acc* coefficient, int64_t pitch, int n_rows) {
#pragma unroll
  for (int r = 0; r < R; ++r) {
    if (r >= n_rows) break;
    typename Tile::Acc c[Tile::kColumns];
    Tile::gather_columns(coefficient + r * pitch, c);
#pragma unroll
    for (int i = 0; i < Tile::kRows; ++i)
#pragma unroll
      for (int j = 0; j < Tile::kColumns; ++j) sums[r][i] += c[j] * probability[i][j];
  }
}

// Writes the sums of a block to out[r * pitch + i] for its tokens i below `limit`.
template <class Tile, int R>
__device__ void store_sums(typename Tile::Acc (&sums)[R][Tile::kRows], typename Tile::Acc* out, int64_t pitch, int n_rows,
                           int64_t limit) {
#pragma unroll
  for (int r = 0; r < R; ++r) {
    if (r >= n_rows) break;
#pragma unroll
    for (int i = 0; i < Tile::kRows; ++i) {
      const auto sum = row_lanes_sum(sums[r][i]);
      if (lane_column() == 0 && Tile::row(i) < limit) out[r * pitch + Tile::row(i)] = sum;
    }
  }
}

// The next tile of queries, from `tile` on, in which some query is needed; `end` if there is none.
template <class Tile>
__device__ int64_t next_tile(const StreamedArrays<typename Tile::Acc>& w, int64_t b, int64_t tile, int64_t end) {
  while (tile < end && !any_active(w, b, 0, tile * Tile::kMoving, Tile::kMoving)) ++tile;
  return tile;
}

// Per moving query: its shift, and its coefficients of R rows. Shared memory of two buffers, filled as the tiles are.
template <class Tile, int R>
class QueryValues {
  using Acc = typename Tile::Acc;

 public:
  static constexpr size_t kBytes = 2 * (1 + R) * Tile::kMoving * sizeof(Acc);
  __device__ explicit QueryValues(char* shared) : values_(reinterpret_cast<Acc*>(shared)) {}
  // shift and coefficient point at the first query of the tile
  __device__ void load(int buffer, const Acc* shift, const Acc* coefficient, int64_t pitch, int n_rows) {
    constexpr int pieces = Tile::kMoving / kPiece<Acc>;
#pragma unroll 1
    for (int c = threadIdx.x; c < (1 + R) * pieces; c += kTileThreads) {
      const int line = c / pieces, column = c % pieces * kPiece<Acc>;
      const bool valid = line <= n_rows;
      const Acc* source = line == 0 || !valid ? shift : coefficient + (line - 1) * pitch;
      copy_async_16(values_ + (buffer * (1 + R) + line) * Tile::kMoving + column, source + column, valid);
    }
  }
  __device__ const Acc* shift(int buffer) const { return values_ + buffer * (1 + R) * Tile::kMoving; }
  __device__ const Acc* coefficient(int buffer) const { return shift(buffer) + Tile::kMoving; }

 private:
  Acc* values_;
};

// Blocks per multiprocessor that the registers must allow: the sums of several rows take the place of one block.
template <class Tile, int R>
constexpr int kColumnBlocks = R > 1 && Tile::kBlocksPerMultiprocessor > 2 ? 2 : Tile::kBlocksPerMultiprocessor;

// key (B,Hkv,N,D), query (B,H,N,D), shift, coefficient -> partial (B,slots,R,N):
//   partial[b,s,r,j] = sum_{(h,i) in slot s} c[b,r,i] 2^{x_hij - shift_hi}
// A block keeps its keys of one head and meets the queries that are needed: the sums over queries stay in registers and no
// two blocks write to the same place.
template <class Tile, int R>
__global__ void __launch_bounds__(kTileThreads, kColumnBlocks<Tile, R>)
    columns_kernel(const StreamedRowStep p, const StreamedArrays<typename Tile::Acc> w) {
  using Acc = typename Tile::Acc;
  const BlockIndex at = block_index<Tile>(p.tokens, w.slots, p.n_rows, R);
  const int n_rows = int(min(int64_t(R), p.n_rows - at.first_row));
  const int64_t tiles = (p.tokens + Tile::kMoving - 1) / Tile::kMoving;
  const int64_t first_tile = p.causal ? at.stationary0 / Tile::kMoving : 0, head_tiles = tiles - first_tile;
  const int64_t begin = at.slot * (p.heads * head_tiles) / w.slots;
  const int64_t end = (at.slot + 1) * (p.heads * head_tiles) / w.slots;

  char* shared = dynamic_smem<char>();
  Scores<Tile, true> scores(p, w, shared, at.b, at.stationary0);
  QueryValues<Tile, R> values(shared + Scores<Tile, true>::shared_bytes(p.dim));
  const Acc* coefficient = w.coefficient + (at.b * p.n_rows + at.first_row) * w.padded;
  Acc sums[R][Tile::kRows] = {};
  for (int64_t h = begin / head_tiles; h * head_tiles < end; ++h) {
    const int64_t tile_end = first_tile + min(head_tiles, end - h * head_tiles);
    int64_t tile = next_tile<Tile>(w, at.b, first_tile + max(int64_t(0), begin - h * head_tiles), tile_end);
    if (tile == tile_end) continue;
    const Acc* shift = w.shift + (at.b * p.heads + h) * w.padded;
    const auto load = [&](int64_t t, int buffer) {
      scores.load_moving(h, t * Tile::kMoving, buffer);
      values.load(buffer, shift + t * Tile::kMoving, coefficient + t * Tile::kMoving, w.padded, n_rows);
    };
    __syncthreads();
    scores.load_stationary(h);
    load(tile, 0);
    for (int buffer = 0; tile < tile_end; buffer ^= 1) {
      const int64_t next = next_tile<Tile>(w, at.b, tile + 1, tile_end);
      scores.tile.wait_moving(buffer);
      if (next < tile_end) load(next, buffer ^ 1);
#pragma unroll 1
      for (int column0 = 0; column0 < Tile::kMoving; column0 += kScoreColumns) {
        Acc shifts[Tile::kColumns];
        Tile::gather_columns(values.shift(buffer) + column0, shifts);
        const auto shift_of_query = [&](int, int j) { return shifts[j]; };
        scores.probabilities(h, tile * Tile::kMoving, buffer, column0, shift_of_query, [&](const auto& probability) {
          add_weighted<Tile>(sums, probability, values.coefficient(buffer) + column0, Tile::kMoving, n_rows);
        });
      }
      tile = next;
    }
  }
  Acc* partial = w.partial + ((at.b * w.slots + at.slot) * p.n_rows + at.first_row) * p.tokens + at.stationary0;
  store_sums<Tile>(sums, partial, p.tokens, n_rows, p.tokens - at.stationary0);
}

// max and min: P of one pair of tiles, fused over the heads. Both tiles change with the head, so nothing can stay loaded.
template <class Tile, bool KEYS_STATIONARY>
__device__ void fused_probabilities(Scores<Tile, KEYS_STATIONARY>& scores, const StreamedRowStep& p,
                                    const typename Tile::Acc* shift, int64_t padded, int64_t stationary0, int64_t moving0,
                                    typename Tile::Acc (&fused)[Tile::kRows][Tile::kColumns]) {
  using Acc = typename Tile::Acc;
#pragma unroll
  for (int i = 0; i < Tile::kRows; ++i)
#pragma unroll
    for (int j = 0; j < Tile::kColumns; ++j) fused[i][j] = empty_fusion<Acc>(p.fusion);
  for (int64_t h = 0; h < p.heads; ++h, shift += padded) {
    const auto shift_of_query = [&](int i, int j) {
      return KEYS_STATIONARY ? shift[moving0 + Tile::column(j)] : shift[stationary0 + Tile::row(i)];
    };
    __syncthreads();
    scores.load_stationary(h);
    scores.load_moving(h, moving0, 0);
    scores.tile.wait_moving(0);
    scores.probabilities(h, moving0, 0, 0, shift_of_query, [&](const auto& probability) {
#pragma unroll
      for (int i = 0; i < Tile::kRows; ++i) fuse(fused[i], probability[i], p.fusion);
    });
  }
}

// key (B,Hkv,N,D), query (B,H,N,D), shift, coefficient -> partial (B,slots,R,N):
//   partial[b,s,r,j] = sum_{i in slot s} c[b,r,i] fuse_h 2^{x_hij - shift_hi}
template <class Tile, int R>
__global__ void __launch_bounds__(kTileThreads, 1)
    extreme_columns_kernel(const StreamedRowStep p, const StreamedArrays<typename Tile::Acc> w) {
  using Acc = typename Tile::Acc;
  const BlockIndex at = block_index<Tile>(p.tokens, w.slots, p.n_rows, R);
  const int n_rows = int(min(int64_t(R), p.n_rows - at.first_row));
  const int64_t tiles = (p.tokens + Tile::kMoving - 1) / Tile::kMoving;
  const int64_t first = p.causal ? at.stationary0 / Tile::kMoving : 0;
  const int64_t end = first + (at.slot + 1) * (tiles - first) / w.slots;

  Scores<Tile, true> scores(p, w, dynamic_smem<char>(), at.b, at.stationary0);
  const Acc* coefficient = w.coefficient + (at.b * p.n_rows + at.first_row) * w.padded;
  Acc sums[R][Tile::kRows] = {};
  int64_t tile = next_tile<Tile>(w, at.b, first + at.slot * (tiles - first) / w.slots, end);
  for (; tile < end; tile = next_tile<Tile>(w, at.b, tile + 1, end)) {
    const int64_t query0 = tile * Tile::kMoving;
    Acc fused[Tile::kRows][Tile::kColumns];
    fused_probabilities(scores, p, w.shift + at.b * p.heads * w.padded, w.padded, at.stationary0, query0, fused);
    add_weighted<Tile>(sums, fused, coefficient + query0, w.padded, n_rows);
  }
  Acc* partial = w.partial + ((at.b * w.slots + at.slot) * p.n_rows + at.first_row) * p.tokens + at.stationary0;
  store_sums<Tile>(sums, partial, p.tokens, n_rows, p.tokens - at.stationary0);
}

// query (B,H,N,D), key (B,Hkv,N,D), shift -> row_sums (B,sum_slots,N):
//   row_sums[b,s,i] = sum_{j in slot s} fuse_h 2^{x_hij - shift_hi}
template <class Tile>
__global__ void __launch_bounds__(kTileThreads, 1)
    extreme_row_sums_kernel(const StreamedRowStep p, const StreamedArrays<typename Tile::Acc> w) {
  using Acc = typename Tile::Acc;
  const BlockIndex at = block_index<Tile>(p.tokens, w.sum_slots, 1, 1);
  const int64_t last = p.causal ? min(p.tokens, at.stationary0 + Tile::kStationary) : p.tokens;
  const int64_t tiles = (last + Tile::kMoving - 1) / Tile::kMoving;
  const int64_t begin = at.slot * tiles / w.sum_slots, end = (at.slot + 1) * tiles / w.sum_slots;

  Scores<Tile, false> scores(p, w, dynamic_smem<char>(), at.b, at.stationary0);
  Acc sums[1][Tile::kRows] = {};
  const bool needed = any_active(w, at.b, 0, at.stationary0, Tile::kStationary);
  for (int64_t tile = begin; needed && tile < end; ++tile) {
    Acc fused[Tile::kRows][Tile::kColumns];
    fused_probabilities(scores, p, w.shift + at.b * p.heads * w.padded, w.padded, at.stationary0, tile * Tile::kMoving,
                        fused);
#pragma unroll
    for (int i = 0; i < Tile::kRows; ++i)
#pragma unroll
      for (int j = 0; j < Tile::kColumns; ++j) sums[0][i] += fused[i][j];
  }
  Acc* row_sums = w.row_sums + (at.b * w.sum_slots + at.slot) * p.tokens + at.stationary0;
  store_sums<Tile>(sums, row_sums, p.tokens, 1, p.tokens - at.stationary0);
}

// ---- streamed from q and k: launchers -------------------------------------------------------------------------------

template <class Tile, int R, class Acc = typename Tile::Acc>
const char* launch_columns(const StreamedRowStep& p, const StreamedArrays<Acc>& w, void* stream) {
  const unsigned blocks = unsigned(p.batch * blocks_for(p.n_rows, R) * w.slots) * blocks_for(p.tokens, Tile::kStationary);
  const size_t shared = Scores<Tile, true>::shared_bytes(p.dim) + QueryValues<Tile, R>::kBytes;
  return launch(columns_kernel<Tile, R>, blocks, kTileThreads, shared, stream, p, w);
}

template <class Tile, class Acc = typename Tile::Acc>
const char* launch_extreme_columns(const StreamedRowStep& p, const StreamedArrays<Acc>& w, void* stream) {
  const unsigned key_blocks = blocks_for(p.tokens, Tile::kStationary);
  const size_t shared = Scores<Tile, true>::shared_bytes(p.dim);
  if (needs_row_sums(p)) {
    if (const char* error = launch(extreme_row_sums_kernel<Tile>, unsigned(p.batch * w.sum_slots) * key_blocks, kTileThreads,
                                   shared, stream, p, w))
      return error;
    if (const char* error =
            launch(normalize_coefficients_kernel<Acc>, blocks_for(p.batch * p.tokens, kPrepareThreads), kPrepareThreads, 0,
                   stream, w.row_sums, w.coefficient, p.batch, p.n_rows, p.tokens, w.padded, w.sum_slots, p.residual, 1))
      return error;
  }
  const unsigned groups = blocks_for(p.n_rows, kStreamRowGroup);
  return launch(extreme_columns_kernel<Tile, kStreamRowGroup>, unsigned(p.batch * groups * w.slots) * key_blocks,
                kTileThreads, shared, stream, p, w);
}

// Row sums of P are known only after all heads, so the sums over queries come last: shift, (row sums), columns, reduction.
template <class Tile, class ExtremeTile, class Acc = typename Tile::Acc>
const char* launch_streamed(const StreamedRowStep& p, void* stream) {
  StreamedArrays<Acc> w;
  streamed_arrays<Tile, ExtremeTile>(p, static_cast<char*>(p.workspace), w);
  if (const char* error =
          launch(prepare_rows_kernel<Acc>, blocks_for(p.batch * w.padded, kPrepareThreads), kPrepareThreads, 0, stream,
                 static_cast<const Acc*>(p.rows), w.coefficient, w.active, p.n_rows, p.tokens, w.padded, p.rows_factor))
    return error;
  if (const char* error = launch_shift(p, w, stream)) return error;
  const char* error = is_extreme(p.fusion) ? launch_extreme_columns<ExtremeTile>(p, w, stream)
                      : p.n_rows == 1      ? launch_columns<Tile, 1>(p, w, stream)
                                           : launch_columns<Tile, kStreamRowGroup>(p, w, stream);
  if (error) return error;
  return launch(sum_partial_kernel<Acc>, unsigned(p.batch * p.n_rows) * blocks_for(p.tokens, kWarp), kReduceWarps * kWarp,
                kReduceWarps * kWarp * sizeof(Acc), stream, w.partial, static_cast<Acc*>(p.out), w.coefficient, w.padded,
                w.slots, p.n_rows, p.tokens, p.residual, p.fusion == Fusion::mean ? 1.0 / double(p.heads) : 1.0);
}

}  // namespace

// ---- the contract ---------------------------------------------------------------------------------------------------

int64_t row_step_slots_cuda(int64_t batch, int64_t tokens) {
  // One wave at most: a few blocks more than fit would run alone after all others.
  return std::clamp<int64_t>(kResidentBlocks / std::max<int64_t>(1, batch), 1, std::max<int64_t>(1, tokens));
}

const char* launch_row_step(const RowStep& p, void* stream) {
  if (p.batch == 0 || p.n_rows == 0 || p.tokens == 0) return nullptr;
  return with_dtype(p.dtype, [&](auto element) {
    using T = typename decltype(element)::type;
    return rows_are_aligned(p.attention, sizeof(T)) ? launch_row_step_as<T, true>(p, stream)
                                                    : launch_row_step_as<T, false>(p, stream);
  });
}

const char* launch_fuse_heads(const FuseHeads& p, void* stream) {
  if (p.batch == 0 || p.tokens == 0) return nullptr;
  return with_dtype(p.dtype, [&](auto element) {
    using T = typename decltype(element)::type;
    const auto launch_as = [&](auto out) {
      using Out = decltype(out);
      return rows_are_aligned(p.attention, sizeof(T)) ? launch_fuse_heads_as<T, true, Out>(p, stream)
                                                      : launch_fuse_heads_as<T, false, Out>(p, stream);
    };
    return p.wide ? launch_as(Accumulate<T>()) : launch_as(T());
  });
}

int64_t streamed_workspace_cuda(const StreamedRowStep& p) {
  return with_tiles(p, [&](auto tile, auto extreme_tile) {
    using Tile = typename decltype(tile)::type;
    StreamedArrays<typename Tile::Acc> w;
    return streamed_arrays<Tile, typename decltype(extreme_tile)::type>(p, nullptr, w);
  });
}

const char* launch_streamed_row_step(const StreamedRowStep& p, void* stream) {
  if (p.batch == 0 || p.n_rows == 0 || p.tokens == 0) return nullptr;
  if (p.dim > kMaxDim) return "the CUDA kernels take head dimensions up to 256";
  return with_tiles(p, [&](auto tile, auto extreme_tile) {
    return launch_streamed<typename decltype(tile)::type, typename decltype(extreme_tile)::type>(p, stream);
  });
}

}  // namespace xai
