// The float32 side of the model: norms, activations, attention, dense products of float weights.
//
// One source (src/model/float_ops.inc) compiled once per instruction set. Every sum runs in kLanes fixed lanes that
// are added in a fixed tree, and products are never contracted into fused multiply-adds, so all sets give the same
// bits: the instruction set changes the speed of a float result, not its value.
#pragma once

#include <cstddef>
#include <cstdint>

#include "bitdistill/kernels.h"

namespace bitdistill {

// Keys and values [n][dim] of consecutive positions.
struct KvSpan {
  const void* keys;
  const void* values;
  std::size_t n;
};

struct FloatOps {
  const char* name;

  // out = x * rsqrt(mean(x^2) + eps) * gain. out may be x.
  void (*rmsnorm)(const float* x, const float* gain, float eps, std::size_t n, float* out);
  // out = silu(gate) * up, and the same with GELU (tanh form). out may be gate.
  void (*silu_mul)(const float* gate, const float* up, std::size_t n, float* out);
  void (*gelu_mul)(const float* gate, const float* up, std::size_t n, float* out);
  // y += x
  void (*add)(const float* x, std::size_t n, float* y);
  float (*dot)(const float* a, const float* b, std::size_t n);
  // max and sum(exp(x - max)) of n > 0 values; their logarithm of the sum is max + log(sum).
  void (*exp_sum)(const float* x, std::size_t n, float* max, float* sum);
  // x = exp((x - max) * factor)
  void (*exp_scaled)(float* x, std::size_t n, float max, float factor);

  // Softmax attention of one query head over the positions of all spans (type kF32 or kF16, one position at least):
  // out = softmax(scale * q K^T) V. scores: scratch of as many floats as positions.
  void (*attend)(const float* q, const KvSpan* spans, std::size_t span_count, FloatType type, std::size_t dim,
                 float scale, float* scores, float* out);

  // Dense product for weight rows [row_begin, row_end): y[t * ldy + r] = dot(W[r], x[t]), t < tokens.
  // row_scratch: cols floats.
  void (*dense)(const void* weight, FloatType type, std::size_t cols, const float* x, std::size_t tokens,
                std::size_t row_begin, std::size_t row_end, float* y, std::size_t ldy, float* row_scratch);
  // Converts n values to float32.
  void (*widen)(const void* source, FloatType type, std::size_t n, float* out);
};

// The table for an instruction set of the integer kernels; scalar and NEON use the generic one.
const FloatOps& float_ops(Isa isa);

const FloatOps& float_ops_generic();
#if defined(__x86_64__)
const FloatOps& float_ops_avx2();
const FloatOps& float_ops_avx512();
#endif

}  // namespace bitdistill
