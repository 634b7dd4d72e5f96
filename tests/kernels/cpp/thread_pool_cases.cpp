// The pool under stress: loops of every length right after one another, several callers, pools that come and go.
#include "thread_pool.h"

#include <stdexcept>

#include "selftest.h"

namespace gemma2::selftest {
namespace {

void require_sound(bool condition) {
  if (!condition) throw std::runtime_error("thread pool: a task was left out or done twice");
}

void check_loops(ThreadPool& pool, int num_loops, int64_t most_tasks) {
  std::vector<int64_t> done(static_cast<size_t>(most_tasks));
  for (int64_t loop = 0; loop < num_loops; ++loop) {
    const int64_t num_tasks = 1 + loop * 7 % most_tasks;
    pool.parallel_for(num_tasks, [&](int64_t task, int thread) {
      require_sound(thread >= 0 && thread < pool.num_threads());
      done[static_cast<size_t>(task)] += loop + task;
    });
    for (int64_t task = 0; task < most_tasks; ++task) {
      require_sound(done[static_cast<size_t>(task)] == (task < num_tasks ? loop + task : 0));
      done[static_cast<size_t>(task)] = 0;
    }
  }
}

}  // namespace

void thread_pool_cases() {
  for (int num_threads : {1, 2, 3, 8}) {
    ThreadPool pool(num_threads);
    check_loops(pool, 500, 40);
    std::vector<std::thread> callers;
    for (int caller = 0; caller < 3; ++caller) callers.emplace_back([&] { check_loops(pool, 100, 64); });
    for (std::thread& caller : callers) caller.join();
  }
  for (int i = 0; i < 30; ++i) {
    ThreadPool pool(5);
    if (i % 2) check_loops(pool, 1, 7);
  }
}

}  // namespace gemma2::selftest
