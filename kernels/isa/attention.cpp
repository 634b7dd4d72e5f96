// Attention of rows over the cache.
//
//   s = q · k, y = cap · tanh(s / cap) (cap 0: y = s), weight p = exp(y - m) for the keys that the row sees, else 0
//   out = Σ p · v / Σ p
//
// A row at position p sees the keys at p - window + 1 … p (window 0: 0 … p), by absolute position.
//
// Order of sums. Keys are cut by absolute position into spans of 256. Within a span, scores and weighted values are
// chains over head_dim and over keys (attention_product.h), and Σ p is 16 lanes, lane i for the keys of i modulo 16;
// spans are added in their order. A key that is not seen adds exactly 0. So a row's bits depend on its query and keys
// only: not on what else is in the pass, on how the text was cut, on the blocks, or on the number of threads.
//
// With 0 < cap <= 60 no maximum is needed, m = 0, and spans are added as they are. Else m is the largest y of the span,
// and sums are scaled when spans are added.
//
// Types. float32: all in float32. bfloat16: q and p are rounded to bfloat16 (Σ p adds the rounded p), sums are float32.
// int8: q, and in each span p times the scales of the values, are rounded to 15 and 14 bits (two planes of bytes), their
// products with the bytes of k and v are exact; Σ p adds p as float32.
#include "attention.h"

#include "attention_kernels.h"
#include "attention_product.h"
#include "attention_rows.h"
#include "attention_weights.h"
#include "simd.h"

namespace gemma2::GEMMA2_ISA {
namespace {

constexpr int kSpanTiles = kSpanTokens / 16;

inline int64_t at_least(int64_t a, int64_t b) { return a > b ? a : b; }
inline int64_t at_most(int64_t a, int64_t b) { return a < b ? a : b; }

// Adds the sums of a span to those of the spans before it. Both: [padded_head_dim values][16 lanes of Σ p][m].
template <class ValuesAt>
inline void add_span(bool is_bounded, int64_t padded_head_dim, const ValuesAt& values_at, const float* span,
                     float* total) {
  const float* lanes = span + padded_head_dim;
  float* total_lanes = total + padded_head_dim;
  if (is_bounded) {
    for (int64_t d = 0; d < padded_head_dim; d += 16) (F32x16::load(total + d) + values_at(d)).store(total + d);
    (F32x16::load(total_lanes) + F32x16::load(lanes)).store(total_lanes);
    return;
  }
  const float before = total_lanes[16], now = lanes[16], most = before > now ? before : now;
  const F32x16 old_part = exp(F32x16::broadcast(before - most)), new_part = exp(F32x16::broadcast(now - most));
  for (int64_t d = 0; d < padded_head_dim; d += 16) {
    fma(values_at(d), new_part, F32x16::load(total + d) * old_part).store(total + d);
  }
  fma(F32x16::load(lanes), new_part, F32x16::load(total_lanes) * old_part).store(total_lanes);
  total_lanes[16] = most;
}

inline void clear_sums(int64_t padded_head_dim, float* sums) {
  for (int64_t i = 0; i < padded_head_dim + 32; i += 16) F32x16::zero().store(sums + i);
  sums[padded_head_dim + 16] = kLowest;
}

// A task and the memory of the thread that does it.
template <class Dot>
struct Tile {
  static constexpr CacheType type = Dot::type;
  static constexpr int planes = type == CacheType::int8 ? 2 : 1;
  static constexpr int pack = pack_of(type);
  static constexpr int64_t weight_steps = kSpanTokens / pack;  // dwords of a line of weights

  const AttentionShape& shape;
  const AttendArguments& args;
  const KVCache& cache;
  const AttentionTask& task;
  const int32_t* block_table;
  AttentionScratch& scratch;
  const SoftCap soft_cap{args.cap};
  const int64_t group = shape.group(), rows = task.num_tokens * group, lines = rows * planes;
  const int64_t head_dim = shape.layout.head_dim, padded = shape.padded_head_dim(), key_steps = shape.layout.key_steps();

  // Keys that a row sees, both included.
  int64_t first_key(int64_t row) const {
    return args.window > 0 ? at_least(0, last_key(row) - args.window + 1) : 0;
  }
  int64_t last_key(int64_t row) const { return task.position + row / group; }

  const float* query(int64_t row) const {
    return args.queries + ((task.first_row + row / group) * shape.num_heads + task.kv_head * group + row % group) * head_dim;
  }
  float* output(int64_t row) const {
    return args.out + ((task.first_row + row / group) * shape.num_heads + task.kv_head * group + row % group) * head_dim;
  }

  void pack_queries() const {
    for (int64_t row = 0; row < rows; ++row) {
      const float* q = query(row);
      if constexpr (type != CacheType::int8) {
        uint32_t* to = scratch.queries + row * key_steps;
        pack_row(type, q, head_dim, scratch.dwords);
        __builtin_memcpy(to, scratch.dwords, static_cast<size_t>(key_steps * 4));
      } else {
        pack_query_int8(q, row);
      }
    }
  }

  // q = scale · (128 · high + low).
  void pack_query_int8(const float* q, int64_t row) const {
    const float scale = largest(head_dim, values_of(q)) * (1.0f / (127 * 128));
    const F32x16 inverse = F32x16::broadcast(inverse_of(scale));
    I32x16 high_sum = I32x16::zero(), low_sum = I32x16::zero();
    auto* high_bytes = reinterpret_cast<int8_t*>(scratch.dwords);
    int8_t* low_bytes = high_bytes + round_up(head_dim, 64);
    for (int64_t k = 0; k < head_dim; k += 16) {
      const int n = static_cast<int>(at_most(head_dim - k, 16));
      const I32x16 value = round_to_i32(F32x16::load_partial(q + k, n) * inverse);
      const I32x16 high = shift_right<7>(value + I32x16::broadcast(64)), low = value - shift_left<7>(high);
      high.store_i8(high_bytes + k);
      low.store_i8(low_bytes + k);
      high_sum = high_sum + high;
      low_sum = low_sum + low;
    }
    uint32_t* to = scratch.queries + row * 2 * key_steps;
    __builtin_memcpy(to, high_bytes, static_cast<size_t>(key_steps * 4));
    __builtin_memcpy(to + key_steps, low_bytes, static_cast<size_t>(key_steps * 4));
    scratch.query_scales[row] = scale;
    scratch.query_sums[row * 2] = reduce_add(high_sum);
    scratch.query_sums[row * 2 + 1] = reduce_add(low_sum);
  }

  // Calls f(first line, number of lines, first row, last row) for each register tile's lines.
  template <class F>
  void for_lines(F&& f) const {
    constexpr int most = kMaxLines / planes * planes;
    for (int64_t line = 0; line < lines; line += most) {
      const int64_t n = at_most(most, lines - line);
      f(line, static_cast<int>(n), line / planes, (line + n) / planes - 1);
    }
  }

  // Scores of the span's tiles of 16 keys from first_tile to last_tile - 1, where some row of a register tile sees them.
  void compute_scores(int64_t base, const uint8_t* const* key_tiles, int64_t first_tile, int64_t last_tile) const {
    [[maybe_unused]] const typename Dot::Mode mode;
    for (int64_t tile = first_tile; tile < last_tile; tile += kMaxColumns) {
      const int64_t columns = at_most(kMaxColumns, last_tile - tile), first = base + tile * 16;
      for_lines([&](int64_t line, int num_lines, int64_t first_row, int64_t last_row) {
        if (last_key(last_row) < first || first_key(first_row) >= first + columns * 16) return;
        multiply<Dot>(num_lines, static_cast<int>(columns),
                      {scratch.queries + line * key_steps, key_steps, scratch.query_sums + line},
                      {key_tiles + tile, 0, 1, 0, 0}, 1, key_steps, scratch.scores + line * kSpanTokens + tile * 16,
                      kSpanTokens);
      });
    }
  }

  F32x16 score(int64_t row, int64_t tile, const float* key_scales) const {
    const uint32_t* at = scratch.scores + row * planes * kSpanTokens + tile * 16;
    if constexpr (type != CacheType::int8) {
      return F32x16::load(reinterpret_cast<const float*>(at));
    } else {
      const I32x16 high = I32x16::load(reinterpret_cast<const int32_t*>(at));
      const I32x16 low = I32x16::load(reinterpret_cast<const int32_t*>(at + kSpanTokens));
      return to_f32(shift_left<7>(high) + low) *
             (F32x16::load(key_scales) * F32x16::broadcast(scratch.query_scales[row]));
    }
  }

  // The weights of one row, tiles from first_tile to last_tile - 1 of those from first_of_lines to last_of_lines - 1
  // that its register tile reads; and Σ p, m.
  void compute_weights(int64_t row, int64_t base, const uint8_t* const* heads, int64_t first_tile, int64_t last_tile,
                       int64_t first_of_lines, int64_t last_of_lines, float* lanes) const {
    const int64_t first = first_key(row) - base, last = last_key(row) - base;
    const auto scales_at = [&](int64_t tile, int which) -> const float* {
      if constexpr (type != CacheType::int8) return nullptr;
      return reinterpret_cast<const float*>(heads[tile / 2] + shape.layout.scales_at()) + which * kBlockTokens +
             tile % 2 * 16;
    };
    auto* scores = reinterpret_cast<float*>(scratch.scores + row * planes * kSpanTokens);
    F32x16 most = F32x16::broadcast(kLowest);
    float shift = 0;
    if (!soft_cap.is_bounded) {
      for (int64_t tile = first_tile; tile < last_tile; ++tile) {
        const F32x16 y = soft_cap(score(row, tile, scales_at(tile, 0)));
        const F32x16 low = F32x16::broadcast(kLowest);
        const auto clip = [](int64_t n) { return static_cast<int>(n < 0 ? 0 : n > 16 ? 16 : n); };
        most = max(select(first_lanes(clip(first - tile * 16)), low,
                          select(first_lanes(clip(last + 1 - tile * 16)), y, low)),
                   most);
      }
      shift = reduce_max(most);
    }
    F32x16 sum = F32x16::zero(), largest_weight = F32x16::zero();
    for (int64_t tile = first_tile; tile < last_tile; ++tile) {
      const F32x16 y = soft_cap(score(row, tile, scales_at(tile, 0)));
      F32x16 p = exp(soft_cap.is_bounded ? y : y - F32x16::broadcast(shift));
      p = keep_lanes(p, first - tile * 16, last - tile * 16);
      if constexpr (type == CacheType::float32) {
        p.store(reinterpret_cast<float*>(scratch.weights + row * weight_steps) + tile * 16);
      } else if constexpr (type == CacheType::bfloat16) {
        auto* to = reinterpret_cast<uint16_t*>(scratch.weights + row * weight_steps) + tile * 16;
        p.store_bf16(to);
        p = F32x16::load_bf16(to);
      } else {
        const F32x16 weight = keep_lanes(p * F32x16::load(scales_at(tile, 1)), first - tile * 16, last - tile * 16);
        largest_weight = max(weight, largest_weight);
        weight.store(scores + tile * 16);
      }
      sum = sum + p;
    }
    sum.store(lanes);
    lanes[16] = soft_cap.is_bounded ? 0.0f : shift;
    if constexpr (type == CacheType::int8) {
      quantize_weights(row, reduce_max(largest_weight), scores, first_tile, last_tile);
    }
    const auto clear = [&](int64_t tile) {
      for (int plane = 0; plane < planes; ++plane) {
        uint32_t* to = scratch.weights + (row * planes + plane) * weight_steps + tile * 16 / pack;
        for (int i = 0; i < 16 / pack; ++i) to[i] = 0;
      }
    };
    for (int64_t tile = first_of_lines; tile < first_tile; ++tile) clear(tile);
    for (int64_t tile = last_tile; tile < last_of_lines; ++tile) clear(tile);
  }

  // weight = scale · (128 · high + low), both from 0 to 127.
  void quantize_weights(int64_t row, float largest_weight, const float* weights, int64_t first_tile,
                        int64_t last_tile) const {
    const float scale = largest_weight * (1.0f / 16383.0f);
    const F32x16 inverse = F32x16::broadcast(inverse_of(scale));
    I32x16 high_sum = I32x16::zero(), low_sum = I32x16::zero();
    auto* bytes = reinterpret_cast<int8_t*>(scratch.weights + row * 2 * weight_steps);
    for (int64_t tile = first_tile; tile < last_tile; ++tile) {
      const I32x16 value = round_to_i32(F32x16::load(weights + tile * 16) * inverse);
      const I32x16 high = shift_right<7>(value), low = value - shift_left<7>(high);
      high.store_i8(bytes + tile * 16);
      low.store_i8(bytes + weight_steps * 4 + tile * 16);
      high_sum = high_sum + high;
      low_sum = low_sum + low;
    }
    scratch.weight_scales[row] = scale;
    scratch.weight_sums[row * 2] = reduce_add(high_sum);
    scratch.weight_sums[row * 2 + 1] = reduce_add(low_sum);
  }

  F32x16 value_sum(int64_t row, int64_t d) const {
    const uint32_t* at = scratch.span_values + row * planes * padded + d;
    if constexpr (type != CacheType::int8) {
      return F32x16::load(reinterpret_cast<const float*>(at));
    } else {
      const I32x16 high = I32x16::load(reinterpret_cast<const int32_t*>(at));
      const I32x16 low = I32x16::load(reinterpret_cast<const int32_t*>(at + padded));
      return to_f32(shift_left<7>(high) + low) * F32x16::broadcast(scratch.weight_scales[row]);
    }
  }

  // Tiles of 16 keys of the span that rows from first_row to last_row see: [first, last).
  void tiles_seen(int64_t base, int64_t first_row, int64_t last_row, int64_t& first, int64_t& last) const {
    first = at_least(first_key(first_row) - base, 0) / 16;
    last = last_key(last_row) < base ? first : at_least(first, at_most(last_key(last_row) - base, kSpanTokens - 1) / 16 + 1);
    if (first >= kSpanTiles) first = last = kSpanTiles;
  }

  void do_span(int64_t span) const {
    const int64_t base = span * kSpanTokens, sums_floats = shape.sums_floats();
    int64_t first_tile, last_tile;
    tiles_seen(base, 0, rows - 1, first_tile, last_tile);
    const uint8_t* heads[kSpanBlocks] = {};
    const uint8_t* values[kSpanBlocks] = {};
    const uint8_t* key_tiles[kSpanTiles] = {};
    for (int64_t i = first_tile / 2; i < (last_tile + 1) / 2; ++i) {
      heads[i] = cache.head(block_table[span * kSpanBlocks + i], task.kv_head);
      values[i] = heads[i] + shape.layout.values_at();
      key_tiles[i * 2] = heads[i];
      key_tiles[i * 2 + 1] = heads[i] + shape.layout.key_tile_bytes();
    }
    compute_scores(base, key_tiles, first_tile, last_tile);

    for_lines([&](int64_t, int, int64_t first_row, int64_t last_row) {
      int64_t first_of_lines, last_of_lines;
      tiles_seen(base, first_row, last_row, first_of_lines, last_of_lines);
      for (int64_t row = first_row; row <= last_row; ++row) {
        int64_t first, last;
        tiles_seen(base, row, row, first, last);
        if (first == last) first = last = first_of_lines;
        compute_weights(row, base, heads, first, last, first_of_lines / 2 * 2, (last_of_lines + 1) / 2 * 2,
                        scratch.span_sums + row * sums_floats + padded);
        if (first == last) scratch.span_sums[row * sums_floats + padded + 16] = kLowest;
      }
    });

    {
      [[maybe_unused]] const typename Dot::Mode mode;
      const int64_t dim_tiles = shape.layout.dim_tiles(), tile_bytes = shape.layout.value_tile_bytes();
      for (int64_t tile = 0; tile < dim_tiles; tile += kMaxColumns) {
        const int columns = static_cast<int>(at_most(kMaxColumns, dim_tiles - tile));
        for_lines([&](int64_t line, int num_lines, int64_t first_row, int64_t last_row) {
          int64_t first, last;
          tiles_seen(base, first_row, last_row, first, last);
          const int64_t block = first / 2, blocks = (last + 1) / 2 - block;
          multiply<Dot>(num_lines, columns,
                        {scratch.weights + line * weight_steps + block * (kBlockTokens / pack), weight_steps,
                         scratch.weight_sums + line},
                        {values + block, 1, 0, tile_bytes, tile * tile_bytes}, first == last ? 0 : blocks,
                        kBlockTokens / pack, scratch.span_values + line * padded + tile * 16, padded);
        });
      }
    }
  }

  void run(float* partials) const {
    const int64_t sums_floats = shape.sums_floats();
    pack_queries();
    if (task.partial < 0) {
      for (int64_t row = 0; row < rows; ++row) clear_sums(padded, scratch.totals + row * sums_floats);
    }
    for (int64_t span = task.first_span; span <= task.last_span; ++span) {
      do_span(span);
      for (int64_t row = 0; row < rows; ++row) {
        const float* sums = scratch.span_sums + row * sums_floats;
        const auto values_at = [&](int64_t d) { return value_sum(row, d); };
        if (task.partial < 0) {
          add_span(soft_cap.is_bounded, padded, values_at, sums, scratch.totals + row * sums_floats);
        } else {
          float* to = partials + (task.partial + (span - task.first_span) * rows + row) * sums_floats;
          for (int64_t d = 0; d < padded; d += 16) values_at(d).store(to + d);
          for (int i = 0; i < 32; i += 16) F32x16::load(sums + padded + i).store(to + padded + i);
        }
      }
    }
    if (task.partial < 0) {
      for (int64_t row = 0; row < rows; ++row) finish(row, scratch.totals + row * sums_floats);
    }
  }

  // Adds the spans of the rows from first_row to last_row, which other tasks have done.
  void merge(const float* partials) const {
    const int64_t sums_floats = shape.sums_floats();
    for (int64_t row = 0; row < rows; ++row) {
      float* total = scratch.totals;
      clear_sums(padded, total);
      for (int64_t span = task.first_span; span <= task.last_span; ++span) {
        const float* sums = partials + (task.partial + (span - task.first_span) * rows + row) * sums_floats;
        add_span(soft_cap.is_bounded, padded, [&](int64_t d) { return F32x16::load(sums + d); }, sums, total);
      }
      finish(row, total);
    }
  }

  void finish(int64_t row, const float* total) const {
    const F32x16 sum = F32x16::broadcast(reduce_add(F32x16::load(total + padded)));
    for (int64_t d = 0; d < head_dim; d += 16) {
      (F32x16::load(total + d) / sum).store_partial(output(row) + d, static_cast<int>(at_most(head_dim - d, 16)));
    }
  }
};

template <class Dot>
void attend_as(ThreadPool& pool, const AttentionShape& shape, const AttendArguments& args, const BatchTable& table,
               const KVCache& cache) {
  AttentionScratch& mine = attention_scratch(shape);
  plan_attention(table, shape, args.window, pool.num_threads(), mine.plan);
  reserve_partials(shape, mine);
  const auto tile = [&](const AttentionTask& task) {
    return Tile<Dot>{shape, args, cache, task, table.block_table(task.sequence), attention_scratch(shape)};
  };
  const auto run = [&](int64_t i, int) { tile(mine.plan.tasks[static_cast<size_t>(i)]).run(mine.partials); };
  const auto merge = [&](int64_t i, int) { tile(mine.plan.merges[static_cast<size_t>(i)]).merge(mine.partials); };
  const auto num_tasks = static_cast<int64_t>(mine.plan.tasks.size());
  if (mine.plan.is_tiny) {
    for (int64_t i = 0; i < num_tasks; ++i) run(i, 0);
  } else {
    pool.parallel_for(num_tasks, run);
    pool.parallel_for(static_cast<int64_t>(mine.plan.merges.size()), merge);
  }
}

}  // namespace

void attend(ThreadPool& pool, const AttentionShape& shape, const AttendArguments& args, const BatchTable& table,
            const KVCache& cache) {
  switch (shape.layout.type) {
    case CacheType::float32: return attend_as<DotFloat32>(pool, shape, args, table, cache);
    case CacheType::bfloat16: return attend_as<DotBfloat16>(pool, shape, args, table, cache);
    case CacheType::int8: return attend_as<DotInt8>(pool, shape, args, table, cache);
  }
}

const AttentionKernels& attention_kernels() {
  static constexpr AttentionKernels kernels{.append_kv = append_kv, .attend = attend};
  return kernels;
}

}  // namespace gemma2::GEMMA2_ISA
