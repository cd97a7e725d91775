// Packing: from the student's 2-bit rows to groups of sixteen rows, int8 rows, and their slow inverses.

#include <algorithm>
#include <cmath>
#include <cstring>

#include "bitdistill/errors.h"
#include "bitdistill/kernels.h"

namespace bitdistill {
namespace {

void check_size(const char* what, const std::string& name, int64_t rows, int64_t cols, int64_t max_cols) {
  if (rows < 1 || rows > (int64_t{1} << 31) || cols < 1 || cols > max_cols)
    throw ModelError(name + ": " + std::to_string(rows) + " x " + std::to_string(cols) + " is no size for " + what +
                     "; 1 to 2^31 rows and 1 to " + std::to_string(max_cols) + " columns are");
}

uint8_t* group_of(TernaryMatrix& m, int64_t row) { return m.storage.data() + row / kGroupRows * m.group_bytes(); }

void place(TernaryMatrix& m, int64_t row, const uint8_t* digits) {  // digits padded to whole blocks
  uint8_t* group = group_of(m, row) + 4 * (row % kGroupRows);
  const int64_t width = block_columns(m.layout);
  for (int64_t b = 0; b < m.block_count(); ++b, group += kBlockBytes, digits += width)
    for (int64_t j = 0; j < 4; ++j) {
      unsigned byte = 0;
      if (m.layout == Layout::kTwoBitRows16) {
        for (int64_t p = 3; p >= 0; --p) byte = byte << 2 | digits[4 * p + j];
      } else {
        for (int64_t p = 4; p >= 0; --p) byte = byte * 3 + digits[4 * p + j];
      }
      group[j] = static_cast<uint8_t>(byte);
    }
}

float to_float(const FloatMatrix& m, int64_t index) {
  if (m.type == FloatType::kF32) return static_cast<const float*>(m.data)[index];
  const uint16_t half = static_cast<const uint16_t*>(m.data)[index];
  uint32_t bits = static_cast<uint32_t>(half) << 16;
  float value;
  if (m.type == FloatType::kBF16) {
    std::memcpy(&value, &bits, 4);
    return value;
  }
  const int exponent = half >> 10 & 31, mantissa = half & 1023;
  if (exponent == 31) {
    value = mantissa ? NAN : INFINITY;
  } else {
    value = exponent ? std::ldexp(static_cast<float>(mantissa + 1024), exponent - 25)
                     : std::ldexp(static_cast<float>(mantissa), -24);
  }
  return half & 0x8000 ? -value : value;
}

}  // namespace

TernaryMatrix repack(const uint8_t* codes_2bit, int64_t rows, int64_t cols, Layout layout, float scale,
                     const std::string& name) {
  check_size("a ternary matrix", name, rows, cols, kMaxColumns);
  TernaryMatrix m;
  m.rows = rows;
  m.cols = cols;
  m.layout = layout;
  m.scale = scale;
  m.storage = AlignedBuffer::for_weights(static_cast<size_t>(m.bytes()));
  m.codes = m.storage.data();
  const int64_t row_bytes = (cols + 3) / 4, padded = m.block_count() * block_columns(layout);
  std::vector<uint8_t> digits(static_cast<size_t>(padded + 4), 1);
  for (int64_t row = 0; row < m.group_count() * kGroupRows; ++row) {
    if (row < rows) {
      const uint8_t* bytes = codes_2bit + row * row_bytes;
      for (int64_t i = 0; i < row_bytes; ++i)
        for (int64_t j = 0; j < 4; ++j) {
          const uint8_t value = bytes[i] >> (2 * j) & 3;
          const int64_t column = 4 * i + j;
          if (value == 3)
            throw ArtifactError(name + ": value 3 at row " + std::to_string(row) + ", column " +
                                std::to_string(column) + " is no code (0, 1, 2 are); re-export the student");
          if (column >= cols && value != 1)
            throw ArtifactError(name + ": padding of row " + std::to_string(row) +
                                " is not value 1; re-export the student");
          digits[static_cast<size_t>(column)] = value;
        }
    } else if (row == rows) {
      std::fill(digits.begin(), digits.end(), uint8_t{1});
    }
    place(m, row, digits.data());
  }
  return m;
}

TernaryMatrix stack_rows(std::vector<TernaryMatrix> parts) {
  if (parts.empty()) throw ModelError("stack_rows: no matrices; give at least one");
  if (parts.size() == 1) return std::move(parts[0]);
  TernaryMatrix m;
  m.cols = parts[0].cols;
  m.layout = parts[0].layout;
  for (size_t i = 0; i < parts.size(); ++i) {
    const TernaryMatrix& part = parts[i];
    if (part.cols != m.cols || part.layout != m.layout)
      throw ModelError("stack_rows: part " + std::to_string(i) + " has " + std::to_string(part.cols) +
                       " columns or another layout; part 0 has " + std::to_string(m.cols));
    if (i + 1 < parts.size() && part.rows % kGroupRows != 0)
      throw ModelError("stack_rows: part " + std::to_string(i) + " has " + std::to_string(part.rows) +
                       " rows; all but the last need a multiple of 16: keep the matrices apart");
    m.rows += part.rows;
    for (int64_t row = 0; row < part.rows; ++row)
      m.row_scales.push_back(part.row_scales.empty() ? part.scale : part.row_scales[static_cast<size_t>(row)]);
  }
  m.storage = AlignedBuffer::for_weights(static_cast<size_t>(m.bytes()));
  m.codes = m.storage.data();
  size_t offset = 0;
  for (const TernaryMatrix& part : parts) {
    std::memcpy(m.storage.data() + offset, part.codes, static_cast<size_t>(part.bytes()));
    offset += static_cast<size_t>(part.bytes());
  }
  return m;
}

void unpack_row(const TernaryMatrix& m, int64_t row, int8_t* codes) {
  const uint8_t* group = m.codes + row / kGroupRows * m.group_bytes() + 4 * (row % kGroupRows);
  const int64_t width = block_columns(m.layout);
  for (int64_t c = 0; c < m.cols; ++c) {
    unsigned byte = group[c / width * kBlockBytes + c % 4];
    const int64_t p = c % width / 4;
    if (m.layout == Layout::kTwoBitRows16) {
      byte = byte >> (2 * p) & 3;
    } else {
      for (int64_t i = 0; i < p; ++i) byte /= 3;
      byte %= 3;
    }
    codes[c] = static_cast<int8_t>(static_cast<int>(byte) - 1);
  }
}

Int8Matrix quantize_int8(const FloatMatrix& matrix) {
  // 65536 columns: the int32 bound of the VNNI kernels.
  check_size("an int8 matrix", "quantize_int8", matrix.rows, matrix.cols, 65536);
  Int8Matrix m;
  m.rows = matrix.rows;
  m.cols = matrix.cols;
  m.row_scales.resize(static_cast<size_t>(m.rows));
  m.storage = AlignedBuffer::for_weights(static_cast<size_t>(m.group_count() * m.group_bytes()));
  m.codes = reinterpret_cast<const int8_t*>(m.storage.data());
  std::vector<float> values(static_cast<size_t>(m.cols));
  for (int64_t row = 0; row < m.rows; ++row) {
    float amax = 0.0f;
    for (int64_t c = 0; c < m.cols; ++c) {
      const float v = to_float(matrix, row * m.cols + c);
      values[static_cast<size_t>(c)] = v;
      if (!std::isfinite(v))
        throw ArtifactError("quantize_int8: row " + std::to_string(row) + ", column " + std::to_string(c) +
                            " is not finite; make the folder again");
      amax = std::fmax(amax, std::fabs(v));
    }
    float scale = amax / 127.0f;
    if (!(scale >= 1.17549435e-38f)) scale = amax > 0.0f ? 1.17549435e-38f : 1.0f;  // no subnormal divisor
    m.row_scales[static_cast<size_t>(row)] = scale;
    uint8_t* group = m.storage.data() + row / kGroupRows * m.group_bytes() + 4 * (row % kGroupRows);
    for (int64_t c = 0; c < m.cols; ++c) {
      const float q = std::nearbyint(values[static_cast<size_t>(c)] / scale);
      const auto code = static_cast<int8_t>(std::fmin(std::fmax(q, -127.0f), 127.0f));
      group[c / 4 * kBlockBytes + c % 4] = static_cast<uint8_t>(code);
    }
  }
  return m;
}

void dequantize_row(const Int8Matrix& m, int64_t row, float* out) {
  const int8_t* group = m.codes + row / kGroupRows * m.group_bytes() + 4 * (row % kGroupRows);
  const float scale = m.row_scales[static_cast<size_t>(row)];
  for (int64_t c = 0; c < m.cols; ++c) out[c] = static_cast<float>(group[c / 4 * kBlockBytes + c % 4]) * scale;
}

void dequantize_row(const FloatMatrix& m, int64_t row, float* out) {
  for (int64_t c = 0; c < m.cols; ++c) out[c] = to_float(m, row * m.cols + c);
}

void QuantizedRows::resize(int64_t new_tokens, int64_t new_cols) {
  const int64_t new_stride = (new_cols + 63) / 64 * 64 + 64;
  const size_t needed = static_cast<size_t>(new_tokens * new_stride);
  const bool same_padding = new_stride == stride && new_cols == cols;
  if (codes.size() < needed) {
    codes = AlignedBuffer(needed);
  } else if (!same_padding) {
    for (int64_t t = 0; t < new_tokens; ++t)
      std::memset(codes.data() + t * new_stride + new_cols, 0, static_cast<size_t>(new_stride - new_cols));
  }
  // Rows of an earlier, smaller count keep their padding: it was zeroed for the same cols and stride, or here.
  if (same_padding && new_tokens > tokens)
    for (int64_t t = tokens; t < new_tokens; ++t)
      std::memset(codes.data() + t * new_stride + new_cols, 0, static_cast<size_t>(new_stride - new_cols));
  tokens = new_tokens;
  cols = new_cols;
  stride = new_stride;
  scales.resize(static_cast<size_t>(new_tokens));
  sums.resize(static_cast<size_t>(new_tokens));
}

}  // namespace bitdistill
