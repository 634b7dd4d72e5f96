// A paged cache of keys and values: blocks of 32 tokens, in the layout that attention reads.
//
// The unit of every layout is a dword of `pack` values (float32 1, bfloat16 2, int8 4), and a vector of 16 dwords. A
// block holds, for each key/value head, one after the other:
//
//   keys    [2 tiles of 16 tokens][head_dim / pack][16 tokens][pack]   16 tokens are the lanes: no horizontal sums
//   values  [head_dim / 16][32 tokens / pack][16 dims][pack]           16 dims are the lanes
//   scales  [2: keys, values][32 tokens] float32, int8 only: x = scale · (byte - 128), scale = max |x| / 127 of the
//           token and head
//
// head_dim is rounded up to whole dwords (keys) and to 16 (values). All parts are multiples of 64 bytes.
//
// What is not written: attention gives keys that a query must not see weight 0 whatever their scores are, but 0 times a
// value must be 0. So `append_kv` zeroes the values of a block when it writes the block's first token, and any other
// block with room must be a copy of such a block (`copy_block`).
#pragma once

#include <cstdint>
#include <vector>

#include "activations.h"

namespace gemma2 {

constexpr int kBlockTokens = 32;  // two tiles: small enough to waste little memory, 16 KiB a head in bfloat16 at 256
constexpr int kVectorBytes = 64;
constexpr int kMaxHeadDim = 1024;  // sums of int8 products up to this size are exact in float32

enum class CacheType { float32, bfloat16, int8 };

// Values in a dword.
constexpr int pack_of(CacheType type) { return type == CacheType::float32 ? 1 : type == CacheType::bfloat16 ? 2 : 4; }

struct CacheLayout {
  CacheType type;
  int64_t kv_heads, head_dim;

  int pack() const { return pack_of(type); }
  int64_t key_steps() const { return (head_dim + pack() - 1) / pack(); }
  int64_t key_tile_bytes() const { return key_steps() * kVectorBytes; }
  int64_t dim_tiles() const { return (head_dim + 15) / 16; }
  int64_t value_steps() const { return kBlockTokens / pack(); }
  int64_t value_tile_bytes() const { return value_steps() * kVectorBytes; }
  int64_t values_at() const { return kBlockTokens / 16 * key_tile_bytes(); }
  int64_t value_bytes() const { return dim_tiles() * value_tile_bytes(); }
  int64_t scales_at() const { return values_at() + value_bytes(); }
  int64_t head_bytes() const {
    return scales_at() + (type == CacheType::int8 ? 2 * kBlockTokens * static_cast<int64_t>(sizeof(float)) : 0);
  }
  int64_t block_bytes() const { return kv_heads * head_bytes(); }
};

struct KVCache {
  CacheLayout layout;
  int64_t num_blocks;
  uint8_t* memory;  // not owned; num_blocks · block_bytes

  uint8_t* head(int64_t block, int64_t kv_head) const {
    return memory + block * layout.block_bytes() + kv_head * layout.head_bytes();
  }
  // Writes the block's 32 tokens of one head as float32 [32][head_dim].
  void unpack_keys(int64_t block, int64_t kv_head, float* out) const;
  void unpack_values(int64_t block, int64_t kv_head, float* out) const;
};

// The sequences of one forward pass. Rows row_starts[i] … row_starts[i + 1] - 1 are tokens of sequence i at the
// positions positions[i], positions[i] + 1, …; the token at position p is in block block_table(i)[p / 32].
struct BatchTable {
  std::vector<int32_t> row_starts, positions, block_tables;
  int64_t max_blocks = 0;  // distance of rows in block_tables

  int64_t num_sequences() const { return static_cast<int64_t>(positions.size()); }
  int64_t num_rows() const { return row_starts.back(); }
  int64_t num_tokens(int64_t sequence) const { return row_starts[sequence + 1] - row_starts[sequence]; }
  const int32_t* block_table(int64_t sequence) const { return block_tables.data() + sequence * max_blocks; }
};

}  // namespace gemma2
