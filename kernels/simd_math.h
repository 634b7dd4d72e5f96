// exp, tanh and GELU on 16 lanes, the same bits on every instruction set.
//
//   exp(x)   2^n · p(r), n = round(x / ln 2), |r| <= ln 2 / 2, p of degree 6: within 2 ulp; x is held in -87.3 … 88.7,
//            where the result is a normal number
//   tanh(x)  |x| < 0.625: x + x³ · q(x²) (the minimax polynomial of Cephes); else 1 - 2 / (exp(2x) + 1)
//   gelu_tanh(x)  x / (1 + exp(-2u)), u = sqrt(2/π) · (x + 0.044715 x³): GELU with tanh(u) written as exp
#pragma once

#include "simd.h"

namespace gemma2::GEMMA2_ISA {

inline F32x16 exp(F32x16 x) {
  x = min(max(x, F32x16::broadcast(-87.3f)), F32x16::broadcast(88.7f));
  const I32x16 n = round_to_i32(x * F32x16::broadcast(1.44269504f));
  const F32x16 k = to_f32(n);
  // ln 2 in two parts: the first has few enough bits that its product with n is exact.
  F32x16 r = fma(k, F32x16::broadcast(-0.693359375f), x);
  r = fma(k, F32x16::broadcast(2.12194440e-4f), r);
  F32x16 p = F32x16::broadcast(1.0f / 720);
  p = fma(p, r, F32x16::broadcast(1.0f / 120));
  p = fma(p, r, F32x16::broadcast(1.0f / 24));
  p = fma(p, r, F32x16::broadcast(1.0f / 6));
  p = fma(p, r, F32x16::broadcast(0.5f));
  p = fma(p, r, F32x16::broadcast(1.0f));
  p = fma(p, r, F32x16::broadcast(1.0f));
  // 2^n is made of two factors, since n = 128 has no float of its own.
  const F32x16 half = as_f32(shift_left<23>(n + I32x16::broadcast(126)));
  return p * half * F32x16::broadcast(2.0f);
}

inline F32x16 tanh(F32x16 x) {
  const F32x16 one = F32x16::broadcast(1.0f), z = x * x, magnitude = abs(x);
  F32x16 q = F32x16::broadcast(-5.70498872745e-3f);
  q = fma(q, z, F32x16::broadcast(2.06390887954e-2f));
  q = fma(q, z, F32x16::broadcast(-5.37397155531e-2f));
  q = fma(q, z, F32x16::broadcast(1.33314422036e-1f));
  q = fma(q, z, F32x16::broadcast(-3.33332819422e-1f));
  const F32x16 small = fma(q * z, x, x);
  const F32x16 large = one - F32x16::broadcast(2.0f) / (exp(magnitude + magnitude) + one);
  const F32x16 with_sign = select(x < F32x16::zero(), F32x16::zero() - large, large);
  return select(magnitude < F32x16::broadcast(0.625f), small, with_sign);
}

inline F32x16 gelu_tanh(F32x16 x) {
  const F32x16 one = F32x16::broadcast(1.0f);
  const F32x16 cubic = fma(x * x, F32x16::broadcast(0.044715f), one) * x;
  return x / (one + exp(cubic * F32x16::broadcast(-2.0f * 0.7978845608f)));
}

}  // namespace gemma2::GEMMA2_ISA
