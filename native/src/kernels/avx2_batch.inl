// Five to eight tokens at once: a batch of sequences in decode. Included by avx2.cpp.
//
// Half a group's digits are made in registers, a quad at a time, and meet all tokens before the next quad: no unpacked
// tile goes through memory, whose stores would cost a quarter of the products' time at eight tokens. T sums, a
// register of packed bytes, a digit, a broadcast. The sums have names and are added to in assembly, because GCC
// otherwise spills or copies them inside the loop.
//
// int16 bounds as at the top of avx2.cpp: 64 pairs of digits 0..2, 16 of 3-bit codes.

struct TwoBitQuads {
  static constexpr int kQuads = 4, kBlocks = 1, kChunk = 16;  // quads of kBlocks; how often those between widenings
  __m256i bytes;
  explicit TwoBitQuads(const uint8_t* block) : bytes(load32(block)) {}
  template <int P>
  __m256i get() const {
    return _mm256_and_si256(P == 0 ? bytes : _mm256_srli_epi16(bytes, 2 * P), _mm256_set1_epi8(3));
  }
};

struct Base3Quads {
  static constexpr int kQuads = 5, kBlocks = 1, kChunk = 12;
  Digits digits;
  explicit Base3Quads(const uint8_t* block) : digits(base3_digits(load32(block))) {}
  template <int P>
  __m256i get() const { return digits.d[P]; }
};

#define BITDISTILL_TOKENS(X) X(0) X(1) X(2) X(3) X(4) X(5) X(6) X(7)
#define BITDISTILL_DECLARE(t) __m256i a##t = _mm256_setzero_si256();
#define BITDISTILL_MULTIPLY(t)                                                  \
  if constexpr (t < T) {                                                        \
    __m256i four = broadcast4(x + t * stride);                                  \
    asm("vpmaddubsw %[four], %[digit], %[four]\n\tvpaddw %[four], %[a], %[a]"   \
        : [a] "+x"(a##t), [four] "+x"(four)                                     \
        : [digit] "x"(digit));                                                  \
  }
#define BITDISTILL_WIDEN(t)                                                                       \
  if constexpr (t < T)                                                                            \
    store32(sums + 16 * t, _mm256_add_epi32(load32(sums + 16 * t), widen(a##t)));
// Adds to sums[16 t + row] for the eight rows of a half.
template <class Quads, int T, bool prefetch>
void batch_half(const uint8_t* half, int64_t blocks, const int8_t* codes, int64_t stride, int32_t* sums) {
  for (int64_t b0 = 0; b0 < blocks; b0 += Quads::kChunk) {
    const int64_t b1 = b0 + Quads::kChunk < blocks ? b0 + Quads::kChunk : blocks;
    BITDISTILL_TOKENS(BITDISTILL_DECLARE)
    for (int64_t b = b0; b < b1; ++b) {
      const uint8_t* block = half + b * Quads::kBlocks * kBlockBytes;
      each<Quads::kBlocks>([&](auto i) BITDISTILL_INLINE {
        if constexpr (prefetch) _mm_prefetch(reinterpret_cast<const char*>(block + 64 * i + kPrefetchBytes), _MM_HINT_T0);
      });
      const Quads quads(block);
      each<Quads::kQuads>([&](auto p) BITDISTILL_INLINE {
        const __m256i digit = quads.template get<p>();
        const int8_t* x = codes + 4 * (Quads::kQuads * b + p);
        BITDISTILL_TOKENS(BITDISTILL_MULTIPLY)
      });
    }
    BITDISTILL_TOKENS(BITDISTILL_WIDEN)
  }
}
#undef BITDISTILL_WIDEN
#undef BITDISTILL_MULTIPLY
#undef BITDISTILL_DECLARE
#undef BITDISTILL_TOKENS

// A group of sixteen rows: sums[16 t + row].
template <class Quads, int T>
inline void batch_group(const uint8_t* group, int64_t blocks, const int8_t* codes, int64_t stride, int32_t* sums) {
  for (int i = 0; i < 2 * T; ++i) store32(sums + 8 * i, _mm256_setzero_si256());
  batch_half<Quads, T, true>(group, blocks, codes, stride, sums);
  batch_half<Quads, T, false>(group + 32, blocks, codes, stride, sums + 8);  // from the cache
}
