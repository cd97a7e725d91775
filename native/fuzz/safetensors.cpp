// One safetensors file: header, extents, float conversion.
#include "bitdistill/errors.h"
#include "bitdistill/safetensors.h"
#include "target.h"

using namespace bitdistill;

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  const Stopwatch stopwatch;
  static MemoryFile file;
  file.write(data, size);
  try {
    const SafetensorsFile opened(file.path());
    std::size_t bytes = 0;
    for (const auto& [name, view] : opened.tensors()) {
      require(view.offset + view.bytes <= size, "a tensor lies outside the file");
      bytes += view.bytes;
      if (view.dtype == DType::kF32 || view.dtype == DType::kF16 || view.dtype == DType::kBF16) {
        try {
          require(to_float32(view, name).size() == view.elements(), "elements");
        } catch (const ArtifactError& error) {
          require_message(error.what());
        }
      }
    }
    require(bytes < size, "tensors overlap");
  } catch (const ArtifactError& error) {
    require_message(error.what());
  }
  return 0;
}
