// dot.h in AVX2: vpmaddubsw takes unsigned × signed bytes, so weights lend their sign to x. There are two ways:
//
//   |w| · ±x        vpsignb, one instruction, but on the pipes that multiply (Zen) and busy them by half more.
//   |w| · (x ^ m)   m = -1 where w < 0, else 0. x ^ -1 = -x - 1, so Σ |w| over w < 0 is missing: a constant of the
//                   weights, found when they are unpacked and added where a group's accumulators start.
//
// Pairs reach 2 · 127 · 128 = 32512, so 16 bits do not saturate.
#pragma once

#include "matrix.h"
#include "simd_avx2.h"

namespace gemma2::avx2 {

// Of 16 registers, 8 hold 4 vectors of int32; those of float32 live in memory.
constexpr int kMaxSums = 4;
constexpr int kMaxTiles = 2;
constexpr int kUnpackedHalves = 1;
constexpr int kMaxRowsUnpacked = 4;
constexpr int kMinRowsToUnpack = 12;
constexpr int kUnroll = 16;
constexpr int kUnrollSteps = 2;

struct Weights {
  __m256i lo, hi;
};

inline Weights load_q8(const int8_t* p) {
  return {_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)),
          _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p + 32))};
}
inline void unpack_q4(const uint8_t* nibbles, Weights& low, Weights& high) {
  const __m256i table =
      _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(kQ4Codebook)));
  const __m256i mask = _mm256_set1_epi8(15);
  const __m256i a = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(nibbles));
  const __m256i b = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(nibbles + 32));
  low = {_mm256_shuffle_epi8(table, _mm256_and_si256(a, mask)), _mm256_shuffle_epi8(table, _mm256_and_si256(b, mask))};
  high = {_mm256_shuffle_epi8(table, _mm256_and_si256(_mm256_srli_epi16(a, 4), mask)),
          _mm256_shuffle_epi8(table, _mm256_and_si256(_mm256_srli_epi16(b, 4), mask))};
}
inline I32x16 dot_start(int32_t) { return I32x16::zero(); }

// acc + Σ of 4 products, of which 2 at a time are summed in 16 bits.
inline __m256i add_products(__m256i acc, __m256i magnitudes, __m256i inputs) {
  const __m256i pairs = _mm256_maddubs_epi16(magnitudes, inputs);
  acc = _mm256_add_epi32(acc, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
  // Or GCC adds the products in an order of its own, and keeps them all in memory until then.
  asm("" : "+x"(acc));
  return acc;
}
inline __m256i broadcast_inputs(const int8_t* x) {
  int32_t four;
  __builtin_memcpy(&four, x, sizeof four);
  return _mm256_set1_epi32(four);
}
inline void dot4(I32x16& acc, const Weights& w, const int8_t* x) {
  const __m256i inputs = broadcast_inputs(x);
  acc.lo = add_products(acc.lo, _mm256_abs_epi8(w.lo), _mm256_sign_epi8(inputs, w.lo));
  acc.hi = add_products(acc.hi, _mm256_abs_epi8(w.hi), _mm256_sign_epi8(inputs, w.hi));
}

struct UnpackedWeights {
  __m256i magnitude_lo, magnitude_hi, negative_lo, negative_hi;
};

inline void store_weights(int8_t* p, const Weights& w) {
  _mm256_store_si256(reinterpret_cast<__m256i*>(p), w.lo);
  _mm256_store_si256(reinterpret_cast<__m256i*>(p + 32), w.hi);
}
inline UnpackedWeights load_unpacked(const int8_t* p) {
  const Weights w = load_q8(p);
  const __m256i zero = _mm256_setzero_si256();
  return {_mm256_abs_epi8(w.lo), _mm256_abs_epi8(w.hi), _mm256_cmpgt_epi8(zero, w.lo), _mm256_cmpgt_epi8(zero, w.hi)};
}
inline void add_correction(I32x16& sum, const Weights& w) {
  const __m256i zero = _mm256_setzero_si256(), one = _mm256_set1_epi8(1);
  sum.lo = add_products(sum.lo, _mm256_and_si256(_mm256_abs_epi8(w.lo), _mm256_cmpgt_epi8(zero, w.lo)), one);
  sum.hi = add_products(sum.hi, _mm256_and_si256(_mm256_abs_epi8(w.hi), _mm256_cmpgt_epi8(zero, w.hi)), one);
}
inline I32x16 unpacked_start(int32_t, const int32_t* corrections) { return I32x16::load(corrections); }
inline void dot4(I32x16& acc, const UnpackedWeights& w, const int8_t* x) {
  const __m256i inputs = broadcast_inputs(x);
  acc.lo = add_products(acc.lo, w.magnitude_lo, _mm256_xor_si256(inputs, w.negative_lo));
  acc.hi = add_products(acc.hi, w.magnitude_hi, _mm256_xor_si256(inputs, w.negative_hi));
}

}  // namespace gemma2::avx2
