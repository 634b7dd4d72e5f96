#include "../attention.h"

#include <algorithm>

#include "bindings.h"

namespace gemma2 {
namespace {

// Block ids are int32. With so many heads, the bytes of so many blocks are below 2⁶³.
constexpr int64_t kMaxBlocks = (int64_t{1} << 31) - 1, kMaxKVHeads = 4096;

CacheType cache_type(const std::string& name) {
  if (name == "float32") return CacheType::float32;
  if (name == "bfloat16") return CacheType::bfloat16;
  if (name == "int8") return CacheType::int8;
  throw std::invalid_argument("a KV cache must be float32, bfloat16 or int8, but is '" + name + "'");
}

const char* name_of(CacheType type) {
  return type == CacheType::int8 ? "int8" : type == CacheType::bfloat16 ? "bfloat16" : "float32";
}

CacheLayout make_layout(const std::string& dtype, int64_t kv_heads, int64_t head_dim) {
  require(kv_heads >= 1 && kv_heads <= kMaxKVHeads, "kv_heads must be from 1 to " + std::to_string(kMaxKVHeads) +
                                                        ", but is " + std::to_string(kv_heads));
  require(head_dim >= 2 && head_dim % 2 == 0 && head_dim <= kMaxHeadDim,
          "head_dim must be even and from 2 to " + std::to_string(kMaxHeadDim) + ", but is " +
              std::to_string(head_dim));
  return CacheLayout{cache_type(dtype), kv_heads, head_dim};
}

void require_block(const KVCache& cache, int64_t block) {
  require(block >= 0 && block < cache.num_blocks, "the block must be from 0 to " +
                                                      std::to_string(cache.num_blocks - 1) + ", but is " +
                                                      std::to_string(block));
}

nb::object unpacked(const KVCache& cache, int64_t block, int64_t kv_head, bool is_keys) {
  require_block(cache, block);
  require(kv_head >= 0 && kv_head < cache.layout.kv_heads, "there is no such head");
  auto* values = new float[static_cast<size_t>(kBlockTokens * cache.layout.head_dim)];
  nb::capsule owner(values, [](void* p) noexcept { delete[] static_cast<float*>(p); });
  is_keys ? cache.unpack_keys(block, kv_head, values) : cache.unpack_values(block, kv_head, values);
  return nb::cast(nb::ndarray<nb::numpy, float, nb::ndim<2>>(
      values, {static_cast<size_t>(kBlockTokens), static_cast<size_t>(cache.layout.head_dim)}, owner));
}

BatchTable make_table(Array<const int32_t, 1> row_starts, Array<const int32_t, 1> positions,
                      Array<const int32_t, 2> block_tables) {
  const size_t n = positions.shape(0);
  require_shape(row_starts, "row_starts", 0, static_cast<int64_t>(n) + 1);
  require_shape(block_tables, "block_tables", 0, static_cast<int64_t>(n));
  BatchTable table;
  table.max_blocks = static_cast<int64_t>(block_tables.shape(1));
  table.row_starts.assign(row_starts.data(), row_starts.data() + n + 1);
  table.positions.assign(positions.data(), positions.data() + n);
  table.block_tables.assign(block_tables.data(), block_tables.data() + block_tables.size());
  require(table.row_starts[0] == 0, "row_starts must begin with 0");
  for (size_t i = 0; i < n; ++i) {
    const std::string name = "sequence " + std::to_string(i);
    const int64_t num_tokens = int64_t{table.row_starts[i + 1]} - table.row_starts[i];
    require(num_tokens >= 0, name + ": row_starts must not fall");
    require(table.positions[i] >= 0, name + ": the position must not be negative");
    require(table.positions[i] + num_tokens <= table.max_blocks * kBlockTokens,
            name + ": positions up to " + std::to_string(table.positions[i] + num_tokens - 1) +
                " need more than the " + std::to_string(table.max_blocks) + " blocks of its table");
  }
  return table;
}

// Throws unless the blocks of these positions are blocks of the cache.
void require_blocks(const BatchTable& table, const KVCache& cache, int64_t sequence, int64_t first, int64_t last) {
  for (int64_t i = first / kBlockTokens; i <= last / kBlockTokens; ++i) {
    const int64_t block = table.block_table(sequence)[i];
    require(block >= 0 && block < cache.num_blocks,
            "sequence " + std::to_string(sequence) + " needs positions " + std::to_string(i * kBlockTokens) +
                " and on, but their block is " + std::to_string(block) + ", and the cache has blocks 0 to " +
                std::to_string(cache.num_blocks - 1));
  }
}

AttentionShape shape_for(const KVCache& cache, int64_t num_heads) {
  require(num_heads >= 1 && num_heads % cache.layout.kv_heads == 0,
          "the number of query heads must be a multiple of the " + std::to_string(cache.layout.kv_heads) +
              " key/value heads, but is " + std::to_string(num_heads));
  return AttentionShape{cache.layout, num_heads};
}

void append(Runtime& runtime, Array<const float, 2> qkv, Array<const float, 2> cos, Array<const float, 2> sin,
            const BatchTable& table, const KVCache& cache, float query_scale, Array<float, 2> queries) {
  const int64_t head_dim = cache.layout.head_dim, rows = table.num_rows();
  const auto width = static_cast<int64_t>(qkv.shape(1));
  require(width % head_dim == 0 && width / head_dim > 2 * cache.layout.kv_heads,
          "qkv: a row must hold query heads and " + std::to_string(cache.layout.kv_heads) +
              " heads each of keys and values, of " + std::to_string(head_dim) + " values, but holds " +
              std::to_string(width) + " values");
  const AttentionShape shape = shape_for(cache, width / head_dim - 2 * cache.layout.kv_heads);
  require_shape(qkv, "qkv", 0, rows);
  require_shape(cos, "cos", 0, rows);
  require_shape(cos, "cos", 1, head_dim / 2);
  require_shape(sin, "sin", 0, rows);
  require_shape(sin, "sin", 1, head_dim / 2);
  require_shape(queries, "queries", 0, rows);
  require_shape(queries, "queries", 1, shape.num_heads * head_dim);
  for (int64_t i = 0; i < table.num_sequences(); ++i) {
    if (table.num_tokens(i) > 0) {
      require_blocks(table, cache, i, table.positions[i], table.positions[i] + table.num_tokens(i) - 1);
    }
  }
  const AppendArguments arguments{qkv.data(), cos.data(), sin.data(), query_scale, queries.data()};
  nb::gil_scoped_release release;
  attention_kernels(runtime.isa).append_kv(runtime.pool, shape, arguments, table, cache);
}

void run_attention(Runtime& runtime, Array<const float, 2> queries, const BatchTable& table, const KVCache& cache,
                   int64_t window, float cap, Array<float, 2> out) {
  const int64_t head_dim = cache.layout.head_dim, rows = table.num_rows();
  const auto width = static_cast<int64_t>(queries.shape(1));
  require(width % head_dim == 0, "queries: a row must hold heads of " + std::to_string(head_dim) + " values, but holds " +
                                     std::to_string(width) + " values");
  const AttentionShape shape = shape_for(cache, width / head_dim);
  require_shape(queries, "queries", 0, rows);
  require_shape(out, "out", 0, rows);
  require_shape(out, "out", 1, width);
  require(window >= 0, "window must not be negative, but is " + std::to_string(window));
  require(cap >= 0, "cap must not be negative, but is " + std::to_string(cap));
  for (int64_t i = 0; i < table.num_sequences(); ++i) {
    if (table.num_tokens(i) > 0) {
      const int64_t first = window > 0 ? std::max<int64_t>(0, table.positions[i] - window + 1) : 0;
      require_blocks(table, cache, i, first, table.positions[i] + table.num_tokens(i) - 1);
    }
  }
  const AttendArguments arguments{queries.data(), window, cap, out.data()};
  nb::gil_scoped_release release;
  attention_kernels(runtime.isa).attend(runtime.pool, shape, arguments, table, cache);
}

}  // namespace

void bind_attention(nb::module_& m) {
  m.attr("KV_BLOCK") = kBlockTokens;

  nb::class_<KVCache>(m, "KVCache", "Keys and values of a layer in blocks, over memory that it keeps alive.")
      .def("__init__", [](KVCache* self, const std::string& dtype, int64_t kv_heads, int64_t head_dim,
                          int64_t num_blocks, Array<uint8_t, 1> memory) {
        const CacheLayout layout = make_layout(dtype, kv_heads, head_dim);
        require(num_blocks >= 1 && num_blocks <= kMaxBlocks, "num_blocks must be from 1 to " +
                                                                 std::to_string(kMaxBlocks) + ", but is " +
                                                                 std::to_string(num_blocks));
        require_shape(memory, "memory", 0, num_blocks * layout.block_bytes());
        require(reinterpret_cast<uintptr_t>(memory.data()) % 64 == 0, "memory must start at a multiple of 64 bytes");
        new (self) KVCache{layout, num_blocks, memory.data()};
      }, "dtype"_a, "kv_heads"_a, "head_dim"_a, "num_blocks"_a, "memory"_a.noconvert(), nb::keep_alive<1, 6>())
      .def_static("block_bytes", [](const std::string& dtype, int64_t kv_heads, int64_t head_dim) {
        return make_layout(dtype, kv_heads, head_dim).block_bytes();
      }, "dtype"_a, "kv_heads"_a, "head_dim"_a)
      .def_prop_ro("dtype", [](const KVCache& c) { return name_of(c.layout.type); })
      .def_prop_ro("kv_heads", [](const KVCache& c) { return c.layout.kv_heads; })
      .def_prop_ro("head_dim", [](const KVCache& c) { return c.layout.head_dim; })
      .def_ro("num_blocks", &KVCache::num_blocks)
      .def("keys", [](const KVCache& c, int64_t block, int64_t kv_head) { return unpacked(c, block, kv_head, true); },
           "block"_a, "kv_head"_a)
      .def("values", [](const KVCache& c, int64_t block, int64_t kv_head) {
        return unpacked(c, block, kv_head, false);
      }, "block"_a, "kv_head"_a);

  nb::class_<BatchTable>(m, "BatchTable", "The sequences of one forward pass and where their blocks are.")
      .def("__init__", [](BatchTable* self, Array<const int32_t, 1> row_starts, Array<const int32_t, 1> positions,
                          Array<const int32_t, 2> block_tables) {
        new (self) BatchTable(make_table(row_starts, positions, block_tables));
      }, "row_starts"_a.noconvert(), "positions"_a.noconvert(), "block_tables"_a.noconvert())
      .def_prop_ro("num_sequences", &BatchTable::num_sequences)
      .def_prop_ro("num_rows", &BatchTable::num_rows);

  m.def("append_kv", &append, "runtime"_a, "qkv"_a.noconvert(), "cos"_a.noconvert(), "sin"_a.noconvert(), "table"_a,
        "cache"_a, "query_scale"_a, "queries"_a.noconvert());
  m.def("attend", &run_attention, "runtime"_a, "queries"_a.noconvert(), "table"_a, "cache"_a, "window"_a, "cap"_a,
        "out"_a.noconvert());
  m.def("copy_block", [](Runtime&, const KVCache& cache, int64_t source, int64_t destination) {
    require_block(cache, source);
    require_block(cache, destination);
    cache.copy_block(source, destination);
  }, "runtime"_a, "cache"_a, "source"_a, "destination"_a);
}

}  // namespace gemma2
