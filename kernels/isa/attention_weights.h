// From scores to the weights of softmax, 16 keys at a time.
#pragma once

#include "simd.h"
#include "simd_math.h"

namespace gemma2::GEMMA2_ISA {

// Scores within ±60 need no maximum: exp(60) times 2^37 keys is a float32, and exp(-60) is a normal one.
constexpr float kMaxBoundedCap = 60.0f;
// Stands for minus infinity where a difference of two must be a number.
constexpr float kLowest = -1e38f;

// cap · tanh(score / cap), or the score if there is no cap.
struct SoftCap {
  explicit SoftCap(float cap) : cap(F32x16::broadcast(cap)), is_bounded(cap > 0 && cap <= kMaxBoundedCap) {
    is_capped = cap > 0;
  }
  F32x16 operator()(F32x16 score) const { return is_capped ? cap * tanh(score / cap) : score; }

  F32x16 cap;
  bool is_capped, is_bounded;
};

// Lanes from first to last, both included; any integers.
inline F32x16 keep_lanes(F32x16 x, int64_t first, int64_t last) {
  const auto clip = [](int64_t n) { return static_cast<int>(n < 0 ? 0 : n > 16 ? 16 : n); };
  const F32x16 zero = F32x16::zero();
  return select(first_lanes(clip(first)), zero, select(first_lanes(clip(last + 1)), x, zero));
}

}  // namespace gemma2::GEMMA2_ISA
