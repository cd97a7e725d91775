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

// A 4 x 4 matrix of two-bit values, transposed: byte p, field j -> byte j, field p.
inline uint32_t transpose_fields(uint32_t v) {
  uint32_t t = (v ^ (v >> 6)) & 0x00cc00ccu;
  v ^= t ^ (t << 6);
  t = (v ^ (v >> 12)) & 0x0000f0f0u;
  return v ^ t ^ (t << 12);
}

// The four two-bit values of a byte as four bytes.
struct SpreadTable {
  uint32_t bytes[256];
  constexpr SpreadTable() : bytes() {
    for (uint32_t v = 0; v < 256; ++v) bytes[v] = (v & 3) | (v >> 2 & 3) << 8 | (v >> 4 & 3) << 16 | v >> 6 << 24;
  }
};
constexpr SpreadTable kSpread;

inline void store4(uint8_t* to, uint32_t bytes) {  // little end first
  if constexpr (__BYTE_ORDER__ == __ORDER_BIG_ENDIAN__) bytes = __builtin_bswap32(bytes);
  std::memcpy(to, &bytes, 4);
}
inline uint32_t load4(const uint8_t* from) {
  uint32_t bytes;
  std::memcpy(&bytes, from, 4);
  if constexpr (__BYTE_ORDER__ == __ORDER_BIG_ENDIAN__) bytes = __builtin_bswap32(bytes);
  return bytes;
}

// One row of a file (a byte is a quad; `quads` of them, padded with 0x55 to whole blocks) into its group.
void place_two_bit(uint8_t* group, int64_t r, const uint8_t* row, int64_t quads) {
  uint8_t* to = group + 4 * r;
  for (int64_t q = 0; q < quads; q += 4, to += kBlockBytes) store4(to, transpose_fields(load4(row + q)));
}
// Groups of base 3 share blocks: quad `first` of the stream is the row's first. Digits are added to what is there.
void place_base3(uint8_t* stream, int64_t first, int64_t r, const uint8_t* row, int64_t quads) {
  static constexpr uint32_t kPower[5] = {1, 3, 9, 27, 81};
  uint8_t* to = stream + first / 5 * kBlockBytes + 4 * r;
  int64_t q = 0, p = first % 5;
  while (q < quads) {
    uint32_t bytes = 0;
    if (p == 0 && q + 5 <= quads) {
      for (int64_t i = 4; i >= 0; --i) bytes = 3 * bytes + kSpread.bytes[row[q + i]];
      q += 5;
    } else {
      for (; p < 5 && q < quads; ++p, ++q) bytes += kPower[p] * kSpread.bytes[row[q]];
      p = 0;
    }
    store4(to, load4(to) + bytes);  // no byte passes 242: every digit of a byte is added once
    to += kBlockBytes;
  }
}

// Throws for value 3 and for padding that is not value 1 in a row of a file.
void check_row(const uint8_t* bytes, int64_t row, int64_t cols, const std::string& name) {
  const int64_t width = (cols + 3) / 4;
  uint32_t threes = 0;
  int64_t i = 0;
  for (; i + 4 <= width; i += 4) {
    uint32_t v;
    std::memcpy(&v, bytes + i, 4);
    threes |= v & v >> 1 & 0x55555555u;
  }
  for (; i < width; ++i) threes |= bytes[i] & bytes[i] >> 1 & 0x55;
  const int tail = static_cast<int>(cols % 4);
  if (threes == 0 && (tail == 0 || bytes[width - 1] >> (2 * tail) == 0x55 >> (2 * tail))) return;
  for (int64_t column = 0; column < 4 * width; ++column) {
    const int value = bytes[column / 4] >> (2 * (column % 4)) & 3;
    if (value == 3)
      throw ArtifactError(name + ": value 3 at row " + std::to_string(row) + ", column " + std::to_string(column) +
                          " is no code (0, 1, 2 are); re-export the student");
    if (column >= cols && value != 1)
      throw ArtifactError(name + ": padding of row " + std::to_string(row) + " is not value 1; re-export the student");
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
  const int64_t row_bytes = (cols + 3) / 4, quads = m.quads(), stream = m.group_count() * m.group_quads();
  const bool two_bit = layout == Layout::kTwoBitRows16;
  std::vector<uint8_t> padded(static_cast<size_t>(m.group_quads()), 0x55);
  for (int64_t row = 0; row < m.group_count() * kGroupRows; ++row) {
    const uint8_t* bytes = padded.data();  // code 0 everywhere: rows beyond the matrix
    if (row < rows) {
      bytes = codes_2bit + row * row_bytes;
      check_row(bytes, row, cols, name);
      if (two_bit && quads % 4 != 0) {
        std::memcpy(padded.data(), bytes, static_cast<size_t>(quads));
        bytes = padded.data();
      }
    } else if (row == rows) {
      std::fill(padded.begin(), padded.end(), uint8_t{0x55});
    }
    const int64_t first = row / kGroupRows * m.group_quads(), r = row % kGroupRows;
    if (two_bit) {
      place_two_bit(m.storage.data() + first * 16, r, bytes, m.group_quads());
    } else {
      place_base3(m.storage.data(), first, r, bytes, quads);
    }
  }
  if (!two_bit && stream % 5 != 0) {  // the last block's unused digits are code 0 too
    const uint8_t ones[5] = {0x55, 0x55, 0x55, 0x55, 0x55};
    for (int64_t r = 0; r < kGroupRows; ++r) place_base3(m.storage.data(), stream, r, ones, 5 - stream % 5);
  }
  return m;
}

void unpack_row(const TernaryMatrix& m, int64_t row, int8_t* codes) {
  const int64_t first = row / kGroupRows * m.group_quads(), per_block = block_quads(m.layout);
  for (int64_t c = 0; c < m.cols; ++c) {
    const int64_t quad = first + c / 4, p = quad % per_block;
    unsigned byte = m.codes[quad / per_block * kBlockBytes + 4 * (row % kGroupRows) + c % 4];
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
  const size_t needed = static_cast<size_t>(kFrontBytes + new_tokens * new_stride);
  const bool same_padding = new_stride == stride && new_cols == cols;
  if (codes.size() < needed) {
    codes = AlignedBuffer(needed);
  } else if (!same_padding) {
    for (int64_t t = 0; t < new_tokens; ++t)
      std::memset(codes.data() + kFrontBytes + t * new_stride + new_cols, 0, static_cast<size_t>(new_stride - new_cols));
  }
  // Rows of an earlier, smaller count keep their padding: it was zeroed for the same cols and stride, or here.
  if (same_padding && new_tokens > tokens)
    for (int64_t t = tokens; t < new_tokens; ++t)
      std::memset(codes.data() + kFrontBytes + t * new_stride + new_cols, 0, static_cast<size_t>(new_stride - new_cols));
  tokens = new_tokens;
  cols = new_cols;
  stride = new_stride;
  scales.resize(static_cast<size_t>(new_tokens));
  sums.resize(static_cast<size_t>(new_tokens));
}

}  // namespace bitdistill
