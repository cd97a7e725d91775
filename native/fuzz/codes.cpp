// Packed codes: what repack accepts is decoded, multiplied and compared with the plainest reading of docs/format.md.
//
// Input: rows - 1, columns - 1, tokens - 1, options (one byte each), then codes row by row, then activations.
#include <vector>

#include "bitdistill/errors.h"
#include "bitdistill/kernels.h"
#include "target.h"

using namespace bitdistill;

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  const Stopwatch stopwatch;
  if (size < 4) return 0;
  const std::int64_t rows = data[0] % 67 + 1, cols = data[1] + 1, tokens = data[2] % 9 + 1;
  const Layout layout = data[3] & 1 ? Layout::kBase3Rows16 : Layout::kTwoBitRows16;
  const std::int64_t width = (cols + 3) / 4;
  std::vector<std::uint8_t> packed(static_cast<std::size_t>(rows * width), 0x55);
  std::size_t at = 4;
  for (std::uint8_t& byte : packed) {
    if (at < size) byte = data[at++];
  }
  bool legal = true;
  std::vector<std::int64_t> codes;
  for (std::int64_t r = 0; r < rows; ++r) {
    for (std::int64_t c = 0; c < 4 * width; ++c) {
      const int value = packed[static_cast<std::size_t>(r * width + c / 4)] >> (2 * (c % 4)) & 3;
      legal &= value != 3 && (c < cols || value == 1);
      if (c < cols) codes.push_back(value - 1);
    }
  }
  try {
    const TernaryMatrix matrix = repack(packed.data(), rows, cols, layout, 0.5f, "codes");
    require(legal, "repack accepted illegal codes");
    std::vector<std::int8_t> row(static_cast<std::size_t>(cols));
    for (std::int64_t r = 0; r < rows; ++r) {
      unpack_row(matrix, r, row.data());
      for (std::int64_t c = 0; c < cols; ++c) {
        require(row[static_cast<std::size_t>(c)] == codes[static_cast<std::size_t>(r * cols + c)], "unpack_row");
      }
    }
    QuantizedRows x;
    x.resize(tokens, cols);
    for (std::int64_t t = 0; t < tokens; ++t) {
      std::int32_t sum = 0;
      for (std::int64_t c = 0; c < cols; ++c) {
        x.row(t)[c] = static_cast<std::int8_t>(at < size ? data[at++] : 37 * c + t);
        sum += x.row(t)[c];
      }
      x.sums[static_cast<std::size_t>(t)] = sum;
    }
    std::vector<std::int32_t> y(static_cast<std::size_t>(rows * tokens));
    for (const bool use_gemm : {false, true}) {
      matmul_i32(matrix, x, y.data(), rows, 0, rows, use_gemm);
      for (std::int64_t t = 0; t < tokens; ++t) {
        for (std::int64_t r = 0; r < rows; ++r) {
          std::int64_t sum = 0;
          for (std::int64_t c = 0; c < cols; ++c) sum += codes[static_cast<std::size_t>(r * cols + c)] * x.row(t)[c];
          require(y[static_cast<std::size_t>(t * rows + r)] == sum, use_gemm ? "gemm" : "gemv");
        }
      }
    }
  } catch (const ArtifactError& error) {
    require(!legal, "repack refused legal codes");
    require_message(error.what());
  }
  return 0;
}
