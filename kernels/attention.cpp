#include "attention.h"

#include <algorithm>

namespace gemma2 {
namespace {

// Below this many multiplications a loop over threads costs more than it saves.
constexpr int64_t kTinyWork = 200'000;
// A task may take this part of what each thread has to do. Smaller parts even out better but must be merged.
constexpr int64_t kTasksPerThread = 4;

}  // namespace

void plan_append(const BatchTable& table, AttentionPlan& plan) {
  plan.tasks.clear();
  for (int64_t i = 0; i < table.num_sequences(); ++i) {
    int64_t row = table.row_starts[i], position = table.positions[i];
    while (row < table.row_starts[i + 1]) {
      const int64_t n = std::min<int64_t>(kBlockTokens - position % kBlockTokens, table.row_starts[i + 1] - row);
      plan.tasks.push_back({.sequence = i,
                            .kv_head = 0,
                            .first_row = row,
                            .num_tokens = n,
                            .position = position,
                            .first_span = 0,
                            .last_span = 0,
                            .partial = -1,
                            .cost = n});
      row += n;
      position += n;
    }
  }
}

void plan_attention(const BatchTable& table, const AttentionShape& shape, int64_t window, int num_threads,
                    AttentionPlan& plan) {
  // Tiles of one key/value head; the cost is the number of scores of one query head.
  std::vector<AttentionTask>& tiles = plan.merges;
  tiles.clear();
  int64_t total = 0;
  for (int64_t i = 0; i < table.num_sequences(); ++i) {
    const int64_t num_tokens = table.num_tokens(i);
    for (int64_t first = 0; first < num_tokens; first += shape.tile_tokens()) {
      const int64_t n = std::min(shape.tile_tokens(), num_tokens - first), position = table.positions[i] + first;
      const int64_t first_key = window > 0 ? std::max<int64_t>(0, position - window + 1) : 0;
      const int64_t last_key = position + n - 1;
      const int64_t cost = (last_key - first_key + 1) * n;
      total += cost;
      tiles.push_back({.sequence = i,
                       .kv_head = 0,
                       .first_row = table.row_starts[i] + first,
                       .num_tokens = n,
                       .position = position,
                       .first_span = first_key / kSpanTokens,
                       .last_span = last_key / kSpanTokens,
                       .partial = -1,
                       .cost = cost});
    }
  }
  std::sort(tiles.begin(), tiles.end(), [](const AttentionTask& a, const AttentionTask& b) { return a.cost > b.cost; });

  plan.is_tiny = num_threads == 1 || total * shape.num_heads * shape.layout.head_dim * 2 < kTinyWork;
  plan.tasks.clear();
  plan.num_partials = 0;
  const int64_t limit = total * shape.layout.kv_heads / (num_threads * kTasksPerThread);
  const auto is_split = [&](const AttentionTask& task) {
    return !plan.is_tiny && task.cost > limit && task.first_span < task.last_span;
  };
  for (int64_t kv_head = 0; kv_head < shape.layout.kv_heads; ++kv_head) {
    for (AttentionTask task : tiles) {
      task.kv_head = kv_head;
      if (!is_split(task)) {
        plan.tasks.push_back(task);
        continue;
      }
      for (int64_t span = task.first_span; span <= task.last_span; ++span) {
        AttentionTask part = task;
        part.first_span = part.last_span = span;
        part.partial = plan.num_partials;
        plan.tasks.push_back(part);
        plan.num_partials += task.num_tokens * shape.group();
      }
    }
  }
  // The tiles that were split, once more, for the merge: parts of a tile lie in the order of its spans.
  std::vector<AttentionTask> whole;
  int64_t partial = 0;
  for (int64_t kv_head = 0; kv_head < shape.layout.kv_heads && plan.num_partials > 0; ++kv_head) {
    for (AttentionTask task : tiles) {
      if (!is_split(task)) continue;
      task.kv_head = kv_head;
      task.partial = partial;
      partial += (task.last_span - task.first_span + 1) * task.num_tokens * shape.group();
      whole.push_back(task);
    }
  }
  plan.merges.swap(whole);
}

AttentionScratch& attention_scratch(const AttentionShape& shape) {
  thread_local AttentionScratch scratch;
  const int64_t rows = shape.tile_rows(), lines = rows * shape.planes(), pack = shape.layout.pack();
  int64_t size = 0;
  // Twice: to measure, and to hand out.
  for (int pass = 0; pass < 2; ++pass) {
    if (pass == 1 && size > scratch.size) {
      scratch.memory = aligned_zeros<uint8_t>(size);
      scratch.size = size;
    }
    size = 0;
    const auto take = [&](auto*& pointer, int64_t n) {
      pointer = reinterpret_cast<std::remove_reference_t<decltype(pointer)>>(scratch.memory.get() + size);
      size += round_up(n * 4, 64);
    };
    take(scratch.queries, lines * shape.layout.key_steps());
    take(scratch.query_scales, rows);
    take(scratch.query_sums, lines);
    take(scratch.scores, lines * kSpanTokens);
    take(scratch.weights, lines * kSpanTokens / pack);
    take(scratch.weight_sums, lines);
    take(scratch.weight_scales, rows);
    take(scratch.span_values, lines * shape.padded_head_dim());
    take(scratch.span_sums, rows * shape.sums_floats());
    take(scratch.totals, rows * shape.sums_floats());
    take(scratch.row, round_up(shape.layout.head_dim, 64));
    take(scratch.dwords, round_up(shape.layout.head_dim, 64));
  }
  return scratch;
}

void reserve_partials(const AttentionShape& shape, AttentionScratch& scratch) {
  const int64_t size = scratch.plan.num_partials * shape.sums_floats() * 4;
  if (size > scratch.partial_size) {
    scratch.partial_memory = aligned_zeros<uint8_t>(size);
    scratch.partial_size = size;
  }
  scratch.partials = reinterpret_cast<float*>(scratch.partial_memory.get());
}

}  // namespace gemma2
