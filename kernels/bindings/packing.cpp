#include "../packing.h"

#include <nanobind/stl/optional.h>

#include <optional>
#include <vector>

#include "bindings.h"

namespace gemma2 {
namespace {

template <class A>
WeightRows weight_rows(const float* float32, const uint16_t* bfloat16, const A& array) {
  return {float32, bfloat16, static_cast<int64_t>(array.shape(0)), static_cast<int64_t>(array.shape(1))};
}

// Returns (Σ (w - rounded w)², Σ w²).
nb::tuple pack(Runtime& runtime, const WeightRows& rows, const std::string& format, Array<uint8_t, 1> out,
          const std::optional<Array<const float, 1>>& importance,
          const std::optional<Array<const float, 2>>& feedback) {
  require(rows.outputs > 0 && rows.inputs > 0, "weights: there must be at least one row and one column");
  require(rows.outputs <= kMaxAxis && rows.inputs <= kMaxAxis,
          "weights: there may be " + std::to_string(kMaxAxis) + " rows and columns at most");
  const Matrix matrix{weight_format(format), rows.outputs, rows.inputs, out.data()};
  require_shape(out, "out", 0, matrix.size_bytes());
  require(reinterpret_cast<uintptr_t>(out.data()) % 64 == 0, "out: a matrix must start at a multiple of 64 bytes");
  const float* weighting = nullptr;
  if (importance) {
    require_shape(*importance, "importance", 0, rows.inputs);
    weighting = importance->data();
    for (int64_t k = 0; k < rows.inputs; ++k) {
      require(weighting[k] >= 0 && weighting[k] < 1e30f, "importance: must be 0 or more and finite, but input " +
                                                             std::to_string(k) + " has " +
                                                             std::to_string(weighting[k]));
    }
  }
  Feedback factors{nullptr, 0};
  if (feedback) {
    require(matrix.format == WeightFormat::q4 || matrix.format == WeightFormat::q8,
            "feedback: is for q4 and q8, whose rounding has errors worth making up for");
    require_shape(*feedback, "feedback", 0, rows.inputs);
    factors = {feedback->data(), static_cast<int64_t>(feedback->shape(1))};
    require(factors.block > 0 && factors.block % kGroup == 0,
            "feedback: blocks must be multiples of " + std::to_string(kGroup) + ", but are " +
                std::to_string(factors.block));
  }
  std::vector<RoundingError> errors(static_cast<size_t>(matrix.num_tiles()));
  int64_t bad_row;
  {
    nb::gil_scoped_release release;
    bad_row = packing_kernels(runtime.isa).pack(runtime.pool, rows, weighting, factors, matrix, out.data(), errors.data());
  }
  require(bad_row < 0, "weights: row " + std::to_string(bad_row) + " holds NaN, infinity or a weight too large for " +
                           format);
  RoundingError total;
  for (const RoundingError& tile : errors) {
    total.error += tile.error;
    total.weight += tile.weight;
  }
  return nb::make_tuple(total.error, total.weight);
}

}  // namespace

void bind_packing(nb::module_& m) {
  const auto bind = [&](auto pack_weights) {
    m.def("pack_matrix", pack_weights, "runtime"_a, "weights"_a.noconvert(), "format"_a, "out"_a.noconvert(),
          "importance"_a.noconvert() = nb::none(), "feedback"_a.noconvert() = nb::none());
  };
  using Importance = std::optional<Array<const float, 1>>;
  using Factors = std::optional<Array<const float, 2>>;
  bind([](Runtime& runtime, Array<const float, 2> weights, const std::string& format, Array<uint8_t, 1> out,
          const Importance& importance, const Factors& feedback) {
    return pack(runtime, weight_rows(weights.data(), nullptr, weights), format, out, importance, feedback);
  });
  bind([](Runtime& runtime, Array<const uint16_t, 2> weights, const std::string& format, Array<uint8_t, 1> out,
          const Importance& importance, const Factors& feedback) {
    return pack(runtime, weight_rows(nullptr, weights.data(), weights), format, out, importance, feedback);
  });
  m.def("unpack_matrix", [](Runtime& runtime, const Matrix& matrix) {
    auto* values = new float[static_cast<size_t>(matrix.outputs * matrix.inputs)];
    nb::capsule owner(values, [](void* p) noexcept { delete[] static_cast<float*>(p); });
    {
      nb::gil_scoped_release release;
      packing_kernels(runtime.isa).unpack(runtime.pool, matrix, values);
    }
    return nb::cast(nb::ndarray<nb::numpy, float, nb::ndim<2>>(
        values, {static_cast<size_t>(matrix.outputs), static_cast<size_t>(matrix.inputs)}, owner));
  }, "runtime"_a, "matrix"_a);
}

}  // namespace gemma2
