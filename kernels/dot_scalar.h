// dot.h in plain C++.
#pragma once

#include "matrix.h"
#include "simd_scalar.h"

namespace gemma2::scalar {

constexpr int kMaxRows = 1;
constexpr int kUnroll = 1;

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
inline I32x16 dot_start(int32_t) { return I32x16::zero(); }
inline void dot4(I32x16& acc, const Weights& w, const int8_t* x) {
  for (int i = 0; i < 16; ++i) {
    acc.v[i] += w.v[4 * i] * x[0] + w.v[4 * i + 1] * x[1] + w.v[4 * i + 2] * x[2] + w.v[4 * i + 3] * x[3];
  }
}

}  // namespace gemma2::scalar
