// The loops that show what a machine can do at most. Results mean nothing; only how long they take is of interest.
//
// read        Four streams through the range, each a vector of 64 bytes at a time, xor-ed together, so that more cache
//             lines are on their way at once than the prefetcher asks for along one stream. Tails below 512 bytes are
//             read by the 8 and by the byte.
// dot_*       Multiply-adds between registers, as many independent sums as hide the instruction's latency, operands of
//             varied bits (multiplying zeros takes less power, so that some processors would clock higher). Each
//             instruction stands in inline assembly: the compiler can neither hoist it, nor fold it, nor spill its sum.
//
//             AVX-512: vpdpbusd, vdpbf16ps, vfmadd231ps. AVX2: int8 as vpmaddubsw + vpmaddwd + vpaddd. NEON: sdot, fmla.
//             Where an instruction set has no bf16 product, its values are widened and multiplied as float32, so the
//             float32 peak is the bound. Plain C++: the loops that the compiler makes of the same arithmetic.
#include "ceilings.h"

#include <cstring>
#include <utility>

#include "simd.h"

namespace gemma2::GEMMA2_ISA {
namespace {

// -- memory -----------------------------------------------------------------------------------------------------------

typedef uint64_t Line __attribute__((vector_size(64), may_alias));

uint64_t read(const uint8_t* data, int64_t size) {
  constexpr int kStreams = 4;
  constexpr int64_t kStep = 2 * sizeof(Line);
  const int64_t distance = size / (kStreams * kStep) * kStep;
  Line sums[kStreams] = {};
  for (int64_t i = 0; i < distance; i += kStep) {
    for (int s = 0; s < kStreams; ++s) {
      const uint8_t* p = data + s * distance + i;
      sums[s] ^= *reinterpret_cast<const Line*>(p);
      sums[s] ^= *reinterpret_cast<const Line*>(p + sizeof(Line));
    }
  }
  const Line all = (sums[0] ^ sums[1]) ^ (sums[2] ^ sums[3]);
  uint64_t sum = 0;
  for (size_t i = 0; i < sizeof(Line) / sizeof(uint64_t); ++i) sum ^= all[i];
  int64_t at = kStreams * distance;
  for (; at + 8 <= size; at += 8) {
    uint64_t word;
    std::memcpy(&word, data + at, sizeof word);
    sum ^= word;
  }
  for (; at < size; ++at) sum ^= data[at];
  return sum;
}

// -- arithmetic -------------------------------------------------------------------------------------------------------

// 64 bytes of varied bits. As bf16 and float32 they are numbers of magnitude 1 to 2, of either sign.
const uint32_t* varied_bits(int which) {
  alignas(64) static const struct Bits {
    uint32_t words[8][16];
    Bits() {
      uint32_t state = 1;
      for (auto& row : words) {
        for (uint32_t& word : row) {
          state = state * 1664525u + 1013904223u;
          word = (state & 0x807f807fu) | 0x3f803f80u;
        }
      }
    }
  } bits;
  return bits.words[which % 8];
}

#if defined(GEMMA2_ISA_AVX512) || defined(GEMMA2_ISA_AVX2) || defined(GEMMA2_ISA_NEON)

#if defined(GEMMA2_ISA_AVX512)
using Register = __m512;
constexpr int kSums = 16, kOperands = 4;  // 16 + 2 · 4 of 32 registers
inline Register load(const uint32_t* p) { return _mm512_loadu_ps(p); }
inline void dot_int8(Register& sum, Register a, Register b) { asm volatile("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(a), "v"(b)); }
inline void dot_bfloat16(Register& sum, Register a, Register b) {
  asm volatile("vdpbf16ps %2, %1, %0" : "+v"(sum) : "v"(a), "v"(b));
}
inline void fma_float32(Register& sum, Register a, Register b) {
  asm volatile("vfmadd231ps %2, %1, %0" : "+v"(sum) : "v"(a), "v"(b));
}
constexpr int kInt8 = 64, kBfloat16 = 32, kFloat32 = 16;  // multiply-adds of one call

#elif defined(GEMMA2_ISA_AVX2)
using Register = __m256;
constexpr int kSums = 9, kOperands = 2;  // 9 + 2 · 2 of 16 registers, one for ones and two for what lies between
inline Register load(const uint32_t* p) { return _mm256_loadu_ps(reinterpret_cast<const float*>(p)); }
inline void dot_int8(Register& sum, Register a, Register b) {
  const __m256i ones = _mm256_set1_epi16(1);
  __m256i products;
  asm volatile(
      "vpmaddubsw %3, %2, %1\n\t"
      "vpmaddwd %4, %1, %1\n\t"
      "vpaddd %1, %0, %0"
      : "+x"(sum), "=&x"(products)
      : "x"(a), "x"(b), "x"(ones));
}
inline void fma_float32(Register& sum, Register a, Register b) {
  asm volatile("vfmadd231ps %2, %1, %0" : "+x"(sum) : "x"(a), "x"(b));
}
inline void dot_bfloat16(Register& sum, Register a, Register b) { fma_float32(sum, a, b); }
constexpr int kInt8 = 32, kBfloat16 = 8, kFloat32 = 8;

#else
using Register = float32x4_t;
constexpr int kSums = 16, kOperands = 4;
inline Register load(const uint32_t* p) { return vreinterpretq_f32_u32(vld1q_u32(p)); }
inline void dot_int8(Register& sum, Register a, Register b) {
  asm volatile("sdot %0.4s, %1.16b, %2.16b" : "+w"(sum) : "w"(a), "w"(b));
}
inline void fma_float32(Register& sum, Register a, Register b) {
  asm volatile("fmla %0.4s, %1.4s, %2.4s" : "+w"(sum) : "w"(a), "w"(b));
}
inline void dot_bfloat16(Register& sum, Register a, Register b) { fma_float32(sum, a, b); }
constexpr int kInt8 = 16, kBfloat16 = 4, kFloat32 = 4;
#endif

// The sums are named by constants and not by a loop's counter, or GCC keeps the array of them in memory.
template <void (*product)(Register&, Register, Register), int... i>
inline void each_sum(Register* sums, const Register* a, const Register* b, std::integer_sequence<int, i...>) {
  (product(sums[i], a[i % kOperands], b[i / kOperands % kOperands]), ...);
}

template <void (*product)(Register&, Register, Register), int kProducts>
int64_t repeat(int64_t repeats) {
  Register sums[kSums], a[kOperands], b[kOperands];
  for (auto& sum : sums) sum = Register{};
  for (int i = 0; i < kOperands; ++i) {
    a[i] = load(varied_bits(i));
    b[i] = load(varied_bits(kOperands + i));
  }
  for (int64_t r = 0; r < repeats; ++r) each_sum<product>(sums, a, b, std::make_integer_sequence<int, kSums>());
  return repeats * kSums * kProducts;
}

#else

// The operands lie in memory of the innermost cache; the barrier lets the compiler assume nothing of their values.
template <class T>
inline void forget(T& x) {
  asm volatile("" : "+m"(x));
}

constexpr int kValues = 256;

int64_t repeat_int8(int64_t repeats) {
  int8_t a[kValues], b[kValues];
  int32_t sum = 0;
  std::memcpy(a, varied_bits(0), kValues);
  std::memcpy(b, varied_bits(4), kValues);
  for (int64_t r = 0; r < repeats; ++r) {
    forget(a);
    int32_t dot = 0;
    for (int i = 0; i < kValues; ++i) dot += static_cast<int32_t>(a[i]) * b[i];
    sum ^= dot;
    forget(sum);
  }
  return repeats * kValues;
}

int64_t repeat_float32(int64_t repeats) {
  F32x16 a, b, sum = F32x16::zero();
  std::memcpy(a.v, varied_bits(0), sizeof a.v);
  std::memcpy(b.v, varied_bits(1), sizeof b.v);
  for (int64_t r = 0; r < repeats; ++r) {
    sum = fma(a, b, sum);
    forget(sum);
  }
  return repeats * kLanes;
}

#endif

}  // namespace

const CeilingKernels& ceiling_kernels() {
#if defined(GEMMA2_ISA_AVX512) || defined(GEMMA2_ISA_AVX2) || defined(GEMMA2_ISA_NEON)
  static constexpr CeilingKernels kernels{.read = read,
                                          .dot_int8 = repeat<dot_int8, kInt8>,
                                          .dot_bfloat16 = repeat<dot_bfloat16, kBfloat16>,
                                          .fma_float32 = repeat<fma_float32, kFloat32>};
#else
  static constexpr CeilingKernels kernels{.read = read,
                                          .dot_int8 = repeat_int8,
                                          .dot_bfloat16 = repeat_float32,
                                          .fma_float32 = repeat_float32};
#endif
  return kernels;
}

}  // namespace gemma2::GEMMA2_ISA
