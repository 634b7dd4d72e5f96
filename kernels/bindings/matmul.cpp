// Products with packed weights: with float32 and bfloat16 ones, and with those of any format.
#include "../float_matmul.h"
#include "../quantized_matmul.h"

#include "bindings.h"

namespace gemma2 {
namespace {

const char* name_of(ActivationFormat format) {
  return format == ActivationFormat::int8 ? "int8" : format == ActivationFormat::bfloat16 ? "bfloat16" : "float32";
}

void require_product(const Activations& x, const Matrix& w, const Array<float, 2>& out) {
  require(x.format == w.activation_format(), std::string("x: these weights need activations in ") +
                                                 name_of(w.activation_format()) + ", but they are in " +
                                                 name_of(x.format));
  require(x.width == w.inputs, "x: the width must be " + std::to_string(w.inputs) +
                                   ", the inputs of the weights, but is " + std::to_string(x.width));
  require_shape(out, "out", 0, x.rows);
  require_shape(out, "out", 1, w.outputs);
}

}  // namespace

void bind_matmul(nb::module_& m) {
  m.def("float_matmul", [](Runtime& runtime, const Activations& x, const Matrix& w, Array<float, 2> out) {
    require(w.format == WeightFormat::float32 || w.format == WeightFormat::bfloat16,
            "w: the format must be float32 or bfloat16");
    require_product(x, w, out);
    nb::gil_scoped_release release;
    float_matmul_kernels(runtime.isa).float_matmul(runtime.pool, x, w, out.data());
  }, "runtime"_a, "x"_a, "w"_a, "out"_a.noconvert());

  m.def("matmul", [](Runtime& runtime, const Activations& x, const Matrix& w, Array<float, 2> out) {
    require_product(x, w, out);
    nb::gil_scoped_release release;
    if (w.format == WeightFormat::q4 || w.format == WeightFormat::q8) {
      quantized_matmul_kernels(runtime.isa).multiply(runtime.pool, x, w, out.data());
    } else {
      float_matmul_kernels(runtime.isa).float_matmul(runtime.pool, x, w, out.data());
    }
  }, "runtime"_a, "x"_a, "w"_a, "out"_a.noconvert());
}

}  // namespace gemma2
