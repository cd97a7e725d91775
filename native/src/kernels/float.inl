// Float kernels, written once in vectors of sixteen lanes and lowered by the compiler to each instruction set.
// Included by every instruction set's file, inside its anonymous namespace. No contraction (-ffp-contract=off), one
// order of summation: the same bits on every instruction set.

#include "vec.inl"

inline uint16_t narrow_f16(float x) {  // round to nearest even
  uint32_t bits;
  __builtin_memcpy(&bits, &x, 4);
  const uint32_t sign = (bits >> 16) & 0x8000;
  bits &= 0x7fffffff;
  if (bits > 0x7f800000) return static_cast<uint16_t>(sign | 0x7e00);
  if (bits >= 0x477ff000) return static_cast<uint16_t>(sign | 0x7c00);  // rounds to 65536 and above
  if (bits < 0x38800000) {  // below 2^-14: a multiple of 2^-24, rounded by the adder
    float magnitude;
    __builtin_memcpy(&magnitude, &bits, 4);
    magnitude += 0.5f;
    uint32_t rounded;
    __builtin_memcpy(&rounded, &magnitude, 4);
    return static_cast<uint16_t>(sign | (rounded - 0x3f000000));
  }
  return static_cast<uint16_t>(sign | ((bits + 0xc8000fff + ((bits >> 13) & 1)) >> 13));
}

struct F32 {
  using Element = float;
  static Vec at(const float* p) { return load(p); }
  static Vec at(const float* p, int64_t n) { return load(p, n); }
};
template <Vec widen(HVec)>
struct Half {
  using Element = uint16_t;
  static Vec at(const uint16_t* p) {
    HVec h;
    __builtin_memcpy(&h, p, sizeof h);
    return widen(h);
  }
  static Vec at(const uint16_t* p, int64_t n) {
    HVec h = {};
    __builtin_memcpy(&h, p, static_cast<size_t>(n) * 2);
    return widen(h);
  }
};
using BF16 = Half<widen_bf16>;
using F16 = Half<widen_f16>;
struct I8 {
  using Element = int8_t;
  static Vec at(const int8_t* p) {
    BVec b;
    __builtin_memcpy(&b, p, sizeof b);
    return widen_i8(b);
  }
  static Vec at(const int8_t* p, int64_t n) {
    BVec b = {};
    __builtin_memcpy(&b, p, static_cast<size_t>(n));
    return widen_i8(b);
  }
};

// Half to even for |v| <= 2^22: the adder rounds.
inline Vec round_even(Vec v) { return (v + 12582912.0f) - 12582912.0f; }

// exp by 2^n * p(r), r = x - n ln 2 in two parts, |r| <= 0.35; relative error below 3e-7; below -87.3 it stays at
// exp(-87.3) = 1.2e-38.
inline Vec vexp(Vec x) {
  x = vmin(vmax(x, splat(-87.3f)), splat(88.3f));
  const Vec n = round_even(x * 1.44269504088896341f);
  Vec r = x - n * 0.693359375f;
  r = r - n * -2.12194440e-4f;
  Vec p = splat(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
  return p * power_of_two(n);
}

int32_t quantize_row_impl(const float* x, int64_t n, int8_t* codes, float* scale) {
  const int64_t whole = n / kLanes * kLanes, rest = n - whole;
  Vec best = splat(1e-5f);
  for (int64_t i = 0; i < whole; i += kLanes) best = vmax(vabs(load(x + i)), best);
  if (rest) best = vmax(vabs(load(x + whole, rest)), best);
  const float amax = max_lanes(best);
  *scale = amax / 127.0f;
  IVec sum = {};
  for (int64_t i = 0; i < n; i += kLanes) {
    const int64_t lanes = n - i < kLanes ? n - i : kLanes;
    const Vec v = lanes == kLanes ? load(x + i) : load(x + i, lanes);
    // Clamped before rounding: the same, as the limits are integers (they are met only if 127 x overflows).
    const Vec q = round_even(vmin(vmax(v * 127.0f / amax, splat(-128.0f)), splat(127.0f)));
    const IVec integers = to_int(q);
    sum += integers;
    const BVec bytes = to_bytes(integers);
    __builtin_memcpy(codes + i, &bytes, static_cast<size_t>(lanes));
  }
  return sum_ints(sum);
}

void rmsnorm_impl(const float* x, const float* gain, int64_t n, float eps, float* y) {
  const int64_t whole = n / kLanes * kLanes, rest = n - whole;
  Vec squares = {};
  for (int64_t i = 0; i < whole; i += kLanes) squares += load(x + i) * load(x + i);
  if (rest) squares += load(x + whole, rest) * load(x + whole, rest);
  const float mean = sum_lanes(squares) / static_cast<float>(n);
  const float rms = 1.0f / __builtin_sqrtf(mean + eps);
  for (int64_t i = 0; i < whole; i += kLanes) store(y + i, load(x + i) * rms * load(gain + i));
  if (rest) store(y + whole, load(x + whole, rest) * rms * load(gain + whole, rest), rest);
}

template <class B>
inline float dot_of(const float* a, const typename B::Element* b, int64_t n) {
  const int64_t whole = n / kLanes * kLanes, rest = n - whole;
  Vec sum = {};
  for (int64_t i = 0; i < whole; i += kLanes) sum += load(a + i) * B::at(b + i);
  if (rest) sum += load(a + whole, rest) * B::at(b + whole, rest);
  return sum_lanes(sum);
}
float dot_impl(const float* a, const float* b, int64_t n) { return dot_of<F32>(a, b, n); }
float dot_f16_impl(const float* a, const uint16_t* b, int64_t n) { return dot_of<F16>(a, b, n); }

template <class X>
inline void axpy_of(float alpha, const typename X::Element* x, float* y, int64_t n) {
  const int64_t whole = n / kLanes * kLanes, rest = n - whole;
  for (int64_t i = 0; i < whole; i += kLanes) store(y + i, load(y + i) + X::at(x + i) * alpha);
  if (rest) store(y + whole, load(y + whole, rest) + X::at(x + whole, rest) * alpha, rest);
}
void axpy_impl(float alpha, const float* x, float* y, int64_t n) { axpy_of<F32>(alpha, x, y, n); }
void axpy_f16_impl(float alpha, const uint16_t* x, float* y, int64_t n) { axpy_of<F16>(alpha, x, y, n); }
void axpy_i8_impl(float alpha, const int8_t* x, float* y, int64_t n) { axpy_of<I8>(alpha, x, y, n); }

void to_f16_impl(const float* x, uint16_t* y, int64_t n) {
  int64_t i = 0;
#if defined(__F16C__)
  for (; i + 8 <= n; i += 8) {
    const __m128i h = _mm256_cvtps_ph(_mm256_loadu_ps(x + i), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(y + i), h);
  }
#endif
  for (; i < n; ++i) y[i] = narrow_f16(x[i]);
}

inline Vec silu(Vec x) { return x / (vexp(-x) + 1.0f); }
inline Vec gelu_tanh(Vec x) {  // x * sigmoid(2 u), u = sqrt(2 / pi) (x + 0.044715 x^3)
  const Vec u = (x + x * x * x * 0.044715f) * 0.7978845608028654f;
  return x / (vexp(u * -2.0f) + 1.0f);
}
inline Vec relu2(Vec x) {
  const Vec positive = vmax(x, splat(0.0f));
  return positive * positive;
}
template <Vec activation(Vec)>
inline void activation_mul(const float* gate, const float* up, float* y, int64_t n) {
  const int64_t whole = n / kLanes * kLanes, rest = n - whole;
  for (int64_t i = 0; i < whole; i += kLanes) store(y + i, activation(load(gate + i)) * load(up + i));
  if (rest) store(y + whole, activation(load(gate + whole, rest)) * load(up + whole, rest), rest);
}
void silu_mul_impl(const float* gate, const float* up, float* y, int64_t n) { activation_mul<silu>(gate, up, y, n); }
void gelu_tanh_mul_impl(const float* gate, const float* up, float* y, int64_t n) {
  activation_mul<gelu_tanh>(gate, up, y, n);
}
void relu2_mul_impl(const float* gate, const float* up, float* y, int64_t n) { activation_mul<relu2>(gate, up, y, n); }

float exp_minus_max_impl(float* x, int64_t n) {
  if (n == 0) return 0.0f;
  float best = x[0];
  const int64_t whole = n / kLanes * kLanes, rest = n - whole;
  Vec tops = splat(best);
  for (int64_t i = 0; i < whole; i += kLanes) tops = vmax(load(x + i), tops);
  best = max_lanes(tops);
  for (int64_t i = whole; i < n; ++i) best = x[i] > best ? x[i] : best;
  Vec sum = {};
  for (int64_t i = 0; i < whole; i += kLanes) {
    const Vec e = vexp(load(x + i) - best);
    store(x + i, e);
    sum += e;
  }
  float total = sum_lanes(sum);
  if (rest) {
    store(x + whole, vexp(load(x + whole, rest) - best), rest);
    for (int64_t i = whole; i < n; ++i) total += x[i];
  }
  return total;
}

#include "screen_row.inl"

// Rows and tokens of a tile whose sums stay in registers; columns (in vectors) of four mixed rows likewise.
#if defined(__AVX2__) && !defined(__AVX512F__)
constexpr int kFloatTileRows = 2, kFloatTileTokens = 2, kMixColumns = 1;
#else
constexpr int kFloatTileRows = 4, kFloatTileTokens = 4, kMixColumns = 2;
#endif

// Rows [row_begin, row_end) as float32.
template <class W>
void widen_of(const FloatView& m, int64_t row_begin, int64_t row_end, float* y) {
  const auto* w = static_cast<const typename W::Element*>(m.data) + row_begin * m.cols;
  const int64_t n = (row_end - row_begin) * m.cols, whole = n / kLanes * kLanes;
  for (int64_t i = 0; i < whole; i += kLanes) store(y + i, W::at(w + i));
  if (n > whole) store(y + whole, W::at(w + whole, n - whole), n - whole);
}

void widen_impl(const FloatView& m, int64_t row_begin, int64_t row_end, float* y) {
  switch (m.type) {
    case FloatType::kF32: return widen_of<F32>(m, row_begin, row_end, y);
    case FloatType::kBF16: return widen_of<BF16>(m, row_begin, row_end, y);
    case FloatType::kF16: return widen_of<F16>(m, row_begin, row_end, y);
    case FloatType::kI8: return widen_of<I8>(m, row_begin, row_end, y);
  }
}

// R rows against T tokens; each (row, token) has one accumulator, so a tile changes no bit.
template <class W, int R, int T>
inline void float_tile(const typename W::Element* w, int64_t cols, const float* x, int64_t ldx, float* y,
                       int64_t ldy) {
  Vec sum[R][T] = {};
  const int64_t whole = cols / kLanes * kLanes, rest = cols - whole;
  for (int64_t i = 0; i < whole; i += kLanes) {
    Vec tokens[T];
    each<T>([&](auto t) BITDISTILL_INLINE { tokens[t] = load(x + t * ldx + i); });
    each<R>([&](auto r) BITDISTILL_INLINE {
      const Vec row = W::at(w + r * cols + i);
      each<T>([&](auto t) BITDISTILL_INLINE { sum[r][t] += row * tokens[t]; });
    });
  }
  if (rest)
    each<R>([&](auto r) BITDISTILL_INLINE {
      const Vec row = W::at(w + r * cols + whole, rest);
      each<T>([&](auto t) BITDISTILL_INLINE { sum[r][t] += row * load(x + t * ldx + whole, rest); });
    });
  if constexpr (R % 4 == 0) {
    each<T>([&](auto t) BITDISTILL_INLINE {
      each<R / 4>([&](auto r) BITDISTILL_INLINE {
        sum_lanes4(sum[4 * r][t], sum[4 * r + 1][t], sum[4 * r + 2][t], sum[4 * r + 3][t], y + t * ldy + 4 * r);
      });
    });
  } else if constexpr (R == 2 && T % 2 == 0) {
    each<T / 2>([&](auto p) BITDISTILL_INLINE {
      constexpr int t = 2 * decltype(p)::value;
      float sums[4];
      sum_lanes4(sum[0][t], sum[1][t], sum[0][t + 1], sum[1][t + 1], sums);
      __builtin_memcpy(y + t * ldy, sums, 8);
      __builtin_memcpy(y + (t + 1) * ldy, sums + 2, 8);
    });
  } else {
    each<R>([&](auto r) BITDISTILL_INLINE {
      each<T>([&](auto t) BITDISTILL_INLINE { y[t * ldy + r] = sum_lanes(sum[r][t]); });
    });
  }
}

#if defined(__AVX2__) && !defined(__AVX512F__)
// Four float32 rows against two tokens, lanes 0..7 first, then 8..15: eight sums in registers instead of sixteen.
inline void float_tile_4x2(const float* w, int64_t cols, const float* x, int64_t ldx, float* y, int64_t ldy) {
  __m256 half[2][4][2];
  each<2>([&](auto h) BITDISTILL_INLINE {
    __m256 sum[4][2] = {};
    for (int64_t i = 8 * h; i < cols; i += kLanes) {
      const __m256 a = _mm256_loadu_ps(x + i), b = _mm256_loadu_ps(x + ldx + i);
      each<4>([&](auto r) BITDISTILL_INLINE {
        __m256 row = _mm256_loadu_ps(w + r * cols + i);
        asm("" : "+x"(row));  // loaded once: GCC would load it for each token, and loads would be the limit
        sum[r][0] = _mm256_add_ps(sum[r][0], _mm256_mul_ps(row, a));
        sum[r][1] = _mm256_add_ps(sum[r][1], _mm256_mul_ps(row, b));
      });
    }
    each<4>([&](auto r) BITDISTILL_INLINE {
      half[h][r][0] = sum[r][0];
      half[h][r][1] = sum[r][1];
    });
  });
  each<2>([&](auto t) BITDISTILL_INLINE {
    __m256 sum[4];
    each<4>([&](auto r) BITDISTILL_INLINE { sum[r] = _mm256_add_ps(half[0][r][t], half[1][r][t]); });
    _mm_storeu_ps(y + t * ldy, sum_eights(sum[0], sum[1], sum[2], sum[3]));
  });
}
#endif

template <class W, int R>
inline void float_rows(const typename W::Element* w, int64_t cols, const float* x, int64_t tokens, int64_t ldx,
                       float* y, int64_t ldy) {
  int64_t t = 0;
  for (; t + kFloatTileTokens <= tokens; t += kFloatTileTokens)
    float_tile<W, R, kFloatTileTokens>(w, cols, x + t * ldx, ldx, y + t * ldy, ldy);
  for (; t < tokens; ++t) float_tile<W, R, 1>(w, cols, x + t * ldx, ldx, y + t * ldy, ldy);
}

template <class W>
void float_matmul_of(const FloatView& matrix, const float* x, int64_t tokens, int64_t ldx, float* y, int64_t ldy,
                     int64_t row_begin, int64_t row_end) {
  const auto* w = static_cast<const typename W::Element*>(matrix.data);
  int64_t row = row_begin;
#if defined(__AVX2__) && !defined(__AVX512F__)
  if constexpr (sizeof(typename W::Element) == 4) {
    const int64_t end = matrix.cols % kLanes == 0 ? row_end - 3 : row, even = tokens / 2 * 2;
    for (; row < end; row += 4) {
      const float* rows = reinterpret_cast<const float*>(w) + row * matrix.cols;
      for (int64_t t = 0; t < even; t += 2)
        float_tile_4x2(rows, matrix.cols, x + t * ldx, ldx, y + t * ldy + row, ldy);
      if (even < tokens)
        float_tile<W, 4, 1>(w + row * matrix.cols, matrix.cols, x + even * ldx, ldx, y + even * ldy + row, ldy);
    }
  }
#endif
  if (tokens == 1)  // one token leaves room for more rows
    for (; row + 4 <= row_end; row += 4)
      float_rows<W, 4>(w + row * matrix.cols, matrix.cols, x, tokens, ldx, y + row, ldy);
  for (; row + kFloatTileRows <= row_end; row += kFloatTileRows)
    float_rows<W, kFloatTileRows>(w + row * matrix.cols, matrix.cols, x, tokens, ldx, y + row, ldy);
  for (; row < row_end; ++row) float_rows<W, 1>(w + row * matrix.cols, matrix.cols, x, tokens, ldx, y + row, ldy);
}

// y_g += sum over rows t of share_gt * row t, in the order of t, as axpy does one by one: G vectors y, a stretch of
// their columns in registers.
template <class W, int G, int C>
inline void mix_tile(const typename W::Element* w, int64_t cols, int64_t rows, const float* shares, int64_t ld, float* y,
                     int64_t ldy) {
  Vec sum[G][C];
  each<G>([&](auto g) BITDISTILL_INLINE {
    each<C>([&](auto c) BITDISTILL_INLINE { sum[g][c] = load(y + g * ldy + c * kLanes); });
  });
  for (int64_t t = 0; t < rows; ++t, w += cols)
    each<C>([&](auto c) BITDISTILL_INLINE {
      const Vec row = W::at(w + c * kLanes);
      each<G>([&](auto g) BITDISTILL_INLINE { sum[g][c] += row * shares[g * ld + t]; });
    });
  each<G>([&](auto g) BITDISTILL_INLINE {
    each<C>([&](auto c) BITDISTILL_INLINE { store(y + g * ldy + c * kLanes, sum[g][c]); });
  });
}

template <class W, int G>
inline void mix_group(const typename W::Element* w, int64_t cols, int64_t rows, const float* shares, int64_t ld, float* y,
                      int64_t ldy) {
  constexpr int C = G == 4 ? kMixColumns : 2;
  int64_t c = 0;
  for (; c + C * kLanes <= cols; c += C * kLanes) mix_tile<W, G, C>(w + c, cols, rows, shares, ld, y + c, ldy);
  for (; c + kLanes <= cols; c += kLanes) mix_tile<W, G, 1>(w + c, cols, rows, shares, ld, y + c, ldy);
  if (c < cols)
    for (int g = 0; g < G; ++g)
      for (int64_t t = 0; t < rows; ++t)
        axpy_of<W>(shares[g * ld + t], w + t * cols + c, y + g * ldy + c, cols - c);
}

template <class W>
void mix_of(const FloatView& values, const float* shares, int64_t groups, int64_t ld, float* y, int64_t ldy) {
  const auto* w = static_cast<const typename W::Element*>(values.data);
  int64_t g = 0;
  for (; g + 4 <= groups; g += 4) mix_group<W, 4>(w, values.cols, values.rows, shares + g * ld, ld, y + g * ldy, ldy);
  for (; g + 2 <= groups; g += 2) mix_group<W, 2>(w, values.cols, values.rows, shares + g * ld, ld, y + g * ldy, ldy);
  if (g < groups) mix_group<W, 1>(w, values.cols, values.rows, shares + g * ld, ld, y + g * ldy, ldy);
}

void mix_impl(const FloatView& values, const float* shares, int64_t groups, int64_t ld, float* y, int64_t ldy) {
  switch (values.type) {
    case FloatType::kF32: return mix_of<F32>(values, shares, groups, ld, y, ldy);
    case FloatType::kBF16: return mix_of<BF16>(values, shares, groups, ld, y, ldy);
    case FloatType::kF16: return mix_of<F16>(values, shares, groups, ld, y, ldy);
    case FloatType::kI8: return mix_of<I8>(values, shares, groups, ld, y, ldy);
  }
}

void float_matmul_impl(const FloatView& matrix, const float* x, int64_t tokens, int64_t ldx, float* y, int64_t ldy,
                       int64_t row_begin, int64_t row_end) {
  switch (matrix.type) {
    case FloatType::kF32: return float_matmul_of<F32>(matrix, x, tokens, ldx, y, ldy, row_begin, row_end);
    case FloatType::kBF16: return float_matmul_of<BF16>(matrix, x, tokens, ldx, y, ldy, row_begin, row_end);
    case FloatType::kF16: return float_matmul_of<F16>(matrix, x, tokens, ldx, y, ldy, row_begin, row_end);
    case FloatType::kI8: return float_matmul_of<I8>(matrix, x, tokens, ldx, y, ldy, row_begin, row_end);
  }
}

#define BITDISTILL_FLOAT_KERNELS                                                                              \
  float_matmul_impl, quantize_row_impl, rmsnorm_impl, dot_impl, dot_f16_impl, axpy_impl, axpy_f16_impl,        \
      to_f16_impl, silu_mul_impl, gelu_tanh_mul_impl, exp_minus_max_impl, axpy_i8_impl, relu2_mul_impl,          \
      screen_row_impl, mix_impl, widen_impl
