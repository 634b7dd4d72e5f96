#include "ceilings.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <vector>

namespace gemma2 {
namespace {

using Clock = std::chrono::steady_clock;

double seconds_since(Clock::time_point start) { return std::chrono::duration<double>(Clock::now() - start).count(); }

// Calls pass() until the time is over; amount / the time of one pass is its rate. The first pass, in which sleeping
// threads wake and pages are mapped, does not count.
template <class Pass>
Rates measure(double amount, double seconds, Pass&& pass) {
  constexpr size_t kFewest = 2;
  pass();
  std::vector<double> rates;
  const auto begin = Clock::now();
  while (rates.size() < kFewest || seconds_since(begin) < seconds) {
    const auto start = Clock::now();
    pass();
    rates.push_back(amount / seconds_since(start));
  }
  std::sort(rates.begin(), rates.end());
  return {rates.back(), rates[rates.size() / 2]};
}

}  // namespace

Rates measure_read_bandwidth(Runtime& runtime, const uint8_t* data, int64_t size, double seconds) {
  constexpr int64_t kTaskBytes = 1 << 20;  // 20 µs or more, beside which handing it out costs nothing
  const auto read = ceiling_kernels(runtime.isa).read;
  const int64_t num_tasks = (size + kTaskBytes - 1) / kTaskBytes;
  std::atomic<uint64_t> all{0};
  return measure(static_cast<double>(size), seconds, [&] {
    runtime.pool.parallel_for(num_tasks, [&](int64_t task, int) {
      const int64_t first = task * kTaskBytes;
      all.fetch_xor(read(data + first, std::min(kTaskBytes, size - first)), std::memory_order_relaxed);
    });
  });
}

Rates measure_dot_peak(Runtime& runtime, DotKind kind, double seconds) {
  constexpr double kTaskSeconds = 5e-4;
  constexpr int kTasksPerThread = 8;  // so that a pass is 4 ms: long beside its start and end, short beside a time slice
  const CeilingKernels& kernels = ceiling_kernels(runtime.isa);
  const auto dot = kind == DotKind::int8       ? kernels.dot_int8
                   : kind == DotKind::bfloat16 ? kernels.dot_bfloat16
                                               : kernels.fma_float32;
  int64_t repeats = 64;
  for (double taken = 0; taken < kTaskSeconds; repeats *= 2) {
    const auto start = Clock::now();
    dot(repeats);
    taken = seconds_since(start);
  }
  const int64_t num_tasks = kTasksPerThread * runtime.pool.num_threads();
  const double operations = 2.0 * static_cast<double>(dot(repeats)) * static_cast<double>(num_tasks);
  return measure(operations, seconds, [&] {
    runtime.pool.parallel_for(num_tasks, [&](int64_t, int) { dot(repeats); });
  });
}

}  // namespace gemma2
