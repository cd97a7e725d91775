// The thread pool. One job at a time; workers learn of it by a counter, and sleep on a condition variable when no
// Burst keeps them awake or the wait gets long.

#include "bitdistill/threads.h"

#include <pthread.h>

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <exception>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "bitdistill/errors.h"

namespace bitdistill {
namespace {

constexpr auto kAwake = std::chrono::microseconds(200);  // longest active wait of a worker inside a Burst
// Both sides of an active wait offer their core now and then: on a busy machine the other side may be waiting for it.
constexpr int kSpinsBeforeYield = 64;

inline void relax() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// A child of fork has none of its parent's workers: pools of an older generation start new ones.
std::atomic<int> g_generation{0};
[[maybe_unused]] const int g_registered = pthread_atfork(nullptr, nullptr, [] { g_generation.fetch_add(1); });

// The thread number inside a body, or -1: a nested parallel_for runs in place.
thread_local int t_number = -1;

struct Job {
  const std::function<void(int64_t, int64_t, int)>* body = nullptr;
  int64_t count = 0, grain = 1;
};

// A worker counts as inside only between these two.
struct Inside {
  explicit Inside(std::atomic<int>& n) : count(n) { count.fetch_add(1); }
  ~Inside() { count.fetch_sub(1); }
  std::atomic<int>& count;
};

}  // namespace

struct ThreadPool::Impl {
  // Everything that a fork in the middle of a job could leave in disorder; replaced whole in the child.
  struct State {
    std::mutex callers;  // one job at a time
    std::mutex mutex;
    std::condition_variable wake;
    std::atomic<uint64_t> epoch{0};
    std::atomic<uint64_t> open{0};  // the epoch of the job that may be entered, or 0
    std::atomic<int64_t> next{0};   // the first row that nobody has taken
    std::atomic<int> inside{0}, sleepers{0};
    std::atomic<bool> stop{false};
    Job job;
    std::exception_ptr error;
    std::mutex error_mutex;
    std::vector<std::thread> workers;
  };

  explicit Impl(int n) : threads(n) {}

  int threads;
  std::atomic<int> bursts{0};
  std::mutex start_mutex;
  std::atomic<int> generation{-1};
  std::unique_ptr<State> state;

  void start() {
    if (generation.load(std::memory_order_acquire) == g_generation.load()) return;
    std::lock_guard<std::mutex> lock(start_mutex);
    if (generation.load() == g_generation.load()) return;
    if (state) (void)state.release();  // forked: its threads and locks belong to the parent; leaked on purpose
    auto fresh = std::make_unique<State>();
    for (int i = 1; i < threads; ++i) fresh->workers.emplace_back([this, i, s = fresh.get()] { work(*s, i); });
    state = std::move(fresh);
    generation.store(g_generation.load(), std::memory_order_release);
  }

  // Takes part after part until none is left. Two even parts a thread: few enough to keep reads of memory in long
  // streams, enough to go on when a thread starts late or loses its core.
  void run_parts(State& s, int number) {
    const Job job = s.job;
    const int64_t grains = (job.count + job.grain - 1) / job.grain, parts = 2 * threads;
    const int64_t size = (grains + parts - 1) / parts * job.grain;
    int64_t begin = s.next.load(std::memory_order_relaxed);
    t_number = number;
    while (begin < job.count) {
      const int64_t end = begin + size < job.count ? begin + size : job.count;
      if (!s.next.compare_exchange_weak(begin, end, std::memory_order_relaxed)) continue;
      try {
        (*job.body)(begin, end, number);
      } catch (...) {
        std::lock_guard<std::mutex> lock(s.error_mutex);
        if (!s.error) s.error = std::current_exception();
      }
      begin = s.next.load(std::memory_order_relaxed);
    }
    t_number = -1;
  }

  // Returns the new epoch.
  uint64_t wait_for_job(State& s, uint64_t seen) {
    if (bursts.load(std::memory_order_relaxed) > 0) {
      const auto until = std::chrono::steady_clock::now() + kAwake;
      do {
        for (int i = 0; i < kSpinsBeforeYield; ++i) {
          const uint64_t now = s.epoch.load(std::memory_order_acquire);
          if (now != seen) return now;
          relax();
        }
        std::this_thread::yield();
      } while (std::chrono::steady_clock::now() < until);
    }
    std::unique_lock<std::mutex> lock(s.mutex);
    s.sleepers.fetch_add(1);  // before the epoch is read again: the caller writes it, then reads sleepers
    s.wake.wait(lock, [&] { return s.epoch.load() != seen || s.stop.load(); });
    s.sleepers.fetch_sub(1);
    return s.epoch.load();
  }

  void work(State& s, int number) {
    uint64_t seen = 0;
    for (;;) {
      seen = wait_for_job(s, seen);
      if (s.stop.load()) return;
      // The caller closes the job, then waits until nobody is inside: either it sees this thread, or this thread
      // sees the job closed (both orders sequentially consistent). A worker that comes late is not waited for.
      const Inside inside(s.inside);
      if (s.open.load() == seen) run_parts(s, number);
    }
  }

  void publish(State& s) {
    s.open.store(s.epoch.load() + 1);
    s.epoch.fetch_add(1);
    if (s.sleepers.load() > 0) {
      { std::lock_guard<std::mutex> lock(s.mutex); }
      s.wake.notify_all();
    }
  }

  ~Impl() {
    if (!state) return;
    if (generation.load() != g_generation.load()) {
      (void)state.release();
      return;
    }
    state->stop.store(true);
    publish(*state);
    for (std::thread& worker : state->workers) worker.join();
  }
};

ThreadPool::ThreadPool(int threads) {
  if (threads < 1 || threads > 256)
    throw ModelError("threads: " + std::to_string(threads) + " is out of range; choose 1 to 256");
  impl_ = std::make_unique<Impl>(threads);
  impl_->start();
}

ThreadPool::~ThreadPool() = default;

int ThreadPool::threads() const { return impl_->threads; }

void ThreadPool::parallel_for(int64_t count, int64_t grain,
                              const std::function<void(int64_t, int64_t, int)>& body) {
  if (count <= 0) return;
  if (grain < 1) grain = 1;
  if (t_number >= 0) return body(0, count, t_number);
  if (impl_->threads == 1) return body(0, count, 0);
  impl_->start();
  Impl::State& s = *impl_->state;
  std::lock_guard<std::mutex> lock(s.callers);
  s.job = {&body, count, grain};
  s.error = nullptr;
  s.next.store(0);
  impl_->publish(s);
  impl_->run_parts(s, 0);
  s.open.store(0);
  for (int spins = 0; s.inside.load() > 0; ++spins) {
    if (spins < kSpinsBeforeYield) {
      relax();
    } else {
      std::this_thread::yield();
    }
  }
  if (s.error) std::rethrow_exception(s.error);
}

ThreadPool::Burst::Burst(ThreadPool& pool) : pool_(pool) { pool_.impl_->bursts.fetch_add(1); }
ThreadPool::Burst::~Burst() { pool_.impl_->bursts.fetch_sub(1); }

}  // namespace bitdistill
