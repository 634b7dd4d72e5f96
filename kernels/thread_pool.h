// A pool of threads that share loops.
//
// The calling thread works too, so a pool of n has n - 1 threads of its own. Tasks are handed out one by one from a
// counter: whoever is free takes the next. A worker joins a loop when it comes to see it, and a loop ends when its tasks
// are done, whoever did them: a worker that the system holds up before it joins holds up nobody. A task must write only
// what is its own; then results do not depend on the number of threads.
//
// Between two loops a worker looks out for the next one for about the time that a model's forward pass takes from one
// kernel to the next, giving way to any other thread that wants its core, and then sleeps: an idle program uses no
// processor time.
//
// In a process made by fork() the workers do not exist, and loops run on the calling thread alone.
#pragma once

#include <atomic>
#include <cstdint>
#include <mutex>
#include <thread>
#include <type_traits>
#include <vector>

namespace gemma2 {

class ThreadPool {
 public:
  static constexpr int kMaxThreads = 1024;

  // num_threads: from 1 to kMaxThreads. Throws std::system_error if the system does not give so many.
  explicit ThreadPool(int num_threads);
  ~ThreadPool();  // no loop may be running
  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;

  int num_threads() const { return static_cast<int>(workers_.size()) + 1; }

  // Calls f(task, thread) for every task from 0 to num_tasks - 1; thread is from 0 to num_threads() - 1 and no two
  // tasks of a loop run under one number at a time. Returns when all are done; what they wrote is then visible here.
  // An exception from f ends the program. Loops called from several threads follow one another. A task must not start
  // a loop of the same pool: it would wait for itself.
  template <class F>
  void parallel_for(int64_t num_tasks, F&& f) {
    using Function = std::remove_reference_t<F>;
    if (num_tasks <= 0) return;
    if (num_tasks == 1 || workers_.empty()) {
      for (int64_t i = 0; i < num_tasks; ++i) f(i, 0);
      return;
    }
    const Call call = [](void* context, int64_t task, int thread) noexcept {
      (*static_cast<Function*>(context))(task, thread);
    };
    run(num_tasks, call, const_cast<void*>(static_cast<const void*>(&f)));
  }

 private:
  using Call = void (*)(void*, int64_t, int) noexcept;

  // What `state_` holds: how many workers are in the loop; whether more may join; whether the pool ends; and above
  // these a count of the loops so far. It may run over: a worker that mistakes a loop for one it knows misses nothing
  // but the work.
  static constexpr uint32_t kWorkersMask = 0x3ff, kOpen = 0x400, kStop = 0x800, kOneLoop = 0x1000;
  static constexpr uint32_t kLoopMask = ~(kOneLoop - 1);
  static_assert(kMaxThreads - 1 <= kWorkersMask);

  void run(int64_t num_tasks, Call call, void* context);
  void work(int thread);
  void stop();
  uint32_t wait_for_change(uint32_t seen_loop) const;
  bool join_loop(uint32_t& state);
  void take_tasks(int thread);

  std::mutex callers_;  // held for the length of a loop
  // The loop. Written only while none is open and no worker in one; read only by those who joined.
  Call call_ = nullptr;
  void* context_ = nullptr;
  int64_t num_tasks_ = 0;
  const bool spin_;
  const uint32_t num_forks_;  // of this process, when the pool was made
  alignas(64) std::atomic<uint32_t> state_{0};
  alignas(64) std::atomic<int64_t> next_task_{0};
  std::vector<std::thread> workers_;  // last: they use all of the above
};

}  // namespace gemma2
