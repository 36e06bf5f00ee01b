// One device function per PTX instruction that CUDA C++ has no name for, each with a twin for the emulator.
//
// A matrix fragment is spread over the 32 lanes of a warp; lane = 4 g + t with g = 0..7, t = 0..3. Below, "word" is 32 bits:
// two 16-bit elements or one TF32 element. In words, all types share one layout:
//   a (16 rows x 8 words)   a[0] = (g, t)   a[1] = (g + 8, t)   a[2] = (g, t + 4)   a[3] = (g + 8, t + 4)
//   b (8 columns x 8 words) b[0] = (g, t)   b[1] = (g, t + 4)
//   d (16 rows x 8 columns) d[0] = (g, 2t)  d[1] = (g, 2t + 1)  d[2] = (g + 8, 2t)  d[3] = (g + 8, 2t + 1)
#pragma once
#include <type_traits>

#include "launch.cuh"

namespace xai {

#ifdef XAI_EMULATE

struct Fragment {
  float* d;
  const uint32_t* a;
  const uint32_t* b;
};

// Products of the elements in one word; tf32 drops the 13 low bits of an f32, as the tensor core does.
inline float word_dot(uint32_t x, uint32_t y, float) {
  return __uint_as_float(x & 0xffffe000u) * __uint_as_float(y & 0xffffe000u);
}
template <class T>
float word_dot(uint32_t x, uint32_t y, T) {
  T u[2], v[2];
  std::memcpy(static_cast<void*>(u), &x, sizeof x);
  std::memcpy(static_cast<void*>(v), &y, sizeof y);
  return float(u[0]) * float(v[0]) + float(u[1]) * float(v[1]);
}

template <class T>
void mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  Fragment mine{d, a, b};
  emulator::warp_collective(~0u, "mma", &mine, [](void** lanes) {
    const auto fragment = [&](int lane) -> const Fragment& { return *static_cast<Fragment*>(lanes[lane]); };
    for (int row = 0; row < 16; ++row)
      for (int column = 0; column < 8; ++column) {
        float sum = 0;
        for (int word = 0; word < 8; ++word) {
          const uint32_t x = fragment(row % 8 * 4 + word % 4).a[row / 8 + word / 4 * 2];
          const uint32_t y = fragment(column * 4 + word % 4).b[word / 4];
          sum += word_dot(x, y, T(0.0f));
        }
        fragment(row % 8 * 4 + column / 2).d[row / 8 * 2 + column % 2] += sum;
      }
  });
}

// Four 8-row x 16-byte matrices: lane 8 m + r names row r of matrix m; r[m] is word t of row g of matrix m.
inline void ldmatrix_x4(uint32_t (&r)[4], const void* row) {
  struct Request {
    uint32_t* out;
    const void* row;
  } mine{r, row};
  if (reinterpret_cast<uintptr_t>(row) % 16) emulator::fail("ldmatrix from a misaligned row");
  emulator::warp_collective(~0u, "ldmatrix", &mine, [](void** lanes) {
    for (int lane = 0; lane < 32; ++lane)
      for (int m = 0; m < 4; ++m) {
        const void* source = static_cast<Request*>(lanes[8 * m + lane / 4])->row;
        std::memcpy(&static_cast<Request*>(lanes[lane])->out[m], static_cast<const char*>(source) + lane % 4 * 4, 4);
      }
  });
}

inline void copy_async_16(void* shared, const void* global, bool valid) {
  emulator::async_copy(shared, global, valid ? 16 : 0, 16);
}
inline void copy_async_wait() { emulator::async_wait_all(); }

template <size_t BYTES>
void load_whole(void* to, const void* from) {
  if (reinterpret_cast<uintptr_t>(from) % BYTES) emulator::fail("a misaligned load");
  std::memcpy(to, from, BYTES);
}
template <size_t BYTES>
void store_whole(void* to, const void* from) {
  if (reinterpret_cast<uintptr_t>(to) % BYTES) emulator::fail("a misaligned store");
  std::memcpy(to, from, BYTES);
}
inline void store_shared_16(void* to, const void* from) { store_whole<16>(to, from); }

inline float fast_exp2(float x) { return std::exp2(x); }

// Nearest TF32 value, ties away from zero.
inline uint32_t round_to_tf32(uint32_t x) {
  const bool finite = (x & 0x7f800000u) != 0x7f800000u;
  return finite ? (x + 0x1000u) & 0xffffe000u : x;
}

#else

template <class T>
__device__ void mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]);
template <>
__device__ __forceinline__ void mma<__half>(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
template <>
__device__ __forceinline__ void mma<__nv_bfloat16>(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
template <>
__device__ __forceinline__ void mma<float>(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

__device__ __forceinline__ uint32_t shared_address(const void* p) { return uint32_t(__cvta_generic_to_shared(p)); }

// Four 8-row x 16-byte matrices: lane 8 m + r names row r of matrix m; r[m] is word t of row g of matrix m.
__device__ __forceinline__ void ldmatrix_x4(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}

// Copies 16 bytes past the registers, or writes zeros if not `valid`. In shared memory after copy_async_wait().
__device__ __forceinline__ void copy_async_16(void* shared, const void* global, bool valid) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)), "l"(global),
               "r"(valid ? 16 : 0)
               : "memory");
}
__device__ __forceinline__ void copy_async_wait() { asm volatile("cp.async.wait_all;" ::: "memory"); }

// BYTES = 16, 8, 4 or 2 at an aligned address, in one instruction. A memcpy is not: where the other branch moves the same
// elements one by one, nvcc merges the two and moves words.
template <size_t BYTES>
using Whole =
    std::conditional_t<BYTES == 16, uint4,
                       std::conditional_t<BYTES == 8, uint2, std::conditional_t<BYTES == 4, uint32_t, uint16_t> > >;
template <size_t BYTES>
__device__ __forceinline__ void load_whole(void* to, const void* from) {
  const auto whole = *static_cast<const Whole<BYTES>*>(from);
  memcpy(to, &whole, BYTES);
}
template <size_t BYTES>
__device__ __forceinline__ void store_whole(void* to, const void* from) {
  Whole<BYTES> w;
  static_assert(sizeof w == BYTES);
  memcpy(&w, from, BYTES);
  if constexpr (BYTES == 16)
    asm volatile("st.v4.b32 [%0], {%1,%2,%3,%4};" ::"l"(to), "r"(w.x), "r"(w.y), "r"(w.z), "r"(w.w) : "memory");
  else if constexpr (BYTES == 8)
    asm volatile("st.v2.b32 [%0], {%1,%2};" ::"l"(to), "r"(w.x), "r"(w.y) : "memory");
  else
    *static_cast<Whole<BYTES>*>(to) = w;
}
// The same into shared memory.
__device__ __forceinline__ void store_shared_16(void* to, const void* from) {
  uint4 w;
  memcpy(&w, from, 16);
  asm volatile("st.shared.v4.b32 [%0], {%1,%2,%3,%4};" ::"r"(shared_address(to)), "r"(w.x), "r"(w.y), "r"(w.z), "r"(w.w)
               : "memory");
}

// Relative error at most 2^-22; exp2(-inf) = 0.
__device__ __forceinline__ float fast_exp2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// Nearest TF32 value, ties away from zero.
__device__ __forceinline__ uint32_t round_to_tf32(uint32_t x) {
  uint32_t y;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(y) : "f"(__uint_as_float(x)));
  return y;
}

#endif

}  // namespace xai
