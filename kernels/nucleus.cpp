// The fewest largest weights whose sum reaches a fraction of all.
//
// A radix select with mass in place of counts: the bits of positive floats have the order of the floats, so one pass
// adds every weight to the bin of its leading bits, and only the bin in which the sum from the top passes the wanted
// mass is looked at again. Sums are in float64.
#include <algorithm>
#include <cmath>
#include <functional>
#include <vector>

#include "vocabulary.h"

namespace gemma2 {
namespace {

constexpr int kBinBits = 11;
constexpr int kNumBins = 1 << kBinBits;
constexpr int kFirstShift = 20;  // bits 20 … 30: the exponent and three bits of the fraction
// Neighbouring weights are often in one bin, and adding to one place waits for the addition before it.
constexpr int kCopies = 4;
constexpr size_t kFewEnoughToSort = 256;

uint32_t bits_of(float x) {
  uint32_t bits;
  __builtin_memcpy(&bits, &x, sizeof bits);
  return bits;
}

struct Bin {
  uint32_t index;
  double mass_above;  // of all higher bins
};

// The mass of each bin.
void fill_bins(const std::vector<float>& weights, int shift, std::vector<double>& bins) {
  bins.assign(kCopies * kNumBins, 0.0);
  for (size_t i = 0; i < weights.size(); ++i) {
    bins[(i % kCopies) * kNumBins + (bits_of(weights[i]) >> shift) % kNumBins] += static_cast<double>(weights[i]);
  }
  for (size_t bin = 0; bin < kNumBins; ++bin) {
    for (size_t copy = 1; copy < kCopies; ++copy) bins[bin] += bins[copy * kNumBins + bin];
  }
}

// The highest bin with which the mass from the top reaches `wanted`. Rounding can leave the sum of all a hair below it;
// then the lowest bin that holds any.
Bin find_bin(const std::vector<double>& bins, double mass_above, double wanted) {
  Bin last{0, mass_above};
  for (uint32_t bin = kNumBins; bin-- > 0;) {
    if (bins[bin] == 0) continue;
    last = {bin, mass_above};
    mass_above += bins[bin];
    if (mass_above >= wanted) break;
  }
  return last;
}

// The fewest largest weights that sum to at least `wanted` are those above `smallest` and `num_equal` equal to it.
struct Cut {
  float smallest;
  int64_t num_equal;
};

// Changes `left`.
Cut find_cut(std::vector<float>& left, double wanted) {
  double mass_above = 0;
  std::vector<double> bins;
  // After two steps 22 of 31 bits are the same, and what is left is sorted however much it is.
  for (int shift = kFirstShift; shift >= kFirstShift - kBinBits && left.size() > kFewEnoughToSort; shift -= kBinBits) {
    fill_bins(left, shift, bins);
    const Bin bin = find_bin(bins, mass_above, wanted);
    mass_above = bin.mass_above;
    std::erase_if(left, [=](float w) { return (bits_of(w) >> shift) % kNumBins != bin.index; });
  }
  std::sort(left.begin(), left.end(), std::greater<>());
  for (size_t first = 0;;) {
    const float weight = left[first];
    size_t end = first + 1;
    while (end < left.size() && left[end] == weight) ++end;
    const double mass_with = mass_above + static_cast<double>(weight) * static_cast<double>(end - first);
    if (mass_with >= wanted || end == left.size()) {
      const double needed = weight > 0 ? std::ceil((wanted - mass_above) / static_cast<double>(weight)) : 1.0;
      const auto num_equal = static_cast<int64_t>(end - first);
      return {weight, needed < static_cast<double>(num_equal) ? std::max<int64_t>(1, static_cast<int64_t>(needed))
                                                              : num_equal};
    }
    mass_above = mass_with;
    first = end;
  }
}

}  // namespace

int64_t nucleus(Runtime& runtime, const float* weights, int64_t size, double fraction, int32_t* ids) {
  const VocabularyKernels& kernels = vocabulary_kernels(runtime.isa);
  double total;
  kernels.block_sums(weights, size, size, &total);
  // Weights up to this bound sum to at most (1 - fraction) · total all together, so those above it hold the nucleus.
  // One float lower, as rounding upwards could leave none above.
  const float bound = std::nextafter(static_cast<float>((1.0 - fraction) * total / static_cast<double>(size)), 0.0f);
  const int64_t num_above = kernels.indices_at_least(weights, size, bound, ids);
  if (num_above == 0) return 0;  // only where NaN stands against the rule
  std::vector<float> left(static_cast<size_t>(num_above));
  for (size_t i = 0; i < left.size(); ++i) left[i] = weights[ids[i]];

  Cut cut = find_cut(left, fraction * total);
  int64_t num_kept = 0;
  for (int64_t i = 0; i < num_above; ++i) {
    const int32_t id = ids[i];
    const bool equal = weights[id] == cut.smallest && cut.num_equal > 0;
    ids[num_kept] = id;
    num_kept += equal || weights[id] > cut.smallest;
    cut.num_equal -= equal;
  }
  return num_kept;
}

}  // namespace gemma2
