// Probabilities of the pairs of a stationary and a moving tile, for kernels that hold them as TileProduct does.
#pragma once
#include "operands.cuh"
#include "tile_product.cuh"

namespace xai {

// One value per query for each pair of a thread: queries are columns where keys are stationary, else rows.
template <class Product, bool KEYS_STATIONARY>
struct QueryValues {
  typename Product::Acc values[KEYS_STATIONARY ? Product::kColumns : Product::kRows];
  // `source` points at the first query of the tile
  __device__ void load(const typename Product::Acc* source) {
#pragma unroll
    for (int n = 0; n < (KEYS_STATIONARY ? Product::kColumns : Product::kRows); ++n)
      values[n] = source[KEYS_STATIONARY ? Product::column(n) : Product::row(n)];
  }
  __device__ typename Product::Acc at(int i, int j) const { return values[KEYS_STATIONARY ? j : i]; }
};

// Some of the `count` queries from `first` on, which lie in one word or are whole words, is needed.
template <class Acc>
__device__ bool tile_is_active(const ScoreArrays<Acc>& w, int64_t b, int64_t h, int64_t first, int count) {
  if (count >= kWarp) return any_active(w, b, h, first, count);
  const uint32_t bits = w.active[b * w.active_batch + h * w.active_head + first / kWarp] >> (first % kWarp);
  return (bits & ((1u << count) - 1)) != 0;
}

template <class Product, bool KEYS_STATIONARY>
class PairScores {
 public:
  using Acc = typename Product::Acc;
  static constexpr int kKeys = KEYS_STATIONARY ? Product::kStationary : Product::kMoving;
  static constexpr int kQueries = KEYS_STATIONARY ? Product::kMoving : Product::kStationary;

  // addends: a pair tile in shared memory, free until a thread writes to its own pairs
  __device__ PairScores(const AttentionScores& p, Acc scale, Acc* addends) : p_(p), scale_(scale), addends_(addends) {}

  // x: products q k -> probabilities. All threads of the block call it; a call must not meet the one before.
  // each(i, j, y, probability) sees y = log2(e) scale q k, without the mask, and returns what x becomes.
  template <class Each>
  __device__ void probabilities(int64_t b, int64_t h, int64_t query0, int64_t key0,
                                const QueryValues<Product, KEYS_STATIONARY>& shift, typename Product::Pairs& x,
                                Each each) const {
    const bool masked = needs_mask(query0, key0);
    if (masked) {
      lay_out_mask(b, h, query0, key0);
      __syncthreads();
    }
#pragma unroll
    for (int i = 0; i < Product::kRows; ++i)
#pragma unroll
      for (int j = 0; j < Product::kColumns; ++j) {
        const Acc y = x[i][j] * scale_;
        Acc logit = y - shift.at(i, j);
        if (masked) {
          // -inf stays, whatever the mask says: of a query that is not needed the mask may be NaN.
          const Acc addend = addends_[Product::row(i) * Product::kPairPitch + Product::column(j)];
          const bool removed = logit == -infinity<Acc>() || addend == -infinity<Acc>();
          logit = removed ? -infinity<Acc>() : logit + addend;
        }
        x[i][j] = each(i, j, y, exp2_of(logit));
      }
  }

 private:
  __device__ bool needs_mask(int64_t query0, int64_t key0) const {
    const int64_t last_key = key0 + kKeys - 1;
    return p_.mask_kind != MaskKind::none || (p_.causal && last_key > query0) || last_key >= p_.keys;
  }

  __device__ void lay_out_mask(int64_t b, int64_t h, int64_t query0, int64_t key0) const {
    const auto add = [](auto value) {
      const Acc addend = to_accumulate<Acc>(value);
      return addend <= Acc(kRemovedBelow) ? -infinity<Acc>() : addend * Acc(kLog2e);
    };
    const auto keep = [](uint8_t value) { return value ? Acc(0) : -infinity<Acc>(); };
    if (p_.mask_kind == MaskKind::none) return lay_out<uint8_t>(b, h, query0, key0, nullptr, keep);
    if (p_.mask_kind == MaskKind::boolean) return lay_out<uint8_t>(b, h, query0, key0, p_.mask.data, keep);
    switch (p_.mask_dtype) {
      case Dtype::f64: return lay_out<double>(b, h, query0, key0, p_.mask.data, add);
      case Dtype::f16: return lay_out<__half>(b, h, query0, key0, p_.mask.data, add);
      case Dtype::bf16: return lay_out<__nv_bfloat16>(b, h, query0, key0, p_.mask.data, add);
      default: return lay_out<float>(b, h, query0, key0, p_.mask.data, add);
    }
  }

  // addends = f(mask), 0 without a mask; -inf for pairs that do not exist. Neighbouring threads, neighbouring keys.
  template <class M, class F>
  __device__ void lay_out(int64_t b, int64_t h, int64_t query0, int64_t key0, const void* mask, F f) const {
    const int key_in_tile = threadIdx.x % kKeys;
    const int64_t key = key0 + key_in_tile;
    const M* data = static_cast<const M*>(mask) + b * p_.mask.batch + h * p_.mask.head + key * p_.mask.column;
#pragma unroll 2
    for (int q = threadIdx.x / kKeys; q < kQueries; q += Product::kThreads / kKeys) {
      const int64_t query = query0 + q;
      const bool exists = key < p_.keys && query < p_.tokens && !(p_.causal && key > query);
      const Acc addend = !exists ? -infinity<Acc>() : mask ? f(data[query * p_.mask.row]) : Acc(0);
      const int row = KEYS_STATIONARY ? key_in_tile : q, column = KEYS_STATIONARY ? q : key_in_tile;
      addends_[row * Product::kPairPitch + column] = addend;
    }
  }

  const AttentionScores& p_;
  Acc scale_;
  Acc* addends_;
};

}  // namespace xai
