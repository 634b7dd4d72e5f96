// The inner kernel of isa/quantized_matmul.cpp: some rows of activations times some vectors of 16 outputs.
//
// All accumulators stay in registers: per row and vector one of int32 for the group at hand and one of float32 for the
// sum over the groups. Weights come from a source, which unpacks them on the way or has them unpacked already:
//
//   Unpacked                                                          the type of weights; see dot.h
//   void prefetch(group)                                              asks for what is read some groups later
//   void weights(group, step, v, Unpacked& first, Unpacked& second)   inputs 8·step … + 3 and 8·step + 4 … + 7
//   I32x16 start(group, v, sum)                                       what a group's accumulators start from
//   F32x16 scales(group, v)
#pragma once

#include "activations.h"
#include "dot.h"
#include "matrix.h"
#include "simd.h"

namespace gemma2::GEMMA2_ISA {

constexpr int kStepsPerGroup = 8;  // a step is 8 inputs: what 64 bytes of nibbles hold for 16 outputs
constexpr int kWeightsBytes = 64;  // of a `Weights` in memory

// Hardware prefetchers end at a page and start anew in the next: alone they leave half of the bandwidth unused. Twice
// what arrives within a memory latency of 150 ns at 15 GB/s a thread, into the second-level cache.
constexpr int64_t kPrefetchBytes = 4096;

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

// A tile as it is packed; the vectors are its halves from `half` on.
template <class Format>
struct PackedTile {
  using Unpacked = Weights;
  const typename Format::Block* blocks;
  int half;
  bool from_memory;  // read for the first time
  [[gnu::always_inline]] void prefetch(int64_t group) const {
    if (from_memory) prefetch_ahead(blocks + group);
  }
  void weights(int64_t group, int step, int v, Weights& first, Weights& second) const {
    Format::unpack(blocks[group], half + v, step, first, second);
  }
  I32x16 start(int64_t, int, int32_t sum) const { return dot_start(sum); }
  F32x16 scales(int64_t group, int v) const {
    return F32x16::load_f16(blocks[group].scales + (half + v) * kLanesPerHalf);
  }
};

// Several tiles side by side, each a stream of its own for the hardware's prefetchers; the vectors are their halves.
template <class Format, int num_tiles>
struct PackedTiles {
  using Unpacked = Weights;
  const typename Format::Block* blocks;
  int64_t num_groups;  // from one tile to the next
  [[gnu::always_inline]] void prefetch(int64_t group) const {
#pragma GCC unroll kUnroll
    for (int tile = 0; tile < num_tiles; ++tile) prefetch_ahead(blocks + tile * num_groups + group);
  }
  void weights(int64_t group, int step, int v, Weights& first, Weights& second) const {
    Format::unpack(blocks[v / 2 * num_groups + group], v % 2, step, first, second);
  }
  I32x16 start(int64_t, int, int32_t sum) const { return dot_start(sum); }
  F32x16 scales(int64_t group, int v) const {
    return F32x16::load_f16(blocks[v / 2 * num_groups + group].scales + v % 2 * kLanesPerHalf);
  }
};

// A tile unpacked for many rows: per group the weights in the order in which they are needed, and what belongs to them.
struct UnpackedTile {
  using Unpacked = UnpackedWeights;
  struct Group {
    int8_t weights[kStepsPerGroup][2][2][kWeightsBytes];  // [step][first, second][half]
    float scales[2][kLanesPerHalf];
    int32_t corrections[2][kLanesPerHalf];
  };

  Group* groups;
  int half;

  void prefetch(int64_t) const {}
  void weights(int64_t group, int step, int v, UnpackedWeights& first, UnpackedWeights& second) const {
    first = load_unpacked(groups[group].weights[step][0][half + v]);
    second = load_unpacked(groups[group].weights[step][1][half + v]);
  }
  I32x16 start(int64_t group, int v, int32_t sum) const {
    return unpacked_start(sum, groups[group].corrections[half + v]);
  }
  F32x16 scales(int64_t group, int v) const { return F32x16::load(groups[group].scales[half + v]); }
};

template <class Format>
void unpack_group(const typename Format::Block& block, UnpackedTile::Group& group) {
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

// out[r][16·v + i], r < num_rows, v < num_vectors, for the rows of x from `row` on. num_outputs of the columns exist.
template <int num_rows, int num_vectors, class Source>
[[gnu::noinline]] void multiply_rows(const Activations& x, int64_t row, const Source source, float* out, int64_t stride,
                                     int num_outputs) {
  const int64_t num_groups = x.num_groups, width = x.padded_width;
  const int8_t* values = x.int8.get() + row * width;
  const float* scales = x.scales.get() + row * num_groups;
  const int32_t* totals = x.sums.get() + row * num_groups;
  F32x16 sums[num_rows][num_vectors];
#pragma GCC unroll kUnroll
  for (int r = 0; r < num_rows; ++r) {
#pragma GCC unroll kUnroll
    for (int v = 0; v < num_vectors; ++v) sums[r][v] = F32x16::zero();
  }
  for (int64_t group = 0; group < num_groups; ++group) {
    // Lines of the output are fetched while there is still time until they are written.
    constexpr int64_t kGroupsAhead = 16;
    const int64_t next = group - (num_groups - kGroupsAhead);
    if (next >= 0 && next < num_rows) {
      for (int v = 0; v < num_vectors; ++v) __builtin_prefetch(out + next * stride + v * kLanesPerHalf, 1);
    }
    source.prefetch(group);
    I32x16 dots[num_rows][num_vectors];
#pragma GCC unroll kUnroll
    for (int r = 0; r < num_rows; ++r) {
      const int32_t sum = totals[r * num_groups + group];
#pragma GCC unroll kUnroll
      for (int v = 0; v < num_vectors; ++v) dots[r][v] = source.start(group, v, sum);
    }
#pragma GCC unroll kUnrollSteps
    for (int step = 0; step < kStepsPerGroup; ++step) {
      typename Source::Unpacked first[num_vectors], second[num_vectors];
#pragma GCC unroll kUnroll
      for (int v = 0; v < num_vectors; ++v) source.weights(group, step, v, first[v], second[v]);
      const int8_t* inputs = values + group * kGroup + step * 8;
#pragma GCC unroll kUnroll
      for (int r = 0; r < num_rows; ++r) dot4(dots[r], first, inputs + r * width);
#pragma GCC unroll kUnroll
      for (int r = 0; r < num_rows; ++r) dot4(dots[r], second, inputs + r * width + 4);
    }
#pragma GCC unroll kUnroll
    for (int r = 0; r < num_rows; ++r) {
      const F32x16 scale = F32x16::broadcast(scales[r * num_groups + group]);
#pragma GCC unroll kUnroll
      for (int v = 0; v < num_vectors; ++v) {
        sums[r][v] = fma(to_f32(dots[r][v]), scale * source.scales(group, v), sums[r][v]);
      }
    }
  }
  if (num_outputs >= num_vectors * kLanesPerHalf) {
#pragma GCC unroll kUnroll
    for (int r = 0; r < num_rows; ++r) {
#pragma GCC unroll kUnroll
      for (int v = 0; v < num_vectors; ++v) sums[r][v].store(out + r * stride + v * kLanesPerHalf);
    }
    return;
  }
#pragma GCC unroll kUnroll
  for (int r = 0; r < num_rows; ++r) {
#pragma GCC unroll kUnroll
    for (int v = 0; v < num_vectors; ++v) {
      const int n = num_outputs - v * kLanesPerHalf;
      if (n > 0) sums[r][v].store_partial(out + r * stride + v * kLanesPerHalf, n);
    }
  }
}

}  // namespace gemma2::GEMMA2_ISA
