// Rounding weights to the formats of matrix.h, and back. How scales and codes are chosen: isa/packing.cpp.
#pragma once

#include "dispatch.h"
#include "matrix.h"

namespace gemma2 {

// Rows of weights as files hold them: one of the pointers is set.
struct WeightRows {
  const float* float32;
  const uint16_t* bfloat16;
  int64_t outputs, inputs;
};

// The largest |weight| that a format takes. q8 and q4: what the shorter side of q4's codebook reaches with the largest
// IEEE half as its scale. bfloat16: where rounding would give infinity.
constexpr float kLargestQuantized = 65504.0f * (kQ4Codebook[15] < -kQ4Codebook[0] ? kQ4Codebook[15] : -kQ4Codebook[0]);
constexpr float kLargestBfloat16 = 0x1.fep127f;
constexpr float kLargestFloat32 = 0x1.fffffep127f;

// What rounding did to some weights: Σ (w - rounded w)² and Σ w². The root of their quotient is also the relative error
// of the outputs for inputs that are all alike and independent.
struct RoundingError {
  double error = 0, weight = 0;
};

// How the rounding of one input's weights is made up for by others'; see rounding_feedback.h.
struct Feedback {
  const float* factors;  // (inputs, block), or null for none
  int64_t block;         // inputs that are rounded together, a multiple of 64: row k is about the inputs of k's block
};

struct PackingKernels {
  // Writes all of `out.size_bytes()` at `data`. importance: (inputs) weights of the squared error, or null for 1.
  // feedback: for q4 and q8. errors: (num_tiles) of every tile.
  // Returns -1, or a row that holds NaN, infinity or a weight too large for the format; the output is then unusable.
  int64_t (*pack)(ThreadPool&, const WeightRows& rows, const float* importance, const Feedback& feedback,
                  const Matrix& out, uint8_t* data, RoundingError* errors);
  // out: (outputs, inputs).
  void (*unpack)(ThreadPool&, const Matrix& matrix, float* out);
};
GEMMA2_DECLARE_KERNELS(PackingKernels, packing_kernels)

}  // namespace gemma2
