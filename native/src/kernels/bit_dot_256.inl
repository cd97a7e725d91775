// Included by avx2.cpp, avxvnni.cpp and avx512vnni.cpp: the last two have no need of more, few rows come here.

int32_t bit_dot_impl(const uint8_t* bits, int64_t blocks, const int8_t* x) {
  constexpr int64_t kBlocks = 8;  // 64 pairs of up to 256: int16 holds 127
  const __m256i one = _mm256_set1_epi8(1);
  __m256i total = _mm256_setzero_si256();
  for (int64_t begin = 0; begin < blocks; begin += kBlocks) {
    const int64_t end = begin + kBlocks < blocks ? begin + kBlocks : blocks;
    __m256i sum[2] = {};
    for (int64_t b = begin; b < end; ++b) {
      const __m256i bytes = load32(bits + 32 * b);
      each<8>([&](auto p) BITDISTILL_INLINE {
        const __m256i set = _mm256_and_si256(_mm256_srli_epi16(bytes, p), one);
        sum[p % 2] = _mm256_add_epi16(sum[p % 2], _mm256_maddubs_epi16(set, load32(x + 256 * b + 32 * p)));
      });
    }
    const __m256i pairs = _mm256_add_epi16(sum[0], sum[1]);
    total = _mm256_add_epi32(total, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
  }
  __m128i lanes = _mm_add_epi32(_mm256_castsi256_si128(total), _mm256_extracti128_si256(total, 1));
  lanes = _mm_add_epi32(lanes, _mm_shuffle_epi32(lanes, 0x4e));
  return _mm_cvtsi128_si32(_mm_add_epi32(lanes, _mm_shuffle_epi32(lanes, 0xb1)));
}
