// Philox4x32-10 (Salmon, Moraes, Dror & Shaw 2011, section 3.3) and the two uses that csrc/ihvp.h makes of it, one text for
// the CPU and the GPU. A counter-based generator: the same seed and counter give the same bits on every device.
#pragma once
#include <cstdint>

#include "ihvp.h"

namespace xai {

struct Words {
  uint32_t word[4];
};

constexpr int kPhiloxRounds = 10;
constexpr uint64_t kPhiloxMultiply0 = 0xD2511F53u, kPhiloxMultiply1 = 0xCD9E8D57u;
constexpr uint32_t kPhiloxStep0 = 0x9E3779B9u, kPhiloxStep1 = 0xBB67AE85u;

inline XAI_HOST_DEVICE Words philox(uint64_t seed, uint32_t c0, uint32_t c1, uint32_t c2, uint32_t c3) {
  uint32_t key0 = uint32_t(seed), key1 = uint32_t(seed >> 32);
#ifdef __CUDACC__
#pragma unroll
#endif
  for (int round = 0; round < kPhiloxRounds; ++round) {
    const uint64_t product0 = kPhiloxMultiply0 * c0, product1 = kPhiloxMultiply1 * c2;
    c0 = uint32_t(product1 >> 32) ^ c1 ^ key0;
    c1 = uint32_t(product1);
    c2 = uint32_t(product0 >> 32) ^ c3 ^ key1;
    c3 = uint32_t(product0);
    key0 += kPhiloxStep0;
    key1 += kPhiloxStep1;
  }
  return {{c0, c1, c2, c3}};
}

// The row that element k of the batch of `step` names: floor(r rows / 2^64) for 64 random bits r. rows < 2^31: no overflow.
inline XAI_HOST_DEVICE int64_t sampled_row(uint64_t seed, int64_t step, int64_t k, int64_t rows) {
  const Words words = philox(seed, uint32_t(k / 2), uint32_t(step), 0, kSampleStream);
  const bool odd = k % 2 != 0;
  const uint64_t low = odd ? words.word[2] : words.word[0], high = odd ? words.word[3] : words.word[1];
  return int64_t((high * uint64_t(rows) + (low * uint64_t(rows) >> 32)) >> 32);
}

// The 128 signs of row `position` of the projection matrix, columns 128 group and up: bit j % 32 of word j / 32 % 4.
inline XAI_HOST_DEVICE Words projection_bits(uint64_t seed, int64_t position, int64_t group) {
  return philox(seed, uint32_t(position), uint32_t(uint64_t(position) >> 32), uint32_t(group), kProjectionStream);
}
inline XAI_HOST_DEVICE bool is_positive(const Words& bits, int64_t j) { return bits.word[j / 32 % 4] >> (j % 32) & 1; }

// x where the bit is set, -x where it is not.
inline XAI_HOST_DEVICE float with_sign(float x, uint32_t positive) { return positive ? x : -x; }
inline XAI_HOST_DEVICE double with_sign(double x, uint32_t positive) { return positive ? x : -x; }

}  // namespace xai
