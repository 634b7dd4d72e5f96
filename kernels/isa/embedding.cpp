// Rows of a packed matrix as float32: out = scale · weight. The layouts: matrix.h.
//
// A weight of q4 or q8 is codebook value · scale of its block, exact in float32 (8 bits times 11), so that every value
// is rounded once, in the product with `scale`. An output's values lie 4 bytes in each line of 64 or 128, so a row reads
// one line for every few inputs: the next block is fetched ahead.
#include "elementwise.h"
#include "simd.h"
#include "work_split.h"

namespace gemma2::GEMMA2_ISA {
namespace {

constexpr int64_t kValuesPerTask = 8192;

float half_value(uint16_t half) {
  uint16_t halves[kLanes] = {half};
  float values[kLanes];
  F32x16::load_f16(halves).store(values);
  return values[0];
}

float bfloat16_value(uint16_t bits) {
  const uint32_t wide = static_cast<uint32_t>(bits) << 16;
  float value;
  __builtin_memcpy(&value, &wide, sizeof value);
  return value;
}

void prefetch(const void* start, int64_t size_bytes, int64_t stride_bytes) {
  for (int64_t at = 0; at < size_bytes; at += stride_bytes) {
    __builtin_prefetch(static_cast<const char*>(start) + at);
  }
}

// The 64 values of one group of a row.
void decode(const Q4Block& block, int output, float (&values)[kGroup]) {
  const float scale = half_value(block.scales[output]);
  const int half = output / kLanesPerHalf, first_byte = output % kLanesPerHalf * 4;
  for (int j = 0; j < 8; ++j) {
    const uint8_t* bytes = block.nibbles[half][j] + first_byte;
    for (int b = 0; b < 4; ++b) {
      values[8 * j + b] = static_cast<float>(kQ4Codebook[bytes[b] & 15]) * scale;
      values[8 * j + 4 + b] = static_cast<float>(kQ4Codebook[bytes[b] >> 4]) * scale;
    }
  }
}

void decode(const Q8Block& block, int output, float (&values)[kGroup]) {
  const float scale = half_value(block.scales[output]);
  const int half = output / kLanesPerHalf, first_byte = output % kLanesPerHalf * 4;
  for (int j = 0; j < 16; ++j) {
    for (int b = 0; b < 4; ++b) values[4 * j + b] = static_cast<float>(block.values[half][j][first_byte + b]) * scale;
  }
}

struct BFloat16Group {
  uint16_t pairs[kGroup / 2][2][kLanesPerHalf][2];
};
void decode(const BFloat16Group& group, int output, float (&values)[kGroup]) {
  for (int k = 0; k < kGroup; ++k) {
    values[k] = bfloat16_value(group.pairs[k / 2][output / kLanesPerHalf][output % kLanesPerHalf][k % 2]);
  }
}

struct Float32Group {
  float values[kGroup][kTile];
};
void decode(const Float32Group& group, int output, float (&values)[kGroup]) {
  for (int k = 0; k < kGroup; ++k) values[k] = group.values[k][output];
}

template <class Group>
void embed_row(const Matrix& matrix, int64_t id, F32x16 scale, float* out) {
  const auto* groups = reinterpret_cast<const Group*>(matrix.data + id / kTile * matrix.tile_bytes());
  const int output = static_cast<int>(id % kTile);
  const int64_t num_groups = matrix.num_groups();
  for (int64_t group = 0; group < num_groups; ++group) {
    if (group + 1 < num_groups) prefetch(groups + group + 1, sizeof(Group), 64);
    float values[kGroup];
    decode(groups[group], output, values);
    for (int i = 0; i < kGroup; i += kLanes) {
      const int64_t k = group * kGroup + i, left = matrix.inputs - k;
      if (left >= kLanes) {
        (F32x16::load(values + i) * scale).store(out + k);
      } else if (left > 0) {
        (F32x16::load(values + i) * scale).store_partial(out + k, static_cast<int>(left));
      }
    }
  }
}

void embed(ThreadPool& pool, const Matrix& matrix, const int32_t* ids, float scale, int64_t rows, float* out) {
  const F32x16 factor = F32x16::broadcast(scale);
  for_ranges(pool, rows, 1 + kValuesPerTask / matrix.inputs, [&](int64_t first, int64_t last) {
    for (int64_t row = first; row < last; ++row) {
      float* to = out + row * matrix.inputs;
      switch (matrix.format) {
        case WeightFormat::q4: embed_row<Q4Block>(matrix, ids[row], factor, to); break;
        case WeightFormat::q8: embed_row<Q8Block>(matrix, ids[row], factor, to); break;
        case WeightFormat::bfloat16: embed_row<BFloat16Group>(matrix, ids[row], factor, to); break;
        case WeightFormat::float32: embed_row<Float32Group>(matrix, ids[row], factor, to); break;
      }
    }
  });
}

}  // namespace

const EmbeddingKernels& embedding_kernels() {
  static constexpr EmbeddingKernels kernels{.embed = embed};
  return kernels;
}

}  // namespace gemma2::GEMMA2_ISA
