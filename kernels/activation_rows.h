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

// Four numbers in one register of any instruction set; its arithmetic is lane by lane.
using F32x4 = float __attribute__((vector_size(16)));

// Groups `group` … `group` + 3 of row `row`, of which the first `num_groups` exist.
inline void write_int8_groups(Activations& out, int64_t row, int64_t group, int num_groups,
                              F32x16 (&x)[4][kVectorsPerGroup]) {
  // The bits of positive floats are ordered as whole numbers are, with infinity and then NaN above all numbers.
  constexpr int32_t kInfinityBits = 0x7f800000, kTinyBits = 0x04800000;
  I32x16 magnitudes[4], values[4][kVectorsPerGroup], sums[4];
  for (int g = 0; g < 4; ++g) {
    magnitudes[g] = max(max(as_i32(abs(x[g][0])), as_i32(abs(x[g][1]))), max(as_i32(abs(x[g][2])), as_i32(abs(x[g][3]))));
  }
  int32_t most_bits[4];
  reduce_max4(magnitudes, most_bits);
  F32x4 most;
  __builtin_memcpy(&most, most_bits, sizeof most);
  F32x4 scales = most * (1.0f / 127.0f), inverses = 1.0f / scales;
  for (int g = 0; g < 4; ++g) {
    if (most_bits[g] >= kTinyBits && most_bits[g] < kInfinityBits) [[likely]] continue;
    // No numbers; or all so small that 1 / scale could overflow: 2^-118 at most.
    if (most_bits[g] >= kInfinityBits) scales[g] = __builtin_nanf("");
    inverses[g] = 0.0f;
    for (F32x16& v : x[g]) v = F32x16::zero();
  }
  for (int g = 0; g < 4; ++g) {
    const F32x16 inverse = F32x16::broadcast(inverses[g]);
    for (int i = 0; i < kVectorsPerGroup; ++i) values[g][i] = round_to_i32(x[g][i] * inverse);
    sums[g] = (values[g][0] + values[g][1]) + (values[g][2] + values[g][3]);
  }
  int32_t sums_of_values[4];
  reduce_add4(sums, sums_of_values);
  const int64_t first = row * out.num_groups + group;
  int8_t* to = out.int8.get() + row * out.padded_width + group * kGroup;
  for (int g = 0; g < num_groups; ++g) {
    out.scales[first + g] = scales[g];
    out.sums[first + g] = sums_of_values[g];
    store_i8x64(values[g], to + g * kGroup);
  }
}

template <class At>
inline void write_int8(Activations& out, int64_t row, int64_t first, int64_t last, At&& at) {
  const int64_t end = last * kGroup < out.width ? last * kGroup : out.width;
  // Four groups at a time: what is done once a group (maximum, scale, sum) costs less for four together.
  for (int64_t group = first; group < last; group += 4) {
    F32x16 x[4][kVectorsPerGroup];
    const int64_t start = group * kGroup;
    if (start + 4 * kGroup <= end) {
      for (int i = 0; i < 16; ++i) x[i / 4][i % 4] = at(start + i * kLanes, kLanes);
      write_int8_groups(out, row, group, 4, x);
    } else {
      for (int i = 0; i < 16; ++i) {
        const int64_t n = end - start - i * kLanes;
        x[i / 4][i % 4] = n <= 0 ? F32x16::zero() : at(start + i * kLanes, static_cast<int>(n < kLanes ? n : kLanes));
      }
      write_int8_groups(out, row, group, static_cast<int>(last - group < 4 ? last - group : 4), x);
    }
  }
}

template <class At, class Store>
inline void write_floats(const Activations& out, int64_t first, int64_t last, At&& at, Store&& store) {
  const int64_t end = last * kGroup < out.width ? last * kGroup : out.width;
  int64_t k = first * kGroup;
  for (; k + kLanes <= end; k += kLanes) store(at(k, kLanes), k);
  for (; k < last * kGroup; k += kLanes) store(k < end ? at(k, static_cast<int>(end - k)) : F32x16::zero(), k);
}

// Writes the groups from `first` to before `last` of row `row`. at(k, n) gives the values k … k + 15, of which n are
// within the width and the rest must be 0.
template <class At>
inline void write_groups(Activations& out, int64_t row, int64_t first, int64_t last, At&& at) {
  const int64_t start = row * out.padded_width;
  switch (out.format) {
    case ActivationFormat::int8: write_int8(out, row, first, last, at); break;
    case ActivationFormat::bfloat16: {
      uint16_t* to = out.bfloat16.get() + start;
      write_floats(out, first, last, at, [=](F32x16 x, int64_t k) { x.store_bf16(to + k); });
      break;
    }
    case ActivationFormat::float32: {
      float* to = out.float32.get() + start;
      write_floats(out, first, last, at, [=](F32x16 x, int64_t k) { x.store(to + k); });
      break;
    }
  }
}

template <class At>
inline void write_row(Activations& out, int64_t row, At&& at) {
  write_groups(out, row, 0, out.num_groups, at);
}

}  // namespace gemma2::GEMMA2_ISA
