// The arithmetic of attention between the queries of one task and the keys and values of one span. Formulas and the order
// of sums: attention.cpp.
//
// Scores of all its rows, then weights, then weighted values. A task of many rows goes through the span's keys (and
// values) in pieces that stay in the cache nearest to the core, once for every register tile of rows. A task of few rows
// meets every byte once: it goes through memory in its order and asks for what comes next.
#pragma once

#include <type_traits>

#include "attention.h"
#include "attention_product.h"
#include "attention_rows.h"
#include "attention_weights.h"
#include "simd.h"

namespace gemma2::GEMMA2_ISA {

inline int64_t at_least(int64_t a, int64_t b) { return a > b ? a : b; }
inline int64_t at_most(int64_t a, int64_t b) { return a < b ? a : b; }

// The blocks that lie next in memory are on their way already (the processor sees the stream), but for its head start.
constexpr int64_t kStreamAhead = 512;

template <class Dot>
struct SpanWork {
  static constexpr CacheType type = Dot::type;
  static constexpr int planes = type == CacheType::int8 ? 2 : 1;
  static constexpr int pack = pack_of(type);
  static constexpr int64_t weight_steps = kSpanTokens / pack;  // dwords of a line of weights
  static constexpr int64_t block_steps = kBlockTokens / pack;

  const AttentionShape& shape;
  const AttendArguments& args;
  const KVCache& cache;
  const AttentionTask& task;
  const int32_t* block_table;
  AttentionScratch& scratch;
  const SoftCap soft_cap{args.cap};
  const int64_t group = shape.group(), rows = task.num_tokens * group, lines = rows * planes;
  const int64_t head_dim = shape.layout.head_dim, padded = shape.padded_head_dim(), key_steps = shape.layout.key_steps();

  // Of the current span: its first position, its tiles of 16 keys that some row sees, and its blocks.
  int64_t base = 0, first_tile = 0, last_tile = 0;
  const uint8_t* keys[kSpanBlocks] = {};
  const uint8_t* values[kSpanBlocks] = {};

  // Keys that a row sees, both included.
  int64_t first_key(int64_t row) const {
    return args.window > 0 ? at_least(0, last_key(row) - args.window + 1) : 0;
  }
  int64_t last_key(int64_t row) const { return task.position + row / group; }

  // Where a row's head begins in queries and out.
  int64_t head_at(int64_t row) const {
    return ((task.first_row + row / group) * shape.num_heads + task.kv_head * group + row % group) * head_dim;
  }

  void pack_queries() const {
    constexpr int64_t kRowsAhead = 6;  // the pieces of a head are too short for the processor to see a stream
    for (int64_t row = 0; row < rows; ++row) {
      for (int64_t d = 0; d < head_dim && row + kRowsAhead < rows; d += 16) {
        __builtin_prefetch(args.queries + head_at(row + kRowsAhead) + d, 0, 3);
      }
      const float* q = args.queries + head_at(row);
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

  // Fills scores, weights and span_values of the scratch memory, and of span_sums what follows the values.
  void run(int64_t span) {
    base = span * kSpanTokens;
    tiles_seen(0, rows - 1, first_tile, last_tile);
    for (int64_t i = first_tile / kBlockTiles; i * kBlockTiles < last_tile; ++i) {
      const int64_t block = block_table[span * kSpanBlocks + i];
      keys[i] = cache.keys(block, task.kv_head);
      values[i] = cache.values(block, task.kv_head);
    }
    const bool is_stream = lines <= kMaxLines;
    is_stream ? stream_scores() : compute_scores();
    for_lines([&](int64_t, int, int64_t first_row, int64_t last_row) {
      int64_t first_of_lines, last_of_lines;
      tiles_seen(first_row, last_row, first_of_lines, last_of_lines);
      for (int64_t row = first_row; row <= last_row; ++row) {
        int64_t first, last;
        tiles_seen(row, row, first, last);
        if (first == last) first = last = first_of_lines;
        compute_weights(row, first, last, first_of_lines / kBlockTiles * kBlockTiles, last_of_lines,
                        scratch.span_sums + row * shape.sums_floats() + padded);
      }
    });
    is_stream ? stream_values(span) : compute_values();
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

 private:
  // Calls f(first line, number of lines, first row, last row) for each register tile's lines, of even sizes.
  template <class F>
  void for_lines(F&& f) const {
    constexpr int64_t most = kMaxLines / planes;
    const int64_t parts = (rows + most - 1) / most;
    for (int64_t part = 0; part < parts; ++part) {
      const int64_t row = rows * part / parts, end = rows * (part + 1) / parts;
      f(row * planes, static_cast<int>((end - row) * planes), row, end - 1);
    }
  }

  // Tiles of 16 keys of the span that rows from first_row to last_row see: [first, last).
  void tiles_seen(int64_t first_row, int64_t last_row, int64_t& first, int64_t& last) const {
    first = at_least(first_key(first_row) - base, 0) / 16;
    last = last_key(last_row) < base ? 0 : at_most(last_key(last_row) - base, kSpanTokens - 1) / 16 + 1;
    if (first >= last) first = last = 0;
  }

  Lines queries_at(int64_t line) const {
    return {scratch.queries + line * key_steps, key_steps, scratch.query_sums + line};
  }
  Lines weights_at(int64_t line, int64_t block) const {
    return {scratch.weights + line * weight_steps + block * block_steps, weight_steps, scratch.weight_sums + line};
  }

  Columns value_columns(const uint8_t* const* blocks, int64_t tile) const {
    return {blocks, block_steps, 1, 0, kVectorBytes, shape.layout.value_step_bytes(tile), shape.layout.value_tile_at(tile)};
  }

  void compute_scores() const {
    [[maybe_unused]] const typename Dot::Mode mode;
    const uint8_t* key_tiles[kSpanTokens / 16];
    for (int64_t tile = first_tile; tile < last_tile; ++tile) {
      key_tiles[tile] = keys[tile / kBlockTiles] + tile % kBlockTiles * kVectorBytes;
    }
    const int most = columns_for(at_most(lines, kMaxLines));
    for (int64_t tile = first_tile; tile < last_tile; tile += most) {
      for_lines([&](int64_t line, int num_lines, int64_t first_row, int64_t last_row) {
        int64_t first, last;
        tiles_seen(first_row, last_row, first, last);
        last = at_most(last, tile + most);
        if (tile >= last || tile + most <= first) return;
        multiply<Dot, false>(num_lines, static_cast<int>(last - tile), queries_at(line),
                             {key_tiles + tile, key_steps, 0, 1, 0, kKeyStepBytes, 0}, key_steps, {},
                             scratch.scores + line * kSpanTokens + tile * 16, kSpanTokens);
      });
    }
  }

  void compute_values() const {
    [[maybe_unused]] const typename Dot::Mode mode;
    const int64_t dim_tiles = shape.layout.dim_tiles();
    const int most = columns_for(at_most(lines, kMaxLines));
    for (int64_t tile = 0; tile < dim_tiles; tile += most) {
      for_lines([&](int64_t line, int num_lines, int64_t first_row, int64_t last_row) {
        int64_t first, last;
        tiles_seen(first_row, last_row, first, last);
        const int64_t block = first / kBlockTiles, num_tiles = last - block * kBlockTiles;
        multiply<Dot, false>(num_lines, static_cast<int>(at_most(most, dim_tiles - tile)),
                             weights_at(line, block),
                             value_columns(values + block, tile),
                             num_tiles * 16 / pack, {}, scratch.span_values + line * padded + tile * 16, padded);
      });
    }
  }

  // How far ahead the next block to come is, seen from this one.
  static int64_t distance(const uint8_t* block, int64_t block_bytes, const uint8_t* next) {
    if (next == nullptr) return 0;
    return next == block + block_bytes ? kStreamAhead : next - block;
  }

  // All lines times a group of tiles of columns, which lie beside one another in memory. Where a register tile takes
  // fewer of them, a page goes through the nearest cache: all its steps for some tiles, then for the others.
  void stream_columns(int64_t num_tiles, Lines a, Columns b, int64_t steps, Stream stream, uint32_t* out,
                      int64_t out_stride) const {
    const int64_t most = columns_for(lines);
    if (most >= kGroupTiles) {
      multiply<Dot, true>(static_cast<int>(lines), static_cast<int>(num_tiles), a, b, steps, stream, out, out_stride);
      return;
    }
    constexpr int64_t kPage = 4096;
    const int64_t chunk = kPage / b.step_bytes, ahead = stream.ahead == kStreamAhead ? kPage : stream.ahead;
    stream.ahead = 0;
    for (int64_t step = 0; step < steps; step += chunk) {
      for (int64_t i = 0; i < kPage; i += 64) __builtin_prefetch(b.at(0, 0) + i + ahead, 0, 2);
      for (int64_t tile = 0; tile < num_tiles; tile += most) {
        Columns some = b;
        some.offset += tile * kVectorBytes;
        multiply<Dot, true>(static_cast<int>(lines), static_cast<int>(at_most(most, num_tiles - tile)), a, some,
                            at_most(chunk, steps - step), stream, out + tile * 16, out_stride);
      }
      a.values += chunk;
      b.offset += chunk * b.step_bytes;
      stream.resumes = true;
    }
  }

  void stream_scores() const {
    [[maybe_unused]] const typename Dot::Mode mode;
    for (int64_t i = first_tile / kBlockTiles; i * kBlockTiles < last_tile; ++i) {
      const uint8_t* next = (i + 1) * kBlockTiles < last_tile ? keys[i + 1] : values[first_tile / kBlockTiles];
      const Stream stream{false, distance(keys[i], shape.layout.key_bytes(), next)};
      const int64_t num_tiles = at_most(last_tile - i * kBlockTiles, kBlockTiles);
      stream_columns(num_tiles, queries_at(0), {keys + i, key_steps, 0, 0, kVectorBytes, kKeyStepBytes, 0}, key_steps,
                     stream, scratch.scores + i * kBlockTokens, kSpanTokens);
    }
  }

  void stream_values(int64_t span) const {
    [[maybe_unused]] const typename Dot::Mode mode;
    const int64_t dim_tiles = shape.layout.dim_tiles(), first_block = first_tile / kBlockTiles;
    const int64_t last_block = (last_tile + kBlockTiles - 1) / kBlockTiles;
    const uint8_t* after =
        span < task.last_span ? cache.keys(block_table[(span + 1) * kSpanBlocks], task.kv_head) : nullptr;
    for (int64_t i = first_block; i < last_block; ++i) {
      const uint8_t* next = i + 1 < last_block ? values[i + 1] : after;
      const Stream stream{i > first_block, distance(values[i], shape.layout.value_bytes(), next)};
      const int64_t num_tiles = at_most(last_tile - i * kBlockTiles, kBlockTiles);
      for (int64_t tile = 0; tile < dim_tiles; tile += kGroupTiles) {
        stream_columns(at_most(kGroupTiles, dim_tiles - tile), weights_at(0, i), value_columns(values + i, tile),
                       num_tiles * 16 / pack, stream, scratch.span_values + tile * 16, padded);
      }
    }
  }

  const float* key_scales(int64_t tile) const {
    return reinterpret_cast<const float*>(keys[tile / kBlockTiles] + shape.layout.key_scales_at()) +
           tile % kBlockTiles * 16;
  }
  const float* value_scales(int64_t tile) const {
    return reinterpret_cast<const float*>(values[tile / kBlockTiles] + shape.layout.value_scales_at()) +
           tile % kBlockTiles * 16;
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
  void compute_weights(int64_t row, int64_t first_tile, int64_t last_tile, int64_t first_of_lines,
                       int64_t last_of_lines, float* lanes) const {
    using Precision = std::conditional_t<type == CacheType::float32, Fine, Coarse>;
    const int64_t first = first_key(row) - base, last = last_key(row) - base;
    const auto is_whole = [&](int64_t tile) { return first <= tile * 16 && last >= tile * 16 + 15; };
    float shift = 0;
    if (!soft_cap.is_bounded) {
      const F32x16 lowest = F32x16::broadcast(kLowest);
      F32x16 most = lowest;
      for (int64_t tile = first_tile; tile < last_tile; ++tile) {
        const F32x16 y = soft_cap(score(row, tile, key_scales(tile)));
        most = max(keep_lanes(y, first - tile * 16, last - tile * 16, lowest), most);
      }
      shift = reduce_max(most);
    }
    auto* weighted = reinterpret_cast<float*>(scratch.scores + row * planes * kSpanTokens);
    F32x16 sum = F32x16::zero();
    I32x16 largest_weight = I32x16::zero();
    for (int64_t tile = first_tile; tile < last_tile; ++tile) {
      const F32x16 s = score(row, tile, key_scales(tile));
      F32x16 p = soft_cap.is_bounded ? soft_cap.template weight<Precision>(s)
                                     : exp(soft_cap(s) - F32x16::broadcast(shift));
      if (!is_whole(tile)) p = keep_lanes(p, first - tile * 16, last - tile * 16, F32x16::zero());
      if constexpr (type == CacheType::float32) {
        p.store(reinterpret_cast<float*>(scratch.weights + row * weight_steps) + tile * 16);
      } else if constexpr (type == CacheType::bfloat16) {
        p = store_rounded(p, reinterpret_cast<uint16_t*>(scratch.weights + row * weight_steps) + tile * 16);
      } else {
        F32x16 weight = p * F32x16::load(value_scales(tile));
        // Scales of tokens that are not written yet may be NaN.
        if (!is_whole(tile)) weight = keep_lanes(weight, first - tile * 16, last - tile * 16, F32x16::zero());
        largest_weight = max(magnitude(weight), largest_weight);
        weight.store(weighted + tile * 16);
      }
      sum = sum + p;
    }
    sum.store(lanes);
    lanes[16] = shift;
    if constexpr (type == CacheType::int8) {
      quantize_weights(row, reduce_magnitudes(largest_weight), weighted, first_tile, last_tile);
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
};

}  // namespace gemma2::GEMMA2_ISA
