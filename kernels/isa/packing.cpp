// Packing of weights: which scale and which codes.
//
// A half block is 16 outputs × 64 inputs: 16 groups that each have a scale. It is turned so that a vector holds one
// input of all 16; every lane then searches the scale of its own group, and no sum goes across lanes.
//
// q8: values round(w / s), |value| <= 127. q4: the code whose codebook value is nearest to w / s. In both s is the best
// of some candidates: for each, the values are found, then s' = Σ i·w·v / Σ i·v², which minimizes Σ i·(w - s'·v)² for
// them (i: importance of the input), leaving Σ i·w² - (Σ i·w·v)² / Σ i·v². The best s' is rounded to IEEE half, and the
// codes are found anew for it.
//
// Sums run over the inputs in order, in float32: the result is the same bits everywhere.
#include "packing.h"

#include <atomic>

#include "simd.h"

namespace gemma2::GEMMA2_ISA {
namespace {

float from_bits(uint32_t bits) {
  float x;
  __builtin_memcpy(&x, &bits, sizeof x);
  return x;
}

uint32_t to_bits(float x) {
  uint32_t bits;
  __builtin_memcpy(&bits, &x, sizeof bits);
  return bits;
}

// To nearest even; beyond 65504 the largest half.
uint16_t float_to_half(float x) {
  const uint32_t bits = to_bits(x), sign = (bits >> 16) & 0x8000u, magnitude = bits & 0x7fffffffu;
  if (magnitude >= to_bits(65520.0f)) return static_cast<uint16_t>(sign | 0x7bffu);
  if (magnitude < to_bits(0x1p-14f)) {
    // Below 2^-14 a half counts units of 2^-24; adding 0.5, whose last bit is 2^-24, rounds to them.
    return static_cast<uint16_t>(sign | (to_bits(from_bits(magnitude) + 0.5f) - to_bits(0.5f)));
  }
  const uint32_t rounded = magnitude + 0xfffu + ((magnitude >> 13) & 1u);
  return static_cast<uint16_t>(sign | ((rounded - (112u << 23)) >> 13));
}

constexpr int kHalfBlock = kLanesPerHalf * kGroup;

// w[k] holds input k of the 16 outputs.
struct HalfBlock {
  alignas(64) float w[kGroup][kLanesPerHalf];
  alignas(64) float importance[kGroup];
  alignas(64) float scales[kLanesPerHalf];
  alignas(64) int8_t codes[kGroup][kLanesPerHalf];
};

// Reads 16 rows; what lies outside the matrix is 0. Returns the largest |w|, or NaN if one is not finite.
bool load_half_block(const WeightRows& rows, int64_t first_row, int64_t first_input, float largest, HalfBlock& out,
                     int64_t* bad_row) {
  const int64_t n = rows.inputs - first_input;
  const F32x16 limit = F32x16::broadcast(largest);
  for (int lane = 0; lane < kLanesPerHalf; ++lane) {
    const int64_t row = first_row + lane;
    alignas(64) float values[kGroup] = {};
    if (row < rows.outputs) {
      const int64_t at = row * rows.inputs + first_input;
      if (rows.float32 != nullptr) {
        __builtin_memcpy(values, rows.float32 + at, static_cast<size_t>(n < kGroup ? n : kGroup) * 4);
      } else if (n >= kGroup) {
        for (int k = 0; k < kGroup; k += 16) F32x16::load_bf16(rows.bfloat16 + at + k).store(values + k);
      } else {
        for (int k = 0; k < n; ++k) values[k] = from_bits(static_cast<uint32_t>(rows.bfloat16[at + k]) << 16);
      }
    }
    F32x16 most = F32x16::zero();
    for (int k = 0; k < kGroup; k += 16) {
      const F32x16 x = abs(F32x16::load(values + k));
      // NaN fails every comparison; as the first operand of max it would vanish.
      most = max(most, select(limit >= x, x, F32x16::broadcast(__builtin_inff())));
    }
    if (reduce_max(most) > largest) {
      *bad_row = row;
      return false;
    }
    for (int k = 0; k < kGroup; ++k) out.w[k][lane] = values[k];
  }
  return true;
}

// How q8 and q4 round w / s: to the value (float) and the code.
struct RoundQ8 {
  static F32x16 value(F32x16 x) {
    const F32x16 limit = F32x16::broadcast(127.0f);
    return to_f32(round_to_i32(min(max(x, F32x16::zero() - limit), limit)));
  }
  static I32x16 code(F32x16 x) { return round_to_i32(value(x)); }
  static constexpr int kCandidates = 9;
  // In units of max |w|: what is divided by it is the value that the largest weight gets.
  static float candidate(int i) { return 127.0f + 0.5f * static_cast<float>(i); }
  static constexpr bool kBothSigns = false;
};

struct RoundQ4 {
  static F32x16 value(F32x16 x) {
    F32x16 v = F32x16::broadcast(kQ4Codebook[0]);
    for (int i = 1; i < 16; ++i) {
      const F32x16 middle = F32x16::broadcast(0.5f * static_cast<float>(kQ4Codebook[i - 1] + kQ4Codebook[i]));
      v = select(x >= middle, F32x16::broadcast(kQ4Codebook[i]), v);
    }
    return v;
  }
  static I32x16 code(F32x16 x) {
    F32x16 v = F32x16::zero();
    for (int i = 1; i < 16; ++i) {
      const F32x16 middle = F32x16::broadcast(0.5f * static_cast<float>(kQ4Codebook[i - 1] + kQ4Codebook[i]));
      v = select(x >= middle, F32x16::broadcast(static_cast<float>(i)), v);
    }
    return round_to_i32(v);
  }
  static constexpr int kCandidates = 9;
  static float candidate(int i) { return 100.0f + 6.0f * static_cast<float>(i); }
  static constexpr bool kBothSigns = true;
};

template <class Round>
void search(HalfBlock& block) {
  F32x16 most = F32x16::zero();
  for (int k = 0; k < kGroup; ++k) most = max(most, abs(F32x16::load(block.w[k])));
  // A group of zeros keeps the scale 0.
  const F32x16 tiny = F32x16::broadcast(1e-30f);
  const F32x16 inverse = F32x16::broadcast(1.0f) / max(most, tiny);
  F32x16 best = F32x16::zero(), best_scale = F32x16::zero();
  for (int sign = 0; sign < (Round::kBothSigns ? 2 : 1); ++sign) {
    for (int i = 0; i < Round::kCandidates; ++i) {
      const F32x16 factor = inverse * F32x16::broadcast(sign == 0 ? Round::candidate(i) : -Round::candidate(i));
      F32x16 wv = F32x16::zero(), vv = F32x16::zero();
      for (int k = 0; k < kGroup; ++k) {
        const F32x16 w = F32x16::load(block.w[k]);
        const F32x16 v = Round::value(w * factor), iv = v * F32x16::broadcast(block.importance[k]);
        wv = fma(iv, w, wv);
        vv = fma(iv, v, vv);
      }
      const F32x16 scale = wv / max(vv, tiny), gain = wv * scale;
      best_scale = select(best < gain, scale, best_scale);
      best = max(gain, best);
    }
  }
  best_scale.store(block.scales);
  alignas(64) float inverses[kLanesPerHalf];
  for (int lane = 0; lane < kLanesPerHalf; ++lane) {
    const uint16_t half = float_to_half(block.scales[lane]);
    F32x16 widened = F32x16::zero();
    alignas(64) uint16_t halves[16] = {half};
    widened = F32x16::load_f16(halves);
    alignas(64) float wide[16];
    widened.store(wide);
    block.scales[lane] = wide[0];
    inverses[lane] = wide[0] != 0.0f ? 1.0f / wide[0] : 0.0f;
  }
  const F32x16 factor = F32x16::load(inverses);
  const Mask16 is_zero = F32x16::zero() >= abs(factor);
  for (int k = 0; k < kGroup; ++k) {
    // Where the scale is 0 all codes are 0.
    const F32x16 x = select(is_zero, F32x16::broadcast(Round::kBothSigns ? -1e30f : 0.0f),
                            F32x16::load(block.w[k]) * factor);
    Round::code(x).store_i8(block.codes[k]);
  }
}

void write(const HalfBlock& block, int half, Q8Block& out) {
  for (int j = 0; j < kGroup / 4; ++j) {
    for (int i = 0; i < kLanesPerHalf; ++i) {
      for (int b = 0; b < 4; ++b) out.values[half][j][4 * i + b] = block.codes[4 * j + b][i];
    }
  }
  for (int i = 0; i < kLanesPerHalf; ++i) out.scales[half * kLanesPerHalf + i] = float_to_half(block.scales[i]);
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
  for (int i = 0; i < kLanesPerHalf; ++i) out.scales[half * kLanesPerHalf + i] = float_to_half(block.scales[i]);
}

int64_t pack(ThreadPool& pool, const WeightRows& rows, const float* importance, const Matrix& out, uint8_t* data) {
  const float largest = out.format == WeightFormat::float32    ? kLargestFloat32
                        : out.format == WeightFormat::bfloat16 ? kLargestBfloat16
                                                               : kLargestQuantized;
  std::atomic<int64_t> bad_row{-1};
  pool.parallel_for(out.num_tiles(), [&](int64_t tile, int) {
    HalfBlock block;
    for (int64_t group = 0; group < out.num_groups(); ++group) {
      const int64_t first_input = group * kGroup;
      for (int k = 0; k < kGroup; ++k) {
        const bool inside = first_input + k < out.inputs;
        block.importance[k] = !inside ? 0.0f : importance == nullptr ? 1.0f : importance[first_input + k];
      }
      uint8_t* at = data + tile * out.tile_bytes();
      for (int half = 0; half < 2; ++half) {
        int64_t bad = 0;
        if (!load_half_block(rows, tile * kTile + half * kLanesPerHalf, first_input, largest, block, &bad)) {
          bad_row = bad;
          return;
        }
        switch (out.format) {
          case WeightFormat::q4:
            search<RoundQ4>(block);
            write(block, half, reinterpret_cast<Q4Block*>(at)[group]);
            break;
          case WeightFormat::q8:
            search<RoundQ8>(block);
            write(block, half, reinterpret_cast<Q8Block*>(at)[group]);
            break;
          case WeightFormat::bfloat16: {
            auto* pairs = reinterpret_cast<uint16_t*>(at);
            for (int k = 0; k < kGroup; ++k) {
              alignas(32) uint16_t rounded[kLanesPerHalf];
              F32x16::load(block.w[k]).store_bf16(rounded);
              const int64_t pair = (first_input + k) / 2;
              for (int i = 0; i < kLanesPerHalf; ++i) pairs[((pair * 2 + half) * kLanesPerHalf + i) * 2 + k % 2] = rounded[i];
            }
            break;
          }
          case WeightFormat::float32: {
            auto* values = reinterpret_cast<float*>(at);
            for (int k = 0; k < kGroup; ++k) {
              F32x16::load(block.w[k]).store(values + (first_input + k) * kTile + half * kLanesPerHalf);
            }
            break;
          }
        }
      }
    }
  });
  return bad_row;
}

float weight_at(const Matrix& matrix, int64_t output, int64_t input, const float* scales) {
  const int64_t tile = output / kTile, group = input / kGroup;
  const int lane = static_cast<int>(output % kTile), k = static_cast<int>(input % kGroup);
  const int half = lane / kLanesPerHalf, i = lane % kLanesPerHalf;
  const uint8_t* at = matrix.data + tile * matrix.tile_bytes();
  switch (matrix.format) {
    case WeightFormat::q4: {
      const auto& block = reinterpret_cast<const Q4Block*>(at)[group];
      const uint8_t byte = block.nibbles[half][k / 8][4 * i + k % 4];
      return static_cast<float>(kQ4Codebook[k % 8 < 4 ? byte & 15 : byte >> 4]) * scales[lane];
    }
    case WeightFormat::q8: {
      const auto& block = reinterpret_cast<const Q8Block*>(at)[group];
      return static_cast<float>(block.values[half][k / 4][4 * i + k % 4]) * scales[lane];
    }
    case WeightFormat::bfloat16: {
      const auto* pairs = reinterpret_cast<const uint16_t*>(at);
      return from_bits(static_cast<uint32_t>(pairs[((input / 2 * 2 + half) * kLanesPerHalf + i) * 2 + input % 2]) << 16);
    }
    case WeightFormat::float32: return reinterpret_cast<const float*>(at)[input * kTile + lane];
  }
  return 0.0f;
}

void unpack(ThreadPool& pool, const Matrix& matrix, float* out) {
  pool.parallel_for(matrix.num_tiles(), [&](int64_t tile, int) {
    alignas(64) float scales[kTile] = {};
    const int64_t last = (tile + 1) * kTile < matrix.outputs ? (tile + 1) * kTile : matrix.outputs;
    for (int64_t group = 0; group < matrix.num_groups(); ++group) {
      const uint16_t* halves = nullptr;
      const uint8_t* at = matrix.data + tile * matrix.tile_bytes();
      if (matrix.format == WeightFormat::q4) halves = reinterpret_cast<const Q4Block*>(at)[group].scales;
      if (matrix.format == WeightFormat::q8) halves = reinterpret_cast<const Q8Block*>(at)[group].scales;
      for (int i = 0; halves != nullptr && i < kTile; i += 16) F32x16::load_f16(halves + i).store(scales + i);
      const int64_t end = (group + 1) * kGroup < matrix.inputs ? (group + 1) * kGroup : matrix.inputs;
      for (int64_t output = tile * kTile; output < last; ++output) {
        for (int64_t input = group * kGroup; input < end; ++input) {
          out[output * matrix.inputs + input] = weight_at(matrix, output, input, scales);
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
