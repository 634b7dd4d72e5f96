#include "thread_pool.h"

#include <pthread.h>

#include <chrono>
#include <utility>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace gemma2 {
namespace {

// From one kernel to the next a forward pass takes 2 to 20 µs of Python; waking a sleeping thread costs 50 µs and more.
constexpr auto kLookOut = std::chrono::microseconds(100);
constexpr int kPausesPerLook = 16;  // reading the clock costs as much as about this many pauses

inline void pause() {
#if defined(__x86_64__)
  _mm_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

std::atomic<uint32_t> forks_of_this_process{0};

uint32_t count_forks() {
  static const int registered = pthread_atfork(nullptr, nullptr, [] { forks_of_this_process.fetch_add(1); });
  static_cast<void>(registered);
  return forks_of_this_process.load();
}

}  // namespace

ThreadPool::ThreadPool(int num_threads)
    // With more threads than cores, one that spins keeps another from its task.
    : spin_(num_threads <= static_cast<int>(std::thread::hardware_concurrency())), num_forks_(count_forks()) {
  workers_.reserve(static_cast<size_t>(num_threads - 1));
  try {
    for (int i = 1; i < num_threads; ++i) workers_.emplace_back([this, i] { work(i); });
  } catch (...) {  // the system gives no more threads: those that run must end before they are forgotten
    stop();
    throw;
  }
}

ThreadPool::~ThreadPool() {
  if (forks_of_this_process.load() != num_forks_) {
    // There is nothing to join; nor to detach, as threads that the child started since may bear the handles now.
    new std::vector<std::thread>(std::move(workers_));
    return;
  }
  stop();
}

void ThreadPool::stop() {
  state_.fetch_or(kStop);
  state_.notify_all();
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
  if (forks_of_this_process.load(std::memory_order_relaxed) != num_forks_) {
    for (int64_t task = 0; task < num_tasks; ++task) call(context, task, 0);
    return;
  }
  std::lock_guard one_loop(callers_);
  call_ = call;
  context_ = context;
  num_tasks_ = num_tasks;
  next_task_.store(0, std::memory_order_relaxed);
  const uint32_t next_loop = (state_.load(std::memory_order_relaxed) & kLoopMask) + kOneLoop;
  state_.exchange(next_loop | kOpen);  // publishes the loop
  if (num_tasks - 1 < static_cast<int64_t>(workers_.size())) {
    for (int64_t task = 1; task < num_tasks; ++task) state_.notify_one();
  } else {
    state_.notify_all();
  }
  take_tasks(0);
  state_.fetch_and(~kOpen, std::memory_order_acq_rel);
  // The last tasks of the others are as long as ours, so they end soon; giving way lets them run where cores are shared.
  for (int i = 0; (state_.load(std::memory_order_acquire) & kWorkersMask) != 0; ++i) {
    pause();
    if (!spin_ || i > 1000) std::this_thread::yield();
  }
}

// Returns the state once its loop is another than `seen_loop`, or the pool ends.
uint32_t ThreadPool::wait_for_change(uint32_t seen_loop) const {
  const auto start = std::chrono::steady_clock::now();
  for (;;) {
    const uint32_t state = state_.load(std::memory_order_acquire);
    if ((state & kLoopMask) != seen_loop || (state & kStop) != 0) return state;
    if (std::chrono::steady_clock::now() - start >= kLookOut) {
      state_.wait(state);
    } else if (spin_) {
      for (int i = 0; i < kPausesPerLook; ++i) pause();
    } else {
      std::this_thread::yield();
    }
  }
}

// Enters the loop that `state` shows, or a later one, unless it is closed. `state` becomes the state then.
bool ThreadPool::join_loop(uint32_t& state) {
  while ((state & kOpen) != 0) {
    if (state_.compare_exchange_weak(state, state + 1, std::memory_order_acq_rel, std::memory_order_acquire)) return true;
  }
  return false;
}

void ThreadPool::work(int thread) {
  uint32_t seen_loop = 0;
  for (;;) {
    uint32_t state = wait_for_change(seen_loop);
    if ((state & kStop) != 0) return;
    if (join_loop(state)) {
      take_tasks(thread);
      state_.fetch_sub(1, std::memory_order_release);
    }
    seen_loop = state & kLoopMask;
  }
}

}  // namespace gemma2
