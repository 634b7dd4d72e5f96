// Kernels on rows.
//
// rms_norm: y = x / sqrt(mean(x²) + epsilon) · (1 + weight), all in float32 and rounded once at the end, as
// Hugging Face's Gemma2RMSNorm and gemma_pytorch do. The sum of squares runs in 4 × 16 lanes, tails read as 0:
// relative error at most (width / 64 + 8) · 2⁻²⁴.
#include "elementwise.h"

#include <cmath>

#include "activation_rows.h"
#include "simd.h"

namespace gemma2::GEMMA2_ISA {
namespace {

float sum_of_squares(const float* x, int64_t width) {
  F32x16 sums[4] = {F32x16::zero(), F32x16::zero(), F32x16::zero(), F32x16::zero()};
  int64_t k = 0;
  for (; k + 64 <= width; k += 64) {
    for (int i = 0; i < 4; ++i) {
      const F32x16 v = F32x16::load(x + k + i * 16);
      sums[i] = fma(v, v, sums[i]);
    }
  }
  for (int i = 0; k < width; k += 16, ++i) {
    const F32x16 v = F32x16::load_partial(x + k, static_cast<int>(width - k < 16 ? width - k : 16));
    sums[i] = fma(v, v, sums[i]);
  }
  return reduce_add((sums[0] + sums[1]) + (sums[2] + sums[3]));
}

void rms_norm(ThreadPool& pool, const float* x, const float* weight, float epsilon, int64_t rows, int64_t width,
              Activations& out) {
  out.rows = rows;
  pool.parallel_for(rows, [&](int64_t row, int) {
    const float* in = x + row * width;
    const float mean = sum_of_squares(in, width) / static_cast<float>(width);
    const F32x16 inverse = F32x16::broadcast(1.0f / std::sqrt(mean + epsilon)), one = F32x16::broadcast(1.0f);
    write_row(out, row, [&](int64_t k, int n) {
      return F32x16::load_partial(in + k, n) * inverse * (one + F32x16::load_partial(weight + k, n));
    });
  });
}

}  // namespace

const ElementwiseKernels& elementwise_kernels() {
  static constexpr ElementwiseKernels kernels{.rms_norm = rms_norm};
  return kernels;
}

}  // namespace gemma2::GEMMA2_ISA
