// Cutting work on many equal units into tasks that are worth handing to another thread.
#pragma once

#include <cstdint>

#include "thread_pool.h"

namespace gemma2 {

// Calls f(first, last) for consecutive ranges of the units 0 … num_units - 1, each of at least `units_per_task` units
// (but for the last), on the calling thread alone if there is no more than that. f must treat every unit on its own.
template <class F>
void for_ranges(ThreadPool& pool, int64_t num_units, int64_t units_per_task, F&& f) {
  if (num_units <= units_per_task || pool.num_threads() == 1) {
    f(int64_t{0}, num_units);
    return;
  }
  // A few tasks a thread, so that one that is held up leaves its share to the others.
  constexpr int64_t kTasksPerThread = 4;
  const int64_t most_tasks = kTasksPerThread * pool.num_threads();
  int64_t per_task = (num_units + most_tasks - 1) / most_tasks;
  if (per_task < units_per_task) per_task = units_per_task;
  pool.parallel_for((num_units + per_task - 1) / per_task, [&](int64_t task, int) {
    const int64_t first = task * per_task, last = first + per_task;
    f(first, last < num_units ? last : num_units);
  });
}

}  // namespace gemma2
