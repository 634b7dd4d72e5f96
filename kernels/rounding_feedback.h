// Rounding with feedback: inputs are rounded one after the other, and what the rounding of one loses is made up for by
// the weights of later inputs, as far as these are wont to be alike.
//
//   for every input k:  v = the value for w[k],  e = w[k] - v,  w[j] -= e · f[k][j]  for the later inputs j of its block
//
// With f[k][j] = U[k][j] / U[k][k], where Uᵀ·U is the inverse of the inputs' second moments H, U upper triangular, this
// lowers Σ (x·(w - v))² over the inputs x that H was taken from: what is lost at k is the part of x[k] that later inputs
// cannot tell. (Frantar et al., GPTQ, arXiv 2210.17323; the factor by one Cholesky decomposition.)
//
// Weights of 16 outputs at once, a lane each: strip[k][16] over the inputs of a block. Within a group of 64 inputs every
// later weight is changed at once; those behind the group are changed by all of its 64 errors together, which is a
// matrix product and runs from registers. Each weight takes its corrections in the order of k, in float32, fused: the
// same bits everywhere.
#pragma once

#include "scale_search.h"

namespace gemma2::GEMMA2_ISA {

// Later inputs that are corrected together: with 16 lanes each they stay in registers on every instruction set.
constexpr int kCorrected = 4;

// Rounds the group that begins at input `first` of a block of `num_block` inputs, both multiples of 64, and corrects
// the rest of the strip. factors: row k belongs to input first + k and has a value for each input of the block.
// original: as it was read, for the error; gets the codes and scales.
template <class Rounding>
inline void round_group_with_feedback(float* strip, int64_t first, int64_t num_block, const float* factors,
                                      int64_t factors_stride, const float* importance, int num_inputs,
                                      HalfBlock& original) {
  const Rounding rounding;
  alignas(64) float errors[kGroup][kLanesPerHalf];  // with a minus
  HalfBlock current;
  float* weights = strip + first * kLanesPerHalf;
  __builtin_memcpy(current.weights, weights, sizeof current.weights);
  choose_scales(current, importance, rounding);
  __builtin_memcpy(original.scales, current.scales, sizeof current.scales);
  Coder coder(original, rounding);
  ErrorSums sums;
  for (int k = 0; k < kGroup; ++k) {
    const F32x16 w = F32x16::load(current.weights[k]), rounded = coder.round(k, w);
    if (k >= num_inputs) continue;  // nothing is known of inputs that there are not
    sums.add(F32x16::load(original.weights[k]), rounded);
    const F32x16 error = rounded - w;
    error.store(errors[k]);
    const float* row = factors + k * factors_stride + first;
    for (int j = k + 1; j < kGroup; ++j) {
      fma(error, F32x16::broadcast(row[j]), F32x16::load(current.weights[j])).store(current.weights[j]);
    }
  }
  sums.add_to(original.error);
  static_assert(kGroup % kCorrected == 0);
  for (int64_t j = first + kGroup; j < num_block; j += kCorrected) {
    F32x16 corrected[kCorrected];
    for (int i = 0; i < kCorrected; ++i) corrected[i] = F32x16::load(strip + (j + i) * kLanesPerHalf);
    for (int k = 0; k < num_inputs; ++k) {
      const F32x16 error = F32x16::load(errors[k]);
      const float* row = factors + k * factors_stride + j;
      for (int i = 0; i < kCorrected; ++i) corrected[i] = fma(error, F32x16::broadcast(row[i]), corrected[i]);
    }
    for (int i = 0; i < kCorrected; ++i) corrected[i].store(strip + (j + i) * kLanesPerHalf);
  }
}

}  // namespace gemma2::GEMMA2_ISA
