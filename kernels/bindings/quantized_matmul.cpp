#include "../quantized_matmul.h"

#include "bindings.h"

namespace gemma2 {

void bind_quantized_matmul(nb::module_& m) {
  m.def("quantized_matmul", [](Runtime& runtime, const Activations& x, const Matrix& w, Array<float, 2> out) {
    require(w.format == WeightFormat::q4 || w.format == WeightFormat::q8, "w: the format must be q4 or q8");
    require(x.format == ActivationFormat::int8, "x: q4 and q8 weights need int8 activations");
    require(x.width == w.inputs, "x: the width must be " + std::to_string(w.inputs) + " as the weights' inputs, but is " +
                                     std::to_string(x.width));
    require_shape(out, "out", 0, x.rows);
    require_shape(out, "out", 1, w.outputs);
    nb::gil_scoped_release release;
    quantized_matmul_kernels(runtime.isa).multiply(runtime.pool, x, w, out.data());
  }, "runtime"_a, "x"_a, "w"_a, "out"_a.noconvert());
}

}  // namespace gemma2
