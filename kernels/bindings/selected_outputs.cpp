#include "../selected_outputs.h"

#include "bindings.h"

namespace gemma2 {

void bind_selected_outputs(nb::module_& m) {
  m.def("add_selected_outputs", [](Runtime& runtime, const Activations& x, const Matrix& w, Array<const int32_t, 2> ids,
                                   Array<float, 2> values) {
    require(w.format == WeightFormat::q4 || w.format == WeightFormat::q8, "w: the format must be q4 or q8");
    require(x.format == ActivationFormat::int8, "x: q4 and q8 weights need int8 activations");
    require(x.width == w.inputs, "x: the width must be " + std::to_string(w.inputs) + " as the weights' inputs, but is " +
                                     std::to_string(x.width));
    require_shape(ids, "ids", 0, x.rows);
    require_shape(values, "values", 0, x.rows);
    const int64_t count = static_cast<int64_t>(ids.shape(1));
    require_shape(values, "values", 1, count);
    for (int64_t i = 0; i < x.rows * count; ++i) {
      require(ids.data()[i] >= 0 && ids.data()[i] < w.outputs, "ids must be from 0 to " + std::to_string(w.outputs - 1) +
                                                                   ", but one is " + std::to_string(ids.data()[i]));
    }
    nb::gil_scoped_release release;
    selected_outputs_kernels(runtime.isa).add(runtime.pool, x, w, ids.data(), count, values.data());
  }, "runtime"_a, "x"_a, "w"_a, "ids"_a.noconvert(), "values"_a.noconvert());
}

}  // namespace gemma2
