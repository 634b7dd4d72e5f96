// A paged cache of keys and values: blocks of 64 tokens, in the layout that attention reads.
//
// Memory: for each key/value head the keys of all blocks, then the values of all blocks. So a text whose blocks follow
// each other, as those of one long text do, is read as two sequential streams, at up to twice the rate of scattered
// pieces (docs/performance.md).
//
// The unit of every layout is a dword of `pack` values (float32 1, bfloat16 2, int8 4), and a vector of 16 dwords:
//
//   keys of a block    [head_dim / pack][64 tokens][pack]                 tokens are the lanes: no horizontal sums
//   values of a block  [head_dim / 64][64 tokens / pack][64 dims][pack]   dims are the lanes
//
// head_dim is rounded up to whole dwords (keys) and to 16 (values: the last 64 dims may be 16, 32 or 48). In int8 a block
// of either ends with 64 float32, the scales of its tokens: x = scale · byte, scale = max |x| / 127, or NaN where an x is
// NaN or infinite. All parts are multiples of 64 bytes.
//
// What is not written: attention gives keys that a query must not see weight 0 whatever their scores are, but 0 times a
// value must be 0. So `append_kv` zeroes the values of a block when it writes the block's first token, and any other
// block with room must be a copy of such a block (`copy_block`).
#pragma once

#include <cstdint>
#include <vector>

#include "activations.h"

namespace gemma2 {

constexpr int kBlockTokens = 64;
constexpr int kBlockTiles = kBlockTokens / 16;
constexpr int kVectorBytes = 64;
constexpr int kGroupTiles = 4;
constexpr int kKeyStepBytes = kBlockTiles * kVectorBytes;
constexpr int kMaxHeadDim = 1024;  // int32 sums of products of bytes and 15-bit numbers hold so many

enum class CacheType { float32, bfloat16, int8 };

// Values in a dword.
constexpr int pack_of(CacheType type) { return type == CacheType::float32 ? 1 : type == CacheType::bfloat16 ? 2 : 4; }

struct CacheLayout {
  CacheType type;
  int64_t kv_heads, head_dim;

  int pack() const { return pack_of(type); }
  int64_t scale_bytes() const { return type == CacheType::int8 ? kBlockTokens * int64_t{sizeof(float)} : 0; }

  int64_t key_steps() const { return (head_dim + pack() - 1) / pack(); }
  int64_t key_scales_at() const { return key_steps() * kKeyStepBytes; }
  int64_t key_bytes() const { return key_scales_at() + scale_bytes(); }  // of a block and head

  int64_t dim_tiles() const { return (head_dim + 15) / 16; }
  // Of the dims that lie beside those of a tile of 16, in tiles.
  int64_t value_group_tiles(int64_t tile) const {
    const int64_t left = dim_tiles() - tile / kGroupTiles * kGroupTiles;
    return left < kGroupTiles ? left : kGroupTiles;
  }
  int64_t value_step_bytes(int64_t tile) const { return value_group_tiles(tile) * kVectorBytes; }
  int64_t value_tile_at(int64_t tile) const {
    return tile / kGroupTiles * kGroupTiles * value_tile_bytes() + tile % kGroupTiles * kVectorBytes;
  }
  int64_t value_tile_bytes() const { return kBlockTokens / pack() * kVectorBytes; }
  int64_t value_scales_at() const { return dim_tiles() * value_tile_bytes(); }
  int64_t value_bytes() const { return value_scales_at() + scale_bytes(); }

  int64_t block_bytes() const { return kv_heads * (key_bytes() + value_bytes()); }
};

struct KVCache {
  CacheLayout layout;
  int64_t num_blocks;
  uint8_t* memory;  // not owned; num_blocks · block_bytes

  uint8_t* keys(int64_t block, int64_t kv_head) const {
    return memory + kv_head * num_blocks * (layout.key_bytes() + layout.value_bytes()) + block * layout.key_bytes();
  }
  uint8_t* values(int64_t block, int64_t kv_head) const {
    return keys(num_blocks, kv_head) + block * layout.value_bytes();
  }
  void copy_block(int64_t source, int64_t destination) const;
  // Writes the block's tokens of one head as float32 [64][head_dim].
  void unpack_keys(int64_t block, int64_t kv_head, float* out) const;
  void unpack_values(int64_t block, int64_t kv_head, float* out) const;
};

// The sequences of one forward pass. Rows row_starts[i] … row_starts[i + 1] - 1 are tokens of sequence i at the
// positions positions[i], positions[i] + 1, …; the token at position p is in block block_table(i)[p / 64].
struct BatchTable {
  std::vector<int32_t> row_starts, positions, block_tables;
  int64_t max_blocks = 0;  // distance of rows in block_tables

  int64_t num_sequences() const { return static_cast<int64_t>(positions.size()); }
  int64_t num_rows() const { return row_starts.back(); }
  int64_t num_tokens(int64_t sequence) const { return row_starts[sequence + 1] - row_starts[sequence]; }
  const int32_t* block_table(int64_t sequence) const { return block_tables.data() + sequence * max_blocks; }
};

}  // namespace gemma2
