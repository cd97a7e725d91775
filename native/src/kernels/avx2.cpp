// AVX2 with FMA's companions F16C (Haswell, Zen and later).
//
// vpmaddubsw: 32 products u8 x i8, added in pairs into 16 int16 lanes with saturation; a row of the group has two
// lanes. It must never saturate:
//   digits 0..2 x i8:  -512 <= pair <= 508, so int16 holds kPairs = 64: -32768 to 32512; then they are widened.
//   4 * digits x i8:   |pair| <= 2048, so int16 holds 15 pairs; field 1 and 3 add 14 (7 blocks), and 14 * 512 + 14 *
//                      2048 / 4 = 14336 fits when both sums are joined.
//   3-bit codes 0..7 x i8: |pair| <= 2 * 7 * 128 = 1792; 16 pairs (2 times 3 blocks) are added.
// Widening: vpmaddwd with ones joins the two lanes of a row into int32 (2 * 32767 at most a step).
// Zen 4: maddubs 2 a cycle, add/and 4 a cycle, shift 2 a cycle.

#include <immintrin.h>

#include "table.h"

namespace bitdistill {
namespace {

#include "common.inl"
#include "float.inl"

inline __m256i broadcast4(const int8_t* x) {
  int32_t four;
  __builtin_memcpy(&four, x, 4);
  return _mm256_set1_epi32(four);
}
inline __m256i load32(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
inline void store32(void* p, __m256i v) { _mm256_storeu_si256(static_cast<__m256i*>(p), v); }
inline __m256i widen(__m256i sum16) { return _mm256_madd_epi16(sum16, _mm256_set1_epi16(1)); }

constexpr int64_t kPrefetchBytes = 2048;

// --------------------------------------------------------------------------------------- 2 bits, decode

struct Fields {
  __m256i f0, f1, f2, f3;  // f1 and f3 are four times the digit
};
inline Fields two_bit_fields(const uint8_t* half_block) {
  const __m256i bytes = load32(half_block), shifted = _mm256_srli_epi16(bytes, 4);
  const __m256i m0 = _mm256_set1_epi8(0x03), m1 = _mm256_set1_epi8(0x0c);
  return {_mm256_and_si256(bytes, m0), _mm256_and_si256(bytes, m1), _mm256_and_si256(shifted, m0),
          _mm256_and_si256(shifted, m1)};
}

constexpr int64_t kTwoBitBlocks = 7;  // between widenings, see above

// H halves (8 rows each) of a block at once.
template <int T, int H>
inline void two_bit_halves(const uint8_t* group, int64_t blocks, const int8_t* codes, int64_t stride,
                           int32_t* sums) {  // sums[t * 16 + row]
  __m256i total[T][H] = {};
  for (int64_t b0 = 0; b0 < blocks; b0 += kTwoBitBlocks) {
    const int64_t b1 = b0 + kTwoBitBlocks < blocks ? b0 + kTwoBitBlocks : blocks;
    __m256i ones[T][H] = {}, fours[T][H] = {};
    for (int64_t b = b0; b < b1; ++b) {
      if (T == 1) _mm_prefetch(reinterpret_cast<const char*>(group + b * 64 + kPrefetchBytes), _MM_HINT_T0);
      each<H>([&](auto h) BITDISTILL_INLINE {
        const Fields w = two_bit_fields(group + b * 64 + 32 * h);
        each<T>([&](auto t) BITDISTILL_INLINE {
          const int8_t* x = codes + t * stride + 16 * b;
          ones[t][h] = _mm256_add_epi16(ones[t][h], _mm256_maddubs_epi16(w.f0, broadcast4(x)));
          fours[t][h] = _mm256_add_epi16(fours[t][h], _mm256_maddubs_epi16(w.f1, broadcast4(x + 4)));
          ones[t][h] = _mm256_add_epi16(ones[t][h], _mm256_maddubs_epi16(w.f2, broadcast4(x + 8)));
          fours[t][h] = _mm256_add_epi16(fours[t][h], _mm256_maddubs_epi16(w.f3, broadcast4(x + 12)));
        });
      });
    }
    each<T>([&](auto t) BITDISTILL_INLINE {
      each<H>([&](auto h) BITDISTILL_INLINE {
        const __m256i joined = _mm256_add_epi16(ones[t][h], _mm256_srai_epi16(fours[t][h], 2));
        total[t][h] = _mm256_add_epi32(total[t][h], widen(joined));
      });
    });
  }
  each<T>([&](auto t) BITDISTILL_INLINE {
    each<H>([&](auto h) BITDISTILL_INLINE { store32(sums + 16 * t + 8 * h, total[t][h]); });
  });
}

// ---------------------------------------------------------------------------------------- base 3, decode

#include "base3_256.inl"

constexpr int64_t kBase3Blocks = 12;  // 60 pairs between widenings

template <int T, int H>
inline void base3_halves(const uint8_t* group, int64_t blocks, const int8_t* codes, int64_t stride, int32_t* sums) {
  __m256i total[T][H] = {};
  for (int64_t b0 = 0; b0 < blocks; b0 += kBase3Blocks) {
    const int64_t b1 = b0 + kBase3Blocks < blocks ? b0 + kBase3Blocks : blocks;
    __m256i sum[T][H] = {};
    for (int64_t b = b0; b < b1; ++b) {
      if (T == 1) _mm_prefetch(reinterpret_cast<const char*>(group + b * 64 + kPrefetchBytes), _MM_HINT_T0);
      each<H>([&](auto h) BITDISTILL_INLINE {
        const Digits w = base3_digits(load32(group + b * 64 + 32 * h));
        const int8_t* x = codes + 20 * b;
        asm("" : "+r"(x));  // both halves load their own: five kept broadcasts would push tables out of registers
        each<T>([&](auto t) BITDISTILL_INLINE { each<5>([&](auto p) BITDISTILL_INLINE {
            const __m256i four = broadcast4(x + t * stride + 4 * p);
            sum[t][h] = _mm256_add_epi16(sum[t][h], _mm256_maddubs_epi16(w.d[p], four));
          }); });
      });
    }
    each<T>([&](auto t) BITDISTILL_INLINE {
      each<H>([&](auto h) BITDISTILL_INLINE { total[t][h] = _mm256_add_epi32(total[t][h], widen(sum[t][h])); });
    });
  }
  each<T>([&](auto t) BITDISTILL_INLINE {
    each<H>([&](auto h) BITDISTILL_INLINE { store32(sums + 16 * t + 8 * h, total[t][h]); });
  });
}

#include "bit_dot_256.inl"
#include "int3_256.inl"

#include "avx2_batch.inl"

template <int T>
inline void ternary_group(const TernaryView& w, const ActivationView& x, const OutputView& out, int64_t t0,
                          int64_t row, int64_t row_end) {
  const Group group = group_at(w, row);
  const int8_t* codes = x.codes + t0 * x.stride - 4 * group.lead;
  const bool base3 = w.layout == Layout::kBase3Rows16;
  int32_t sums[T * 16];
  if constexpr (T == 1) {
    base3 ? base3_halves<T, 2>(group.codes, group.blocks, codes, x.stride, sums)
          : two_bit_halves<T, 2>(group.codes, group.blocks, codes, x.stride, sums);
  } else if constexpr (T > 4) {
    base3 ? batch_group<Base3Quads, T>(group.codes, group.blocks, codes, x.stride, sums)
          : batch_group<TwoBitQuads, T>(group.codes, group.blocks, codes, x.stride, sums);
  } else {
    for (int h = 0; h < 2; ++h)
      base3 ? base3_halves<T, 1>(group.codes + 32 * h, group.blocks, codes, x.stride, sums + 8 * h)
            : two_bit_halves<T, 1>(group.codes + 32 * h, group.blocks, codes, x.stride, sums + 8 * h);
  }
  for (int t = 0; t < T; ++t)
    store_group(out, x, sums + 16 * t, t0 + t, row, row_end, 1, w.scale, w.row_scales);
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
  const __m256i three = _mm256_set1_epi8(3);
  for (int64_t b = 0; b < group.blocks; ++b) {
    each<2>([&](auto h) BITDISTILL_INLINE {
      const __m256i bytes = load32(group.codes + b * 64 + 32 * h);
      uint8_t* half = tile + 32 * h;
      if (layout == Layout::kTwoBitRows16) {
        store32(half, _mm256_and_si256(bytes, three));
        store32(half + 64, _mm256_and_si256(_mm256_srli_epi16(bytes, 2), three));
        store32(half + 128, _mm256_and_si256(_mm256_srli_epi16(bytes, 4), three));
        store32(half + 192, _mm256_and_si256(_mm256_srli_epi16(bytes, 6), three));
      } else {
        const Digits digits = base3_digits(bytes);
        each<5>([&](auto p) BITDISTILL_INLINE { store32(half + 64 * p, digits.d[p]); });
      }
    });
    tile += 64 * block_quads(layout);
  }
}

constexpr int64_t kPairs = 64;

// 16 rows against T tokens: 2 T sums, 2 digits, 1 broadcast and 1 product of 16 registers; at T = 6 a step is 12
// maddubs, 12 additions and 8 loads for 384 products. Zen 4 does not reach the two of each a cycle that its four pipes
// would allow: an addition that waits for its product takes the product's pipe too often, in whatever order they stand
// (7.4 cycles a step instead of 6).
//
// In assembly, because GCC spills or copies sums inside the loop. Four steps a round: the loop then ends after 16
// rounds, which branch prediction learns; an end after 64 costs a wrong guess each time. The sums are widened where
// they are.
#define BITDISTILL_DIGITS(step)                     \
  "vmovdqu 64*" #step "(%[tile]), %%ymm14\n\t"      \
  "vmovdqu 64*" #step "+32(%[tile]), %%ymm15\n\t"
#define BITDISTILL_TOKEN(step, address, low, high)                \
  "vpbroadcastd 4*" #step "+" address ", %%ymm13\n\t"             \
  "vpmaddubsw %%ymm13, %%ymm14, %%ymm12\n\t"                      \
  "vpmaddubsw %%ymm13, %%ymm15, %%ymm13\n\t"                      \
  "vpaddw %%ymm12, %%ymm" #low ", %%ymm" #low "\n\t"              \
  "vpaddw %%ymm13, %%ymm" #high ", %%ymm" #high "\n\t"
#define BITDISTILL_STEP(step)                                     \
  BITDISTILL_DIGITS(step)                                         \
  BITDISTILL_TOKEN(step, "0(%[x])", 0, 1)                         \
  BITDISTILL_TOKEN(step, "0(%[x],%[stride])", 2, 3)               \
  BITDISTILL_TOKEN(step, "0(%[x],%[stride],2)", 4, 5)             \
  BITDISTILL_TOKEN(step, "0(%[x3])", 6, 7)                        \
  BITDISTILL_TOKEN(step, "0(%[x3],%[stride])", 8, 9)              \
  BITDISTILL_TOKEN(step, "0(%[x3],%[stride],2)", 10, 11)
// The first step of a chunk begins the sums: nothing to clear, nothing to add.
#define BITDISTILL_BEGIN(address, low, high)                      \
  "vpbroadcastd " address ", %%ymm13\n\t"                         \
  "vpmaddubsw %%ymm13, %%ymm14, %%ymm" #low "\n\t"                \
  "vpmaddubsw %%ymm13, %%ymm15, %%ymm" #high "\n\t"
#define BITDISTILL_NEXT(steps)                                    \
  "add $64*" #steps ", %[tile]\n\t"                               \
  "add $4*" #steps ", %[x]\n\t"                                   \
  "add $4*" #steps ", %[x3]\n\t"
#define BITDISTILL_WIDEN(i)                                       \
  "vpmaddwd %%ymm15, %%ymm" #i ", %%ymm" #i "\n\t"                \
  "vpaddd 32*" #i "(%[sums]), %%ymm" #i ", %%ymm" #i "\n\t"       \
  "vmovdqa %%ymm" #i ", 32*" #i "(%[sums])\n\t"
#define BITDISTILL_ALL(X) X(0) X(1) X(2) X(3) X(4) X(5) X(6) X(7) X(8) X(9) X(10) X(11)
// Adds the products of `quads` quads (kPairs at most, at least one) of six tokens to sums[16 t + row].
inline void gemm_six(const uint8_t*& tile, const int8_t*& x, int64_t stride, int64_t quads, int32_t* sums) {
  const int8_t* x3 = x + 3 * stride;
  int64_t rounds = (quads - 1) / 4, rest = (quads - 1) % 4;
  asm volatile(
      BITDISTILL_DIGITS(0)
      BITDISTILL_BEGIN("0(%[x])", 0, 1)
      BITDISTILL_BEGIN("0(%[x],%[stride])", 2, 3)
      BITDISTILL_BEGIN("0(%[x],%[stride],2)", 4, 5)
      BITDISTILL_BEGIN("0(%[x3])", 6, 7)
      BITDISTILL_BEGIN("0(%[x3],%[stride])", 8, 9)
      BITDISTILL_BEGIN("0(%[x3],%[stride],2)", 10, 11)
      BITDISTILL_NEXT(1)
      "test %[rest], %[rest]\n\t"
      "jz 2f\n"
      "1:\n\t"
      BITDISTILL_STEP(0)
      BITDISTILL_NEXT(1)
      "dec %[rest]\n\t"
      "jnz 1b\n"
      "2:\n\t"
      "test %[rounds], %[rounds]\n\t"
      "jz 4f\n\t"
      ".p2align 5\n"
      "3:\n\t"
      BITDISTILL_STEP(0) BITDISTILL_STEP(1) BITDISTILL_STEP(2) BITDISTILL_STEP(3)
      BITDISTILL_NEXT(4)
      "dec %[rounds]\n\t"
      "jnz 3b\n"
      "4:\n\t"
      "vpcmpeqw %%ymm15, %%ymm15, %%ymm15\n\t"
      "vpabsw %%ymm15, %%ymm15\n\t"  // ones
      BITDISTILL_ALL(BITDISTILL_WIDEN)
      : [tile] "+r"(tile), [x] "+r"(x), [x3] "+r"(x3), [rounds] "+r"(rounds), [rest] "+r"(rest)
      : [stride] "r"(stride), [sums] "r"(sums)
      : "cc", "memory", "xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "xmm6", "xmm7", "xmm8", "xmm9", "xmm10", "xmm11",
        "xmm12", "xmm13", "xmm14", "xmm15");
}
#undef BITDISTILL_ALL
#undef BITDISTILL_WIDEN
#undef BITDISTILL_NEXT
#undef BITDISTILL_BEGIN
#undef BITDISTILL_STEP
#undef BITDISTILL_TOKEN
#undef BITDISTILL_DIGITS

// Fewer than six tokens: the last ones.
#define BITDISTILL_TOKENS(X) X(0) X(1) X(2) X(3) X(4)
#define BITDISTILL_DECLARE(t) __m256i a##t = _mm256_setzero_si256(), b##t = a##t;
#define BITDISTILL_MULTIPLY(t)                                        \
  if constexpr (t < T) {                                              \
    __m256i four = broadcast4(x + t * stride), product;               \
    asm("vpmaddubsw %[four], %[low], %[product]\n\t"                  \
        "vpaddw %[product], %[a], %[a]\n\t"                           \
        "vpmaddubsw %[four], %[high], %[four]\n\t"                    \
        "vpaddw %[four], %[b], %[b]"                                  \
        : [a] "+x"(a##t), [b] "+x"(b##t), [product] "=&x"(product), [four] "+x"(four) \
        : [low] "x"(low), [high] "x"(high));                          \
  }
#define BITDISTILL_WIDEN(t)                                                                  \
  if constexpr (t < T) {                                                                     \
    store32(sums + 16 * t, _mm256_add_epi32(load32(sums + 16 * t), widen(a##t)));            \
    store32(sums + 16 * t + 8, _mm256_add_epi32(load32(sums + 16 * t + 8), widen(b##t)));    \
  }
template <int T>
inline void gemm_few(const uint8_t*& tile, const int8_t*& x, int64_t stride, int64_t quads, int32_t* sums) {
  BITDISTILL_TOKENS(BITDISTILL_DECLARE)
  for (int64_t q = 0; q < quads; ++q, x += 4, tile += 64) {
    const __m256i low = load32(tile), high = load32(tile + 32);
    BITDISTILL_TOKENS(BITDISTILL_MULTIPLY)
  }
  BITDISTILL_TOKENS(BITDISTILL_WIDEN)
}
#undef BITDISTILL_WIDEN
#undef BITDISTILL_MULTIPLY
#undef BITDISTILL_DECLARE
#undef BITDISTILL_TOKENS

template <int T>
void gemm_tile(const TernaryView& w, const ActivationView& x, const OutputView& out, int64_t t0, int64_t row,
               int64_t row_end, const uint8_t* tile) {
  const int8_t* codes = x.codes + t0 * x.stride;
  alignas(32) int32_t sums[T * 16] = {};
  for (int64_t q = 0; q < w.quads; q += kPairs) {
    const int64_t count = w.quads - q < kPairs ? w.quads - q : kPairs;
    if constexpr (T == 6) gemm_six(tile, codes, x.stride, count, sums);
    else gemm_few<T>(tile, codes, x.stride, count, sums);
  }
  if (out.sums == nullptr && w.row_scales == nullptr && row_end - row >= kGroupRows) {
    for (int t = 0; t < T; ++t) {  // as store_group does
      const __m256i surplus = _mm256_set1_epi32(x.sums[t0 + t]);
      const __m256 product = _mm256_set1_ps(x.scales[t0 + t] * w.scale);
      float* y = out.y + (t0 + t) * out.ld + row;
      for (int h = 0; h < 2; ++h) {
        const __m256i sum = _mm256_sub_epi32(load32(sums + 16 * t + 8 * h), surplus);
        _mm256_storeu_ps(y + 8 * h, _mm256_mul_ps(_mm256_cvtepi32_ps(sum), product));
      }
    }
    return;
  }
  for (int t = 0; t < T; ++t)
    store_group(out, x, sums + 16 * t, t0 + t, row, row_end, 1, w.scale, w.row_scales);
}

// So many groups meet a handful of tokens before the next tokens are read: activations stay in the first-level cache,
// unpacked groups in the second.
constexpr int64_t kTileGroups = 4;

template <int T>
void gemm_groups(const TernaryView& w, const ActivationView& x, const OutputView& out, int64_t t, int64_t row,
                 int64_t row_end, const uint8_t* const* digits) {
  for (; row < row_end; row += kGroupRows, ++digits) gemm_tile<T>(w, x, out, t, row, row_end, *digits);
}

void ternary_gemm(const TernaryView& w, const ActivationView& x, const OutputView& out, int64_t row_begin,
                  int64_t row_end, uint8_t* tile) {
  for (int64_t row = row_begin; row < row_end; row += kTileGroups * kGroupRows) {
    const int64_t end = row + kTileGroups * kGroupRows < row_end ? row + kTileGroups * kGroupRows : row_end;
    const uint8_t* digits[kTileGroups] = {};
    for (int64_t g = 0; row + g * kGroupRows < end; ++g) {
      const Group group = group_at(w, row + g * kGroupRows);
      uint8_t* place = tile + g * tile_bytes(w.quads);
      unpack_group(w.layout, group, place);
      digits[g] = place + 64 * group.lead;
    }
    int64_t t = 0;
    // The last 7 or 8 are split evenly: a tile of one or two tokens spends its time on loads.
    for (; t + 6 <= x.tokens && x.tokens - t != 7 && x.tokens - t != 8; t += 6)
      gemm_groups<6>(w, x, out, t, row, end, digits);
    for (; x.tokens - t > 5; t += 4) gemm_groups<4>(w, x, out, t, row, end, digits);
    switch (x.tokens - t) {
      case 5: gemm_groups<5>(w, x, out, t, row, end, digits); break;
      case 4: gemm_groups<4>(w, x, out, t, row, end, digits); break;
      case 3: gemm_groups<3>(w, x, out, t, row, end, digits); break;
      case 2: gemm_groups<2>(w, x, out, t, row, end, digits); break;
      case 1: gemm_groups<1>(w, x, out, t, row, end, digits); break;
      default: break;
    }
  }
}

// --------------------------------------------------------------------------------------------------- int8

// Both sides widened to int16: vpmaddwd pairs are at most 2 * 128 * 128 = 2^15 and exact in int32.
template <int T>
inline void int8_group(const Int8View& w, const ActivationView& x, const OutputView& out, int64_t t0, int64_t row,
                       int64_t row_end) {
  const int8_t* group = w.codes + row / kGroupRows * w.blocks * kBlockBytes;
  const int8_t* codes = x.codes + t0 * x.stride;
  __m256i sum[T][4] = {};  // part i: rows 4 i .. 4 i + 3, two lanes a row
  for (int64_t b = 0; b < w.blocks; ++b) {
    if (T == 1) _mm_prefetch(reinterpret_cast<const char*>(group + b * 64 + kPrefetchBytes), _MM_HINT_T0);
    __m256i four[T];
    each<T>([&](auto t) BITDISTILL_INLINE {
      int32_t bytes;
      __builtin_memcpy(&bytes, codes + t * x.stride + 4 * b, 4);
      four[t] = _mm256_cvtepi8_epi16(_mm_set1_epi32(bytes));
    });
    each<4>([&](auto i) BITDISTILL_INLINE {
      const __m256i part =
          _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(group + b * 64 + 16 * i)));
      each<T>([&](auto t) BITDISTILL_INLINE {
        sum[t][i] = _mm256_add_epi32(sum[t][i], _mm256_madd_epi16(part, four[t]));
      });
    });
  }
  each<T>([&](auto t) BITDISTILL_INLINE {
    int32_t sums[16];
    each<2>([&](auto i) BITDISTILL_INLINE {
      const __m256i rows = _mm256_hadd_epi32(sum[t][2 * i], sum[t][2 * i + 1]);  // 0 1, 4 5 | 2 3, 6 7
      store32(sums + 8 * i, _mm256_permute4x64_epi64(rows, 0xd8));
    });
    store_group(out, x, sums, t0 + t, row, row_end, 0, 1.0f, w.row_scales);
  });
}

void int8_matmul(const Int8View& w, const ActivationView& x, const OutputView& out, int64_t row_begin,
                 int64_t row_end) {
  for (int64_t row = row_begin; row < row_end; row += kGroupRows) {
    int64_t t = 0;
    for (; t + 2 <= x.tokens; t += 2) int8_group<2>(w, x, out, t, row, row_end);
    if (t < x.tokens) int8_group<1>(w, x, out, t, row, row_end);
  }
}

// -------------------------------------------------------------------------------------------------- 3 bits

template <int T, int H>
inline void int3_halves(const uint8_t* group, int64_t blocks, const int8_t* codes, int64_t stride, int32_t* sums) {
  __m256i total[T][H] = {};
  for (int64_t b0 = 0; b0 < blocks; b0 += Int3Quads::kChunk) {
    const int64_t b1 = b0 + Int3Quads::kChunk < blocks ? b0 + Int3Quads::kChunk : blocks;
    __m256i sum[T][H] = {};
    for (int64_t b = b0; b < b1; ++b) {
      each<3>([&](auto i) BITDISTILL_INLINE {
        if (T == 1)
          _mm_prefetch(reinterpret_cast<const char*>(group + b * 192 + 64 * i + kPrefetchBytes), _MM_HINT_T0);
      });
      each<H>([&](auto h) BITDISTILL_INLINE {
        const Int3Quads quads(group + b * 192 + 32 * h);
        each<8>([&](auto p) BITDISTILL_INLINE {
          const __m256i digit = quads.template get<p>();
          each<T>([&](auto t) BITDISTILL_INLINE {
            const __m256i four = broadcast4(codes + t * stride + 32 * b + 4 * p);
            sum[t][h] = _mm256_add_epi16(sum[t][h], _mm256_maddubs_epi16(digit, four));
          });
        });
      });
    }
    each<T>([&](auto t) BITDISTILL_INLINE {
      each<H>([&](auto h) BITDISTILL_INLINE { total[t][h] = _mm256_add_epi32(total[t][h], widen(sum[t][h])); });
    });
  }
  each<T>([&](auto t) BITDISTILL_INLINE {
    each<H>([&](auto h) BITDISTILL_INLINE { store32(sums + 16 * t + 8 * h, total[t][h]); });
  });
}

template <int T>
inline void int3_group(const Int3View& w, const ActivationView& x, const OutputView& out, int64_t t0, int64_t row,
                       int64_t row_end) {
  const uint8_t* group = w.codes + row / kGroupRows * w.blocks * 3 * kBlockBytes;
  const int8_t* codes = x.codes + t0 * x.stride;
  int32_t sums[T * 16];
  if constexpr (T == 1) {
    int3_halves<T, 2>(group, w.blocks, codes, x.stride, sums);
  } else if constexpr (T > 4) {
    batch_group<Int3Quads, T>(group, w.blocks, codes, x.stride, sums);
  } else {
    int3_halves<T, 1>(group, w.blocks, codes, x.stride, sums);
    int3_halves<T, 1>(group + 32, w.blocks, codes, x.stride, sums + 8);
  }
  for (int t = 0; t < T; ++t) store_group(out, x, sums + 16 * t, t0 + t, row, row_end, 4, 1.0f, w.row_scales);
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

}  // namespace

const KernelTable kAvx2Kernels = {Isa::kAvx2, ternary_gemv, 8, ternary_gemm, kTileGroups, int8_matmul,
                                  int3_matmul, bit_dot_impl, BITDISTILL_FLOAT_KERNELS};

}  // namespace bitdistill
