#include "simd.h"

#include <cstdlib>
#include <cstring>

namespace xai {

static Capability supported() {
#ifdef XAI_X86_BODIES
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
      __builtin_cpu_supports("avx512dq"))
    return Capability::avx512;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return Capability::avx2;
#endif
  return Capability::base;
}

static Capability choose() {
  const Capability best = supported();
  const char* wish = std::getenv("XAI_FAST_CPU");
  if (wish && !std::strcmp(wish, "base")) return Capability::base;
  if (wish && !std::strcmp(wish, "avx2") && best == Capability::avx512) return Capability::avx2;
  return best;
}

Capability cpu_capability() {
  static const Capability chosen = choose();
  return chosen;
}

const char* cpu_capability_name() {
  switch (cpu_capability()) {
    case Capability::avx512: return "avx512";
    case Capability::avx2: return "avx2";
    default: return "base";
  }
}

}  // namespace xai
