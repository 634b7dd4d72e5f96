// simd.h in plain C++: the reference that every instruction set must equal, and what other processors run.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

namespace gemma2::scalar {

constexpr int kLanes = 16;

struct Mask16 {
  bool m[16];
};
inline Mask16 first_lanes(int n) {
  Mask16 r;
  for (int i = 0; i < 16; ++i) r.m[i] = i < n;
  return r;
}

template <class R, class F>
inline R each_lane(F f) {
  R r;
  for (int i = 0; i < 16; ++i) r.v[i] = f(i);
  return r;
}

struct I32x16 {
  int32_t v[16];
  static I32x16 broadcast(int32_t x) {
    return each_lane<I32x16>([=](int) { return x; });
  }
  static I32x16 zero() { return broadcast(0); }
  static I32x16 load(const int32_t* p) {
    I32x16 r;
    std::memcpy(r.v, p, sizeof r.v);
    return r;
  }
  void store(int32_t* p) const { std::memcpy(p, v, sizeof v); }
  void store_i8(int8_t* p) const {
    for (int i = 0; i < 16; ++i) p[i] = static_cast<int8_t>(v[i]);
  }
};
inline I32x16 operator+(const I32x16& a, const I32x16& b) {
  return each_lane<I32x16>([&](int i) {
    return static_cast<int32_t>(static_cast<uint32_t>(a.v[i]) + static_cast<uint32_t>(b.v[i]));  // wraps, as vectors do
  });
}
inline I32x16 operator-(const I32x16& a, const I32x16& b) {
  return each_lane<I32x16>([&](int i) {
    return static_cast<int32_t>(static_cast<uint32_t>(a.v[i]) - static_cast<uint32_t>(b.v[i]));
  });
}
template <int n>
inline I32x16 shift_left(const I32x16& a) {
  return each_lane<I32x16>([&](int i) { return static_cast<int32_t>(static_cast<uint32_t>(a.v[i]) << n); });
}
inline I32x16 max(const I32x16& a, const I32x16& b) {
  return each_lane<I32x16>([&](int i) { return a.v[i] > b.v[i] ? a.v[i] : b.v[i]; });
}
inline int32_t reduce_max(const I32x16& a) {
  int32_t best = a.v[0];
  for (int32_t x : a.v) best = x > best ? x : best;
  return best;
}
inline I32x16 operator&(const I32x16& a, const I32x16& b) {
  return each_lane<I32x16>([&](int i) { return a.v[i] & b.v[i]; });
}
template <int n>
inline I32x16 shift_right(const I32x16& a) {
  return each_lane<I32x16>([&](int i) { return a.v[i] >> n; });
}
inline int32_t reduce_add(const I32x16& a) {
  int32_t sum = 0;
  for (int x : a.v) sum += x;
  return sum;
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

inline float bits_to_float(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}
inline uint32_t float_to_bits(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}
inline float half_to_float(uint16_t h) {
  const uint32_t sign = static_cast<uint32_t>(h & 0x8000u) << 16;
  const uint32_t exponent = (h >> 10) & 0x1fu, fraction = h & 0x3ffu;
  if (exponent == 0) return bits_to_float(sign) + (sign ? -1.0f : 1.0f) * static_cast<float>(fraction) * 0x1p-24f;
  if (exponent == 31) return bits_to_float(sign | 0x7f800000u | (fraction << 13));
  return bits_to_float(sign | ((exponent + 112) << 23) | (fraction << 13));
}

inline uint16_t float_to_half(float x) {
  const uint32_t bits = float_to_bits(x), sign = (bits >> 16) & 0x8000u, magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return static_cast<uint16_t>(sign | 0x7e00u | ((magnitude >> 13) & 0x3ffu));  // NaN
  if (magnitude >= 0x477ff000u) return static_cast<uint16_t>(sign | 0x7c00u);  // 65520 and more round to infinity
  // Below 2⁻¹⁴ a half counts units of 2⁻²⁴, which are the last bit of a float from 0.5 to 1: adding 0.5 rounds to them.
  if (magnitude < 0x38800000u) {
    return static_cast<uint16_t>(sign | (float_to_bits(bits_to_float(magnitude) + 0.5f) - float_to_bits(0.5f)));
  }
  const uint32_t rounded = magnitude + 0xfffu + ((magnitude >> 13) & 1u);
  return static_cast<uint16_t>(sign | ((rounded - (112u << 23)) >> 13));
}

struct F32x16 {
  float v[16];
  static F32x16 broadcast(float x) {
    return each_lane<F32x16>([=](int) { return x; });
  }
  static F32x16 zero() { return broadcast(0.0f); }
  static F32x16 load(const float* p) {
    F32x16 r;
    std::memcpy(r.v, p, sizeof r.v);
    return r;
  }
  static F32x16 load_partial(const float* p, int n) {
    return each_lane<F32x16>([=](int i) { return i < n ? p[i] : 0.0f; });
  }
  static F32x16 load_bf16(const uint16_t* p) {
    return each_lane<F32x16>([=](int i) { return bits_to_float(static_cast<uint32_t>(p[i]) << 16); });
  }
  static F32x16 load_f16(const uint16_t* p) {
    return each_lane<F32x16>([=](int i) { return half_to_float(p[i]); });
  }
  void store_f16(uint16_t* p) const {
    for (int i = 0; i < 16; ++i) p[i] = float_to_half(v[i]);
  }
  void store(float* p) const { std::memcpy(p, v, sizeof v); }
  void store_partial(float* p, int n) const {
    for (int i = 0; i < n && i < 16; ++i) p[i] = v[i];
  }
  void store_bf16(uint16_t* p) const {
    for (int i = 0; i < 16; ++i) {
      const uint32_t bits = float_to_bits(v[i]);
      p[i] = static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
    }
  }
};
inline F32x16 operator+(const F32x16& a, const F32x16& b) {
  return each_lane<F32x16>([&](int i) { return a.v[i] + b.v[i]; });
}
inline F32x16 operator-(const F32x16& a, const F32x16& b) {
  return each_lane<F32x16>([&](int i) { return a.v[i] - b.v[i]; });
}
inline F32x16 operator*(const F32x16& a, const F32x16& b) {
  return each_lane<F32x16>([&](int i) { return a.v[i] * b.v[i]; });
}
inline F32x16 operator/(const F32x16& a, const F32x16& b) {
  return each_lane<F32x16>([&](int i) { return a.v[i] / b.v[i]; });
}
inline F32x16 fma(const F32x16& a, const F32x16& b, const F32x16& c) {
  return each_lane<F32x16>([&](int i) { return std::fma(a.v[i], b.v[i], c.v[i]); });
}
// As the x86 instructions: if one is NaN, the second operand.
inline F32x16 min(const F32x16& a, const F32x16& b) {
  return each_lane<F32x16>([&](int i) { return a.v[i] < b.v[i] ? a.v[i] : b.v[i]; });
}
inline F32x16 max(const F32x16& a, const F32x16& b) {
  return each_lane<F32x16>([&](int i) { return a.v[i] > b.v[i] ? a.v[i] : b.v[i]; });
}
inline F32x16 abs(const F32x16& a) {
  return each_lane<F32x16>([&](int i) { return std::fabs(a.v[i]); });
}
inline F32x16 copy_sign(const F32x16& magnitude, const F32x16& sign) {
  return each_lane<F32x16>([&](int i) { return std::copysign(magnitude.v[i], sign.v[i]); });
}
inline F32x16 sqrt(const F32x16& a) {
  return each_lane<F32x16>([&](int i) { return std::sqrt(a.v[i]); });
}
inline I32x16 round_to_i32(const F32x16& a) {
  // Out of range and NaN give the smallest integer, as cvtps2dq does; casting them would be undefined.
  return each_lane<I32x16>([&](int i) {
    return std::fabs(a.v[i]) < 0x1p31f ? static_cast<int32_t>(std::nearbyint(a.v[i])) : INT32_MIN;
  });
}
inline F32x16 to_f32(const I32x16& a) {
  return each_lane<F32x16>([&](int i) { return static_cast<float>(a.v[i]); });
}
inline F32x16 as_f32(const I32x16& a) {
  return each_lane<F32x16>([&](int i) { return bits_to_float(static_cast<uint32_t>(a.v[i])); });
}
inline I32x16 as_i32(const F32x16& a) {
  return each_lane<I32x16>([&](int i) { return static_cast<int32_t>(float_to_bits(a.v[i])); });
}
inline bool any(const Mask16& m) {
  bool found = false;
  for (bool b : m.m) found |= b;
  return found;
}
inline Mask16 operator>=(const F32x16& a, const F32x16& b) {
  Mask16 r;
  for (int i = 0; i < 16; ++i) r.m[i] = a.v[i] >= b.v[i];
  return r;
}
inline Mask16 operator<(const F32x16& a, const F32x16& b) {
  Mask16 r;
  for (int i = 0; i < 16; ++i) r.m[i] = a.v[i] < b.v[i];
  return r;
}
inline F32x16 select(const Mask16& m, const F32x16& a, const F32x16& b) {
  return each_lane<F32x16>([&](int i) { return m.m[i] ? a.v[i] : b.v[i]; });
}
inline I32x16 select(const Mask16& m, const I32x16& a, const I32x16& b) {
  return each_lane<I32x16>([&](int i) { return m.m[i] ? a.v[i] : b.v[i]; });
}
inline F32x16 lookup(const F32x16& table, const I32x16& index) {
  return each_lane<F32x16>([&](int i) { return table.v[index.v[i]]; });
}
inline uint32_t to_bits(const Mask16& m) {
  uint32_t bits = 0;
  for (int i = 0; i < 16; ++i) bits |= static_cast<uint32_t>(m.m[i]) << i;
  return bits;
}

struct F64x16 {
  double v[16];
  static F64x16 zero() {
    return each_lane<F64x16>([](int) { return 0.0; });
  }
};
inline F64x16 operator+(const F64x16& a, const F32x16& b) {
  return each_lane<F64x16>([&](int i) { return a.v[i] + static_cast<double>(b.v[i]); });
}
inline double reduce_add(const F64x16& a) {
  double s[8];
  for (int i = 0; i < 8; ++i) s[i] = a.v[i] + a.v[i + 8];
  for (int i = 0; i < 4; ++i) s[i] += s[i + 4];
  s[0] += s[2];
  s[1] += s[3];
  return s[0] + s[1];
}
inline float reduce_add(const F32x16& a) {
  float s[8];
  for (int i = 0; i < 8; ++i) s[i] = a.v[i] + a.v[i + 8];
  for (int i = 0; i < 4; ++i) s[i] += s[i + 4];
  s[0] += s[2];
  s[1] += s[3];
  return s[0] + s[1];
}
inline float reduce_max(const F32x16& a) {
  float best = a.v[0];
  for (float x : a.v) best = x > best ? x : best;
  return best;
}

}  // namespace gemma2::scalar
