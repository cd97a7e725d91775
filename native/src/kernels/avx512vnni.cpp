// AVX-512 with VNNI and VBMI (Ice Lake, Zen 4 and later).
//
// vpdpbusd zmm: 64 products u8 x i8 added into 16 int32 lanes, one lane a row of the group, activations broadcast
// four at a time. It does not saturate: four products are at most 4 * 255 * 128 < 2^17.
// Zen 4: dpbusd zmm 1 a cycle, latency 4; and/sub/min zmm 2 a cycle; vpermi2b 1 a cycle.
//
// Decode multiplies digits where they stand: the field p of a 2-bit byte, masked but not shifted, is 4^p times the
// digit, and its accumulator is divided by 4^p at the end (exactly: every term is a multiple).
// Bounds of the int32 accumulators, per block: 2 bits, field 3: 4 * 128 * 128 = 2^16; base 3, digit 4:
// 4 * 162 * 128 < 2^17; kMaxColumns is 8257 (< 2^14) and 6606 (< 2^13) blocks. Tiles: 4 * 2 * 128 = 2^10 a quad.
// int8: 4 * 255 * 128 < 130561 a quad, below 2^31 up to 65536 columns (checked by quantize_int8).

#include <immintrin.h>

#include "table.h"

namespace bitdistill {
namespace {

#include "common.inl"
#include "float.inl"

inline __m512i broadcast4(const int8_t* x) {
  int32_t four;
  __builtin_memcpy(&four, x, 4);
  return _mm512_set1_epi32(four);
}

inline __m512i load64(const void* p) { return _mm512_loadu_si512(p); }

inline void store_sums(const OutputView& out, const ActivationView& x, __m512i sum, int64_t t, int64_t row,
                       int64_t row_end, int32_t offset, float scale, const float* row_scales) {
  const __m512i exact = _mm512_sub_epi32(sum, _mm512_set1_epi32(offset * x.sums[t]));
  const int64_t count = row_end - row;
  const __mmask16 mask = count >= kGroupRows ? 0xffff : static_cast<__mmask16>((1u << count) - 1);
  if (out.sums) {
    _mm512_mask_storeu_epi32(out.sums + t * out.ld + row, mask, exact);
    return;
  }
  const __m512 x_scale = _mm512_set1_ps(x.scales[t]);
  const __m512 w_scale = row_scales ? _mm512_maskz_loadu_ps(mask, row_scales + row) : _mm512_set1_ps(scale);
  const __m512 y = _mm512_mul_ps(_mm512_cvtepi32_ps(exact), _mm512_mul_ps(x_scale, w_scale));
  _mm512_mask_storeu_ps(out.y + t * out.ld + row, mask, y);
}

// Far enough ahead to cover memory latency at full rate: a few hundred nanoseconds at 10 to 25 bytes a nanosecond.
constexpr int64_t kPrefetchBytes = 4096;

// --------------------------------------------------------------------------------------- 2 bits, decode

template <int T>
inline void two_bit_block(const uint8_t* block, const int8_t* x, int64_t stride, __m512i (&sum)[T][4]) {
  const __m512i bytes = load64(block);
  const __m512i p0 = _mm512_and_si512(bytes, _mm512_set1_epi8(0x03));
  const __m512i p1 = _mm512_and_si512(bytes, _mm512_set1_epi8(0x0c));
  const __m512i p2 = _mm512_and_si512(bytes, _mm512_set1_epi8(0x30));
  const __m512i p3 = _mm512_and_si512(bytes, _mm512_set1_epi8(static_cast<char>(0xc0)));
  each<T>([&](auto t) BITDISTILL_INLINE {
    const int8_t* row = x + t * stride;
    sum[t][0] = _mm512_dpbusd_epi32(sum[t][0], p0, broadcast4(row));
    sum[t][1] = _mm512_dpbusd_epi32(sum[t][1], p1, broadcast4(row + 4));
    sum[t][2] = _mm512_dpbusd_epi32(sum[t][2], p2, broadcast4(row + 8));
    sum[t][3] = _mm512_dpbusd_epi32(sum[t][3], p3, broadcast4(row + 12));
  });
}

template <int T>
inline void two_bit_group(const TernaryView& w, const ActivationView& x, const OutputView& out, int64_t t0,
                          int64_t row, int64_t row_end) {
  constexpr int kChains = T == 1 ? 2 : 1;  // independent sums enough to hide the latency of dpbusd
  const uint8_t* group = group_at(w, row).codes;
  const int64_t blocks = w.group_quads / 4;
  const int8_t* codes = x.codes + t0 * x.stride;
  __m512i sum[kChains][T][4] = {};
  int64_t b = 0;
  for (; b + kChains <= blocks; b += kChains)
    each<kChains>([&](auto c) BITDISTILL_INLINE {
      if (T == 1) _mm_prefetch(reinterpret_cast<const char*>(group + (b + c) * 64 + kPrefetchBytes), _MM_HINT_T0);
      two_bit_block<T>(group + (b + c) * 64, codes + 16 * (b + c), x.stride, sum[c]);
    });
  for (; b < blocks; ++b) two_bit_block<T>(group + b * 64, codes + 16 * b, x.stride, sum[0]);
  each<T>([&](auto t) BITDISTILL_INLINE {
    __m512i field[4];
    each<4>([&](auto p) BITDISTILL_INLINE {
      field[p] = _mm512_setzero_si512();
      each<kChains>([&](auto c) BITDISTILL_INLINE { field[p] = _mm512_add_epi32(field[p], sum[c][t][p]); });
    });
    const __m512i low = _mm512_add_epi32(field[0], _mm512_srai_epi32(field[1], 2));
    const __m512i high = _mm512_add_epi32(_mm512_srai_epi32(field[2], 4), _mm512_srai_epi32(field[3], 6));
    store_sums(out, x, _mm512_add_epi32(low, high), t0 + t, row, row_end, 1, w.scale, w.row_scales);
  });
}

// ---------------------------------------------------------------------------------------- base 3, decode

// Four base-3 digits of a value below 81, as four 2-bit fields.
struct FieldTable {
  alignas(64) uint8_t fields[128];
  constexpr FieldTable() : fields() {
    for (int v = 0; v < 81; ++v)
      fields[v] = static_cast<uint8_t>(v % 3 | v / 3 % 3 << 2 | v / 9 % 3 << 4 | v / 27 % 3 << 6);
  }
};
constexpr FieldTable kFieldTable;

// fields: digits 0..3 in 2-bit fields; top: 81 times digit 4.
inline void split_base3(__m512i bytes, __m512i table_low, __m512i table_high, __m512i* fields, __m512i* top) {
  const __m512i k81 = _mm512_set1_epi8(81);
  // v - 81 wraps to a larger byte exactly when v < 81, so the minimum subtracts 81 where it can.
  __m512i rest = _mm512_min_epu8(bytes, _mm512_sub_epi8(bytes, k81));
  rest = _mm512_min_epu8(rest, _mm512_sub_epi8(rest, k81));
  *top = _mm512_sub_epi8(bytes, rest);
  *fields = _mm512_permutex2var_epi8(table_low, rest, table_high);
}

template <int T>
inline void base3_group(const TernaryView& w, const ActivationView& x, const OutputView& out, int64_t t0,
                        int64_t row, int64_t row_end) {
  const Group group = group_at(w, row);
  const int8_t* codes = x.codes + t0 * x.stride - 4 * group.lead;
  const __m512i table_low = load64(kFieldTable.fields), table_high = load64(kFieldTable.fields + 64);
  __m512i sum[T][5] = {};
  for (int64_t b = 0; b < group.blocks; ++b) {
    if (T == 1) _mm_prefetch(reinterpret_cast<const char*>(group.codes + b * 64 + kPrefetchBytes), _MM_HINT_T0);
    __m512i fields, top;
    split_base3(load64(group.codes + b * 64), table_low, table_high, &fields, &top);
    const __m512i p0 = _mm512_and_si512(fields, _mm512_set1_epi8(0x03));
    const __m512i p1 = _mm512_and_si512(fields, _mm512_set1_epi8(0x0c));
    const __m512i p2 = _mm512_and_si512(fields, _mm512_set1_epi8(0x30));
    const __m512i p3 = _mm512_and_si512(fields, _mm512_set1_epi8(static_cast<char>(0xc0)));
    each<T>([&](auto t) BITDISTILL_INLINE {
      const int8_t* row_x = codes + t * x.stride + 20 * b;
      sum[t][0] = _mm512_dpbusd_epi32(sum[t][0], p0, broadcast4(row_x));
      sum[t][1] = _mm512_dpbusd_epi32(sum[t][1], p1, broadcast4(row_x + 4));
      sum[t][2] = _mm512_dpbusd_epi32(sum[t][2], p2, broadcast4(row_x + 8));
      sum[t][3] = _mm512_dpbusd_epi32(sum[t][3], p3, broadcast4(row_x + 12));
      sum[t][4] = _mm512_dpbusd_epi32(sum[t][4], top, broadcast4(row_x + 16));
    });
  }
  each<T>([&](auto t) BITDISTILL_INLINE {
    int32_t tops[16];
    _mm512_storeu_si512(tops, sum[t][4]);
    for (int32_t& v : tops) v /= 81;
    const __m512i low = _mm512_add_epi32(sum[t][0], _mm512_srai_epi32(sum[t][1], 2));
    const __m512i high = _mm512_add_epi32(_mm512_srai_epi32(sum[t][2], 4), _mm512_srai_epi32(sum[t][3], 6));
    const __m512i total = _mm512_add_epi32(_mm512_add_epi32(low, high), load64(tops));
    store_sums(out, x, total, t0 + t, row, row_end, 1, w.scale, w.row_scales);
  });
}

#include "avx512_batch.inl"

template <int T>
inline void ternary_group(const TernaryView& w, const ActivationView& x, const OutputView& out, int64_t t0,
                          int64_t row, int64_t row_end) {
  if constexpr (T > 4) {
    const Group group = group_at(w, row);
    const int8_t* codes = x.codes + t0 * x.stride - 4 * group.lead;
    const auto run = w.layout == Layout::kTwoBitRows16 ? batch_group<TwoBitQuads, T> : batch_group<Base3Quads, T>;
    run(group.codes, group.blocks, codes, x, out, t0, row, row_end, 1, w.scale, w.row_scales);
  } else if (w.layout == Layout::kTwoBitRows16) {
    two_bit_group<T>(w, x, out, t0, row, row_end);
  } else {
    base3_group<T>(w, x, out, t0, row, row_end);
  }
}

void ternary_gemv(const TernaryView& w, const ActivationView& x, const OutputView& out, int64_t row_begin,
                  int64_t row_end) {
  for (int64_t row = row_begin; row < row_end; row += kGroupRows) {
    int64_t t = 0;
    for (; t + 8 <= x.tokens; t += 8) ternary_group<8>(w, x, out, t, row, row_end);
    switch (x.tokens - t) {
      case 7: ternary_group<7>(w, x, out, t, row, row_end); break;
      case 6: ternary_group<6>(w, x, out, t, row, row_end); break;
      case 5: ternary_group<5>(w, x, out, t, row, row_end); break;
      case 4: ternary_group<4>(w, x, out, t, row, row_end); break;
      case 3: ternary_group<3>(w, x, out, t, row, row_end); break;
      case 2: ternary_group<2>(w, x, out, t, row, row_end); break;
      case 1: ternary_group<1>(w, x, out, t, row, row_end); break;
      default: break;
    }
  }
}

// ----------------------------------------------------------------------------------------- tiles, prefill

void unpack_group(Layout layout, const Group& group, uint8_t* tile) {
  const __m512i three = _mm512_set1_epi8(3);
  const __m512i table_low = load64(kFieldTable.fields), table_high = load64(kFieldTable.fields + 64);
  const bool two_bit = layout == Layout::kTwoBitRows16;
  for (int64_t b = 0; b < group.blocks; ++b) {
    __m512i fields = load64(group.codes + b * 64), top = fields;
    if (!two_bit) split_base3(fields, table_low, table_high, &fields, &top);
    _mm512_storeu_si512(tile, _mm512_and_si512(fields, three));
    _mm512_storeu_si512(tile + 64, _mm512_and_si512(_mm512_srli_epi16(fields, 2), three));
    _mm512_storeu_si512(tile + 128, _mm512_and_si512(_mm512_srli_epi16(fields, 4), three));
    _mm512_storeu_si512(tile + 192, _mm512_and_si512(_mm512_srli_epi16(fields, 6), three));
    tile += 256;
    if (!two_bit) {  // 81 and 162 are 1 and 2 in their low two bits
      _mm512_storeu_si512(tile, _mm512_and_si512(top, three));
      tile += 64;
    }
  }
}

// G groups of unsigned bytes (`quads` * 64 bytes each) against T tokens. The sums have names, and leave their
// registers by plain stores, because GCC otherwise spills them inside the loop (half the speed).
#define BITDISTILL_TOKENS(X) X(0) X(1) X(2) X(3) X(4) X(5) X(6) X(7) X(8) X(9) X(10) X(11)
#define BITDISTILL_DECLARE(t) __m512i a##t = _mm512_setzero_si512(), b##t = a##t;
#define BITDISTILL_MULTIPLY(t)                                    \
  if constexpr (t < T) {                                          \
    const __m512i four = broadcast4(codes + t * stride);          \
    a##t = _mm512_dpbusd_epi32(a##t, first, four);                \
    if constexpr (G == 2) b##t = _mm512_dpbusd_epi32(b##t, second, four); \
  }
#define BITDISTILL_STORE(t)                                                        \
  if constexpr (t < T) {                                                           \
    _mm512_store_si512(sums + 16 * t, a##t);                                       \
    if constexpr (G == 2) _mm512_store_si512(sums + 16 * (T + t), b##t);           \
  }
template <int G, int T>
void gemm_tile(const TernaryView& w, const ActivationView& x, const OutputView& out, int64_t t0, int64_t row,
               int64_t row_end, const uint8_t* tile, const uint8_t* next) {
  const int64_t quads = w.quads, stride = x.stride;
  const int8_t* codes = x.codes + t0 * stride;
  BITDISTILL_TOKENS(BITDISTILL_DECLARE)
  for (int64_t q = 0; q < quads; ++q, codes += 4) {
    const __m512i first = load64(tile + 64 * q), second = G == 2 ? load64(next + 64 * q) : first;
    BITDISTILL_TOKENS(BITDISTILL_MULTIPLY)
  }
  alignas(64) int32_t sums[G * T * 16];
  BITDISTILL_TOKENS(BITDISTILL_STORE)
  for (int64_t g = 0; g < G; ++g)
    for (int64_t t = 0; t < T; ++t)
      store_sums(out, x, load64(sums + 16 * (g * T + t)), t0 + t, row + g * kGroupRows, row_end, 1, w.scale,
                 w.row_scales);
}
#undef BITDISTILL_STORE
#undef BITDISTILL_MULTIPLY
#undef BITDISTILL_DECLARE
#undef BITDISTILL_TOKENS

constexpr int kTileTokens = 12;  // 2 * 12 accumulators, 2 digits, 1 broadcast of 32 registers

template <int G>
void gemm_groups(const TernaryView& w, const ActivationView& x, const OutputView& out, int64_t row,
                 int64_t row_end, const uint8_t* tile, const uint8_t* next) {
  int64_t t = 0;
  for (; t + kTileTokens <= x.tokens; t += kTileTokens)
    gemm_tile<G, kTileTokens>(w, x, out, t, row, row_end, tile, next);
  for (; t + 4 <= x.tokens; t += 4) gemm_tile<G, 4>(w, x, out, t, row, row_end, tile, next);
  for (; t < x.tokens; ++t) gemm_tile<G, 1>(w, x, out, t, row, row_end, tile, next);
}

void ternary_gemm(const TernaryView& w, const ActivationView& x, const OutputView& out, int64_t row_begin,
                  int64_t row_end, uint8_t* tile) {
  uint8_t* next = tile + tile_bytes(w.quads);
  for (int64_t row = row_begin; row < row_end; row += 2 * kGroupRows) {
    const Group first = group_at(w, row);
    unpack_group(w.layout, first, tile);
    if (row + kGroupRows < row_end) {
      const Group second = group_at(w, row + kGroupRows);
      unpack_group(w.layout, second, next);
      gemm_groups<2>(w, x, out, row, row_end, tile + 64 * first.lead, next + 64 * second.lead);
    } else {
      gemm_groups<1>(w, x, out, row, row_end, tile + 64 * first.lead, next);
    }
  }
}

// --------------------------------------------------------------------------------------------------- int8

// Codes + 128 as unsigned; store_sums takes 128 * sum(x) away.
template <int T>
inline void int8_group(const Int8View& w, const ActivationView& x, const OutputView& out, int64_t t0, int64_t row,
                       int64_t row_end) {
  constexpr int kChains = T == 1 ? 4 : T == 2 ? 2 : 1;
  const int8_t* group = w.codes + row / kGroupRows * w.blocks * kBlockBytes;
  const int8_t* codes = x.codes + t0 * x.stride;
  const __m512i flip = _mm512_set1_epi8(static_cast<char>(0x80));
  __m512i sum[kChains][T] = {};
  int64_t b = 0;
  for (; b + kChains <= w.blocks; b += kChains)
    each<kChains>([&](auto c) BITDISTILL_INLINE {
      if (T == 1) _mm_prefetch(reinterpret_cast<const char*>(group + (b + c) * 64 + kPrefetchBytes), _MM_HINT_T0);
      const __m512i digits = _mm512_xor_si512(load64(group + (b + c) * 64), flip);
      each<T>([&](auto t) BITDISTILL_INLINE {
        sum[c][t] = _mm512_dpbusd_epi32(sum[c][t], digits, broadcast4(codes + t * x.stride + 4 * (b + c)));
      });
    });
  for (; b < w.blocks; ++b) {
    const __m512i digits = _mm512_xor_si512(load64(group + b * 64), flip);
    each<T>([&](auto t) BITDISTILL_INLINE {
      sum[0][t] = _mm512_dpbusd_epi32(sum[0][t], digits, broadcast4(codes + t * x.stride + 4 * b));
    });
  }
  each<T>([&](auto t) BITDISTILL_INLINE {
    __m512i total = _mm512_setzero_si512();
    each<kChains>([&](auto c) BITDISTILL_INLINE { total = _mm512_add_epi32(total, sum[c][t]); });
    store_sums(out, x, total, t0 + t, row, row_end, 128, 1.0f, w.row_scales);
  });
}

void int8_matmul(const Int8View& w, const ActivationView& x, const OutputView& out, int64_t row_begin,
                 int64_t row_end) {
  for (int64_t row = row_begin; row < row_end; row += kGroupRows) {
    int64_t t = 0;
    for (; t + 8 <= x.tokens; t += 8) int8_group<8>(w, x, out, t, row, row_end);
    for (; t + 4 <= x.tokens; t += 4) int8_group<4>(w, x, out, t, row, row_end);
    for (; t + 2 <= x.tokens; t += 2) int8_group<2>(w, x, out, t, row, row_end);
    if (t < x.tokens) int8_group<1>(w, x, out, t, row, row_end);
  }
}

// -------------------------------------------------------------------------------------------------- 3 bits

template <int T>
inline void int3_group(const Int3View& w, const ActivationView& x, const OutputView& out, int64_t t0, int64_t row,
                       int64_t row_end) {
  const uint8_t* group = w.codes + row / kGroupRows * w.blocks * 3 * kBlockBytes;
  const int8_t* codes = x.codes + t0 * x.stride;
  if constexpr (T > 4)
    return batch_group<Int3Quads, T>(group, w.blocks, codes, x, out, t0, row, row_end, 4, 1.0f, w.row_scales);
  constexpr int kChains = T < 4 ? 4 / T : 1;  // of dpbusd, to hide its latency
  __m512i sum[kChains][T] = {};
  for (int64_t b = 0; b < w.blocks; ++b) {
    const uint8_t* block = group + b * 3 * kBlockBytes;
    each<3>([&](auto i) BITDISTILL_INLINE {
      if (T == 1) _mm_prefetch(reinterpret_cast<const char*>(block + 64 * i + kPrefetchBytes), _MM_HINT_T0);
    });
    const Int3Quads quads(block);
    each<8>([&](auto p) BITDISTILL_INLINE {
      const __m512i digit = quads.template get<p>();
      constexpr int chain = p % kChains;
      each<T>([&](auto t) BITDISTILL_INLINE {
        sum[chain][t] = _mm512_dpbusd_epi32(sum[chain][t], digit, broadcast4(codes + t * x.stride + 32 * b + 4 * p));
      });
    });
  }
  each<T>([&](auto t) BITDISTILL_INLINE {
    __m512i total = sum[0][t];
    each<kChains - 1>([&](auto c) BITDISTILL_INLINE { total = _mm512_add_epi32(total, sum[c + 1][t]); });
    store_sums(out, x, total, t0 + t, row, row_end, 4, 1.0f, w.row_scales);
  });
}

void int3_matmul(const Int3View& w, const ActivationView& x, const OutputView& out, int64_t row_begin,
                 int64_t row_end) {
  for (int64_t row = row_begin; row < row_end; row += kGroupRows) {
    int64_t t = 0;
    for (; t + 8 <= x.tokens; t += 8) int3_group<8>(w, x, out, t, row, row_end);
    for (; t + 4 <= x.tokens; t += 4) int3_group<4>(w, x, out, t, row, row_end);
    for (; t + 2 <= x.tokens; t += 2) int3_group<2>(w, x, out, t, row, row_end);
    if (t < x.tokens) int3_group<1>(w, x, out, t, row, row_end);
  }
}

inline __m256i load32(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
#include "bit_dot_256.inl"

}  // namespace

const KernelTable kAvx512VnniKernels = {Isa::kAvx512Vnni, ternary_gemv, 8, ternary_gemm, 2, int8_matmul, int3_matmul,
                                        bit_dot_impl,
                                        BITDISTILL_FLOAT_KERNELS};

}  // namespace bitdistill
