// The oracle: every integer kernel as the plainest loop that states what it means. Runs on any CPU.

#include "table.h"

namespace bitdistill {
namespace {

#include "common.inl"
#include "float.inl"

void ternary_gemv(const TernaryView& w, const ActivationView& x, const OutputView& out, int64_t row_begin,
                  int64_t row_end) {
  const int64_t fields = block_quads(w.layout);
  const unsigned base = w.layout == Layout::kTwoBitRows16 ? 4 : 3;
  for (int64_t row = row_begin; row < row_end; row += kGroupRows) {
    const Group group = group_at(w, row);
    for (int64_t t = 0; t < x.tokens; ++t) {
      int32_t sums[kGroupRows] = {};
      for (int64_t b = 0; b < group.blocks; ++b)
        for (int64_t i = 0; i < kBlockBytes; ++i) {
          unsigned byte = group.codes[b * kBlockBytes + i];
          const int8_t* codes = x.codes + t * x.stride + 4 * (fields * b - group.lead) + i % 4;
          for (int64_t p = 0; p < fields; ++p, byte /= base)
            sums[i / 4] += static_cast<int32_t>(byte % base) * codes[4 * p];
        }
      store_group(out, x, sums, t, row, row_end, 1, w.scale, w.row_scales);
    }
  }
}

void ternary_gemm(const TernaryView& w, const ActivationView& x, const OutputView& out, int64_t row_begin,
                  int64_t row_end, uint8_t* tile) {
  for (int64_t row = row_begin; row < row_end; row += kGroupRows) {
    const Group group = group_at(w, row);
    unpack_group_portable(w.layout, group.codes, group.blocks, tile);
    const uint8_t* digits = tile + 64 * group.lead;
    for (int64_t t = 0; t < x.tokens; ++t) {
      int32_t sums[kGroupRows] = {};
      const int8_t* codes = x.codes + t * x.stride;
      for (int64_t q = 0; q < w.quads; ++q)
        for (int64_t r = 0; r < kGroupRows; ++r)
          for (int64_t j = 0; j < 4; ++j) sums[r] += digits[64 * q + 4 * r + j] * codes[4 * q + j];
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

void int3_matmul(const Int3View& w, const ActivationView& x, const OutputView& out, int64_t row_begin,
                 int64_t row_end) {
  for (int64_t row = row_begin; row < row_end; row += kGroupRows) {
    const uint8_t* group = w.codes + row / kGroupRows * w.blocks * 3 * kBlockBytes;
    for (int64_t t = 0; t < x.tokens; ++t) {
      int32_t sums[kGroupRows] = {};
      const int8_t* codes = x.codes + t * x.stride;
      for (int64_t b = 0; b < w.blocks; ++b)
        for (int64_t i = 0; i < kBlockBytes; ++i) {
          const uint8_t* at = group + b * 3 * kBlockBytes + i;
          const int first = at[0], second = at[64], third = at[128];
          const int digits[8] = {first & 7,
                                 first >> 3 & 7,
                                 second & 7,
                                 second >> 3 & 7,
                                 third & 7,
                                 third >> 3 & 7,
                                 first >> 6 | (third >> 6 & 1) << 2,
                                 second >> 6 | third >> 7 << 2};
          for (int64_t p = 0; p < 8; ++p) sums[i / 4] += digits[p] * codes[32 * b + 4 * p + i % 4];
        }
      store_group(out, x, sums, t, row, row_end, 4, 1.0f, w.row_scales);
    }
  }
}

int32_t bit_dot_impl(const uint8_t* bits, int64_t blocks, const int8_t* x) {
  int32_t sum = 0;
  for (int64_t b = 0; b < blocks; ++b)
    for (int64_t i = 0; i < 32; ++i)
      for (int64_t p = 0; p < 8; ++p) sum += (bits[32 * b + i] >> p & 1) * x[256 * b + 32 * p + i];
  return sum;
}

}  // namespace

const KernelTable kScalarKernels = {Isa::kScalar, ternary_gemv, 4, ternary_gemm, 1, int8_matmul, int3_matmul, bit_dot_impl,
                                    BITDISTILL_FLOAT_KERNELS};

}  // namespace bitdistill
