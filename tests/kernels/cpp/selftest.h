// What the files of cases share: inputs that are the same everywhere, and a report of hashes.
//
// To add a kernel: a file with a function of cases, declared here and called in selftest.cpp.
#pragma once

#include <cstdint>
#include <cstdio>
#include <cstring>
#include <string>
#include <vector>

#include "activations.h"
#include "dispatch.h"
#include "matrix.h"

namespace gemma2::selftest {

// Numbers made of whole-number arithmetic and exact float operations alone, so that no library has a part in them.
class Random {
 public:
  explicit Random(uint64_t seed) : state_(seed * 2 + 1) {}
  uint32_t bits() {
    state_ = state_ * 6364136223846793005u + 1442695040888963407u;
    return static_cast<uint32_t>(state_ >> 33);
  }
  int32_t below(int32_t n) { return static_cast<int32_t>(bits() % static_cast<uint32_t>(n)); }
  // Roughly normal: four uniform numbers. Multiples of 2⁻²⁶, so exact.
  float normal(float scale) {
    float sum = 0;
    for (int i = 0; i < 4; ++i) sum += static_cast<float>(static_cast<int32_t>(bits() >> 11 & 0xffff) - 0x8000);
    return sum * 0x1p-15f * scale;
  }
  std::vector<float> normals(int64_t n, float scale = 1.0f) {
    std::vector<float> values(static_cast<size_t>(n));
    for (float& value : values) value = normal(scale);
    return values;
  }

 private:
  uint64_t state_;
};

// FNV-1a, 64 bits. Every NaN counts as the same, since processors choose its bits in their own ways.
class Hash {
 public:
  void bytes(const void* data, size_t size) {
    const auto* p = static_cast<const uint8_t*>(data);
    for (size_t i = 0; i < size; ++i) hash_ = (hash_ ^ p[i]) * 1099511628211u;
  }
  template <class T>
  void values(const T* data, int64_t size) {
    for (int64_t i = 0; i < size; ++i) {
      T value = data[i];
      if constexpr (std::is_floating_point_v<T>) {
        if (value != value) value = static_cast<T>(__builtin_nan(""));
      }
      bytes(&value, sizeof value);
    }
  }
  void activations(const Activations& a) {
    values(&a.rows, 1);
    if (a.int8) values(a.int8.get(), a.rows * a.padded_width);
    if (a.scales) values(a.scales.get(), a.rows * a.num_groups);
    if (a.sums) values(a.sums.get(), a.rows * a.num_groups);
    if (a.bfloat16) values(a.bfloat16.get(), a.rows * a.padded_width);
    if (a.float32) values(a.float32.get(), a.rows * a.padded_width);
  }
  uint64_t result() const { return hash_; }

 private:
  uint64_t hash_ = 14695981039346656037u;
};

inline void print(const std::string& name, const Hash& hash) {
  std::printf("%s %016llx\n", name.c_str(), static_cast<unsigned long long>(hash.result()));
}

constexpr ActivationFormat kActivationFormats[] = {ActivationFormat::int8, ActivationFormat::bfloat16,
                                                   ActivationFormat::float32};
inline std::string name_of(ActivationFormat format) {
  return format == ActivationFormat::int8 ? "int8" : format == ActivationFormat::bfloat16 ? "bfloat16" : "float32";
}
constexpr WeightFormat kWeightFormats[] = {WeightFormat::q4, WeightFormat::q8, WeightFormat::bfloat16,
                                           WeightFormat::float32};
inline std::string name_of(WeightFormat format) {
  switch (format) {
    case WeightFormat::q4: return "q4";
    case WeightFormat::q8: return "q8";
    case WeightFormat::bfloat16: return "bfloat16";
    case WeightFormat::float32: return "float32";
  }
  return "";
}

// A matrix of random weights, packed, and the memory that it lies in.
struct PackedMatrix {
  AlignedArray<uint8_t> data;
  Matrix matrix;
};
PackedMatrix random_matrix(Runtime& runtime, WeightFormat format, int64_t outputs, int64_t inputs, Random& random);

void elementwise_cases(Runtime& runtime);
void vocabulary_cases(Runtime& runtime);
void matmul_cases(Runtime& runtime);
void attention_cases(Runtime& runtime);
// Prints nothing if the pool is sound, and ends the program if not.
void thread_pool_cases();

}  // namespace gemma2::selftest
