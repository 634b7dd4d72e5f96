// simd.h in AVX-512 (F, BW, DQ, VL, VNNI, BF16, VBMI): a vector is one register.
#pragma once

#include <immintrin.h>

#include <cstdint>

namespace gemma2::avx512 {

constexpr int kLanes = 16;

struct Mask16 {
  __mmask16 m;
};
inline Mask16 first_lanes(int n) { return {static_cast<__mmask16>(n >= 16 ? 0xffffu : (1u << n) - 1u)}; }

struct I32x16 {
  __m512i v;
  static I32x16 zero() { return {_mm512_setzero_si512()}; }
  static I32x16 broadcast(int32_t x) { return {_mm512_set1_epi32(x)}; }
  static I32x16 load(const int32_t* p) { return {_mm512_loadu_si512(p)}; }
  void store(int32_t* p) const { _mm512_storeu_si512(p, v); }
  void store_i8(int8_t* p) const { _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(v)); }
};
inline I32x16 operator+(I32x16 a, I32x16 b) { return {_mm512_add_epi32(a.v, b.v)}; }
inline I32x16 operator-(I32x16 a, I32x16 b) { return {_mm512_sub_epi32(a.v, b.v)}; }
template <int n>
inline I32x16 shift_left(I32x16 a) {
  return {_mm512_slli_epi32(a.v, n)};
}
inline I32x16 max(I32x16 a, I32x16 b) { return {_mm512_max_epi32(a.v, b.v)}; }
inline I32x16 operator&(I32x16 a, I32x16 b) { return {_mm512_and_si512(a.v, b.v)}; }
template <int n>
inline I32x16 shift_right(I32x16 a) {
  return {_mm512_srai_epi32(a.v, n)};
}
inline int32_t reduce_add(I32x16 a) { return _mm512_reduce_add_epi32(a.v); }
inline int32_t reduce_max(I32x16 a) { return _mm512_reduce_max_epi32(a.v); }

// Sums (or maxima) of four vectors at once: pairs of lanes of two vectors, then of all four, then across the register.
template <class Combine>
inline __m128i reduce4(const I32x16 (&v)[4], Combine combine) {
  const __m512i v01 = combine(_mm512_unpacklo_epi32(v[0].v, v[1].v), _mm512_unpackhi_epi32(v[0].v, v[1].v));
  const __m512i v23 = combine(_mm512_unpacklo_epi32(v[2].v, v[3].v), _mm512_unpackhi_epi32(v[2].v, v[3].v));
  const __m512i all = combine(_mm512_unpacklo_epi64(v01, v23), _mm512_unpackhi_epi64(v01, v23));
  const __m512i half = combine(all, _mm512_shuffle_i64x2(all, all, 0x4e));
  return _mm512_castsi512_si128(combine(half, _mm512_shuffle_i64x2(half, half, 0xb1)));
}
inline void reduce_add4(const I32x16 (&v)[4], int32_t* out) {
  const __m128i sums = reduce4(v, [](__m512i a, __m512i b) { return _mm512_add_epi32(a, b); });
  _mm_storeu_si128(reinterpret_cast<__m128i*>(out), sums);
}
inline void reduce_max4(const I32x16 (&v)[4], int32_t* out) {
  const __m128i maxima = reduce4(v, [](__m512i a, __m512i b) { return _mm512_max_epi32(a, b); });
  _mm_storeu_si128(reinterpret_cast<__m128i*>(out), maxima);
}
inline void store_i8x64(const I32x16 (&v)[4], int8_t* p) {
  const __m512i words01 = _mm512_packs_epi32(v[0].v, v[1].v), words23 = _mm512_packs_epi32(v[2].v, v[3].v);
  // Packing works within 128 bits; dword 4·q + i of the bytes holds lanes 4·q … 4·q + 3 of vector i.
  const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  _mm512_storeu_si512(p, _mm512_permutexvar_epi32(order, _mm512_packs_epi16(words01, words23)));
}

struct F32x16 {
  __m512 v;
  static F32x16 zero() { return {_mm512_setzero_ps()}; }
  static F32x16 broadcast(float x) { return {_mm512_set1_ps(x)}; }
  static F32x16 load(const float* p) { return {_mm512_loadu_ps(p)}; }
  static F32x16 load_partial(const float* p, int n) { return {_mm512_maskz_loadu_ps(first_lanes(n).m, p)}; }
  static F32x16 load_bf16(const uint16_t* p) {
    const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16))};
  }
  static F32x16 load_f16(const uint16_t* p) {
    return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))};
  }
  void store_f16(uint16_t* p) const {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
  }
  void store(float* p) const { _mm512_storeu_ps(p, v); }
  void store_partial(float* p, int n) const { _mm512_mask_storeu_ps(p, first_lanes(n).m, v); }
  // Rounds to nearest even like every conversion to bf16 in PyTorch; vcvtneps2bf16 would flush subnormals.
  void store_bf16(uint16_t* p) const {
    const __m512i bits = _mm512_castps_si512(v);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded, 16)));
  }
};
inline F32x16 operator+(F32x16 a, F32x16 b) { return {_mm512_add_ps(a.v, b.v)}; }
inline F32x16 operator-(F32x16 a, F32x16 b) { return {_mm512_sub_ps(a.v, b.v)}; }
inline F32x16 operator*(F32x16 a, F32x16 b) { return {_mm512_mul_ps(a.v, b.v)}; }
inline F32x16 operator/(F32x16 a, F32x16 b) { return {_mm512_div_ps(a.v, b.v)}; }
inline F32x16 fma(F32x16 a, F32x16 b, F32x16 c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
inline F32x16 min(F32x16 a, F32x16 b) { return {_mm512_min_ps(a.v, b.v)}; }
inline F32x16 max(F32x16 a, F32x16 b) { return {_mm512_max_ps(a.v, b.v)}; }
inline F32x16 abs(F32x16 a) { return {_mm512_abs_ps(a.v)}; }
inline F32x16 copy_sign(F32x16 magnitude, F32x16 sign) {
  const __m512 bit = _mm512_set1_ps(-0.0f);
  return {_mm512_or_ps(_mm512_andnot_ps(bit, magnitude.v), _mm512_and_ps(bit, sign.v))};
}
inline F32x16 sqrt(F32x16 a) { return {_mm512_sqrt_ps(a.v)}; }
inline I32x16 round_to_i32(F32x16 a) { return {_mm512_cvtps_epi32(a.v)}; }
inline F32x16 to_f32(I32x16 a) { return {_mm512_cvtepi32_ps(a.v)}; }
inline F32x16 as_f32(I32x16 a) { return {_mm512_castsi512_ps(a.v)}; }
inline I32x16 as_i32(F32x16 a) { return {_mm512_castps_si512(a.v)}; }
inline bool any(Mask16 m) { return m.m != 0; }
inline Mask16 operator>=(F32x16 a, F32x16 b) { return {_mm512_cmp_ps_mask(a.v, b.v, _CMP_GE_OQ)}; }
inline Mask16 operator<(F32x16 a, F32x16 b) { return {_mm512_cmp_ps_mask(a.v, b.v, _CMP_LT_OQ)}; }
inline F32x16 select(Mask16 m, F32x16 a, F32x16 b) { return {_mm512_mask_blend_ps(m.m, b.v, a.v)}; }
inline I32x16 select(Mask16 m, I32x16 a, I32x16 b) { return {_mm512_mask_blend_epi32(m.m, b.v, a.v)}; }
inline F32x16 lookup(F32x16 table, I32x16 index) { return {_mm512_permutexvar_ps(index.v, table.v)}; }

inline uint32_t to_bits(Mask16 m) { return m.m; }

struct F64x16 {
  __m512d lo, hi;
  static F64x16 zero() { return {_mm512_setzero_pd(), _mm512_setzero_pd()}; }
};
inline F64x16 operator+(F64x16 a, F32x16 b) {
  return {_mm512_add_pd(a.lo, _mm512_cvtps_pd(_mm512_castps512_ps256(b.v))),
          _mm512_add_pd(a.hi, _mm512_cvtps_pd(_mm512_extractf32x8_ps(b.v, 1)))};
}
inline double reduce_add(F64x16 a) {
  const __m512d s8 = _mm512_add_pd(a.lo, a.hi);
  const __m256d s4 = _mm256_add_pd(_mm512_castpd512_pd256(s8), _mm512_extractf64x4_pd(s8, 1));
  const __m128d s2 = _mm_add_pd(_mm256_castpd256_pd128(s4), _mm256_extractf128_pd(s4, 1));
  return _mm_cvtsd_f64(_mm_add_sd(s2, _mm_unpackhi_pd(s2, s2)));
}
inline float reduce_add(F32x16 a) {
  const __m256 s8 = _mm256_add_ps(_mm512_castps512_ps256(a.v), _mm512_extractf32x8_ps(a.v, 1));
  const __m128 s4 = _mm_add_ps(_mm256_castps256_ps128(s8), _mm256_extractf128_ps(s8, 1));
  const __m128 s2 = _mm_add_ps(s4, _mm_movehl_ps(s4, s4));
  return _mm_cvtss_f32(_mm_add_ss(s2, _mm_movehdup_ps(s2)));
}
inline float reduce_max(F32x16 a) { return _mm512_reduce_max_ps(a.v); }

}  // namespace gemma2::avx512
