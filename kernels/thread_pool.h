// A pool of threads that share loops.
//
// The calling thread works too, so a pool of n has n - 1 threads of its own. Tasks are handed out one by one from a
// counter: whoever is free takes the next, so a thread that the system interrupts holds nobody up. A task must write
// only what is its own; then results do not depend on the number of threads.
//
// Between two loops a worker spins for a few microseconds, as long as a model's forward pass takes from one kernel to
// the next, and then sleeps: an idle program uses no processor time.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <mutex>
#include <thread>
#include <type_traits>
#include <vector>

namespace gemma2 {

class ThreadPool {
 public:
  explicit ThreadPool(int num_threads);
  ~ThreadPool();
  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;

  int num_threads() const { return static_cast<int>(workers_.size()) + 1; }

  // Calls f(task, thread) for every task from 0 to num_tasks - 1; thread is from 0 to num_threads() - 1 and no two
  // tasks run under one number at a time. Returns when all are done. f must not throw. Not reentrant: one loop at a
  // time (callers from several Python threads are queued).
  template <class F>
  void parallel_for(int64_t num_tasks, F&& f) {
    using Function = std::remove_reference_t<F>;
    if (num_tasks <= 0) return;
    if (num_tasks == 1 || workers_.empty()) {
      for (int64_t i = 0; i < num_tasks; ++i) f(i, 0);
      return;
    }
    run(num_tasks, [](void* context, int64_t task, int thread) { (*static_cast<Function*>(context))(task, thread); },
        const_cast<void*>(static_cast<const void*>(&f)));
  }

 private:
  using Call = void (*)(void*, int64_t, int);

  void run(int64_t num_tasks, Call call, void* context);
  void work(int thread);
  void take_tasks(int thread);

  std::vector<std::thread> workers_;
  std::mutex callers_;  // held for the length of a loop
  std::mutex mutex_;    // guards the sleepers' wake-up
  std::condition_variable wake_;
  int num_sleeping_ = 0;  // under mutex_
  Call call_ = nullptr;
  void* context_ = nullptr;
  int64_t num_tasks_ = 0;
  alignas(64) std::atomic<uint64_t> generation_{0};  // counts loops; a change starts the workers
  alignas(64) std::atomic<int64_t> next_task_{0};
  alignas(64) std::atomic<int> num_busy_{0};  // workers that have not finished the current loop
  std::atomic<bool> stop_{false};
};

}  // namespace gemma2
