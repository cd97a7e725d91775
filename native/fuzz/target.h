// What the fuzz targets share: checks that end the program, and files that live in memory.
#pragma once

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <ctime>
#include <string>

inline void require(bool good, const char* what) {
  if (good) return;
  std::fprintf(stderr, "check failed: %s\n", what);
  std::abort();
}

// An error message is one line that says what to do (after a semicolon).
inline void require_message(const char* text) {
  require(std::strchr(text, '\n') == nullptr, "an error message of several lines");
  require(std::strchr(text, ';') != nullptr, "an error message without a remedy");
  require(std::strlen(text) < 2000, "an endless error message");
}

// No input takes more than a second of processor time (of wall time it may: the machine has other work).
class Stopwatch {
 public:
  Stopwatch() : start_(now()) {}
  ~Stopwatch() { require(now() - start_ < 1.0, "an input took more than a second"); }
  Stopwatch(const Stopwatch&) = delete;
  Stopwatch& operator=(const Stopwatch&) = delete;

 private:
  static double now() {
    timespec time = {};
    ::clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &time);
    return static_cast<double>(time.tv_sec) + 1e-9 * static_cast<double>(time.tv_nsec);
  }
  double start_;
};

class MemoryFile {
 public:
  MemoryFile() : descriptor_(::memfd_create("input", 0)) {
    if (descriptor_ < 0) std::abort();
    path_ = "/proc/self/fd/" + std::to_string(descriptor_);
  }
  void write(const std::uint8_t* data, std::size_t size) {
    if (::ftruncate(descriptor_, static_cast<off_t>(size)) != 0 ||
        ::pwrite(descriptor_, data, size, 0) != static_cast<ssize_t>(size)) {
      std::abort();
    }
  }
  const std::string& path() const { return path_; }

 private:
  int descriptor_;
  std::string path_;
};
