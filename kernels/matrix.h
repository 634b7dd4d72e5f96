// A weight matrix of a linear layer, packed in the layout that the matrix products read, in memory and in files alike.
//
// W is (outputs, inputs): y = x · Wᵀ. Outputs are cut into tiles of 32 (two halves of 16, the lanes of a vector),
// inputs into groups of 64. The tiles follow each other, within a tile the groups. Outputs are rounded up to 32 and
// inputs to 64; what was added is 0. In q4, added outputs are of code 0 and scale 0, and added inputs are of any code:
// activations are 0 there.
//
//   q4        Q4Block per tile and group: a weight is codebook[code] · scale; 4.25 bits per weight
//   q8        Q8Block per tile and group: a weight is value · scale, |value| <= 127; 8.25 bits per weight
//   bfloat16  uint16 [tile][inputs / 2][2 halves][16 outputs][2 inputs]
//   float32   float  [tile][inputs][32 outputs]
//
// Little-endian everywhere. All data starts at multiples of 64 bytes.
#pragma once

#include <cstdint>

#include "activations.h"

namespace gemma2 {

constexpr int kTile = 32;
constexpr int kLanesPerHalf = 16;

// 64 bytes hold 16 outputs × 4 consecutive inputs, the operand of a dot-product instruction, in their low nibbles and
// the next 4 inputs in their high ones: byte 4·i + b of nibbles[h][j] holds output 16·h + i of the tile, input 8·j + b
// (low) and input 8·j + 4 + b (high).
struct Q4Block {
  uint8_t nibbles[2][8][64];
  uint16_t scales[kTile];  // IEEE half
};
static_assert(sizeof(Q4Block) == 1088);

// Byte 4·i + b of values[h][j] holds output 16·h + i of the tile, input 4·j + b.
struct Q8Block {
  int8_t values[2][16][64];
  uint16_t scales[kTile];  // IEEE half
};
static_assert(sizeof(Q8Block) == 2112);

// The values of the 16 codes of q4, in units of a block's scale: those that round groups of 64 weights best when each
// group has its own scale of either sign (benchmarks/quantization_codebook.py finds them).
constexpr int8_t kQ4Codebook[16] = {-127, -94, -73, -56, -42, -30, -19, -8, 2, 12, 22, 33, 45, 60, 77, 100};

enum class WeightFormat { q4, q8, bfloat16, float32 };

struct Matrix {
  WeightFormat format;
  int64_t outputs, inputs;
  const uint8_t* data;  // not owned

  int64_t num_tiles() const { return round_up(outputs, kTile) / kTile; }
  int64_t num_groups() const { return round_up(inputs, kGroup) / kGroup; }
  int64_t tile_bytes() const {
    switch (format) {
      case WeightFormat::q4: return num_groups() * static_cast<int64_t>(sizeof(Q4Block));
      case WeightFormat::q8: return num_groups() * static_cast<int64_t>(sizeof(Q8Block));
      case WeightFormat::bfloat16: return num_groups() * kGroup * kTile * 2;
      case WeightFormat::float32: return num_groups() * kGroup * kTile * 4;
    }
    return 0;
  }
  int64_t size_bytes() const { return num_tiles() * tile_bytes(); }
  ActivationFormat activation_format() const {
    switch (format) {
      case WeightFormat::bfloat16: return ActivationFormat::bfloat16;
      case WeightFormat::float32: return ActivationFormat::float32;
      default: return ActivationFormat::int8;
    }
  }
};

}  // namespace gemma2
