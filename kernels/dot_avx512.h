// dot.h in AVX-512: vpdpbusd takes unsigned × signed bytes, so weights are held as weight + 128 and a group's
// accumulators start from -128 · Σ x.
#pragma once

#include "matrix.h"
#include "simd_avx512.h"

namespace gemma2::avx512 {

// Of 32 registers, 14 sums of int32 and 14 of float32 leave 4 for weights and the table that unpacks them.
constexpr int kMaxSums = 14;
constexpr int kMaxTiles = 4;
constexpr int kUnpackedHalves = 2;
constexpr int kMaxRowsUnpacked = 7;
constexpr int kMinRowsToUnpack = 128;
constexpr int kUnroll = 16;
constexpr int kUnrollSteps = 8;

struct Weights {
  __m512i v;
};

inline Weights load_q8(const int8_t* p) {
  return {_mm512_xor_si512(_mm512_loadu_si512(p), _mm512_set1_epi8(-128))};
}
// vpermb looks at the low 6 bits of an index; the table repeats every 16 bytes, so only the low 4 count and none need
// be masked away, neither the high nibble nor what a shift of 16-bit words brings in.
inline void unpack_q4(const uint8_t* nibbles, Weights& low, Weights& high) {
  const __m512i codebook =
      _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(kQ4Codebook)));
  const __m512i table = _mm512_xor_si512(codebook, _mm512_set1_epi8(-128));
  const __m512i codes = _mm512_loadu_si512(nibbles);
  low = {_mm512_permutexvar_epi8(codes, table)};
  high = {_mm512_permutexvar_epi8(_mm512_srli_epi16(codes, 4), table)};
}
using UnpackedWeights = Weights;
inline void store_weights(int8_t* p, const Weights& w) { _mm512_store_si512(p, w.v); }
inline UnpackedWeights load_unpacked(const int8_t* p) { return {_mm512_load_si512(p)}; }
inline void add_correction(I32x16&, const Weights&) {}

inline I32x16 dot_start(int32_t sum) { return I32x16::broadcast(-128 * sum); }
inline I32x16 unpacked_start(int32_t sum, const int32_t*) { return dot_start(sum); }

using AnyInt32 [[gnu::may_alias]] = int32_t;

// Inline assembly, since GCC 12 keeps the accumulators of _mm512_dpbusd_epi32 in memory: half the speed.
inline void dot4(I32x16& acc, const Weights& w, const int8_t* x) {
  asm("vpdpbusd %2%{1to16%}, %1, %0" : "+v"(acc.v) : "v"(w.v), "m"(*reinterpret_cast<const AnyInt32*>(x)));
}
// The inputs of several vectors are loaded once: loads would be the bottleneck where two such products run in a cycle.
template <int n>
inline void dot4(I32x16 (&acc)[n], const Weights (&w)[n], const int8_t* x) {
  const __m512i inputs = _mm512_set1_epi32(*reinterpret_cast<const AnyInt32*>(x));
#pragma GCC unroll kUnroll
  for (int i = 0; i < n; ++i) asm("vpdpbusd %2, %1, %0" : "+v"(acc[i].v) : "v"(w[i].v), "v"(inputs));
}

}  // namespace gemma2::avx512
