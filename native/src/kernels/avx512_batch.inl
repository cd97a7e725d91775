// Five to eight tokens at once: a batch of sequences in decode. Included by avx512vnni.cpp.
//
// Digits are made in registers, a quad at a time, shifted into place so that a token needs one sum: eight sums hide
// the latency of dpbusd, and the masks and shifts run on pipes that it leaves free. A broadcast is part of the dpbusd.

struct TwoBitQuads {
  static constexpr int kQuads = 4, kBlocks = 1;
  __m512i bytes;
  explicit TwoBitQuads(const uint8_t* block) : bytes(load64(block)) {}
  template <int P>
  __m512i get() const {
    return _mm512_and_si512(P == 0 ? bytes : _mm512_srli_epi16(bytes, 2 * P), _mm512_set1_epi8(3));
  }
};

struct Base3Quads {
  static constexpr int kQuads = 5, kBlocks = 1;
  __m512i fields, top;
  explicit Base3Quads(const uint8_t* block) {
    split_base3(load64(block), load64(kFieldTable.fields), load64(kFieldTable.fields + 64), &fields, &top);
  }
  template <int P>
  __m512i get() const {  // 81 and 162 are 1 and 2 in their low two bits
    const __m512i from = P == 4 ? top : P == 0 ? fields : _mm512_srli_epi16(fields, 2 * (P % 4));
    return _mm512_and_si512(from, _mm512_set1_epi8(3));
  }
};

// Three blocks (Int3Matrix): get<p>() is d_p of sixteen rows.
struct Int3Quads {
  static constexpr int kQuads = 8, kBlocks = 3;
  __m512i a, b, c;
  explicit Int3Quads(const uint8_t* block) : a(load64(block)), b(load64(block + 64)), c(load64(block + 128)) {}
  template <int P>
  __m512i get() const {
    const __m512i seven = _mm512_set1_epi8(7), three = _mm512_set1_epi8(3), four = _mm512_set1_epi8(4);
    if constexpr (P >= 6) {
      return _mm512_or_si512(_mm512_and_si512(_mm512_srli_epi16(P == 6 ? a : b, 6), three),
                             _mm512_and_si512(_mm512_srli_epi16(c, P - 2), four));
    } else {
      const __m512i bytes = P < 2 ? a : P < 4 ? b : c;
      return _mm512_and_si512(P % 2 == 0 ? bytes : _mm512_srli_epi16(bytes, 3), seven);
    }
  }
};

#define BITDISTILL_TOKENS(X) X(0) X(1) X(2) X(3) X(4) X(5) X(6) X(7)
#define BITDISTILL_DECLARE(t) __m512i a##t = _mm512_setzero_si512();
#define BITDISTILL_MULTIPLY(t) \
  if constexpr (t < T) a##t = _mm512_dpbusd_epi32(a##t, digit, broadcast4(quad + t * stride));
#define BITDISTILL_STORE(t) \
  if constexpr (t < T) store_sums(out, x, a##t, t0 + t, row, row_end, offset, scale, row_scales);
template <class Quads, int T>
inline void batch_group(const uint8_t* group, int64_t blocks, const int8_t* codes, const ActivationView& x,
                        const OutputView& out, int64_t t0, int64_t row, int64_t row_end, int32_t offset, float scale,
                        const float* row_scales) {
  const int64_t stride = x.stride;
  BITDISTILL_TOKENS(BITDISTILL_DECLARE)
  for (int64_t b = 0; b < blocks; ++b) {
    const uint8_t* block = group + b * Quads::kBlocks * kBlockBytes;
    each<Quads::kBlocks>([&](auto i) BITDISTILL_INLINE {
      _mm_prefetch(reinterpret_cast<const char*>(block + 64 * i + kPrefetchBytes), _MM_HINT_T0);
    });
    const Quads quads(block);
    each<Quads::kQuads>([&](auto p) BITDISTILL_INLINE {
      const __m512i digit = quads.template get<p>();
      const int8_t* quad = codes + 4 * (Quads::kQuads * b + p);
      BITDISTILL_TOKENS(BITDISTILL_MULTIPLY)
    });
  }
  BITDISTILL_TOKENS(BITDISTILL_STORE)
}
#undef BITDISTILL_STORE
#undef BITDISTILL_MULTIPLY
#undef BITDISTILL_DECLARE
#undef BITDISTILL_TOKENS
