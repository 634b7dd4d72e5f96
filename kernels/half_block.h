// Half a block of a matrix (matrix.h), turned for packing: a vector holds one input of all its 16 outputs, so that every
// lane works on a group of its own and no sum goes across lanes.
#pragma once

#include "packing.h"
#include "simd.h"

namespace gemma2::GEMMA2_ISA {

struct HalfBlock {
  alignas(64) float weights[kGroup][kLanesPerHalf];
  alignas(64) int8_t codes[kGroup][kLanesPerHalf];  // q8: the values
  alignas(64) uint16_t scales[kLanesPerHalf];       // IEEE half
  RoundingError error;                              // of what was rounded so far
};

// Adds up the error of a half block, input by input.
class ErrorSums {
 public:
  void add(F32x16 weight, F32x16 rounded) {
    const F32x16 e = weight - rounded;
    error_ = fma(e, e, error_);
    weight_ = fma(weight, weight, weight_);
  }
  void add_to(RoundingError& total) const {
    total.error += static_cast<double>(reduce_add(error_));
    total.weight += static_cast<double>(reduce_add(weight_));
  }

 private:
  F32x16 error_ = F32x16::zero(), weight_ = F32x16::zero();
};

inline float float_from_bits(uint32_t bits) {
  float x;
  __builtin_memcpy(&x, &bits, sizeof x);
  return x;
}

// Reads 64 inputs of a row into `out`; what lies beyond the matrix is 0.
inline void read_group(const WeightRows& rows, int64_t row, int64_t first_input, float* out) {
  const int64_t n = row < rows.outputs ? rows.inputs - first_input : 0, at = row * rows.inputs + first_input;
  for (int k = 0; k < kGroup; k += 16) {
    if (rows.float32 != nullptr) {
      const int64_t left = n - k < 0 ? 0 : n - k;
      F32x16::load_partial(rows.float32 + (left > 0 ? at + k : 0), static_cast<int>(left < 16 ? left : 16)).store(out + k);
    } else if (n - k >= 16) {
      F32x16::load_bf16(rows.bfloat16 + at + k).store(out + k);
    } else {
      for (int i = k; i < k + 16; ++i) {
        out[i] = i < n ? float_from_bits(static_cast<uint32_t>(rows.bfloat16[at + i]) << 16) : 0.0f;
      }
    }
  }
}

// Whether all 64 values are finite and |value| <= limit.
inline bool within(const float* values, float limit) {
  const F32x16 largest = F32x16::broadcast(limit);
  Mask16 fits = largest >= abs(F32x16::load(values));
  F32x16 bad = F32x16::zero();
  for (int k = 0; k < kGroup; k += 16) {
    fits = largest >= abs(F32x16::load(values + k));  // not true of NaN
    bad = select(fits, bad, F32x16::broadcast(1.0f));
  }
  return !any(bad >= F32x16::broadcast(1.0f));
}

// Reads 16 rows from `first_row`. Returns -1, or a row with a weight that is not finite or beyond `limit`.
inline int64_t read_half_block(const WeightRows& rows, int64_t first_row, int64_t first_input, float limit,
                               HalfBlock& out) {
  alignas(64) float row[kGroup];
  for (int lane = 0; lane < kLanesPerHalf; ++lane) {
    read_group(rows, first_row + lane, first_input, row);
    if (!within(row, limit)) return first_row + lane;
    for (int k = 0; k < kGroup; ++k) out.weights[k][lane] = row[k];
  }
  return -1;
}

}  // namespace gemma2::GEMMA2_ISA
