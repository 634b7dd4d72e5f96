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

#include <algorithm>
#include <array>
#include <utility>

#include "quantized_rows.h"

namespace gemma2::GEMMA2_ISA {
namespace {

constexpr int64_t kRowsPerTask = 512;

template <class Source>
using MultiplyRows = void (*)(const Activations&, int64_t row, Source, float* out, int64_t stride, int num_outputs);

// multiply_rows for 1 … max_rows rows.
template <int max_rows, int num_vectors, class Source>
constexpr std::array<MultiplyRows<Source>, max_rows> for_rows() {
  return []<size_t... n>(std::index_sequence<n...>) {
    return std::array<MultiplyRows<Source>, max_rows>{multiply_rows<n + 1, num_vectors, Source>...};
  }(std::make_index_sequence<max_rows>());
}

// Calls f(first, number) for consecutive blocks of at most max_rows rows, as equal as can be.
template <class F>
void for_blocks(int64_t first, int64_t last, int64_t max_rows, F&& f) {
  const int64_t num_blocks = (last - first + max_rows - 1) / max_rows;
  for (int64_t block = 0; block < num_blocks; ++block) {
    const int64_t number = (last - first + num_blocks - block - 1) / (num_blocks - block);
    f(first, number);
    first += number;
  }
}

struct Product {
  const Activations& x;
  const Matrix& w;
  float* out;

  template <class Format>
  const typename Format::Block* blocks(int64_t tile) const {
    return reinterpret_cast<const typename Format::Block*>(w.data + tile * w.tile_bytes());
  }
  // How many outputs there are from a half of a tile on; no more than 0 where it is all padding.
  int outputs_from(int64_t tile, int half) const {
    const int64_t left = w.outputs - tile * kTile - half * kLanesPerHalf;
    return static_cast<int>(left < kTile ? left : kTile);
  }
  float* at(int64_t row, int64_t tile, int half) const {
    return out + row * w.outputs + tile * kTile + half * kLanesPerHalf;
  }
};

// Few rows: weights are unpacked on the way to their products.
template <class Format>
void multiply_packed(const Product& p, int64_t tile) {
  using Source = PackedTile<Format>;
  static constexpr auto pairs = for_rows<kMaxRowsOfPair, 2, Source>();
  static constexpr auto ones = for_rows<kMaxRowsOfOne, 1, Source>();
  const auto* blocks = p.blocks<Format>(tile);
  if (p.x.rows <= kMaxRowsOfPair) {
    pairs[p.x.rows - 1](p.x, 0, {blocks, 0, true}, p.at(0, tile, 0), p.w.outputs, p.outputs_from(tile, 0));
    return;
  }
  for_blocks(0, p.x.rows, kMaxRowsOfOne, [&](int64_t row, int64_t n) {
    for (int half = 0; half < 2; ++half) {
      ones[n - 1](p.x, row, {blocks, half, row == 0 && half == 0}, p.at(row, tile, half), p.w.outputs, p.outputs_from(tile, half));
    }
  });
}

// Many rows: a tile is unpacked once and stays in the second-level cache while all rows pass by.
template <class Format>
void multiply_unpacked(const Product& p, int64_t tile, int64_t first, int64_t last) {
  static constexpr auto rows = for_rows<kMaxRowsUnpacked, kUnpackedVectors, UnpackedTile>();
  thread_local AlignedArray<UnpackedTile::Group> groups;
  thread_local int64_t capacity = 0;
  const int64_t num_groups = p.x.num_groups;
  if (capacity < num_groups) {
    groups = aligned_zeros<UnpackedTile::Group>(num_groups);
    capacity = num_groups;
  }
  const auto* blocks = p.blocks<Format>(tile);
  for (int64_t group = 0; group < num_groups; ++group) unpack_group<Format>(blocks[group], groups[group]);
  for_blocks(first, last, kMaxRowsUnpacked, [&](int64_t row, int64_t n) {
    for (int half = 0; half < 2; half += kUnpackedVectors) {
      rows[n - 1](p.x, row, {groups.get(), half}, p.at(row, tile, half), p.w.outputs, p.outputs_from(tile, half));
    }
  });
}

// One row: several tiles side by side, as far as they go; what is left, one by one.
template <class Format>
void multiply_one_row(const Product& p, int64_t tile, int64_t last) {
  if constexpr (kTilesOfOneRow > 1) {
    for (; tile + kTilesOfOneRow <= last; tile += kTilesOfOneRow) {
      const PackedTiles<Format, kTilesOfOneRow> source{p.blocks<Format>(tile), p.x.num_groups};
      multiply_rows<1, 2 * kTilesOfOneRow>(p.x, 0, source, p.at(0, tile, 0), p.w.outputs,
                                           static_cast<int>(std::min<int64_t>(p.w.outputs - tile * kTile, 1 << 20)));
    }
  }
  for (; tile < last; ++tile) multiply_packed<Format>(p, tile);
}

template <class Format>
void multiply_matrix(ThreadPool& pool, const Product& p) {
  const int64_t num_tiles = p.w.num_tiles(), num_rows = p.x.rows;
  if (num_rows < kMinRowsToUnpack) {
    const int64_t wanted = (num_tiles + 8 * pool.num_threads() - 1) / (8 * pool.num_threads());
    const int64_t per_task = round_up(wanted, num_rows == 1 ? kTilesOfOneRow : 1);
    pool.parallel_for((num_tiles + per_task - 1) / per_task, [&](int64_t task, int) {
      const int64_t first = task * per_task, last = std::min(num_tiles, first + per_task);
      if (num_rows == 1) return multiply_one_row<Format>(p, first, last);
      for (int64_t tile = first; tile < last; ++tile) multiply_packed<Format>(p, tile);
    });
    return;
  }
  const int64_t num_parts = (num_rows + kRowsPerTask - 1) / kRowsPerTask;
  pool.parallel_for(num_parts * num_tiles, [&](int64_t task, int) {
    const int64_t part = task / num_tiles, tile = task % num_tiles;
    multiply_unpacked<Format>(p, tile, num_rows * part / num_parts, num_rows * (part + 1) / num_parts);
  });
}

void multiply(ThreadPool& pool, const Activations& x, const Matrix& w, float* out) {
  if (x.rows == 0) return;
  if (w.format == WeightFormat::q4) {
    multiply_matrix<Q4>(pool, {x, w, out});
  } else {
    multiply_matrix<Q8>(pool, {x, w, out});
  }
}

}  // namespace

const QuantizedMatmulKernels& quantized_matmul_kernels() {
  static constexpr QuantizedMatmulKernels kernels{.multiply = multiply};
  return kernels;
}

}  // namespace gemma2::GEMMA2_ISA
