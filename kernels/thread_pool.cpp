#include "thread_pool.h"

#include <chrono>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace gemma2 {
namespace {

// From one kernel to the next a forward pass takes 2 to 20 µs of Python; waking a sleeping thread costs 50 µs and more.
constexpr auto kSpin = std::chrono::microseconds(100);
constexpr int kPausesPerLook = 16;  // reading the clock costs as much as about this many pauses

inline void pause() {
#if defined(__x86_64__)
  _mm_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

}  // namespace

ThreadPool::ThreadPool(int num_threads) {
  for (int i = 1; i < num_threads; ++i) workers_.emplace_back([this, i] { work(i); });
}

ThreadPool::~ThreadPool() {
  {
    std::lock_guard lock(mutex_);
    stop_ = true;
    generation_.fetch_add(1);
  }
  wake_.notify_all();
  for (auto& worker : workers_) worker.join();
}

void ThreadPool::take_tasks(int thread) {
  for (;;) {
    const int64_t task = next_task_.fetch_add(1, std::memory_order_relaxed);
    if (task >= num_tasks_) return;
    call_(context_, task, thread);
  }
}

void ThreadPool::run(int64_t num_tasks, Call call, void* context) {
  std::lock_guard one_loop(callers_);
  call_ = call;
  context_ = context;
  num_tasks_ = num_tasks;
  next_task_.store(0, std::memory_order_relaxed);
  num_busy_.store(static_cast<int>(workers_.size()), std::memory_order_relaxed);
  bool someone_sleeps;
  {
    std::lock_guard lock(mutex_);
    generation_.fetch_add(1, std::memory_order_release);
    someone_sleeps = num_sleeping_ > 0;
  }
  if (someone_sleeps) wake_.notify_all();
  take_tasks(0);
  // The last tasks of the others are as long as ours, so they end soon; a yield lets them run where cores are shared.
  for (int i = 0; num_busy_.load(std::memory_order_acquire) != 0; ++i) {
    pause();
    if (i > 1000) std::this_thread::yield();
  }
}

void ThreadPool::work(int thread) {
  uint64_t seen = 0;
  for (;;) {
    const auto until = std::chrono::steady_clock::now() + kSpin;
    while (generation_.load(std::memory_order_acquire) == seen) {
      for (int i = 0; i < kPausesPerLook; ++i) pause();
      if (std::chrono::steady_clock::now() < until) continue;
      std::unique_lock lock(mutex_);
      ++num_sleeping_;
      wake_.wait(lock, [&] { return generation_.load(std::memory_order_relaxed) != seen; });
      --num_sleeping_;
    }
    ++seen;  // every worker takes part in every loop, so it has missed none
    if (stop_) return;
    take_tasks(thread);
    num_busy_.fetch_sub(1, std::memory_order_release);
  }
}

}  // namespace gemma2
