// values[row][i] += Σ over groups of 64 inputs, in order, of (scale_x · scale_w) · (int32 dot product of the group).
//
// The sum is that of the whole product (isa/quantized_matmul.cpp), bit for bit: fma into a float32 accumulator that
// starts at 0, group after group. An output's weights lie scattered in its tile (matrix.h), 4 bytes in every 64, so a
// cache line is read for 4 (q8) or 8 (q4) weights: worth it for some hundred outputs of a matrix of 256,000, no more.
#include "selected_outputs.h"

#include <cmath>
#include <cstring>

#include "simd.h"

namespace gemma2::GEMMA2_ISA {
namespace {

// The weights of one output in one group, in units of the scale that it returns.
float read_group(const Q4Block& block, int half, int lane, int8_t (&weights)[kGroup]) {
  for (int j = 0; j < 8; ++j) {
    for (int b = 0; b < 4; ++b) {
      const uint8_t pair = block.nibbles[half][j][4 * lane + b];
      weights[8 * j + b] = kQ4Codebook[pair & 15];
      weights[8 * j + 4 + b] = kQ4Codebook[pair >> 4];
    }
  }
  float scales[16];
  F32x16::load_f16(block.scales + half * kLanesPerHalf).store(scales);
  return scales[lane];
}

float read_group(const Q8Block& block, int half, int lane, int8_t (&weights)[kGroup]) {
  for (int j = 0; j < 16; ++j) std::memcpy(weights + 4 * j, &block.values[half][j][4 * lane], 4);
  float scales[16];
  F32x16::load_f16(block.scales + half * kLanesPerHalf).store(scales);
  return scales[lane];
}

template <class Block>
float dot_output(const Activations& x, const Matrix& w, int64_t row, int64_t output) {
  const auto* blocks = reinterpret_cast<const Block*>(w.data + output / kTile * w.tile_bytes());
  const int half = static_cast<int>(output % kTile / kLanesPerHalf), lane = static_cast<int>(output % kLanesPerHalf);
  const int8_t* values = x.int8.get() + row * x.padded_width;
  const float* scales = x.scales.get() + row * x.num_groups;
  float sum = 0;
  int8_t weights[kGroup];
  for (int64_t group = 0; group < x.num_groups; ++group) {
    const float scale = read_group(blocks[group], half, lane, weights);
    int32_t dot = 0;
    for (int k = 0; k < kGroup; ++k) dot += weights[k] * values[group * kGroup + k];
    sum = std::fma(static_cast<float>(dot), scales[group] * scale, sum);
  }
  return sum;
}

void add(ThreadPool& pool, const Activations& x, const Matrix& w, const int32_t* ids, int64_t count, float* values) {
  constexpr int64_t kOutputsPerTask = 32;  // some 50 µs at the width of the 2B, much more than a task costs
  const int64_t tasks_per_row = (count + kOutputsPerTask - 1) / kOutputsPerTask;
  pool.parallel_for(x.rows * tasks_per_row, [&](int64_t task, int) {
    const int64_t row = task / tasks_per_row, first = task % tasks_per_row * kOutputsPerTask;
    for (int64_t i = first; i < count && i < first + kOutputsPerTask; ++i) {
      const int64_t at = row * count + i;
      values[at] += w.format == WeightFormat::q4 ? dot_output<Q4Block>(x, w, row, ids[at])
                                                 : dot_output<Q8Block>(x, w, row, ids[at]);
    }
  });
}

}  // namespace

const SelectedOutputsKernels& selected_outputs_kernels() {
  static constexpr SelectedOutputsKernels kernels{.add = add};
  return kernels;
}

}  // namespace gemma2::GEMMA2_ISA
