// The instruction sets that a kernel is compiled for.
//
// A kernel's source is compiled once per instruction set, each time into another namespace (kernels/CMakeLists.txt
// defines GEMMA2_ISA_*), so that one library holds all variants. `dispatch.h` chooses one at run time.
#pragma once

#if defined(GEMMA2_ISA_AVX512)
#define GEMMA2_ISA avx512
#elif defined(GEMMA2_ISA_AVX2)
#define GEMMA2_ISA avx2
#elif defined(GEMMA2_ISA_NEON)
#define GEMMA2_ISA neon
#else
#define GEMMA2_ISA scalar
#endif
