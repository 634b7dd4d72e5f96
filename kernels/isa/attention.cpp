// Attention of rows over the cache.
//
//   s = q · k, y = cap · tanh(s / cap) (cap 0: y = s), weight p = exp(y - m) for the keys that the row sees, else 0
//   out = Σ p · v · (1 / Σ p)
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
#include "attention_span.h"
#include "attention_weights.h"
#include "simd.h"

namespace gemma2::GEMMA2_ISA {
namespace {

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

// A task: some spans, or all of them.
template <class Dot>
struct Tile {
  SpanWork<Dot> work;
  AttentionScratch& scratch = work.scratch;
  const AttentionTask& task = work.task;
  const int64_t rows = work.rows, padded = work.padded, sums_floats = work.shape.sums_floats();
  const bool is_bounded = work.soft_cap.is_bounded;

  void run(float* partials) {
    const bool is_whole = task.partial < 0;
    work.pack_queries();
    for (int64_t row = 0; row < rows && is_whole; ++row) clear_sums(padded, scratch.totals + row * sums_floats);
    for (int64_t span = task.first_span; span <= task.last_span; ++span) {
      work.run(span);
      for (int64_t row = 0; row < rows; ++row) {
        const float* sums = scratch.span_sums + row * sums_floats;
        const auto values_at = [&](int64_t d) { return work.value_sum(row, d); };
        if (is_whole) {
          add_span(is_bounded, padded, values_at, sums, scratch.totals + row * sums_floats);
        } else {
          float* to = partials + (task.partial + (span - task.first_span) * rows + row) * sums_floats;
          for (int64_t d = 0; d < padded; d += 16) values_at(d).store(to + d);
          for (int i = 0; i < 32; i += 16) F32x16::load(sums + padded + i).store(to + padded + i);
        }
      }
    }
    for (int64_t row = 0; row < rows && is_whole; ++row) finish(row, scratch.totals + row * sums_floats);
  }

  // Adds the spans that other tasks have done.
  void merge(const float* partials) {
    for (int64_t row = 0; row < rows; ++row) {
      clear_sums(padded, scratch.totals);
      for (int64_t span = task.first_span; span <= task.last_span; ++span) {
        const float* sums = partials + (task.partial + (span - task.first_span) * rows + row) * sums_floats;
        add_span(is_bounded, padded, [&](int64_t d) { return F32x16::load(sums + d); }, sums, scratch.totals);
      }
      finish(row, scratch.totals);
    }
  }

  void finish(int64_t row, const float* total) const {
    const F32x16 inverse = F32x16::broadcast(1.0f / reduce_add(F32x16::load(total + padded)));
    float* out = work.args.out + work.head_at(row);
    for (int64_t d = 0; d < work.head_dim; d += 16) {
      const int n = static_cast<int>(at_most(work.head_dim - d, 16));
      (F32x16::load(total + d) * inverse).store_partial(out + d, n);
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
    return Tile<Dot>{{shape, args, cache, task, table.block_table(task.sequence), attention_scratch(shape)}};
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
