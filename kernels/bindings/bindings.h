// What the files of bindings share: array types that allow no implicit copy, and checks with clear messages.
#pragma once

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <stdexcept>
#include <string>

#include "../activations.h"
#include "../dispatch.h"
#include "../matrix.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace gemma2 {

template <class T, size_t dims>
using Array = nb::ndarray<T, nb::ndim<dims>, nb::c_contig, nb::device::cpu>;

inline void require(bool condition, const std::string& message) {
  if (!condition) throw std::invalid_argument(message);
}

// The longest axis of a matrix or of activations: the bytes of two such axes in any format are below 2⁶³.
constexpr int64_t kMaxAxis = int64_t{1} << 30;

// Throws unless an array's axis has the size needed.
template <class A>
void require_shape(const A& array, const char* name, size_t axis, int64_t needed) {
  if (static_cast<int64_t>(array.shape(axis)) != needed) {
    throw std::invalid_argument(std::string(name) + ": axis " + std::to_string(axis) + " must be " +
                                std::to_string(needed) + ", but is " + std::to_string(array.shape(axis)));
  }
}

// Throws unless `out` takes so many rows of this width.
inline void require_room(const Activations& out, const char* name, int64_t rows, int64_t width) {
  require(out.width == width, std::string(name) + ": the width must be " + std::to_string(width) + ", but is " +
                                  std::to_string(out.width));
  require(out.capacity >= rows, std::string(name) + ": needs room for " + std::to_string(rows) + " rows, but has " +
                                    std::to_string(out.capacity));
}

// The format that a name means; throws for one that there is not.
WeightFormat weight_format(const std::string& name);

// One function per file of bindings.
void bind_elementwise(nb::module_& m);
void bind_quantized_matmul(nb::module_& m);
void bind_matmul(nb::module_& m);
void bind_selected_outputs(nb::module_& m);
void bind_attention(nb::module_& m);
void bind_vocabulary(nb::module_& m);
void bind_packing(nb::module_& m);
void bind_ceilings(nb::module_& m);

}  // namespace gemma2
