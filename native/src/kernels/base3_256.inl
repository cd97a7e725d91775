// Base-3 digits in 256-bit registers, for AVX2 and AVX-VNNI. Included inside their anonymous namespaces.

struct Digits {
  __m256i d[5];
};
inline __m256i both_lanes(__m128i table) { return _mm256_broadcastsi128_si256(table); }
// v = 27 a + r, a = 3 d4 + d3, r = 9 d2 + 3 d1 + d0; 18 operations for 160 digits.
//   The high four bits of v give 27 a or 27 (a - 1): what is left is below 42, and one conditional subtraction makes it
//   r. (v - k wraps to a larger byte exactly when v < k, so a minimum subtracts where it can.)
//   27 a has other low four bits for every a = 0..8: 0, 11, 6, 1, 12, 7, 2, 13, 8.
//   r mod 9 takes two more conditional subtractions; what they took away, 0, 9 or 18, has low bits 0, 9, 2.
inline Digits base3_digits(__m256i v) {
  const __m256i low4 = _mm256_set1_epi8(0x0f);
  const __m256i k27a = both_lanes(_mm_setr_epi8(0, 0, 27, 27, 54, 54, 81, 108, 108, static_cast<char>(135),
                                                static_cast<char>(135), static_cast<char>(162), static_cast<char>(189),
                                                static_cast<char>(189), static_cast<char>(216),
                                                static_cast<char>(216)));
  const __m256i units = both_lanes(_mm_setr_epi8(0, 1, 2, 0, 1, 2, 0, 1, 2, 1, 0, 0, 0, 0, 0, 0));  // [9]: d2 of 9
  const __m256i threes = both_lanes(_mm_setr_epi8(0, 0, 0, 1, 1, 1, 2, 2, 2, 0, 0, 0, 0, 0, 0, 0));
  const __m256i third = both_lanes(_mm_setr_epi8(0, 0, 0, 0, 0, 0, 2, 2, 2, 0, 0, 1, 1, 1, 0, 0));
  const __m256i fourth = both_lanes(_mm_setr_epi8(0, 1, 2, 0, 0, 0, 0, 1, 2, 0, 0, 0, 1, 2, 0, 0));
  const __m256i high = _mm256_and_si256(_mm256_srli_epi16(v, 4), low4);
  const __m256i rough = _mm256_sub_epi8(v, _mm256_shuffle_epi8(k27a, high));
  const __m256i r = _mm256_min_epu8(rough, _mm256_sub_epi8(rough, _mm256_set1_epi8(27)));
  const __m256i a = _mm256_and_si256(_mm256_sub_epi8(v, r), low4);
  const __m256i k9 = _mm256_set1_epi8(9);
  __m256i rest = _mm256_min_epu8(r, _mm256_sub_epi8(r, k9));
  rest = _mm256_min_epu8(rest, _mm256_sub_epi8(rest, k9));
  return {{_mm256_shuffle_epi8(units, rest), _mm256_shuffle_epi8(threes, rest),
           _mm256_shuffle_epi8(units, _mm256_sub_epi8(r, rest)), _mm256_shuffle_epi8(third, a),
           _mm256_shuffle_epi8(fourth, a)}};
}
