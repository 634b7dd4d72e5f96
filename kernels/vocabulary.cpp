// The k largest of a row.
//
// At least k values reach the k-th largest of the maxima of disjoint sets, so no smaller value can be among the k. One
// pass over the row finds the maxima of some thousand sets, a second reads again only the chunks that reach that bound,
// which leaves few more than k values to sort. Where most values tie or rise, more survive: then the survivors are
// cut back to k whenever their buffer is full, and the bound rises.
#include "vocabulary.h"

#include <algorithm>
#include <cmath>
#include <functional>
#include <limits>
#include <vector>

namespace gemma2 {
namespace {

constexpr int64_t kLanesPerVector = 16;

// A key orders as (value descending, index ascending) does when keys descend.
uint64_t key_of(float value, int32_t index) {
  value += 0.0f;  // -0 and 0 are equal
  uint32_t bits;
  __builtin_memcpy(&bits, &value, sizeof bits);
  bits ^= (bits >> 31) != 0 ? 0xffffffffu : 0x80000000u;  // negative numbers the other way round
  return static_cast<uint64_t>(bits) << 32 | static_cast<uint32_t>(~index);
}
int32_t index_of(uint64_t key) { return static_cast<int32_t>(~static_cast<uint32_t>(key)); }

// What one row needs, kept from row to row of a thread.
struct Workspace {
  std::vector<float> maxima, ranked;
  std::vector<int32_t> indices;
  std::vector<uint64_t> keys;
};

void keep_largest(std::vector<uint64_t>& keys, int64_t k) {
  std::nth_element(keys.begin(), keys.begin() + k - 1, keys.end(), std::greater<>());
  keys.resize(static_cast<size_t>(k));
}

void top_k_of_row(const VocabularyKernels& kernels, const float* x, int64_t size, int64_t k, Workspace& space,
                  int32_t* ids, float* values) {
  // Four sets for each of the k: the bound then leaves about 1.2 k of random values.
  const int64_t vectors_per_chunk = std::clamp<int64_t>(size / (4 * k) / 4 * 4, 4, 256);
  const int64_t chunk = vectors_per_chunk * kLanesPerVector, num_chunks = (size + chunk - 1) / chunk;
  std::vector<float>& maxima = space.maxima;
  maxima.resize(static_cast<size_t>(num_chunks * kLanesPerVector));
  kernels.chunk_maxima(x, size, vectors_per_chunk, maxima.data());
  float bound = -std::numeric_limits<float>::infinity();
  if (k <= static_cast<int64_t>(maxima.size())) {
    space.ranked = maxima;
    std::nth_element(space.ranked.begin(), space.ranked.begin() + k - 1, space.ranked.end(), std::greater<>());
    bound = space.ranked[static_cast<size_t>(k - 1)];
  }

  std::vector<uint64_t>& keys = space.keys;
  keys.clear();
  space.indices.resize(static_cast<size_t>(chunk));
  const size_t most_keys = static_cast<size_t>(std::max<int64_t>(4 * k, 4096));
  uint64_t least_key = 0;  // keys below it are not among the k
  for (int64_t c = 0; c < num_chunks; ++c) {
    const float* chunk_most = maxima.data() + c * kLanesPerVector;
    if (*std::max_element(chunk_most, chunk_most + kLanesPerVector) < bound) continue;
    const int64_t start = c * chunk, length = std::min(chunk, size - start);
    const int64_t found = kernels.indices_at_least(x + start, length, bound, space.indices.data());
    for (int64_t i = 0; i < found; ++i) {
      const int64_t index = start + space.indices[static_cast<size_t>(i)];
      const uint64_t key = key_of(x[index], static_cast<int32_t>(index));
      if (key < least_key) continue;
      keys.push_back(key);
      if (keys.size() < most_keys) continue;
      keep_largest(keys, k);
      least_key = keys.back();
      // What equals it comes later, so only what is greater counts from here on.
      bound = std::nextafter(x[index_of(least_key)], std::numeric_limits<float>::infinity());
    }
  }
  // Too few only if the rest is NaN: it comes last, by index.
  for (int64_t i = 0; i < size && static_cast<int64_t>(keys.size()) < k; ++i) {
    if (std::isnan(x[i])) keys.push_back(static_cast<uint32_t>(~static_cast<int32_t>(i)));
  }
  if (static_cast<int64_t>(keys.size()) > k) keep_largest(keys, k);
  std::sort(keys.begin(), keys.end(), std::greater<>());
  for (int64_t i = 0; i < k; ++i) {
    ids[i] = index_of(keys[static_cast<size_t>(i)]);
    values[i] = x[ids[i]];
  }
}

}  // namespace

void top_k(Runtime& runtime, const Rows& x, int64_t k, int32_t* ids, float* values) {
  std::vector<Workspace> spaces(static_cast<size_t>(runtime.pool.num_threads()));
  const VocabularyKernels& kernels = vocabulary_kernels(runtime.isa);
  runtime.pool.parallel_for(x.rows, [&](int64_t row, int thread) {
    top_k_of_row(kernels, x.row(row), x.width, k, spaces[static_cast<size_t>(thread)], ids + row * k, values + row * k);
  });
}

}  // namespace gemma2
