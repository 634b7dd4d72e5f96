// The product with a few rows of a weight matrix, chosen for each row of activations. Formula: isa/selected_outputs.cpp.
#pragma once

#include "activations.h"
#include "dispatch.h"
#include "matrix.h"

namespace gemma2 {

struct SelectedOutputsKernels {
  // values[row][i] += x[row] · w[ids[row][i]] for count ids in each row; x is int8, w is q4 or q8.
  void (*add)(ThreadPool&, const Activations& x, const Matrix& w, const int32_t* ids, int64_t count, float* values);
};
GEMMA2_DECLARE_KERNELS(SelectedOutputsKernels, selected_outputs_kernels)

}  // namespace gemma2
