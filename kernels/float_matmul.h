// Products with float32 and bfloat16 weights. Formulas, blocking and tolerances: isa/float_matmul.cpp.
#pragma once

#include "activations.h"
#include "dispatch.h"
#include "matrix.h"

namespace gemma2 {

struct FloatMatmulKernels {
  // out[row][j] = Σ x[row][k] · w[j][k], for the rows in use of x; out is (x.rows, w.outputs). w is float32 or bfloat16
  // and x of w.activation_format().
  void (*float_matmul)(ThreadPool&, const Activations& x, const Matrix& w, float* out);
};
GEMMA2_DECLARE_KERNELS(FloatMatmulKernels, float_matmul_kernels)

}  // namespace gemma2
