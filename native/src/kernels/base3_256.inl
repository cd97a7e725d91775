// Base-3 digits in 256-bit registers, for AVX2 and AVX-VNNI. Included inside their anonymous namespaces.

struct Digits {
  __m256i d[5];
};
// A digit p is what subtracting 3^p (as often as it goes, at most twice) takes away: v - 3^p wraps to a larger byte
// exactly when v < 3^p, so a minimum subtracts where it can.
inline __m256i reduce(__m256i v, int power) {
  const __m256i k = _mm256_set1_epi8(static_cast<char>(power));
  v = _mm256_min_epu8(v, _mm256_sub_epi8(v, k));
  return _mm256_min_epu8(v, _mm256_sub_epi8(v, k));
}
inline Digits base3_digits(__m256i bytes) {
  // 3, 6, 9, 18, 27, 54 by their low four bits (3, 6, 9, 2, 11, 6): 6 is twice 3 and twice 27 alike.
  const __m256i digit = _mm256_setr_epi8(0, 0, 2, 1, 0, 0, 2, 0, 0, 1, 0, 1, 0, 0, 0, 0,  //
                                         0, 0, 2, 1, 0, 0, 2, 0, 0, 1, 0, 1, 0, 0, 0, 0);
  const __m256i r4 = reduce(bytes, 81), r3 = reduce(r4, 27), r2 = reduce(r3, 9), r1 = reduce(r2, 3);
  return {{r1, _mm256_shuffle_epi8(digit, _mm256_sub_epi8(r2, r1)),
           _mm256_shuffle_epi8(digit, _mm256_sub_epi8(r3, r2)),
           _mm256_shuffle_epi8(digit, _mm256_sub_epi8(r4, r3)),
           // 81 and 162 are 1 and 2 in their low two bits
           _mm256_and_si256(_mm256_sub_epi8(bytes, r4), _mm256_set1_epi8(3))}};
}
