// The product of int8 activations with 4- or 8-bit weights. Formula, order of sums: isa/quantized_matmul.cpp.
#pragma once

#include "activations.h"
#include "dispatch.h"
#include "matrix.h"

namespace gemma2 {

struct QuantizedMatmulKernels {
  // out (x.rows, w.outputs) = x · Wᵀ; x is int8, w is q4 or q8, their widths are equal.
  void (*multiply)(ThreadPool&, const Activations& x, const Matrix& w, float* out);
};
GEMMA2_DECLARE_KERNELS(QuantizedMatmulKernels, quantized_matmul_kernels)

}  // namespace gemma2
