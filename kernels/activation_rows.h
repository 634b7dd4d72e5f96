// Writing a row of activations from vectors of 16 float32 values.
//
//   int8      per group of 64: scale = max |x| / 127, value = round(x / scale) to nearest even, sum of the values
//   bfloat16  rounded to nearest even
//   float32   as they are
#pragma once

#include "activations.h"
#include "simd.h"

namespace gemma2::GEMMA2_ISA {

// Writes row `row` of `out`. at(k, n) gives the values k … k + 15, of which n are within the width (the rest 0).
template <class At>
inline void write_row(Activations& out, int64_t row, At&& at) {
  const int64_t width = out.width;
  for (int64_t group = 0; group < out.num_groups; ++group) {
    F32x16 x[4];
    F32x16 most = F32x16::zero();
    for (int i = 0; i < 4; ++i) {
      const int64_t k = group * kGroup + i * 16;
      const int64_t n = width - k;
      x[i] = n <= 0 ? F32x16::zero() : at(k, static_cast<int>(n < 16 ? n : 16));
      most = max(abs(x[i]), most);
    }
    const int64_t first = row * out.padded_width + group * kGroup;
    switch (out.format) {
      case ActivationFormat::float32:
        for (int i = 0; i < 4; ++i) x[i].store(out.float32.get() + first + i * 16);
        break;
      case ActivationFormat::bfloat16:
        for (int i = 0; i < 4; ++i) x[i].store_bf16(out.bfloat16.get() + first + i * 16);
        break;
      case ActivationFormat::int8: {
        const float scale = reduce_max(most) * (1.0f / 127.0f);
        // A group of zeros, or of numbers so small that 1 / scale overflows, becomes zeros.
        const F32x16 inverse = F32x16::broadcast(scale > 1e-37f ? 1.0f / scale : 0.0f);
        I32x16 sum = I32x16::zero();
        for (int i = 0; i < 4; ++i) {
          const I32x16 value = round_to_i32(x[i] * inverse);
          value.store_i8(out.int8.get() + first + i * 16);
          sum = sum + value;
        }
        out.scales[row * out.num_groups + group] = scale;
        out.sums[row * out.num_groups + group] = reduce_add(sum);
        break;
      }
    }
  }
}

}  // namespace gemma2::GEMMA2_ISA
