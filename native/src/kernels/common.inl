// Included by every instruction set's file, inside its anonymous namespace.

// each<N>(f) is f(0), ..., f(N - 1) with constant arguments: only then are the sums of a tile registers for GCC
// (a loop, even one that is unrolled, leaves them an array in memory). f is a lambda marked BITDISTILL_INLINE.
#define BITDISTILL_INLINE __attribute__((always_inline))
template <int I>
struct Index {
  static constexpr int value = I;
  constexpr operator int() const { return I; }
};
template <int N, int I = 0, class F>
BITDISTILL_INLINE inline void each(const F& f) {
  if constexpr (I < N) {
    f(Index<I>{});
    each<N, I + 1>(f);
  }
}

// Last step of every integer product: `sums` holds, for the sixteen rows of group g and token t, the sum of
// unsigned digits times activations; `offset` (a digit of 0 stands for code -offset) takes the surplus away.
inline void store_group(const OutputView& out, const ActivationView& x, const int32_t* __restrict sums, int64_t t,
                        int64_t row, int64_t row_end, int32_t offset, float scale,
                        const float* __restrict row_scales) {
  const int32_t surplus = offset * x.sums[t];
  const int64_t count = row_end - row < kGroupRows ? row_end - row : kGroupRows;
  if (out.sums) {
    int32_t* __restrict y = out.sums + t * out.ld + row;
    for (int64_t r = 0; r < count; ++r) y[r] = sums[r] - surplus;
    return;
  }
  float* __restrict y = out.y + t * out.ld + row;
  if (row_scales) {
    const float x_scale = x.scales[t];
    for (int64_t r = 0; r < count; ++r)
      y[r] = static_cast<float>(sums[r] - surplus) * (x_scale * row_scales[row + r]);
  } else {
    const float product = x.scales[t] * scale;
    if (count == kGroupRows) {
      for (int64_t r = 0; r < kGroupRows; ++r) y[r] = static_cast<float>(sums[r] - surplus) * product;
    } else {
      for (int64_t r = 0; r < count; ++r) y[r] = static_cast<float>(sums[r] - surplus) * product;
    }
  }
}

// Where a group of sixteen rows lies: `blocks` blocks, of which the first `lead` quads (base 3 only) and what follows
// w.quads belong to its neighbours. A product over whole blocks starts its activations 4 * lead bytes early: the
// neighbours' digits meet the zeros around a row.
struct Group {
  const uint8_t* codes;
  int64_t blocks, lead;
};
inline Group group_at(const TernaryView& w, int64_t row) {
  const int64_t first = row / kGroupRows * w.group_quads;
  if (w.layout == Layout::kTwoBitRows16) return {w.codes + first * 16, w.group_quads / 4, 0};
  const int64_t block = first / 5, lead = first % 5;
  return {w.codes + block * kBlockBytes, (lead + w.quads + 4) / 5, lead};
}

// The tile of a GEMM: digit of row r, column c of the group at tile[(c / 4 + lead) * 64 + 4 * r + c % 4].
// Portable; an instruction set may have its own.
inline void unpack_group_portable(Layout layout, const uint8_t* __restrict group, int64_t blocks,
                                  uint8_t* __restrict tile) {
  if (layout == Layout::kTwoBitRows16) {
    for (int64_t b = 0; b < blocks; ++b, group += 64, tile += 256)
      for (int i = 0; i < 64; ++i) {
        const uint8_t byte = group[i];
        tile[i] = byte & 3;
        tile[64 + i] = (byte >> 2) & 3;
        tile[128 + i] = (byte >> 4) & 3;
        tile[192 + i] = byte >> 6;
      }
    return;
  }
  for (int64_t b = 0; b < blocks; ++b, group += 64, tile += 320)
    for (int i = 0; i < 64; ++i) {
      unsigned rest = group[i];
      for (int p = 0; p < 5; ++p, rest /= 3) tile[64 * p + i] = static_cast<uint8_t>(rest % 3);
    }
}
