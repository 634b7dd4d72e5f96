// Dot products of pairs of bfloat16 with float32 accumulation, the same bits on every instruction set.
//
//   dot(a, b, c): in each of 16 lanes  c ← fma(a.odd, b.odd, c), then c ← fma(a.even, b.even, c)
//
// Each fma rounds to nearest even; subnormal inputs count as 0 and subnormal results become 0. That is what vdpbf16ps
// does, always (measured on an AMD Zen 4, every case of 13 million, those at the edge of the subnormals included).
// Elsewhere two fma instructions do the same while FlushSubnormals lives. One difference is left: NEON calls a result
// subnormal before rounding it, x86 after, so a result just below 2⁻¹²⁶ that rounds up to it is 0 on NEON only.
#pragma once

#include <cmath>
#include <cstdint>

#include "simd.h"

namespace gemma2::GEMMA2_ISA {

// While it lives, this thread's float32 instructions flush subnormals as dot() needs. Keep it around dot products only.
// Both ends are barriers to the compiler: what is loaded and stored in between is computed in between.
class FlushSubnormals {
 public:
#if defined(GEMMA2_ISA_AVX2)
  FlushSubnormals() : before_(_mm_getcsr()) { set(before_ | kBits); }
  ~FlushSubnormals() { set(before_); }
#elif defined(GEMMA2_ISA_NEON)
  FlushSubnormals() {
    asm volatile("mrs %0, fpcr" : "=r"(before_));
    set(before_ | kBits);
  }
  ~FlushSubnormals() { set(before_); }
#else
  FlushSubnormals() {}
  ~FlushSubnormals() {}
#endif
  FlushSubnormals(const FlushSubnormals&) = delete;
  FlushSubnormals& operator=(const FlushSubnormals&) = delete;

 private:
#if defined(GEMMA2_ISA_AVX2)
  static constexpr unsigned kBits = 0x8040;  // flush to zero, denormals are zeros
  static void set(unsigned bits) { asm volatile("ldmxcsr %0" : : "m"(bits) : "memory"); }
  unsigned before_;
#elif defined(GEMMA2_ISA_NEON)
  static constexpr uint64_t kBits = uint64_t{1} << 24;  // FZ
  static void set(uint64_t bits) { asm volatile("msr fpcr, %0" : : "r"(bits) : "memory"); }
  uint64_t before_;
#endif
};

// 16 pairs of bfloat16. On its own, odd() and even() are the halves of the pairs as float32.
struct Bf16x32 {
#if defined(GEMMA2_ISA_AVX512)
  __m512i v;
  static Bf16x32 load(const void* pairs) { return {_mm512_loadu_si512(pairs)}; }
  static Bf16x32 broadcast(uint32_t pair) { return {_mm512_set1_epi32(static_cast<int>(pair))}; }
#elif defined(GEMMA2_ISA_AVX2)
  __m256i lo, hi;
  static Bf16x32 load(const void* pairs) {
    const auto* p = static_cast<const __m256i*>(pairs);
    return {_mm256_loadu_si256(p), _mm256_loadu_si256(p + 1)};
  }
  static Bf16x32 broadcast(uint32_t pair) {
    const __m256i v = _mm256_set1_epi32(static_cast<int>(pair));
    return {v, v};
  }
  F32x16 odd() const {
    const __m256i mask = _mm256_set1_epi32(static_cast<int>(0xffff0000u));
    return {_mm256_castsi256_ps(_mm256_and_si256(lo, mask)), _mm256_castsi256_ps(_mm256_and_si256(hi, mask))};
  }
  F32x16 even() const {
    return {_mm256_castsi256_ps(_mm256_slli_epi32(lo, 16)), _mm256_castsi256_ps(_mm256_slli_epi32(hi, 16))};
  }
#elif defined(GEMMA2_ISA_NEON)
  uint32x4_t v[4];
  static Bf16x32 load(const void* pairs) {
    const auto* p = static_cast<const uint32_t*>(pairs);
    return {{vld1q_u32(p), vld1q_u32(p + 4), vld1q_u32(p + 8), vld1q_u32(p + 12)}};
  }
  static Bf16x32 broadcast(uint32_t pair) {
    const uint32x4_t x = vdupq_n_u32(pair);
    return {{x, x, x, x}};
  }
  F32x16 odd() const {
    const uint32x4_t mask = vdupq_n_u32(0xffff0000u);
    F32x16 r;
    for (int i = 0; i < 4; ++i) r.v[i] = vreinterpretq_f32_u32(vandq_u32(v[i], mask));
    return r;
  }
  F32x16 even() const {
    F32x16 r;
    for (int i = 0; i < 4; ++i) r.v[i] = vreinterpretq_f32_u32(vshlq_n_u32(v[i], 16));
    return r;
  }
#else
  uint32_t v[16];
  static Bf16x32 load(const void* pairs) {
    Bf16x32 r;
    std::memcpy(r.v, pairs, sizeof r.v);
    return r;
  }
  static Bf16x32 broadcast(uint32_t pair) {
    Bf16x32 r;
    for (uint32_t& x : r.v) x = pair;
    return r;
  }
  F32x16 odd() const {
    return each_lane<F32x16>([&](int i) { return bits_to_float(v[i] & 0xffff0000u); });
  }
  F32x16 even() const {
    return each_lane<F32x16>([&](int i) { return bits_to_float(v[i] << 16); });
  }
#endif
};

#if defined(GEMMA2_ISA_AVX512)
inline F32x16 dot(Bf16x32 a, Bf16x32 b, F32x16 c) {
  // Not inline assembly: with that, GCC 12 spills a register tile's sums (it is the other way round for vpdpbusd).
  return {_mm512_dpbf16_ps(c.v, reinterpret_cast<__m512bh>(a.v), reinterpret_cast<__m512bh>(b.v))};
}
#elif defined(GEMMA2_ISA_AVX2) || defined(GEMMA2_ISA_NEON)
inline F32x16 dot(const Bf16x32& a, const Bf16x32& b, const F32x16& c) {
  return fma(a.even(), b.even(), fma(a.odd(), b.odd(), c));
}
#else
inline float flush_subnormal(float x) { return std::fabs(x) < 0x1p-126f ? std::copysign(0.0f, x) : x; }

inline float fma_flushing(float a, float b, float c) {
  a = flush_subnormal(a);
  b = flush_subnormal(b);
  c = flush_subnormal(c);
  const float r = std::fma(a, b, c);
  if (std::fabs(r) > 0x1p-126f || r == 0.0f) return r;
  // A result of 2⁻¹²⁶ may have been rounded up to it from a subnormal of fewer bits than float32 would give it.
  const float scaled = std::fma(a * 0x1p24f, b, c * 0x1p24f);
  return std::fabs(scaled) < 0x1p-102f ? std::copysign(0.0f, r) : r;
}

inline F32x16 dot(const Bf16x32& a, const Bf16x32& b, const F32x16& c) {
  const F32x16 odd_a = a.odd(), odd_b = b.odd(), even_a = a.even(), even_b = b.even();
  return each_lane<F32x16>([&](int i) {
    return fma_flushing(even_a.v[i], even_b.v[i], fma_flushing(odd_a.v[i], odd_b.v[i], c.v[i]));
  });
}
#endif

}  // namespace gemma2::GEMMA2_ISA
