// The rounding of q8 and q4: which scale s each group of 64 weights w gets, and which codes.
//
//   q8  v = round(w / s), |v| <= 127        q4  v = the codebook's value nearest to w / s
//
// wanted is the s that makes Σ i·(w - s·v)² least, i being the importance of each input. It is searched: for each of
// some candidates the values v are found, and then s' = Σ i·w·v / Σ i·v², which is the best scale for these values and
// leaves Σ i·w² - (Σ i·w·v)² / Σ i·v². From the best of them the search goes on with s' as the candidate. The last s is
// rounded to IEEE half, and the values are found once more for the rounded one.
//
// Two candidates less than 3% apart change few values; from 0.75 to 1.2 times the absolute largest weight's own code,
// 16 of them come within 0.1% of the error of the best scale that there is, for Gaussian and for heavy-tailed groups.
// The codebook of q4 is not symmetric, so there a scale may also be negative.
//
// Sums run over the inputs in order, in float32, in a lane for each group: the same bits everywhere. A group of zeros
// gets the scale 0. Scales below 2⁻¹⁴ are IEEE halves of fewer digits, in steps of 2⁻²⁴, so groups whose weights are
// all below 127 · 2⁻¹⁴ = 0.008 lose precision, by at most 127 · 2⁻²⁵ = 4e-6 a weight.
#pragma once

#include "half_block.h"

namespace gemma2::GEMMA2_ISA {

constexpr int kRefinements = 2;

// The value that q8 gives to x = w / s.
struct Q8Rounding {
  static constexpr int kNumCandidates = 16;
  static constexpr bool kEitherSign = false;
  // What the largest |w| is divided into. More than 127 clips it; that pays where the others then fall better.
  static constexpr float candidate(int i) { return 124.5f + 0.5f * static_cast<float>(i); }

  F32x16 limit = F32x16::broadcast(127.0f);

  I32x16 code(F32x16 x) const { return round_to_i32(min(max(x, F32x16::zero() - limit), limit)); }
  F32x16 value(I32x16 code) const { return to_f32(code); }
};

struct Q4Rounding {
  static constexpr int kNumCandidates = 16;
  static constexpr bool kEitherSign = true;
  static constexpr float candidate(int i) { return 127.0f * (0.75f + 0.03f * static_cast<float>(i)); }

  F32x16 values;
  // Code c or a higher one is the nearest from middles[c] on. A search of four steps: bit 3 by middles[8], bit 2 by
  // middles[c + 4] where c is what is known so far, and so on; each step's middles are a table by c.
  F32x16 middle8, middles4, middles2, middles1;

  Q4Rounding() {
    alignas(64) float v[16], steps[4][16];
    for (int i = 0; i < 16; ++i) v[i] = kQ4Codebook[i];
    for (int step = 0; step < 4; ++step) {
      for (int i = 0; i < 16; ++i) {
        const int c = i + (8 >> step);
        steps[step][i] = c < 16 ? 0.5f * (v[c - 1] + v[c]) : 0.0f;
      }
    }
    values = F32x16::load(v);
    middle8 = F32x16::broadcast(steps[0][0]);
    middles4 = F32x16::load(steps[1]);
    middles2 = F32x16::load(steps[2]);
    middles1 = F32x16::load(steps[3]);
  }

  I32x16 code(F32x16 x) const {
    const I32x16 zero = I32x16::zero();
    I32x16 c = select(x >= middle8, I32x16::broadcast(8), zero);
    c = select(x >= lookup(middles4, c), c + I32x16::broadcast(4), c);
    c = select(x >= lookup(middles2, c), c + I32x16::broadcast(2), c);
    return select(x >= lookup(middles1, c), c + I32x16::broadcast(1), c);
  }
  F32x16 value(I32x16 code) const { return lookup(values, code); }
};

// The best scale for the values that `inverse` gives, and how much of Σ i·w² it explains.
struct Fit {
  F32x16 scale, gain;
};

template <class Rounding>
inline Fit fit(const HalfBlock& block, const float* importance, F32x16 inverse, const Rounding& rounding) {
  F32x16 wv = F32x16::zero(), vv = F32x16::zero();
  for (int k = 0; k < kGroup; ++k) {
    const F32x16 w = F32x16::load(block.weights[k]);
    const F32x16 v = rounding.value(rounding.code(w * inverse)), iv = v * F32x16::broadcast(importance[k]);
    wv = fma(iv, w, wv);
    vv = fma(iv, v, vv);
  }
  const F32x16 scale = wv / max(vv, F32x16::broadcast(1e-30f));  // 0 / 0 of a group of no importance would be NaN
  return {scale, wv * scale};
}

// 1 / x, and 0 for 0 and what is so small that its inverse overflows.
inline F32x16 inverse_of(F32x16 x) {
  const Mask16 is_usable = abs(x) >= F32x16::broadcast(1e-37f);
  return select(is_usable, F32x16::broadcast(1.0f) / select(is_usable, x, F32x16::broadcast(1.0f)), F32x16::zero());
}

// Searches the scales of a half block and writes them. importance: (64), finite, >= 0.
template <class Rounding>
inline void choose_scales(HalfBlock& block, const float* importance, const Rounding& rounding) {
  F32x16 largest = F32x16::zero();
  for (int k = 0; k < kGroup; ++k) largest = max(largest, abs(F32x16::load(block.weights[k])));
  const F32x16 unit = inverse_of(largest);
  Fit best{F32x16::zero(), F32x16::zero()};
  const auto try_inverse = [&](F32x16 inverse) {
    const Fit found = fit(block, importance, inverse, rounding);
    const Mask16 is_better = best.gain < found.gain;
    best.scale = select(is_better, found.scale, best.scale);
    best.gain = select(is_better, found.gain, best.gain);
  };
  for (int i = 0; i < Rounding::kNumCandidates; ++i) {
    const F32x16 inverse = unit * F32x16::broadcast(Rounding::candidate(i));
    try_inverse(inverse);
    if (Rounding::kEitherSign) try_inverse(F32x16::zero() - inverse);
  }
  for (int i = 0; i < kRefinements; ++i) try_inverse(inverse_of(best.scale));
  // Weights without importance still get a scale that they can use.
  const Mask16 has_fit = F32x16::zero() < best.gain;
  best.scale = select(has_fit, best.scale, largest * F32x16::broadcast(1.0f / 127.0f));

  const F32x16 largest_half = F32x16::broadcast(65504.0f);
  min(max(best.scale, F32x16::zero() - largest_half), largest_half).store_f16(block.scales);
}

// Gives weights of a half block their codes, by the scales that were chosen.
template <class Rounding>
class Coder {
 public:
  Coder(HalfBlock& block, const Rounding& rounding)
      : block_(block),
        rounding_(rounding),
        scale_(F32x16::load_f16(block.scales)),
        inverse_(inverse_of(scale_)),
        is_zero_(F32x16::zero() >= abs(inverse_)) {}

  // Writes the codes of input k for the weights w, and returns what they stand for.
  F32x16 round(int k, F32x16 w) {
    const I32x16 code = select(is_zero_, I32x16::zero(), rounding_.code(w * inverse_));
    code.store_i8(block_.codes[k]);
    return rounding_.value(code) * scale_;
  }

 private:
  HalfBlock& block_;
  const Rounding& rounding_;
  const F32x16 scale_, inverse_;
  const Mask16 is_zero_;
};

// Rounds every weight of a half block to the nearest. importance is 0 from input `num_inputs` on.
template <class Rounding>
inline void round_half_block(HalfBlock& block, const float* importance, int num_inputs) {
  const Rounding rounding;
  choose_scales(block, importance, rounding);
  Coder coder(block, rounding);
  ErrorSums sums;
  for (int k = 0; k < kGroup; ++k) {
    const F32x16 w = F32x16::load(block.weights[k]), rounded = coder.round(k, w);
    if (k < num_inputs) sums.add(w, rounded);
  }
  sums.add_to(block.error);
}

}  // namespace gemma2::GEMMA2_ISA
