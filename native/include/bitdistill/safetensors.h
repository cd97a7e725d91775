// Bounds-checked, memory-mapped safetensors files.
//
// A file is: u64 little-endian header length N | N bytes of JSON | data. Refused, with file and byte offset: N of
// 0, over kMaxHeaderBytes or past the end; JSON that is not an object of {dtype, shape, data_offsets}; duplicate
// names; products that overflow; extents that are not [begin, end] inside the data; holes and overlaps.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <vector>

namespace bitdistill {

constexpr std::uint64_t kMaxHeaderBytes = 100'000'000;

// A whole file, mapped read-only and open; unmapped and closed by the destructor.
class MappedFile {
 public:
  explicit MappedFile(const std::string& path);
  ~MappedFile();
  MappedFile(const MappedFile&) = delete;
  MappedFile& operator=(const MappedFile&) = delete;

  const std::uint8_t* data() const { return data_; }
  std::size_t size() const { return size_; }
  const std::string& path() const { return path_; }
  // Copies bytes without mapping them into memory: for single rows of a large table. Throws ArtifactError if the file
  // has become shorter or cannot be read.
  void read(std::size_t offset, std::size_t bytes, void* out) const;

 private:
  std::string path_;
  int descriptor_ = -1;
  const std::uint8_t* data_ = nullptr;
  std::size_t size_ = 0;
};

// Lets the system take back the memory of mapped, unchanged file pages that lie wholly in the range; they are read
// again at the next use. For bytes that were only needed at load.
void release_pages(const void* data, std::size_t bytes);

// A small text file (config.json, manifests) as a string. Throws ArtifactError if missing or over max_bytes.
std::string read_text(const std::string& path, std::size_t max_bytes);

enum class DType : std::uint8_t { kF32, kF16, kBF16, kU8, kOther };
const char* dtype_name(DType dtype);

// One tensor inside a mapped file; `data` is valid while the file is.
struct TensorView {
  DType dtype = DType::kOther;
  std::string dtype_text;
  std::vector<std::uint64_t> shape;
  const std::uint8_t* data = nullptr;
  std::size_t bytes = 0;
  std::size_t offset = 0;  // of the first data byte in the file
  std::string file;
  const MappedFile* mapped = nullptr;

  std::uint64_t elements() const;
  std::string place(const std::string& name) const;  // "<file>: <name> (byte <offset>)"
};

class SafetensorsFile {
 public:
  explicit SafetensorsFile(const std::string& path);

  const std::map<std::string, TensorView>& tensors() const { return tensors_; }
  const std::string& path() const { return file_->path(); }

 private:
  std::shared_ptr<MappedFile> file_;
  std::map<std::string, TensorView> tensors_;
};

float half_to_float(std::uint16_t bits);
std::uint16_t float_to_half(float value);  // round to nearest even
inline float bf16_to_float(std::uint16_t bits) {
  const std::uint32_t wide = static_cast<std::uint32_t>(bits) << 16;
  float value;
  __builtin_memcpy(&value, &wide, sizeof value);
  return value;
}

// A float tensor as float32. Throws ArtifactError if a value is NaN or infinite.
std::vector<float> to_float32(const TensorView& tensor, const std::string& name);

}  // namespace bitdistill
