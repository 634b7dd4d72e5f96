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
void pack_token(const CacheLayout& layout, const float* x, uint32_t* dwords, uint8_t* scale_at) {
  if (layout.type == CacheType::int8) {
    const float scale = pack_row_int8(x, layout.head_dim, reinterpret_cast<int8_t*>(dwords));
    std::memcpy(scale_at, &scale, sizeof scale);
  } else {
    pack_row(layout.type, x, layout.head_dim, dwords);
  }
}

void write_key(const CacheLayout& layout, const float* key, int64_t slot, uint8_t* block, uint32_t* dwords) {
  pack_token(layout, key, dwords, block + layout.key_scales_at() + slot * 4);
  auto* to = reinterpret_cast<uint32_t*>(block) + slot;
  for (int64_t i = 0; i < layout.key_steps(); ++i) to[i * kBlockTokens] = dwords[i];
}

// Part `part` of 16 dwords.
template <class T>
void write_parts(const void* from, int64_t n, int64_t part, uint8_t* dwords) {
  constexpr int pack = 4 / sizeof(T);
  for (int64_t d = 0; d < n; ++d) {
    std::memcpy(dwords + (d * pack + part) * sizeof(T), static_cast<const uint8_t*>(from) + d * sizeof(T), sizeof(T));
  }
}

void write_value(const CacheLayout& layout, const float* value, int64_t slot, uint8_t* block, uint32_t* dwords) {
  pack_token(layout, value, dwords, block + layout.value_scales_at() + slot * 4);
  const int64_t pack = layout.pack(), part = slot % pack;
  for (int64_t tile = 0; tile < layout.dim_tiles(); ++tile) {
    const int64_t left = layout.head_dim - tile * 16, n = left < 16 ? left : 16;
    const auto* from = reinterpret_cast<const uint8_t*>(dwords) + tile * 64 / pack;
    uint8_t* to = block + layout.value_tile_at(tile) + slot / pack * layout.value_step_bytes(tile);
    switch (layout.type) {
      case CacheType::float32: write_parts<uint32_t>(from, n, part, to); break;
      case CacheType::bfloat16: write_parts<uint16_t>(from, n, part, to); break;
      case CacheType::int8: write_parts<uint8_t>(from, n, part, to); break;
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
      std::memset(cache.values(block, head), 0, static_cast<size_t>(layout.value_bytes()));
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
        write_key(layout, scratch.row, slot, cache.keys(block, head), scratch.dwords);
        write_value(layout, key + kv_heads * head_dim, slot, cache.values(block, head), scratch.dwords);
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
