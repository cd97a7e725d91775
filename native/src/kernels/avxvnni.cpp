// AVX-VNNI: the 256-bit vpdpbusd of processors without AVX-512 (Alder Lake and later Core, Zen 5 too).
//
// 32 products u8 x i8 added into 8 int32 lanes, one lane a row of half a group; it does not saturate. The bounds are
// those of avx512vnni.cpp, which holds the same arithmetic in twice the width. Fields of a 2-bit byte are masked but
// not shifted: field p counts 4^p times its digit and is divided at the end, exactly.
//
// BITDISTILL_AVXVNNI_AS_EVEX compiles the same source with the AVX-512 encoding of the instruction, to test it on
// processors that have only that one.

#include <immintrin.h>

#include "table.h"

namespace bitdistill {
namespace {

#include "common.inl"
#include "float.inl"

inline __m256i dpbusd(__m256i sum, __m256i digits, __m256i x) {
#if defined(BITDISTILL_AVXVNNI_AS_EVEX)
  return _mm256_dpbusd_epi32(sum, digits, x);
#else
  return _mm256_dpbusd_avx_epi32(sum, digits, x);
#endif
}
inline __m256i broadcast4(const int8_t* x) {
  int32_t four;
  __builtin_memcpy(&four, x, 4);
  return _mm256_set1_epi32(four);
}
inline __m256i load32(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
inline void store32(void* p, __m256i v) { _mm256_storeu_si256(static_cast<__m256i*>(p), v); }

#include "base3_256.inl"
#include "bit_dot_256.inl"
#include "int3_256.inl"

constexpr int64_t kPrefetchBytes = 2048;

// Half a group (8 rows) against T tokens.
template <int T>
inline void two_bit_half(const uint8_t* group, int64_t blocks, const int8_t* codes, int64_t stride, int32_t* sums) {
  __m256i sum[T][4] = {};
  for (int64_t b = 0; b < blocks; ++b) {
    if (T == 1) _mm_prefetch(reinterpret_cast<const char*>(group + b * 64 + kPrefetchBytes), _MM_HINT_T0);
    const __m256i bytes = load32(group + b * 64);
    each<4>([&](auto p) BITDISTILL_INLINE {
      const __m256i field = _mm256_and_si256(bytes, _mm256_set1_epi8(static_cast<char>(3 << (2 * p))));
      each<T>([&](auto t) BITDISTILL_INLINE {
        sum[t][p] = dpbusd(sum[t][p], field, broadcast4(codes + t * stride + 16 * b + 4 * p));
      });
    });
  }
  each<T>([&](auto t) BITDISTILL_INLINE {
    const __m256i low = _mm256_add_epi32(sum[t][0], _mm256_srai_epi32(sum[t][1], 2));
    const __m256i high = _mm256_add_epi32(_mm256_srai_epi32(sum[t][2], 4), _mm256_srai_epi32(sum[t][3], 6));
    store32(sums + 16 * t, _mm256_add_epi32(low, high));
  });
}

template <int T>
inline void base3_half(const uint8_t* group, int64_t blocks, const int8_t* codes, int64_t stride, int32_t* sums) {
  __m256i sum[T][2] = {};
  for (int64_t b = 0; b < blocks; ++b) {
    const Digits w = base3_digits(load32(group + b * 64));
    each<5>([&](auto p) BITDISTILL_INLINE {
      each<T>([&](auto t) BITDISTILL_INLINE {
        sum[t][p % 2] = dpbusd(sum[t][p % 2], w.d[p], broadcast4(codes + t * stride + 20 * b + 4 * p));
      });
    });
  }
  each<T>([&](auto t) BITDISTILL_INLINE { store32(sums + 16 * t, _mm256_add_epi32(sum[t][0], sum[t][1])); });
}

template <int T>
void ternary_group(const TernaryView& w, const ActivationView& x, const OutputView& out, int64_t t0, int64_t row,
                   int64_t row_end) {
  const Group group = group_at(w, row);
  const int8_t* codes = x.codes + t0 * x.stride - 4 * group.lead;
  int32_t sums[T * 16];
  const auto half = w.layout == Layout::kTwoBitRows16 ? two_bit_half<T> : base3_half<T>;
  half(group.codes, group.blocks, codes, x.stride, sums);
  half(group.codes + 32, group.blocks, codes, x.stride, sums + 8);
  for (int t = 0; t < T; ++t)
    store_group(out, x, sums + 16 * t, t0 + t, row, row_end, 1, w.scale, w.row_scales);
}

void ternary_gemv(const TernaryView& w, const ActivationView& x, const OutputView& out, int64_t row_begin,
                  int64_t row_end) {
  for (int64_t row = row_begin; row < row_end; row += kGroupRows) {
    int64_t t = 0;
    for (; t + 2 <= x.tokens; t += 2) ternary_group<2>(w, x, out, t, row, row_end);
    if (t < x.tokens) ternary_group<1>(w, x, out, t, row, row_end);
  }
}

// ----------------------------------------------------------------------------------------- tiles, prefill

void unpack_group(Layout layout, const Group& group, uint8_t* tile) {
  const __m256i three = _mm256_set1_epi8(3);
  for (int64_t b = 0; b < group.blocks; ++b, tile += 64 * block_quads(layout))
    for (int64_t h = 0; h < 64; h += 32) {
      const __m256i bytes = load32(group.codes + b * 64 + h);
      if (layout == Layout::kTwoBitRows16) {
        store32(tile + h, _mm256_and_si256(bytes, three));
        store32(tile + h + 64, _mm256_and_si256(_mm256_srli_epi16(bytes, 2), three));
        store32(tile + h + 128, _mm256_and_si256(_mm256_srli_epi16(bytes, 4), three));
        store32(tile + h + 192, _mm256_and_si256(_mm256_srli_epi16(bytes, 6), three));
      } else {
        const Digits digits = base3_digits(bytes);
        each<5>([&](auto p) BITDISTILL_INLINE { store32(tile + h + 64 * p, digits.d[p]); });
      }
    }
}

// A tile of bytes (`quads` * 64), xored with `flip` (0, or 0x80 to make int8 codes unsigned), against T tokens. Named
// sums that leave their registers by plain stores: GCC otherwise spills them inside the loop.
#define BITDISTILL_TOKENS(X) X(0) X(1) X(2) X(3) X(4) X(5)
#define BITDISTILL_DECLARE(t) __m256i a##t = _mm256_setzero_si256(), b##t = a##t;
#define BITDISTILL_MULTIPLY(t)                             \
  if constexpr (t < T) {                                   \
    const __m256i four = broadcast4(codes + t * stride);   \
    a##t = dpbusd(a##t, low, four);                        \
    b##t = dpbusd(b##t, high, four);                       \
    asm volatile("" : "+x"(a##t), "+x"(b##t));             \
  }
#define BITDISTILL_STORE(t)                \
  if constexpr (t < T) {                   \
    store32(sums + 16 * t, a##t);          \
    store32(sums + 16 * t + 8, b##t);      \
  }
template <int T>
inline void tile_product(const void* tile_bytes, int64_t quads, __m256i flip, const int8_t* codes, int64_t stride,
                         int32_t* sums) {
  const auto* tile = static_cast<const uint8_t*>(tile_bytes);
  BITDISTILL_TOKENS(BITDISTILL_DECLARE)
  for (int64_t q = 0; q < quads; ++q, codes += 4, tile += 64) {
    const __m256i low = _mm256_xor_si256(load32(tile), flip), high = _mm256_xor_si256(load32(tile + 32), flip);
    BITDISTILL_TOKENS(BITDISTILL_MULTIPLY)
  }
  BITDISTILL_TOKENS(BITDISTILL_STORE)
}
#undef BITDISTILL_STORE
#undef BITDISTILL_MULTIPLY
#undef BITDISTILL_DECLARE
#undef BITDISTILL_TOKENS

struct Tile {
  const void* bytes;
  int64_t quads;
  int32_t offset;  // what stands for code 0: 1 in ternary digits, 128 in flipped int8 codes
  float scale;
  const float* row_scales;
};

template <int T>
void tile_tokens(const Tile& w, const ActivationView& x, const OutputView& out, int64_t t0, int64_t row,
                 int64_t row_end) {
  int32_t sums[T * 16];
  const __m256i flip = w.offset == 128 ? _mm256_set1_epi8(static_cast<char>(0x80)) : _mm256_setzero_si256();
  tile_product<T>(w.bytes, w.quads, flip, x.codes + t0 * x.stride, x.stride, sums);
  for (int t = 0; t < T; ++t)
    store_group(out, x, sums + 16 * t, t0 + t, row, row_end, w.offset, w.scale, w.row_scales);
}

void tile_rows(const Tile& w, const ActivationView& x, const OutputView& out, int64_t row, int64_t row_end) {
  int64_t t = 0;
  for (; t + 6 <= x.tokens; t += 6) tile_tokens<6>(w, x, out, t, row, row_end);
  for (; t + 2 <= x.tokens; t += 2) tile_tokens<2>(w, x, out, t, row, row_end);
  if (t < x.tokens) tile_tokens<1>(w, x, out, t, row, row_end);
}

void ternary_gemm(const TernaryView& w, const ActivationView& x, const OutputView& out, int64_t row_begin,
                  int64_t row_end, uint8_t* tile) {
  for (int64_t row = row_begin; row < row_end; row += kGroupRows) {
    const Group group = group_at(w, row);
    unpack_group(w.layout, group, tile);
    tile_rows({tile + 64 * group.lead, w.quads, 1, w.scale, w.row_scales}, x, out, row, row_end);
  }
}

void int8_matmul(const Int8View& w, const ActivationView& x, const OutputView& out, int64_t row_begin,
                 int64_t row_end) {
  for (int64_t row = row_begin; row < row_end; row += kGroupRows)
    tile_rows({w.codes + row / kGroupRows * w.blocks * kBlockBytes, w.blocks, 128, 1.0f, w.row_scales}, x, out, row,
              row_end);
}

template <int T>
inline void int3_half(const uint8_t* group, int64_t blocks, const int8_t* codes, int64_t stride, int32_t* sums) {
  __m256i sum[T][2] = {};
  for (int64_t b = 0; b < blocks; ++b) {
    const uint8_t* block = group + b * 3 * kBlockBytes;
    each<3>([&](auto i) BITDISTILL_INLINE {
      if (T == 1) _mm_prefetch(reinterpret_cast<const char*>(block + 64 * i + kPrefetchBytes), _MM_HINT_T0);
    });
    const Int3Quads quads(block);
    each<8>([&](auto p) BITDISTILL_INLINE {
      const __m256i digit = quads.template get<p>();
      constexpr int chain = p % 2;
      each<T>([&](auto t) BITDISTILL_INLINE {
        sum[t][chain] = dpbusd(sum[t][chain], digit, broadcast4(codes + t * stride + 32 * b + 4 * p));
      });
    });
  }
  each<T>([&](auto t) BITDISTILL_INLINE { store32(sums + 16 * t, _mm256_add_epi32(sum[t][0], sum[t][1])); });
}

template <int T>
void int3_group(const Int3View& w, const ActivationView& x, const OutputView& out, int64_t t0, int64_t row,
                int64_t row_end) {
  const uint8_t* group = w.codes + row / kGroupRows * w.blocks * 3 * kBlockBytes;
  const int8_t* codes = x.codes + t0 * x.stride;
  int32_t sums[T * 16];
  int3_half<T>(group, w.blocks, codes, x.stride, sums);
  int3_half<T>(group + 32, w.blocks, codes, x.stride, sums + 8);
  for (int t = 0; t < T; ++t) store_group(out, x, sums + 16 * t, t0 + t, row, row_end, 4, 1.0f, w.row_scales);
}

void int3_matmul(const Int3View& w, const ActivationView& x, const OutputView& out, int64_t row_begin,
                 int64_t row_end) {
  for (int64_t row = row_begin; row < row_end; row += kGroupRows) {
    int64_t t = 0;
    for (; t + 4 <= x.tokens; t += 4) int3_group<4>(w, x, out, t, row, row_end);
    for (; t < x.tokens; ++t) int3_group<1>(w, x, out, t, row, row_end);
  }
}

}  // namespace

const KernelTable kAvxVnniKernels = {Isa::kAvxVnni, ternary_gemv, 4, ternary_gemm, 1, int8_matmul, int3_matmul,
                                     bit_dot_impl,
                                     BITDISTILL_FLOAT_KERNELS};

}  // namespace bitdistill
