#include "../elementwise.h"

#include "bindings.h"

namespace gemma2 {
namespace {

using Floats1 = Array<const float, 1>;
using Floats2 = Array<const float, 2>;

int64_t num_rows(const Floats2& x) { return static_cast<int64_t>(x.shape(0)); }
int64_t row_width(const Floats2& x) { return static_cast<int64_t>(x.shape(1)); }

void rms_norm(Runtime& runtime, Floats2 x, Floats1 weight, float epsilon, Activations& out) {
  const int64_t rows = num_rows(x), width = row_width(x);
  require_shape(weight, "weight", 0, width);
  require_room(out, "out", rows, width);
  nb::gil_scoped_release release;
  norm_kernels(runtime.isa).rms_norm(runtime.pool, x.data(), weight.data(), epsilon, rows, width, out);
}

void add_norm(Runtime& runtime, Array<float, 2> residual, Floats2 y, Floats1 post_weight, float epsilon) {
  const int64_t rows = num_rows(y), width = row_width(y);
  require_shape(residual, "residual", 0, rows);
  require_shape(residual, "residual", 1, width);
  require_shape(post_weight, "post_weight", 0, width);
  nb::gil_scoped_release release;
  norm_kernels(runtime.isa)
      .add_rms_norm(runtime.pool, residual.data(), y.data(), post_weight.data(), epsilon, nullptr, rows, width, nullptr);
}

void add_rms_norm(Runtime& runtime, Array<float, 2> residual, Floats2 y, Floats1 post_weight, float epsilon,
                  Floats1 next_weight, Activations& out) {
  const int64_t rows = num_rows(y), width = row_width(y);
  require_shape(residual, "residual", 0, rows);
  require_shape(residual, "residual", 1, width);
  require_shape(post_weight, "post_weight", 0, width);
  require_shape(next_weight, "next_weight", 0, width);
  require_room(out, "out", rows, width);
  nb::gil_scoped_release release;
  norm_kernels(runtime.isa)
      .add_rms_norm(runtime.pool, residual.data(), y.data(), post_weight.data(), epsilon, next_weight.data(), rows,
                    width, &out);
}

void geglu(Runtime& runtime, Floats2 gate_up, Activations& out) {
  require_shape(gate_up, "gate_up", 1, 2 * out.width);
  require_room(out, "out", num_rows(gate_up), out.width);
  nb::gil_scoped_release release;
  elementwise_kernels(runtime.isa).geglu(runtime.pool, gate_up.data(), num_rows(gate_up), out);
}

void write_activations(Runtime& runtime, Floats2 x, Activations& out) {
  require_room(out, "out", num_rows(x), row_width(x));
  nb::gil_scoped_release release;
  elementwise_kernels(runtime.isa).write_activations(runtime.pool, x.data(), num_rows(x), out);
}

void soft_cap(Runtime& runtime, Array<float, 2> x, float cap) {
  require(cap > 0, "cap must be above 0, but is " + std::to_string(cap));
  nb::gil_scoped_release release;
  elementwise_kernels(runtime.isa).soft_cap(runtime.pool, x.data(), static_cast<int64_t>(x.size()), cap);
}

void embed(Runtime& runtime, const Matrix& matrix, Array<const int32_t, 1> ids, float scale, Array<float, 2> out) {
  const int64_t rows = static_cast<int64_t>(ids.shape(0));
  require_shape(out, "out", 0, rows);
  require_shape(out, "out", 1, matrix.inputs);
  for (int64_t row = 0; row < rows; ++row) {
    const int32_t id = ids.data()[row];
    if (id < 0 || id >= matrix.outputs) {
      throw std::invalid_argument("ids must be from 0 to " + std::to_string(matrix.outputs - 1) + ", but ids[" +
                                  std::to_string(row) + "] is " + std::to_string(id));
    }
  }
  nb::gil_scoped_release release;
  embedding_kernels(runtime.isa).embed(runtime.pool, matrix, ids.data(), scale, rows, out.data());
}

}  // namespace

void bind_elementwise(nb::module_& m) {
  m.def("rms_norm", &rms_norm, "runtime"_a, "x"_a.noconvert(), "weight"_a.noconvert(), "epsilon"_a, "out"_a);
  m.def("add_norm", &add_norm, "runtime"_a, "residual"_a.noconvert(), "y"_a.noconvert(), "post_weight"_a.noconvert(),
        "epsilon"_a);
  m.def("add_rms_norm", &add_rms_norm, "runtime"_a, "residual"_a.noconvert(), "y"_a.noconvert(),
        "post_weight"_a.noconvert(), "epsilon"_a, "next_weight"_a.noconvert(), "out"_a);
  m.def("geglu", &geglu, "runtime"_a, "gate_up"_a.noconvert(), "out"_a);
  m.def("write_activations", &write_activations, "runtime"_a, "x"_a.noconvert(), "out"_a);
  m.def("soft_cap", &soft_cap, "runtime"_a, "x"_a.noconvert(), "cap"_a);
  m.def("embed", &embed, "runtime"_a, "matrix"_a, "ids"_a.noconvert(), "scale"_a, "out"_a.noconvert());
}

}  // namespace gemma2
