// Turning queries and keys by their position, and writing keys and values into the blocks of the cache.
//
// RoPE, half-split (Hugging Face's rotate_half): with x = (a, b) the halves of a head,
//   a' = a · cos - b · sin,  b' = b · cos + a · sin
// in float32, every product and sum rounded by itself as in modeling_gemma2.apply_rotary_pos_emb. Queries are then
// multiplied by query_scale. Keys are rounded to the cache's type once, after turning; values as they come.
#include <cstring>

#include "attention.h"
#include "attention_kernels.h"
#include "attention_rows.h"
#include "simd.h"

namespace gemma2::GEMMA2_ISA {
namespace {

void rotate(const float* x, const float* cos, const float* sin, float scale, int64_t half, float* out) {
  const F32x16 factor = F32x16::broadcast(scale);
  for (int64_t k = 0; k < half; k += 16) {
    const int n = static_cast<int>(half - k < 16 ? half - k : 16);
    const F32x16 a = F32x16::load_partial(x + k, n), b = F32x16::load_partial(x + half + k, n);
    const F32x16 c = F32x16::load_partial(cos + k, n), s = F32x16::load_partial(sin + k, n);
    ((a * c - b * s) * factor).store_partial(out + k, n);
    ((b * c + a * s) * factor).store_partial(out + half + k, n);
  }
}

// One token and head. `dwords` is room for a packed row.
void write_key(const CacheLayout& layout, const float* key, int64_t slot, uint8_t* head, uint32_t* dwords) {
  uint32_t flip = 0;
  if (layout.type == CacheType::int8) {
    const float scale = pack_row_int8(key, layout.head_dim, reinterpret_cast<int8_t*>(dwords));
    std::memcpy(head + layout.scales_at() + slot * 4, &scale, 4);
    flip = 0x80808080u;  // the cache holds bytes with 128 added
  } else {
    pack_row(layout.type, key, layout.head_dim, dwords);
  }
  auto* to = reinterpret_cast<uint32_t*>(head + slot / 16 * layout.key_tile_bytes()) + slot % 16;
  for (int64_t i = 0; i < layout.key_steps(); ++i) to[i * 16] = dwords[i] ^ flip;
}

void write_value(const CacheLayout& layout, const float* value, int64_t slot, uint8_t* head, uint32_t* dwords) {
  const int pack = layout.pack();
  if (layout.type == CacheType::int8) {
    const float scale = pack_row_int8(value, layout.head_dim, reinterpret_cast<int8_t*>(dwords));
    std::memcpy(head + layout.scales_at() + (kBlockTokens + slot) * 4, &scale, 4);
  } else {
    pack_row(layout.type, value, layout.head_dim, dwords);
  }
  uint8_t* vectors = head + layout.values_at() + slot / pack * kVectorBytes;
  const int64_t part = slot % pack;
  for (int64_t tile = 0; tile * 16 < layout.head_dim; ++tile) {
    const int64_t left = layout.head_dim - tile * 16, n = left < 16 ? left : 16;
    uint8_t* to = vectors + tile * layout.value_tile_bytes();
    switch (layout.type) {
      case CacheType::float32: std::memcpy(to, dwords + tile * 16, n * 4); break;
      case CacheType::bfloat16: {
        const auto* from = reinterpret_cast<const uint16_t*>(dwords) + tile * 16;
        for (int64_t d = 0; d < n; ++d) reinterpret_cast<uint16_t*>(to)[d * 2 + part] = from[d];
        break;
      }
      case CacheType::int8: {
        const auto* from = reinterpret_cast<const uint8_t*>(dwords) + tile * 16;
        for (int64_t d = 0; d < n; ++d) to[d * 4 + part] = from[d] ^ 0x80u;
        break;
      }
    }
  }
}

}  // namespace

void append_kv(ThreadPool& pool, const AttentionShape& shape, const AppendArguments& args, const BatchTable& table,
               const KVCache& cache) {
  const CacheLayout& layout = shape.layout;
  const int64_t head_dim = layout.head_dim, half = head_dim / 2, kv_heads = layout.kv_heads;
  AttentionPlan& plan = attention_scratch(shape).plan;
  plan_append(table, plan);
  const auto write_block = [&](int64_t index, int) {
    const AttentionTask& task = plan.tasks[static_cast<size_t>(index)];
    AttentionScratch& scratch = attention_scratch(shape);
    const int64_t block = table.block_table(task.sequence)[task.position / kBlockTokens];
    for (int64_t head = 0; head < kv_heads && task.position % kBlockTokens == 0; ++head) {
      std::memset(cache.head(block, head) + layout.values_at(), layout.type == CacheType::int8 ? 0x80 : 0,
                  static_cast<size_t>(layout.value_bytes()));
    }
    for (int64_t t = 0; t < task.num_tokens; ++t) {
      const int64_t row = task.first_row + t, slot = (task.position + t) % kBlockTokens;
      const float* heads = args.qkv + row * (shape.num_heads + 2 * kv_heads) * head_dim;
      const float *cos = args.cos + row * half, *sin = args.sin + row * half;
      float* queries = args.queries + row * shape.num_heads * head_dim;
      for (int64_t head = 0; head < shape.num_heads; ++head) {
        rotate(heads + head * head_dim, cos, sin, args.query_scale, half, queries + head * head_dim);
      }
      for (int64_t head = 0; head < kv_heads; ++head) {
        const float* key = heads + (shape.num_heads + head) * head_dim;
        rotate(key, cos, sin, 1.0f, half, scratch.row);
        write_key(layout, scratch.row, slot, cache.head(block, head), scratch.dwords);
        write_value(layout, key + kv_heads * head_dim, slot, cache.head(block, head), scratch.dwords);
      }
    }
  };
  const auto num_tasks = static_cast<int64_t>(plan.tasks.size());
  if (table.num_rows() * (shape.num_heads + 2 * kv_heads) * head_dim < kTinyAppend) {
    for (int64_t i = 0; i < num_tasks; ++i) write_block(i, 0);
  } else {
    pool.parallel_for(num_tasks, write_block);
  }
}

}  // namespace gemma2::GEMMA2_ISA
