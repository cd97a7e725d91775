// What one instruction set provides. One file an instruction set fills one table; dispatch.cpp chooses.
//
// Files of an instruction set are compiled with its flags, so nothing here may have a body that the linker could
// merge with another file's: plain types only, helpers in anonymous namespaces (common.inl, float.inl).
#pragma once

#include <cstdint>

#include "bitdistill/kernels.h"

namespace bitdistill {

struct TernaryView {
  const uint8_t* codes;
  int64_t rows, quads, group_quads;  // see TernaryMatrix
  Layout layout;
  float scale;
  const float* row_scales;  // or null
};

struct Int8View {
  const int8_t* codes;
  int64_t rows, blocks;
  const float* row_scales;
};

// three blocks at a time, see Int3Matrix
struct Int3View {
  const uint8_t* codes;
  int64_t rows, blocks;
  const float* row_scales;
};

struct ActivationView {
  const int8_t* codes;  // readable and zero for 16 bytes before each row
  int64_t stride;
  const float* scales;
  const int32_t* sums;
  int64_t tokens;
};

// Exactly one of y and sums is not null.
struct OutputView {
  float* y;
  int32_t* sums;
  int64_t ld;
};

struct FloatView {
  const void* data;
  int64_t rows, cols;
  FloatType type;
};

// A row of the output head as low-bit codes (model/head.h): code = rint(w / scale + u), w_hat = (code - u) * scale.
// u and v: zeros or dither, padded to a multiple of 16 columns with zeros.
struct ScreenDither {
  float levels;     // scale = max|w| / levels
  float low, high;  // codes
  const float* u;
  const float* v;
};
struct ScreenRow {
  float scale;
  float code_square;   // |w_hat|^2
  float error_square;  // |w - w_hat|^2
  float mixed;         // sum of (code rounded down to even + 1/2) * v
  float mixed_rest;    // sum of (code - that) * v
};

struct KernelTable {
  Isa isa;

  // Integer products over rows [row_begin, row_end); see kernels.h for what may be assumed.
  void (*ternary_gemv)(const TernaryView&, const ActivationView&, const OutputView&, int64_t row_begin,
                       int64_t row_end);
  int64_t gemv_tokens;  // up to so many tokens ternary_gemv is the faster one
  // `tile` holds gemm_tile_groups * tile_bytes(w.quads), 64-byte aligned.
  void (*ternary_gemm)(const TernaryView&, const ActivationView&, const OutputView&, int64_t row_begin,
                       int64_t row_end, uint8_t* tile);
  int64_t gemm_tile_groups;
  void (*int8_matmul)(const Int8View&, const ActivationView&, const OutputView&, int64_t row_begin,
                      int64_t row_end);
  void (*int3_matmul)(const Int3View&, const ActivationView&, const OutputView&, int64_t row_begin,
                      int64_t row_end);
  int32_t (*bit_dot)(const uint8_t* bits, int64_t blocks, const int8_t* x);

  // Float kernels; the same bits on every instruction set (float.inl).
  void (*float_matmul)(const FloatView&, const float* x, int64_t tokens, int64_t ldx, float* y, int64_t ldy,
                       int64_t row_begin, int64_t row_end);
  int32_t (*quantize_row)(const float* x, int64_t n, int8_t* codes, float* scale);
  void (*rmsnorm)(const float* x, const float* gain, int64_t n, float eps, float* y);
  float (*dot)(const float* a, const float* b, int64_t n);
  float (*dot_f16)(const float* a, const uint16_t* b, int64_t n);
  void (*axpy)(float alpha, const float* x, float* y, int64_t n);
  void (*axpy_f16)(float alpha, const uint16_t* x, float* y, int64_t n);
  void (*to_f16)(const float* x, uint16_t* y, int64_t n);
  void (*silu_mul)(const float* gate, const float* up, float* y, int64_t n);
  void (*gelu_tanh_mul)(const float* gate, const float* up, float* y, int64_t n);
  float (*exp_minus_max)(float* x, int64_t n);
  void (*axpy_i8)(float alpha, const int8_t* x, float* y, int64_t n);
  void (*relu2_mul)(const float* gate, const float* up, float* y, int64_t n);
  void (*screen_row)(const FloatView&, int64_t row, const ScreenDither& dither, float* values, int8_t* codes,
                     ScreenRow* out);
  void (*mix)(const FloatView& values, const float* shares, int64_t groups, int64_t ld, float* y, int64_t ldy);
  void (*widen)(const FloatView&, int64_t row_begin, int64_t row_end, float* y);
};

extern const KernelTable kScalarKernels;
#if defined(BITDISTILL_X86)
extern const KernelTable kAvx2Kernels;
extern const KernelTable kAvxVnniKernels;
extern const KernelTable kAvx512VnniKernels;
#endif
#if defined(BITDISTILL_ARM64)
extern const KernelTable kNeonDotKernels;
#endif

// An unpacked group: its quads, and those that share its first and last block.
constexpr int64_t tile_bytes(int64_t quads) { return (quads + 8) * 64; }

// The table in use (current_isa()).
const KernelTable& kernels();

}  // namespace bitdistill
