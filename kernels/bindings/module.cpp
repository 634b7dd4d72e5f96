// The Python module gemma2._kernels: the types that all kernels share. Each group of kernels binds its own functions.
#include "bindings.h"

namespace gemma2 {

WeightFormat weight_format(const std::string& name) {
  if (name == "q4") return WeightFormat::q4;
  if (name == "q8") return WeightFormat::q8;
  if (name == "bfloat16") return WeightFormat::bfloat16;
  if (name == "float32") return WeightFormat::float32;
  throw std::invalid_argument("a weight format must be q4, q8, bfloat16 or float32, but is '" + name + "'");
}

namespace {

ActivationFormat activation_format(const std::string& name) {
  if (name == "int8") return ActivationFormat::int8;
  if (name == "bfloat16") return ActivationFormat::bfloat16;
  if (name == "float32") return ActivationFormat::float32;
  throw std::invalid_argument("an activation format must be int8, bfloat16 or float32, but is '" + name + "'");
}

const char* name_of(ActivationFormat format) {
  return format == ActivationFormat::int8 ? "int8" : format == ActivationFormat::bfloat16 ? "bfloat16" : "float32";
}

const char* name_of(WeightFormat format) {
  switch (format) {
    case WeightFormat::q4: return "q4";
    case WeightFormat::q8: return "q8";
    case WeightFormat::bfloat16: return "bfloat16";
    case WeightFormat::float32: return "float32";
  }
  return "";
}

Matrix make_matrix(const std::string& format, int64_t outputs, int64_t inputs, const uint8_t* data) {
  require(outputs > 0 && inputs > 0, "a matrix needs at least one output and one input");
  require(outputs <= kMaxAxis && inputs <= kMaxAxis,
          "a matrix may have " + std::to_string(kMaxAxis) + " outputs and inputs at most, but is to have " +
              std::to_string(outputs) + " x " + std::to_string(inputs));
  return Matrix{weight_format(format), outputs, inputs, data};
}

// The values in use as (rows, width) float32.
nb::object dequantized(const Activations& a) {
  auto* values = new float[static_cast<size_t>(a.rows * a.width)];
  nb::capsule owner(values, [](void* p) noexcept { delete[] static_cast<float*>(p); });
  for (int64_t row = 0; row < a.rows; ++row) {
    for (int64_t k = 0; k < a.width; ++k) {
      float x = 0;
      const int64_t at = row * a.padded_width + k;
      switch (a.format) {
        case ActivationFormat::int8:
          x = static_cast<float>(a.int8[at]) * a.scales[row * a.num_groups + k / kGroup];
          break;
        case ActivationFormat::bfloat16: {
          const uint32_t bits = static_cast<uint32_t>(a.bfloat16[at]) << 16;
          __builtin_memcpy(&x, &bits, sizeof x);
          break;
        }
        case ActivationFormat::float32: x = a.float32[at]; break;
      }
      values[row * a.width + k] = x;
    }
  }
  return nb::cast(nb::ndarray<nb::numpy, float, nb::ndim<2>>(
      values, {static_cast<size_t>(a.rows), static_cast<size_t>(a.width)}, owner));
}

}  // namespace
}  // namespace gemma2

NB_MODULE(_kernels, m) {
  using namespace gemma2;
  nb::set_leak_warnings(false);  // what lives until the process ends, as a sampler's Runtime does, is no leak
  m.doc() = "Compiled kernels for the CPU: arrays in, arrays out.";
  m.attr("GROUP") = kGroup;
  m.attr("TILE") = kTile;
  m.attr("Q4_CODEBOOK") = nb::make_tuple(kQ4Codebook[0], kQ4Codebook[1], kQ4Codebook[2], kQ4Codebook[3],
                                         kQ4Codebook[4], kQ4Codebook[5], kQ4Codebook[6], kQ4Codebook[7],
                                         kQ4Codebook[8], kQ4Codebook[9], kQ4Codebook[10], kQ4Codebook[11],
                                         kQ4Codebook[12], kQ4Codebook[13], kQ4Codebook[14], kQ4Codebook[15]);
  m.def("available_isas", [] {
    std::vector<std::string> names;
    for (Isa isa : available_isas()) names.emplace_back(isa_name(isa));
    return names;
  }, "The instruction sets that this processor has, the best one first.");

  nb::class_<Runtime>(m, "Runtime", "Threads and an instruction set: what every kernel needs besides its arrays.")
      .def("__init__", [](Runtime* self, int num_threads, const std::string& isa) {
        require(num_threads >= 1 && num_threads <= 1024,
                "num_threads must be from 1 to 1024, but is " + std::to_string(num_threads));
        new (self) Runtime(num_threads, choose_isa(isa));
      }, "num_threads"_a, "isa"_a = "auto")
      .def_prop_ro("num_threads", [](const Runtime& r) { return r.pool.num_threads(); })
      .def_prop_ro("isa", [](const Runtime& r) { return isa_name(r.isa); });

  nb::class_<Activations>(m, "Activations", "Rows of activations in the form that a matrix product reads.")
      .def("__init__", [](Activations* self, const std::string& format, int64_t capacity, int64_t width) {
        require(capacity >= 1 && width >= 1, "activations need room for at least one row of at least one value");
        require(capacity <= kMaxAxis && width <= kMaxAxis,
                "activations may have " + std::to_string(kMaxAxis) + " rows and values in a row at most, but are to have " +
                    std::to_string(capacity) + " x " + std::to_string(width));
        new (self) Activations(activation_format(format), capacity, width);
      }, "format"_a, "capacity"_a, "width"_a)
      .def_prop_ro("format", [](const Activations& a) { return name_of(a.format); })
      .def_ro("capacity", &Activations::capacity)
      .def_ro("width", &Activations::width)
      .def_ro("rows", &Activations::rows)
      .def("dequantized", &dequantized, "The rows in use as (rows, width) float32.");

  m.def("matrix_bytes", [](const std::string& format, int64_t outputs, int64_t inputs) {
    return make_matrix(format, outputs, inputs, nullptr).size_bytes();
  }, "format"_a, "outputs"_a, "inputs"_a, "The size of a packed matrix in bytes.");

  nb::class_<Matrix>(m, "Matrix", "A packed weight matrix (outputs, inputs) over memory that it keeps alive.")
      .def("__init__", [](Matrix* self, const std::string& format, int64_t outputs, int64_t inputs,
                          nb::ndarray<const uint8_t, nb::ndim<1>, nb::c_contig, nb::device::cpu> data) {
        const Matrix made = make_matrix(format, outputs, inputs, data.data());
        require(static_cast<int64_t>(data.shape(0)) == made.size_bytes(),
                "a " + format + " matrix of " + std::to_string(outputs) + " x " + std::to_string(inputs) + " takes " +
                    std::to_string(made.size_bytes()) + " bytes, but the array has " + std::to_string(data.shape(0)));
        require(reinterpret_cast<uintptr_t>(data.data()) % 64 == 0, "a matrix must start at a multiple of 64 bytes");
        new (self) Matrix(made);
      }, "format"_a, "outputs"_a, "inputs"_a, "data"_a.noconvert(), nb::keep_alive<1, 5>())
      .def_prop_ro("format", [](const Matrix& w) { return name_of(w.format); })
      .def_ro("outputs", &Matrix::outputs)
      .def_ro("inputs", &Matrix::inputs)
      .def_prop_ro("size_bytes", &Matrix::size_bytes)
      .def_prop_ro("activation_format", [](const Matrix& w) { return name_of(w.activation_format()); });

  bind_elementwise(m);
  bind_quantized_matmul(m);
  bind_matmul(m);
  bind_selected_outputs(m);
  bind_attention(m);
  bind_vocabulary(m);
  bind_packing(m);
  bind_ceilings(m);
}
