// exp, tanh and GELU on 16 lanes, the same bits on every instruction set. NaN in gives NaN out.
//
//   exp(x)        2^n · p(r), n = round(x / ln 2), |r| <= ln 2 / 2, p of degree 6. Within 1.1 ulp. Below -87.33, where
//                 float32 has no normal numbers, 0; above 88.72, +inf.
//   tanh(x)       e / (e + 2) with e = exp(2|x|) - 1 = 2^n · q(r) + (2^n - 1), which loses nothing where x is small; then
//                 the sign of x. Within 2.5 ulp.
//   gelu_tanh(x)  x / (1 + 2^t), t = -2u / ln 2, u = sqrt(2/π) · (x + 0.044715 x³): GELU with tanh(u) written as a power.
//                 Within 2.2 ulp for x >= 0. For x < 0, where the textbook formula cancels, within
//                 2.8 · (1 + |t|) · 2^-24 of the result and 5e-8 in all. x below -10 counts as -10, which gives -1e-37.
//
// The polynomials are minimax (relative error of the whole at most 3e-9, 1.4e-8 and 9.2e-8). ulp: distance of the
// float32 numbers around the exact result. tests/kernels/test_simd_math.py measures them against float64.
#pragma once

#include "simd.h"

namespace gemma2::GEMMA2_ISA {

// Adding and subtracting 1.5 · 2^23 rounds |x| < 2^22 to the nearest whole number, ties to even; the sum's low bits
// then hold that number.
constexpr float kRounder = 0x1.8p23f;

// p · 2^n for n in the low bits of `rounded` = kRounder + n, by adding n to the exponent: the result must be normal.
inline F32x16 times_power_of_two(F32x16 p, F32x16 rounded) { return as_f32(as_i32(p) + shift_left<23>(as_i32(rounded))); }

inline F32x16 exp(F32x16 x) {
  constexpr float kLowest = -87.3365f, kHighest = 88.7228f;  // beyond, the result is not a normal number
  const F32x16 one = F32x16::broadcast(1.0f), rounder = F32x16::broadcast(kRounder);
  // The order of the operands keeps a NaN.
  const F32x16 held = min(F32x16::broadcast(kHighest), max(F32x16::broadcast(kLowest), x));
  const F32x16 rounded = fma(held, F32x16::broadcast(0x1.715476p+0f), rounder);
  const F32x16 n = rounded - rounder;
  // ln 2 in two parts: the first has few enough bits that its product with n is exact.
  F32x16 r = fma(n, F32x16::broadcast(-0x1.63p-1f), held);
  r = fma(n, F32x16::broadcast(0x1.bd0106p-13f), r);
  F32x16 p = F32x16::broadcast(0x1.6a244cp-10f);
  p = fma(p, r, F32x16::broadcast(0x1.1239d4p-7f));
  p = fma(p, r, F32x16::broadcast(0x1.5558f2p-5f));
  p = fma(p, r, F32x16::broadcast(0x1.555492p-3f));
  p = fma(p, r, F32x16::broadcast(0x1.fffffcp-2f));
  p = fma(p, r, one);
  p = fma(p, r, one);
  const F32x16 power = times_power_of_two(p, rounded);
  const F32x16 not_tiny = select(x < F32x16::broadcast(kLowest), F32x16::zero(), power);
  return select(F32x16::broadcast(kHighest) >= x, not_tiny, x + F32x16::broadcast(__builtin_inff()));
}

inline F32x16 tanh(F32x16 x) {
  constexpr float kOne = 9.02f;  // from here on tanh rounds to 1
  const F32x16 one = F32x16::broadcast(1.0f), rounder = F32x16::broadcast(kRounder);
  const F32x16 magnitude = min(F32x16::broadcast(kOne), abs(x));
  const F32x16 y = magnitude + magnitude;
  const F32x16 rounded = fma(y, F32x16::broadcast(0x1.715476p+0f), rounder);
  const F32x16 n = rounded - rounder;
  const F32x16 r = fma(n, F32x16::broadcast(-0x1.62e43p-1f), y);
  F32x16 q = F32x16::broadcast(0x1.6bec08p-10f);
  q = fma(q, r, F32x16::broadcast(0x1.122768p-7f));
  q = fma(q, r, F32x16::broadcast(0x1.555674p-5f));
  q = fma(q, r, F32x16::broadcast(0x1.5554bp-3f));
  q = fma(q, r, F32x16::broadcast(0x1.fffffep-2f));
  q = fma(q, r * r, r);
  const F32x16 scale = times_power_of_two(one, rounded);
  const F32x16 e = fma(scale, q, scale - one);
  return copy_sign(e / (e + F32x16::broadcast(2.0f)), x);
}

inline F32x16 gelu_tanh(F32x16 x) {
  // t = x · (kLinear + kCubic · x²); at x = -10, t = 126: 2^t is a normal number on both sides.
  constexpr double kLinear = -2.0 * 0.7978845608028654 * 1.4426950408889634, kCubic = kLinear * 0.044715;
  const F32x16 one = F32x16::broadcast(1.0f), rounder = F32x16::broadcast(kRounder);
  const F32x16 from_low = max(F32x16::broadcast(-10.0f), x);
  const F32x16 held = min(F32x16::broadcast(10.0f), from_low);
  const F32x16 t = fma(held * held, F32x16::broadcast(static_cast<float>(kCubic)),
                       F32x16::broadcast(static_cast<float>(kLinear))) * held;
  const F32x16 rounded = t + rounder;
  const F32x16 r = t - (rounded - rounder);
  F32x16 p = F32x16::broadcast(0x1.5bba14p-10f);
  p = fma(p, r, F32x16::broadcast(0x1.3cea88p-7f));
  p = fma(p, r, F32x16::broadcast(0x1.c6b752p-5f));
  p = fma(p, r, F32x16::broadcast(0x1.ebf9bcp-3f));
  p = fma(p, r, F32x16::broadcast(0x1.62e42ap-1f));
  p = fma(p, r, one);
  return from_low / (one + times_power_of_two(p, rounded));
}

}  // namespace gemma2::GEMMA2_ISA
