// Sizes of the blocks in which the CPU kernels walk over queries and keys, and small arithmetic on sizes.
#pragma once
#include <algorithm>
#include <cstdint>

#include "../types.h"

namespace xai {

constexpr double kLog2e = 1.4426950408889634;

// Columns of a packed key panel: a multiple of every body's register tile.
constexpr int64_t kPanelBytes = 128;
inline int64_t panel_columns_of(int64_t element_bytes) { return kPanelBytes / element_bytes; }

// A panel of columns as operands.inc packs it for the chosen body.
struct PanelSize {
  int64_t columns, bytes;
};

inline int64_t round_up(int64_t x, int64_t multiple) { return (x + multiple - 1) / multiple * multiple; }
inline int64_t pieces_of(int64_t x, int64_t size) { return (x + size - 1) / size; }

// Numbers between rows of n: whole panels, and an odd number of them, as rows a power of two apart would share their cache
// sets.
inline int64_t panel_pitch_of(int64_t n, int64_t panel_columns) { return (pieces_of(n, panel_columns) | 1) * panel_columns; }

// f(i) for the share of `slot` among `count` items that `slots` take in turn, forth and back: where items grow, as the
// blocks of causal attention do, shares stay equal.
template <class F>
void take_turns(int64_t slot, int64_t slots, int64_t count, F f) {
  for (int64_t round = 0; round * slots < count; ++round) {
    const int64_t i = round * slots + (round % 2 ? slots - 1 - slot : slot);
    if (i < count) f(i);
  }
}

inline int64_t accumulate_bytes(Dtype d) { return d == Dtype::f64 ? 8 : 4; }

}  // namespace xai
