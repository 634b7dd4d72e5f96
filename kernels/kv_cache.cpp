#include "kv_cache.h"

#include <cstring>

namespace gemma2 {
namespace {

// The value `part` of a dword, unscaled.
float element(CacheType type, const uint8_t* dword, int64_t part) {
  float x = 0;
  switch (type) {
    case CacheType::float32: std::memcpy(&x, dword, sizeof x); break;
    case CacheType::bfloat16: std::memcpy(reinterpret_cast<uint8_t*>(&x) + 2, dword + 2 * part, 2); break;
    case CacheType::int8: x = static_cast<float>(dword[part] - 128); break;
  }
  return x;
}

float scale_of(const CacheLayout& layout, const uint8_t* head, int64_t index) {
  float scale = 1;
  if (layout.type == CacheType::int8) std::memcpy(&scale, head + layout.scales_at() + index * 4, sizeof scale);
  return scale;
}

}  // namespace

void KVCache::unpack_keys(int64_t block, int64_t kv_head, float* out) const {
  const int pack = layout.pack();
  const uint8_t* from = head(block, kv_head);
  for (int64_t token = 0; token < kBlockTokens; ++token) {
    const uint8_t* tile = from + token / 16 * layout.key_tile_bytes() + token % 16 * 4;
    for (int64_t d = 0; d < layout.head_dim; ++d) {
      out[token * layout.head_dim + d] =
          element(layout.type, tile + d / pack * kVectorBytes, d % pack) * scale_of(layout, from, token);
    }
  }
}

void KVCache::unpack_values(int64_t block, int64_t kv_head, float* out) const {
  const int pack = layout.pack();
  const uint8_t* from = head(block, kv_head);
  for (int64_t token = 0; token < kBlockTokens; ++token) {
    for (int64_t d = 0; d < layout.head_dim; ++d) {
      const uint8_t* tile = from + layout.values_at() + d / 16 * layout.value_tile_bytes();
      out[token * layout.head_dim + d] =
          element(layout.type, tile + token / pack * kVectorBytes + d % 16 * 4, token % pack) *
          scale_of(layout, from, kBlockTokens + token);
    }
  }
}

}  // namespace gemma2
