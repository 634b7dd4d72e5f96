#include "elementwise.h"

#include "selftest.h"

namespace gemma2::selftest {
namespace {

constexpr float kEpsilon = 1e-6f;

void norm_cases(Runtime& runtime, ActivationFormat format, int64_t rows, int64_t width) {
  Random random(static_cast<uint64_t>(width));
  const std::string name = name_of(format) + " " + std::to_string(rows) + "x" + std::to_string(width);
  std::vector<float> residual = random.normals(rows * width, 5.0f);
  const std::vector<float> y = random.normals(rows * width, 2.0f);
  const std::vector<float> weight = random.normals(width), next_weight = random.normals(width);
  Activations out(format, rows, width);
  const NormKernels& kernels = norm_kernels(runtime.isa);
  kernels.rms_norm(runtime.pool, y.data(), weight.data(), kEpsilon, rows, width, out);
  Hash norm;
  norm.activations(out);
  print("rms_norm " + name, norm);
  kernels.add_rms_norm(runtime.pool, residual.data(), y.data(), weight.data(), kEpsilon, next_weight.data(), rows,
                       width, &out);
  Hash sum;
  sum.activations(out);
  sum.values(residual.data(), rows * width);
  print("add_rms_norm " + name, sum);
}

void activation_cases(Runtime& runtime, ActivationFormat format, int64_t rows, int64_t width) {
  Random random(static_cast<uint64_t>(width) + 1);
  const std::string name = name_of(format) + " " + std::to_string(rows) + "x" + std::to_string(width);
  std::vector<float> x = random.normals(rows * 2 * width, 4.0f);
  Activations out(format, rows, width);
  const ElementwiseKernels& kernels = elementwise_kernels(runtime.isa);
  kernels.geglu(runtime.pool, x.data(), rows, out);
  Hash gated;
  gated.activations(out);
  print("geglu " + name, gated);
  // Extremes: what overflows, is tiny or is no number.
  const float extremes[] = {__builtin_inff(), -__builtin_inff(), __builtin_nanf(""), 3e38f, 1e-41f, -1e-38f, 0.0f};
  for (int64_t i = 0; i < rows * width; i += 131) x[static_cast<size_t>(i)] = extremes[i / 131 % 7];
  kernels.write_activations(runtime.pool, x.data(), rows, out);
  Hash written;
  written.activations(out);
  print("write_activations " + name, written);
}

void soft_cap_cases(Runtime& runtime) {
  // Every 100,003rd float32, bit by bit.
  std::vector<float> x;
  for (uint64_t bits = 0; bits < uint64_t{1} << 32; bits += 100003) {
    const auto word = static_cast<uint32_t>(bits);
    float value;
    std::memcpy(&value, &word, sizeof value);
    x.push_back(value);
  }
  elementwise_kernels(runtime.isa).soft_cap(runtime.pool, x.data(), static_cast<int64_t>(x.size()), 30.0f);
  Hash hash;
  hash.values(x.data(), static_cast<int64_t>(x.size()));
  print("soft_cap", hash);
}

void embed_cases(Runtime& runtime, WeightFormat format) {
  Random random(7);
  const PackedMatrix weights = random_matrix(runtime, format, 75, 200, random);
  std::vector<int32_t> ids(30);
  for (int32_t& id : ids) id = random.below(75);
  std::vector<float> out(30 * 200);
  embedding_kernels(runtime.isa).embed(runtime.pool, weights.matrix, ids.data(), 59.75f, 30, out.data());
  Hash hash;
  hash.values(out.data(), 30 * 200);
  print("embed " + name_of(format), hash);
}

}  // namespace

void elementwise_cases(Runtime& runtime) {
  for (ActivationFormat format : kActivationFormats) {
    for (int64_t width : {1, 17, 64, 130, 2304}) {
      norm_cases(runtime, format, 9, width);
      activation_cases(runtime, format, 9, width);
    }
  }
  soft_cap_cases(runtime);
  for (WeightFormat format : kWeightFormats) embed_cases(runtime, format);
}

}  // namespace gemma2::selftest
