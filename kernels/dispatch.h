// Which instruction set the kernels use: detected once, or forced by the environment variable GEMMA2_ISA.
#pragma once

#include <string>
#include <vector>

#include "thread_pool.h"

namespace gemma2 {

enum class Isa { scalar, avx2, avx512, neon };

const char* isa_name(Isa isa);

// The instruction sets that this processor has and this build holds, the best one first.
std::vector<Isa> available_isas();

// "auto": what GEMMA2_ISA names, or else the best available. Throws std::invalid_argument for a name that is unknown or
// not available here.
Isa choose_isa(const std::string& name);

// What every kernel needs besides its arrays. Passed, never global.
struct Runtime {
  Runtime(int num_threads, Isa isa) : pool(num_threads), isa(isa) {}
  ThreadPool pool;
  const Isa isa;
};

// Declares `const Table& name(Isa)`, a table of function pointers, with one definition per instruction set:
//   namespace gemma2::GEMMA2_ISA { const Table& name() { static constexpr Table table{...}; return table; } }
#if defined(__x86_64__)
#define GEMMA2_DECLARE_KERNELS(Table, name)      \
  namespace scalar {                             \
  const Table& name();                           \
  }                                              \
  namespace avx2 {                               \
  const Table& name();                           \
  }                                              \
  namespace avx512 {                             \
  const Table& name();                           \
  }                                              \
  inline const Table& name(Isa isa) {            \
    switch (isa) {                               \
      case Isa::avx512: return avx512::name();   \
      case Isa::avx2: return avx2::name();       \
      default: return scalar::name();            \
    }                                            \
  }
#elif defined(__aarch64__)
#define GEMMA2_DECLARE_KERNELS(Table, name)                         \
  namespace scalar {                                                \
  const Table& name();                                              \
  }                                                                 \
  namespace neon {                                                  \
  const Table& name();                                              \
  }                                                                 \
  inline const Table& name(Isa isa) {                               \
    return isa == Isa::neon ? neon::name() : scalar::name();        \
  }
#else
#define GEMMA2_DECLARE_KERNELS(Table, name)                 \
  namespace scalar {                                        \
  const Table& name();                                      \
  }                                                         \
  inline const Table& name(Isa) { return scalar::name(); }
#endif

}  // namespace gemma2
