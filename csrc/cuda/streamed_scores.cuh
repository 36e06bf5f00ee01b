// The streamed rollout step: its workspace, what is prepared once per call, and the masked scores of a tile.
#pragma once
#include <algorithm>
#include <type_traits>

#include "../rollout.h"
#include "score_tile.cuh"

namespace xai {

// ---- workspace ------------------------------------------------------------------------------------------------------

constexpr int64_t kTokenPadding = 128;  // no tile of queries reaches beyond the padded arrays
constexpr int64_t kWorkspaceAlignment = 64;

// Arrays along the queries are padded to `padded` tokens.
template <class Acc>
struct StreamedArrays {
  Acc* coefficient;  // (B,R,padded): c, zero in the padding
  Acc* shift;        // (B,H,padded): LSE log2(e); +inf makes P zero: no key is left, or the query is not needed
  uint32_t* active;  // (B,padded/32): bit i % 32 of word i / 32 is set if some rows[b,:,i] is not 0
  Acc* partial;      // (B,slots,R,N)
  Acc* row_sums;     // (B,sum_slots,N): partial row sums of the fused P, for max and min with normalisation
  int64_t padded, slots, sum_slots;
  Acc scale;     // scale log2(e)
  bool aligned;  // 16-byte copies of q and k are possible
};

inline int64_t round_up(int64_t value, int64_t multiple) { return (value + multiple - 1) / multiple * multiple; }

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
  w.slots = streamed_slots(blocks * blocks_for(p.n_rows, row_group(p)), moving_tiles * (extreme ? 1 : p.heads), p.causal);
  w.scale = Acc(p.scale * kLog2e);
  w.aligned = rows_are_aligned(p.query, sizeof(typename Tile::Element)) &&
              rows_are_aligned(p.key, sizeof(typename Tile::Element)) &&
              is_piece_multiple(p.dim, sizeof(typename Tile::Element));
  w.sum_slots = needs_row_sums(p) ? streamed_slots(blocks, moving_tiles, p.causal) : 0;
  int64_t used = 0;
  const auto take = [&](auto*& array, int64_t count) {
    array = reinterpret_cast<std::remove_reference_t<decltype(array)>>(base + used);
    used = round_up(used + count * int64_t(sizeof(*array)), kWorkspaceAlignment);
  };
  take(w.coefficient, p.batch * p.n_rows * w.padded);
  take(w.shift, p.batch * p.heads * w.padded);
  take(w.active, p.batch * w.padded / kWarp);
  take(w.partial, p.batch * w.slots * p.n_rows * p.tokens);
  take(w.row_sums, p.batch * w.sum_slots * p.tokens);
  return used;
}

// ---- streamed from q and k: preparation -----------------------------------------------------------------------------

constexpr int kPrepareThreads = 128;
static_assert(kTokenPadding % kPrepareThreads == 0, "the 32 queries of a warp belong to one image");

// rows (B,R,N) -> coefficient, active. A thread takes one query.
template <class Acc>
__global__ void __launch_bounds__(kPrepareThreads) prepare_rows_kernel(const StreamedRowStep p, StreamedArrays<Acc> w) {
  const int64_t item = int64_t(blockIdx.x) * kPrepareThreads + threadIdx.x;
  const int64_t b = item / w.padded, i = item % w.padded;
  const Acc* rows = static_cast<const Acc*>(p.rows) + b * p.n_rows * p.tokens + i;
  bool needed = false;
  for (int64_t r = 0; r < p.n_rows; ++r) {
    const Acc row = i < p.tokens ? rows[r * p.tokens] : Acc(0);
    needed |= row != 0;
    w.coefficient[(b * p.n_rows + r) * w.padded + i] = row * Acc(p.rows_factor);
  }
  const unsigned word = __ballot_sync(kAllLanes, needed);
  if (threadIdx.x % kWarp == 0) w.active[item / kWarp] = word;
}

template <class Acc>
__device__ bool is_active(const StreamedArrays<Acc>& w, int64_t b, int64_t i) {
  return w.active[b * (w.padded / kWarp) + i / kWarp] >> (i % kWarp) & 1;
}

// Whether any of `count` queries from `first` on is needed; both are multiples of 32.
template <class Acc>
__device__ bool any_active(const StreamedArrays<Acc>& w, int64_t b, int64_t first, int count) {
  const uint32_t* words = w.active + b * (w.padded / kWarp) + first / kWarp;
  uint32_t any = 0;
  for (int word = 0; word < count / kWarp; ++word) any |= words[word];
  return any != 0;
}

template <class Acc>
__device__ Acc shift_of(Acc lse) {
  return lse == -infinity<Acc>() ? infinity<Acc>() : lse * Acc(kLog2e);
}

// lse (B,H,N) -> shift. A thread takes one query of one head.
template <class Acc>
__global__ void __launch_bounds__(kPrepareThreads) prepare_lse_kernel(const StreamedRowStep p, StreamedArrays<Acc> w) {
  const int64_t item = int64_t(blockIdx.x) * kPrepareThreads + threadIdx.x;
  const int64_t bh = item / w.padded, i = item % w.padded;
  const bool needed = i < p.tokens && is_active(w, bh / p.heads, i);
  w.shift[item] = needed ? shift_of(static_cast<const Acc*>(p.lse)[bh * p.tokens + i]) : infinity<Acc>();
}

// row_sums (B,sum_slots,N) -> coefficient /= w + row sum, or 0 where that is 0. A thread takes one query.
template <class Acc>
__global__ void __launch_bounds__(kPrepareThreads)
    normalize_coefficients_kernel(const StreamedRowStep p, StreamedArrays<Acc> w) {
  const int64_t item = int64_t(blockIdx.x) * kPrepareThreads + threadIdx.x;
  const int64_t b = item / p.tokens, i = item % p.tokens;
  if (b >= p.batch) return;
  Acc sum = Acc(p.residual);
  for (int64_t slot = 0; slot < w.sum_slots; ++slot) sum += w.row_sums[(b * w.sum_slots + slot) * p.tokens + i];
  for (int64_t r = 0; r < p.n_rows; ++r) {
    Acc& coefficient = w.coefficient[(b * p.n_rows + r) * w.padded + i];
    coefficient = sum == 0 ? Acc(0) : coefficient / sum;
  }
}

// ---- streamed from q and k: scores of a tile ------------------------------------------------------------------------

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

  __device__ Scores(const StreamedRowStep& p, const StreamedArrays<Acc>& w, char* shared, int64_t b, int64_t stationary0)
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
                         [&](int row) { return is_needed<KEYS_STATIONARY>(stationary0_ + row); });
  }
  __device__ void load_moving(int64_t h, int64_t moving0, int buffer) {
    const uint64_t needed = needed_rows<!KEYS_STATIONARY>(moving0);
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
  __device__ bool is_needed(int64_t token) const {
    return token < p_.tokens && (KEYS || is_active(w_, b_, token));
  }

  // is_needed() of the moving rows, a bit each
  template <bool KEYS>
  __device__ uint64_t needed_rows(int64_t first) const {
    static_assert(Tile::kMoving <= 64, "one bit a row");
    if (KEYS) return p_.tokens - first >= 64 ? ~uint64_t(0) : (uint64_t(1) << (p_.tokens - first)) - 1;
    const uint32_t* words = w_.active + (b_ * w_.padded + first) / kWarp;
    return words[0] | (Tile::kMoving > 32 ? uint64_t(words[Tile::kMoving / 64]) << 32 : 0);
  }

  __device__ bool needs_mask(int64_t moving0) const {
    const int64_t keys = KEYS_STATIONARY ? stationary0_ : moving0, queries = KEYS_STATIONARY ? moving0 : stationary0_;
    const int64_t last_key = keys + (KEYS_STATIONARY ? Tile::kStationary : kScoreColumns) - 1;
    return p_.mask_kind != MaskKind::none || (p_.causal && last_key > queries) || last_key >= p_.tokens;
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
      const bool exists = key < p_.tokens && query < p_.tokens && !(p_.causal && key > query);
      const int row = row0 + (KEYS_STATIONARY ? key_in_tile : q), column = KEYS_STATIONARY ? q : key_in_tile;
      const Acc addend = !exists ? -infinity<Acc>() : mask ? f(data[query * p_.mask.row]) : Acc(0);
      addends_[row * kAddendPitch + column] = addend;
    }
  }

  static constexpr int kAddendPitch = kScoreColumns + 1;  // odd: a column lies in different banks

  const StreamedRowStep& p_;
  const StreamedArrays<Acc>& w_;
  int64_t b_, stationary0_;
  Acc* addends_;
};

// Sum over the four lanes that hold the same rows of a tile.
template <class Acc>
__device__ Acc row_lanes_sum(Acc value) {
  value += __shfl_xor_sync(kAllLanes, value, 1);
  return value + __shfl_xor_sync(kAllLanes, value, 2);
}

}  // namespace xai
