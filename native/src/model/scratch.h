// What a forward pass needs besides weights and sequences; kept between passes.
#pragma once

#include <cstdint>
#include <vector>

#include "bitdistill/kernels.h"
#include "bitdistill/model.h"
#include "head.h"

namespace bitdistill {

// One token of a pass: `slot` is its place among the sequence's own tokens, `position` counts the parents' too.
struct Model::Row {
  Sequence* sequence;
  std::int32_t token;
  std::int64_t position;
  std::int64_t slot;
};

struct Model::Scratch {
  std::vector<float> x, normed, q, k, v, mixed, gate, up, out;  // [rows][features]
  QuantizedRows quantized, own;  // rows as int8; `own` for linears with a SubLN of their own
  std::vector<float> sub;        // rows after SubLN, for float linears
  LowBitHead::Input head_input;
  std::vector<float> part_tops;  // of a screen: [row][part of the vocabulary]
  std::vector<float> logits;     // of a step, kept: fresh memory would cost more than the choice
  std::vector<std::int32_t> best;
};

// y[row * ldy ...] = linear(x): where the result of one linear goes.
struct Model::Product {
  const Linear* linear;
  float* y;
  std::int64_t ldy;
};

}  // namespace bitdistill
