#include "bitdistill/safetensors.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cmath>
#include <cstring>

#include "bitdistill/errors.h"
#include "bitdistill/json.h"

namespace bitdistill {

namespace {

const char* const kRemedy = "make the folder again";

[[noreturn]] void refuse(const std::string& place, const std::string& what) {
  throw ArtifactError(place + ": " + what + "; " + kRemedy);
}

std::uint64_t bits_of(const std::string& dtype) {
  static const std::map<std::string, std::uint64_t> kBits = {
      {"BOOL", 8}, {"U8", 8},   {"I8", 8},   {"U16", 16},     {"I16", 16},     {"F16", 16}, {"BF16", 16},
      {"U32", 32}, {"I32", 32}, {"F32", 32}, {"F8_E4M3", 8}, {"F8_E5M2", 8}, {"U64", 64}, {"I64", 64}, {"F64", 64}};
  const auto found = kBits.find(dtype);
  return found == kBits.end() ? 0 : found->second;
}

DType parse_dtype(const std::string& text) {
  if (text == "F32") return DType::kF32;
  if (text == "F16") return DType::kF16;
  if (text == "BF16") return DType::kBF16;
  if (text == "U8") return DType::kU8;
  return DType::kOther;
}

std::string tensor_place(const std::string& path, std::size_t header_byte, const std::string& name) {
  return path + ": byte " + std::to_string(header_byte) + ": tensor " + name.substr(0, 120);
}

std::uint64_t unsigned_integer(const json::Value& value, const std::string& place, const char* field) {
  if (value.kind != json::Kind::kInt || value.integer < 0) {
    refuse(place, std::string(field) + " holds a value that is no non-negative 64-bit integer");
  }
  return static_cast<std::uint64_t>(value.integer);
}

// Reads one header entry; extents are checked against `data_size` and the shape.
TensorView read_entry(const json::Value& entry, const std::string& place, std::uint64_t data_size) {
  if (entry.kind != json::Kind::kObject || entry.members.size() != 3) {
    refuse(place, "entry is not {dtype, shape, data_offsets}");
  }
  const json::Value* dtype = entry.find("dtype");
  const json::Value* shape = entry.find("shape");
  const json::Value* offsets = entry.find("data_offsets");
  if (dtype == nullptr || dtype->kind != json::Kind::kString || shape == nullptr ||
      shape->kind != json::Kind::kArray || offsets == nullptr || offsets->kind != json::Kind::kArray ||
      offsets->items.size() != 2) {
    refuse(place, "entry is not {dtype, shape, data_offsets}");
  }
  TensorView view;
  view.dtype_text = dtype->text;
  view.dtype = parse_dtype(dtype->text);
  const std::uint64_t bits = bits_of(dtype->text);
  if (bits == 0) refuse(place, "dtype '" + dtype->text.substr(0, 20) + "' is not known");
  std::uint64_t size = bits / 8;
  for (const json::Value& extent : shape->items) {
    const std::uint64_t e = unsigned_integer(extent, place, "shape");
    if (__builtin_mul_overflow(size, e, &size)) refuse(place, "the product of its shape overflows 64 bits");
    view.shape.push_back(e);
  }
  const std::uint64_t begin = unsigned_integer(offsets->items[0], place, "data_offsets");
  const std::uint64_t end = unsigned_integer(offsets->items[1], place, "data_offsets");
  if (begin > end || end > data_size) {
    refuse(place, "data_offsets [" + std::to_string(begin) + ", " + std::to_string(end) +
                      "] are not inside the data of " + std::to_string(data_size) + " bytes");
  }
  if (end - begin != size) {
    refuse(place, "data_offsets span " + std::to_string(end - begin) + " bytes, its shape needs " +
                      std::to_string(size));
  }
  view.offset = begin;
  view.bytes = size;
  return view;
}

}  // namespace

MappedFile::MappedFile(const std::string& path) : path_(path), descriptor_(::open(path.c_str(), O_RDONLY | O_CLOEXEC)) {
  const auto fail = [&](const std::string& what) {
    if (descriptor_ >= 0) ::close(descriptor_);
    refuse(path, what);
  };
  if (descriptor_ < 0) fail(std::string("cannot be opened (") + std::strerror(errno) + ")");
  struct stat status = {};
  if (::fstat(descriptor_, &status) != 0 || !S_ISREG(status.st_mode)) fail("is no regular file");
  size_ = static_cast<std::size_t>(status.st_size);
  if (size_ == 0) return;
  void* mapped = ::mmap(nullptr, size_, PROT_READ, MAP_PRIVATE, descriptor_, 0);
  if (mapped == MAP_FAILED) fail(std::string("cannot be mapped (") + std::strerror(errno) + ")");
  data_ = static_cast<const std::uint8_t*>(mapped);
}

MappedFile::~MappedFile() {
  if (data_ != nullptr) ::munmap(const_cast<std::uint8_t*>(data_), size_);
  ::close(descriptor_);
}

void MappedFile::read(std::size_t offset, std::size_t bytes, void* out) const {
  auto* to = static_cast<std::uint8_t*>(out);
  while (bytes > 0) {
    const ssize_t got = ::pread(descriptor_, to, bytes, static_cast<off_t>(offset));
    if (got < 0 && errno == EINTR) continue;
    if (got <= 0) refuse(path_, "byte " + std::to_string(offset) + ": cannot be read any more");
    to += got;
    offset += static_cast<std::size_t>(got);
    bytes -= static_cast<std::size_t>(got);
  }
}

void release_pages(const void* data, std::size_t bytes) {
  const auto page = static_cast<std::uintptr_t>(::sysconf(_SC_PAGESIZE));
  const auto begin = (reinterpret_cast<std::uintptr_t>(data) + page - 1) / page * page;
  const auto end = (reinterpret_cast<std::uintptr_t>(data) + bytes) / page * page;
  if (begin < end) ::madvise(reinterpret_cast<void*>(begin), end - begin, MADV_DONTNEED);  // advice only
}

std::string read_text(const std::string& path, std::size_t max_bytes) {
  const MappedFile file(path);
  if (file.size() > max_bytes) {
    refuse(path, "has " + std::to_string(file.size()) + " bytes, over " + std::to_string(max_bytes));
  }
  return file.size() == 0 ? std::string() : std::string(reinterpret_cast<const char*>(file.data()), file.size());
}

const char* dtype_name(DType dtype) {
  switch (dtype) {
    case DType::kF32: return "F32";
    case DType::kF16: return "F16";
    case DType::kBF16: return "BF16";
    case DType::kU8: return "U8";
    case DType::kOther: break;
  }
  return "another";
}

std::uint64_t TensorView::elements() const {
  std::uint64_t product = 1;  // cannot overflow: checked when the header was read
  for (const std::uint64_t extent : shape) product *= extent;
  return product;
}

std::string TensorView::place(const std::string& name) const {
  return file + ": " + name + " (byte " + std::to_string(offset) + ")";
}

SafetensorsFile::SafetensorsFile(const std::string& path) : file_(std::make_shared<MappedFile>(path)) {
  const std::uint64_t size = file_->size();
  if (size < 8) refuse(path, "byte 0: " + std::to_string(size) + " bytes are too few for a safetensors header");
  std::uint64_t header = 0;
  std::memcpy(&header, file_->data(), 8);  // little-endian hosts only (x86-64, AArch64)
  if (header == 0 || header > kMaxHeaderBytes || header > size - 8) {
    refuse(path, "byte 0: header length " + std::to_string(header) + " is not between 1 and " +
                     std::to_string(std::min(kMaxHeaderBytes, size - 8)));
  }
  const std::string_view text(reinterpret_cast<const char*>(file_->data()) + 8, header);
  const json::Value root = json::parse(text, path + ": header", kRemedy);
  if (root.kind != json::Kind::kObject) refuse(path, "byte 8: the header is no JSON object");
  const std::uint64_t data_start = 8 + header;
  const std::uint64_t data_size = size - data_start;
  std::vector<std::pair<std::uint64_t, const std::string*>> order;
  for (const auto& [name, entry] : root.members) {
    const std::string place = tensor_place(path, 8 + entry.offset, name);
    if (name == "__metadata__") {
      const bool strings = std::all_of(entry.members.begin(), entry.members.end(),
                                       [](const auto& m) { return m.second.kind == json::Kind::kString; });
      if (entry.kind != json::Kind::kObject || !strings) refuse(place, "is no object of strings");
      continue;
    }
    TensorView view = read_entry(entry, place, data_size);
    order.emplace_back(view.offset, nullptr);
    view.offset += data_start;
    view.data = file_->data() + view.offset;
    view.file = path;
    view.mapped = file_.get();
    order.back().second = &tensors_.emplace(name, std::move(view)).first->first;
  }
  // Empty tensors may share their begin with the next one, so they come first.
  std::sort(order.begin(), order.end(), [this](const auto& a, const auto& b) {
    return std::make_pair(a.first, tensors_.at(*a.second).bytes) < std::make_pair(b.first, tensors_.at(*b.second).bytes);
  });
  std::uint64_t expected = 0;
  for (const auto& [begin, name] : order) {
    if (begin != expected) {
      const char* what = begin < expected ? "overlaps the tensor before it" : "leaves a hole before it";
      refuse(tensor_place(path, data_start + begin, *name), what);
    }
    expected += tensors_.at(*name).bytes;
  }
  if (expected != data_size) {
    refuse(path, "byte " + std::to_string(data_start + expected) + ": " + std::to_string(data_size - expected) +
                     " bytes after the last tensor");
  }
}

float half_to_float(std::uint16_t bits) {
  const std::uint32_t sign = static_cast<std::uint32_t>(bits & 0x8000u) << 16;
  const std::uint32_t exponent = (bits >> 10) & 31u;
  const std::uint32_t mantissa = bits & 1023u;
  if (exponent == 0) {
    const float value = std::ldexp(static_cast<float>(mantissa), -24);
    return sign != 0 ? -value : value;
  }
  const std::uint32_t wide =
      sign | (exponent == 31 ? 0x7F800000u | (mantissa << 13) : ((exponent + 112) << 23) | (mantissa << 13));
  float value;
  std::memcpy(&value, &wide, sizeof value);
  return value;
}

std::uint16_t float_to_half(float value) {
  std::uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  const auto sign = static_cast<std::uint16_t>((bits >> 16) & 0x8000u);
  const std::uint32_t magnitude = bits & 0x7FFFFFFFu;
  if (magnitude >= 0x7F800000u) return sign | (magnitude > 0x7F800000u ? 0x7E00u : 0x7C00u);
  if (magnitude >= 0x477FF000u) return sign | 0x7C00u;  // rounds to 65536 or more: infinity
  if (magnitude < 0x38800000u) {                        // below 2^-14: subnormal half
    const float scaled = std::nearbyintf(std::fabs(value) * 16777216.0f);  // 2^24; exact, then half to even
    return sign | static_cast<std::uint16_t>(scaled);
  }
  const std::uint32_t rounded = magnitude + 0xFFFu + ((magnitude >> 13) & 1u);
  return sign | static_cast<std::uint16_t>((rounded - 0x38000000u) >> 13);
}

std::vector<float> to_float32(const TensorView& tensor, const std::string& name) {
  const std::size_t n = static_cast<std::size_t>(tensor.elements());
  std::vector<float> values(n);
  if (tensor.dtype == DType::kF32) {
    std::memcpy(values.data(), tensor.data, n * 4);
  } else {
    for (std::size_t i = 0; i < n; ++i) {
      std::uint16_t bits;
      std::memcpy(&bits, tensor.data + 2 * i, 2);
      values[i] = tensor.dtype == DType::kBF16 ? bf16_to_float(bits) : half_to_float(bits);
    }
  }
  for (std::size_t i = 0; i < n; ++i) {
    if (!std::isfinite(values[i])) {
      refuse(tensor.place(name), "value " + std::to_string(i) + " is not finite");
    }
  }
  return values;
}

}  // namespace bitdistill
