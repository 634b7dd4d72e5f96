// RMSNorm, alone and with the residual addition before it.
//
//   norm(x, w) = x / sqrt(mean(x²) + epsilon) · (1 + w)
//
// All in float32 and rounded once at the end, as Hugging Face's Gemma2RMSNorm and gemma_pytorch do. The sum of squares
// runs in 4 × 16 lanes, tails read as 0: relative error at most (width / 64 + 8) · 2⁻²⁴, half of which reaches the
// result; the rest of the formula adds at most 5 · 2⁻²⁴.
#include <cmath>

#include "activation_rows.h"
#include "elementwise.h"
#include "simd.h"
#include "work_split.h"

namespace gemma2::GEMMA2_ISA {
namespace {

// A row of 2304 takes about 0.3 µs of norm and as much of writing; a task of a few µs is worth another thread.
constexpr int64_t kValuesPerTask = 16384;

int64_t rows_per_task(int64_t width) { return 1 + kValuesPerTask / (width + 1); }

// 1 / sqrt(mean(x²) + epsilon) of the values that at(k, n) gives 16 at a time.
template <class At>
float inverse_root_mean_square(int64_t width, float epsilon, At&& at) {
  F32x16 sums[4] = {F32x16::zero(), F32x16::zero(), F32x16::zero(), F32x16::zero()};
  int64_t k = 0;
  for (; k + 64 <= width; k += 64) {
    for (int i = 0; i < 4; ++i) {
      const F32x16 v = at(k + i * kLanes, kLanes);
      sums[i] = fma(v, v, sums[i]);
    }
  }
  for (int i = 0; i < 4 && k < width; ++i, k += kLanes) {
    const F32x16 v = at(k, static_cast<int>(width - k < kLanes ? width - k : kLanes));
    sums[i] = fma(v, v, sums[i]);
  }
  const float mean = reduce_add((sums[0] + sums[1]) + (sums[2] + sums[3])) / static_cast<float>(width);
  return 1.0f / std::sqrt(mean + epsilon);
}

F32x16 load(const float* p, int n) { return n == kLanes ? F32x16::load(p) : F32x16::load_partial(p, n); }

void store(F32x16 x, float* p, int n) {
  if (n == kLanes) {
    x.store(p);
  } else {
    x.store_partial(p, n);
  }
}

F32x16 scaled(F32x16 x, F32x16 inverse, F32x16 weight) { return x * inverse * (F32x16::broadcast(1.0f) + weight); }

void rms_norm(ThreadPool& pool, const float* x, const float* weight, float epsilon, int64_t rows, int64_t width,
              Activations& out) {
  out.rows = rows;
  for_ranges(pool, rows, rows_per_task(width), [&](int64_t first, int64_t last) {
    for (int64_t row = first; row < last; ++row) {
      const float* in = x + row * width;
      const F32x16 inverse = F32x16::broadcast(
          inverse_root_mean_square(width, epsilon, [&](int64_t k, int n) { return load(in + k, n); }));
      write_row(out, row, [&](int64_t k, int n) { return scaled(load(in + k, n), inverse, load(weight + k, n)); });
    }
  });
}

void add_rms_norm(ThreadPool& pool, float* residual, const float* y, const float* post_weight, float epsilon,
                  const float* next_weight, int64_t rows, int64_t width, Activations* out) {
  if (out != nullptr) out->rows = rows;
  for_ranges(pool, rows, rows_per_task(width), [&](int64_t first, int64_t last) {
    for (int64_t row = first; row < last; ++row) {
      const float* in = y + row * width;
      float* sum = residual + row * width;
      const F32x16 inverse = F32x16::broadcast(
          inverse_root_mean_square(width, epsilon, [&](int64_t k, int n) { return load(in + k, n); }));
      const F32x16 next_inverse =
          F32x16::broadcast(inverse_root_mean_square(width, epsilon, [&](int64_t k, int n) {
            const F32x16 v = load(sum + k, n) + scaled(load(in + k, n), inverse, load(post_weight + k, n));
            store(v, sum + k, n);
            return v;
          }));
      if (out == nullptr) continue;
      write_row(*out, row,
                [&](int64_t k, int n) { return scaled(load(sum + k, n), next_inverse, load(next_weight + k, n)); });
    }
  });
}

}  // namespace

const NormKernels& norm_kernels() {
  static constexpr NormKernels kernels{.rms_norm = rms_norm, .add_rms_norm = add_rms_norm};
  return kernels;
}

}  // namespace gemma2::GEMMA2_ISA
