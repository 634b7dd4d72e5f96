// What is done with a row of logits: the largest k, softmax, its normalizer, sums of blocks, the nucleus. Formulas,
// accumulation and tolerances: isa/vocabulary.cpp; the selections: vocabulary.cpp and nucleus.cpp.
//
// A row starts `stride` floats after the one before it, so that a row may be wider than what is used of it.
#pragma once

#include <cstdint>

#include "dispatch.h"

namespace gemma2 {

struct Rows {
  const float* data;
  int64_t rows, width, stride;

  const float* row(int64_t i) const { return data + i * stride; }
};

struct VocabularyKernels {
  // out[row][i] = exp((x[row][i] - max) / temperature): a softmax before it is normalized. out is dense.
  void (*softmax_weights)(ThreadPool&, const Rows& x, double temperature, float* out);
  // The same, divided by the row's sum.
  void (*softmax)(ThreadPool&, const Rows& x, double temperature, float* out);
  // out[row] = log(sum(exp(x[row])))
  void (*log_normalizers)(ThreadPool&, const Rows& x, double* out);
  // out[i] = the sum of x[i · block] … x[(i + 1) · block - 1], the last block as long as what is left
  void (*block_sums)(const float* x, int64_t size, int64_t block, double* out);

  // The two loops of `top_k`. Lane i of maxima[c] is the largest of lanes i of `vectors_per_chunk` vectors of chunk c;
  // NaN counts as -inf, and so does what lies beyond the end.
  void (*chunk_maxima)(const float* x, int64_t size, int64_t vectors_per_chunk, float* maxima);
  // Writes those indices of x[0] … x[size - 1] whose value is at least `bound`, ascending, and returns how many.
  int64_t (*indices_at_least)(const float* x, int64_t size, float bound, int32_t* indices);
};
GEMMA2_DECLARE_KERNELS(VocabularyKernels, vocabulary_kernels)

// For each row the k largest values, descending, and their indices; equal values by ascending index. NaN counts as less
// than -inf. ids, values: (x.rows, k); 1 <= k <= x.width < 2³¹.
void top_k(Runtime&, const Rows& x, int64_t k, int32_t* ids, float* values);

// Writes the indices, ascending, of the fewest largest weights that sum to at least `fraction` of all, of equal ones the
// first, and returns how many. weights: none negative or NaN, one above 0; ids: (size,), 1 <= size < 2³¹;
// 0 < fraction <= 1.
int64_t nucleus(Runtime&, const float* weights, int64_t size, double fraction, int32_t* ids);

}  // namespace gemma2
