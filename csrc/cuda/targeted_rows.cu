// CUDA side of targeted_rows in ../relevance.h. The matrix Abar exists only as tiles of pairs:
//
//   row sums (normalize)   queries stationary, keys stream: the sums of w I + E, then coefficients are divided by them
//   columns                keys stationary, queries stream: sum_i c_i E_ij, in slots that are added in order
#include "../relevance.h"
#include "pair_scores.cuh"
#include "row_step.cuh"

namespace xai {
namespace {

constexpr int kTargetedRowGroup = 4;  // rows r whose sums a thread keeps in registers

template <class Acc>
struct TargetedArrays : AttentionOperands<Acc> {
  PackedRows<Acc> gradient;  // (B,H,N,Dv): dO
  Acc* coefficient;          // (B,R,padded): c, zero in the padding
  Acc* partial;              // (B,slots,R,N)
  Acc* row_sums;             // (B,sum_slots,N): partial row sums of sum_h E
  int64_t slots, sum_slots;
  bool by_relevance, clamp;  // by_relevance: W = P o (S V^T), else W = P
};

// Tiles of q, dO and S, and of k and v, of which either kind stands still, and one of pairs for the mask.
template <class Product>
struct TargetedTiles {
  using Acc = typename Product::Acc;
  static constexpr size_t bytes(int stationary, int moving) {
    return (stationary * Product::kStationaryTile + moving * Product::kMovingTile + Product::kPairTile) * sizeof(Acc);
  }
  static constexpr size_t kColumnsBytes = bytes(2, 3), kRowSumsBytes = bytes(3, 2);
  static_assert(kColumnsBytes <= kMostSharedBytes && kRowSumsBytes <= kMostSharedBytes, "too much shared memory");
};

// query: tiles of q, dO and S; key: tiles of k and v -> x = E of one head for the pairs of a thread
template <class Product, bool KEYS_STATIONARY>
__device__ void targeted_pairs(const PairScores<Product, KEYS_STATIONARY>& scores,
                               const TargetedArrays<typename Product::Acc>& w, int64_t b, int64_t h, int64_t query0,
                               int64_t key0, const QueryValues<Product, KEYS_STATIONARY>& shift,
                               const typename Product::Acc* query, const typename Product::Acc* key,
                               typename Product::Pairs& x) {
  using Acc = typename Product::Acc;
  constexpr int query_tile = KEYS_STATIONARY ? Product::kMovingTile : Product::kStationaryTile;
  const Acc *gradient = query + query_tile, *share = gradient + query_tile;
  const Acc* value = key + (KEYS_STATIONARY ? Product::kStationaryTile : Product::kMovingTile);
  const auto multiply = [&](const Acc* of_query, const Acc* of_key, int width, typename Product::Pairs& products) {
    Product::multiply(KEYS_STATIONARY ? of_key : of_query, KEYS_STATIONARY ? of_query : of_key, width, products);
  };
  const auto times = [&](const Acc* of_query) {
    typename Product::Pairs factors;
    multiply(of_query, value, w.value.width, factors);
#pragma unroll
    for (int i = 0; i < Product::kRows; ++i)
#pragma unroll
      for (int j = 0; j < Product::kColumns; ++j) x[i][j] *= factors[i][j];
  };
  multiply(query, key, w.query.width, x);
  scores.probabilities(b, h, query0, key0, shift, x, [](int, int, Acc, Acc probability) { return probability; });
  if (w.by_relevance) times(share);
  times(gradient);
  if (!w.clamp) return;
#pragma unroll
  for (int i = 0; i < Product::kRows; ++i)
#pragma unroll
    for (int j = 0; j < Product::kColumns; ++j) x[i][j] = x[i][j] < 0 ? Acc(0) : x[i][j];  // a NaN stays
}

// Copies q, dO and S of `rows` queries.
template <class Product>
__device__ void copy_queries(const TargetedArrays<typename Product::Acc>& w, int64_t b, int64_t h, int64_t query0, int rows,
                             typename Product::Acc* tiles) {
  const int tile = rows * Product::kPitch;
  copy_tile<Product>(tiles, w.query.at(b, h, query0), rows, w.query.width);
  copy_tile<Product>(tiles + tile, w.gradient.at(b, h, query0), rows, w.gradient.width);
  if (w.by_relevance) copy_tile<Product>(tiles + 2 * tile, w.share.at(b, h, query0), rows, w.share.width);
}

// Copies k and v of `rows` keys.
template <class Product>
__device__ void copy_keys(const TargetedArrays<typename Product::Acc>& w, int64_t b, int64_t kv_head, int64_t key0, int rows,
                          typename Product::Acc* tiles) {
  copy_tile<Product>(tiles, w.key.at(b, kv_head, key0), rows, w.key.width);
  copy_tile<Product>(tiles + rows * Product::kPitch, w.value.at(b, kv_head, key0), rows, w.value.width);
}

// Adds the sums of a block's threads that belong to the same stationary row, in order, and writes out[row] below `limit`.
// shared: kWarpsAcross * kStationary elements that no thread uses any more.
template <class Product>
__device__ void store_row_sums(const typename Product::Acc (&sums)[Product::kRows], typename Product::Acc* shared,
                               typename Product::Acc* out, int64_t limit) {
  __syncthreads();
#pragma unroll
  for (int i = 0; i < Product::kRows; ++i) {
    const auto sum = row_lanes_sum(sums[i]);
    if (lane_column() == 0) shared[warp_index() % Product::kWarpsAcross * Product::kStationary + Product::row(i)] = sum;
  }
  __syncthreads();
  const int row = threadIdx.x;
  if (row >= Product::kStationary || row >= limit) return;
  auto total = shared[row];
  for (int warp = 1; warp < Product::kWarpsAcross; ++warp) total += shared[warp * Product::kStationary + row];
  out[row] = total;
}

// query, dO, share, key, value, shift, coefficient -> partial (B,slots,R,N):
//   partial[b,s,r,j] = sum_{(h,i) in slot s} c[b,r,i] E_hij
// blockIdx.x = ((b * row groups + group) * slots + slot) * key blocks + key block. A block keeps its keys and meets the
// queries that are needed, head after head.
template <class Product>
__global__ void __launch_bounds__(Product::kThreads, Product::kBlocksPerMultiprocessor)
    targeted_columns_kernel(const AttentionScores p, const TargetedArrays<typename Product::Acc> w, int64_t n_rows) {
  using Acc = typename Product::Acc;
  const int64_t blocks = (p.keys + Product::kStationary - 1) / Product::kStationary;
  const int64_t groups = (n_rows + kTargetedRowGroup - 1) / kTargetedRowGroup;
  const int64_t key0 = blockIdx.x % blocks * Product::kStationary, slot = blockIdx.x / blocks % w.slots;
  const int64_t first_row = blockIdx.x / blocks / w.slots % groups * kTargetedRowGroup;
  const int64_t b = blockIdx.x / blocks / w.slots / groups;
  const int rows = int(min(int64_t(kTargetedRowGroup), n_rows - first_row));
  const int64_t first_tile = p.causal ? key0 / Product::kMoving : 0;
  const int64_t head_tiles = (p.tokens + Product::kMoving - 1) / Product::kMoving - first_tile;
  const int64_t begin = slot * (p.heads * head_tiles) / w.slots, end = (slot + 1) * (p.heads * head_tiles) / w.slots;

  Acc* key = dynamic_smem<Acc>();
  Acc* query = key + 2 * Product::kStationaryTile;
  Acc* addends = query + 3 * Product::kMovingTile;
  const PairScores<Product, true> scores(p, w.scale, addends);
  const Acc* coefficient = w.coefficient + (b * n_rows + first_row) * w.padded;
  Acc sums[kTargetedRowGroup][Product::kRows] = {};
  for (int64_t h = begin / head_tiles; h * head_tiles < end; ++h) {
    const int64_t tile_end = first_tile + min(head_tiles, end - h * head_tiles);
    const auto next = [&](int64_t tile) {
      while (tile < tile_end && !tile_is_active(w, b, h, tile * Product::kMoving, Product::kMoving)) ++tile;
      return tile;
    };
    const int64_t tile = next(first_tile + max(int64_t(0), begin - h * head_tiles));
    if (tile >= tile_end) continue;
    __syncthreads();
    copy_keys<Product>(w, b, h / (p.heads / p.kv_heads), key0, Product::kStationary, key);
    const auto load = [&](int64_t t, int) { copy_queries<Product>(w, b, h, t * Product::kMoving, Product::kMoving, query); };
    const auto use = [&](int64_t t, int) {
      const int64_t query0 = t * Product::kMoving;
      QueryValues<Product, true> shift;
      shift.load(w.shift + (b * p.heads + h) * w.padded + query0);
      typename Product::Pairs x;
      targeted_pairs<Product, true>(scores, w, b, h, query0, key0, shift, query, key, x);
#pragma unroll
      for (int r = 0; r < kTargetedRowGroup; ++r) {
        if (r >= rows) break;
        QueryValues<Product, true> c;
        c.load(coefficient + r * w.padded + query0);
#pragma unroll
        for (int i = 0; i < Product::kRows; ++i)
#pragma unroll
          for (int j = 0; j < Product::kColumns; ++j) sums[r][i] += c.at(i, j) * x[i][j];
      }
    };
    stream_tiles<1>(tile, tile_end, next, load, use);
  }
  Acc* partial = w.partial + ((b * w.slots + slot) * n_rows + first_row) * p.keys + key0;
#pragma unroll
  for (int r = 0; r < kTargetedRowGroup; ++r)
    if (r < rows) store_row_sums<Product>(sums[r], key, partial + r * p.keys, p.keys - key0);
}

// query, dO, share, key, value, shift -> row_sums (B,sum_slots,N):  row_sums[b,s,i] = sum_{(h,j) in slot s} E_hij
// blockIdx.x = (b * sum_slots + slot) * query blocks + query block. A block keeps its queries and meets the keys.
template <class Product>
__global__ void __launch_bounds__(Product::kThreads, Product::kBlocksPerMultiprocessor)
    targeted_sums_kernel(const AttentionScores p, const TargetedArrays<typename Product::Acc> w) {
  using Acc = typename Product::Acc;
  const int64_t blocks = (p.tokens + Product::kStationary - 1) / Product::kStationary;
  const int64_t query0 = (blocks - 1 - blockIdx.x % blocks) * Product::kStationary;  // causal: the longest first
  const int64_t slot = blockIdx.x / blocks % w.sum_slots, b = blockIdx.x / blocks / w.sum_slots;
  const int64_t last = p.causal ? min(p.keys, query0 + Product::kStationary) : p.keys;
  const int64_t head_tiles = (last + Product::kMoving - 1) / Product::kMoving;
  const int64_t begin = slot * (p.heads * head_tiles) / w.sum_slots;
  const int64_t end = (slot + 1) * (p.heads * head_tiles) / w.sum_slots;

  Acc* query = dynamic_smem<Acc>();
  Acc* key = query + 3 * Product::kStationaryTile;
  Acc* addends = key + 2 * Product::kMovingTile;
  const PairScores<Product, false> scores(p, w.scale, addends);
  Acc sums[Product::kRows] = {};
  const bool needed = tile_is_active(w, b, 0, query0, Product::kStationary);
  for (int64_t h = begin / head_tiles; needed && begin < end && h * head_tiles < end; ++h) {
    QueryValues<Product, false> shift;
    shift.load(w.shift + (b * p.heads + h) * w.padded + query0);
    __syncthreads();
    copy_queries<Product>(w, b, h, query0, Product::kStationary, query);
    const auto load = [&](int64_t t, int) {
      copy_keys<Product>(w, b, h / (p.heads / p.kv_heads), t * Product::kMoving, Product::kMoving, key);
    };
    const auto use = [&](int64_t t, int) {
      typename Product::Pairs x;
      targeted_pairs<Product, false>(scores, w, b, h, query0, t * Product::kMoving, shift, query, key, x);
#pragma unroll
      for (int i = 0; i < Product::kRows; ++i)
#pragma unroll
        for (int j = 0; j < Product::kColumns; ++j) sums[i] += x[i][j];
    };
    stream_tiles<1>(
        max(int64_t(0), begin - h * head_tiles), min(head_tiles, end - h * head_tiles), [](int64_t t) { return t; }, load,
        use);
  }
  Acc* row_sums = w.row_sums + (b * w.sum_slots + slot) * p.tokens + query0;
  store_row_sums<Product>(sums, query, row_sums, p.tokens - query0);
}

// Nothing is summed over D here, so wide heads can take narrower tiles than with_products() gives.
template <class F>
auto with_targeted_products(const TargetedRows& p, F f) {
  const int64_t widest = std::max(p.dim, p.value_dim);
  if (p.dtype == Dtype::f64) return f(Type<TileProduct<double, 256, 16, 8, 2, 2, false>>());
  if (p.dtype != Dtype::f32 || p.tf32) {
    if (widest <= 64) return f(Type<TileProduct<float, 64, 64, 32, 2, 2, true>>());
    if (widest <= 128) return f(Type<TileProduct<float, 128, 32, 32, 2, 2, true>>());
    return f(Type<TileProduct<float, 256, 32, 16, 2, 2, true>>());
  }
  if (widest <= 64) return f(Type<TileProduct<float, 64, 64, 32, 2, 2, false>>());
  if (widest <= 128) return f(Type<TileProduct<float, 128, 32, 32, 2, 2, false>>());
  return f(Type<TileProduct<float, 256, 32, 16, 2, 2, false>>());
}

// Lays the arrays out from `base` and returns the bytes they take.
template <class Product, class Acc = typename Product::Acc>
int64_t targeted_arrays(const TargetedRows& p, char* base, TargetedArrays<Acc>& w) {
  size_operands(p, p.value_dim, false, w);
  w.gradient = w.share;
  w.by_relevance = p.relevance.data != nullptr;
  w.clamp = p.clamp;
  const int64_t blocks = p.batch * blocks_for(p.tokens, Product::kStationary);
  const int64_t units = (p.heads * blocks_for(p.tokens, Product::kMoving) + 1) / 2;  // a slot takes two tiles at least
  w.slots = streamed_slots(blocks * blocks_for(p.n_rows, kTargetedRowGroup), units, p.causal);
  w.sum_slots = p.normalize ? streamed_slots(blocks, units, p.causal) : 0;
  Workspace space{base};
  take_operands(p, w.by_relevance, w, space);
  space.take(w.gradient.data, w.gradient.elements(p.batch));
  space.take(w.coefficient, p.batch * p.n_rows * w.padded);
  space.take(w.partial, p.batch * w.slots * p.n_rows * p.tokens);
  space.take(w.row_sums, p.batch * w.sum_slots * p.tokens);
  return space.used;
}

// Coefficients /= row sums of w I + factor E.
template <class Product, class Acc = typename Product::Acc>
const char* launch_normalize(const TargetedRows& p, const TargetedArrays<Acc>& w, double factor, void* stream) {
  const int64_t blocks = p.batch * w.sum_slots * blocks_for(p.tokens, Product::kStationary);
  if (const char* error = launch(targeted_sums_kernel<Product>, grid_of(blocks), Product::kThreads,
                                 TargetedTiles<Product>::kRowSumsBytes, stream, p, w))
    return error;
  return launch(normalize_coefficients_kernel<Acc>, blocks_for(p.batch * p.tokens, kPrepareThreads), kPrepareThreads, 0,
                stream, w.row_sums, w.coefficient, p.batch, p.n_rows, p.tokens, w.padded, w.sum_slots, p.residual, factor);
}

template <class Product, class Acc = typename Product::Acc>
const char* launch_targeted(const TargetedRows& p, void* stream) {
  TargetedArrays<Acc> w;
  targeted_arrays<Product>(p, static_cast<char*>(p.workspace), w);
  const double factor =
      (p.fusion == Fusion::mean ? 1.0 / double(p.heads) : 1.0) * (w.by_relevance ? p.lam : 1.0);  // lam >= 0
  if (const char* error =
          launch(prepare_rows_kernel<Acc>, blocks_for(p.batch * w.padded, kPrepareThreads), kPrepareThreads, 0, stream,
                 static_cast<const Acc*>(p.rows), w.coefficient, w.active, p.n_rows, p.tokens, w.padded, 1))
    return error;
  if (const char* error = launch_operands<Acc>(p, p.value, p.value_dim, w, Product::kTensor, stream)) return error;
  if (const char* error =
          launch_pack<Acc>(p.grad_out, p.dtype, p.batch, p.tokens, p.value_dim, w.gradient, Product::kTensor, &w, stream))
    return error;
  if (w.by_relevance) {
    const Sharing sharing{p.relevance, p.output, p.eps, false, true};
    if (const char* error = launch_share<Acc>(p, p.value_dim, sharing, w, Product::kTensor, stream)) return error;
  }
  if (p.normalize)
    if (const char* error = launch_normalize<Product>(p, w, factor, stream)) return error;
  const int64_t blocks =
      p.batch * blocks_for(p.n_rows, kTargetedRowGroup) * w.slots * blocks_for(p.tokens, Product::kStationary);
  if (const char* error = launch(targeted_columns_kernel<Product>, grid_of(blocks), Product::kThreads,
                                 TargetedTiles<Product>::kColumnsBytes, stream, p, w, p.n_rows))
    return error;
  return launch(sum_partial_kernel<Acc>, grid_of(p.batch * p.n_rows * blocks_for(p.tokens, kWarp)), kReduceWarps * kWarp,
                kReduceWarps * kWarp * sizeof(Acc), stream, w.partial, static_cast<Acc*>(p.out), w.coefficient, w.padded,
                w.slots, p.n_rows, p.tokens, p.residual, factor);
}

}  // namespace

// ---- the contract ---------------------------------------------------------------------------------------------------

int64_t targeted_workspace_cuda(const TargetedRows& p) {
  return with_targeted_products(p, [&](auto product) {
    using Product = typename decltype(product)::type;
    TargetedArrays<typename Product::Acc> w;
    return targeted_arrays<Product>(p, nullptr, w);
  });
}

const char* launch_targeted_rows(const TargetedRows& p, void* stream) {
  if (p.batch == 0 || p.n_rows == 0) return nullptr;
  if (std::max(p.dim, p.value_dim) > kMaxDim) return "the CUDA kernels take head dimensions up to 256";
  return with_targeted_products(p,
                                [&](auto product) { return launch_targeted<typename decltype(product)::type>(p, stream); });
}

}  // namespace xai
