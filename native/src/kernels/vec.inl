// Sixteen float lanes. GNU vectors of 64 bytes, except on AVX2: GCC keeps vectors wider than a register in memory, so
// there they are two registers. Each operation gives the same bits either way. Included by float.inl.

typedef uint16_t HVec __attribute__((vector_size(32)));
typedef int8_t BVec __attribute__((vector_size(16)));
constexpr int64_t kLanes = 16;

#if defined(__AVX2__)
// Eight lanes of four vectors each to their sums, in the order of sum_lanes.
inline __m128 sum_eights(__m256 a, __m256 b, __m256 c, __m256 d) {
  const __m256 ab = _mm256_add_ps(_mm256_permute2f128_ps(a, b, 0x20), _mm256_permute2f128_ps(a, b, 0x31));
  const __m256 cd = _mm256_add_ps(_mm256_permute2f128_ps(c, d, 0x20), _mm256_permute2f128_ps(c, d, 0x31));
  const __m256 two = _mm256_add_ps(_mm256_shuffle_ps(ab, cd, 0x44), _mm256_shuffle_ps(ab, cd, 0xee));
  const __m256 one = _mm256_add_ps(_mm256_permute_ps(two, 0x88), _mm256_permute_ps(two, 0xdd));  // a c . . | b d . .
  return _mm_unpacklo_ps(_mm256_castps256_ps128(one), _mm256_extractf128_ps(one, 1));
}
#endif

#if defined(__AVX2__) && !defined(__AVX512F__)

struct Vec {
  __m256 lo, hi;
};
struct IVec {
  __m256i lo, hi;
};
inline Vec splat(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
#define BITDISTILL_VEC_OPERATOR(op, function)                                                            \
  inline Vec operator op(Vec a, Vec b) { return {function(a.lo, b.lo), function(a.hi, b.hi)}; }          \
  inline Vec operator op(Vec a, float b) { return a op splat(b); }
BITDISTILL_VEC_OPERATOR(+, _mm256_add_ps)
BITDISTILL_VEC_OPERATOR(-, _mm256_sub_ps)
BITDISTILL_VEC_OPERATOR(*, _mm256_mul_ps)
BITDISTILL_VEC_OPERATOR(/, _mm256_div_ps)
#undef BITDISTILL_VEC_OPERATOR
inline Vec operator-(Vec a) {
  const __m256 sign = _mm256_set1_ps(-0.0f);
  return {_mm256_xor_ps(a.lo, sign), _mm256_xor_ps(a.hi, sign)};
}
inline Vec& operator+=(Vec& a, Vec b) { return a = a + b; }
inline IVec& operator+=(IVec& a, IVec b) {
  return a = {_mm256_add_epi32(a.lo, b.lo), _mm256_add_epi32(a.hi, b.hi)};
}

inline Vec load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
inline void store(float* p, Vec v) {
  _mm256_storeu_ps(p, v.lo);
  _mm256_storeu_ps(p + 8, v.hi);
}
// The second operand where neither is larger, as a > b ? a : b.
inline Vec vmax(Vec a, Vec b) { return {_mm256_max_ps(a.lo, b.lo), _mm256_max_ps(a.hi, b.hi)}; }
inline Vec vmin(Vec a, Vec b) { return {_mm256_min_ps(a.lo, b.lo), _mm256_min_ps(a.hi, b.hi)}; }
inline Vec vabs(Vec v) {
  const __m256 sign = _mm256_set1_ps(-0.0f);
  return {_mm256_andnot_ps(sign, v.lo), _mm256_andnot_ps(sign, v.hi)};
}
inline IVec to_int(Vec v) { return {_mm256_cvttps_epi32(v.lo), _mm256_cvttps_epi32(v.hi)}; }
inline BVec to_bytes(IVec v) {  // of values from -128 to 127
  const __m256i words = _mm256_permute4x64_epi64(_mm256_packs_epi32(v.lo, v.hi), 0xd8);
  const __m128i bytes = _mm_packs_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
  BVec b;
  __builtin_memcpy(&b, &bytes, sizeof b);
  return b;
}
inline Vec power_of_two(Vec n) {  // of whole numbers from -126 to 127
  const IVec power = to_int(n);
  const __m256i bias = _mm256_set1_epi32(127);
  return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(power.lo, bias), 23)),
          _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(power.hi, bias), 23))};
}
// bf16 is the high half of a float32.
inline Vec widen_bf16(HVec h) {
  __m128i bits[2];
  __builtin_memcpy(bits, &h, sizeof bits);
  return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits[0]), 16)),
          _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits[1]), 16))};
}
inline Vec widen_f16(HVec h) {
  __m128i bits[2];
  __builtin_memcpy(bits, &h, sizeof bits);
  return {_mm256_cvtph_ps(bits[0]), _mm256_cvtph_ps(bits[1])};
}
inline Vec widen_i8(BVec b) {
  __m128i bits;
  __builtin_memcpy(&bits, &b, sizeof bits);
  return {_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(bits)),
          _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_srli_si128(bits, 8)))};
}
// Lane i + 8 is added to lane i, then i + 4, i + 2, i + 1.
inline float sum_lanes(Vec v) {
  const __m256 eight = _mm256_add_ps(v.lo, v.hi);
  const __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}
// sum_lanes of each.
inline void sum_lanes4(Vec a, Vec b, Vec c, Vec d, float* sums) {
  _mm_storeu_ps(sums, sum_eights(_mm256_add_ps(a.lo, a.hi), _mm256_add_ps(b.lo, b.hi), _mm256_add_ps(c.lo, c.hi),
                                 _mm256_add_ps(d.lo, d.hi)));
}
inline int32_t sum_ints(IVec v) {
  int32_t a[8], total = 0;
  const __m256i eight = _mm256_add_epi32(v.lo, v.hi);
  __builtin_memcpy(a, &eight, sizeof a);
  for (int32_t i : a) total += i;
  return total;
}

#else

typedef float Vec __attribute__((vector_size(64)));
typedef int32_t IVec __attribute__((vector_size(64)));
typedef uint32_t UVec __attribute__((vector_size(64)));

inline Vec splat(float x) { return Vec{} + x; }
inline Vec load(const float* p) {
  Vec v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}
inline void store(float* p, Vec v) { __builtin_memcpy(p, &v, sizeof v); }
inline Vec vmax(Vec a, Vec b) { return a > b ? a : b; }
inline Vec vmin(Vec a, Vec b) { return a < b ? a : b; }
inline Vec vabs(Vec v) {
  IVec bits;
  __builtin_memcpy(&bits, &v, sizeof bits);
  bits &= 0x7fffffff;
  __builtin_memcpy(&v, &bits, sizeof v);
  return v;
}
inline IVec to_int(Vec v) { return __builtin_convertvector(v, IVec); }
inline BVec to_bytes(IVec v) { return __builtin_convertvector(v, BVec); }
inline Vec power_of_two(Vec n) {
  const IVec power = (to_int(n) + 127) << 23;
  Vec v;
  __builtin_memcpy(&v, &power, sizeof v);
  return v;
}
inline Vec widen_bf16(HVec h) {
  const UVec bits = __builtin_convertvector(h, UVec) << 16;
  Vec v;
  __builtin_memcpy(&v, &bits, sizeof v);
  return v;
}
inline Vec widen_i8(BVec b) { return __builtin_convertvector(__builtin_convertvector(b, IVec), Vec); }
#if defined(__AVX512F__)
inline Vec widen_f16(HVec h) {
  __m256i bits;
  __builtin_memcpy(&bits, &h, sizeof bits);
  const __m512 wide = _mm512_cvtph_ps(bits);
  Vec v;
  __builtin_memcpy(&v, &wide, sizeof v);
  return v;
}
#else
// Exponent and mantissa moved into place, then scaled by 2^112 (exact, subnormals too); Inf and NaN apart.
inline Vec widen_f16(HVec h) {
  const UVec wide = __builtin_convertvector(h, UVec);
  const UVec magnitude = (wide & 0x7fff) << 13;
  Vec scaled;
  __builtin_memcpy(&scaled, &magnitude, sizeof scaled);
  scaled = scaled * splat(5.192296858534828e33f);  // 2^112
  UVec bits;
  __builtin_memcpy(&bits, &scaled, sizeof bits);
  const UVec special = (UVec)((wide & 0x7c00) == 0x7c00);
  bits = (special & (magnitude | 0x7f800000)) | (~special & bits);
  bits |= (wide & 0x8000) << 16;
  Vec v;
  __builtin_memcpy(&v, &bits, sizeof v);
  return v;
}
#endif
inline float sum_lanes(Vec v) {
  typedef float Half1 __attribute__((vector_size(32)));
  typedef float Half2 __attribute__((vector_size(16)));
  Half1 eight[2];
  __builtin_memcpy(eight, &v, sizeof v);
  eight[0] += eight[1];
  Half2 four[2];
  __builtin_memcpy(four, eight, sizeof four);
  four[0] += four[1];
  return (four[0][0] + four[0][2]) + (four[0][1] + four[0][3]);
}
#if defined(__AVX512F__)
inline __m256 sum_halves(Vec v) {
  const __m512 all = (__m512)v;
  return _mm256_add_ps(_mm512_castps512_ps256(all), _mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd(all), 1)));
}
inline void sum_lanes4(Vec v0, Vec v1, Vec v2, Vec v3, float* sums) {
  _mm_storeu_ps(sums, sum_eights(sum_halves(v0), sum_halves(v1), sum_halves(v2), sum_halves(v3)));
}
#else
inline void sum_lanes4(Vec a, Vec b, Vec c, Vec d, float* sums) {
  sums[0] = sum_lanes(a);
  sums[1] = sum_lanes(b);
  sums[2] = sum_lanes(c);
  sums[3] = sum_lanes(d);
}
#endif
inline int32_t sum_ints(IVec v) {
  int32_t total = 0;
  for (int i = 0; i < kLanes; ++i) total += v[i];
  return total;
}

#endif

inline Vec load(const float* p, int64_t n) {  // n < 16 lanes, zeros after them
  float a[kLanes] = {};
  __builtin_memcpy(a, p, static_cast<size_t>(n) * sizeof(float));
  return load(a);
}
inline void store(float* p, Vec v, int64_t n) {
  float a[kLanes];
  store(a, v);
  __builtin_memcpy(p, a, static_cast<size_t>(n) * sizeof(float));
}
inline float max_lanes(Vec v) {
  float a[kLanes];
  store(a, v);
  float best = a[0];
  for (int i = 1; i < kLanes; ++i) best = a[i] > best ? a[i] : best;
  return best;
}
