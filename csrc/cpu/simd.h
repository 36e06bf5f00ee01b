// Which vector bodies this machine runs.
//
// A family's body file is written once with GCC vector types of kVectorBytes; bodies.inc compiles it once per instruction
// set, inside a namespace and between pragmas. (A `target` attribute on the outer function alone is not enough: GCC splits
// wide vectors of helpers that lack it before it inlines them.)
#pragma once
#include <cstdint>

namespace xai {

// amx: avx512 and a matrix unit of bf16 tiles that the system lets this process use (see matrix_unit.inc).
enum class Capability { base, avx2, avx512, amx };

// The best body that this CPU supports; the environment variable XAI_FAST_CPU=base|avx2|avx512|amx lowers it (for tests).
Capability cpu_capability();
const char* cpu_capability_name();

// A 16-bit float as it lies in memory.
struct Bf16 {
  uint16_t bits;
};
struct F16 {
  uint16_t bits;
};

// 2^f on |f| <= 1/2: minimax in relative error (1.9e-9 and 5.0e-22), by the Remez exchange.
inline constexpr float kExp2Float[] = {1.0000000005541663f,    0.6931472057372526f,   0.24022646890639573f,
                                       0.055503287769976636f,  0.009618488956522791f, 0.001339993120947414f,
                                       0.00015345812158740183f};
inline constexpr double kExp2Double[] = {1.0,
                                         0.6931471805599453,
                                         0.24022650695910072,
                                         0.05550410866482158,
                                         0.009618129107628489,
                                         0.0013333558146428298,
                                         0.00015403530393351796,
                                         1.5252733804253415e-05,
                                         1.3215486824454474e-06,
                                         1.0178085886587169e-07,
                                         7.05489138043723e-09,
                                         4.445573312914988e-10,
                                         2.5737576045892736e-11,
                                         1.3664103911976547e-12};

}  // namespace xai

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define XAI_X86_BODIES 1
#include <immintrin.h>
#if defined(__linux__) && __GNUC__ >= 11
#define XAI_AMX_BODIES 1
#endif
#endif
