// Armv8.2-A with the dot-product extension (Cortex-A76, Neoverse N1, Apple M1 and later).
//
// SDOT by element: 16 products i8 x i8 added into 4 int32 lanes, one lane a row, four activations taken from one lane
// of a register that holds sixteen. It does not saturate. A block of 64 bytes is four registers, rows 0-3 to 12-15.
// Digits 0..2 and int8 codes are both signed bytes here; only digits need sum(x) taken away.
// Bounds of the int32 accumulators: 4 * 2 * 128 = 2^10 a quad of digits, 4 * 128 * 128 = 2^16 a quad of int8;
// kMaxColumns is 33026 (< 2^16) quads, int8 has at most 16384.

#include <arm_neon.h>

#include "table.h"

namespace bitdistill {
namespace {

#include "common.inl"
#include "float.inl"

// Digit p of every byte, p = 0..3 of two bits.
template <int P>
inline uint8x16_t field(uint8x16_t bytes) {
  if constexpr (P == 0) return vandq_u8(bytes, vdupq_n_u8(3));
  if constexpr (P == 3) return vshrq_n_u8(bytes, 6);
  if constexpr (P == 1 || P == 2) return vandq_u8(vshrq_n_u8(bytes, 2 * P), vdupq_n_u8(3));
}

// v - 3^p wraps to a larger byte exactly when v < 3^p, so a minimum subtracts where it can (at most twice).
inline uint8x16_t reduce(uint8x16_t v, uint8_t power) {
  const uint8x16_t k = vdupq_n_u8(power);
  v = vminq_u8(v, vsubq_u8(v, k));
  return vminq_u8(v, vsubq_u8(v, k));
}

struct Digits {
  uint8x16_t d[5];
};
inline Digits base3_digits(uint8x16_t bytes) {
  // 3, 6, 9, 18, 27, 54 by their low four bits (3, 6, 9, 2, 11, 6): 6 is twice 3 and twice 27 alike.
  static const uint8_t kDigit[16] = {0, 0, 2, 1, 0, 0, 2, 0, 0, 1, 0, 1, 0, 0, 0, 0};
  const uint8x16_t table = vld1q_u8(kDigit), low = vdupq_n_u8(15);
  const uint8x16_t r4 = reduce(bytes, 81), r3 = reduce(r4, 27), r2 = reduce(r3, 9), r1 = reduce(r2, 3);
  return {{r1, vqtbl1q_u8(table, vandq_u8(vsubq_u8(r2, r1), low)),
           vqtbl1q_u8(table, vandq_u8(vsubq_u8(r3, r2), low)), vqtbl1q_u8(table, vandq_u8(vsubq_u8(r4, r3), low)),
           vandq_u8(vsubq_u8(bytes, r4), vdupq_n_u8(3))}};  // 81 and 162 are 1 and 2 in their low two bits
}

inline int8x16_t as_signed(uint8x16_t v) { return vreinterpretq_s8_u8(v); }

template <int P>
inline int32x4_t multiply(int32x4_t sum, uint8x16_t digits, int8x16_t x) {
  return vdotq_laneq_s32(sum, as_signed(digits), x, P);
}

template <int T>
inline void two_bit_group(const uint8_t* group, int64_t blocks, const int8_t* codes, int64_t stride,
                          int32_t* sums) {
  int32x4_t sum[T][4] = {};
  for (int64_t b = 0; b < blocks; ++b) {
    int8x16_t x[T];
    each<T>([&](auto t) BITDISTILL_INLINE { x[t] = vld1q_s8(codes + t * stride + 16 * b); });
    each<4>([&](auto i) BITDISTILL_INLINE {
      const uint8x16_t bytes = vld1q_u8(group + b * 64 + 16 * i);
      each<4>([&](auto p) BITDISTILL_INLINE {
        constexpr int kField = decltype(p)::value;
        const uint8x16_t digits = field<kField>(bytes);
        each<T>([&](auto t) BITDISTILL_INLINE { sum[t][i] = multiply<kField>(sum[t][i], digits, x[t]); });
      });
    });
  }
  for (int t = 0; t < T; ++t)
    for (int i = 0; i < 4; ++i) vst1q_s32(sums + 16 * t + 4 * i, sum[t][i]);
}

template <int T>
inline void base3_group(const uint8_t* group, int64_t blocks, const int8_t* codes, int64_t stride, int32_t* sums) {
  int32x4_t sum[T][4] = {};
  for (int64_t b = 0; b < blocks; ++b) {
    int8x16_t x[T], last[T];
    each<T>([&](auto t) BITDISTILL_INLINE {
      const int8_t* place = codes + t * stride + 20 * b;
      int32_t four;
      __builtin_memcpy(&four, place + 16, 4);
      x[t] = vld1q_s8(place);
      last[t] = vreinterpretq_s8_s32(vdupq_n_s32(four));
    });
    each<4>([&](auto i) BITDISTILL_INLINE {
      const Digits digits = base3_digits(vld1q_u8(group + b * 64 + 16 * i));
      each<4>([&](auto p) BITDISTILL_INLINE {
        constexpr int kField = decltype(p)::value;
        each<T>([&](auto t) BITDISTILL_INLINE { sum[t][i] = multiply<kField>(sum[t][i], digits.d[kField], x[t]); });
      });
      each<T>([&](auto t) BITDISTILL_INLINE { sum[t][i] = multiply<0>(sum[t][i], digits.d[4], last[t]); });
    });
  }
  for (int t = 0; t < T; ++t)
    for (int i = 0; i < 4; ++i) vst1q_s32(sums + 16 * t + 4 * i, sum[t][i]);
}

template <int T>
void ternary_group(const TernaryView& w, const ActivationView& x, const OutputView& out, int64_t t0, int64_t row,
                   int64_t row_end) {
  const Group group = group_at(w, row);
  const int8_t* codes = x.codes + t0 * x.stride - 4 * group.lead;
  int32_t sums[T * 16];
  if (w.layout == Layout::kTwoBitRows16) {
    two_bit_group<T>(group.codes, group.blocks, codes, x.stride, sums);
  } else {
    base3_group<T>(group.codes, group.blocks, codes, x.stride, sums);
  }
  for (int t = 0; t < T; ++t)
    store_group(out, x, sums + 16 * t, t0 + t, row, row_end, 1, w.scale, w.row_scales);
}

void ternary_gemv(const TernaryView& w, const ActivationView& x, const OutputView& out, int64_t row_begin,
                  int64_t row_end) {
  for (int64_t row = row_begin; row < row_end; row += kGroupRows) {
    int64_t t = 0;
    for (; t + 4 <= x.tokens; t += 4) ternary_group<4>(w, x, out, t, row, row_end);
    for (; t < x.tokens; ++t) ternary_group<1>(w, x, out, t, row, row_end);
  }
}

// Bytes laid out as a tile (`quads` * 64) against T tokens; int8 matrices are stored so.
template <int T>
inline void tile_product(const int8_t* tile, int64_t quads, const int8_t* codes, int64_t stride, int32_t* sums) {
  int32x4_t sum[T][4] = {};
  for (int64_t q = 0; q < quads; ++q) {
    int8x16_t x[T];
    each<T>([&](auto t) BITDISTILL_INLINE {
      int32_t four;
      __builtin_memcpy(&four, codes + t * stride + 4 * q, 4);
      x[t] = vreinterpretq_s8_s32(vdupq_n_s32(four));
    });
    each<4>([&](auto i) BITDISTILL_INLINE {
      const int8x16_t digits = vld1q_s8(tile + q * 64 + 16 * i);
      each<T>([&](auto t) BITDISTILL_INLINE { sum[t][i] = vdotq_s32(sum[t][i], digits, x[t]); });
    });
  }
  for (int t = 0; t < T; ++t)
    for (int i = 0; i < 4; ++i) vst1q_s32(sums + 16 * t + 4 * i, sum[t][i]);
}

template <int T>
void tile_tokens(const int8_t* tile, int64_t quads, const ActivationView& x, const OutputView& out, int64_t t0,
                 int64_t row, int64_t row_end, int32_t offset, float scale, const float* row_scales) {
  int32_t sums[T * 16];
  tile_product<T>(tile, quads, x.codes + t0 * x.stride, x.stride, sums);
  for (int t = 0; t < T; ++t) store_group(out, x, sums + 16 * t, t0 + t, row, row_end, offset, scale, row_scales);
}

void tile_rows(const int8_t* tile, int64_t quads, const ActivationView& x, const OutputView& out, int64_t row,
               int64_t row_end, int32_t offset, float scale, const float* row_scales) {
  int64_t t = 0;
  for (; t + 4 <= x.tokens; t += 4)
    tile_tokens<4>(tile, quads, x, out, t, row, row_end, offset, scale, row_scales);
  for (; t < x.tokens; ++t) tile_tokens<1>(tile, quads, x, out, t, row, row_end, offset, scale, row_scales);
}

void ternary_gemm(const TernaryView& w, const ActivationView& x, const OutputView& out, int64_t row_begin,
                  int64_t row_end, uint8_t* tile) {
  for (int64_t row = row_begin; row < row_end; row += kGroupRows) {
    const Group group = group_at(w, row);
    unpack_group_portable(w.layout, group.codes, group.blocks, tile);
    tile_rows(reinterpret_cast<const int8_t*>(tile) + 64 * group.lead, w.quads, x, out, row, row_end, 1, w.scale,
              w.row_scales);
  }
}

void int8_matmul(const Int8View& w, const ActivationView& x, const OutputView& out, int64_t row_begin,
                 int64_t row_end) {
  for (int64_t row = row_begin; row < row_end; row += kGroupRows)
    tile_rows(w.codes + row / kGroupRows * w.blocks * kBlockBytes, w.blocks, x, out, row, row_end, 0, 1.0f,
              w.row_scales);
}

// d_p of four rows out of sixteen bytes of each of three blocks (Int3Matrix).
template <int P>
inline uint8x16_t int3_digit(uint8x16_t a, uint8x16_t b, uint8x16_t c) {
  if constexpr (P >= 6) {
    return vorrq_u8(vshrq_n_u8(P == 6 ? a : b, 6), vandq_u8(vshrq_n_u8(c, P - 2), vdupq_n_u8(4)));
  } else {
    const uint8x16_t bytes = P < 2 ? a : P < 4 ? b : c;
    if constexpr (P % 2 == 0) return vandq_u8(bytes, vdupq_n_u8(7));
    else return vandq_u8(vshrq_n_u8(bytes, 3), vdupq_n_u8(7));
  }
}

template <int T>
inline void int3_group(const Int3View& w, const ActivationView& x, const OutputView& out, int64_t t0, int64_t row,
                       int64_t row_end) {
  const uint8_t* group = w.codes + row / kGroupRows * w.blocks * 3 * kBlockBytes;
  const int8_t* codes = x.codes + t0 * x.stride;
  int32x4_t sum[T][4] = {};
  for (int64_t b = 0; b < w.blocks; ++b) {
    int8x16_t low[T], high[T];
    each<T>([&](auto t) BITDISTILL_INLINE {
      low[t] = vld1q_s8(codes + t * x.stride + 32 * b);
      high[t] = vld1q_s8(codes + t * x.stride + 32 * b + 16);
    });
    each<4>([&](auto i) BITDISTILL_INLINE {
      const uint8_t* block = group + b * 3 * kBlockBytes + 16 * i;
      const uint8x16_t first = vld1q_u8(block), second = vld1q_u8(block + 64), third = vld1q_u8(block + 128);
      each<8>([&](auto p) BITDISTILL_INLINE {
        const uint8x16_t digit = int3_digit<p>(first, second, third);
        each<T>([&](auto t) BITDISTILL_INLINE {
          sum[t][i] = multiply<p % 4>(sum[t][i], digit, p < 4 ? low[t] : high[t]);
        });
      });
    });
  }
  for (int t = 0; t < T; ++t) {
    int32_t sums[16];
    for (int i = 0; i < 4; ++i) vst1q_s32(sums + 4 * i, sum[t][i]);
    store_group(out, x, sums, t0 + t, row, row_end, 4, 1.0f, w.row_scales);
  }
}

void int3_matmul(const Int3View& w, const ActivationView& x, const OutputView& out, int64_t row_begin,
                 int64_t row_end) {
  for (int64_t row = row_begin; row < row_end; row += kGroupRows) {
    int64_t t = 0;
    for (; t + 4 <= x.tokens; t += 4) int3_group<4>(w, x, out, t, row, row_end);
    for (; t < x.tokens; ++t) int3_group<1>(w, x, out, t, row, row_end);
  }
}

int32_t bit_dot_impl(const uint8_t* bits, int64_t blocks, const int8_t* x) {
  int32x4_t sum = vdupq_n_s32(0);
  for (int64_t i = 0; i < 2 * blocks; ++i) {
    const uint8x16_t bytes = vld1q_u8(bits + 16 * i);
    const int8_t* place = x + 256 * (i / 2) + 16 * (i % 2);
    each<8>([&](auto p) BITDISTILL_INLINE {
      const uint8x16_t set = vtstq_u8(bytes, vdupq_n_u8(1 << p));
      sum = vdotq_s32(sum, vandq_s8(vld1q_s8(place + 32 * p), as_signed(set)), vdupq_n_s8(1));
    });
  }
  return vaddvq_s32(sum);
}

}  // namespace

const KernelTable kNeonDotKernels = {Isa::kNeonDot, ternary_gemv, 4, ternary_gemm, 1, int8_matmul, int3_matmul,
                                     bit_dot_impl,
                                     BITDISTILL_FLOAT_KERNELS};

}  // namespace bitdistill
