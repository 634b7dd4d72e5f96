// simd.h in NEON (Armv8.2 and up): a vector is four registers.
#pragma once

#include <arm_neon.h>

#include <cstdint>

namespace gemma2::neon {

constexpr int kLanes = 16;

struct Mask16 {
  uint32x4_t m[4];  // all ones where true
};
inline Mask16 first_lanes(int n) {
  const int32_t counts[4] = {0, 1, 2, 3};
  const int32x4_t lanes = vld1q_s32(counts);
  Mask16 r;
  for (int i = 0; i < 4; ++i) r.m[i] = vcgtq_s32(vdupq_n_s32(n - 4 * i), lanes);
  return r;
}
inline bool any(const Mask16& m) {
  return vmaxvq_u32(vorrq_u32(vorrq_u32(m.m[0], m.m[1]), vorrq_u32(m.m[2], m.m[3]))) != 0;
}
inline uint32_t to_bits(const Mask16& m) {
  const uint32_t places[4] = {1, 2, 4, 8};
  const uint32x4_t bits = vld1q_u32(places);
  uint32_t r = 0;
  for (int i = 0; i < 4; ++i) r |= vaddvq_u32(vandq_u32(m.m[i], bits)) << (4 * i);
  return r;
}

// R{f(0), f(1), f(2), f(3)}, one register at a time.
template <class R, class F>
inline R each_register(F f) {
  return {{f(0), f(1), f(2), f(3)}};
}

struct I32x16 {
  int32x4_t v[4];
  static I32x16 broadcast(int32_t x) {
    return each_register<I32x16>([=](int) { return vdupq_n_s32(x); });
  }
  static I32x16 zero() { return broadcast(0); }
  static I32x16 load(const int32_t* p) {
    return each_register<I32x16>([=](int i) { return vld1q_s32(p + 4 * i); });
  }
  void store(int32_t* p) const {
    for (int i = 0; i < 4; ++i) vst1q_s32(p + 4 * i, v[i]);
  }
  int8x16_t bytes() const {
    const int16x8_t lo = vcombine_s16(vmovn_s32(v[0]), vmovn_s32(v[1]));
    const int16x8_t hi = vcombine_s16(vmovn_s32(v[2]), vmovn_s32(v[3]));
    return vcombine_s8(vmovn_s16(lo), vmovn_s16(hi));
  }
  void store_i8(int8_t* p) const { vst1q_s8(p, bytes()); }
};
inline I32x16 operator+(const I32x16& a, const I32x16& b) {
  return each_register<I32x16>([&](int i) { return vaddq_s32(a.v[i], b.v[i]); });
}
inline I32x16 operator-(const I32x16& a, const I32x16& b) {
  return each_register<I32x16>([&](int i) { return vsubq_s32(a.v[i], b.v[i]); });
}
inline I32x16 operator&(const I32x16& a, const I32x16& b) {
  return each_register<I32x16>([&](int i) { return vandq_s32(a.v[i], b.v[i]); });
}
inline I32x16 max(const I32x16& a, const I32x16& b) {
  return each_register<I32x16>([&](int i) { return vmaxq_s32(a.v[i], b.v[i]); });
}
template <int n>
inline I32x16 shift_left(const I32x16& a) {
  return each_register<I32x16>([&](int i) { return vshlq_n_s32(a.v[i], n); });
}
template <int n>
inline I32x16 shift_right(const I32x16& a) {
  return each_register<I32x16>([&](int i) { return vshrq_n_s32(a.v[i], n); });
}
inline int32_t reduce_add(const I32x16& a) {
  return vaddvq_s32(vaddq_s32(vaddq_s32(a.v[0], a.v[1]), vaddq_s32(a.v[2], a.v[3])));
}
inline int32_t reduce_max(const I32x16& a) {
  return vmaxvq_s32(vmaxq_s32(vmaxq_s32(a.v[0], a.v[1]), vmaxq_s32(a.v[2], a.v[3])));
}
inline void reduce_add4(const I32x16 (&v)[4], int32_t* out) {
  for (int i = 0; i < 4; ++i) out[i] = reduce_add(v[i]);
}
inline void reduce_max4(const I32x16 (&v)[4], int32_t* out) {
  for (int i = 0; i < 4; ++i) out[i] = reduce_max(v[i]);
}
inline void store_i8x64(const I32x16 (&v)[4], int8_t* p) {
  for (int i = 0; i < 4; ++i) v[i].store_i8(p + 16 * i);
}

struct F32x16 {
  float32x4_t v[4];
  static F32x16 broadcast(float x) {
    return each_register<F32x16>([=](int) { return vdupq_n_f32(x); });
  }
  static F32x16 zero() { return broadcast(0.0f); }
  static F32x16 load(const float* p) {
    return each_register<F32x16>([=](int i) { return vld1q_f32(p + 4 * i); });
  }
  static F32x16 load_partial(const float* p, int n) {
    float lanes[16] = {};
    for (int i = 0; i < n && i < 16; ++i) lanes[i] = p[i];
    return load(lanes);
  }
  static F32x16 load_bf16(const uint16_t* p) {
    return each_register<F32x16>([=](int i) { return vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(p + 4 * i), 16)); });
  }
  static F32x16 load_f16(const uint16_t* p) {
    return each_register<F32x16>([=](int i) { return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p + 4 * i))); });
  }
  void store_f16(uint16_t* p) const {
    for (int i = 0; i < 4; ++i) vst1_u16(p + 4 * i, vreinterpret_u16_f16(vcvt_f16_f32(v[i])));
  }
  void store(float* p) const {
    for (int i = 0; i < 4; ++i) vst1q_f32(p + 4 * i, v[i]);
  }
  void store_partial(float* p, int n) const {
    float lanes[16];
    store(lanes);
    for (int i = 0; i < n && i < 16; ++i) p[i] = lanes[i];
  }
  void store_bf16(uint16_t* p) const {
    for (int i = 0; i < 4; ++i) {
      const uint32x4_t bits = vreinterpretq_u32_f32(v[i]);
      const uint32x4_t odd = vandq_u32(vshrq_n_u32(bits, 16), vdupq_n_u32(1));
      vst1_u16(p + 4 * i, vshrn_n_u32(vaddq_u32(bits, vaddq_u32(odd, vdupq_n_u32(0x7fff))), 16));
    }
  }
};
inline F32x16 operator+(const F32x16& a, const F32x16& b) {
  return each_register<F32x16>([&](int i) { return vaddq_f32(a.v[i], b.v[i]); });
}
inline F32x16 operator-(const F32x16& a, const F32x16& b) {
  return each_register<F32x16>([&](int i) { return vsubq_f32(a.v[i], b.v[i]); });
}
inline F32x16 operator*(const F32x16& a, const F32x16& b) {
  return each_register<F32x16>([&](int i) { return vmulq_f32(a.v[i], b.v[i]); });
}
inline F32x16 operator/(const F32x16& a, const F32x16& b) {
  return each_register<F32x16>([&](int i) { return vdivq_f32(a.v[i], b.v[i]); });
}
inline F32x16 fma(const F32x16& a, const F32x16& b, const F32x16& c) {
  return each_register<F32x16>([&](int i) { return vfmaq_f32(c.v[i], a.v[i], b.v[i]); });
}
// Not vminq and vmaxq, which treat NaN and zeros with signs in another way than x86.
inline F32x16 min(const F32x16& a, const F32x16& b) {
  return each_register<F32x16>([&](int i) { return vbslq_f32(vcltq_f32(a.v[i], b.v[i]), a.v[i], b.v[i]); });
}
inline F32x16 max(const F32x16& a, const F32x16& b) {
  return each_register<F32x16>([&](int i) { return vbslq_f32(vcgtq_f32(a.v[i], b.v[i]), a.v[i], b.v[i]); });
}
inline F32x16 abs(const F32x16& a) {
  return each_register<F32x16>([&](int i) { return vabsq_f32(a.v[i]); });
}
inline F32x16 copy_sign(const F32x16& magnitude, const F32x16& sign) {
  const uint32x4_t bit = vdupq_n_u32(0x80000000u);
  return each_register<F32x16>([&](int i) { return vbslq_f32(bit, sign.v[i], magnitude.v[i]); });
}
inline F32x16 sqrt(const F32x16& a) {
  return each_register<F32x16>([&](int i) { return vsqrtq_f32(a.v[i]); });
}
// Out of range and NaN give the smallest integer, as on x86; the instruction alone would saturate.
inline I32x16 round_to_i32(const F32x16& a) {
  return each_register<I32x16>([&](int i) {
    const uint32x4_t fits = vcaltq_f32(a.v[i], vdupq_n_f32(0x1p31f));
    return vbslq_s32(fits, vcvtnq_s32_f32(a.v[i]), vdupq_n_s32(INT32_MIN));
  });
}
inline F32x16 to_f32(const I32x16& a) {
  return each_register<F32x16>([&](int i) { return vcvtq_f32_s32(a.v[i]); });
}
inline F32x16 as_f32(const I32x16& a) {
  return each_register<F32x16>([&](int i) { return vreinterpretq_f32_s32(a.v[i]); });
}
inline I32x16 as_i32(const F32x16& a) {
  return each_register<I32x16>([&](int i) { return vreinterpretq_s32_f32(a.v[i]); });
}
inline Mask16 operator>=(const F32x16& a, const F32x16& b) {
  return each_register<Mask16>([&](int i) { return vcgeq_f32(a.v[i], b.v[i]); });
}
inline Mask16 operator<(const F32x16& a, const F32x16& b) {
  return each_register<Mask16>([&](int i) { return vcltq_f32(a.v[i], b.v[i]); });
}
inline F32x16 select(const Mask16& m, const F32x16& a, const F32x16& b) {
  return each_register<F32x16>([&](int i) { return vbslq_f32(m.m[i], a.v[i], b.v[i]); });
}
inline I32x16 select(const Mask16& m, const I32x16& a, const I32x16& b) {
  return each_register<I32x16>([&](int i) { return vbslq_s32(m.m[i], a.v[i], b.v[i]); });
}
inline F32x16 lookup(const F32x16& table, const I32x16& index) {
  uint8x16x4_t bytes;
  for (int i = 0; i < 4; ++i) bytes.val[i] = vreinterpretq_u8_f32(table.v[i]);
  return each_register<F32x16>([&](int i) {
    // Lane n of the table is its bytes 4·n to 4·n + 3.
    const int32x4_t places = vmlaq_n_s32(vdupq_n_s32(0x03020100), index.v[i], 0x04040404);
    return vreinterpretq_f32_u8(vqtbl4q_u8(bytes, vreinterpretq_u8_s32(places)));
  });
}

inline float reduce_add(const F32x16& a) {
  const float32x4_t s4 = vaddq_f32(vaddq_f32(a.v[0], a.v[2]), vaddq_f32(a.v[1], a.v[3]));
  const float32x2_t s2 = vadd_f32(vget_low_f32(s4), vget_high_f32(s4));
  return vget_lane_f32(s2, 0) + vget_lane_f32(s2, 1);
}
inline float reduce_max(const F32x16& a) {
  return vmaxvq_f32(vmaxq_f32(vmaxq_f32(a.v[0], a.v[1]), vmaxq_f32(a.v[2], a.v[3])));
}

struct F64x16 {
  float64x2_t v[8];  // two lanes each
  static F64x16 zero() {
    const float64x2_t z = vdupq_n_f64(0.0);
    return {{z, z, z, z, z, z, z, z}};
  }
};
inline F64x16 operator+(const F64x16& a, const F32x16& b) {
  F64x16 r;
  for (int i = 0; i < 4; ++i) {
    r.v[2 * i] = vaddq_f64(a.v[2 * i], vcvt_f64_f32(vget_low_f32(b.v[i])));
    r.v[2 * i + 1] = vaddq_f64(a.v[2 * i + 1], vcvt_high_f64_f32(b.v[i]));
  }
  return r;
}
inline double reduce_add(const F64x16& a) {
  float64x2_t s8[4];
  for (int i = 0; i < 4; ++i) s8[i] = vaddq_f64(a.v[i], a.v[i + 4]);
  const float64x2_t s2 = vaddq_f64(vaddq_f64(s8[0], s8[2]), vaddq_f64(s8[1], s8[3]));
  return vgetq_lane_f64(s2, 0) + vgetq_lane_f64(s2, 1);
}

}  // namespace gemma2::neon
