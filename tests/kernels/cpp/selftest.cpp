// Runs every kernel on fixed inputs and prints a hash of each result: kernels_selftest ISA [NUM_THREADS].
//
// The hashes must be the same on every instruction set, processor and number of threads
// (tests/kernels/test_instruction_sets.py). Built with GEMMA2_SANITIZE=ON, it is the sanitizers' run.
// `kernels_selftest --isas` prints the instruction sets that this processor has.
#include "selftest.h"

#include <cstdlib>
#include <exception>

int main(int argc, char** argv) {
  using namespace gemma2;
  try {
    if (argc < 2) throw std::invalid_argument("usage: kernels_selftest ISA [NUM_THREADS] | --isas");
    if (std::string(argv[1]) == "--isas") {
      for (Isa isa : available_isas()) std::printf("%s\n", isa_name(isa));
      return 0;
    }
    Runtime runtime(argc > 2 ? std::atoi(argv[2]) : 2, choose_isa(argv[1]));
    selftest::elementwise_cases(runtime);
    selftest::vocabulary_cases(runtime);
    selftest::matmul_cases(runtime);
    selftest::attention_cases(runtime);
    selftest::thread_pool_cases();
  } catch (const std::exception& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 2;
  }
}
