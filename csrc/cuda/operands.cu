// Operands of the relevance kernels: packing, O = P V, S = R / stab(O), and the ordered sums that become the outputs.
#include "operands.cuh"

#include "lse.cuh"
#include "pair_scores.cuh"

namespace xai {
namespace {

constexpr int kRowWarps = 8;  // warps of a block in the kernels that give a row to each warp
constexpr int kRowKernelThreads = kRowWarps * kWarp;

__device__ float as_operand(float x, bool tensor) { return tensor ? __uint_as_float(round_to_tf32(__float_as_uint(x))) : x; }
__device__ double as_operand(double x, bool) { return x; }

// ---- packing --------------------------------------------------------------------------------------------------------

// x (B,heads,n,dim) -> out (B,heads,rows,width). A thread writes 16 bytes.
template <class T, class Acc>
__global__ void __launch_bounds__(kPrepareThreads)
    pack_kernel(const View4 x, int64_t n, int64_t dim, const PackedRows<Acc> out, int64_t pieces, bool tensor,
                const ScoreArrays<Acc> scores, bool only_active) {
  const int64_t item = int64_t(blockIdx.x) * kPrepareThreads + threadIdx.x;
  if (item >= pieces) return;
  const int row_pieces = out.width / kPiece<Acc>;
  const int64_t row = item / row_pieces, first = item % row_pieces * kPiece<Acc>;
  const int64_t i = row % out.rows, h = row / out.rows % out.heads, b = row / out.rows / out.heads;
  const bool needed = i < n && (!only_active || is_active(scores, b, h, i));
  const T* source = static_cast<const T*>(x.data) + b * x.batch + h * x.head + i * x.row + first;
  Acc piece[kPiece<Acc>];
#pragma unroll
  for (int e = 0; e < kPiece<Acc>; ++e)
    piece[e] = needed && first + e < dim ? as_operand(to_accumulate<Acc>(source[e]), tensor) : Acc(0);
  store_piece(out.data + item * kPiece<Acc>, piece);
}

// x (B,H,n,dim) -> active. A warp takes 32 rows.
template <class T, class Acc>
__global__ void __launch_bounds__(kRowKernelThreads)
    mark_active_kernel(const View4 x, int64_t heads, int64_t n, int64_t dim, const ScoreArrays<Acc> w, int64_t words) {
  const int64_t item = int64_t(blockIdx.x) * kRowWarps + warp_index();
  if (item >= words) return;
  const int64_t word = item % (w.padded / kWarp), h = item / (w.padded / kWarp) % heads;
  const int64_t b = item / (w.padded / kWarp) / heads;
  const int lane = threadIdx.x % kWarp;
  const T* rows = static_cast<const T*>(x.data) + b * x.batch + h * x.head;
  uint32_t bits = 0;
  constexpr int kTogether = 8;  // rows whose loads are under way at once
  for (int first = 0; first < kWarp; first += kTogether) {
    bool any[kTogether] = {};
    for (int64_t c = lane; c < dim; c += kWarp)
#pragma unroll
      for (int e = 0; e < kTogether; ++e) {
        const int64_t i = word * kWarp + first + e;
        if (i < n) any[e] |= to_accumulate<Acc>(rows[i * x.row + c]) != 0;
      }
#pragma unroll
    for (int e = 0; e < kTogether; ++e)
      if (__any_sync(kAllLanes, any[e])) bits |= 1u << (first + e);
  }
  if (lane == 0) w.active[b * w.active_batch + h * w.active_head + word] = bits;
}

// ---- O = P V --------------------------------------------------------------------------------------------------------

template <class Product>
struct OutputTiles {
  // TF32 would leave O, which the relevance is divided by, too few digits: P goes in two parts, P and what rounding drops.
  static constexpr int kPairTiles = Product::kTensor ? 2 : 1;
  static constexpr size_t elements(int buffers) {
    return Product::kStationaryTile + buffers * 2 * Product::kMovingTile + kPairTiles * Product::kPairTile;
  }
  static constexpr size_t bytes(int buffers) { return elements(buffers) * sizeof(typename Product::Acc); }
  static constexpr int kBuffers = Product::buffers(bytes(2));
};

// query, key, value, shift -> share = O. A block keeps its queries of one head and meets the keys.
template <class Product>
__global__ void __launch_bounds__(Product::kThreads, Product::kBlocksPerMultiprocessor)
    outputs_kernel(const AttentionScores p, const AttentionOperands<typename Product::Acc> w) {
  using Acc = typename Product::Acc;
  using Tiles = OutputTiles<Product>;
  const int64_t query_blocks = (p.tokens + Product::kStationary - 1) / Product::kStationary;
  const int64_t block = query_blocks - 1 - blockIdx.x % query_blocks;  // causal: the longest first
  const int64_t h = blockIdx.x / query_blocks % p.heads, b = blockIdx.x / query_blocks / p.heads;
  const int64_t query0 = block * Product::kStationary, kv_head = h / (p.heads / p.kv_heads);
  if (!tile_is_active(w, b, h, query0, Product::kStationary)) return;
  const int64_t keys = p.causal ? min(p.keys, query0 + Product::kStationary) : p.keys;

  Acc* query = dynamic_smem<Acc>();
  Acc* moving = query + Product::kStationaryTile;
  Acc* pairs = moving + Tiles::kBuffers * 2 * Product::kMovingTile;
  QueryValues<Product, false> shift;
  shift.load(w.shift + (b * p.heads + h) * w.padded + query0);
  const PairScores<Product, false> scores(p, w.scale, pairs);
  typename Product::Sums sums = {};
  copy_tile<Product>(query, w.query.at(b, h, query0), Product::kStationary, w.query.width);
  const auto load = [&](int64_t tile, int buffer) {
    Acc* key = moving + buffer * 2 * Product::kMovingTile;
    const int64_t key0 = tile * Product::kMoving;
    copy_tile<Product>(key, w.key.at(b, kv_head, key0), Product::kMoving, w.key.width);
    copy_tile<Product>(key + Product::kMovingTile, w.value.at(b, kv_head, key0), Product::kMoving, w.value.width);
  };
  const auto use = [&](int64_t tile, int buffer) {
    const Acc* key = moving + buffer * 2 * Product::kMovingTile;
    const Acc* value = key + Product::kMovingTile;
    typename Product::Pairs x;
    Product::multiply(query, key, w.query.width, x);
    scores.probabilities(b, h, query0, tile * Product::kMoving, shift, x, [&](int i, int j, Acc, Acc probability) {
      Acc* pair = pairs + Product::row(i) * Product::kPairPitch + Product::column(j);
      const Acc operand = Product::operand(probability);
      *pair = operand;
      if (Product::kTensor) pair[Product::kPairTile] = Product::operand(probability - operand);
      return probability;
    });
    __syncthreads();
#pragma unroll 1
    for (int part = 0; part < Tiles::kPairTiles; ++part)
      Product::accumulate(pairs + part * Product::kPairTile, Product::kPairPitch, value, w.value.width, sums);
  };
  stream_tiles<Tiles::kBuffers>(
      0, (keys + Product::kMoving - 1) / Product::kMoving, [](int64_t tile) { return tile; }, load, use);

#pragma unroll
  for (int i = 0; i < Product::kRows; ++i) {
    Acc* row = w.share.at(b, h, query0 + Product::row(i));
#pragma unroll
    for (int j = 0; j < Product::kSumColumns; ++j)
      if (Product::sum_column(j) < w.share.width) row[Product::sum_column(j)] = sums[i][j];
  }
}

// ---- S = R / stab(O) ------------------------------------------------------------------------------------------------

// upstream, O -> share, delta. A warp takes a row; rows that are not needed become zeros.
template <class T, class Acc>
__global__ void __launch_bounds__(kRowKernelThreads)
    divide_kernel(const Sharing s, int64_t n, int64_t dim, const PackedRows<Acc> share, int64_t rows, Acc* delta,
                  bool tensor, const ScoreArrays<Acc> scores, bool only_active) {
  const int64_t item = int64_t(blockIdx.x) * kRowWarps + warp_index();
  if (item >= rows) return;
  const int64_t i = item % share.rows, h = item / share.rows % share.heads, b = item / share.rows / share.heads;
  const bool needed = i < n && (!only_active || is_active(scores, b, h, i));
  Acc* out = share.data + item * share.width;
  const T* upstream =
      static_cast<const T*>(s.upstream.data) + b * s.upstream.batch + h * s.upstream.head + i * s.upstream.row;
  const T* given = static_cast<const T*>(s.output.data);
  if (given) given += b * s.output.batch + h * s.output.head + i * s.output.row;
  const Acc eps = Acc(s.eps);
  Acc sum = 0;
  for (int c = threadIdx.x % kWarp; c < share.width; c += kWarp) {
    Acc portion = 0;
    if (needed && c < dim) {
      const Acc value = to_accumulate<Acc>(upstream[c]);
      const Acc o = !s.needs_output ? Acc(0) : given ? to_accumulate<Acc>(given[c]) : out[c];
      portion = s.gradient_form ? value * damping(o, eps) : stabilized_ratio(value, o, eps);
      portion = as_operand(portion, tensor);
      sum += portion * o;
    }
    out[c] = portion;
  }
  sum = warp_sum(sum);
  if (delta && threadIdx.x % kWarp == 0) delta[(b * share.heads + h) * scores.padded + i] = sum;
}

// ---- outputs --------------------------------------------------------------------------------------------------------

// partial (slots,B,heads,rows,width) -> out (B,heads,n,dim). A warp takes a row and adds its slots in order.
template <class T, class Acc>
__global__ void __launch_bounds__(kRowKernelThreads)
    finish_kernel(const PackedRows<Acc> partial, int64_t slots, int64_t slot_elements, const View4 input, int64_t n,
                  int64_t dim, int64_t rows, Acc factor, T* out) {
  const int64_t item = int64_t(blockIdx.x) * kRowWarps + warp_index();
  if (item >= rows) return;
  const int64_t i = item % n, h = item / n % partial.heads, b = item / n / partial.heads;
  const Acc* source = partial.at(b, h, i);
  const T* x = static_cast<const T*>(input.data);
  if (x) x += b * input.batch + h * input.head + i * input.row;
  for (int64_t c = threadIdx.x % kWarp; c < dim; c += kWarp) {
    Acc sum = 0;
#pragma unroll 4
    for (int64_t slot = 0; slot < slots; ++slot) sum += source[slot * slot_elements + c];
    sum *= factor;
    out[item * dim + c] = T(x ? to_accumulate<Acc>(x[c]) * sum : sum);
  }
}

// Calls f(Type<T>) for the element types that accumulate in Acc.
template <class Acc, class F>
const char* with_inputs(Dtype dtype, F f) {
  return with_dtype(dtype, [&](auto element) -> const char* {
    if constexpr (std::is_same_v<Accumulate<typename decltype(element)::type>, Acc>) return f(element);
    return "the workspace is not of the accumulate type";
  });
}

}  // namespace

template <class Acc>
const char* launch_pack(const View4& x, Dtype dtype, int64_t batch, int64_t rows, int64_t dim, const PackedRows<Acc>& out,
                        bool tensor, const ScoreArrays<Acc>* scores, void* stream) {
  const int64_t pieces = out.elements(batch) / kPiece<Acc>;
  return with_inputs<Acc>(dtype, [&](auto element) {
    using T = typename decltype(element)::type;
    return launch(pack_kernel<T, Acc>, grid_of((pieces + kPrepareThreads - 1) / kPrepareThreads), kPrepareThreads, 0, stream,
                  x, rows, dim, out, pieces, tensor, scores ? *scores : ScoreArrays<Acc>{}, scores != nullptr);
  });
}

template <class Acc>
const char* launch_mark_active(const View4& x, Dtype dtype, int64_t batch, int64_t heads, int64_t rows, int64_t dim,
                               const ScoreArrays<Acc>& w, void* stream) {
  const int64_t words = batch * heads * w.padded / kWarp;
  return with_inputs<Acc>(dtype, [&](auto element) {
    using T = typename decltype(element)::type;
    return launch(mark_active_kernel<T, Acc>, grid_of((words + kRowWarps - 1) / kRowWarps), kRowKernelThreads, 0, stream, x,
                  heads, rows, dim, w, words);
  });
}

template <class Acc>
const char* launch_operands(const AttentionScores& p, const View4& value, int64_t value_dim, const AttentionOperands<Acc>& w,
                            bool tensor, void* stream) {
  if (const char* error = launch_shift(p, w, stream)) return error;
  if (const char* error = launch_pack<Acc>(p.query, p.dtype, p.batch, p.tokens, p.dim, w.query, tensor, &w, stream))
    return error;
  if (const char* error = launch_pack<Acc>(p.key, p.dtype, p.batch, p.keys, p.dim, w.key, tensor, nullptr, stream))
    return error;
  return launch_pack<Acc>(value, p.dtype, p.batch, p.keys, value_dim, w.value, tensor, nullptr, stream);
}

template <class Acc>
const char* launch_divide(const Sharing& sharing, Dtype dtype, int64_t batch, int64_t heads, int64_t rows, int64_t dim,
                          const ScoreArrays<Acc>* scores, const PackedRows<Acc>& share, Acc* delta, bool tensor,
                          void* stream) {
  const int64_t padded_rows = batch * heads * share.rows;
  return with_inputs<Acc>(dtype, [&](auto element) {
    using T = typename decltype(element)::type;
    return launch(divide_kernel<T, Acc>, grid_of((padded_rows + kRowWarps - 1) / kRowWarps), kRowKernelThreads, 0, stream,
                  sharing, rows, dim, share, padded_rows, delta, tensor, scores ? *scores : ScoreArrays<Acc>{},
                  scores != nullptr);
  });
}

template <class Acc>
const char* launch_share(const AttentionScores& p, int64_t value_dim, const Sharing& sharing,
                         const AttentionOperands<Acc>& w, bool tensor, void* stream) {
  if (!sharing.output.data && sharing.needs_output) {
    const char* error = with_products(p.dtype, p.tf32, std::max(p.dim, value_dim), [&](auto product) -> const char* {
      using Product = typename decltype(product)::type;
      if constexpr (std::is_same_v<typename Product::Acc, Acc>) {
        using Tiles = OutputTiles<Product>;
        static_assert(Tiles::bytes(Tiles::kBuffers) <= kMostSharedBytes, "too much shared memory");
        const int64_t blocks = p.batch * p.heads * blocks_for(p.tokens, Product::kStationary);
        return launch(outputs_kernel<Product>, grid_of(blocks), Product::kThreads, Tiles::bytes(Tiles::kBuffers), stream, p,
                      w);
      }
      return "the workspace is not of the accumulate type";
    });
    if (error) return error;
  }
  return launch_divide<Acc>(sharing, p.dtype, p.batch, p.heads, p.tokens, value_dim, &w, w.share, w.delta, tensor, stream);
}

template <class Acc>
const char* launch_finish(const PackedRows<Acc>& partial, int64_t slots, const View4* input, Dtype dtype, int64_t batch,
                          int64_t rows, int64_t dim, double factor, void* out, void* stream) {
  const int64_t out_rows = batch * partial.heads * rows;
  return with_inputs<Acc>(dtype, [&](auto element) {
    using T = typename decltype(element)::type;
    return launch(finish_kernel<T, Acc>, grid_of((out_rows + kRowWarps - 1) / kRowWarps), kRowKernelThreads, 0, stream,
                  partial, slots, partial.elements(batch), input ? *input : View4{}, rows, dim, out_rows, factor,
                  static_cast<T*>(out));
  });
}

#define XAI_OPERANDS(Acc)                                                                                                  \
  template const char* launch_pack<Acc>(const View4&, Dtype, int64_t, int64_t, int64_t, const PackedRows<Acc>&, bool,      \
                                        const ScoreArrays<Acc>*, void*);                                                   \
  template const char* launch_mark_active<Acc>(const View4&, Dtype, int64_t, int64_t, int64_t, int64_t,                    \
                                               const ScoreArrays<Acc>&, void*);                                            \
  template const char* launch_operands<Acc>(const AttentionScores&, const View4&, int64_t, const AttentionOperands<Acc>&,  \
                                            bool, void*);                                                                  \
  template const char* launch_share<Acc>(const AttentionScores&, int64_t, const Sharing&, const AttentionOperands<Acc>&,   \
                                         bool, void*);                                                                     \
  template const char* launch_divide<Acc>(const Sharing&, Dtype, int64_t, int64_t, int64_t, int64_t,                       \
                                          const ScoreArrays<Acc>*, const PackedRows<Acc>&, Acc*, bool, void*);             \
  template const char* launch_finish<Acc>(const PackedRows<Acc>&, int64_t, const View4*, Dtype, int64_t, int64_t, int64_t, \
                                          double, void*, void*);
XAI_OPERANDS(float)
XAI_OPERANDS(double)
#undef XAI_OPERANDS

}  // namespace xai
