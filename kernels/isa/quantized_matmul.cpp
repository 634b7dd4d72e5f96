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

constexpr int64_t kRowsPerTask = 512;  // activations of so many rows stay in a cache while one tile follows another
constexpr int64_t kTasksPerThread = 8;
constexpr int64_t kShortestTask = 64;  // products of a block with a row, of 10 to 30 ns each

// How many tiles and how many halves of a tile so many rows are multiplied with at once.
constexpr int tiles_for(int num_rows) {
  int tiles = kMaxTiles;
  while (tiles > 1 && 2 * tiles * num_rows > kMaxSums) tiles /= 2;
  return tiles;
}
constexpr int halves_for(int num_rows) { return 2 * num_rows <= kMaxSums ? 2 : 1; }

template <class Format>
using MultiplyPacked = void (*)(const Activations&, int64_t row, PackedTiles<Format>, float* out, int64_t stride,
                                int num_outputs);

// multiply_packed for 1 … kMaxSums rows, with tiles side by side or alone.
template <class Format, bool side_by_side>
constexpr std::array<MultiplyPacked<Format>, kMaxSums> packed_kernels() {
  return []<size_t... n>(std::index_sequence<n...>) {
    return std::array<MultiplyPacked<Format>, kMaxSums>{
        multiply_packed<Format, n + 1, side_by_side ? tiles_for(n + 1) : 1, halves_for(n + 1)>...};
  }(std::make_index_sequence<kMaxSums>());
}

using MultiplyUnpacked = void (*)(const Activations&, int64_t row, const UnpackedGroup*, int half, float* out,
                                  int64_t stride, int num_outputs);

constexpr std::array<MultiplyUnpacked, kMaxRowsUnpacked> unpacked_kernels() {
  return []<size_t... n>(std::index_sequence<n...>) {
    return std::array<MultiplyUnpacked, kMaxRowsUnpacked>{multiply_unpacked<n + 1, kUnpackedHalves>...};
  }(std::make_index_sequence<kMaxRowsUnpacked>());
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

// Few rows times one tile, however few of its outputs there are.
template <class Format>
void multiply_tile(const Product& p, int64_t tile) {
  static constexpr auto kernels = packed_kernels<Format, false>();
  for_blocks(0, p.x.rows, kMaxSums, [&](int64_t row, int64_t n) {
    for (int half = 0; half < 2; half += halves_for(static_cast<int>(n))) {
      const PackedTiles<Format> tiles{p.blocks<Format>(tile), 0, half, row == 0 && half == 0};
      kernels[n - 1](p.x, row, tiles, p.at(row, tile, half), p.w.outputs, p.outputs_from(tile, half));
    }
  });
}

// Very few rows times several full tiles, `distance` tiles apart.
template <class Format>
void multiply_tiles(const Product& p, int64_t tile, int64_t distance) {
  static constexpr auto kernels = packed_kernels<Format, true>();
  const PackedTiles<Format> tiles{p.blocks<Format>(tile), distance * p.x.num_groups, 0, false};
  kernels[p.x.rows - 1](p.x, 0, tiles, p.at(0, tile, 0), p.w.outputs, kTile);
}

// Many rows: a tile is unpacked once and stays in the second-level cache while all rows pass by.
template <class Format>
void multiply_rows(const Product& p, int64_t tile, int64_t first, int64_t last) {
  static constexpr auto kernels = unpacked_kernels();
  thread_local AlignedArray<UnpackedGroup> groups;
  thread_local int64_t capacity = 0;
  const int64_t num_groups = p.x.num_groups;
  if (capacity < num_groups) {
    groups = aligned_zeros<UnpackedGroup>(num_groups);
    capacity = num_groups;
  }
  const auto* blocks = p.blocks<Format>(tile);
  for (int64_t group = 0; group < num_groups; ++group) unpack_group<Format>(blocks[group], groups[group]);
  for_blocks(first, last, kMaxRowsUnpacked, [&](int64_t row, int64_t n) {
    for (int half = 0; half < 2; half += kUnpackedHalves) {
      kernels[n - 1](p.x, row, groups.get(), half, p.at(row, tile, half), p.w.outputs, p.outputs_from(tile, half));
    }
  });
}

template <class Format>
void multiply_matrix(ThreadPool& pool, const Product& p) {
  const int64_t num_tiles = p.w.num_tiles(), num_rows = p.x.rows;
  const int64_t most_tasks = kTasksPerThread * pool.num_threads();
  if (num_rows >= kMinRowsToUnpack) {
    // With many threads, tiles alone are too few to share evenly.
    const int64_t wanted = std::min(num_rows / kMinRowsToUnpack, (most_tasks + num_tiles - 1) / num_tiles);
    const int64_t num_parts = std::max(wanted, (num_rows + kRowsPerTask - 1) / kRowsPerTask);
    pool.parallel_for(num_parts * num_tiles, [&](int64_t task, int) {
      const int64_t part = task / num_tiles, tile = task % num_tiles;
      multiply_rows<Format>(p, tile, num_rows * part / num_parts, num_rows * (part + 1) / num_parts);
    });
    return;
  }
  // The tiles side by side lie as far apart as the matrix is large, so that each stream goes on in the next task.
  const int side_by_side = num_rows <= kMaxSums ? tiles_for(static_cast<int>(num_rows)) : 1;
  const int64_t num_steps = p.w.outputs / kTile / side_by_side, rest = num_steps * side_by_side;
  // Several tasks a thread, so that who is held up leaves some to the others; none so short that handing it out shows.
  const int64_t even = (num_steps + most_tasks - 1) / most_tasks;
  const int64_t shortest = (kShortestTask - 1) / (p.x.num_groups * num_rows * side_by_side) + 1;
  const int64_t per_task = std::max(even, shortest), num_tasks = (num_steps + per_task - 1) / per_task;
  pool.parallel_for(num_tasks + (rest < num_tiles), [&](int64_t task, int) {
    if (task == num_tasks) {
      for (int64_t tile = rest; tile < num_tiles; ++tile) multiply_tile<Format>(p, tile);
      return;
    }
    const int64_t last = std::min((task + 1) * per_task, num_steps);
    for (int64_t tile = task * per_task; tile < last; ++tile) {
      if (side_by_side > 1) {
        multiply_tiles<Format>(p, tile, num_steps);
      } else {
        multiply_tile<Format>(p, tile);
      }
    }
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
