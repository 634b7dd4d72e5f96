// dot.h in NEON with the dot-product extension (Armv8.2): sdot.
#pragma once

#include <arm_neon.h>

#include "matrix.h"
#include "simd_neon.h"

namespace gemma2::neon {

// Of 32 registers, 16 hold 4 vectors of int32 and 8 the weights; the sums of float32 live in memory.
constexpr int kMaxSums = 4;
constexpr int kMaxTiles = 2;
constexpr int kUnpackedHalves = 1;
constexpr int kMaxRowsUnpacked = 4;
constexpr int kMinRowsToUnpack = 32;
constexpr int kUnroll = 16;
constexpr int kUnrollSteps = 2;

struct Weights {
  int8x16_t v[4];  // 4 outputs each
};

inline Weights load_q8(const int8_t* p) { return {{vld1q_s8(p), vld1q_s8(p + 16), vld1q_s8(p + 32), vld1q_s8(p + 48)}}; }
inline void unpack_q4(const uint8_t* nibbles, Weights& low, Weights& high) {
  const int8x16_t table = vld1q_s8(kQ4Codebook);
  for (int i = 0; i < 4; ++i) {
    const uint8x16_t codes = vld1q_u8(nibbles + 16 * i);
    low.v[i] = vqtbl1q_s8(table, vandq_u8(codes, vdupq_n_u8(15)));
    high.v[i] = vqtbl1q_s8(table, vshrq_n_u8(codes, 4));
  }
}
using UnpackedWeights = Weights;
inline void store_weights(int8_t* p, const Weights& w) {
  for (int i = 0; i < 4; ++i) vst1q_s8(p + 16 * i, w.v[i]);
}
inline UnpackedWeights load_unpacked(const int8_t* p) { return load_q8(p); }
inline void add_correction(I32x16&, const Weights&) {}

inline I32x16 dot_start(int32_t) { return I32x16::zero(); }
inline I32x16 unpacked_start(int32_t sum, const int32_t*) { return dot_start(sum); }
inline void dot4(I32x16& acc, const Weights& w, const int8_t* x) {
  int32_t four;
  __builtin_memcpy(&four, x, sizeof four);
  const int8x16_t inputs = vreinterpretq_s8_s32(vdupq_n_s32(four));
  for (int i = 0; i < 4; ++i) acc.v[i] = vdotq_s32(acc.v[i], w.v[i], inputs);
}

}  // namespace gemma2::neon
