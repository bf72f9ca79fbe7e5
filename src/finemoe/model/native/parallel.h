// Work shared between torch's threads.
#pragma once

#include <ATen/Parallel.h>

#include <algorithm>
#include <atomic>
#include <cstdint>

namespace finemoe {

// Every task once, in order of their numbers, by whichever thread is free. Put the largest first.
template <typename Work>
void share_tasks(int64_t tasks, const Work& work) {
  const int64_t threads = std::min<int64_t>(at::get_num_threads(), tasks);
  std::atomic<int64_t> next{0};
  at::parallel_for(0, threads, 1, [&](int64_t, int64_t) {
    for (int64_t task = next++; task < tasks; task = next++) work(task);
  });
}

// An even range of 0 ... n for each thread, none of them shorter than `grain`.
template <typename Work>
void share_range(int64_t n, int64_t grain, const Work& work) {
  at::parallel_for(0, n, std::max<int64_t>(grain, 1), work);
}

}  // namespace finemoe
