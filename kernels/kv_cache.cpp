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
    case CacheType::int8: x = static_cast<float>(static_cast<int8_t>(dword[part])); break;
  }
  return x;
}

float scale_of(CacheType type, const uint8_t* scales, int64_t token) {
  float scale = 1;
  if (type == CacheType::int8) std::memcpy(&scale, scales + token * 4, sizeof scale);
  return scale;
}

}  // namespace

void KVCache::unpack_keys(int64_t block, int64_t kv_head, float* out) const {
  const int pack = layout.pack();
  const uint8_t* from = keys(block, kv_head);
  for (int64_t token = 0; token < kBlockTokens; ++token) {
    const float scale = scale_of(layout.type, from + layout.key_scales_at(), token);
    for (int64_t d = 0; d < layout.head_dim; ++d) {
      out[token * layout.head_dim + d] =
          element(layout.type, from + d / pack * kKeyStepBytes + token * 4, d % pack) * scale;
    }
  }
}

void KVCache::unpack_values(int64_t block, int64_t kv_head, float* out) const {
  const int pack = layout.pack();
  const uint8_t* from = values(block, kv_head);
  for (int64_t token = 0; token < kBlockTokens; ++token) {
    const float scale = scale_of(layout.type, from + layout.value_scales_at(), token);
    for (int64_t d = 0; d < layout.head_dim; ++d) {
      const uint8_t* step = from + layout.value_tile_at(d / 16) + token / pack * layout.value_step_bytes(d / 16);
      out[token * layout.head_dim + d] = element(layout.type, step + d % 16 * 4, token % pack) * scale;
    }
  }
}

void KVCache::copy_block(int64_t source, int64_t destination) const {
  if (source == destination) return;
  for (int64_t head = 0; head < layout.kv_heads; ++head) {
    std::memcpy(keys(destination, head), keys(source, head), static_cast<size_t>(layout.key_bytes()));
    std::memcpy(values(destination, head), values(source, head), static_cast<size_t>(layout.value_bytes()));
  }
}

}  // namespace gemma2
