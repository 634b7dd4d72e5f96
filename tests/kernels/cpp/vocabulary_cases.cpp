#include "vocabulary.h"

#include "selftest.h"

namespace gemma2::selftest {

void vocabulary_cases(Runtime& runtime) {
  const VocabularyKernels& kernels = vocabulary_kernels(runtime.isa);
  for (int64_t width : {1, 15, 100, 5003}) {
    Random random(static_cast<uint64_t>(width));
    const int64_t rows = 3, stride = width + 5;
    std::vector<float> logits = random.normals(rows * stride, 9.0f);
    logits[static_cast<size_t>(width / 2)] = -__builtin_inff();
    const Rows x{logits.data(), rows, width, stride};
    Hash hash;
    for (int64_t k : {int64_t{1}, width / 3 + 1, width}) {
      std::vector<int32_t> ids(static_cast<size_t>(rows * k));
      std::vector<float> values(static_cast<size_t>(rows * k));
      top_k(runtime, x, k, ids.data(), values.data());
      hash.values(ids.data(), rows * k);
      hash.values(values.data(), rows * k);
    }
    print("top_k " + std::to_string(width), hash);

    std::vector<float> out(static_cast<size_t>(rows * width));
    Hash softmaxes;
    for (double temperature : {1.0, 0.6}) {
      kernels.softmax_weights(runtime.pool, x, temperature, out.data());
      softmaxes.values(out.data(), rows * width);
      kernels.softmax(runtime.pool, x, temperature, out.data());
      softmaxes.values(out.data(), rows * width);
    }
    print("softmax " + std::to_string(width), softmaxes);

    // The logarithm is the C library's, whose last bit may differ from processor to processor.
    double normalizers[3];
    kernels.log_normalizers(runtime.pool, x, normalizers);
    Hash logs;
    for (double normalizer : normalizers) {
      const auto rounded = static_cast<float>(normalizer);
      logs.values(&rounded, 1);
    }
    print("log_normalizers " + std::to_string(width), logs);

    std::vector<double> sums(static_cast<size_t>((width + 63) / 64));
    kernels.block_sums(out.data(), width, 64, sums.data());
    Hash nuclei;
    nuclei.values(sums.data(), static_cast<int64_t>(sums.size()));
    std::vector<int32_t> ids(static_cast<size_t>(width));
    for (double fraction : {0.1, 0.9, 0.9999}) {
      const int64_t count = nucleus(runtime, out.data(), width, fraction, ids.data());
      nuclei.values(ids.data(), count);
    }
    print("nucleus " + std::to_string(width), nuclei);
  }
}

}  // namespace gemma2::selftest
