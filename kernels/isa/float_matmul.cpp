// Products with float32 and bfloat16 weights: out[row][j] = Σ x[row][k] · w[j][k].
//
// float32   One accumulator per output: acc = 0, then acc = fma(x[k], w[k], acc) for k = 0, 1, 2, …
// bfloat16  acc = 0, then dot() of simd_bf16.h for the pairs of inputs (0, 1), (2, 3), …: float32 accumulation, the odd
//           input of a pair before the even one, subnormals flushed.
//
// An output's sum is one chain in this order whatever the number of rows, of threads and the instruction set, so its
// bits depend on nothing else. (Independent chains are the outputs: a tile has enough of them to hide the latency of
// an fma.) Against exact arithmetic: error at most inputs · 2⁻²⁴ · Σ |x[k]| · |w[k]|.
//
// Both formats are alike seen as words of 4 bytes: a word is one float32 or a pair of bfloat16, a step takes one word
// of each row of x and 16 words of w, [tile][step][2 halves][16 outputs]. What inputs are padded with is 0 in x and w;
// outputs beyond the last are computed (as 0) and not stored.
//
// A register tile is some rows times some halves of tiles. Many rows go through a block of w that stays in the L2
// cache: `kBlockSteps` of a panel of `kPanelTiles` tiles. Between blocks the sums wait in `out`.
#include "float_matmul.h"

#include "simd.h"
#include "simd_bf16.h"

namespace gemma2::GEMMA2_ISA {
namespace {

// Rows and halves of tiles of a register tile. 32 registers of AVX-512: 6 × 4 sums, 4 of w, 1 of x. AVX2 has 16, two to
// a vector: 6 × 1 sums, 2 of w, 1 of x, a mask. NEON has 32, four to a vector: 5 × 1 sums, 4 of w, 5 of x.
// Up to kMaxRows rows go at once, so that w comes from memory in one pass with the arithmetic; more go by kRowsOfMany.
// (Not 12: rows are often 4 KiB times something apart, all in one set of the L1 cache, which has 8 places.)
#if defined(GEMMA2_ISA_AVX512)
constexpr int kMaxRows = 8, kRowsOfMany = 6;
constexpr int halves_for(int rows) { return rows <= 6 ? 4 : 2; }
constexpr int64_t kBlockSteps = 512;
#elif defined(GEMMA2_ISA_AVX2)
constexpr int kMaxRows = 6, kRowsOfMany = 6;
constexpr int halves_for(int rows) { return rows <= 2 ? 2 : 1; }
constexpr int64_t kBlockSteps = 256;
#elif defined(GEMMA2_ISA_NEON)
constexpr int kMaxRows = 5, kRowsOfMany = 5;
constexpr int halves_for(int rows) { return rows <= 2 ? 2 : 1; }
constexpr int64_t kBlockSteps = 256;
#else
constexpr int kMaxRows = 4, kRowsOfMany = 4;
constexpr int halves_for(int) { return 1; }
constexpr int64_t kBlockSteps = 256;
#endif

// 4 tiles × 512 steps × 128 bytes: 256 KiB, a quarter to a half of an L2 cache.
constexpr int kPanelTiles = 4;
// A task should take longer than the 0.1 µs of handing it out, a loop longer than the 2 µs of starting it: in words of
// w times rows, of which a core does some 16 a nanosecond out of registers and 4 out of the L3 cache.
constexpr int64_t kTaskWork = 1 << 15;
constexpr int64_t kSerialWork = 1 << 16;

struct Float32 {
  using Word = float;
  struct Mode {};
  static const float* words(const Activations& x) { return x.float32.get(); }
  static int64_t words_per_row(const Activations& x) { return x.padded_width; }

  struct Rows {
    const float* x;
    int64_t stride;
    Rows(const float* x, int64_t stride, int, int64_t) : x(x), stride(stride) {}
  };

  template <int rows, int halves>
  static inline void step(const float* const (&w)[halves], const Rows& x, int64_t s, F32x16 (&sums)[rows][halves]) {
    F32x16 weights[halves];
#pragma GCC unroll 8
    for (int h = 0; h < halves; ++h) weights[h] = F32x16::load(w[h]);
#pragma GCC unroll 8
    for (int r = 0; r < rows; ++r) {
      const F32x16 value = F32x16::broadcast(x.x[r * x.stride + s]);
#pragma GCC unroll 8
      for (int h = 0; h < halves; ++h) sums[r][h] = fma(value, weights[h], sums[r][h]);
    }
  }
};

struct Bfloat16 {
  using Word = uint32_t;
  using Mode = FlushSubnormals;
  static const uint32_t* words(const Activations& x) { return reinterpret_cast<const uint32_t*>(x.bfloat16.get()); }
  static int64_t words_per_row(const Activations& x) { return x.padded_width / 2; }

#if defined(GEMMA2_ISA_AVX512) || defined(GEMMA2_ISA_SCALAR)
  struct Rows {
    const uint32_t* x;
    int64_t stride;
    Rows(const uint32_t* x, int64_t stride, int, int64_t) : x(x), stride(stride) {}
  };

  template <int rows, int halves>
  static inline void step(const uint32_t* const (&w)[halves], const Rows& x, int64_t s, F32x16 (&sums)[rows][halves]) {
    Bf16x32 weights[halves];
#pragma GCC unroll 8
    for (int h = 0; h < halves; ++h) weights[h] = Bf16x32::load(w[h]);
#pragma GCC unroll 8
    for (int r = 0; r < rows; ++r) {
      uint32_t pair;
      __builtin_memcpy(&pair, x.x + r * x.stride + s, sizeof pair);
      const Bf16x32 value = Bf16x32::broadcast(pair);
#pragma GCC unroll 8
      for (int h = 0; h < halves; ++h) sums[r][h] = dot(value, weights[h], sums[r][h]);
    }
  }
#else
  // Without an instruction for dot(), a block of x becomes float32 first.
  struct Rows {
    float x[kMaxRows][2 * kBlockSteps];
    Rows(const uint32_t* from, int64_t stride, int rows, int64_t steps) {
      for (int r = 0; r < rows; ++r) {
        const auto* pairs = reinterpret_cast<const uint16_t*>(from + r * stride);
        for (int64_t k = 0; k < 2 * steps; k += 16) F32x16::load_bf16(pairs + k).store(x[r] + k);
      }
    }
  };

  // dot() in two halves: the odd inputs of all rows, then the even ones.
  template <int rows, int halves>
  static inline void step(const uint32_t* const (&w)[halves], const Rows& x, int64_t s, F32x16 (&sums)[rows][halves]) {
    F32x16 weights[halves];
#pragma GCC unroll 8
    for (int h = 0; h < halves; ++h) weights[h] = Bf16x32::load(w[h]).odd();
#pragma GCC unroll 8
    for (int r = 0; r < rows; ++r) {
      const F32x16 value = F32x16::broadcast(x.x[r][2 * s + 1]);
#pragma GCC unroll 8
      for (int h = 0; h < halves; ++h) sums[r][h] = fma(value, weights[h], sums[r][h]);
    }
#pragma GCC unroll 8
    for (int h = 0; h < halves; ++h) weights[h] = Bf16x32::load(w[h]).even();
#pragma GCC unroll 8
    for (int r = 0; r < rows; ++r) {
      const F32x16 value = F32x16::broadcast(x.x[r][2 * s]);
#pragma GCC unroll 8
      for (int h = 0; h < halves; ++h) sums[r][h] = fma(value, weights[h], sums[r][h]);
    }
  }
#endif
};

template <class Format>
struct Product {
  using Word = typename Format::Word;
  const Word* x;
  const Word* w;
  float* out;
  int64_t steps, outputs;  // steps is also the words of a row of x

  const Word* weights_at(int64_t half, int64_t step) const {
    return w + (half / 2) * steps * kTile + step * kTile + (half % 2) * kLanesPerHalf;
  }

  // Adds the steps from `step` to the outputs from half · 16; `ahead` asks for the steps of the next block of w.
  template <int rows, int halves, bool ahead>
  [[gnu::noinline]] void register_tile(const typename Format::Rows& x, int64_t row, int64_t half, int64_t step,
                                       int64_t num_steps) const {
    F32x16 sums[rows][halves];
    int lanes[halves];
    const Word* weights[halves];
#pragma GCC unroll 8
    for (int h = 0; h < halves; ++h) {
      const int64_t left = outputs - (half + h) * kLanesPerHalf;
      lanes[h] = static_cast<int>(left < 0 ? 0 : left < kLanesPerHalf ? left : kLanesPerHalf);
      weights[h] = weights_at(half + h, step);
    }
    float* to = out + row * outputs + half * kLanesPerHalf;
#pragma GCC unroll 8
    for (int r = 0; r < rows; ++r) {
#pragma GCC unroll 8
      for (int h = 0; h < halves; ++h) {
        sums[r][h] = step == 0 ? F32x16::zero() : F32x16::load_partial(to + r * outputs + h * kLanesPerHalf, lanes[h]);
      }
    }
    for (int64_t s = 0; s < num_steps; ++s) {
      if constexpr (ahead) {
        __builtin_prefetch(weights[0] + num_steps * kTile);
        __builtin_prefetch(weights[0] + num_steps * kTile + kLanesPerHalf);
      }
      Format::template step<rows, halves>(weights, x, s, sums);
#pragma GCC unroll 8
      for (int h = 0; h < halves; ++h) weights[h] += kTile;
    }
#pragma GCC unroll 8
    for (int r = 0; r < rows; ++r) {
#pragma GCC unroll 8
      for (int h = 0; h < halves; ++h) sums[r][h].store_partial(to + r * outputs + h * kLanesPerHalf, lanes[h]);
    }
  }

  // Where register tiles without w's two halves side by side would wait for memory, the first rows ask for the next
  // block of w while they read this one.
  template <int rows>
  void some_rows(int64_t row, bool are_first, int64_t first_tile, int64_t last_tile, int64_t step,
                 int64_t num_steps) const {
    constexpr int halves = halves_for(rows);
    const typename Format::Rows values(x + row * steps + step, steps, rows, num_steps);
    int64_t half = 2 * first_tile;
    if constexpr (halves == 1) {
      for (; half < 2 * last_tile; half += 2) {
        if (are_first) {
          register_tile<rows, 1, true>(values, row, half, step, num_steps);
        } else {
          register_tile<rows, 1, false>(values, row, half, step, num_steps);
        }
        register_tile<rows, 1, false>(values, row, half + 1, step, num_steps);
      }
    } else {
      for (; half + halves <= 2 * last_tile; half += halves) {
        register_tile<rows, halves, false>(values, row, half, step, num_steps);
      }
      if constexpr (halves > 2) {
        if (half < 2 * last_tile) register_tile<rows, 2, false>(values, row, half, step, num_steps);
      }
    }
  }

  // Calls some_rows for `num_rows` rows, of which there are at most `rows`.
  template <int rows, class... Rest>
  void up_to(int64_t num_rows, Rest... rest) const {
    if (num_rows == rows) return some_rows<rows>(rest...);
    if constexpr (rows > 1) up_to<rows - 1>(num_rows, rest...);
  }

  // All rows from first_row to last_row - 1 of a panel of tiles.
  void panel(int64_t first_row, int64_t last_row, int64_t first_tile, int64_t last_tile) const {
    const int64_t num_rows = last_row - first_row;
    const int64_t num_parts = num_rows <= kMaxRows ? 1 : (num_rows + kRowsOfMany - 1) / kRowsOfMany;
    for (int64_t step = 0; step < steps; step += kBlockSteps) {
      const int64_t num_steps = steps - step < kBlockSteps ? steps - step : kBlockSteps;
      for (int64_t part = 0; part < num_parts; ++part) {
        const int64_t row = first_row + num_rows * part / num_parts;
        const int64_t end = first_row + num_rows * (part + 1) / num_parts;
        up_to<kMaxRows>(end - row, row, part == 0, first_tile, last_tile, step, num_steps);
      }
    }
  }
};

template <class Format>
void multiply(ThreadPool& pool, const Activations& x, const Matrix& w, float* out) {
  const Product<Format> product{Format::words(x), reinterpret_cast<const typename Format::Word*>(w.data), out,
                                Format::words_per_row(x), w.outputs};
  const int64_t tiles = w.num_tiles(), tile_work = product.steps * kTile * x.rows;
  // Panels of one tile hand out few rows most evenly; more rows want a panel that they share.
  int64_t panel = x.rows <= kMaxRows ? 1 : kPanelTiles;
  while (panel < tiles && panel * tile_work < kTaskWork) panel *= 2;
  if (tiles * tile_work <= kSerialWork) panel = tiles;
  const int64_t panels = (tiles + panel - 1) / panel;
  // Few panels for many threads: cut the rows too.
  int64_t row_chunks = 1;
  if (panels > 1 && pool.num_threads() > 1) {
    const int64_t wanted = (4 * pool.num_threads() + panels - 1) / panels, most = x.rows / (4 * kRowsOfMany);
    row_chunks = wanted < most ? wanted : most;
    if (row_chunks < 1) row_chunks = 1;
  }
  pool.parallel_for(panels * row_chunks, [&](int64_t task, int) {
    [[maybe_unused]] const typename Format::Mode mode;
    const int64_t first_tile = task / row_chunks * panel, chunk = task % row_chunks;
    const int64_t last_tile = first_tile + panel < tiles ? first_tile + panel : tiles;
    product.panel(x.rows * chunk / row_chunks, x.rows * (chunk + 1) / row_chunks, first_tile, last_tile);
  });
}

void float_matmul(ThreadPool& pool, const Activations& x, const Matrix& w, float* out) {
  if (x.rows == 0) return;
  if (w.format == WeightFormat::bfloat16) {
    multiply<Bfloat16>(pool, x, w, out);
  } else {
    multiply<Float32>(pool, x, w, out);
  }
}

}  // namespace

const FloatMatmulKernels& float_matmul_kernels() {
  static constexpr FloatMatmulKernels kernels{.float_matmul = float_matmul};
  return kernels;
}

}  // namespace gemma2::GEMMA2_ISA
