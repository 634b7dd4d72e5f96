// Dot products of 16 outputs × 4 inputs at a time, whatever instruction the processor has for them.
//
//   Weights          64 bytes: byte 4·i + b is the weight of output i, input b
//   load_q8          from 64 signed bytes
//   unpack_q4        from 64 bytes of nibbles: the weights of 4 inputs (low nibbles) and of the next 4 (high nibbles)
//   dot_start        what the accumulators of a group start from, given the sum of its activations (a product that is
//                    biased to suit an instruction is put right here)
//   dot4             accumulator of output i += Σ_b weight(i, b) · x[b]; also for arrays of accumulators and weights
//
// For weights that are unpacked once and used many times:
//   store_weights    to 64 aligned bytes, in whatever form suits
//   load_unpacked    from there, as UnpackedWeights, which dot4 takes too
//   add_correction   sums what unpacked_start needs to know about a group's weights
//   unpacked_start   as dot_start
//
// From dot_start through dot4 over all inputs of a group: the exact integer, on every instruction set.
//
// What fits the registers, and what pays, each counted or measured:
//   kMaxSums          int32 sums of few rows: rows × tiles × halves of a tile
//   kMaxTiles         tiles that few rows are multiplied with side by side, each a stream from memory
//   kMaxRowsUnpacked  rows × kUnpackedHalves (1 or 2) halves, from weights that were unpacked before
//   kMinRowsToUnpack  from how many rows on unpacking before is worth it
//   kUnroll           how far to unroll loops over rows and tiles (the plain version would become megabytes of code)
//   kUnrollSteps      and over the inputs of a group
#pragma once

#include "isa.h"

#if defined(GEMMA2_ISA_AVX512)
#include "dot_avx512.h"
#elif defined(GEMMA2_ISA_AVX2)
#include "dot_avx2.h"
#elif defined(GEMMA2_ISA_NEON)
#include "dot_neon.h"
#else
#include "dot_scalar.h"
#endif

#if !defined(GEMMA2_ISA_AVX512)
namespace gemma2::GEMMA2_ISA {

template <class W, int n>
inline void dot4(I32x16 (&acc)[n], const W (&w)[n], const int8_t* x) {
  for (int i = 0; i < n; ++i) dot4(acc[i], w[i], x);
}

}  // namespace gemma2::GEMMA2_ISA
#endif
