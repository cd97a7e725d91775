// The oracle: every integer kernel as the plainest loop that states what it means. Runs on any CPU.

#include "table.h"

namespace bitdistill {
namespace {

#include "common.inl"
#include "float.inl"

void ternary_gemv(const TernaryView& w, const ActivationView& x, const OutputView& out, int64_t row_begin,
                  int64_t row_end) {
  const int64_t fields = block_columns(w.layout) / 4;
  const unsigned base = w.layout == Layout::kTwoBitRows16 ? 4 : 3;
  for (int64_t row = row_begin; row < row_end; row += kGroupRows) {
    const uint8_t* group = w.codes + row / kGroupRows * w.blocks * kBlockBytes;
    for (int64_t t = 0; t < x.tokens; ++t) {
      int32_t sums[kGroupRows] = {};
      for (int64_t b = 0; b < w.blocks; ++b)
        for (int64_t i = 0; i < kBlockBytes; ++i) {
          unsigned byte = group[b * kBlockBytes + i];
          const int8_t* codes = x.codes + t * x.stride + 4 * fields * b + i % 4;
          for (int64_t p = 0; p < fields; ++p, byte /= base)
            sums[i / 4] += static_cast<int32_t>(byte % base) * codes[4 * p];
        }
      store_group(out, x, sums, t, row, row_end, 1, w.scale, w.row_scales);
    }
  }
}

void ternary_gemm(const TernaryView& w, const ActivationView& x, const OutputView& out, int64_t row_begin,
                  int64_t row_end, uint8_t* tile) {
  const int64_t quads = w.blocks * block_columns(w.layout) / 4;
  for (int64_t row = row_begin; row < row_end; row += kGroupRows) {
    unpack_group_portable(w.layout, w.codes + row / kGroupRows * w.blocks * kBlockBytes, w.blocks, tile);
    for (int64_t t = 0; t < x.tokens; ++t) {
      int32_t sums[kGroupRows] = {};
      const int8_t* codes = x.codes + t * x.stride;
      for (int64_t q = 0; q < quads; ++q)
        for (int64_t r = 0; r < kGroupRows; ++r)
          for (int64_t j = 0; j < 4; ++j) sums[r] += tile[64 * q + 4 * r + j] * codes[4 * q + j];
      store_group(out, x, sums, t, row, row_end, 1, w.scale, w.row_scales);
    }
  }
}

void int8_matmul(const Int8View& w, const ActivationView& x, const OutputView& out, int64_t row_begin,
                 int64_t row_end) {
  for (int64_t row = row_begin; row < row_end; row += kGroupRows) {
    const int8_t* group = w.codes + row / kGroupRows * w.blocks * kBlockBytes;
    for (int64_t t = 0; t < x.tokens; ++t) {
      int32_t sums[kGroupRows] = {};
      const int8_t* codes = x.codes + t * x.stride;
      for (int64_t b = 0; b < w.blocks; ++b)
        for (int64_t r = 0; r < kGroupRows; ++r)
          for (int64_t j = 0; j < 4; ++j) sums[r] += group[64 * b + 4 * r + j] * codes[4 * b + j];
      store_group(out, x, sums, t, row, row_end, 0, 1.0f, w.row_scales);
    }
  }
}

}  // namespace

const KernelTable kScalarKernels = {Isa::kScalar, ternary_gemv, ternary_gemm, 1, int8_matmul,
                                    BITDISTILL_FLOAT_KERNELS};

}  // namespace bitdistill
