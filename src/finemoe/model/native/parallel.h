// Work shared between torch's threads.
#pragma once

#include <ATen/Parallel.h>
#include <c10/util/Exception.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <thread>

namespace finemoe {

inline void wait_a_little(int& turns) {
  constexpr int kPatience = 2000;  // some ten microseconds; then others may want the processor more
  if (++turns > kPatience) return std::this_thread::yield();
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// Threads that are called together once, for many short pieces of work. Calling them for each piece would take about as
// long as the piece, and on a busy machine far longer: OpenMP waits for the last thread, which may be off for
// milliseconds, and keeps its processor meanwhile. Here a thread takes part when it comes, and nobody waits for one that
// has not.
class Team {
 public:
  // Of the thread that leads one.
  static Team*& mine() {
    static thread_local Team* team = nullptr;
    return team;
  }

  explicit Team(int64_t threads) : threads(threads) {}

  const int64_t threads;

  // Every task once; returns when all are done.
  template <typename Work>
  void share(int64_t count, const Work& work) {
    if (count == 1) return work(0);
    run_ = [](const void* with, int64_t task) { (*static_cast<const Work*>(with))(task); };
    with_ = &work;
    tasks_.store(count, std::memory_order_relaxed);
    next_.store(0, std::memory_order_relaxed);
    {
      const Open open(*this);
      work_off();
    }
    TORCH_CHECK(!failed_.load(std::memory_order_relaxed), "another thread could not do its part of a pass");
  }

  // `work()` by this thread, which leads.
  template <typename Work>
  void lead(const Work& work) {
    const struct Led {
      Team& team;
      explicit Led(Team& team) : team(team) { mine() = &team; }
      ~Led() {
        mine() = nullptr;
        team.over_.store(true, std::memory_order_release);
      }
    } led(*this);
    work();
  }

  // What the others do until that is over.
  void stand_by() {
    for (int turns = 0; !over_.load(std::memory_order_acquire); wait_a_little(turns))
      if (next_.load(std::memory_order_relaxed) < tasks_.load(std::memory_order_relaxed) && take_part()) turns = 0;
  }

 private:
  static constexpr int kOpen = 1 << 30;  // beside the number of threads that take part

  // While it stands others may come; where it ends, those who did have left.
  struct Open {
    Team& team;
    explicit Open(Team& team) : team(team) {
      mine() = nullptr;  // what a task shares in turn, its thread does alone
      team.state_.store(kOpen, std::memory_order_release);
    }
    ~Open() {
      team.state_.fetch_sub(kOpen, std::memory_order_relaxed);
      for (int turns = 0; team.state_.load(std::memory_order_acquire) != 0;) wait_a_little(turns);
      mine() = &team;
    }
  };

  bool take_part() {
    int seen = state_.load(std::memory_order_relaxed);
    if (seen < kOpen || !state_.compare_exchange_strong(seen, seen + 1, std::memory_order_acquire)) return false;
    const struct Seat {
      std::atomic<int>& state;
      ~Seat() { state.fetch_sub(1, std::memory_order_release); }
    } seat{state_};
    try {
      work_off();
    } catch (...) {
      failed_.store(true, std::memory_order_relaxed);  // what it has not done is missing
      throw;
    }
    return true;
  }

  void work_off() {
    const int64_t count = tasks_.load(std::memory_order_relaxed);
    for (int64_t task = next_++; task < count; task = next_++) run_(with_, task);
  }

  void (*run_)(const void*, int64_t) = nullptr;
  const void* with_ = nullptr;
  std::atomic<int64_t> tasks_{0}, next_{0};
  std::atomic<int> state_{0};
  std::atomic<bool> over_{false}, failed_{false};
};

// `work()`, and what it shares is shared with threads that stand by meanwhile.
template <typename Work>
void with_team(const Work& work) {
  const int64_t threads = at::get_num_threads();
  if (threads == 1 || at::in_parallel_region()) return work();
  Team team(threads);
  at::parallel_for(0, threads, 1,
                   [&](int64_t first, int64_t) { first == 0 ? team.lead(work) : team.stand_by(); });
}

// Every task once, in order of their numbers, by whichever thread is free. Put the largest first.
template <typename Work>
void share_tasks(int64_t tasks, const Work& work) {
  if (tasks == 0) return;
  if (Team* team = Team::mine()) return team->share(tasks, work);
  const int64_t threads = std::min<int64_t>(at::get_num_threads(), tasks);
  std::atomic<int64_t> next{0};
  at::parallel_for(0, threads, 1, [&](int64_t, int64_t) {
    for (int64_t task = next++; task < tasks; task = next++) work(task);
  });
}

// Even ranges of 0 ... n for the threads, none of them shorter than `grain`.
template <typename Work>
void share_range(int64_t n, int64_t grain, const Work& work) {
  grain = std::max<int64_t>(grain, 1);
  Team* team = Team::mine();
  if (!team) return at::parallel_for(0, n, grain, work);
  if (n <= 0) return;
  constexpr int64_t kEach = 4;  // so that a thread that comes late, or is slow, is not waited for long
  const int64_t parts = std::clamp<int64_t>(n / grain, 1, kEach * team->threads);
  team->share(parts, [&](int64_t part) { work(n * part / parts, n * (part + 1) / parts); });
}

}  // namespace finemoe
