// The one product of attention: out[line][column] = Σ_step Σ_part a[line][step][part] · b[step][column][part].
//
// For scores, lines are queries, steps run over head_dim and columns are tokens; for outputs, lines are weights, steps
// run over tokens and columns are dims. A step takes one dword of each line and 16 dwords of each tile of 16 columns
// (kv_cache.h). Each output is one chain of sums over the steps, so its bits do not depend on the tiling:
//
//   float32   fma(a, b, sum)
//   bfloat16  dot() of simd_bf16.h: float32 sums, odd part first, subnormals flushed
//   int8      exact: int32 sums of a · (b - 128)
#pragma once

#include "kv_cache.h"
#include "simd.h"
#include "simd_bf16.h"

namespace gemma2::GEMMA2_ISA {

// Lines and tiles of columns of a register tile. 32 registers of AVX-512: 6 × 4 sums, 4 of b, 1 of a. AVX2 has 16
// registers, two to a vector, and bfloat16 needs both halves of b and of a.
#if defined(GEMMA2_ISA_AVX512)
constexpr int kMaxLines = 6;
constexpr int kMaxColumns = 4;
#elif defined(GEMMA2_ISA_NEON)
constexpr int kMaxLines = 6;
constexpr int kMaxColumns = 1;
#else
constexpr int kMaxLines = 4;
constexpr int kMaxColumns = 1;
#endif

struct DotFloat32 {
  static constexpr CacheType type = CacheType::float32;
  struct Mode {};
  using Sum = F32x16;
  using Vector = F32x16;
  static Vector load(const uint8_t* b) { return F32x16::load(reinterpret_cast<const float*>(b)); }
  static Vector broadcast(const uint32_t* a) {
    float x;
    __builtin_memcpy(&x, a, sizeof x);
    return F32x16::broadcast(x);
  }
  static Sum start(const int32_t*) { return F32x16::zero(); }
  static Sum add(const Vector& a, const Vector& b, const Sum& sum) { return fma(a, b, sum); }
  static void store(const Sum& sum, uint32_t* out) { sum.store(reinterpret_cast<float*>(out)); }
};

struct DotBfloat16 {
  static constexpr CacheType type = CacheType::bfloat16;
  using Mode = FlushSubnormals;
  using Sum = F32x16;
  using Vector = Bf16x32;
  static Vector load(const uint8_t* b) { return Bf16x32::load(b); }
  static Vector broadcast(const uint32_t* a) { return Bf16x32::broadcast(*a); }
  static Sum start(const int32_t*) { return F32x16::zero(); }
  static Sum add(const Vector& a, const Vector& b, const Sum& sum) { return dot(a, b, sum); }
  static void store(const Sum& sum, uint32_t* out) { sum.store(reinterpret_cast<float*>(out)); }
};

#if defined(GEMMA2_ISA_AVX512)
// vpdpbusd takes unsigned times signed bytes; the 128 that b has too much is put right in what the sums start from.
struct DotInt8 {
  static constexpr CacheType type = CacheType::int8;
  struct Mode {};
  using Sum = I32x16;
  using Vector = __m512i;
  static Vector load(const uint8_t* b) { return _mm512_loadu_si512(b); }
  static Vector broadcast(const uint32_t* a) { return _mm512_set1_epi32(static_cast<int>(*a)); }
  static Sum start(const int32_t* sum_of_a) { return I32x16::broadcast(-128 * *sum_of_a); }
  static Sum add(const Vector& a, const Vector& b, Sum sum) {
    // Not the intrinsic: GCC 12 spills its accumulators.
    asm("vpdpbusd %2, %1, %0" : "+v"(sum.v) : "v"(b), "v"(a));
    return sum;
  }
  static void store(const Sum& sum, uint32_t* out) { sum.store(reinterpret_cast<int32_t*>(out)); }
};
#elif defined(GEMMA2_ISA_AVX2)
// vpmaddubsw adds two products of unsigned and signed bytes in 16 bits: |b - 128| <= 128 and |a| <= 127 fit.
struct DotInt8 {
  static constexpr CacheType type = CacheType::int8;
  struct Mode {};
  using Sum = I32x16;
  struct Vector {
    __m256i lo, hi;
  };
  static Vector load(const uint8_t* b) {
    const auto* p = reinterpret_cast<const __m256i*>(b);
    const __m256i flip = _mm256_set1_epi8(static_cast<char>(0x80));
    return {_mm256_xor_si256(_mm256_loadu_si256(p), flip), _mm256_xor_si256(_mm256_loadu_si256(p + 1), flip)};
  }
  static Vector broadcast(const uint32_t* a) {
    const __m256i v = _mm256_set1_epi32(static_cast<int>(*a));
    return {v, v};
  }
  static Sum start(const int32_t*) { return I32x16::zero(); }
  static Sum add(const Vector& a, const Vector& b, const Sum& sum) {
    return {add(a.lo, b.lo, sum.lo), add(a.hi, b.hi, sum.hi)};
  }
  static __m256i add(__m256i a, __m256i b, __m256i sum) {
    const __m256i pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(b), _mm256_sign_epi8(a, b));
    return _mm256_add_epi32(sum, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
  }
  static void store(const Sum& sum, uint32_t* out) { sum.store(reinterpret_cast<int32_t*>(out)); }
};
#else
// In float32, which holds these sums exactly (kMaxHeadDim).
struct DotInt8 {
  static constexpr CacheType type = CacheType::int8;
  struct Mode {};
  using Sum = F32x16;
  struct Vector {
    I32x16 dwords;
  };
  static Vector load(const uint8_t* b) { return {I32x16::load(reinterpret_cast<const int32_t*>(b))}; }
  static Vector broadcast(const uint32_t* a) { return {I32x16::broadcast(static_cast<int32_t>(*a))}; }
  static Sum start(const int32_t*) { return F32x16::zero(); }
  template <int part>
  static Sum add_part(const Vector& a, const Vector& b, const Sum& sum) {
    const F32x16 x = to_f32(shift_right<24>(shift_left<24 - 8 * part>(a.dwords)));
    const I32x16 y = shift_right<8 * part>(b.dwords) & I32x16::broadcast(255);
    return fma(x, to_f32(y - I32x16::broadcast(128)), sum);
  }
  static Sum add(const Vector& a, const Vector& b, const Sum& sum) {
    return add_part<3>(a, b, add_part<2>(a, b, add_part<1>(a, b, add_part<0>(a, b, sum))));
  }
  static void store(const Sum& sum, uint32_t* out) { round_to_i32(sum).store(reinterpret_cast<int32_t*>(out)); }
};
#endif

// Where the vectors of b lie: segment s, tile of columns c, step i are at
// bases[s · segment_stride + c · tile_stride] + offset + c · tile_bytes + i · 64.
struct Columns {
  const uint8_t* const* bases;
  int64_t segment_stride, tile_stride, tile_bytes, offset;
  const uint8_t* at(int64_t segment, int tile) const {
    return bases[segment * segment_stride + tile * tile_stride] + offset + tile * tile_bytes;
  }
};

// Lines of a: `steps` dwords for each segment, one segment after the other.
struct Lines {
  const uint32_t* values;
  int64_t stride;
  const int32_t* sums;  // int8: of each line's values
};

template <class Dot, int lines, int columns>
void register_tile(const Lines& a, const Columns& b, int64_t segments, int64_t steps, uint32_t* out,
                   int64_t out_stride) {
  typename Dot::Sum sums[lines][columns];
  for (int r = 0; r < lines; ++r) {
    for (int c = 0; c < columns; ++c) sums[r][c] = Dot::start(a.sums + r);
  }
  const uint32_t* from = a.values;
  for (int64_t s = 0; s < segments; ++s) {
    const uint8_t* p[columns];
    for (int c = 0; c < columns; ++c) p[c] = b.at(s, c);
    for (int64_t i = 0; i < steps; ++i, ++from) {
      typename Dot::Vector vectors[columns];
      for (int c = 0; c < columns; ++c) vectors[c] = Dot::load(p[c] + i * kVectorBytes);
#pragma GCC unroll 8
      for (int r = 0; r < lines; ++r) {
        const typename Dot::Vector value = Dot::broadcast(from + r * a.stride);
#pragma GCC unroll 4
        for (int c = 0; c < columns; ++c) sums[r][c] = Dot::add(value, vectors[c], sums[r][c]);
      }
    }
  }
  for (int r = 0; r < lines; ++r) {
    for (int c = 0; c < columns; ++c) Dot::store(sums[r][c], out + r * out_stride + c * 16);
  }
}

template <class Dot, int lines>
inline void some_columns(int columns, const Lines& a, const Columns& b, int64_t segments, int64_t steps, uint32_t* out,
                         int64_t out_stride) {
  static_assert(kMaxColumns == 1 || kMaxColumns == 4);
  if constexpr (kMaxColumns == 1) {
    register_tile<Dot, lines, 1>(a, b, segments, steps, out, out_stride);
  } else {
    switch (columns) {
      case 1: return register_tile<Dot, lines, 1>(a, b, segments, steps, out, out_stride);
      case 2: return register_tile<Dot, lines, 2>(a, b, segments, steps, out, out_stride);
      case 3: return register_tile<Dot, lines, 3>(a, b, segments, steps, out, out_stride);
      default: return register_tile<Dot, lines, 4>(a, b, segments, steps, out, out_stride);
    }
  }
}

// At most kMaxLines lines and kMaxColumns tiles of columns.
template <class Dot>
inline void multiply(int lines, int columns, const Lines& a, const Columns& b, int64_t segments, int64_t steps,
                     uint32_t* out, int64_t out_stride) {
  switch (lines) {
    case 1: return some_columns<Dot, 1>(columns, a, b, segments, steps, out, out_stride);
    case 2: return some_columns<Dot, 2>(columns, a, b, segments, steps, out, out_stride);
    case 3: return some_columns<Dot, 3>(columns, a, b, segments, steps, out, out_stride);
    case 4: return some_columns<Dot, 4>(columns, a, b, segments, steps, out, out_stride);
    case 5:
      if constexpr (kMaxLines >= 5) some_columns<Dot, 5>(columns, a, b, segments, steps, out, out_stride);
      return;
    case 6:
      if constexpr (kMaxLines >= 6) some_columns<Dot, 6>(columns, a, b, segments, steps, out, out_stride);
      return;
  }
}

}  // namespace gemma2::GEMMA2_ISA
