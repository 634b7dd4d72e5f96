// What this machine can do at most: bytes read from memory and multiply-adds, each per second, on a runtime's threads
// and with its instruction set. The figures that a kernel's speed is a fraction of. How they are made: isa/ceilings.cpp.
//
// A measurement is a row of passes. A pass is cut into tasks that the pool hands out, so that a thread which another
// program interrupts holds nobody up, as in the kernels themselves.
#pragma once

#include <cstdint>

#include "dispatch.h"

namespace gemma2 {

enum class DotKind { int8, bfloat16, float32 };

// Per second. The best pass is the ceiling of a quiet machine; the median is what a kernel's median can be held against.
struct Rates {
  double best, median;
};

// Bytes per second of passes over all of `data`, until `seconds` are over; at least 3 passes, the first one not counted.
// Data that fits the processor's caches gives their speed.
Rates measure_read_bandwidth(Runtime& runtime, const uint8_t* data, int64_t size, double seconds);

// Operations per second of products in registers, until `seconds` are over. A multiply-add is two operations.
Rates measure_dot_peak(Runtime& runtime, DotKind kind, double seconds);

struct CeilingKernels {
  // Reads all bytes and returns what depends on each of them. `data` must start at a multiple of 64.
  uint64_t (*read)(const uint8_t* data, int64_t size);
  // Each repeats a block of independent multiply-adds and returns how many there were.
  int64_t (*dot_int8)(int64_t repeats);
  int64_t (*dot_bfloat16)(int64_t repeats);
  int64_t (*fma_float32)(int64_t repeats);
};
GEMMA2_DECLARE_KERNELS(CeilingKernels, ceiling_kernels)

}  // namespace gemma2
