// A pool of threads for row ranges. Workers sleep between requests; inside a Burst they stay awake.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>

#include "bitdistill/kernels.h"

namespace bitdistill {

class ThreadPool {
 public:
  // `threads` counts the caller: 1 makes no worker. Throws ModelError unless 1 <= threads <= 256.
  explicit ThreadPool(int threads);
  ~ThreadPool();
  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;

  int threads() const;

  // Runs body(begin, end, thread) over [0, count) in parts whose borders are multiples of `grain`, and returns when
  // all are done. Threads take parts as they come (a thread may take several, or none if its core is busy with
  // something else), so `thread`, 0 .. threads() - 1, is good for scratch memory only and a result must not depend
  // on the parts. The caller works too, as thread 0. Calls from several threads are served one after the other;
  // calls from inside a body run on the calling thread alone. An exception in a body is rethrown here after all
  // parts have ended.
  void parallel_for(int64_t count, int64_t grain, const std::function<void(int64_t, int64_t, int)>& body);
  // Output rows, in whole cache lines of y and pairs of groups (what a GEMM takes at once).
  void parallel_rows(int64_t rows, const std::function<void(int64_t, int64_t, int)>& body) {
    parallel_for(rows, 32, body);
  }

  // While one lives, idle workers wait actively for a short time (they are needed again within microseconds, as
  // between the matrices of one token); otherwise, and after that time, they sleep. Hold one during a request.
  class Burst {
   public:
    explicit Burst(ThreadPool& pool);
    ~Burst();
    Burst(const Burst&) = delete;
    Burst& operator=(const Burst&) = delete;

   private:
    ThreadPool& pool_;
  };

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

// Bytes a second that the pool reads from `memory` (much larger than the caches), once: the best of reading with and
// without software prefetches.
double read_bandwidth(ThreadPool& pool, const AlignedBuffer& memory);
AlignedBuffer bandwidth_memory(int64_t bytes);

}  // namespace bitdistill
