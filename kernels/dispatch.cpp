#include "dispatch.h"

#include <cstdlib>
#include <stdexcept>

#if defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#endif

namespace gemma2 {

const char* isa_name(Isa isa) {
  switch (isa) {
    case Isa::scalar: return "scalar";
    case Isa::avx2: return "avx2";
    case Isa::avx512: return "avx512";
    case Isa::neon: return "neon";
  }
  return "";
}

std::vector<Isa> available_isas() {
  std::vector<Isa> found;
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                        __builtin_cpu_supports("f16c") && __builtin_cpu_supports("bmi2");
  if (has_avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
      __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512bf16") &&
      __builtin_cpu_supports("avx512vbmi")) {
    found.push_back(Isa::avx512);
  }
  if (has_avx2) found.push_back(Isa::avx2);
#elif defined(__aarch64__)
#if defined(__linux__)
  constexpr unsigned long kDotProduct = 1ul << 20;  // HWCAP_ASIMDDP
  if (getauxval(AT_HWCAP) & kDotProduct) found.push_back(Isa::neon);
#else
  found.push_back(Isa::neon);  // every Apple processor of this architecture has dot products
#endif
#endif
  found.push_back(Isa::scalar);
  return found;
}

Isa choose_isa(const std::string& name) {
  const auto available = available_isas();
  std::string asked = name;
  if (name == "auto") {
    const char* forced = std::getenv("GEMMA2_ISA");
    if (forced == nullptr || *forced == '\0') return available.front();
    asked = forced;
  }
  std::string names;
  for (Isa isa : available) {
    if (asked == isa_name(isa)) return isa;
    names += (names.empty() ? "" : ", ") + std::string(isa_name(isa));
  }
  throw std::invalid_argument("the instruction set (GEMMA2_ISA) must be one of those of this processor, " + names +
                              ", but is '" + asked + "'");
}

}  // namespace gemma2
