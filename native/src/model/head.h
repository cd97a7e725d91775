// The output head in int8 or 4 bits, and the screens: the largest logits exactly, from fewer bytes.
//
// A screen gives every word an upper end for its float32 logit. A few words that look best are computed from the head
// as stored; the k-th largest of their logits is a floor that the k largest must reach. Every word whose upper end
// reaches the floor is computed too, and the choice is made among those: greedy and top-k tokens are those of the full
// head, ties included.
//
// int8 ("screened"). Write a row as w = w8 + e, where w8 is its int8 code times its scale, and the hidden state as
// h = h8 + d, quantized the same way. Then
//
//   w.h - w8.h8 = e.h + w8.d,   so   |w.h - w8.h8| <= |e| |h| + |w8| |d|     (Cauchy-Schwarz, Euclidean norms).
//
// 4 bits ("screened4"). That bound is 16 times as wide with 4 bits: useless, since it allows every rounding error to
// point the worst way. So the errors are made independent, by subtractive dither: with u_i uniform in [-3/2, 1/2) and
// v_i in [-1/2, 1/2), fixed once for each column,
//
//   code_i = rint(w_i / s + u_i),  w4_i = s (code_i - u_i);   q_i = rint(h_i / t + v_i),  h4_i = t (q_i - v_i),
//
// every e_i = w_i - w4_i is uniform in +-s/2 and independent of the others whatever w is, and d_i = h_i - h4_i in
// +-t/2 likewise. A uniform variable in +-s/2 is sub-Gaussian with variance s^2 / 12, so for any h, and any w4,
//
//   P(e.h > x s |h| / sqrt(12)) <= exp(-x^2 / 2),   P(w4.d > x t |w4| / sqrt(12)) <= exp(-x^2 / 2).
//
// With x = 8.5 (kDeviations) a word's logit passes its upper end with a probability below 5e-16.
//
// Three bits of the four come first. u spans two steps, so a pair of neighbouring codes, 2 c and 2 c + 1, is one cell of a
// quantizer of step 2 s with dither of its own width: w3_i = s (2 c_i + 1/2 - u_i), where c_i = floor(code_i / 2), has an
// error uniform in +-s. The interval it allows is twice as wide, but a token reads three quarters of the bytes: words
// whose wide upper end reaches the floor (some thousands of 150,000 random rows, where no word stands out) get their
// fourth bit, from a place of its own, and the upper end of 4 bits; those that still reach the floor are computed.
// Either interval fails with a probability below 5e-16, so a token of a model of 300,000 words differs from the full
// head's with one below 5e-10. (The hidden state is that of
// the full model as long as no token differed, so it does not depend on the dither. The dither is a fixed
// pseudo-random sequence, the probability one over its choice: weights made with knowledge of it could defeat it.)
// The dither costs no bytes: with z = 2 c + 1/2 and b = code - 2 c, the fourth bit,
//
//   w3.h4 = s t (sum z q - sum u q - sum z v + sum u v),   w4.h4 - w3.h4 = s t (sum (b - 1/2) q - sum (b - 1/2) v):
//
// exact integers, a number a token, a number a row (`offsets`, `rest_offsets`), and a constant.
//
// Both intervals are widened by the rounding of the float arithmetic: at most 2 (n + 8) 2^-23 times the product of the
// norms that enter it.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "bitdistill/kernels.h"
#include "bitdistill/model.h"
#include "bitdistill/threads.h"

namespace bitdistill {

class LowBitHead {
 public:
  // `bits` 8 or 4; by all threads of the pool.
  LowBitHead(const FloatMatrix& head, int bits, ThreadPool& pool);

  int bits() const { return bits_; }
  std::int64_t rows() const { return bits_ == 8 ? int8_.rows : int3_.rows; }
  std::int64_t bytes() const;  // that one token reads of every row

  // Hidden states as codes, and what the bounds need to know of them.
  struct Token {
    float shift, scale_factor, norm_factor, offset_factor;
    float rest_shift, rest_factor;  // from 3 bits to 4: of the estimate, of the upper end
  };
  struct Input {
    QuantizedRows codes;
    std::vector<std::int8_t> spread;  // of 4 bits: the codes as bit_dot wants them
    std::vector<Token> tokens;
  };
  // n hidden states, row r at hidden + r * cols.
  void prepare(const float* hidden, std::int64_t n, Input& input) const;

  // y[t * rows + o] for o in [begin, end) (borders as for matmul): an estimate of the logit, or with `upper` its
  // upper end (of 4 bits: the one that three of them allow).
  void product(const Input& input, bool upper, float* y, std::int64_t begin, std::int64_t end) const;
  // Of 4 bits: lowers the upper ends of one token's words in [begin, end) that reach `floor`; y[o] is word o's.
  void refine(const Input& input, std::int64_t token, float floor, float* y, std::int64_t begin, std::int64_t end) const;

 private:
  float rest_of(const Input& input, std::int64_t token, std::int64_t row) const;
  void quantize_token(const float* hidden, std::int64_t t, Input& input) const;
  const std::uint8_t* rest(std::int64_t row) const { return rest_.data() + row * rest_blocks_ * 32; }

  int bits_;
  std::int64_t cols_;
  Int8Matrix int8_;
  Int3Matrix int3_;      // c, with 2 s as a row's scale
  AlignedBuffer rest_;   // b: rest_blocks_ of 32 bytes a row, see bit_dot
  std::int64_t rest_blocks_ = 0;
  // One a row. error_norms: |e|, rounded up (8 bits); code_norms: |w8| or |w3|, rounded up; offsets: s sum z v,
  // rest_offsets: s sum (b - 1/2) v (4 bits).
  std::vector<float> error_norms_, code_norms_, offsets_, rest_offsets_;
  std::vector<float> u_, v_;  // dither, padded with zeros to 16 columns
  double uv_ = 0.0;           // sum u v
};

}  // namespace bitdistill
