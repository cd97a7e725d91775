// Float kernels, written once in vectors of sixteen lanes and lowered by the compiler to each instruction set.
// Included by every instruction set's file, inside its anonymous namespace. No contraction (-ffp-contract=off), one
// order of summation: the same bits on every instruction set.

typedef float Vec __attribute__((vector_size(64)));
typedef int32_t IVec __attribute__((vector_size(64)));
typedef uint32_t UVec __attribute__((vector_size(64)));
typedef uint16_t HVec __attribute__((vector_size(32)));
typedef int8_t BVec __attribute__((vector_size(16)));
constexpr int64_t kLanes = 16;

inline Vec splat(float x) { return Vec{} + x; }

inline Vec load(const float* p) {
  Vec v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}
inline Vec load(const float* p, int64_t n) {  // n < 16 lanes, zeros after them
  Vec v = {};
  __builtin_memcpy(&v, p, static_cast<size_t>(n) * sizeof(float));
  return v;
}
inline void store(float* p, Vec v) { __builtin_memcpy(p, &v, sizeof v); }
inline void store(float* p, Vec v, int64_t n) { __builtin_memcpy(p, &v, static_cast<size_t>(n) * sizeof(float)); }

// bf16 is the high half of a float32.
inline Vec widen_bf16(HVec h) {
  const UVec bits = __builtin_convertvector(h, UVec) << 16;
  Vec v;
  __builtin_memcpy(&v, &bits, sizeof v);
  return v;
}

#if defined(__AVX512F__)
inline Vec widen_f16(HVec h) {
  __m256i bits;
  __builtin_memcpy(&bits, &h, sizeof bits);
  const __m512 wide = _mm512_cvtph_ps(bits);
  Vec v;
  __builtin_memcpy(&v, &wide, sizeof v);
  return v;
}
#elif defined(__F16C__)
inline Vec widen_f16(HVec h) {
  __m128i bits[2];
  __builtin_memcpy(bits, &h, sizeof bits);
  const __m256 wide[2] = {_mm256_cvtph_ps(bits[0]), _mm256_cvtph_ps(bits[1])};
  Vec v;
  __builtin_memcpy(&v, wide, sizeof v);
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
  static Vec widen(BVec b) { return __builtin_convertvector(__builtin_convertvector(b, IVec), Vec); }
  static Vec at(const int8_t* p) {
    BVec b;
    __builtin_memcpy(&b, p, sizeof b);
    return widen(b);
  }
  static Vec at(const int8_t* p, int64_t n) {
    BVec b = {};
    __builtin_memcpy(&b, p, static_cast<size_t>(n));
    return widen(b);
  }
};

inline float sum_lanes(Vec v) {
  float a[16];
  store(a, v);
  for (int width = 8; width; width /= 2)
    for (int i = 0; i < width; ++i) a[i] += a[i + width];
  return a[0];
}
inline float max_lanes(Vec v) {
  float a[16], best;
  store(a, v);
  best = a[0];
  for (int i = 1; i < 16; ++i) best = a[i] > best ? a[i] : best;
  return best;
}
inline Vec vmax(Vec a, Vec b) { return a > b ? a : b; }
inline Vec vmin(Vec a, Vec b) { return a < b ? a : b; }
inline Vec vabs(Vec v) {
  IVec bits;
  __builtin_memcpy(&bits, &v, sizeof bits);
  bits &= 0x7fffffff;
  __builtin_memcpy(&v, &bits, sizeof v);
  return v;
}
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
  const IVec power = (__builtin_convertvector(n, IVec) + 127) << 23;
  Vec scale;
  __builtin_memcpy(&scale, &power, sizeof scale);
  return p * scale;
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
    const IVec integers = __builtin_convertvector(q, IVec);
    sum += integers;
    const BVec bytes = __builtin_convertvector(integers, BVec);
    __builtin_memcpy(codes + i, &bytes, static_cast<size_t>(lanes));
  }
  int32_t total = 0;
  for (int i = 0; i < kLanes; ++i) total += sum[i];
  return total;
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

// `values` holds cols rounded up to 16 lanes, and so does `codes`.
template <class W>
inline void screen_row_of(const FloatView& m, int64_t row, const ScreenDither& d, float* values, int8_t* codes,
                          ScreenRow* out) {
  const auto* w = static_cast<const typename W::Element*>(m.data) + row * m.cols;
  const int64_t whole = m.cols / kLanes * kLanes, rest = m.cols - whole;
  Vec best = {};
  for (int64_t i = 0; i < whole; i += kLanes) {
    const Vec v = W::at(w + i);
    store(values + i, v);
    best = vmax(vabs(v), best);
  }
  if (rest) {
    const Vec v = W::at(w + whole, rest);
    store(values + whole, v);
    best = vmax(vabs(v), best);
  }
  const float amax = max_lanes(best), limit = static_cast<float>(d.levels);
  float scale = amax / limit * d.margin;
  if (!(scale >= 1.17549435e-38f)) scale = amax > 0.0f ? 1.17549435e-38f : 1.0f;  // no subnormal divisor
  Vec size = {}, error = {}, mixed = {};
  for (int64_t i = 0; i < m.cols; i += kLanes) {
    const Vec x = load(values + i), u = load(d.u + i);
    const Vec q = vmin(vmax(round_even(x / scale + u), splat(-limit)), splat(limit));
    const BVec bytes = __builtin_convertvector(__builtin_convertvector(q, IVec), BVec);
    __builtin_memcpy(codes + i, &bytes, sizeof bytes);
    const Vec shown = (q - u) * scale, e = x - shown;
    size += shown * shown;
    error += e * e;
    mixed += q * load(d.v + i);
  }
  *out = {scale, sum_lanes(size), sum_lanes(error), sum_lanes(mixed)};
}

void screen_row_impl(const FloatView& m, int64_t row, const ScreenDither& d, float* values, int8_t* codes,
                     ScreenRow* out) {
  switch (m.type) {
    case FloatType::kF32: return screen_row_of<F32>(m, row, d, values, codes, out);
    case FloatType::kBF16: return screen_row_of<BF16>(m, row, d, values, codes, out);
    case FloatType::kF16: return screen_row_of<F16>(m, row, d, values, codes, out);
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
    for (int t = 0; t < T; ++t) tokens[t] = load(x + t * ldx + i);
    for (int r = 0; r < R; ++r) {
      const Vec row = W::at(w + r * cols + i);
      for (int t = 0; t < T; ++t) sum[r][t] += row * tokens[t];
    }
  }
  if (rest)
    for (int r = 0; r < R; ++r) {
      const Vec row = W::at(w + r * cols + whole, rest);
      for (int t = 0; t < T; ++t) sum[r][t] += row * load(x + t * ldx + whole, rest);
    }
  for (int r = 0; r < R; ++r)
    for (int t = 0; t < T; ++t) y[t * ldy + r] = sum_lanes(sum[r][t]);
}

template <class W, int R>
inline void float_rows(const typename W::Element* w, int64_t cols, const float* x, int64_t tokens, int64_t ldx,
                       float* y, int64_t ldy) {
  int64_t t = 0;
  for (; t + 4 <= tokens; t += 4) float_tile<W, R, 4>(w, cols, x + t * ldx, ldx, y + t * ldy, ldy);
  for (; t < tokens; ++t) float_tile<W, R, 1>(w, cols, x + t * ldx, ldx, y + t * ldy, ldy);
}

template <class W>
void float_matmul_of(const FloatView& matrix, const float* x, int64_t tokens, int64_t ldx, float* y, int64_t ldy,
                     int64_t row_begin, int64_t row_end) {
  const auto* w = static_cast<const typename W::Element*>(matrix.data);
  int64_t row = row_begin;
  for (; row + 4 <= row_end; row += 4)
    float_rows<W, 4>(w + row * matrix.cols, matrix.cols, x, tokens, ldx, y + row, ldy);
  for (; row < row_end; ++row) float_rows<W, 1>(w + row * matrix.cols, matrix.cols, x, tokens, ldx, y + row, ldy);
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
      to_f16_impl, silu_mul_impl, gelu_tanh_mul_impl, exp_minus_max_impl, axpy_i8_impl, relu2_mul_impl, \
      screen_row_impl
