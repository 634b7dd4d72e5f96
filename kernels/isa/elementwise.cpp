// GeGLU, the writing of activations, and the cap: each value on its own. Functions and their errors: simd_math.h.
//
//   geglu     gelu_tanh(gate) · up, rounded twice
//   soft_cap  cap · tanh(x · (1 / cap)): three roundings besides those of tanh, each 2⁻²⁴ of the result at most
#include "elementwise.h"

#include "activation_rows.h"
#include "simd.h"
#include "simd_math.h"
#include "work_split.h"

namespace gemma2::GEMMA2_ISA {
namespace {

// Tasks of about 5 µs; less is not worth another thread.
constexpr int64_t kGroupsPerTask = 128;
constexpr int64_t kVectorsPerCapTask = 1024;

F32x16 load(const float* p, int n) { return n == kLanes ? F32x16::load(p) : F32x16::load_partial(p, n); }

// Calls write(row, first, last) for ranges of groups that cover all rows.
template <class Write>
void for_group_ranges(ThreadPool& pool, int64_t rows, int64_t groups_per_row, Write&& write) {
  for_ranges(pool, rows * groups_per_row, kGroupsPerTask, [&](int64_t first, int64_t last) {
    while (first < last) {
      const int64_t row = first / groups_per_row, row_start = row * groups_per_row;
      const int64_t end = last < row_start + groups_per_row ? last : row_start + groups_per_row;
      write(row, first - row_start, end - row_start);
      first = end;
    }
  });
}

void geglu(ThreadPool& pool, const float* gate_up, int64_t rows, Activations& out) {
  out.rows = rows;
  for_group_ranges(pool, rows, out.num_groups, [&](int64_t row, int64_t first, int64_t last) {
    const float* gate = gate_up + row * 2 * out.width;
    const float* up = gate + out.width;
    write_groups(out, row, first, last,
                 [&](int64_t k, int n) { return gelu_tanh(load(gate + k, n)) * load(up + k, n); });
  });
}

void write_activations(ThreadPool& pool, const float* x, int64_t rows, Activations& out) {
  out.rows = rows;
  for_group_ranges(pool, rows, out.num_groups, [&](int64_t row, int64_t first, int64_t last) {
    const float* in = x + row * out.width;
    write_groups(out, row, first, last, [&](int64_t k, int n) { return load(in + k, n); });
  });
}

void soft_cap(ThreadPool& pool, float* x, int64_t size, float cap) {
  const F32x16 inverse = F32x16::broadcast(1.0f / cap), factor = F32x16::broadcast(cap);
  for_ranges(pool, (size + kLanes - 1) / kLanes, kVectorsPerCapTask, [&](int64_t first, int64_t last) {
    for (int64_t vector = first; vector < last; ++vector) {
      float* p = x + vector * kLanes;
      const int64_t left = size - vector * kLanes;
      if (left >= kLanes) {
        (tanh(F32x16::load(p) * inverse) * factor).store(p);
      } else {
        const int n = static_cast<int>(left);
        (tanh(F32x16::load_partial(p, n) * inverse) * factor).store_partial(p, n);
      }
    }
  });
}

}  // namespace

const ElementwiseKernels& elementwise_kernels() {
  static constexpr ElementwiseKernels kernels{
      .geglu = geglu, .write_activations = write_activations, .soft_cap = soft_cap};
  return kernels;
}

}  // namespace gemma2::GEMMA2_ISA
