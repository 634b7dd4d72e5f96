// dot.h in plain C++.
#pragma once

#include "matrix.h"
#include "simd_scalar.h"

namespace gemma2::scalar {

constexpr int kMaxSums = 2;
constexpr int kMaxTiles = 1;
constexpr int kUnpackedHalves = 1;
constexpr int kMaxRowsUnpacked = 1;
constexpr int kMinRowsToUnpack = 16;
constexpr int kUnroll = 1;
constexpr int kUnrollSteps = 1;

struct Weights {
  int8_t v[64];
};

inline Weights load_q8(const int8_t* p) {
  Weights w;
  std::memcpy(w.v, p, sizeof w.v);
  return w;
}
inline void unpack_q4(const uint8_t* nibbles, Weights& low, Weights& high) {
  for (int i = 0; i < 64; ++i) {
    low.v[i] = kQ4Codebook[nibbles[i] & 15];
    high.v[i] = kQ4Codebook[nibbles[i] >> 4];
  }
}
using UnpackedWeights = Weights;
inline void store_weights(int8_t* p, const Weights& w) { std::memcpy(p, w.v, sizeof w.v); }
inline UnpackedWeights load_unpacked(const int8_t* p) { return load_q8(p); }
inline void add_correction(I32x16&, const Weights&) {}

inline I32x16 dot_start(int32_t) { return I32x16::zero(); }
inline I32x16 unpacked_start(int32_t sum, const int32_t*) { return dot_start(sum); }
inline void dot4(I32x16& acc, const Weights& w, const int8_t* x) {
  for (int i = 0; i < kLanes; ++i) {
    const int8_t* weights = w.v + 4 * i;
    acc.v[i] += weights[0] * x[0] + weights[1] * x[1] + weights[2] * x[2] + weights[3] * x[3];
  }
}

}  // namespace gemma2::scalar
