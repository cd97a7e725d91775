// A row of the output head as low-bit codes, see ScreenDither in table.h. Included by float.inl.

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
  const float amax = max_lanes(best);
  float scale = amax / d.levels;
  if (!(scale >= 1.17549435e-38f)) scale = amax > 0.0f ? 1.17549435e-38f : 1.0f;  // no subnormal divisor
  Vec size = {}, error = {}, mixed = {}, rest_mixed = {};
  for (int64_t i = 0; i < m.cols; i += kLanes) {
    const Vec x = load(values + i), u = load(d.u + i);
    const Vec q = vmin(vmax(round_even(x / scale + u), splat(d.low)), splat(d.high));
    const BVec bytes = to_bytes(to_int(q));
    __builtin_memcpy(codes + i, &bytes, sizeof bytes);
    const Vec shown = (q - u) * scale, e = x - shown;
    size += shown * shown;
    error += e * e;
    const Vec even = splat(2.0f) * round_even(splat(0.5f) * q - splat(0.25f)) + splat(0.5f), v = load(d.v + i);
    mixed += even * v;
    rest_mixed += (q - even) * v;
  }
  *out = {scale, sum_lanes(size), sum_lanes(error), sum_lanes(mixed), sum_lanes(rest_mixed)};
}

void screen_row_impl(const FloatView& m, int64_t row, const ScreenDither& d, float* values, int8_t* codes,
                     ScreenRow* out) {
  switch (m.type) {
    case FloatType::kF32: return screen_row_of<F32>(m, row, d, values, codes, out);
    case FloatType::kBF16: return screen_row_of<BF16>(m, row, d, values, codes, out);
    case FloatType::kF16: return screen_row_of<F16>(m, row, d, values, codes, out);
    case FloatType::kI8: return;  // no head is stored so
  }
}
