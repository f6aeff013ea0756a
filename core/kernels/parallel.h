// Threads take tasks as they become free: a thread that the system holds up does not hold up the others.
#pragma once
#include <ATen/Parallel.h>

#include <algorithm>
#include <atomic>
#include <cstdint>

namespace pyra::kernels {

/// Calls worker(next) once per thread; next() gives each task 0..tasks-1 to one of them, then `tasks` or more.
/// What tasks compute must not depend on who runs them. In a parallel region: one worker, the caller.
template <class Worker>
void parallel_tasks(int64_t tasks, const Worker& worker) {
  std::atomic<int64_t> taken{0};
  const auto next = [&taken] { return taken.fetch_add(1, std::memory_order_relaxed); };
  const int64_t workers = at::in_parallel_region() ? 1 : std::min<int64_t>(at::get_num_threads(), tasks);
  if (workers <= 1) {
    worker(next);
    return;
  }
  at::parallel_for(0, workers, 1, [&](int64_t, int64_t) { worker(next); });
}

}  // namespace pyra::kernels
