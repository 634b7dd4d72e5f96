#include "../ceilings.h"

#include <nanobind/stl/pair.h>

#include <cmath>
#include <utility>

#include "bindings.h"

namespace gemma2 {
namespace {

DotKind dot_kind(const std::string& name) {
  if (name == "int8") return DotKind::int8;
  if (name == "bfloat16") return DotKind::bfloat16;
  if (name == "float32") return DotKind::float32;
  throw std::invalid_argument("a kind of dot product must be int8, bfloat16 or float32, but is '" + name + "'");
}

void require_seconds(double seconds) {
  require(seconds >= 0 && seconds <= 60, "seconds must be from 0 to 60, but is " + std::to_string(seconds));
}

}  // namespace

void bind_ceilings(nb::module_& m) {
  m.def("measure_read_bandwidth", [](Runtime& runtime, Array<const uint8_t, 1> data, double seconds) {
    require_seconds(seconds);
    require(data.shape(0) >= 1, "data needs at least one byte to read");
    require(reinterpret_cast<uintptr_t>(data.data()) % 64 == 0, "data must start at a multiple of 64 bytes");
    nb::gil_scoped_release release;
    const Rates rates =
        measure_read_bandwidth(runtime, data.data(), static_cast<int64_t>(data.shape(0)), seconds);
    return std::pair(rates.best, rates.median);
  }, "runtime"_a, "data"_a.noconvert(), "seconds"_a,
  "Bytes per second that the threads read of `data`: (best, median) of several passes.");

  m.def("measure_dot_peak", [](Runtime& runtime, const std::string& kind, double seconds) {
    require_seconds(seconds);
    const DotKind dot = dot_kind(kind);
    nb::gil_scoped_release release;
    const Rates rates = measure_dot_peak(runtime, dot, seconds);
    return std::pair(rates.best, rates.median);
  }, "runtime"_a, "kind"_a, "seconds"_a,
  "Operations per second of multiply-adds in registers (two operations each): (best, median) of several passes.");
}

}  // namespace gemma2
