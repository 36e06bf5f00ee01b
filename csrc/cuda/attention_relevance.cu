// CUDA side of av_relevance and attention_relevance in ../relevance.h.
//
//   O = P V and S = R / stab(O)      operands.cu, or the kernels for an attention matrix that is given
//   keys stationary, queries stream  P^T S and G^T Q, over all query heads of a key head; in slots that are added in order
//   queries stationary, keys stream  G K
#include "../relevance.h"
#include "pair_scores.cuh"

namespace xai {
namespace {

// The most slots with which the GPU still takes all blocks at once, of a few units each: a slot costs a partial result as
// large as the inputs.
template <class Product>
int64_t slots_for(int64_t blocks, int64_t units) {
  constexpr int64_t kFewestUnits = 4, kResident = kMultiprocessors * Product::kBlocksPerMultiprocessor;
  const int64_t most = std::min(kResident / std::max<int64_t>(1, blocks), (units + kFewestUnits - 1) / kFewestUnits);
  return std::max<int64_t>(1, most);
}

// ---- work of a block that keeps keys ----------------------------------------------------------------------------------

// blockIdx.x = ((b * kv_heads + kv_head) * slots + slot) * key blocks + key block. A slot is a run of the units (query head
// of the group, tile of queries from `first_tile` on).
struct KeyBlock {
  int64_t b, kv_head, slot, key0;
  int64_t first_tile, head_tiles, begin, end;
};

template <class Product>
__device__ KeyBlock key_block(int64_t kv_heads, int64_t group, int64_t queries, int64_t keys, int64_t slots, bool causal) {
  const int64_t blocks = (keys + Product::kStationary - 1) / Product::kStationary;
  KeyBlock at;
  at.key0 = blockIdx.x % blocks * Product::kStationary;
  at.slot = blockIdx.x / blocks % slots;
  at.kv_head = blockIdx.x / blocks / slots % kv_heads;
  at.b = blockIdx.x / blocks / slots / kv_heads;
  const int64_t tiles = (queries + Product::kMoving - 1) / Product::kMoving;
  at.first_tile = causal ? min(tiles, at.key0 / Product::kMoving) : 0;
  at.head_tiles = tiles - at.first_tile;
  at.begin = at.slot * (group * at.head_tiles) / slots;
  at.end = (at.slot + 1) * (group * at.head_tiles) / slots;
  return at;
}

// The part of head `head` of the group (query tiles `from`, below `to`) that lies in the block's slot.
struct HeadTiles {
  int64_t from, to;
};
__device__ inline HeadTiles head_tiles(const KeyBlock& at, int64_t head) {
  const int64_t first = head * at.head_tiles;
  return {at.first_tile + max(int64_t(0), at.begin - first), at.first_tile + min(at.head_tiles, at.end - first)};
}

// Writes sums to rows that follow one another.
template <class Product>
__device__ void store_rows(const typename Product::Sums& sums, typename Product::Acc* rows, int width) {
#pragma unroll
  for (int i = 0; i < Product::kRows; ++i)
#pragma unroll
    for (int j = 0; j < Product::kSumColumns; ++j)
      if (Product::sum_column(j) < width) rows[int64_t(Product::row(i)) * width + Product::sum_column(j)] = sums[i][j];
}

// ---- A given --------------------------------------------------------------------------------------------------------

template <class Acc>
struct AvArrays {
  PackedRows<Acc> value, share;  // (B,Hkv,Nk,D), (B,H,Nq,D): S
  PackedRows<Acc> partial;       // (slots,B,Hkv,Nk,D)
  int64_t slots;
};

// Calls f with the pointer in its type.
template <class Acc, class F>
__device__ void with_pointer(void* data, Dtype dtype, F f) {
  if constexpr (std::is_same_v<Acc, double>) {
    f(static_cast<double*>(data));
  } else {
    switch (dtype) {
      case Dtype::f16: return f(static_cast<__half*>(data));
      case Dtype::bf16: return f(static_cast<__nv_bfloat16*>(data));
      default: return f(static_cast<float*>(data));
    }
  }
}

// tile[q * pitch + k] = A[b,h,query0 + q,key0 + k], zeros outside A. Neighbouring threads, neighbouring keys.
template <class Product, int QUERIES, int KEYS>
__device__ void load_attention(const AvRelevance& p, int64_t b, int64_t h, int64_t query0, int64_t key0, int pitch,
                               typename Product::Acc* tile) {
  using Acc = typename Product::Acc;
  const int key = threadIdx.x % KEYS;
  with_pointer<Acc>(const_cast<void*>(p.attention.data), p.dtype, [&](auto* data) {
    data += b * p.attention.batch + h * p.attention.head + query0 * p.attention.row + key0;
#pragma unroll 4
    for (int query = threadIdx.x / KEYS; query < QUERIES; query += Product::kThreads / KEYS) {
      const bool exists = query0 + query < p.queries && key0 + key < p.keys;
      const Acc weight = exists ? to_accumulate<Acc>(data[query * p.attention.row + key]) : Acc(0);
      tile[query * pitch + key] = Product::operand(weight);
    }
  });
}

template <class Product>
struct AvTiles {
  static constexpr int kTransposedPitch = Product::kStationary + kPiece<typename Product::Acc>;
  static constexpr int kTransposedTile = Product::kMoving * kTransposedPitch;
  static constexpr size_t outputs_bytes() {
    return (Product::kMovingTile + Product::kPairTile) * sizeof(typename Product::Acc);
  }
  static constexpr size_t columns_bytes() {
    return (Product::kStationaryTile + Product::kMovingTile + kTransposedTile) * sizeof(typename Product::Acc);
  }
};

// attention (B,H,Nq,Nk), value -> share = O = A V. A block keeps its queries of one head and meets the keys.
template <class Product>
__global__ void __launch_bounds__(Product::kThreads, Product::kBlocksPerMultiprocessor)
    av_outputs_kernel(const AvRelevance p, const AvArrays<typename Product::Acc> w) {
  using Acc = typename Product::Acc;
  const int64_t query_blocks = (p.queries + Product::kStationary - 1) / Product::kStationary;
  const int64_t query0 = blockIdx.x % query_blocks * Product::kStationary;
  const int64_t h = blockIdx.x / query_blocks % p.heads, b = blockIdx.x / query_blocks / p.heads;
  const int64_t kv_head = h / (p.heads / p.kv_heads);
  Acc* value = dynamic_smem<Acc>();
  Acc* pairs = value + Product::kMovingTile;
  typename Product::Sums sums = {};
  const auto load = [&](int64_t tile, int) {
    const int64_t key0 = tile * Product::kMoving;
    copy_tile<Product>(value, w.value.at(b, kv_head, key0), Product::kMoving, w.value.width);
    load_attention<Product, Product::kStationary, Product::kMoving>(p, b, h, query0, key0, Product::kPairPitch, pairs);
  };
  const auto use = [&](int64_t, int) { Product::accumulate(pairs, Product::kPairPitch, value, w.value.width, sums); };
  stream_tiles<1>(0, (p.keys + Product::kMoving - 1) / Product::kMoving, [](int64_t tile) { return tile; }, load, use);
  store_rows<Product>(sums, w.share.at(b, h, query0), w.share.width);
}

// attention, value, share = S -> attention_out = lam A o (S V^T), partial = A^T S. A block keeps its keys and meets the
// queries: A is read once more, and its relevance takes its place in shared memory on the way out.
template <class Product>
__global__ void __launch_bounds__(Product::kThreads, Product::kBlocksPerMultiprocessor)
    av_columns_kernel(const AvRelevance p, const AvArrays<typename Product::Acc> w) {
  using Acc = typename Product::Acc;
  constexpr int pitch = AvTiles<Product>::kTransposedPitch;
  const int64_t group = p.heads / p.kv_heads;
  const KeyBlock at = key_block<Product>(p.kv_heads, group, p.queries, p.keys, w.slots, false);
  Acc* value = dynamic_smem<Acc>();
  Acc* share = value + Product::kStationaryTile;
  Acc* weights = share + Product::kMovingTile;
  typename Product::Sums sums = {};
  copy_tile<Product>(value, w.value.at(at.b, at.kv_head, at.key0), Product::kStationary, w.value.width);

  for (int64_t head = at.begin / at.head_tiles; head * at.head_tiles < at.end; ++head) {
    const int64_t h = at.kv_head * group + head;
    const auto load = [&](int64_t tile, int) {
      const int64_t query0 = tile * Product::kMoving;
      copy_tile<Product>(share, w.share.at(at.b, h, query0), Product::kMoving, w.share.width);
      load_attention<Product, Product::kMoving, Product::kStationary>(p, at.b, h, query0, at.key0, pitch, weights);
    };
    const auto use = [&](int64_t tile, int) {
      typename Product::Pairs x;
      Product::multiply(value, share, w.share.width, x);
      Product::template accumulate<true>(weights, pitch, share, w.share.width, sums);
      __syncthreads();
#pragma unroll
      for (int i = 0; i < Product::kRows; ++i)
#pragma unroll
        for (int j = 0; j < Product::kColumns; ++j) {
          Acc& weight = weights[Product::column(j) * pitch + Product::row(i)];
          weight = Acc(p.lam) * weight * x[i][j];
        }
      __syncthreads();
      const int key = threadIdx.x % Product::kStationary;
      with_pointer<Acc>(p.attention_out, p.dtype, [&](auto* out) {
        using T = std::remove_pointer_t<decltype(out)>;
        const int64_t query0 = tile * Product::kMoving;
        out += ((at.b * p.heads + h) * p.queries + query0) * p.keys + at.key0;
        for (int query = threadIdx.x / Product::kStationary; query < Product::kMoving;
             query += Product::kThreads / Product::kStationary)
          if (query0 + query < p.queries && at.key0 + key < p.keys)
            out[query * p.keys + key] = T(weights[query * pitch + key]);
      });
    };
    const HeadTiles tiles = head_tiles(at, head);
    __syncthreads();
    stream_tiles<1>(tiles.from, tiles.to, [](int64_t tile) { return tile; }, load, use);
  }
  store_rows<Product>(sums, w.partial.at(at.slot * p.batch + at.b, at.kv_head, at.key0), w.partial.width);
}

// Lays the arrays out from `base` and returns the bytes they take.
template <class Product, class Acc = typename Product::Acc>
int64_t av_arrays(const AvRelevance& p, char* base, AvArrays<Acc>& w) {
  w.value = w.partial = packed_rows<Acc>(p.kv_heads, p.keys, p.dim);
  w.share = packed_rows<Acc>(p.heads, p.queries, p.dim);
  const int64_t blocks = p.batch * p.kv_heads * blocks_for(p.keys, Product::kStationary);
  w.slots = slots_for<Product>(blocks, p.heads / p.kv_heads * blocks_for(p.queries, Product::kMoving));
  Workspace space{base};
  space.take(w.value.data, w.value.elements(p.batch));
  space.take(w.share.data, w.share.elements(p.batch));
  space.take(w.partial.data, w.slots * w.partial.elements(p.batch));
  return space.used;
}

template <class Product, class Acc = typename Product::Acc>
const char* launch_av(const AvRelevance& p, void* stream) {
  using Tiles = AvTiles<Product>;
  static_assert(Tiles::columns_bytes() <= kMostSharedBytes && Tiles::outputs_bytes() <= kMostSharedBytes, "too much");
  AvArrays<Acc> w;
  av_arrays<Product>(p, static_cast<char*>(p.workspace), w);
  if (const char* error =
          launch_pack<Acc>(p.value, p.dtype, p.batch, p.keys, p.dim, w.value, Product::kTensor, nullptr, stream))
    return error;
  const int64_t query_blocks = p.batch * p.heads * blocks_for(p.queries, Product::kStationary);
  if (const char* error =
          launch(av_outputs_kernel<Product>, grid_of(query_blocks), Product::kThreads, Tiles::outputs_bytes(), stream, p, w))
    return error;
  const Sharing sharing{p.relevance, {}, p.eps, false, true};
  if (const char* error = launch_divide<Acc>(sharing, p.dtype, p.batch, p.heads, p.queries, p.dim, nullptr, w.share, nullptr,
                                             Product::kTensor, stream))
    return error;
  const int64_t key_blocks = p.batch * p.kv_heads * w.slots * blocks_for(p.keys, Product::kStationary);
  if (const char* error =
          launch(av_columns_kernel<Product>, grid_of(key_blocks), Product::kThreads, Tiles::columns_bytes(), stream, p, w))
    return error;
  return launch_finish<Acc>(w.partial, w.slots, &p.value, p.dtype, p.batch, p.keys, p.dim, 1 - p.lam, p.value_out, stream);
}

// ---- attention from q, k, v -------------------------------------------------------------------------------------------

template <class Acc>
struct AttentionArrays : AttentionOperands<Acc> {
  PackedRows<Acc> value_partial, key_partial;  // (slots,B,Hkv,Nk,Dv), (slots,B,Hkv,Nk,D)
  PackedRows<Acc> query_partial;               // (B,H,Nq,D)
  int64_t slots;
  Acc eps;  // eps log2(e): scores are scaled by log2(e)
};

// Tiles of the kernel that keeps keys. SCORES: relevance flows to q and k too (lam > 0).
template <class Product, bool SCORES>
struct ColumnTiles {
  static constexpr int kStationaryTiles = SCORES ? 2 : 1, kPairTiles = SCORES ? 2 : 1;
  static constexpr size_t bytes(int buffers) {
    return (kStationaryTiles * Product::kStationaryTile + buffers * 2 * Product::kMovingTile +
            kPairTiles * Product::kPairTile) *
           sizeof(typename Product::Acc);
  }
  static constexpr int kBuffers = Product::buffers(bytes(2));
  static constexpr size_t kBytes = bytes(kBuffers);
  static_assert(kBytes <= kMostSharedBytes, "too much shared memory");
};

// Tiles of the kernel that keeps queries.
template <class Product>
struct RowTiles {
  static constexpr size_t bytes(int buffers) {
    return (2 * Product::kStationaryTile + buffers * 2 * Product::kMovingTile + Product::kPairTile) *
           sizeof(typename Product::Acc);
  }
  static constexpr int kBuffers = Product::buffers(bytes(2));
  static constexpr size_t kBytes = bytes(kBuffers);
  static_assert(kBytes <= kMostSharedBytes, "too much shared memory");
};

// query, key, value, share, shift, delta -> value_partial = P^T S and, with SCORES, key_partial = G^T Q. A block keeps its
// keys of one key head and meets the queries of that head's group that have relevance.
template <class Product, bool SCORES>
__global__ void __launch_bounds__(Product::kThreads, Product::kBlocksPerMultiprocessor)
    attention_columns_kernel(const AttentionScores p, const AttentionArrays<typename Product::Acc> w) {
  using Acc = typename Product::Acc;
  using Tiles = ColumnTiles<Product, SCORES>;
  const int64_t group = p.heads / p.kv_heads;
  const KeyBlock at = key_block<Product>(p.kv_heads, group, p.tokens, p.keys, w.slots, p.causal);
  Acc* key = dynamic_smem<Acc>();
  Acc* value = key + Product::kStationaryTile;
  Acc* moving = key + Tiles::kStationaryTiles * Product::kStationaryTile;
  Acc* weights = moving + Tiles::kBuffers * 2 * Product::kMovingTile;  // P^T, then G^T behind it
  const PairScores<Product, true> scores(p, w.scale, weights);
  typename Product::Sums value_sums = {}, key_sums = {};
  copy_tile<Product>(key, w.key.at(at.b, at.kv_head, at.key0), Product::kStationary, w.key.width);
  if (SCORES) copy_tile<Product>(value, w.value.at(at.b, at.kv_head, at.key0), Product::kStationary, w.value.width);

  for (int64_t head = at.begin / max(at.head_tiles, int64_t(1)); head * at.head_tiles < at.end; ++head) {
    const int64_t h = at.kv_head * group + head, head_row = (at.b * p.heads + h) * w.padded;
    const HeadTiles tiles = head_tiles(at, head);
    const auto next = [&](int64_t tile) {
      while (tile < tiles.to && !tile_is_active(w, at.b, h, tile * Product::kMoving, Product::kMoving)) ++tile;
      return tile;
    };
    const auto load = [&](int64_t tile, int buffer) {
      Acc* query = moving + buffer * 2 * Product::kMovingTile;
      const int64_t query0 = tile * Product::kMoving;
      copy_tile<Product>(query, w.query.at(at.b, h, query0), Product::kMoving, w.query.width);
      copy_tile<Product>(query + Product::kMovingTile, w.share.at(at.b, h, query0), Product::kMoving, w.share.width);
    };
    const auto use = [&](int64_t tile, int buffer) {
      const Acc* query = moving + buffer * 2 * Product::kMovingTile;
      const Acc* share = query + Product::kMovingTile;
      const int64_t query0 = tile * Product::kMoving;
      QueryValues<Product, true> shift, delta;
      shift.load(w.shift + head_row + query0);
      if (SCORES) delta.load(w.delta + head_row + query0);
      typename Product::Pairs x;
      Product::multiply(key, query, w.query.width, x);
      scores.probabilities(at.b, h, query0, at.key0, shift, x, [&](int i, int j, Acc y, Acc probability) {
        weights[Product::row(i) * Product::kPairPitch + Product::column(j)] = Product::operand(probability);
        return SCORES ? probability * damping(y, w.eps) : probability;
      });
      if (SCORES) {
        typename Product::Pairs passed;
        Product::multiply(value, share, w.share.width, passed);
#pragma unroll
        for (int i = 0; i < Product::kRows; ++i)
#pragma unroll
          for (int j = 0; j < Product::kColumns; ++j)
            weights[Product::kPairTile + Product::row(i) * Product::kPairPitch + Product::column(j)] =
                Product::operand(x[i][j] * (passed[i][j] - delta.at(i, j)));
      }
      __syncthreads();
      Product::accumulate(weights, Product::kPairPitch, share, w.share.width, value_sums);
      if (SCORES) Product::accumulate(weights + Product::kPairTile, Product::kPairPitch, query, w.query.width, key_sums);
    };
    __syncthreads();
    stream_tiles<Tiles::kBuffers>(next(tiles.from), tiles.to, next, load, use);
  }
  const int64_t outer = at.slot * p.batch + at.b;
  store_rows<Product>(value_sums, w.value_partial.at(outer, at.kv_head, at.key0), w.value_partial.width);
  if (SCORES) store_rows<Product>(key_sums, w.key_partial.at(outer, at.kv_head, at.key0), w.key_partial.width);
}

// query, key, value, share, shift, delta -> query_partial = G K. A block keeps its queries of one head and meets the keys.
template <class Product>
__global__ void __launch_bounds__(Product::kThreads, Product::kBlocksPerMultiprocessor)
    attention_rows_kernel(const AttentionScores p, const AttentionArrays<typename Product::Acc> w) {
  using Acc = typename Product::Acc;
  using Tiles = RowTiles<Product>;
  const int64_t query_blocks = (p.tokens + Product::kStationary - 1) / Product::kStationary;
  const int64_t block = query_blocks - 1 - blockIdx.x % query_blocks;  // causal: the longest first
  const int64_t h = blockIdx.x / query_blocks % p.heads, b = blockIdx.x / query_blocks / p.heads;
  const int64_t query0 = block * Product::kStationary, kv_head = h / (p.heads / p.kv_heads);
  typename Product::Sums sums = {};
  if (tile_is_active(w, b, h, query0, Product::kStationary)) {
    const int64_t keys = p.causal ? min(p.keys, query0 + Product::kStationary) : p.keys;
    Acc* query = dynamic_smem<Acc>();
    Acc* share = query + Product::kStationaryTile;
    Acc* moving = share + Product::kStationaryTile;
    Acc* weights = moving + Tiles::kBuffers * 2 * Product::kMovingTile;
    QueryValues<Product, false> shift, delta;
    shift.load(w.shift + (b * p.heads + h) * w.padded + query0);
    delta.load(w.delta + (b * p.heads + h) * w.padded + query0);
    const PairScores<Product, false> scores(p, w.scale, weights);
    copy_tile<Product>(query, w.query.at(b, h, query0), Product::kStationary, w.query.width);
    copy_tile<Product>(share, w.share.at(b, h, query0), Product::kStationary, w.share.width);
    const auto load = [&](int64_t tile, int buffer) {
      Acc* key = moving + buffer * 2 * Product::kMovingTile;
      const int64_t key0 = tile * Product::kMoving;
      copy_tile<Product>(key, w.key.at(b, kv_head, key0), Product::kMoving, w.key.width);
      copy_tile<Product>(key + Product::kMovingTile, w.value.at(b, kv_head, key0), Product::kMoving, w.value.width);
    };
    const auto use = [&](int64_t tile, int buffer) {
      const Acc* key = moving + buffer * 2 * Product::kMovingTile;
      const Acc* value = key + Product::kMovingTile;
      typename Product::Pairs x, passed;
      Product::multiply(query, key, w.query.width, x);
      scores.probabilities(b, h, query0, tile * Product::kMoving, shift, x,
                           [&](int, int, Acc y, Acc probability) { return probability * damping(y, w.eps); });
      Product::multiply(share, value, w.share.width, passed);
#pragma unroll
      for (int i = 0; i < Product::kRows; ++i)
#pragma unroll
        for (int j = 0; j < Product::kColumns; ++j)
          weights[Product::row(i) * Product::kPairPitch + Product::column(j)] =
              Product::operand(x[i][j] * (passed[i][j] - delta.at(i, j)));
      __syncthreads();
      Product::accumulate(weights, Product::kPairPitch, key, w.key.width, sums);
    };
    stream_tiles<Tiles::kBuffers>(
        0, (keys + Product::kMoving - 1) / Product::kMoving, [](int64_t tile) { return tile; }, load, use);
  }
  store_rows<Product>(sums, w.query_partial.at(b, h, query0), w.query_partial.width);
}

// Lays the arrays out from `base` and returns the bytes they take.
template <class Product, class Acc = typename Product::Acc>
int64_t attention_arrays(const AttentionRelevance& p, char* base, AttentionArrays<Acc>& w) {
  const bool scores = p.lam != 0;
  size_operands(p, p.value_dim, true, w);
  w.eps = Acc(p.eps * kLog2e);
  w.value_partial = w.value;
  w.key_partial = w.key;
  w.query_partial = w.query;
  const int64_t blocks = p.batch * p.kv_heads * blocks_for(p.keys, Product::kStationary);
  w.slots = slots_for<Product>(blocks, p.heads / p.kv_heads * blocks_for(p.tokens, Product::kMoving));
  Workspace space{base};
  take_operands(p, true, w, space);
  space.take(w.value_partial.data, w.slots * w.value_partial.elements(p.batch));
  space.take(w.key_partial.data, scores ? w.slots * w.key_partial.elements(p.batch) : 0);
  space.take(w.query_partial.data, scores ? w.query_partial.elements(p.batch) : 0);
  return space.used;
}

template <class Product, bool SCORES, class Acc = typename Product::Acc>
const char* launch_attention_columns(const AttentionRelevance& p, const AttentionArrays<Acc>& w, void* stream) {
  using Tiles = ColumnTiles<Product, SCORES>;
  const int64_t blocks = p.batch * p.kv_heads * w.slots * blocks_for(p.keys, Product::kStationary);
  if (const char* error =
          launch(attention_columns_kernel<Product, SCORES>, grid_of(blocks), Product::kThreads, Tiles::kBytes, stream, p, w))
    return error;
  return launch_finish<Acc>(w.value_partial, w.slots, p.gradient_form ? nullptr : &p.value, p.dtype, p.batch, p.keys,
                            p.value_dim, 1 - p.lam, p.value_out, stream);
}

// The relevance of q and k.
template <class Product, class Acc = typename Product::Acc>
const char* launch_attention_scores(const AttentionRelevance& p, const AttentionArrays<Acc>& w, void* stream) {
  using Tiles = RowTiles<Product>;
  const double factor = 0.5 * p.lam * p.scale;
  if (const char* error = launch_finish<Acc>(w.key_partial, w.slots, p.gradient_form ? nullptr : &p.key, p.dtype, p.batch,
                                             p.keys, p.dim, factor, p.key_out, stream))
    return error;
  const int64_t blocks = p.batch * p.heads * blocks_for(p.tokens, Product::kStationary);
  if (const char* error =
          launch(attention_rows_kernel<Product>, grid_of(blocks), Product::kThreads, Tiles::kBytes, stream, p, w))
    return error;
  return launch_finish<Acc>(w.query_partial, 1, p.gradient_form ? nullptr : &p.query, p.dtype, p.batch, p.tokens, p.dim,
                            factor, p.query_out, stream);
}

template <class Product, class Acc = typename Product::Acc>
const char* launch_attention(const AttentionRelevance& p, void* stream) {
  const bool scores = p.lam != 0;
  AttentionArrays<Acc> w;
  attention_arrays<Product>(p, static_cast<char*>(p.workspace), w);
  if (const char* error = launch_mark_active<Acc>(p.upstream, p.dtype, p.batch, p.heads, p.tokens, p.value_dim, w, stream))
    return error;
  if (const char* error = launch_operands<Acc>(p, p.value, p.value_dim, w, Product::kTensor, stream)) return error;
  const Sharing sharing{p.upstream, p.output, p.eps, p.gradient_form, scores || !p.gradient_form || p.eps > 0};
  if (const char* error = launch_share<Acc>(p, p.value_dim, sharing, w, Product::kTensor, stream)) return error;
  if (!scores) return launch_attention_columns<Product, false>(p, w, stream);
  if (const char* error = launch_attention_columns<Product, true>(p, w, stream)) return error;
  return launch_attention_scores<Product>(p, w, stream);
}

constexpr const char* kTooWide = "the CUDA kernels take head dimensions up to 256";

}  // namespace

// ---- the contract ---------------------------------------------------------------------------------------------------

int64_t av_workspace_cuda(const AvRelevance& p) {
  return with_products(p.dtype, false, p.dim, [&](auto product) {
    using Product = typename decltype(product)::type;
    AvArrays<typename Product::Acc> w;
    return av_arrays<Product>(p, nullptr, w);
  });
}

const char* launch_av_relevance(const AvRelevance& p, void* stream) {
  if (p.batch == 0) return nullptr;
  if (p.dim > kMaxDim) return kTooWide;
  return with_products(p.dtype, false, p.dim,
                       [&](auto product) { return launch_av<typename decltype(product)::type>(p, stream); });
}

int64_t attention_workspace_cuda(const AttentionRelevance& p) {
  return with_products(p.dtype, p.tf32, std::max(p.dim, p.value_dim), [&](auto product) {
    using Product = typename decltype(product)::type;
    AttentionArrays<typename Product::Acc> w;
    return attention_arrays<Product>(p, nullptr, w);
  });
}

const char* launch_attention_relevance(const AttentionRelevance& p, void* stream) {
  if (p.batch == 0) return nullptr;
  if (std::max(p.dim, p.value_dim) > kMaxDim) return kTooWide;
  return with_products(p.dtype, p.tf32, std::max(p.dim, p.value_dim),
                       [&](auto product) { return launch_attention<typename decltype(product)::type>(p, stream); });
}

}  // namespace xai
