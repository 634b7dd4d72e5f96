// dot.h in AVX2: vpmaddubsw on |weight| and ±x. Pairs reach 2 · 127² = 32258, so 16 bits do not saturate.
#pragma once

#include "matrix.h"
#include "simd_avx2.h"

namespace gemma2::avx2 {

// 16 registers hold 4 vectors of int32; those of float32 live in memory.
constexpr int kMaxRowsOfPair = 2;
constexpr int kMaxRowsOfOne = 4;
constexpr int kUnpackedVectors = 1;
constexpr int kMaxRowsUnpacked = 4;
constexpr int kMinRowsToUnpack = 32;
constexpr int kUnroll = 16;

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
inline void store_weights(int8_t* p, const Weights& w) {
  _mm256_store_si256(reinterpret_cast<__m256i*>(p), w.lo);
  _mm256_store_si256(reinterpret_cast<__m256i*>(p + 32), w.hi);
}
inline Weights load_weights(const int8_t* p) { return load_q8(p); }

inline I32x16 dot_start(int32_t) { return I32x16::zero(); }
inline __m256i dot4(__m256i acc, __m256i w, __m256i x) {
  const __m256i pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(w), _mm256_sign_epi8(x, w));
  return _mm256_add_epi32(acc, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
}
template <int num_vectors>
inline void dot4(I32x16 (&acc)[num_vectors], const Weights (&w)[num_vectors], const int8_t* x) {
  int32_t four;
  __builtin_memcpy(&four, x, sizeof four);
  const __m256i inputs = _mm256_set1_epi32(four);
  for (int v = 0; v < num_vectors; ++v) {
    acc[v] = {dot4(acc[v].lo, w[v].lo, inputs), dot4(acc[v].hi, w[v].hi, inputs)};
  }
}

}  // namespace gemma2::avx2
