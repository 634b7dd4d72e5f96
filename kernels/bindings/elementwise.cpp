#include "../elementwise.h"

#include "bindings.h"

namespace gemma2 {

void bind_elementwise(nb::module_& m) {
  m.def("rms_norm", [](Runtime& runtime, Array<const float, 2> x, Array<const float, 1> weight, float epsilon,
                       Activations& out) {
    const int64_t rows = static_cast<int64_t>(x.shape(0)), width = static_cast<int64_t>(x.shape(1));
    require_shape(weight, "weight", 0, width);
    require_room(out, "out", rows, width);
    nb::gil_scoped_release release;
    elementwise_kernels(runtime.isa).rms_norm(runtime.pool, x.data(), weight.data(), epsilon, rows, width, out);
  }, "runtime"_a, "x"_a.noconvert(), "weight"_a.noconvert(), "epsilon"_a, "out"_a);
}

}  // namespace gemma2
