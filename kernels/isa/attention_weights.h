// From scores to the weights of softmax, 16 keys at a time: p = exp(y - m), y = cap · tanh(s / cap).
//
// A cap of at most 60 bounds y, so that m may be 0: exp(60) times 2^37 keys is a float32, and exp(-60) is a normal one.
// Then y and p are two polynomials, without a division, unless some |s| is near the cap:
//
//   t = s / cap, z = t²; |t| < kLimit: y = s + s · z · q(z), minimax q of tanh(t) = t + t · z · q(z); else cap · tanh(t)
//   n = round(y / ln 2), r = y - n · ln 2, p = 2^n · e(r), minimax e of the relative error
//
//            kLimit  |error of y| without rounding  relative error of e  weights are rounded to
//   Fine     0.75    cap · 6.3e-10                  1.9e-9               float32
//   Coarse   0.9     cap · 1.0e-7                   2.6e-6               bfloat16 (2^-9), int8 (2^-15 of the largest)
//
// Rounding adds |y| · 2^-23 or less to y, which is the largest error of Fine: exp of a float32 near 50 can be no better.
#pragma once

#include "kv_cache.h"
#include "simd.h"
#include "simd_math.h"

namespace gemma2::GEMMA2_ISA {

constexpr float kMaxBoundedCap = 60.0f;
// Stands for minus infinity where a difference of two must be a number.
constexpr float kLowest = -1e38f;

struct Fine {
  static constexpr float kLimit = 0.75f;
  static constexpr float kTanh[] = {-0x1.555540p-2f, 0x1.110c3ap-3f, -0x1.b952dcp-5f,
                                    0x1.5e660cp-6f,  -0x1.ef5fbap-8f, 0x1.b8a3e4p-10f};
  static constexpr float kExp[] = {1.0f,           1.0f,           0x1.fffffcp-2f, 0x1.555492p-3f,
                                   0x1.5558f2p-5f, 0x1.1239d4p-7f, 0x1.6a244cp-10f};
};
struct Coarse {
  static constexpr float kLimit = 0.9f;
  static constexpr float kTanh[] = {-0x1.55501ep-2f, 0x1.10738ap-3f, -0x1.acedb8p-5f, 0x1.23b51ep-6f, -0x1.d6333ap-9f};
  static constexpr float kExp[] = {0.99999928f, 0.99996334f, 0.50004369f, 0.16791031f, 0.041458402f};
};

template <size_t n>
inline F32x16 polynomial(const float (&coefficients)[n], F32x16 x) {
  F32x16 sum = F32x16::broadcast(coefficients[n - 1]);
  for (size_t i = n - 1; i-- > 0;) sum = fma(sum, x, F32x16::broadcast(coefficients[i]));
  return sum;
}

struct SoftCap {
  explicit SoftCap(float cap)
      : is_capped(cap > 0),
        is_bounded(cap > 0 && cap <= kMaxBoundedCap),
        cap(F32x16::broadcast(cap)),
        inverse(F32x16::broadcast(cap > 0 ? 1.0f / cap : 0.0f)) {}

  // y for any cap.
  F32x16 operator()(F32x16 score) const { return is_capped ? cap * tanh(score / cap) : score; }

  // p = exp(y) if is_bounded. NaN in gives NaN out.
  template <class Precision>
  F32x16 weight(F32x16 score) const {
    constexpr float kSquare = Precision::kLimit * Precision::kLimit;
    const F32x16 t = score * inverse, z = t * t;
    F32x16 y = fma(score, z * polynomial(Precision::kTanh, z), score);
    const Mask16 is_large = z >= F32x16::broadcast(kSquare);
    if (any(is_large)) y = select(is_large, cap * tanh(t), y);
    // The low bits of `rounded` hold n + 127, the exponent of 2^n.
    const F32x16 rounder = F32x16::broadcast(kRounder + 127);
    const F32x16 rounded = fma(y, F32x16::broadcast(0x1.715476p+0f), rounder), n = rounded - rounder;
    // ln 2 in two parts: the first has few enough bits that its product with n is exact.
    F32x16 r = fma(n, F32x16::broadcast(-0x1.63p-1f), y);
    r = fma(n, F32x16::broadcast(0x1.bd0106p-13f), r);
    return polynomial(Precision::kExp, r) * as_f32(shift_left<23>(as_i32(rounded)));
  }

  bool is_capped, is_bounded;
  F32x16 cap, inverse;
};

// Lanes from first to last, both included, any integers; the others become `otherwise`.
inline F32x16 keep_lanes(F32x16 x, int64_t first, int64_t last, F32x16 otherwise) {
  const auto clip = [](int64_t n) { return static_cast<int>(n < 0 ? 0 : n > 16 ? 16 : n); };
  return select(first_lanes(clip(first)), otherwise, select(first_lanes(clip(last + 1)), x, otherwise));
}

// Stores weights as bfloat16 and returns what was stored. They are normal numbers or 0, so the instruction that flushes
// subnormals rounds as store_bf16 does.
inline F32x16 store_rounded(F32x16 x, uint16_t* p) {
#if defined(GEMMA2_ISA_AVX512)
  const __m256i half = reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(x.v));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), half);
  return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16))};
#else
  x.store_bf16(p);
  return F32x16::load_bf16(p);
#endif
}

}  // namespace gemma2::GEMMA2_ISA
