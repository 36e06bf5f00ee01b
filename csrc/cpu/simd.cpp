#include "simd.h"

#ifdef XAI_X86_BODIES
#include <cpuid.h>
#endif

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <iterator>

#ifdef XAI_AMX_BODIES
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace xai {

static constexpr const char* kNames[] = {"base", "avx2", "avx512", "amx"};

#ifdef XAI_AMX_BODIES
// Linux hands out the tile registers, which make a thread's saved state 8 KB larger, to processes that ask for them.
static bool may_use_tiles() {
  constexpr long kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}
#endif

#ifdef XAI_X86_BODIES
// Conversions of 16-bit floats, by their bit: not every compiler's __builtin_cpu_supports knows their name.
static bool has_f16c() {
  unsigned a, b, c, d;
  return __get_cpuid(1, &a, &b, &c, &d) && (c & bit_F16C) != 0;
}
#endif

static Capability supported() {
#ifdef XAI_X86_BODIES
  const bool avx512 = has_f16c() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
#ifdef XAI_AMX_BODIES
  if (avx512 && __builtin_cpu_supports("amx-tile") && __builtin_cpu_supports("amx-bf16") && may_use_tiles())
    return Capability::amx;
#endif
  if (avx512) return Capability::avx512;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_f16c()) return Capability::avx2;
#endif
  return Capability::base;
}

static Capability choose() {
  const Capability best = supported();
  const char* wish = std::getenv("XAI_FAST_CPU");
  if (!wish) return best;
  const auto name = std::find_if(std::begin(kNames), std::end(kNames), [&](const char* n) { return !std::strcmp(n, wish); });
  return name == std::end(kNames) ? best : std::min(best, Capability(name - std::begin(kNames)));
}

Capability cpu_capability() {
  static const Capability chosen = choose();
  return chosen;
}

const char* cpu_capability_name() { return kNames[int(cpu_capability())]; }

}  // namespace xai
