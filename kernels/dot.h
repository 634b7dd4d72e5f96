// Dot products of 16 outputs × 4 inputs at a time, whatever instruction the processor has for them.
//
//   Weights          64 bytes: byte 4·i + b is the weight of output i, input b
//   load_q8          from 64 signed bytes
//   unpack_q4        from 64 bytes of nibbles: the weights of 4 inputs (low nibbles) and of the next 4 (high nibbles)
//   dot_start        what the accumulators of a group start from, given the sum of its activations (a product that is
//                    biased to suit an instruction is put right here)
//   dot4             for each vector v, accumulator of output i += Σ_b weight(v, i, b) · x[b]
//
// For weights that are unpacked once and used many times:
//   store_weights    to 64 aligned bytes, in whatever form suits
//   load_unpacked    from there, as UnpackedWeights; dot4 takes them too
//   add_correction   sums what unpacked_start needs to know about a group's weights
//   unpacked_start   as dot_start
//
// From dot_start through dot4 over all inputs of a group: the exact integer, on every instruction set.
//
// How many rows' accumulators fit the registers, each with a measured or counted reason:
//   kMaxRowsOfPair    rows × 2 vectors of outputs: a tile at once, for few rows
//   kMaxRowsOfOne     rows × 1 vector: more rows to a weight that is unpacked
//   kMaxRowsUnpacked  rows × kUnpackedVectors (1 or 2), from weights that were unpacked before
//   kMinRowsToUnpack  from how many rows on unpacking before is worth it
//   kTilesOfOneRow  tiles that one row is multiplied with side by side, each a stream from memory of its own
//   kUnroll           how far to unroll loops over rows (the plain version would become megabytes of code)
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
