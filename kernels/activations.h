// Rows of activations in the form that a matrix product reads.
//
//   int8      values[row][k], one float32 scale and the int32 sum of the values per row and group of 64:
//             x = scale · value, |value| <= 127. For the formats q4 and q8.
//   bfloat16  values[row][k]. For bfloat16 weights.
//   float32   values[row][k]. For float32 weights.
//
// k runs to the width rounded up to 64; what lies beyond the width is 0. Rows start at multiples of 64 bytes.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>

namespace gemma2 {

constexpr int kGroup = 64;  // inputs that share a scale, in weights and in activations

inline int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

struct FreeDeleter {
  void operator()(void* p) const { std::free(p); }
};
template <class T>
using AlignedArray = std::unique_ptr<T[], FreeDeleter>;

// n zeros, aligned to a cache line. Pages are not touched until used where the system allows it.
template <class T>
AlignedArray<T> aligned_zeros(int64_t n) {
  const size_t bytes = static_cast<size_t>(round_up(n * static_cast<int64_t>(sizeof(T)) + 64, 64));
  void* p = std::aligned_alloc(64, bytes);
  if (p == nullptr) throw std::bad_alloc();
  __builtin_memset(p, 0, bytes);
  return AlignedArray<T>(static_cast<T*>(p));
}

enum class ActivationFormat { int8, bfloat16, float32 };

struct Activations {
  Activations(ActivationFormat format, int64_t capacity, int64_t width)
      : format(format),
        capacity(capacity),
        width(width),
        padded_width(round_up(width, kGroup)),
        num_groups(padded_width / kGroup) {
    switch (format) {
      case ActivationFormat::int8:
        int8 = aligned_zeros<int8_t>(capacity * padded_width);
        scales = aligned_zeros<float>(capacity * num_groups);
        sums = aligned_zeros<int32_t>(capacity * num_groups);
        break;
      case ActivationFormat::bfloat16: bfloat16 = aligned_zeros<uint16_t>(capacity * padded_width); break;
      case ActivationFormat::float32: float32 = aligned_zeros<float>(capacity * padded_width); break;
    }
  }

  const ActivationFormat format;
  const int64_t capacity;      // rows that fit
  const int64_t width;         // inputs
  const int64_t padded_width;  // distance of rows, in values
  const int64_t num_groups;    // distance of rows in scales and sums
  int64_t rows = 0;            // rows in use: set by the kernel that writes them

  AlignedArray<int8_t> int8;
  AlignedArray<float> scales;
  AlignedArray<int32_t> sums;
  AlignedArray<uint16_t> bfloat16;
  AlignedArray<float> float32;
};

}  // namespace gemma2
