// The inner kernels of isa/quantized_matmul.cpp: some rows of activations times some tiles of weights, all accumulators
// in registers as far as there are any: of int32 for the group at hand, of float32 for the sum over the groups.
//
//   multiply_packed    few rows: weights are unpacked on the way to their products
//   multiply_unpacked  many rows: weights were unpacked before
#pragma once

#include "activations.h"
#include "dot.h"
#include "matrix.h"
#include "simd.h"

namespace gemma2::GEMMA2_ISA {

constexpr int kStepsPerGroup = 8;  // a step is 8 inputs: what 64 bytes of nibbles hold for 16 outputs
constexpr int kWeightsBytes = 64;  // of a `Weights` in memory

// For weights that are read along one stream: hardware prefetchers end at a page and start anew in the next, and alone
// leave half of the bandwidth unused. Twice what arrives within a memory latency of 150 ns at 30 GB/s a thread, into the
// second-level cache.
constexpr int64_t kPrefetchBytes = 8192;

// always_inline: GCC takes a function that does nothing but prefetch for one without effect, and drops the call.
template <class Block>
[[gnu::always_inline]] inline void prefetch_ahead(const Block* block) {
  const char* p = reinterpret_cast<const char*>(block) + kPrefetchBytes;
  for (size_t i = 0; i < sizeof(Block); i += 64) __builtin_prefetch(p + i, 0, 2);
}

struct Q4 {
  using Block = Q4Block;
  static void unpack(const Block& block, int half, int step, Weights& first, Weights& second) {
    unpack_q4(block.nibbles[half][step], first, second);
  }
};
struct Q8 {
  using Block = Q8Block;
  static void unpack(const Block& block, int half, int step, Weights& first, Weights& second) {
    first = load_q8(block.values[half][2 * step]);
    second = load_q8(block.values[half][2 * step + 1]);
  }
};

// The scales, values and sums of some rows of activations.
struct Rows {
  Rows(const Activations& x, int64_t row)
      : num_groups(x.num_groups),
        width(x.padded_width),
        values_(x.int8.get() + row * x.padded_width),
        scales_(x.scales.get() + row * x.num_groups),
        sums_(x.sums.get() + row * x.num_groups) {}

  const int64_t num_groups, width;
  const int8_t* values(int r, int64_t group, int step) const { return values_ + r * width + group * kGroup + step * 8; }
  F32x16 scale(int r, int64_t group) const { return F32x16::broadcast(scales_[r * num_groups + group]); }
  int32_t sum(int r, int64_t group) const { return sums_[r * num_groups + group]; }

 private:
  const int8_t* const values_;
  const float* const scales_;
  const int32_t* const sums_;
};

inline void store_outputs(const F32x16& y, float* out, int num_outputs) {
  if (num_outputs >= kLanesPerHalf) {
    y.store(out);
  } else if (num_outputs > 0) {
    y.store_partial(out, num_outputs);
  }
}

// Packed tiles that are read side by side.
template <class Format>
struct PackedTiles {
  const typename Format::Block* blocks;  // of the first
  int64_t distance;                      // from one to the next, in blocks
  int half;                              // where only one half is multiplied: which
  bool prefetch;
};

// out[r][t · 32 · tile distance + 16 · h + i] for the rows r of x from `row` on, tiles t and halves h.
//
// Each tile is read strictly in the order of memory: one half, the other, then the scales of both. Together with
// several tiles side by side, line by line, this is what hardware prefetchers follow best: the speed of plain reads.
// Both halves side by side in one tile reached 0.7 of it, and scales read after each half 0.8.
template <class Format, int num_rows, int num_tiles, int num_halves>
[[gnu::noinline]] void multiply_packed(const Activations& x, int64_t row, const PackedTiles<Format> tiles, float* out,
                                       int64_t stride, int num_outputs) {
  const Rows rows(x, row);
  F32x16 sums[num_halves][num_tiles][num_rows];
#pragma GCC unroll kUnroll
  for (int h = 0; h < num_halves; ++h) {
#pragma GCC unroll kUnroll
    for (int t = 0; t < num_tiles; ++t) {
#pragma GCC unroll kUnroll
      for (int r = 0; r < num_rows; ++r) sums[h][t][r] = F32x16::zero();
    }
  }
  const int first_half = num_halves == 2 ? 0 : tiles.half;
  for (int64_t group = 0; group < rows.num_groups; ++group) {
    const auto* blocks = tiles.blocks + group;
    if (tiles.prefetch) prefetch_ahead(blocks);
    I32x16 dots[num_halves][num_tiles][num_rows];
#pragma GCC unroll kUnroll
    for (int r = 0; r < num_rows; ++r) {
      const I32x16 start = dot_start(rows.sum(r, group));
#pragma GCC unroll kUnroll
      for (int h = 0; h < num_halves; ++h) {
#pragma GCC unroll kUnroll
        for (int t = 0; t < num_tiles; ++t) dots[h][t][r] = start;
      }
    }
#pragma GCC unroll kUnroll
    for (int h = 0; h < num_halves; ++h) {
#pragma GCC unroll kUnrollSteps
      for (int step = 0; step < kStepsPerGroup; ++step) {
#pragma GCC unroll kUnroll
        for (int t = 0; t < num_tiles; ++t) {
          Weights first, second;
          Format::unpack(blocks[t * tiles.distance], first_half + h, step, first, second);
#pragma GCC unroll kUnroll
          for (int r = 0; r < num_rows; ++r) dot4(dots[h][t][r], first, rows.values(r, group, step));
#pragma GCC unroll kUnroll
          for (int r = 0; r < num_rows; ++r) dot4(dots[h][t][r], second, rows.values(r, group, step) + 4);
        }
      }
    }
#pragma GCC unroll kUnroll
    for (int t = 0; t < num_tiles; ++t) {
#pragma GCC unroll kUnroll
      for (int h = 0; h < num_halves; ++h) {
        const F32x16 scale = F32x16::load_f16(blocks[t * tiles.distance].scales + (first_half + h) * kLanesPerHalf);
#pragma GCC unroll kUnroll
        for (int r = 0; r < num_rows; ++r) {
          sums[h][t][r] = fma(to_f32(dots[h][t][r]), rows.scale(r, group) * scale, sums[h][t][r]);
        }
      }
    }
  }
  const int64_t tile_outputs = tiles.distance / rows.num_groups * kTile;
#pragma GCC unroll kUnroll
  for (int t = 0; t < num_tiles; ++t) {
#pragma GCC unroll kUnroll
    for (int r = 0; r < num_rows; ++r) {
#pragma GCC unroll kUnroll
      for (int h = 0; h < num_halves; ++h) {
        store_outputs(sums[h][t][r], out + r * stride + t * tile_outputs + h * kLanesPerHalf,
                      num_outputs - h * kLanesPerHalf);
      }
    }
  }
}

// A group of a tile, unpacked: the weights in the order in which they are needed, and what belongs to them.
struct UnpackedGroup {
  int8_t weights[kStepsPerGroup][2][2][kWeightsBytes];  // [step][first, second][half]
  float scales[2][kLanesPerHalf];
  int32_t corrections[2][kLanesPerHalf];
};

template <class Format>
void unpack_group(const typename Format::Block& block, UnpackedGroup& group) {
  prefetch_ahead(&block);
  for (int half = 0; half < 2; ++half) {
    I32x16 correction = I32x16::zero();
    for (int step = 0; step < kStepsPerGroup; ++step) {
      Weights first, second;
      Format::unpack(block, half, step, first, second);
      store_weights(group.weights[step][0][half], first);
      store_weights(group.weights[step][1][half], second);
      add_correction(correction, first);
      add_correction(correction, second);
    }
    correction.store(group.corrections[half]);
    F32x16::load_f16(block.scales + half * kLanesPerHalf).store(group.scales[half]);
  }
}

// out[r][16·h + i] for the rows r of x from `row` on and the halves h of a tile from `half` on.
template <int num_rows, int num_halves>
[[gnu::noinline]] void multiply_unpacked(const Activations& x, int64_t row, const UnpackedGroup* groups, int half,
                                         float* out, int64_t stride, int num_outputs) {
  const Rows rows(x, row);
  F32x16 sums[num_rows][num_halves];
#pragma GCC unroll kUnroll
  for (int r = 0; r < num_rows; ++r) {
#pragma GCC unroll kUnroll
    for (int h = 0; h < num_halves; ++h) sums[r][h] = F32x16::zero();
  }
  for (int64_t group = 0; group < rows.num_groups; ++group) {
    const UnpackedGroup& g = groups[group];
    // Lines of the output are fetched while there is still time until they are written.
    constexpr int64_t kGroupsAhead = 16;
    const int64_t next = group - (rows.num_groups - kGroupsAhead);
    if (next >= 0 && next < num_rows) {
      for (int h = 0; h < num_halves; ++h) __builtin_prefetch(out + next * stride + h * kLanesPerHalf, 1);
    }
    I32x16 dots[num_rows][num_halves];
#pragma GCC unroll kUnroll
    for (int r = 0; r < num_rows; ++r) {
#pragma GCC unroll kUnroll
      for (int h = 0; h < num_halves; ++h) dots[r][h] = unpacked_start(rows.sum(r, group), g.corrections[half + h]);
    }
#pragma GCC unroll kUnrollSteps
    for (int step = 0; step < kStepsPerGroup; ++step) {
#pragma GCC unroll 2
      for (int part = 0; part < 2; ++part) {
        UnpackedWeights weights[num_halves];
#pragma GCC unroll kUnroll
        for (int h = 0; h < num_halves; ++h) weights[h] = load_unpacked(g.weights[step][part][half + h]);
#pragma GCC unroll kUnroll
        for (int r = 0; r < num_rows; ++r) dot4(dots[r], weights, rows.values(r, group, step) + 4 * part);
      }
    }
#pragma GCC unroll kUnroll
    for (int r = 0; r < num_rows; ++r) {
#pragma GCC unroll kUnroll
      for (int h = 0; h < num_halves; ++h) {
        const F32x16 scale = F32x16::load(g.scales[half + h]);
        sums[r][h] = fma(to_f32(dots[r][h]), rows.scale(r, group) * scale, sums[r][h]);
      }
    }
  }
#pragma GCC unroll kUnroll
  for (int r = 0; r < num_rows; ++r) {
#pragma GCC unroll kUnroll
    for (int h = 0; h < num_halves; ++h) {
      store_outputs(sums[r][h], out + r * stride + h * kLanesPerHalf, num_outputs - h * kLanesPerHalf);
    }
  }
}

}  // namespace gemma2::GEMMA2_ISA
