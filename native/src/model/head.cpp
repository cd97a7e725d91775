#include "head.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <functional>

#include "../kernels/table.h"
#include "bitdistill/errors.h"
#include "bitdistill/model.h"
#include "scratch.h"

namespace bitdistill {

namespace {

// VNNI accumulators of the int8 product: 65536 * 127 * 255 < 2^31.
constexpr std::int64_t kMaxHeadColumns = 65536;
// Norms and bounds are computed in float32; this factor covers their own rounding.
constexpr float kUp = 1.001f;
constexpr float kDeviations = 8.5f;
constexpr float kUniformDeviation = 0.288675135f;  // 1 / sqrt(12)
constexpr std::int64_t kPartRows = 256;            // words that a selection skips together
constexpr std::int64_t kAhead = 8;                 // rows of fourth bits on their way from memory

inline float round_even(float x) { return (x + 12582912.0f) - 12582912.0f; }  // |x| <= 2^22, half to even

// Uniform in [-1/2, 1/2) on a grid of 2^-24, from the counter alone (splitmix64).
float dither(std::uint64_t counter) {
  std::uint64_t z = counter * 0x9e3779b97f4a7c15ull + 0x2545f4914f6cdd1dull;
  z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9ull;
  z = (z ^ z >> 27) * 0x94d049bb133111ebull;
  z ^= z >> 31;
  return static_cast<float>(static_cast<std::int32_t>(z >> 40) - (1 << 23)) * 0x1p-24f;
}

template <class T>
std::vector<T> per_row(std::int64_t rows) { return std::vector<T>(static_cast<std::size_t>(rows)); }

// The largest of n > 0 numbers. Eight at a time: one comparison would have to wait for the one before it.
float largest(const float* x, std::int64_t n) {
  float best[8];
  std::fill_n(best, 8, x[0]);
  std::int64_t i = 0;
  for (; i + 8 <= n; i += 8) {
    for (int lane = 0; lane < 8; ++lane) best[lane] = x[i + lane] > best[lane] ? x[i + lane] : best[lane];
  }
  for (; i < n; ++i) best[0] = x[i] > best[0] ? x[i] : best[0];
  return *std::max_element(best, best + 8);
}

// Codes -8..7 of 32 columns -> the bytes of a row in three blocks (Int3Matrix), and 32 fourth bits.
inline std::uint32_t place_int4(const std::int8_t* codes, std::uint8_t* to) {
  std::uint32_t digit[8], rest = 0;
  for (int p = 0; p < 8; ++p) {
    std::uint32_t quad;
    std::memcpy(&quad, codes + 4 * p, 4);
    quad ^= 0x08080808u;                                               // code + 8 in the low four bits of each byte
    rest |= ((quad & 0x01010101u) * 0x10204080u) >> 28 << 4 * p;       // gathers a bit a byte
    digit[p] = quad >> 1 & 0x07070707u;
  }
  const std::uint32_t block[3] = {digit[0] | digit[1] << 3 | (digit[6] & 0x03030303u) << 6,
                                  digit[2] | digit[3] << 3 | (digit[7] & 0x03030303u) << 6,
                                  digit[4] | digit[5] << 3 | (digit[6] >> 2 & 0x01010101u) << 6 |
                                      (digit[7] >> 2 & 0x01010101u) << 7};
  for (int i = 0; i < 3; ++i) std::memcpy(to + i * kBlockBytes, block + i, 4);
  return rest;
}

}  // namespace

LowBitHead::LowBitHead(const FloatMatrix& head, int bits, ThreadPool& pool) : bits_(bits), cols_(head.cols) {
  if (head.cols > kMaxHeadColumns) {
    throw ModelError("output head: " + std::to_string(head.cols) + " columns pass " + std::to_string(kMaxHeadColumns) +
                     ", the bound of the int8 product; use head float");
  }
  const bool four = bits == 4;
  const std::int64_t padded = (head.cols + 15) / 16 * 16;
  u_.assign(static_cast<std::size_t>(padded), 0.0f);
  v_ = u_;
  for (std::int64_t i = 0; four && i < head.cols; ++i) {
    const auto at = static_cast<std::size_t>(i);
    u_[at] = 2.0f * dither(2 * static_cast<std::uint64_t>(i)) - 0.5f;
    v_[at] = dither(2 * static_cast<std::uint64_t>(i) + 1);
    uv_ += static_cast<double>(u_[at]) * v_[at];
  }
  const auto place = [&](auto& matrix) {
    matrix.rows = head.rows;
    matrix.cols = head.cols;
    matrix.row_scales = per_row<float>(head.rows);
    matrix.storage = AlignedBuffer(static_cast<std::size_t>(matrix.group_count() * matrix.group_bytes()));
    matrix.codes = reinterpret_cast<decltype(matrix.codes)>(matrix.storage.data());
  };
  four ? place(int3_) : place(int8_);
  code_norms_ = per_row<float>(head.rows);
  (four ? offsets_ : error_norms_) = per_row<float>(head.rows);
  if (four) {
    rest_offsets_ = per_row<float>(head.rows);
    rest_blocks_ = (head.cols + 255) / 256;
    rest_ = AlignedBuffer(static_cast<std::size_t>(head.rows * rest_blocks_ * 32));
  }
  const FloatView view = {head.data, head.rows, head.cols, head.type};
  // |w / s| <= 7 less a little keeps w / s + u, from -8.5 to 7.5, from rounding to -9 or 8.
  const ScreenDither rounding = {four ? 6.9999f : 127.0f, four ? -8.0f : -127.0f, four ? 7.0f : 127.0f, u_.data(), v_.data()};
  pool.parallel_for(head.rows, kGroupRows, [&](std::int64_t begin, std::int64_t end, int) {
    std::vector<float> values(static_cast<std::size_t>(padded));
    std::vector<std::int8_t> codes(static_cast<std::size_t>((padded + 31) / 32 * 32));
    const std::int64_t stride = head.cols * float_bytes(head.type), chunk = std::max((4 << 20) / stride, std::int64_t{1});
    for (std::int64_t row = begin; row < end; ++row) {
      ScreenRow found;
      kernels().screen_row(view, row, rounding, values.data(), codes.data(), &found);
      const auto index = static_cast<std::size_t>(row);
      code_norms_[index] = std::sqrt(found.code_square) * kUp;
      std::fill(codes.begin() + head.cols, codes.end(), std::int8_t{0});
      if (four) {
        code_norms_[index] += 0.5f * found.scale * std::sqrt(static_cast<float>(head.cols)) * kUp;  // |w3 - w4|
        int3_.row_scales[index] = 2.0f * found.scale;
        offsets_[index] = found.mixed * found.scale;
        rest_offsets_[index] = found.mixed_rest * found.scale;
        std::uint8_t* to = int3_.storage.data() + row / kGroupRows * int3_.group_bytes() + 4 * (row % kGroupRows);
        std::uint8_t* rest = rest_.data() + row * rest_blocks_ * 32;
        for (std::int64_t b = 0; b < int3_.block_count(); ++b) {
          const std::uint32_t bits = place_int4(codes.data() + 32 * b, to + 3 * b * kBlockBytes);
          std::memcpy(rest + 4 * b, &bits, 4);
        }
      } else {
        int8_.row_scales[index] = found.scale;
        error_norms_[index] = std::sqrt(found.error_square) * kUp;
        std::uint8_t* to = int8_.storage.data() + row / kGroupRows * int8_.group_bytes() + 4 * (row % kGroupRows);
        for (std::int64_t b = 0; b < int8_.block_count(); ++b) std::memcpy(to + b * kBlockBytes, codes.data() + 4 * b, 4);
      }
      if ((row + 1 - begin) % chunk == 0 || row + 1 == end) {  // keeps the peak of memory low
        const std::int64_t first = begin + (row - begin) / chunk * chunk;
        release_pages(static_cast<const std::uint8_t*>(head.data) + first * stride,
                      static_cast<std::size_t>((row + 1 - first) * stride));
      }
    }
  });
}

std::int64_t LowBitHead::bytes() const {
  const auto rows = static_cast<std::int64_t>(code_norms_.size());
  const std::int64_t codes = bits_ == 8 ? int8_.group_count() * int8_.group_bytes() : int3_.group_count() * int3_.group_bytes();
  return codes + rows * 3 * static_cast<std::int64_t>(sizeof(float));
}

void LowBitHead::quantize_token(const float* hidden, std::int64_t t, Input& input) const {
  std::int8_t* codes = input.codes.row(t);
  const auto at = static_cast<std::size_t>(t);
  if (bits_ == 8) {
    input.codes.sums[at] = quantize_row(hidden, cols_, codes, &input.codes.scales[at]);
  } else {
    float amax = 1e-30f;
    for (std::int64_t i = 0; i < cols_; ++i) amax = std::max(amax, std::fabs(hidden[i]));
    const float scale = amax / 126.0f;  // 126 and the dither stay below 127
    std::int32_t sum = 0;
    for (std::int64_t i = 0; i < cols_; ++i) {
      const float q = round_even(hidden[i] / scale + v_[static_cast<std::size_t>(i)]);
      const auto code = static_cast<std::int32_t>(std::min(std::max(q, -127.0f), 127.0f));
      codes[i] = static_cast<std::int8_t>(code);
      sum += code;
    }
    input.codes.scales[at] = scale;
    input.codes.sums[at] = sum;
  }
  const float scale = input.codes.scales[at];
  double squares = 0.0, differences = 0.0, mixed = 0.0;
  for (std::int64_t i = 0; i < cols_; ++i) {
    const double shown = (static_cast<double>(codes[i]) - v_[static_cast<std::size_t>(i)]) * scale;
    const double d = hidden[i] - shown;
    squares += static_cast<double>(hidden[i]) * hidden[i];
    differences += d * d;
    mixed += static_cast<double>(u_[static_cast<std::size_t>(i)]) * codes[i];
  }
  const float size = static_cast<float>(std::sqrt(squares)) * kUp;      // |h|
  const float left = static_cast<float>(std::sqrt(differences)) * kUp;  // |d|
  Token& token = input.tokens[at];
  if (bits_ == 8) {
    const float rounding = static_cast<float>(cols_ + 8) * 0x1p-22f * (size + left);
    token = {0.0f, (size + rounding) * kUp, (left + rounding) * kUp, 0.0f, 0.0f, 0.0f};
    return;
  }
  // Row norms that enter the arithmetic are at most |w3| + 2 s sqrt(n), the token's |h| + t sqrt(n). Factors of a row's
  // scale are halved: that of three bits is 2 s.
  const float root = std::sqrt(static_cast<float>(cols_));
  const float rounding = static_cast<float>(cols_ + 8) * 0x1p-22f * (size + scale * root);
  const float by_dither = kDeviations * kUniformDeviation * kUp;
  const auto half_sum = 0.5 * input.codes.sums[at];
  token = {0.5f * static_cast<float>(half_sum + uv_ - mixed) * scale,
           by_dither * size + rounding * root,
           by_dither * scale + rounding,
           -scale,
           static_cast<float>(half_sum),
           0.5f * by_dither * size};
}

void LowBitHead::prepare(const float* hidden, std::int64_t n, Input& input) const {
  input.codes.resize(n, cols_);
  input.tokens.resize(static_cast<std::size_t>(n));
  input.spread.resize(static_cast<std::size_t>(n * rest_blocks_ * 256));
  for (std::int64_t t = 0; t < n; ++t) {
    quantize_token(hidden + t * cols_, t, input);
    if (bits_ == 4) spread_columns(input.codes.row(t), cols_, input.spread.data() + t * rest_blocks_ * 256);
  }
}

void LowBitHead::product(const Input& input, bool upper, float* y, std::int64_t begin, std::int64_t end) const {
  const std::int64_t ldy = rows();
  bits_ == 8 ? matmul(int8_, input.codes, y, ldy, begin, end) : matmul(int3_, input.codes, y, ldy, begin, end);
  if (bits_ == 8 && !upper) return;
  const float* scales = bits_ == 8 ? error_norms_.data() : int3_.row_scales.data();
  const float* norms = code_norms_.data();
  for (std::int64_t t = 0; t < input.codes.tokens; ++t) {
    const Token& token = input.tokens[static_cast<std::size_t>(t)];
    const float by_scale = token.shift + (upper ? token.scale_factor : 0.0f), by_norm = upper ? token.norm_factor : 0.0f;
    float* row = y + t * ldy;
    if (bits_ == 8) {
      for (std::int64_t o = begin; o < end; ++o) row[o] = row[o] + (scales[o] * by_scale + norms[o] * by_norm);
    } else {
      const float* offsets = offsets_.data();
      const float by_offset = token.offset_factor;
      for (std::int64_t o = begin; o < end; ++o) {
        row[o] = row[o] + (scales[o] * by_scale + offsets[o] * by_offset + norms[o] * by_norm);
      }
      if (upper) continue;
      for (std::int64_t o = begin; o < end; ++o) row[o] += rest_of(input, t, o);
    }
  }
}

// w4.h4 - w3.h4
float LowBitHead::rest_of(const Input& input, std::int64_t t, std::int64_t row) const {
  const Token& token = input.tokens[static_cast<std::size_t>(t)];
  const auto at = static_cast<std::size_t>(row);
  const auto sum = static_cast<float>(bit_dot(rest(row), rest_blocks_, input.spread.data() + t * rest_blocks_ * 256));
  return 0.5f * int3_.row_scales[at] * input.codes.scales[static_cast<std::size_t>(t)] * (sum - token.rest_shift) +
         token.offset_factor * rest_offsets_[at];
}

void LowBitHead::refine(const Input& input, std::int64_t t, float floor, float* y, std::int64_t begin,
                        std::int64_t end) const {
  const float by_scale = input.tokens[static_cast<std::size_t>(t)].rest_factor;
  thread_local std::vector<std::int32_t> reach;  // all of them first, so that their bits can be asked for ahead
  reach.resize(static_cast<std::size_t>(end - begin + kAhead));
  std::size_t count = 0;
  for (std::int64_t o = begin; o < end; ++o) {
    reach[count] = static_cast<std::int32_t>(o);
    count += !(y[o] < floor);
  }
  std::fill_n(reach.begin() + static_cast<std::ptrdiff_t>(count), kAhead, static_cast<std::int32_t>(begin));
  const auto ask = [&](std::int64_t row) {
    // Every other line: processors fetch pairs of lines, and more requests than they keep track of are lost.
    for (std::int64_t block = 0; block < rest_blocks_; block += 4) __builtin_prefetch(rest(row) + 32 * block);
  };
  for (std::size_t i = 0; i < static_cast<std::size_t>(kAhead); ++i) ask(reach[i]);
  for (std::size_t i = 0; i < count; ++i) {
    const std::int64_t o = reach[i];
    ask(reach[i + kAhead]);
    y[o] += rest_of(input, t, o) - int3_.row_scales[static_cast<std::size_t>(o)] * by_scale;
  }
}

// Logits of n final hidden states. `top`: how many of the largest each row needs; the others may be -infinity.
void Model::head(const float* hidden, std::int64_t n, const std::int64_t* top, float* logits,
                 std::int32_t* best_words) const {
  const std::int64_t vocab = config().vocab, width = config().hidden;
  const bool screens = options_.head == HeadType::kScreened || options_.head == HeadType::kScreened4;
  const bool screened = screens && top != nullptr && config().logit_softcap == 0.0f;
  if (low_bit_head_ != nullptr && (screened || !screens)) {
    LowBitHead::Input& input = scratch_->head_input;
    low_bit_head_->prepare(hidden, n, input);
    const std::int64_t parts = (vocab + kPartRows - 1) / kPartRows;
    scratch_->part_tops.resize(static_cast<std::size_t>(screened ? n * parts : 0));
    parallel(vocab, kPartRows, n * vocab * width / 4, [&](std::int64_t begin, std::int64_t end, int) {
      for (std::int64_t first = begin; first < end; first += kPartRows) {
        const std::int64_t last = std::min(first + kPartRows, end);
        low_bit_head_->product(input, screened, logits, first, last);
        for (std::int64_t r = 0; screened && r < n; ++r) {
          const float* row = logits + r * vocab;
          scratch_->part_tops[static_cast<std::size_t>(r * parts + first / kPartRows)] = largest(row + first, last - first);
        }
      }
    });
    for (std::int64_t r = 0; screened && r < n; ++r) {
      rescore(hidden + r * width, r, scratch_->part_tops.data() + r * parts, top[r], logits + r * vocab, best_words + r);
    }
  } else {
    parallel(vocab, kGroupRows, n * vocab * width, [&](std::int64_t begin, std::int64_t end, int) {
      matmul(weights_->head.matrix, hidden, n, width, logits, vocab, begin, end);
    });
  }
  if (const float cap = config().logit_softcap; cap != 0.0f) {
    for (std::int64_t i = 0; i < n * vocab; ++i) logits[i] = std::tanh(logits[i] / cap) * cap;
  }
}

// `logits` holds upper ends of token `token` of the head's input, part_tops the largest of each part of kPartRows words;
// afterwards the exact logits of all words that may be among the `top` largest, and -infinity for the others. Of the
// largest alone only its word is handed on.
void Model::rescore(const float* hidden, std::int64_t token, float* part_tops, std::int64_t top, float* logits,
                    std::int32_t* best_word) const {
  const FloatMatrix& head = weights_->head.matrix;
  const std::int64_t parts = (head.rows + kPartRows - 1) / kPartRows;
  const auto exact = [&](const std::vector<std::int64_t>& words, std::vector<float>& values) {
    values.resize(words.size());
    const auto count = static_cast<std::int64_t>(words.size());
    parallel(count, 8, 8 * count * head.cols, [&](std::int64_t begin, std::int64_t end, int) {
      std::vector<std::uint8_t> stored(static_cast<std::size_t>(weights_->head.row_bytes()));
      const FloatMatrix row = {1, head.cols, head.type, stored.data()};
      for (auto i = static_cast<std::size_t>(begin); i < static_cast<std::size_t>(end); ++i) {
        weights_->head.read_row(words[i], stored.data());
        matmul(row, hidden, 1, head.cols, &values[i], 1, 0, 1);  // the bits of the full product
      }
    });
  };
  const auto part_end = [&](std::int64_t part) { return std::min((part + 1) * kPartRows, head.rows); };

  // Seeds, whose logits set the floor: the best word of each of the best parts, or, if there are too few parts, the
  // best words.
  std::vector<std::int64_t> seeds, words;
  std::vector<float> seed_values, values;
  top = std::min(top, head.rows);
  const std::int64_t wanted = std::min(std::max(2 * top, std::int64_t{8}), head.rows);
  const auto best = [&](const float* score, std::int64_t n) {  // the places of the `wanted` largest of n
    std::vector<std::int64_t> order(static_cast<std::size_t>(n));
    for (std::int64_t i = 0; i < n; ++i) order[static_cast<std::size_t>(i)] = i;
    std::nth_element(order.begin(), order.begin() + (wanted - 1), order.end(), [&](std::int64_t i, std::int64_t j) {
      return score[i] != score[j] ? score[i] > score[j] : i < j;
    });
    order.resize(static_cast<std::size_t>(wanted));
    return order;
  };
  if (wanted <= parts) {
    for (const std::int64_t part : best(part_tops, parts)) {
      seeds.push_back(std::max_element(logits + part * kPartRows, logits + part_end(part)) - logits);
    }
  } else {
    seeds = best(logits, head.rows);
  }
  exact(seeds, seed_values);
  values = seed_values;
  std::nth_element(values.begin(), values.begin() + (top - 1), values.end(), std::greater<float>());
  const float floor = values[static_cast<std::size_t>(top - 1)];
  for (const std::int64_t seed : seeds) logits[seed] = -INFINITY;
  if (low_bit_head_->bits() == 4) {
    parallel(parts, 8, head.rows * 16, [&](std::int64_t begin, std::int64_t end, int) {
      low_bit_head_->refine(scratch_->head_input, token, floor, logits, begin * kPartRows, part_end(end - 1));
      for (std::int64_t part = begin; part < end; ++part) {
        part_tops[part] = largest(logits + part * kPartRows, part_end(part) - part * kPartRows);
      }
    });
  }
  for (std::int64_t part = 0; part < parts; ++part) {
    if (part_tops[part] < floor) continue;
    for (std::int64_t o = part * kPartRows; o < part_end(part); ++o) {
      if (!(logits[o] < floor)) words.push_back(o);
    }
  }
  exact(words, values);
  rescored_rows_ += static_cast<std::int64_t>(words.size() + seeds.size());
  screened_tokens_ += 1;
  if (top == 1) {  // the first of equals, as everywhere
    float largest = -INFINITY;
    std::int64_t found = head.rows;
    const auto look = [&](const std::vector<std::int64_t>& at, const std::vector<float>& of) {
      for (std::size_t i = 0; i < at.size(); ++i) {
        if (of[i] < largest || (of[i] == largest && at[i] > found)) continue;
        largest = of[i];
        found = at[i];
      }
    };
    look(words, values);
    look(seeds, seed_values);
    *best_word = static_cast<std::int32_t>(found);
    return;
  }
  std::fill_n(logits, head.rows, -INFINITY);
  for (std::size_t i = 0; i < words.size(); ++i) logits[words[i]] = values[i];
  for (std::size_t i = 0; i < seeds.size(); ++i) logits[seeds[i]] = seed_values[i];
}

}  // namespace bitdistill
