// Rows of logits.
//
//   softmax weights   w = exp((x - max) / T), each within 1.1 ulp of the rounded quotient's exact power; 0 below e^-87.33.
//                     T is held in 1e-30 … 1e30, beyond which it is greedy, or uniform, all the same.
//   softmax           w · (1 / sum): two roundings more
//   log normalizer    max + log(sum(exp(x - max)))
//
// Sums are taken in float64, in 16 lanes: what they add to the error of the weights is below 2⁻⁴⁰. NaN or +inf in a row,
// or a row of -inf alone, gives a sum, normalizer and probabilities of NaN.
#include "vocabulary.h"

#include <cmath>

#include "simd.h"
#include "simd_math.h"

namespace gemma2::GEMMA2_ISA {
namespace {

// Calls f(vector, i, n) for 16 values at i … i + n - 1; the missing lanes of the last are `fill`.
template <class F>
inline void for_vectors(const float* x, int64_t size, F32x16 fill, F&& f) {
  int64_t i = 0;
  for (; i + kLanes <= size; i += kLanes) f(F32x16::load(x + i), i, kLanes);
  if (i < size) {
    const int n = static_cast<int>(size - i);
    f(select(first_lanes(n), F32x16::load_partial(x + i, n), fill), i, n);
  }
}

F32x16 lowest() { return F32x16::broadcast(-__builtin_inff()); }

// NaN is passed over: it comes back in the exponential.
float maximum(const float* x, int64_t size) {
  F32x16 most[4] = {lowest(), lowest(), lowest(), lowest()};
  int64_t i = 0;
  for (; i + 4 * kLanes <= size; i += 4 * kLanes) {
    for (int j = 0; j < 4; ++j) most[j] = max(F32x16::load(x + i + j * kLanes), most[j]);
  }
  for_vectors(x + i, size - i, lowest(), [&](F32x16 v, int64_t, int) { most[0] = max(v, most[0]); });
  return reduce_max(max(max(most[0], most[1]), max(most[2], most[3])));
}

// Passes exp((x - most) / temperature) to f(weights, i, n), 16 at a time, with 0 in missing lanes. Returns the sum.
template <class F>
double exponentials(const float* x, int64_t size, float most, double temperature, F&& f) {
  const F32x16 subtrahend = F32x16::broadcast(most);
  F64x16 sum = F64x16::zero();
  const auto add = [&](F32x16 weights, int64_t i, int n) {
    sum = sum + weights;
    f(weights, i, n);
  };
  if (temperature == 1.0) {
    for_vectors(x, size, lowest(), [&](F32x16 v, int64_t i, int n) { add(exp(v - subtrahend), i, n); });
  } else {
    const double held = temperature < 1e-30 ? 1e-30 : temperature > 1e30 ? 1e30 : temperature;
    const F32x16 divisor = F32x16::broadcast(static_cast<float>(held));
    for_vectors(x, size, lowest(), [&](F32x16 v, int64_t i, int n) { add(exp((v - subtrahend) / divisor), i, n); });
  }
  return reduce_add(sum);
}

void store(F32x16 v, float* p, int n) {
  if (n == kLanes) {
    v.store(p);
  } else {
    v.store_partial(p, n);
  }
}

void softmax_weights(ThreadPool& pool, const Rows& x, double temperature, float* out) {
  pool.parallel_for(x.rows, [&](int64_t row, int) {
    float* to = out + row * x.width;
    exponentials(x.row(row), x.width, maximum(x.row(row), x.width), temperature,
                 [=](F32x16 v, int64_t i, int n) { store(v, to + i, n); });
  });
}

void softmax(ThreadPool& pool, const Rows& x, double temperature, float* out) {
  pool.parallel_for(x.rows, [&](int64_t row, int) {
    float* to = out + row * x.width;
    const double sum = exponentials(x.row(row), x.width, maximum(x.row(row), x.width), temperature,
                                    [=](F32x16 v, int64_t i, int n) { store(v, to + i, n); });
    const F32x16 factor = F32x16::broadcast(static_cast<float>(1.0 / sum));
    for_vectors(to, x.width, F32x16::zero(), [=](F32x16 v, int64_t i, int n) { store(v * factor, to + i, n); });
  });
}

void log_normalizers(ThreadPool& pool, const Rows& x, double* out) {
  pool.parallel_for(x.rows, [&](int64_t row, int) {
    const float most = maximum(x.row(row), x.width);
    const double sum = exponentials(x.row(row), x.width, most, 1.0, [](F32x16, int64_t, int) {});
    out[row] = static_cast<double>(most) + std::log(sum);
  });
}

void block_sums(const float* x, int64_t size, int64_t block, double* out) {
  for (int64_t start = 0; start < size; start += block) {
    const int64_t end = start + block < size ? start + block : size;
    F64x16 sum = F64x16::zero();
    for_vectors(x + start, end - start, F32x16::zero(), [&](F32x16 v, int64_t, int) { sum = sum + v; });
    out[start / block] = reduce_add(sum);
  }
}

void chunk_maxima(const float* x, int64_t size, int64_t vectors_per_chunk, float* maxima) {
  const int64_t chunk = vectors_per_chunk * kLanes;
  for (int64_t start = 0; start < size; start += chunk, maxima += kLanes) {
    const int64_t end = start + chunk < size ? start + chunk : size;
    F32x16 most[4] = {lowest(), lowest(), lowest(), lowest()};
    int64_t i = start;
    for (; i + 4 * kLanes <= end; i += 4 * kLanes) {
      for (int j = 0; j < 4; ++j) most[j] = max(F32x16::load(x + i + j * kLanes), most[j]);
    }
    for_vectors(x + i, end - i, lowest(), [&](F32x16 v, int64_t, int) { most[0] = max(v, most[0]); });
    max(max(most[0], most[1]), max(most[2], most[3])).store(maxima);
  }
}

int64_t indices_at_least(const float* x, int64_t size, float bound, int32_t* indices) {
  const F32x16 least = F32x16::broadcast(bound), nan = F32x16::broadcast(__builtin_nanf(""));
  int64_t count = 0;
  for_vectors(x, size, nan, [&](F32x16 v, int64_t i, int) {
    for (uint32_t bits = to_bits(v >= least); bits != 0; bits &= bits - 1) {
      indices[count++] = static_cast<int32_t>(i) + __builtin_ctz(bits);
    }
  });
  return count;
}

}  // namespace

const VocabularyKernels& vocabulary_kernels() {
  static constexpr VocabularyKernels kernels{.softmax_weights = softmax_weights,
                                             .softmax = softmax,
                                             .log_normalizers = log_normalizers,
                                             .block_sums = block_sums,
                                             .chunk_maxima = chunk_maxima,
                                             .indices_at_least = indices_at_least};
  return kernels;
}

}  // namespace gemma2::GEMMA2_ISA
