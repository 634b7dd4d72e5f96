// y = x · Wᵀ with int8 activations and q4 or q8 weights.
//
// For each row and output, over the groups of 64 inputs in order, starting from y = 0:
//   dot = Σ x · weight             an exact integer
//   t   = scale of x · scale of W  rounded to float32
//   y   = dot · t + y              rounded once
// Every path does exactly this, so the result is the same bits on every instruction set, for any number of threads and
// whatever other rows are in the call.
//
// Layouts: activations.h, matrix.h. Padding (inputs up to 64, outputs up to 32) is read; padded outputs are not written.
#include "quantized_matmul.h"

#include <array>
#include <utility>

#include "dot.h"
#include "simd.h"

namespace gemma2::GEMMA2_ISA {
namespace {

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
constexpr int kSteps = 8;  // of 8 inputs in a group


// num_rows rows of x from `row` on times one tile.
template <class Format, int num_rows>
void multiply_tile(const Activations& x, int64_t row, const typename Format::Block* blocks, float* out, int64_t stride,
                   int num_outputs) {
  F32x16 sums[2][num_rows];
  for (auto& half : sums) {
    for (auto& sum : half) sum = F32x16::zero();
  }
  const int64_t num_groups = x.num_groups, width = x.padded_width;
  const int8_t* values = x.int8.get() + row * width;
  const float* scales = x.scales.get() + row * num_groups;
  const int32_t* totals = x.sums.get() + row * num_groups;
  for (int64_t group = 0; group < num_groups; ++group) {
#pragma GCC unroll kUnroll
    for (int half = 0; half < 2; ++half) {
      I32x16 dots[num_rows];
#pragma GCC unroll kUnroll
      for (int r = 0; r < num_rows; ++r) dots[r] = dot_start(totals[r * num_groups + group]);
#pragma GCC unroll kUnroll
      for (int step = 0; step < kSteps; ++step) {
        Weights first, second;
        Format::unpack(blocks[group], half, step, first, second);
#pragma GCC unroll kUnroll
        for (int r = 0; r < num_rows; ++r) dot4(dots[r], first, values + r * width + group * kGroup + step * 8);
#pragma GCC unroll kUnroll
        for (int r = 0; r < num_rows; ++r) dot4(dots[r], second, values + r * width + group * kGroup + step * 8 + 4);
      }
      const F32x16 scale = F32x16::load_f16(blocks[group].scales + half * kLanesPerHalf);
#pragma GCC unroll kUnroll
      for (int r = 0; r < num_rows; ++r) {
        sums[half][r] = fma(to_f32(dots[r]), F32x16::broadcast(scales[r * num_groups + group]) * scale, sums[half][r]);
      }
    }
  }
  for (int r = 0; r < num_rows; ++r) {
    for (int half = 0; half < 2; ++half) {
      const int n = num_outputs - half * kLanesPerHalf;
      if (n > 0) sums[half][r].store_partial(out + r * stride + half * kLanesPerHalf, n < 16 ? n : 16);
    }
  }
}

template <class Format>
void multiply_matrix(ThreadPool& pool, const Activations& x, const Matrix& w, float* out) {
  using Tile = void (*)(const Activations&, int64_t, const typename Format::Block*, float*, int64_t, int);
  static constexpr auto tiles = []<size_t... n>(std::index_sequence<n...>) {
    return std::array<Tile, kMaxRows>{multiply_tile<Format, n + 1>...};
  }(std::make_index_sequence<kMaxRows>());
  pool.parallel_for(w.num_tiles(), [&](int64_t tile, int) {
    const auto* blocks = reinterpret_cast<const typename Format::Block*>(w.data + tile * w.tile_bytes());
    const int64_t left = w.outputs - tile * kTile;
    for (int64_t row = 0; row < x.rows; row += kMaxRows) {
      const int64_t n = x.rows - row < kMaxRows ? x.rows - row : kMaxRows;
      tiles[n - 1](x, row, blocks, out + row * w.outputs + tile * kTile, w.outputs,
                   static_cast<int>(left < kTile ? left : kTile));
    }
  });
}

void multiply(ThreadPool& pool, const Activations& x, const Matrix& w, float* out) {
  if (w.format == WeightFormat::q4) {
    multiply_matrix<Q4>(pool, x, w, out);
  } else {
    multiply_matrix<Q8>(pool, x, w, out);
  }
}

}  // namespace

const QuantizedMatmulKernels& quantized_matmul_kernels() {
  static constexpr QuantizedMatmulKernels kernels{.multiply = multiply};
  return kernels;
}

}  // namespace gemma2::GEMMA2_ISA
