// Attention probabilities of a tile, rebuilt from q and k: what all streamed kernels share.
#pragma once
#include <algorithm>

#include "../scores.h"
#include "dispatch.cuh"
#include "score_tile.cuh"

namespace xai {

constexpr int64_t kTokenPadding = 128;  // no tile of queries reaches beyond the padded arrays
constexpr int64_t kWorkspaceAlignment = 64;
constexpr int kPrepareThreads = 128;
static_assert(kTokenPadding % kPrepareThreads == 0, "the 32 queries of a warp belong to one image");

inline int64_t round_up(int64_t value, int64_t multiple) { return (value + multiple - 1) / multiple * multiple; }

// Hands out the arrays of a workspace, one after the other.
struct Workspace {
  char* base;
  int64_t used = 0;
  template <class T>
  void take(T*& array, int64_t count) {
    array = reinterpret_cast<T*>(base + used);
    used = round_up(used + count * int64_t(sizeof(T)), kWorkspaceAlignment);
  }
};

// What is known per query before the tiles are met. Arrays along the queries are padded to `padded` tokens.
template <class Acc>
struct ScoreArrays {
  Acc* shift;        // (B,H,padded): LSE log2(e); +inf makes P zero: no key is left, or the query is not needed
  uint32_t* active;  // (B,1 or H,padded/32): bit i % 32 of word i / 32 is set if query i is needed
  int64_t active_batch, active_head;  // strides of `active`; active_head is 0 where all heads need the same queries
  int64_t padded;
  Acc scale;     // scale log2(e)
  bool aligned;  // 16-byte copies of q and k are possible
};

template <class Acc>
__device__ bool is_active(const ScoreArrays<Acc>& w, int64_t b, int64_t h, int64_t i) {
  return w.active[b * w.active_batch + h * w.active_head + i / kWarp] >> (i % kWarp) & 1;
}

// Whether any of `count` queries from `first` on is needed; both are multiples of 32.
template <class Acc>
__device__ bool any_active(const ScoreArrays<Acc>& w, int64_t b, int64_t h, int64_t first, int count) {
  const uint32_t* words = w.active + b * w.active_batch + h * w.active_head + first / kWarp;
  uint32_t any = 0;
  for (int word = 0; word < count / kWarp; ++word) any |= words[word];
  return any != 0;
}

// The fewest slots per block that keep a GPU busy, at most one per unit of work. Causal blocks differ in length: several
// waves, longest first, even them out.
inline int64_t streamed_slots(int64_t blocks, int64_t units, bool causal) {
  constexpr int64_t kMaxSlots = 64, kCausalWaves = 4;
  constexpr double kBusyEnough = 0.95;
  const int64_t wave = kResidentBlocks, waves = causal ? kCausalWaves : 1;
  int64_t best = 1;
  double best_busy = 0;
  for (int64_t slots = 1; slots <= std::min(units, kMaxSlots); ++slots) {
    const int64_t total = blocks * slots, needed = std::max(waves, (total + wave - 1) / wave);
    const double busy = double(total) / double(needed * wave);
    if (busy > best_busy) best = slots, best_busy = busy;
    if (busy >= kBusyEnough) break;
  }
  return best;
}

// 16-byte copies of q and k are possible.
template <class T>
bool can_copy_pieces(const AttentionScores& p) {
  return rows_are_aligned(p.query, sizeof(T)) && rows_are_aligned(p.key, sizeof(T)) && is_piece_multiple(p.dim, sizeof(T));
}

// ---- scores of a tile ----------------------------------------------------------------------------------------------

// The queries and keys of a head, from one of them on.
template <class Tile>
__device__ Rows<typename Tile::Element> head_rows(const View4& view, int64_t b, int64_t h, int64_t first, int64_t dim,
                                                  bool aligned) {
  using T = typename Tile::Element;
  const T* data = static_cast<const T*>(view.data) + b * view.batch + h * view.head + first * view.row;
  return {data, view.row, int(dim), aligned};
}

// What stands still and what moves past it. A kernel over `KEYS_STATIONARY` sums over queries, the other kind over keys.
template <class Tile, bool KEYS_STATIONARY>
class Scores {
 public:
  using Acc = typename Tile::Acc;
  static constexpr int kRows = Tile::kRows, kColumns = Tile::kColumns;

  __device__ Scores(const AttentionScores& p, const ScoreArrays<Acc>& w, char* shared, int64_t b, int64_t stationary0)
      : tile(shared, int(p.dim)),
        p_(p),
        w_(w),
        b_(b),
        stationary0_(stationary0),
        addends_(reinterpret_cast<Acc*>(shared + Tile::shared_bytes(int(p.dim)))) {}

  static __host__ __device__ size_t shared_bytes(int64_t dim) {
    return Tile::shared_bytes(int(dim)) + kAddendPitch * Tile::kStationary * sizeof(Acc);
  }

  __device__ void load_stationary(int64_t h) {
    tile.load_stationary(rows<KEYS_STATIONARY>(h, stationary0_),
                         [&](int row) { return is_needed<KEYS_STATIONARY>(h, stationary0_ + row); });
  }
  __device__ void load_moving(int64_t h, int64_t moving0, int buffer) {
    const uint64_t needed = needed_rows<!KEYS_STATIONARY>(h, moving0);
    tile.load_moving(buffer, rows<!KEYS_STATIONARY>(h, moving0), [=](int row) { return needed >> row & 1; });
  }

  // Calls use(x) with x = log2(e) (scale q k + mask) - shift(i, j), -inf for pairs that are masked out, of the 32 moving
  // rows from moving0 + column0 on. use() stands in both branches, so that the common one keeps x in its registers.
  template <class Shift, class Use>
  __device__ void logits(int64_t h, int64_t moving0, int buffer, int column0, Shift shift, Use use) const {
    Acc x[kRows][kColumns];
    tile.scores(buffer, column0, x);
#pragma unroll
    for (int i = 0; i < kRows; ++i)
#pragma unroll
      for (int j = 0; j < kColumns; ++j) x[i][j] = x[i][j] * w_.scale - shift(i, j);
    if (needs_mask(moving0 + column0)) {
      mask(h, moving0 + column0, x);
      use(x);
    } else {
      use(x);
    }
  }
  // The same with P = 2^x.
  template <class Shift, class Use>
  __device__ void probabilities(int64_t h, int64_t moving0, int buffer, int column0, Shift shift, Use use) const {
    logits(h, moving0, buffer, column0, shift, [&](Acc(&x)[kRows][kColumns]) {
#pragma unroll
      for (int i = 0; i < kRows; ++i)
#pragma unroll
        for (int j = 0; j < kColumns; ++j) x[i][j] = exp2_of(x[i][j]);
      use(x);
    });
  }

  Tile tile;

 private:
  template <bool KEYS>
  __device__ Rows<typename Tile::Element> rows(int64_t h, int64_t first) const {
    if (KEYS) return head_rows<Tile>(p_.key, b_, h / (p_.heads / p_.kv_heads), first, p_.dim, w_.aligned);
    return head_rows<Tile>(p_.query, b_, h, first, p_.dim, w_.aligned);
  }
  template <bool KEYS>
  __device__ bool is_needed(int64_t h, int64_t token) const {
    return KEYS ? token < p_.keys : token < p_.tokens && is_active(w_, b_, h, token);
  }

  // is_needed() of the moving rows, a bit each
  template <bool KEYS>
  __device__ uint64_t needed_rows(int64_t h, int64_t first) const {
    static_assert(Tile::kMoving <= 64, "one bit a row");
    if (KEYS) return p_.keys - first >= 64 ? ~uint64_t(0) : (uint64_t(1) << (p_.keys - first)) - 1;
    const uint32_t* words = w_.active + b_ * w_.active_batch + h * w_.active_head + first / kWarp;
    return words[0] | (Tile::kMoving > 32 ? uint64_t(words[Tile::kMoving / 64]) << 32 : 0);
  }

  __device__ bool needs_mask(int64_t moving0) const {
    const int64_t keys = KEYS_STATIONARY ? stationary0_ : moving0, queries = KEYS_STATIONARY ? moving0 : stationary0_;
    const int64_t last_key = keys + (KEYS_STATIONARY ? Tile::kStationary : kScoreColumns) - 1;
    return p_.mask_kind != MaskKind::none || (p_.causal && last_key > queries) || last_key >= p_.keys;
  }

  // Each warp lays out what its pairs add to x, then takes it into its registers. Going through shared memory reads the mask
  // along the keys, in a small loop that needs few registers, whatever the type of the mask.
  __device__ void mask(int64_t h, int64_t moving0, Acc (&x)[kRows][kColumns]) const {
    __syncwarp();
    lay_out_mask(h, moving0);
    __syncwarp();
#pragma unroll
    for (int i = 0; i < kRows; ++i)
#pragma unroll
      for (int j = 0; j < kColumns; ++j) {
        // -inf stays, whatever the mask says: of a query that is not needed the mask may be NaN.
        const Acc addend = addends_[Tile::row(i) * kAddendPitch + Tile::column(j)];
        const bool removed = x[i][j] == -infinity<Acc>() || addend == -infinity<Acc>();
        x[i][j] = removed ? -infinity<Acc>() : x[i][j] + addend;
      }
  }

  __device__ void lay_out_mask(int64_t h, int64_t moving0) const {
    const auto add = [](auto value) {
      const Acc addend = to_accumulate<Acc>(value);
      return addend <= Acc(kRemovedBelow) ? -infinity<Acc>() : addend * Acc(kLog2e);
    };
    const auto keep = [](uint8_t value) { return value ? Acc(0) : -infinity<Acc>(); };
    if (p_.mask_kind == MaskKind::none) return lay_out<uint8_t>(h, moving0, nullptr, keep);
    if (p_.mask_kind == MaskKind::boolean) return lay_out<uint8_t>(h, moving0, p_.mask.data, keep);
    switch (p_.mask_dtype) {
      case Dtype::f64: return lay_out<double>(h, moving0, p_.mask.data, add);
      case Dtype::f16: return lay_out<__half>(h, moving0, p_.mask.data, add);
      case Dtype::bf16: return lay_out<__nv_bfloat16>(h, moving0, p_.mask.data, add);
      default: return lay_out<float>(h, moving0, p_.mask.data, add);
    }
  }

  // addends (kStationary,32) = f(mask), 0 without a mask; -inf for pairs that do not exist. Neighbouring lanes, neighbouring
  // keys.
  template <class M, class F>
  __device__ void lay_out(int64_t h, int64_t moving0, const void* mask, F f) const {
    constexpr int kKeys = KEYS_STATIONARY ? Tile::kWarpRows : kScoreColumns;
    constexpr int kQueries = KEYS_STATIONARY ? kScoreColumns : Tile::kWarpRows;
    const int lane = threadIdx.x % kWarp, key_in_tile = lane % kKeys, row0 = warp_index() * Tile::kWarpRows;
    const int64_t key = (KEYS_STATIONARY ? stationary0_ + row0 : moving0) + key_in_tile;
    const int64_t query0 = KEYS_STATIONARY ? moving0 : stationary0_ + row0;
    const M* data = static_cast<const M*>(mask) + b_ * p_.mask.batch + h * p_.mask.head + key * p_.mask.column;
#pragma unroll 4
    for (int q = lane / kKeys; q < kQueries; q += kWarp / kKeys) {
      const int64_t query = query0 + q;
      const bool exists = key < p_.keys && query < p_.tokens && !(p_.causal && key > query);
      const int row = row0 + (KEYS_STATIONARY ? key_in_tile : q), column = KEYS_STATIONARY ? q : key_in_tile;
      const Acc addend = !exists ? -infinity<Acc>() : mask ? f(data[query * p_.mask.row]) : Acc(0);
      addends_[row * kAddendPitch + column] = addend;
    }
  }

  static constexpr int kAddendPitch = kScoreColumns + 1;  // odd: a column lies in different banks

  const AttentionScores& p_;
  const ScoreArrays<Acc>& w_;
  int64_t b_, stationary0_;
  Acc* addends_;
};

// Sum over the four lanes that hold the same rows of a tile.
template <class Acc>
__device__ Acc row_lanes_sum(Acc value) {
  value += __shfl_xor_sync(kAllLanes, value, 1);
  return value + __shfl_xor_sync(kAllLanes, value, 2);
}

// ---- the tile of a problem ------------------------------------------------------------------------------------------

constexpr int64_t kMaxDim = 256;
constexpr int64_t kMaxDoubleDim = 192;  // of double; of float with its largest tile: what 163 KB of shared memory hold
constexpr bool kAnyDim = true;

// Calls f(Type<Tile>, Type<ExtremeTile>). D is padded to 64, 128 or 256 elements; max and min, which spend their time on
// loads, have one instance for every D.
template <class F>
auto with_tiles(const AttentionScores& p, F f) {
  const auto half_tiles = [&](auto element) {
    using T = typename decltype(element)::type;
    using Extreme = Type<MmaTile<T, 16, 1, 32, kAnyDim>>;
    if (p.dim <= 64) return f(Type<MmaTile<T, 4, 2, 64>>(), Extreme());
    if (p.dim <= 128) return f(Type<MmaTile<T, 8, 2, 64>>(), Extreme());
    return f(Type<MmaTile<T, 16, 1, 64>>(), Extreme());
  };
  const auto tf32_tiles = [&] {
    using Extreme = Type<MmaTile<float, 32, 1, 32, kAnyDim>>;
    if (p.dim <= 64) return f(Type<MmaTile<float, 8, 2, 64>>(), Extreme());
    if (p.dim <= 128) return f(Type<MmaTile<float, 16, 1, 64>>(), Extreme());
    return f(Type<MmaTile<float, 32, 1, 64>>(), Extreme());
  };
  switch (p.dtype) {
    case Dtype::f64: return f(Type<FmaTile<double, 1>>(), Type<FmaTile<double, 1>>());
    case Dtype::f16: return half_tiles(Type<__half>());
    case Dtype::bf16: return half_tiles(Type<__nv_bfloat16>());
    default:
      if (p.tf32) return tf32_tiles();
      if (p.dim <= kMaxDoubleDim) return f(Type<FmaTile<float, 4>>(), Type<FmaTile<float, 4>>());
      return f(Type<FmaTile<float, 2>>(), Type<FmaTile<float, 2>>());
  }
}

}  // namespace xai
