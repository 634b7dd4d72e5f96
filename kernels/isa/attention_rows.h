// Queries, keys and values of one token and head as the dwords of kv_cache.h.
#pragma once

#include "kv_cache.h"
#include "simd.h"

namespace gemma2::GEMMA2_ISA {

// The bits of positive floats are ordered as whole numbers are, with infinity and then NaN above all numbers. So the
// maximum of |x| taken of them knows of every bad number; it is NaN then, and bytes with this scale stand for NaN,
// whatever they are.
inline I32x16 magnitude(F32x16 x) { return as_i32(abs(x)); }
inline float reduce_magnitudes(I32x16 bits) {
  constexpr int32_t kInfinityBits = 0x7f800000;
  const int32_t most_bits = reduce_max(bits);
  float most;
  __builtin_memcpy(&most, &most_bits, sizeof most);
  return most_bits < kInfinityBits ? most : __builtin_nanf("");
}

// max |x|, NaN if one is NaN or infinite. at(k, n) gives the values k … k + 15, of which n exist (the rest 0).
template <class At>
inline float largest(int64_t width, At&& at) {
  I32x16 most = I32x16::zero();
  for (int64_t k = 0; k < width; k += 16) {
    const int64_t n = width - k;
    most = max(magnitude(at(k, static_cast<int>(n < 16 ? n : 16))), most);
  }
  return reduce_magnitudes(most);
}

inline auto values_of(const float* x) {
  return [x](int64_t k, int n) { return F32x16::load_partial(x + k, n); };
}

// Multiplying by it is dividing by the scale; rows of zeros, or of numbers so small that it overflows, become zeros.
inline float inverse_of(float scale) { return scale > 1e-37f ? 1.0f / scale : 0.0f; }

// `width` values as float32 or bfloat16 (to nearest even), zeros up to a multiple of 16.
inline void pack_row(CacheType type, const float* x, int64_t width, uint32_t* out) {
  for (int64_t k = 0; k < width; k += 16) {
    const int64_t n = width - k;
    const F32x16 values = F32x16::load_partial(x + k, static_cast<int>(n < 16 ? n : 16));
    if (type == CacheType::float32) {
      values.store(reinterpret_cast<float*>(out) + k);
    } else {
      values.store_bf16(reinterpret_cast<uint16_t*>(out) + k);
    }
  }
}

// `width` values as signed bytes, zeros up to a multiple of 16. Returns the scale, max |x| / 127.
inline float pack_row_int8(const float* x, int64_t width, int8_t* out) {
  const float scale = largest(width, values_of(x)) * (1.0f / 127.0f);
  const F32x16 inverse = F32x16::broadcast(inverse_of(scale));
  for (int64_t k = 0; k < width; k += 16) {
    const int64_t n = width - k;
    round_to_i32(F32x16::load_partial(x + k, static_cast<int>(n < 16 ? n : 16)) * inverse).store_i8(out + k);
  }
  return scale;
}

}  // namespace gemma2::GEMMA2_ISA
