// Packing of weights into the layouts of matrix.h, and back. A tile of 32 outputs is a task; it is packed half block by
// half block: 16 outputs × 64 inputs are read and turned (half_block.h), rounded (scale_search.h) and written. With
// feedback (rounding_feedback.h) a half tile is turned a block of inputs at a time, and rounded group after group.
//
// bfloat16 rounds to nearest even, float32 keeps the bits. Weights beyond the last input or output are packed as zeros,
// for which q4 has no code of its own: what it gives to inputs beyond the last is never read. No sum goes across lanes: the same bits for any instruction set and number of threads,
// and a tile's do not depend on the other tiles.
#include "packing.h"

#include <atomic>

#include "half_block.h"
#include "rounding_feedback.h"
#include "scale_search.h"

namespace gemma2::GEMMA2_ISA {
namespace {

void write(const HalfBlock& block, int half, Q8Block& out) {
  for (int j = 0; j < kGroup / 4; ++j) {
    for (int i = 0; i < kLanesPerHalf; ++i) {
      for (int b = 0; b < 4; ++b) out.values[half][j][4 * i + b] = block.codes[4 * j + b][i];
    }
  }
  __builtin_memcpy(out.scales + half * kLanesPerHalf, block.scales, sizeof block.scales);
}

void write(const HalfBlock& block, int half, Q4Block& out) {
  for (int j = 0; j < kGroup / 8; ++j) {
    for (int i = 0; i < kLanesPerHalf; ++i) {
      for (int b = 0; b < 4; ++b) {
        const int low = block.codes[8 * j + b][i], high = block.codes[8 * j + 4 + b][i];
        out.nibbles[half][j][4 * i + b] = static_cast<uint8_t>(low | high << 4);
      }
    }
  }
  __builtin_memcpy(out.scales + half * kLanesPerHalf, block.scales, sizeof block.scales);
}

// Group `group` of a tile of bfloat16: [inputs / 2][2 halves][16 outputs][2 inputs].
void write_bfloat16(HalfBlock& block, int half, int64_t group, uint16_t* tile) {
  uint16_t* out = tile + group * kGroup * kTile + half * kLanesPerHalf * 2;
  ErrorSums sums;
  for (int pair = 0; pair < kGroup / 2; ++pair, out += 2 * kTile) {
    uint16_t rounded[2][kLanesPerHalf];
    for (int b = 0; b < 2; ++b) {
      const F32x16 w = F32x16::load(block.weights[2 * pair + b]);
      w.store_bf16(rounded[b]);
      sums.add(w, F32x16::load_bf16(rounded[b]));
    }
    for (int i = 0; i < kLanesPerHalf; ++i) {
      out[2 * i] = rounded[0][i];
      out[2 * i + 1] = rounded[1][i];
    }
  }
  sums.add_to(block.error);
}

// Group `group` of a tile of float32: [inputs][32 outputs].
void write_float32(HalfBlock& block, int half, int64_t group, float* tile) {
  float* out = tile + group * kGroup * kTile + half * kLanesPerHalf;
  ErrorSums sums;
  for (int k = 0; k < kGroup; ++k) {
    const F32x16 w = F32x16::load(block.weights[k]);
    w.store(out + k * kTile);
    sums.add(w, w);
  }
  sums.add_to(block.error);
}

float limit_of(WeightFormat format) {
  switch (format) {
    case WeightFormat::float32: return kLargestFloat32;
    case WeightFormat::bfloat16: return kLargestBfloat16;
    default: return kLargestQuantized;
  }
}

int inputs_of_group(const Matrix& matrix, int64_t group) {
  const int64_t left = matrix.inputs - group * kGroup;
  return static_cast<int>(left < kGroup ? left : kGroup);
}

void read_importance(const float* importance, int64_t group, int num_inputs, float* out) {
  for (int k = 0; k < kGroup; ++k) {
    out[k] = k >= num_inputs ? 0.0f : importance == nullptr ? 1.0f : importance[group * kGroup + k];
  }
}

// Packs a tile at `data`. Returns -1 or a row that does not fit.
int64_t pack_tile(const WeightRows& rows, const float* importance, const Matrix& out, int64_t tile, uint8_t* data,
                  RoundingError& error) {
  HalfBlock block;
  alignas(64) float weighting[kGroup];
  for (int64_t group = 0; group < out.num_groups(); ++group) {
    const int num_inputs = inputs_of_group(out, group);
    read_importance(importance, group, num_inputs, weighting);
    for (int half = 0; half < 2; ++half) {
      const int64_t bad = read_half_block(rows, tile * kTile + half * kLanesPerHalf, group * kGroup,
                                          limit_of(out.format), block);
      if (bad >= 0) return bad;
      switch (out.format) {
        case WeightFormat::q4:
          round_half_block<Q4Rounding>(block, weighting, num_inputs);
          write(block, half, reinterpret_cast<Q4Block*>(data)[group]);
          break;
        case WeightFormat::q8:
          round_half_block<Q8Rounding>(block, weighting, num_inputs);
          write(block, half, reinterpret_cast<Q8Block*>(data)[group]);
          break;
        case WeightFormat::bfloat16: write_bfloat16(block, half, group, reinterpret_cast<uint16_t*>(data)); break;
        case WeightFormat::float32: write_float32(block, half, group, reinterpret_cast<float*>(data)); break;
      }
    }
  }
  error = block.error;
  return -1;
}

// The same with feedback, for Block = Q4Block or Q8Block. strip: (feedback.block, 16) floats.
template <class Rounding, class Block>
int64_t pack_tile_with_feedback(const WeightRows& rows, const float* importance, const Feedback& feedback,
                                const Matrix& out, int64_t tile, uint8_t* data, RoundingError& error, float* strip) {
  HalfBlock block;
  alignas(64) float weighting[kGroup];
  const float limit = limit_of(out.format);
  const int64_t groups_per_block = feedback.block / kGroup;
  for (int half = 0; half < 2; ++half) {
    const int64_t first_row = tile * kTile + half * kLanesPerHalf;
    for (int64_t begin = 0; begin < out.num_groups(); begin += groups_per_block) {
      const int64_t end = begin + groups_per_block < out.num_groups() ? begin + groups_per_block : out.num_groups();
      for (int64_t group = begin; group < end; ++group) {
        const int64_t bad = read_half_block(rows, first_row, group * kGroup, limit, block);
        if (bad >= 0) return bad;
        __builtin_memcpy(strip + (group - begin) * kGroup * kLanesPerHalf, block.weights, sizeof block.weights);
      }
      for (int64_t group = begin; group < end; ++group) {
        const int num_inputs = inputs_of_group(out, group);
        read_importance(importance, group, num_inputs, weighting);
        read_half_block(rows, first_row, group * kGroup, limit, block);
        round_group_with_feedback<Rounding>(strip, (group - begin) * kGroup, (end - begin) * kGroup,
                                            feedback.factors + group * kGroup * feedback.block, feedback.block,
                                            weighting, num_inputs, block);
        write(block, half, reinterpret_cast<Block*>(data)[group]);
      }
    }
  }
  error = block.error;
  return -1;
}

int64_t pack(ThreadPool& pool, const WeightRows& rows, const float* importance, const Feedback& feedback,
             const Matrix& out, uint8_t* data, RoundingError* errors) {
  std::atomic<int64_t> bad_row{-1};
  AlignedArray<float> strips;
  const int64_t strip_size = feedback.block * kLanesPerHalf;
  if (feedback.factors != nullptr) strips = aligned_zeros<float>(pool.num_threads() * strip_size);
  pool.parallel_for(out.num_tiles(), [&](int64_t tile, int thread) {
    uint8_t* at = data + tile * out.tile_bytes();
    int64_t bad;
    if (feedback.factors == nullptr) {
      bad = pack_tile(rows, importance, out, tile, at, errors[tile]);
    } else if (out.format == WeightFormat::q4) {
      bad = pack_tile_with_feedback<Q4Rounding, Q4Block>(rows, importance, feedback, out, tile, at, errors[tile],
                                                         strips.get() + thread * strip_size);
    } else {
      bad = pack_tile_with_feedback<Q8Rounding, Q8Block>(rows, importance, feedback, out, tile, at, errors[tile],
                                                         strips.get() + thread * strip_size);
    }
    if (bad >= 0) bad_row = bad;
  });
  return bad_row;
}

// Inputs 64·group … of half a tile's outputs.
void read_packed(const Matrix& matrix, int64_t tile, int64_t group, int half, float (&out)[kGroup][kLanesPerHalf]) {
  const uint8_t* at = matrix.data + tile * matrix.tile_bytes();
  const auto times_scales = [&](const uint16_t* scales) {
    const F32x16 scale = F32x16::load_f16(scales + half * kLanesPerHalf);
    for (int k = 0; k < kGroup; ++k) (F32x16::load(out[k]) * scale).store(out[k]);
  };
  switch (matrix.format) {
    case WeightFormat::q4: {
      const auto& block = reinterpret_cast<const Q4Block*>(at)[group];
      for (int k = 0; k < kGroup; ++k) {
        for (int i = 0; i < kLanesPerHalf; ++i) {
          const uint8_t byte = block.nibbles[half][k / 8][4 * i + k % 4];
          out[k][i] = kQ4Codebook[k % 8 < 4 ? byte & 15 : byte >> 4];
        }
      }
      times_scales(block.scales);
      break;
    }
    case WeightFormat::q8: {
      const auto& block = reinterpret_cast<const Q8Block*>(at)[group];
      for (int k = 0; k < kGroup; ++k) {
        for (int i = 0; i < kLanesPerHalf; ++i) out[k][i] = block.values[half][k / 4][4 * i + k % 4];
      }
      times_scales(block.scales);
      break;
    }
    case WeightFormat::bfloat16: {
      const auto* tile_start = reinterpret_cast<const uint16_t*>(at) + group * kGroup * kTile;
      for (int k = 0; k < kGroup; ++k) {
        const uint16_t* pairs = tile_start + (k / 2 * 2 + half) * kLanesPerHalf * 2 + k % 2;
        for (int i = 0; i < kLanesPerHalf; ++i) out[k][i] = float_from_bits(static_cast<uint32_t>(pairs[2 * i]) << 16);
      }
      break;
    }
    case WeightFormat::float32: {
      const float* values = reinterpret_cast<const float*>(at) + group * kGroup * kTile + half * kLanesPerHalf;
      for (int k = 0; k < kGroup; ++k) F32x16::load(values + k * kTile).store(out[k]);
      break;
    }
  }
}

void unpack(ThreadPool& pool, const Matrix& matrix, float* out) {
  pool.parallel_for(matrix.num_tiles(), [&](int64_t tile, int) {
    alignas(64) float weights[kGroup][kLanesPerHalf];
    for (int64_t group = 0; group < matrix.num_groups(); ++group) {
      const int64_t first_input = group * kGroup, left = matrix.inputs - first_input;
      for (int half = 0; half < 2; ++half) {
        read_packed(matrix, tile, group, half, weights);
        for (int lane = 0; lane < kLanesPerHalf; ++lane) {
          const int64_t output = tile * kTile + half * kLanesPerHalf + lane;
          if (output >= matrix.outputs) break;
          float* row = out + output * matrix.inputs + first_input;
          for (int k = 0; k < (left < kGroup ? left : kGroup); ++k) row[k] = weights[k][lane];
        }
      }
    }
  });
}

}  // namespace

const PackingKernels& packing_kernels() {
  static constexpr PackingKernels kernels{.pack = pack, .unpack = unpack};
  return kernels;
}

}  // namespace gemma2::GEMMA2_ISA
