// What works on rows one by one: norms, GeGLU, embedding, the cap. Formulas and tolerances: isa/elementwise.cpp.
#pragma once

#include "activations.h"
#include "dispatch.h"
#include "matrix.h"

namespace gemma2 {

struct ElementwiseKernels {
  // out[row] = x[row] / sqrt(mean(x[row]²) + epsilon) · (1 + weight)
  void (*rms_norm)(ThreadPool&, const float* x, const float* weight, float epsilon, int64_t rows, int64_t width,
                   Activations& out);
};
GEMMA2_DECLARE_KERNELS(ElementwiseKernels, elementwise_kernels)

}  // namespace gemma2
