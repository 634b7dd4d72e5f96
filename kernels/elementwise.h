// What works on rows one by one: norms, GeGLU, rows of an embedding, the cap. Formulas and tolerances: isa/norms.cpp,
// isa/elementwise.cpp and isa/embedding.cpp.
//
// Every float array is dense: rows follow each other without gaps. `out.rows` is set to the rows written.
#pragma once

#include "activations.h"
#include "dispatch.h"
#include "matrix.h"

namespace gemma2 {

struct NormKernels {
  // out[row] = norm(x[row], weight), norm(x, w) = x / sqrt(mean(x²) + epsilon) · (1 + w)
  void (*rms_norm)(ThreadPool&, const float* x, const float* weight, float epsilon, int64_t rows, int64_t width,
                   Activations& out);
  // residual[row] += norm(y[row], post_weight), then out[row] = norm(residual[row], next_weight); out may be null.
  void (*add_rms_norm)(ThreadPool&, float* residual, const float* y, const float* post_weight, float epsilon,
                       const float* next_weight, int64_t rows, int64_t width, Activations* out);
};
GEMMA2_DECLARE_KERNELS(NormKernels, norm_kernels)

struct ElementwiseKernels {
  // out[row][k] = gelu_tanh(gate[row][k]) · up[row][k], for rows of out.width values of gate followed by as many of up
  void (*geglu)(ThreadPool&, const float* gate_up, int64_t rows, Activations& out);
  // out[row] = x[row], for rows of out.width
  void (*write_activations)(ThreadPool&, const float* x, int64_t rows, Activations& out);
  // x = cap · tanh(x / cap), in place
  void (*soft_cap)(ThreadPool&, float* x, int64_t size, float cap);
};
GEMMA2_DECLARE_KERNELS(ElementwiseKernels, elementwise_kernels)

struct EmbeddingKernels {
  // out[row] = scale · output ids[row] of the matrix, as (rows, matrix.inputs) float32; ids must be below its outputs
  void (*embed)(ThreadPool&, const Matrix& matrix, const int32_t* ids, float scale, int64_t rows, float* out);
};
GEMMA2_DECLARE_KERNELS(EmbeddingKernels, embedding_kernels)

}  // namespace gemma2
