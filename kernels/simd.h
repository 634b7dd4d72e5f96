// Sixteen floats or integers as one value, whatever the processor's registers hold.
//
// Every instruction set presents the same logical vector of 16 lanes: one AVX-512 register, two of AVX2, four of NEON,
// or an array in plain C++. So memory layouts and the order of every sum are the same everywhere, and kernels written
// on it give the same bits on every machine (the plain version uses std::fma where others use the instruction).
//
//   F32x16  load, load_partial (missing lanes 0), broadcast, zero, store, store_partial,
//           load_bf16 / store_bf16 (round to nearest even), load_f16 / store_f16 (IEEE half, to nearest even), + - * /,
//           fma(a, b, c) = a·b + c rounded once, min, max (if either is NaN, the second operand),
//           abs, sqrt, copy_sign(magnitude, sign), as_i32 (same bits), round_to_i32 (nearest even),
//           reduce_add (lanes i and i+8 first, then 4, 2, 1), reduce_max (no NaN)
//   I32x16  load, store, broadcast, zero, + - (wrap around), &, max, reduce_add, reduce_max, to_f32, shift_left<n>,
//           shift_right<n> (copies the sign), as_f32 (same bits), store_i8 (the values must fit); and of four vectors
//           at once, which is much cheaper: reduce_add4, reduce_max4 (to 4 integers), store_i8x64
//   Mask16  a >= b, a < b, first_lanes(n), select(mask, a, b) of either kind, any(mask), to_bits (lane i is bit i)
//   lookup(table, index)  lane i is lane index[i] of the table; 0 <= index[i] < 16
//   F64x16  zero, + F32x16 (exact sums), reduce_add
#pragma once

#include "isa.h"

#if defined(GEMMA2_ISA_AVX512)
#include "simd_avx512.h"
#elif defined(GEMMA2_ISA_AVX2)
#include "simd_avx2.h"
#elif defined(GEMMA2_ISA_NEON)
#include "simd_neon.h"
#else
#include "simd_scalar.h"
#endif
