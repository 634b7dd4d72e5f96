// Two sequences, prompts and then a token each, with and without a window and a cap, in every type of cache.
#include "attention.h"
#include "selftest.h"

namespace gemma2::selftest {
namespace {

constexpr int64_t kHeads = 6, kKvHeads = 2, kNumBlocks = 24, kMaxBlocks = 12;

std::string name_of(CacheType type) {
  return type == CacheType::int8 ? "int8" : type == CacheType::bfloat16 ? "bfloat16" : "float32";
}

// One forward pass: appends the rows' keys and values, attends, and hashes everything written.
void pass(Runtime& runtime, const AttentionShape& shape, const BatchTable& table, const KVCache& cache, Random& random,
          Hash& hash) {
  const AttentionKernels& kernels = attention_kernels(runtime.isa);
  const int64_t rows = table.num_rows(), head_dim = shape.layout.head_dim, width = kHeads * head_dim;
  const std::vector<float> qkv = random.normals(rows * (kHeads + 2 * kKvHeads) * head_dim, 2.0f);
  const std::vector<float> cos = random.normals(rows * head_dim / 2), sin = random.normals(rows * head_dim / 2);
  std::vector<float> queries(static_cast<size_t>(rows * width)), out(queries.size());
  const AppendArguments append{qkv.data(), cos.data(), sin.data(), 0.25f, queries.data()};
  kernels.append_kv(runtime.pool, shape, append, table, cache);
  hash.values(queries.data(), rows * width);
  for (const int64_t window : {0, 40}) {
    for (const float cap : {0.0f, 50.0f}) {
      kernels.attend(runtime.pool, shape, {queries.data(), window, cap, out.data()}, table, cache);
      hash.values(out.data(), rows * width);
    }
  }
}

void cache_cases(Runtime& runtime, CacheType type, int64_t head_dim) {
  Random random(static_cast<uint64_t>(head_dim));
  const AttentionShape shape{{type, kKvHeads, head_dim}, kHeads};
  const int64_t size = kNumBlocks * shape.layout.block_bytes();
  const AlignedArray<uint8_t> memory = aligned_zeros<uint8_t>(size);
  const KVCache cache{shape.layout, kNumBlocks, memory.get()};
  BatchTable table;
  table.max_blocks = kMaxBlocks;
  for (int32_t i = 0; i < 2 * kMaxBlocks; ++i) table.block_tables.push_back((i * 7 + 3) % kNumBlocks);
  Hash hash;
  table.row_starts = {0, 290, 360};  // the first sequence is longer than a span
  table.positions = {0, 0};
  pass(runtime, shape, table, cache, random, hash);
  table.row_starts = {0, 1, 2};
  table.positions = {290, 70};
  pass(runtime, shape, table, cache, random, hash);
  table.row_starts = {0, 3, 40};
  table.positions = {291, 71};
  pass(runtime, shape, table, cache, random, hash);
  print("attention " + name_of(type) + " " + std::to_string(head_dim), hash);
}

}  // namespace

void attention_cases(Runtime& runtime) {
  for (CacheType type : {CacheType::float32, CacheType::bfloat16, CacheType::int8}) {
    for (int64_t head_dim : {2, 18, 64}) cache_cases(runtime, type, head_dim);
  }
}

}  // namespace gemma2::selftest
