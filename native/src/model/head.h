// The output head in int8, and the screen: the largest logits exactly, from half the bytes or fewer.
//
// Write a row of the head as w = w8 + e, where w8 is its int8 code times its scale, and the hidden state as
// h = h8 + d, quantized the same way. Then
//
//   w.h - w8.h8 = e.h + w8.d,   so   |w.h - w8.h8| <= |e| |h| + |w8| |d|     (Cauchy-Schwarz, Euclidean norms).
//
// w8.h8 is an exact integer times two scales. With that bound every row gets an interval that holds its float32 logit
// (rounding of the float product, at most (n + 8) 2^-23 |w| |h|, included). Rows whose upper end is below the k-th
// largest lower end cannot be among the k largest. The others are computed in float from the head as stored, the most
// promising first, until no upper end left reaches the k-th largest float logit found. Greedy and top-k choices are
// therefore those of the full head, ties included.
#pragma once

#include <cstdint>
#include <vector>

#include "bitdistill/kernels.h"
#include "bitdistill/threads.h"

namespace bitdistill {

struct Int8Head {
  Int8Matrix matrix;
  std::vector<float> error_norm;  // |e| of each row, rounded up
  std::vector<float> code_norm;   // |w8| of each row, rounded up
};

// absmax int8 a row, as quantize_int8, by all threads of the pool.
Int8Head quantize_head(const FloatMatrix& head, ThreadPool& pool);

struct Candidate {
  float upper;  // no float32 logit of the row is above
  std::int64_t row;
};

// The rows that may hold one of the `k` largest logits, the largest upper end first. screen: w8.h8 of every row. hidden: h; quantized: its row t.
std::vector<Candidate> candidates(const Int8Head& head, const float* screen, const float* hidden,
                                     const QuantizedRows& quantized, std::int64_t t, std::int64_t k);

}  // namespace bitdistill
