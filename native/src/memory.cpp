// Memory of weights and caches. Decoding reads every weight once a token, so address translation counts: large buffers,
// and all packed weights together, lie in huge pages where the system offers them.

#include <sys/mman.h>

#include <cstdlib>
#include <cstring>
#include <mutex>
#include <new>

#include "bitdistill/kernels.h"

namespace bitdistill {
namespace {

constexpr size_t kHugePage = size_t{2} << 20;
constexpr size_t kLarge = size_t{4} << 20;  // from here on a buffer has a mapping of its own
constexpr size_t kSlab = size_t{32} << 20;

size_t round_up(size_t bytes, size_t unit) { return (bytes + unit - 1) / unit * unit; }

// A zeroed mapping that starts on a huge page. Pages take memory when they are touched.
struct Mapping {
  explicit Mapping(size_t bytes) : length(bytes + kHugePage) {
    if (length < bytes) throw std::bad_alloc();
    base = mmap(nullptr, length, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (base == MAP_FAILED) throw std::bad_alloc();
    data = reinterpret_cast<uint8_t*>(round_up(reinterpret_cast<uintptr_t>(base), kHugePage));
#if defined(MADV_HUGEPAGE)
    (void)madvise(data, bytes, MADV_HUGEPAGE);  // a wish: without it everything works, a little slower
#endif
  }
  ~Mapping() { munmap(base, length); }
  Mapping(const Mapping&) = delete;
  Mapping& operator=(const Mapping&) = delete;

  void* base;
  uint8_t* data;
  size_t length, used = 0;
};

std::mutex g_slab_mutex;
std::weak_ptr<Mapping> g_slab;  // lives as long as a buffer in it does

}  // namespace

AlignedBuffer::AlignedBuffer(size_t bytes) : size_(bytes) {
  if (bytes == 0) return;
  if (bytes >= kLarge) {
    auto mapping = std::make_shared<Mapping>(bytes);
    data_ = mapping->data;
    owner_ = std::move(mapping);
    return;
  }
  const size_t rounded = round_up(bytes, 64);
  void* p = std::aligned_alloc(64, rounded);
  if (!p) throw std::bad_alloc();
  std::memset(p, 0, rounded);
  owner_ = std::shared_ptr<void>(p, std::free);
  data_ = static_cast<uint8_t*>(p);
}

AlignedBuffer AlignedBuffer::for_weights(size_t bytes) {
  if (bytes == 0 || bytes >= kLarge) return AlignedBuffer(bytes);
  const size_t rounded = round_up(bytes, 64);
  const std::lock_guard<std::mutex> lock(g_slab_mutex);
  std::shared_ptr<Mapping> slab = g_slab.lock();
  if (!slab || kSlab - slab->used < rounded) g_slab = slab = std::make_shared<Mapping>(kSlab);
  AlignedBuffer buffer;
  buffer.data_ = slab->data + slab->used;
  buffer.size_ = bytes;
  slab->used += rounded;
  buffer.owner_ = std::move(slab);
  return buffer;
}

}  // namespace bitdistill
