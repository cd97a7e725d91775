// 3-bit codes in 256-bit registers. Included by avx2.cpp and avxvnni.cpp.

// Half of three blocks (Int3Matrix): get<p>() is d_p of eight rows.
struct Int3Quads {
  static constexpr int kQuads = 8, kBlocks = 3, kChunk = 2;
  __m256i a, b, c;
  explicit Int3Quads(const uint8_t* half) : a(load32(half)), b(load32(half + 64)), c(load32(half + 128)) {}
  template <int P>
  __m256i get() const {
    const __m256i seven = _mm256_set1_epi8(7), three = _mm256_set1_epi8(3), four = _mm256_set1_epi8(4);
    if constexpr (P >= 6) {
      return _mm256_or_si256(_mm256_and_si256(_mm256_srli_epi16(P == 6 ? a : b, 6), three),
                             _mm256_and_si256(_mm256_srli_epi16(c, P - 2), four));
    } else {
      const __m256i bytes = P < 2 ? a : P < 4 ? b : c;
      return _mm256_and_si256(P % 2 == 0 ? bytes : _mm256_srli_epi16(bytes, 3), seven);
    }
  }
};
