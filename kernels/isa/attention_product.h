// The one product of attention: out[line][column] = Σ_step Σ_part a[line][step][part] · b[step][column][part].
//
// For scores, lines are queries, steps run over head_dim and columns are tokens; for outputs, lines are weights, steps
// run over tokens and columns are dims. A step takes one dword of each line and 16 dwords of each tile of 16 columns
// (kv_cache.h). Each output is one chain of sums over the steps, so its bits do not depend on the tiling:
//
//   float32   fma(a, b, sum)
//   bfloat16  dot() of simd_bf16.h: float32 sums, odd part first, subnormals flushed
//   int8      exact int32 sums (dot.h)
#pragma once

#include "dot.h"
#include "kv_cache.h"
#include "simd.h"
#include "simd_bf16.h"

namespace gemma2::GEMMA2_ISA {

// Lines and tiles of columns of a register tile. 32 registers of AVX-512: 6 × 4 sums, 4 of b, 1 of a. AVX2 has 16
// registers, two to a vector, and bfloat16 needs both halves of b and of a: 4 × 1 or 2 × 2 sums. NEON has 32, four to a
// vector. Few lines take more columns, so that there are chains enough to hide the latency of an addition.
#if defined(GEMMA2_ISA_AVX512)
constexpr int kMaxLines = 6;
constexpr int columns_for(int64_t) { return kGroupTiles; }
#elif defined(GEMMA2_ISA_SCALAR)
constexpr int kMaxLines = 2;
constexpr int columns_for(int64_t) { return 1; }
#else
constexpr int kMaxLines = 4;
constexpr int columns_for(int64_t lines) { return lines <= 2 ? 2 : 1; }
#endif

struct DotFloat32 {
  static constexpr CacheType type = CacheType::float32;
  struct Mode {};
  using Sum = F32x16;
  static F32x16 load(const uint8_t* b) { return F32x16::load(reinterpret_cast<const float*>(b)); }
  static F32x16 broadcast(const uint32_t* a) {
    float x;
    __builtin_memcpy(&x, a, sizeof x);
    return F32x16::broadcast(x);
  }
  static Sum start(const int32_t*) { return F32x16::zero(); }
  static Sum resume(const uint32_t* sums) { return F32x16::load(reinterpret_cast<const float*>(sums)); }
  template <int columns>
  static void add(const F32x16& a, const F32x16 (&b)[columns], Sum (&sums)[columns]) {
#pragma GCC unroll 4
    for (int c = 0; c < columns; ++c) sums[c] = fma(a, b[c], sums[c]);
  }
  static void store(const Sum& sum, uint32_t* out) { sum.store(reinterpret_cast<float*>(out)); }
};

struct DotBfloat16 {
  static constexpr CacheType type = CacheType::bfloat16;
  using Mode = FlushSubnormals;
  using Sum = F32x16;
  static Bf16x32 load(const uint8_t* b) { return Bf16x32::load(b); }
  static Bf16x32 broadcast(const uint32_t* a) { return Bf16x32::broadcast(*a); }
  static Sum start(const int32_t*) { return F32x16::zero(); }
  static Sum resume(const uint32_t* sums) { return F32x16::load(reinterpret_cast<const float*>(sums)); }
  template <int columns>
  static void add(const Bf16x32& a, const Bf16x32 (&b)[columns], Sum (&sums)[columns]) {
#pragma GCC unroll 4
    for (int c = 0; c < columns; ++c) sums[c] = dot(a, b[c], sums[c]);
  }
  static void store(const Sum& sum, uint32_t* out) { sum.store(reinterpret_cast<float*>(out)); }
};

struct DotInt8 {
  static constexpr CacheType type = CacheType::int8;
  struct Mode {};
  using Sum = I32x16;
  static Weights load(const uint8_t* b) { return load_q8(reinterpret_cast<const int8_t*>(b)); }
  static Sum start(const int32_t* sum_of_a) { return dot_start(*sum_of_a); }
  static Sum resume(const uint32_t* sums) { return I32x16::load(reinterpret_cast<const int32_t*>(sums)); }
#if defined(GEMMA2_ISA_AVX512)
  // dot4 of four vectors.
  static __m512i broadcast(const uint32_t* a) { return _mm512_set1_epi32(static_cast<int>(*a)); }
  template <int columns>
  static void add(__m512i a, const Weights (&b)[columns], Sum (&sums)[columns]) {
#pragma GCC unroll 4
    for (int c = 0; c < columns; ++c) asm("vpdpbusd %2, %1, %0" : "+v"(sums[c].v) : "v"(b[c].v), "v"(a));
  }
#else
  static const int8_t* broadcast(const uint32_t* a) { return reinterpret_cast<const int8_t*>(a); }
  template <int columns>
  static void add(const int8_t* a, const Weights (&b)[columns], Sum (&sums)[columns]) {
    dot4(sums, b, a);
  }
#endif
  static void store(const Sum& sum, uint32_t* out) { sum.store(reinterpret_cast<int32_t*>(out)); }
};

struct Lines {
  const uint32_t* values;  // [line][step]
  int64_t stride;
  const int32_t* sums;  // int8: of each line's values
};

// Where the vectors of b lie: steps come in segments of `segment_steps`; segment s, tile of columns c, step i are at
// bases[s · segment_stride + c · tile_stride] + offset + c · tile_bytes + i · step_bytes.
struct Columns {
  const uint8_t* const* bases;
  int64_t segment_steps, segment_stride, tile_stride, tile_bytes, step_bytes, offset;
  const uint8_t* at(int64_t segment, int tile) const {
    return bases[segment * segment_stride + tile * tile_stride] + offset + tile * tile_bytes;
  }
};

// How a product whose b comes from memory, for a few lines only, is cut into calls in the order of the memory.
struct Stream {
  bool resumes;   // add to what `out` holds
  int64_t ahead;  // ask for the memory so many bytes ahead, which comes next
};

// Every loop over lines and columns is unrolled: only then does GCC 12 keep the sums in registers from end to end.
template <class Dot, bool is_stream, int lines, int columns>
void register_tile(const Lines& a, const Columns& b, int64_t steps, const Stream& stream, uint32_t* out,
                   int64_t out_stride) {
  typename Dot::Sum sums[lines][columns];
  if (is_stream && stream.resumes) {
#pragma GCC unroll 8
    for (int r = 0; r < lines; ++r) {
#pragma GCC unroll 4
      for (int c = 0; c < columns; ++c) sums[r][c] = Dot::resume(out + r * out_stride + c * 16);
    }
  } else {
#pragma GCC unroll 8
    for (int r = 0; r < lines; ++r) {
#pragma GCC unroll 4
      for (int c = 0; c < columns; ++c) sums[r][c] = Dot::start(a.sums + r);
    }
  }
  const uint32_t* from = a.values;
  const uint32_t* const end = from + steps;
  for (int64_t s = 0; from < end; ++s) {
    const uint8_t* p[columns];
#pragma GCC unroll 4
    for (int c = 0; c < columns; ++c) p[c] = b.at(s, c);
    const uint32_t* const segment_end = end - from < b.segment_steps ? end : from + b.segment_steps;
    for (; from < segment_end; ++from) {
      decltype(Dot::load(nullptr)) vectors[columns];
#pragma GCC unroll 4
      for (int c = 0; c < columns; ++c) {
        if constexpr (is_stream) __builtin_prefetch(p[c] + stream.ahead, 0, 2);
        vectors[c] = Dot::load(p[c]);
        p[c] += b.step_bytes;
      }
#pragma GCC unroll 8
      for (int r = 0; r < lines; ++r) Dot::add(Dot::broadcast(from + r * a.stride), vectors, sums[r]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < lines; ++r) {
#pragma GCC unroll 4
    for (int c = 0; c < columns; ++c) Dot::store(sums[r][c], out + r * out_stride + c * 16);
  }
}

// At most kMaxLines lines and columns_for(lines) tiles of columns.
template <class Dot, bool is_stream, int lines = kMaxLines>
inline void multiply(int num_lines, int num_columns, const Lines& a, const Columns& b, int64_t steps,
                     const Stream& stream, uint32_t* out, int64_t out_stride) {
  if constexpr (lines > 1) {
    if (num_lines < lines) {
      return multiply<Dot, is_stream, lines - 1>(num_lines, num_columns, a, b, steps, stream, out, out_stride);
    }
  }
  constexpr int most = columns_for(lines);
  if constexpr (most >= 4) {
    if (num_columns == 4) return register_tile<Dot, is_stream, lines, 4>(a, b, steps, stream, out, out_stride);
    if (num_columns == 3) return register_tile<Dot, is_stream, lines, 3>(a, b, steps, stream, out, out_stride);
  }
  if constexpr (most >= 2) {
    if (num_columns == 2) return register_tile<Dot, is_stream, lines, 2>(a, b, steps, stream, out, out_stride);
  }
  register_tile<Dot, is_stream, lines, 1>(a, b, steps, stream, out, out_stride);
}

}  // namespace gemma2::GEMMA2_ISA
