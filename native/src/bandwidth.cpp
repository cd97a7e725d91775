// Read bandwidth, to measure products against.

#include <algorithm>
#include <atomic>
#include <cstring>
#include <ctime>

#include "bitdistill/kernels.h"
#include "bitdistill/threads.h"

namespace bitdistill {
namespace {

std::atomic<uint64_t> g_sink{0};

// One thread is timed by its processor time, which other processes of a shared machine disturb less.
double now(bool alone) {
  timespec t;
  clock_gettime(alone ? CLOCK_THREAD_CPUTIME_ID : CLOCK_MONOTONIC, &t);
  return static_cast<double>(t.tv_sec) + 1e-9 * static_cast<double>(t.tv_nsec);
}

double read_once(ThreadPool& pool, const AlignedBuffer& memory, int64_t prefetch) {
  typedef uint64_t Line __attribute__((vector_size(64)));
  const auto* lines = reinterpret_cast<const Line*>(memory.data());
  const int64_t count = static_cast<int64_t>(memory.size() / 64);
  const bool alone = pool.threads() == 1;
  const double start = now(alone);
  pool.parallel_for(count, 4096, [&](int64_t begin, int64_t end, int) {
    Line a = {}, b = {};
    for (int64_t i = begin; i + 1 < end; i += 2) {
      if (prefetch) {
        __builtin_prefetch(lines + i + prefetch);
        __builtin_prefetch(lines + i + prefetch + 1);
      }
      a |= lines[i];
      b |= lines[i + 1];
    }
    a |= b;
    g_sink.fetch_xor(a[0] ^ a[3] ^ a[7], std::memory_order_relaxed);
  });
  return static_cast<double>(memory.size()) / (now(alone) - start);
}

}  // namespace

double read_bandwidth(ThreadPool& pool, const AlignedBuffer& memory) {
  const ThreadPool::Burst burst(pool);
  return std::max({read_once(pool, memory, 0), read_once(pool, memory, 16), read_once(pool, memory, 32),
                   read_once(pool, memory, 64)});
}

AlignedBuffer bandwidth_memory(int64_t bytes) {
  AlignedBuffer memory(static_cast<size_t>(bytes));
  std::memset(memory.data(), 1, memory.size());  // untouched pages would all be one page of zeros, in the cache
  return memory;
}

}  // namespace bitdistill
