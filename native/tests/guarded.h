// Memory flush against unreadable pages, for tests: one byte too far is a fault.
#pragma once

#include <sys/mman.h>
#include <unistd.h>

#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>

struct Guarded {
  enum Side { kFront, kBack };  // which end touches its page

  Guarded(size_t bytes, Side side) {
    const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
    const size_t inner = (bytes + page - 1) / page * page;
    length_ = inner + 2 * page;
    base_ = static_cast<uint8_t*>(mmap(nullptr, length_, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    if (base_ == MAP_FAILED || (inner && mprotect(base_ + page, inner, PROT_READ | PROT_WRITE) != 0)) {
      std::perror("mmap");
      std::exit(2);
    }
    data = base_ + page + (side == kFront ? 0 : inner - bytes);
  }
  ~Guarded() { munmap(base_, length_); }
  Guarded(const Guarded&) = delete;
  Guarded& operator=(const Guarded&) = delete;

  uint8_t* data;

 private:
  uint8_t* base_;
  size_t length_;
};
