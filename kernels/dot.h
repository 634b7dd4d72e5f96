// Dot products of 16 outputs × 4 inputs at a time, whatever instruction the processor has for them.
//
//   Weights      64 bytes: byte 4·i + b is the weight of output i, input b
//   load_q8      from 64 signed bytes
//   unpack_q4    from 64 bytes of nibbles: the weights of 4 inputs (low nibbles) and of the next 4 (high nibbles)
//   dot_start    what the accumulators of a group start from, given the sum of its activations (a product that is biased
//                to suit an instruction is put right here)
//   dot4         accumulator of output i += Σ_b weight(i, b) · x[b]
//   kMaxRows     rows of activations whose accumulators fit the registers beside one another
//   kUnroll      how far to unroll loops over rows and steps (the plain version would become megabytes of code)
//
// From dot_start through dot4 over all inputs of a group: the exact integer, on every instruction set.
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
