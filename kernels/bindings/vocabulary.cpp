#include "../vocabulary.h"

#include "bindings.h"

namespace gemma2 {
namespace {

// Rows of neighbouring floats, with any distance between them.
using FloatRows = nb::ndarray<const float, nb::ndim<2>, nb::device::cpu>;

Rows rows_of(const FloatRows& x, const char* name) {
  require(x.shape(1) > 0, std::string(name) + ": the rows must not be empty");
  require(x.shape(1) < (size_t{1} << 31), std::string(name) + ": the rows are too long");
  require(x.shape(1) == 1 || x.stride(1) == 1, std::string(name) + ": the values of a row must be neighbours");
  return {x.data(), static_cast<int64_t>(x.shape(0)), static_cast<int64_t>(x.shape(1)), x.stride(0)};
}

void top_k_rows(Runtime& runtime, FloatRows logits, int64_t k, Array<int32_t, 2> ids, Array<float, 2> values) {
  const Rows x = rows_of(logits, "logits");
  require(k >= 1 && k <= x.width, "k must be from 1 to " + std::to_string(x.width) + ", but is " + std::to_string(k));
  require_shape(ids, "ids", 0, x.rows);
  require_shape(ids, "ids", 1, k);
  require_shape(values, "values", 0, x.rows);
  require_shape(values, "values", 1, k);
  nb::gil_scoped_release release;
  top_k(runtime, x, k, ids.data(), values.data());
}

void softmax_weights(Runtime& runtime, FloatRows logits, double temperature, Array<float, 2> out) {
  const Rows x = rows_of(logits, "logits");
  require(temperature > 0, "temperature must be above 0, but is " + std::to_string(temperature));
  require_shape(out, "out", 0, x.rows);
  require_shape(out, "out", 1, x.width);
  nb::gil_scoped_release release;
  vocabulary_kernels(runtime.isa).softmax_weights(runtime.pool, x, temperature, out.data());
}

void softmax(Runtime& runtime, FloatRows logits, double temperature, Array<float, 2> out) {
  const Rows x = rows_of(logits, "logits");
  require(temperature > 0, "temperature must be above 0, but is " + std::to_string(temperature));
  require_shape(out, "out", 0, x.rows);
  require_shape(out, "out", 1, x.width);
  nb::gil_scoped_release release;
  vocabulary_kernels(runtime.isa).softmax(runtime.pool, x, temperature, out.data());
}

void log_normalizers(Runtime& runtime, FloatRows logits, Array<double, 1> out) {
  const Rows x = rows_of(logits, "logits");
  require_shape(out, "out", 0, x.rows);
  nb::gil_scoped_release release;
  vocabulary_kernels(runtime.isa).log_normalizers(runtime.pool, x, out.data());
}

void block_sums(Runtime& runtime, Array<const float, 1> x, int64_t block, Array<double, 1> out) {
  require(block >= 1, "block must be at least 1, but is " + std::to_string(block));
  const int64_t size = static_cast<int64_t>(x.shape(0));
  require_shape(out, "out", 0, size / block + (size % block != 0));
  nb::gil_scoped_release release;
  vocabulary_kernels(runtime.isa).block_sums(x.data(), size, block, out.data());
}

int64_t nucleus_of(Runtime& runtime, Array<const float, 1> weights, double fraction, Array<int32_t, 1> ids) {
  const int64_t size = static_cast<int64_t>(weights.shape(0));
  require(size > 0 && size < (int64_t{1} << 31), "weights must not be empty, nor too many");
  require(fraction > 0 && fraction <= 1, "fraction must be above 0 and at most 1, but is " + std::to_string(fraction));
  require_shape(ids, "ids", 0, size);
  nb::gil_scoped_release release;
  return nucleus(runtime, weights.data(), size, fraction, ids.data());
}

}  // namespace

void bind_vocabulary(nb::module_& m) {
  m.def("top_k", &top_k_rows, "runtime"_a, "logits"_a.noconvert(), "k"_a, "ids"_a.noconvert(), "values"_a.noconvert());
  m.def("softmax_weights", &softmax_weights, "runtime"_a, "logits"_a.noconvert(), "temperature"_a,
        "out"_a.noconvert());
  m.def("softmax", &softmax, "runtime"_a, "logits"_a.noconvert(), "temperature"_a, "out"_a.noconvert());
  m.def("log_normalizers", &log_normalizers, "runtime"_a, "logits"_a.noconvert(), "out"_a.noconvert());
  m.def("nucleus", &nucleus_of, "runtime"_a, "weights"_a.noconvert(), "fraction"_a, "ids"_a.noconvert());
  m.def("block_sums", &block_sums, "runtime"_a, "x"_a.noconvert(), "block"_a, "out"_a.noconvert());
}

}  // namespace gemma2
