// Packing, and products in every format: rows from one to more than a register tile, outputs and inputs that fill no
// tile or group.
#include "elementwise.h"
#include "float_matmul.h"
#include "packing.h"
#include "quantized_matmul.h"
#include "selected_outputs.h"
#include "selftest.h"

namespace gemma2::selftest {
namespace {

PackedMatrix packed(Runtime& runtime, WeightFormat format, int64_t outputs, int64_t inputs,
                    const std::vector<float>& weights, const float* importance, const Feedback& feedback) {
  Matrix matrix{format, outputs, inputs, nullptr};
  AlignedArray<uint8_t> data = aligned_zeros<uint8_t>(matrix.size_bytes());
  matrix.data = data.get();
  const WeightRows rows{weights.data(), nullptr, outputs, inputs};
  std::vector<RoundingError> errors(static_cast<size_t>(matrix.num_tiles()));
  packing_kernels(runtime.isa).pack(runtime.pool, rows, importance, feedback, matrix, data.get(), errors.data());
  return {std::move(data), matrix};
}

}  // namespace

PackedMatrix random_matrix(Runtime& runtime, WeightFormat format, int64_t outputs, int64_t inputs, Random& random) {
  return packed(runtime, format, outputs, inputs, random.normals(outputs * inputs, 0.05f), nullptr, {nullptr, 0});
}

namespace {

void packing_cases(Runtime& runtime, WeightFormat format, int64_t outputs, int64_t inputs, Random& random) {
  const std::vector<float> weights = random.normals(outputs * inputs, 0.05f);
  std::vector<float> importance = random.normals(inputs);
  for (float& value : importance) value *= value;
  const bool is_quantized = format == WeightFormat::q4 || format == WeightFormat::q8;
  const std::vector<float> factors = random.normals(inputs * 128, 0.03f);
  Hash hash;
  for (const float* weighting : {static_cast<const float*>(nullptr), static_cast<const float*>(importance.data())}) {
    for (const Feedback feedback : {Feedback{nullptr, 0}, Feedback{factors.data(), 128}}) {
      if (feedback.factors != nullptr && !is_quantized) continue;
      const PackedMatrix made = packed(runtime, format, outputs, inputs, weights, weighting, feedback);
      hash.bytes(made.data.get(), static_cast<size_t>(made.matrix.size_bytes()));
      std::vector<float> unpacked(static_cast<size_t>(outputs * inputs));
      packing_kernels(runtime.isa).unpack(runtime.pool, made.matrix, unpacked.data());
      hash.values(unpacked.data(), outputs * inputs);
    }
  }
  print("pack " + name_of(format) + " " + std::to_string(outputs) + "x" + std::to_string(inputs), hash);
}

void product_cases(Runtime& runtime, WeightFormat format, int64_t outputs, int64_t inputs, Random& random) {
  const PackedMatrix weights = random_matrix(runtime, format, outputs, inputs, random);
  const Matrix& matrix = weights.matrix;
  Hash hash;
  for (int64_t rows : {1, 2, 3, 5, 8, 13, 37}) {
    Activations x(matrix.activation_format(), rows, inputs);
    const std::vector<float> values = random.normals(rows * inputs, 3.0f);
    elementwise_kernels(runtime.isa).write_activations(runtime.pool, values.data(), rows, x);
    std::vector<float> out(static_cast<size_t>(rows * outputs));
    if (x.format == ActivationFormat::int8) {
      quantized_matmul_kernels(runtime.isa).multiply(runtime.pool, x, matrix, out.data());
      constexpr int64_t kCount = 5;
      std::vector<int32_t> ids(static_cast<size_t>(rows * kCount));
      for (int32_t& id : ids) id = random.below(static_cast<int32_t>(outputs));
      std::vector<float> selected = random.normals(rows * kCount);
      selected_outputs_kernels(runtime.isa).add(runtime.pool, x, matrix, ids.data(), kCount, selected.data());
      hash.values(selected.data(), rows * kCount);
    } else {
      float_matmul_kernels(runtime.isa).float_matmul(runtime.pool, x, matrix, out.data());
    }
    hash.values(out.data(), rows * outputs);
  }
  print("matmul " + name_of(format) + " " + std::to_string(outputs) + "x" + std::to_string(inputs), hash);
}

}  // namespace

void matmul_cases(Runtime& runtime) {
  constexpr int64_t kShapes[][2] = {{1, 1}, {70, 200}, {160, 576}};
  for (WeightFormat format : kWeightFormats) {
    for (const auto& shape : kShapes) {
      Random random(static_cast<uint64_t>(shape[0] * shape[1]));
      packing_cases(runtime, format, shape[0], shape[1], random);
      product_cases(runtime, format, shape[0], shape[1], random);
    }
  }
}

}  // namespace gemma2::selftest
