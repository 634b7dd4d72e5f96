// Writing rows of activations from vectors of 16 float32 values.
//
//   int8      per group of 64: scale = max |x| / 127, value = round(x / scale) to nearest even, sum of the values.
//             A group that holds NaN or infinity gets the scale NaN and values 0, so that every product with it is NaN.
//   bfloat16  rounded to nearest even
//   float32   as they are
#pragma once

#include "activations.h"
#include "simd.h"

namespace gemma2::GEMMA2_ISA {

constexpr int kVectorsPerGroup = kGroup / kLanes;

inline void write_int8_group(Activations& out, int64_t row, int64_t group, const F32x16 (&x)[kVectorsPerGroup]) {
  // The bits of positive floats are ordered as whole numbers are, with infinity and then NaN above all numbers.
  I32x16 bits = as_i32(abs(x[0]));
  for (int i = 1; i < kVectorsPerGroup; ++i) bits = max(bits, as_i32(abs(x[i])));
  const int32_t most_bits = reduce_max(bits);
  float most;
  __builtin_memcpy(&most, &most_bits, sizeof most);

  float& scale = out.scales[row * out.num_groups + group];
  int32_t& sum_of_values = out.sums[row * out.num_groups + group];
  int8_t* values = out.int8.get() + row * out.padded_width + group * kGroup;
  // Numbers so small that 1 / scale overflows become zeros.
  if (!(most >= 127e-37f && most <= __FLT_MAX__)) {
    scale = most <= __FLT_MAX__ ? most * (1.0f / 127.0f) : __builtin_nanf("");
    sum_of_values = 0;
    __builtin_memset(values, 0, kGroup);
    return;
  }
  scale = most * (1.0f / 127.0f);
  const F32x16 inverse = F32x16::broadcast(1.0f / scale);
  I32x16 sum = I32x16::zero();
  for (int i = 0; i < kVectorsPerGroup; ++i) {
    const I32x16 value = round_to_i32(x[i] * inverse);
    value.store_i8(values + i * kLanes);
    sum = sum + value;
  }
  sum_of_values = reduce_add(sum);
}

// Writes the groups from `first` to before `last` of row `row`. at(k, n) gives the values k … k + 15, of which n are
// within the width and the rest must be 0.
template <class At>
inline void write_groups(Activations& out, int64_t row, int64_t first, int64_t last, At&& at) {
  const int64_t width = out.width;
  for (int64_t group = first; group < last; ++group) {
    F32x16 x[kVectorsPerGroup];
    for (int i = 0; i < kVectorsPerGroup; ++i) {
      const int64_t k = group * kGroup + i * kLanes;
      const int64_t n = width - k;
      x[i] = n <= 0 ? F32x16::zero() : at(k, static_cast<int>(n < kLanes ? n : kLanes));
    }
    const int64_t start = row * out.padded_width + group * kGroup;
    switch (out.format) {
      case ActivationFormat::float32:
        for (int i = 0; i < kVectorsPerGroup; ++i) x[i].store(out.float32.get() + start + i * kLanes);
        break;
      case ActivationFormat::bfloat16:
        for (int i = 0; i < kVectorsPerGroup; ++i) x[i].store_bf16(out.bfloat16.get() + start + i * kLanes);
        break;
      case ActivationFormat::int8: write_int8_group(out, row, group, x); break;
    }
  }
}

template <class At>
inline void write_row(Activations& out, int64_t row, At&& at) {
  write_groups(out, row, 0, out.num_groups, at);
}

}  // namespace gemma2::GEMMA2_ISA
