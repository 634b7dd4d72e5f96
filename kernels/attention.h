// Attention over a paged cache. Formulas, orders of sums and tolerances: isa/attention.cpp; writing: isa/kv_cache.cpp.
#pragma once

#include <vector>

#include "dispatch.h"
#include "kv_cache.h"

namespace gemma2 {

constexpr int kSpanTokens = 256;  // keys whose weighted values are summed by themselves, by absolute position
constexpr int kSpanBlocks = kSpanTokens / kBlockTokens;
constexpr int kMaxTileRows = 96;  // rows (token and head) that share a pass over a span: scores and weights fit L2

// Part of a forward pass's attention: some tokens of a sequence, one key/value head, some spans.
struct AttentionTask {
  int64_t sequence, kv_head;
  int64_t first_row, num_tokens;  // of the pass
  int64_t position;               // of the first token
  int64_t first_span, last_span;  // both included
  // Where the sums of its spans go, or -1 if it does all spans and writes the result: [span][token and head].
  int64_t partial;
  int64_t cost;
};

// Query heads that share a key/value head, and how they are cut into tiles.
struct AttentionShape {
  CacheLayout layout;
  int64_t num_heads;

  int64_t group() const { return num_heads / layout.kv_heads; }
  // int8 queries and weights are two planes: x = scale · (128 · high + low).
  int planes() const { return layout.type == CacheType::int8 ? 2 : 1; }
  int64_t tile_tokens() const { return group() >= kMaxTileRows ? 1 : kMaxTileRows / group(); }
  int64_t tile_rows() const { return tile_tokens() * group(); }
  int64_t padded_head_dim() const { return layout.dim_tiles() * 16; }
  // Of one row and span: the weighted sum of values, 16 lanes of the sum of weights, the shift of the exponents.
  int64_t sums_floats() const { return padded_head_dim() + 32; }
};

// Which tiles of queries meet which spans, the most expensive ones first. A tile whose work would keep one thread busy
// while the others are done is split into its spans, and their sums are merged later. No sum depends on the plan.
struct AttentionPlan {
  std::vector<AttentionTask> tasks;
  std::vector<AttentionTask> merges;
  int64_t num_partials;  // rows of sums
  bool is_tiny;          // not worth handing out
};
void plan_attention(const BatchTable& table, const AttentionShape& shape, int64_t window, int num_threads,
                    AttentionPlan& plan);
// One task per block that the pass writes to.
void plan_append(const BatchTable& table, AttentionPlan& plan);

// Memory of a thread, kept from call to call.
struct AttentionScratch {
  AttentionPlan plan;       // of a call by this thread
  float* partials;          // [plan.num_partials][sums_floats], likewise
  uint32_t* queries;        // [row][plane][key_steps]
  float* query_scales;      // [row]
  int32_t* query_sums;      // [row][plane]
  uint32_t* scores;         // [row][plane][span tokens] float32 or int32
  uint32_t* weights;        // [row][plane][span tokens / pack]
  int32_t* weight_sums;     // [row][plane]
  float* weight_scales;     // [row]
  uint32_t* span_values;    // [row][plane][padded_head_dim] float32 or int32
  float* span_sums;         // [row][sums_floats]
  float* totals;            // [row][sums_floats]
  float* row;               // one head of one row
  uint32_t* dwords;         // the same, packed

  AlignedArray<uint8_t> memory, partial_memory;
  int64_t size = 0, partial_size = 0;
};
// The calling thread's scratch, with room for a tile of this shape, and for the partial sums of its plan.
AttentionScratch& attention_scratch(const AttentionShape& shape);
void reserve_partials(const AttentionShape& shape, AttentionScratch& scratch);

struct AppendArguments {
  const float* qkv;  // (rows, (num_heads + 2 · kv_heads) · head_dim)
  const float* cos;  // (rows, head_dim / 2)
  const float* sin;
  float query_scale;
  float* queries;  // (rows, num_heads · head_dim)
};

struct AttendArguments {
  const float* queries;  // (rows, num_heads · head_dim)
  int64_t window;        // tokens that a query sees, itself included; 0 for all
  float cap;             // 0 for none
  float* out;            // (rows, num_heads · head_dim)
};

struct AttentionKernels {
  void (*append_kv)(ThreadPool&, const AttentionShape&, const AppendArguments&, const BatchTable&, const KVCache&);
  void (*attend)(ThreadPool&, const AttentionShape&, const AttendArguments&, const BatchTable&, const KVCache&);
};
GEMMA2_DECLARE_KERNELS(AttentionKernels, attention_kernels)

}  // namespace gemma2
