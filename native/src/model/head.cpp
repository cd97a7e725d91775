#include "head.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <functional>
#include <queue>

#include "bitdistill/errors.h"
#include "bitdistill/model.h"
#include "scratch.h"

namespace bitdistill {

namespace {

// VNNI accumulators of the int8 product: 65536 * 127 * 255 < 2^31.
constexpr std::int64_t kMaxHeadColumns = 65536;
// Norms and bounds are computed in float32; this factor covers their own rounding.
constexpr float kUp = 1.001f;

// |x| <= 2^22: adding 1.5 * 2^23 rounds half to even.
inline float round_even(float x) { return (x + 12582912.0f) - 12582912.0f; }

// Row of the head -> values, codes, norms. Plain loops that compilers vectorize.
void quantize_head_row(const FloatMatrix& head, std::int64_t row, float* values, float* rounded, Int8Head& out) {
  const std::int64_t n = head.cols;
  if (head.type == FloatType::kBF16) {
    const auto* source = static_cast<const std::uint16_t*>(head.data) + row * n;
    for (std::int64_t c = 0; c < n; ++c) {
      const std::uint32_t bits = static_cast<std::uint32_t>(source[c]) << 16;
      std::memcpy(values + c, &bits, 4);
    }
  } else {
    dequantize_row(head, row, values);
  }
  float amax = 0.0f;
  for (std::int64_t c = 0; c < n; ++c) {
    const float a = std::fabs(values[c]);
    amax = a > amax ? a : amax;
  }
  float scale = amax / 127.0f;
  if (!(scale >= 1.17549435e-38f)) scale = amax > 0.0f ? 1.17549435e-38f : 1.0f;  // no subnormal divisor
  double error = 0.0, size = 0.0;
  for (std::int64_t c = 0; c < n; ++c) {
    float q = round_even(values[c] / scale);
    q = q > 127.0f ? 127.0f : q < -127.0f ? -127.0f : q;
    rounded[c] = q;
  }
  for (std::int64_t c = 0; c < n; ++c) {
    const double w8 = static_cast<double>(rounded[c]) * scale, e = values[c] - w8;
    error += e * e;
    size += w8 * w8;
  }
  const auto index = static_cast<std::size_t>(row);
  out.matrix.row_scales[index] = scale;
  out.error_norm[index] = static_cast<float>(std::sqrt(error)) * kUp;
  out.code_norm[index] = static_cast<float>(std::sqrt(size)) * kUp;
  auto* group = reinterpret_cast<std::int8_t*>(out.matrix.storage.data()) + row / kGroupRows * out.matrix.group_bytes() +
                4 * (row % kGroupRows);
  for (std::int64_t c = 0; c < n; ++c) group[c / 4 * kBlockBytes + c % 4] = static_cast<std::int8_t>(rounded[c]);
}

}  // namespace

Int8Head quantize_head(const FloatMatrix& head, ThreadPool& pool) {
  if (head.cols > kMaxHeadColumns) {
    throw ModelError("output head: " + std::to_string(head.cols) + " columns pass " + std::to_string(kMaxHeadColumns) +
                     ", the bound of the int8 product; use head float");
  }
  Int8Head out;
  out.matrix.rows = head.rows;
  out.matrix.cols = head.cols;
  out.matrix.row_scales.resize(static_cast<std::size_t>(head.rows));
  out.error_norm.resize(static_cast<std::size_t>(head.rows));
  out.code_norm.resize(static_cast<std::size_t>(head.rows));
  out.matrix.storage = AlignedBuffer(static_cast<std::size_t>(out.matrix.group_count() * out.matrix.group_bytes()));
  out.matrix.codes = reinterpret_cast<const std::int8_t*>(out.matrix.storage.data());
  pool.parallel_for(head.rows, kGroupRows, [&](std::int64_t begin, std::int64_t end, int) {
    std::vector<float> values(static_cast<std::size_t>(head.cols)), rounded(values.size());
    const std::int64_t stride = head.cols * float_bytes(head.type), chunk = std::max((4 << 20) / stride, std::int64_t{1});
    for (std::int64_t row = begin; row < end; ++row) {
      quantize_head_row(head, row, values.data(), rounded.data(), out);
      if ((row + 1 - begin) % chunk == 0 || row + 1 == end) {  // keeps the peak of memory low
        const std::int64_t first = begin + (row - begin) / chunk * chunk;
        release_pages(static_cast<const std::uint8_t*>(head.data) + first * stride,
                      static_cast<std::size_t>((row + 1 - first) * stride));
      }
    }
  });
  return out;
}

std::vector<Candidate> candidates(const Int8Head& head, const float* screen, const float* hidden,
                                  const QuantizedRows& quantized, std::int64_t t, std::int64_t k) {
  const std::int64_t n = head.matrix.cols, rows = head.matrix.rows;
  const std::int8_t* codes = quantized.row(t);
  const float x_scale = quantized.scales[static_cast<std::size_t>(t)];
  double squares = 0.0, differences = 0.0;
  for (std::int64_t i = 0; i < n; ++i) {
    const double d = hidden[i] - static_cast<double>(codes[i]) * x_scale;
    squares += static_cast<double>(hidden[i]) * hidden[i];
    differences += d * d;
  }
  const float size = static_cast<float>(std::sqrt(squares)) * kUp;         // |h|
  const float left = static_cast<float>(std::sqrt(differences)) * kUp;     // |d|
  const float rounding = static_cast<float>(n + 8) * 0x1p-23f * (size + left);
  const float by_error = (size + rounding) * kUp, by_code = (left + rounding) * kUp;
  std::vector<float> lower(static_cast<std::size_t>(rows)), upper(lower.size());
  for (std::size_t o = 0; o < lower.size(); ++o) {
    const float bound = head.error_norm[o] * by_error + head.code_norm[o] * by_code;
    lower[o] = screen[o] - bound;
    upper[o] = screen[o] + bound;
  }
  float threshold;
  if (k == 1) {
    threshold = *std::max_element(lower.begin(), lower.end());
  } else if (k < rows) {
    std::nth_element(lower.begin(), lower.begin() + (k - 1), lower.end(), std::greater<float>());
    threshold = lower[static_cast<std::size_t>(k - 1)];
  } else {
    threshold = -INFINITY;
  }
  std::vector<Candidate> found;
  for (std::int64_t o = 0; o < rows; ++o) {
    if (const float u = upper[static_cast<std::size_t>(o)]; !(u < threshold)) found.push_back({u, o});
  }
  std::sort(found.begin(), found.end(), [](const Candidate& a, const Candidate& b) { return a.upper > b.upper; });
  return found;
}

// Logits of n final hidden states. `top`: how many of the largest each row needs; the others may be -infinity.
void Model::head(const float* hidden, std::int64_t n, const std::int64_t* top, float* logits) const {
  const std::int64_t vocab = config().vocab, width = config().hidden;
  const bool screened = options_.head == HeadType::kScreened && top != nullptr && config().logit_softcap == 0.0f;
  if (options_.head == HeadType::kInt8 || screened) {
    QuantizedRows& rows = scratch_->quantized;
    rows.resize(n, width);
    for (std::int64_t r = 0; r < n; ++r) quantize_into(rows, r, hidden + r * width);
    parallel(vocab, kGroupRows, n * vocab * width / 4, [&](std::int64_t begin, std::int64_t end, int) {
      matmul(int8_head_->matrix, rows, logits, vocab, begin, end);
    });
    for (std::int64_t r = 0; screened && r < n; ++r) rescore(hidden + r * width, rows, r, top[r], logits + r * vocab);
  } else {
    parallel(vocab, kGroupRows, n * vocab * width, [&](std::int64_t begin, std::int64_t end, int) {
      matmul(weights_->head.matrix, hidden, n, width, logits, vocab, begin, end);
    });
  }
  if (const float cap = config().logit_softcap; cap != 0.0f) {
    for (std::int64_t i = 0; i < n * vocab; ++i) logits[i] = std::tanh(logits[i] / cap) * cap;
  }
}

void Model::rescore(const float* hidden, const QuantizedRows& quantized, std::int64_t t, std::int64_t top,
                    float* logits) const {
  const FloatMatrix& head = weights_->head.matrix;
  const std::vector<Candidate> found = candidates(*int8_head_, logits, hidden, quantized, t, top);
  std::fill_n(logits, head.rows, -INFINITY);
  std::vector<std::uint8_t> stored(static_cast<std::size_t>(weights_->head.row_bytes()));
  const FloatMatrix row = {1, head.cols, head.type, stored.data()};
  std::priority_queue<float, std::vector<float>, std::greater<float>> best;  // the `top` largest so far
  for (const Candidate& candidate : found) {
    const bool full = static_cast<std::int64_t>(best.size()) == top;
    if (full && candidate.upper < best.top()) break;
    weights_->head.read_row(candidate.row, stored.data());
    matmul(row, hidden, 1, head.cols, logits + candidate.row, 1, 0, 1);  // the bits of the full product
    best.push(logits[candidate.row]);
    if (full) best.pop();
    rescored_rows_ += 1;
  }
  screened_tokens_ += 1;
}

}  // namespace bitdistill
