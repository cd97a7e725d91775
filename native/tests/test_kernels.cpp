// Integer kernels of every instruction set against int64 sums of the codes; guard pages, saturation, threads, fork.
//
//   test_kernels [SHAPES] [ISA]     SHAPES random shapes a layout and instruction set (default 2000), and every K from
//                                   1 to 1024, every N from 1 to 67, every M from 1 to 9
//
// Prints one line a check; exits 1 at the first difference.

#include <sys/wait.h>
#include <unistd.h>

#include <cmath>
#include <cstring>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "bitdistill/errors.h"
#include "bitdistill/kernels.h"
#include "bitdistill/threads.h"
#include "guarded.h"
#include "kernels/table.h"
#include "model/head.h"

using namespace bitdistill;

namespace {

std::mt19937_64 g_random(20240607);
int64_t uniform(int64_t low, int64_t high) { return std::uniform_int_distribution<int64_t>(low, high)(g_random); }

[[noreturn]] void fail(const std::string& what) {
  std::printf("FAILED %s\n", what.c_str());
  std::exit(1);
}

// One problem: codes and activations as plain integers, and their exact product.
struct Problem {
  int64_t rows, cols, tokens;
  std::vector<int8_t> codes, x;
  std::vector<int64_t> product;  // [tokens, rows]

  template <class Code, class Value>
  Problem(int64_t n, int64_t k, int64_t m, Code code, Value value)
      : rows(n), cols(k), tokens(m), codes(n * k), x(m * k), product(m * n) {
    for (auto& c : codes) c = static_cast<int8_t>(code());
    for (auto& v : x) v = static_cast<int8_t>(value());
    for (int64_t t = 0; t < m; ++t)
      for (int64_t o = 0; o < n; ++o) {
        int64_t sum = 0;
        for (int64_t i = 0; i < k; ++i) sum += static_cast<int64_t>(codes[o * k + i]) * x[t * k + i];
        product[t * n + o] = sum;
      }
  }

  std::string name() const {
    return "N " + std::to_string(rows) + ", K " + std::to_string(cols) + ", M " + std::to_string(tokens);
  }

  std::vector<uint8_t> file_bytes() const {  // docs/format.md
    const int64_t width = (cols + 3) / 4;
    std::vector<uint8_t> bytes(rows * width, 0);
    for (int64_t o = 0; o < rows; ++o)
      for (int64_t i = 0; i < 4 * width; ++i)
        bytes[o * width + i / 4] |= (i < cols ? codes[o * cols + i] + 1 : 1) << (2 * (i % 4));
    return bytes;
  }
};

Problem random_problem(int64_t n, int64_t k, int64_t m) {
  const uint64_t kind = g_random() % 8;
  const auto bits = [] {
    static thread_local uint64_t pool = 0, left = 0;
    if (left == 0) pool = g_random(), left = 8;
    --left;
    const uint8_t byte = static_cast<uint8_t>(pool);
    pool >>= 8;
    return byte;
  };
  return Problem(
      n, k, m, [&] { return kind == 0 ? 1 : kind == 1 ? -1 : static_cast<int>(bits() % 3) - 1; },
      [&] { return kind == 2 ? 127 : kind == 3 ? -128 : static_cast<int8_t>(bits()); });
}

constexpr int32_t kUntouched = 0x7f7f7f7f;

// Inputs and outputs flush against unreadable pages on one side.
void check_guarded(const Problem& p, Layout layout, Guarded::Side side, bool use_gemm) {
  const KernelTable& table = kernels();
  const TernaryMatrix m = repack(p.file_bytes().data(), p.rows, p.cols, layout, 0.5f);
  const int64_t stride = (p.cols + 63) / 64 * 64 + 64;
  constexpr int64_t kFront = 16;  // what ActivationView promises before a row
  Guarded codes(m.bytes(), side), x(kFront + p.tokens * stride, side), y(p.tokens * p.rows * 4, side);
  std::memcpy(codes.data, m.codes, m.bytes());
  std::memset(x.data, 0, kFront + p.tokens * stride);
  std::vector<int32_t> sums(p.tokens);
  for (int64_t t = 0; t < p.tokens; ++t) {
    std::memcpy(x.data + kFront + t * stride, &p.x[t * p.cols], p.cols);
    for (int64_t i = 0; i < p.cols; ++i) sums[t] += p.x[t * p.cols + i];
  }
  std::memset(y.data, 0x7f, p.tokens * p.rows * 4);
  const TernaryView w = {codes.data, m.rows, m.quads(), m.group_quads(), layout, m.scale, nullptr};
  const ActivationView a = {reinterpret_cast<const int8_t*>(x.data) + kFront, stride, nullptr, sums.data(), p.tokens};
  auto* got = reinterpret_cast<int32_t*>(y.data);
  const OutputView out = {nullptr, got, p.rows};
  // Two ranges, as two threads would: nothing outside a range is written.
  const int64_t middle = m.group_count() / 2 * kGroupRows;
  Guarded tile(table.gemm_tile_groups * tile_bytes(w.quads), side);
  const auto run = [&](int64_t begin, int64_t end) {
    if (begin == end) return;
    use_gemm ? table.ternary_gemm(w, a, out, begin, end, tile.data) : table.ternary_gemv(w, a, out, begin, end);
  };
  run(middle, p.rows);
  for (int64_t t = 0; t < p.tokens; ++t)
    for (int64_t o = 0; o < middle; ++o)
      if (got[t * p.rows + o] != kUntouched) fail(p.name() + ": wrote row " + std::to_string(o) + " out of range");
  run(0, middle);
  for (int64_t i = 0; i < p.tokens * p.rows; ++i)
    if (got[i] != p.product[i])
      fail(std::string(isa_name(table.isa)) + (use_gemm ? " gemm " : " gemv ") +
           (layout == Layout::kTwoBitRows16 ? "2-bit " : "base-3 ") + p.name() + ": token " +
           std::to_string(i / p.rows) + ", row " + std::to_string(i % p.rows) + " is " + std::to_string(got[i]) +
           ", not " + std::to_string(p.product[i]));
}

int64_t g_shapes = 0;

void check_shape(int64_t n, int64_t k, int64_t m) {
  const Problem p = random_problem(n, k, m);
  for (const Layout layout : {Layout::kTwoBitRows16, Layout::kBase3Rows16})
    for (const bool use_gemm : {false, true})
      check_guarded(p, layout, g_random() & 1 ? Guarded::kFront : Guarded::kBack, use_gemm);
  ++g_shapes;
}

void check_ternary(int64_t shapes) {
  g_shapes = 0;
  for (int64_t k = 1; k <= 1024; ++k) check_shape(uniform(1, 67), k, uniform(1, 9));
  for (int64_t n = 1; n <= 67; ++n)
    for (int64_t m = 1; m <= 9; ++m) check_shape(n, uniform(1, 130), m);
  for (int64_t m = 10; m <= 40; ++m) check_shape(uniform(1, 67), uniform(1, 200), m);
  while (g_shapes < shapes) check_shape(uniform(1, 67), uniform(1, g_random() & 3 ? 200 : 1024), uniform(1, 9));
  std::printf("%s: %lld shapes x 2 layouts x gemv, gemm equal int64 sums, guard pages on either side\n",
              isa_name(current_isa()), static_cast<long long>(g_shapes));
}

void check_saturation() {
  for (const int code : {-1, 1})
    for (const int value : {-128, -127, 127})
      for (const int64_t k : {int64_t{1000}, int64_t{4096}, int64_t{4097}, kMaxColumns}) {
        const int64_t tokens = k == 4097 ? 8 : 2;  // a batch has sums of its own
        const Problem p(16, k, tokens, [&] { return code; }, [&] { return value; });
        for (const Layout layout : {Layout::kTwoBitRows16, Layout::kBase3Rows16})
          for (const bool use_gemm : {false, true}) check_guarded(p, layout, Guarded::kBack, use_gemm);
      }
  std::printf("%s: extreme codes and activations up to K %lld\n", isa_name(current_isa()),
              static_cast<long long>(kMaxColumns));
}

void check_int8(int64_t shapes) {
  const auto run = [](const Problem& p, Guarded::Side side) {
    const int64_t blocks = (p.cols + 3) / 4, groups = (p.rows + 15) / 16, stride = (p.cols + 63) / 64 * 64 + 64;
    Guarded codes(groups * blocks * 64, side), x(p.tokens * stride, side), y(p.tokens * p.rows * 4, side);
    std::memset(codes.data, 0, groups * blocks * 64);
    std::memset(x.data, 0, p.tokens * stride);
    for (int64_t o = 0; o < p.rows; ++o)
      for (int64_t i = 0; i < p.cols; ++i)
        codes.data[(o / 16 * blocks + i / 4) * 64 + 4 * (o % 16) + i % 4] =
            static_cast<uint8_t>(p.codes[o * p.cols + i]);
    std::vector<int32_t> sums(p.tokens);
    for (int64_t t = 0; t < p.tokens; ++t) {
      std::memcpy(x.data + t * stride, &p.x[t * p.cols], p.cols);
      for (int64_t i = 0; i < p.cols; ++i) sums[t] += p.x[t * p.cols + i];
    }
    const Int8View w = {reinterpret_cast<const int8_t*>(codes.data), p.rows, blocks, nullptr};
    const ActivationView a = {reinterpret_cast<const int8_t*>(x.data), stride, nullptr, sums.data(), p.tokens};
    auto* got = reinterpret_cast<int32_t*>(y.data);
    kernels().int8_matmul(w, a, {nullptr, got, p.rows}, 0, p.rows);
    for (int64_t i = 0; i < p.tokens * p.rows; ++i)
      if (got[i] != p.product[i]) fail(std::string(isa_name(current_isa())) + " int8 " + p.name());
  };
  const auto byte = [] { return static_cast<int8_t>(g_random()); };
  for (int64_t i = 0; i < shapes; ++i)
    run(Problem(uniform(1, 67), i < 300 ? i + 1 : uniform(1, 1024), uniform(1, 19), byte, byte),
        i & 1 ? Guarded::kFront : Guarded::kBack);
  for (const int code : {-128, -127, 127})
    for (const int value : {-128, -127, 127})
      run(Problem(16, 65536, 2, [&] { return code; }, [&] { return value; }), Guarded::kBack);
  std::printf("%s: int8, %lld shapes and extreme values up to K 65536\n", isa_name(current_isa()),
              static_cast<long long>(shapes));
}

void check_int3(int64_t shapes) {
  const auto run = [](const Problem& p, Guarded::Side side) {  // codes -4..3
    const int64_t blocks = (p.cols + 31) / 32, groups = (p.rows + 15) / 16, stride = (p.cols + 63) / 64 * 64 + 64;
    Guarded codes(groups * blocks * 192, side), x(p.tokens * stride, side), y(p.tokens * p.rows * 4, side);
    std::memset(codes.data, 0xff, groups * blocks * 192);  // rows and columns beyond the matrix must not count
    std::memset(x.data, 0, p.tokens * stride);
    for (int64_t o = 0; o < p.rows; ++o)
      for (int64_t i = 0; i < p.cols; ++i) {
        uint8_t* at = codes.data + (o / 16 * blocks + i / 32) * 192 + 4 * (o % 16) + i % 4;
        const int digit = p.codes[o * p.cols + i] + 4, place = static_cast<int>(i % 32 / 4);
        const auto put = [](uint8_t& byte, int value, int shift, int bits) {
          byte = static_cast<uint8_t>((byte & ~(((1 << bits) - 1) << shift)) | value << shift);
        };
        if (place < 6) put(at[place / 2 * 64], digit, 3 * (place % 2), 3);
        if (place >= 6) put(at[(place - 6) * 64], digit & 3, 6, 2);
        if (place >= 6) put(at[128], digit >> 2, place, 1);
      }
    std::vector<int32_t> sums(p.tokens);
    for (int64_t t = 0; t < p.tokens; ++t) {
      std::memcpy(x.data + t * stride, &p.x[t * p.cols], p.cols);
      for (int64_t i = 0; i < p.cols; ++i) sums[t] += p.x[t * p.cols + i];
    }
    const Int3View w = {codes.data, p.rows, blocks, nullptr};
    const ActivationView a = {reinterpret_cast<const int8_t*>(x.data), stride, nullptr, sums.data(), p.tokens};
    auto* got = reinterpret_cast<int32_t*>(y.data);
    kernels().int3_matmul(w, a, {nullptr, got, p.rows}, 0, p.rows);
    for (int64_t i = 0; i < p.tokens * p.rows; ++i)
      if (got[i] != p.product[i]) fail(std::string(isa_name(current_isa())) + " int3 " + p.name());
  };
  const auto code = [] { return static_cast<int>(g_random() % 8) - 4; };
  const auto byte = [] { return static_cast<int8_t>(g_random()); };
  for (int64_t i = 0; i < shapes; ++i)
    run(Problem(uniform(1, 67), i < 300 ? i + 1 : uniform(1, 1024), uniform(1, 19), code, byte),
        i & 1 ? Guarded::kFront : Guarded::kBack);
  for (const int extreme : {-4, 3})
    for (const int value : {-128, -127, 127})
      for (const int64_t tokens : {1, 2, 8})
        run(Problem(16, tokens == 8 ? 4096 : 65536, tokens, [&] { return extreme; }, [&] { return value; }), Guarded::kBack);
  std::printf("%s: int3, %lld shapes and extreme values up to K 65536\n", isa_name(current_isa()),
              static_cast<long long>(shapes));
}

void check_bit_dot() {
  const auto run = [](int64_t cols, int value) {
    const int64_t blocks = (cols + 255) / 256;
    Guarded bits(32 * blocks, Guarded::kBack), spread(256 * blocks, Guarded::kBack), x(cols, Guarded::kBack);
    int32_t expected = 0;
    for (int64_t i = 0; i < 32 * blocks; ++i) bits.data[i] = static_cast<uint8_t>(value ? 0xff : g_random());
    for (int64_t i = 0; i < cols; ++i) {
      x.data[i] = static_cast<uint8_t>(value ? value : static_cast<int>(g_random()));
      expected += (bits.data[i / 8] >> i % 8 & 1) * static_cast<int8_t>(x.data[i]);
    }
    auto* ordered = reinterpret_cast<int8_t*>(spread.data);
    spread_columns(reinterpret_cast<int8_t*>(x.data), cols, ordered);
    if (bit_dot(bits.data, blocks, ordered) != expected)
      fail(std::string(isa_name(current_isa())) + " bit_dot of " + std::to_string(cols) + " columns");
  };
  for (int64_t cols = 1; cols <= 1024; ++cols) run(cols, 0);
  for (const int64_t cols : {2560, 4097, 65536})
    for (const int value : {0, -128, 127}) run(cols, value);
  std::printf("%s: bit_dot, 1 to 1,024 columns, and extreme values up to 65536\n", isa_name(current_isa()));
}

std::vector<float> random_floats(int64_t n, float scale) {
  std::normal_distribution<float> normal(0.0f, scale);
  std::vector<float> v(n);
  for (float& f : v) f = normal(g_random);
  return v;
}

// Both upper ends of the 4-bit screen hold for every logit, the second is the lower one, and neither is loose.
void check_head_bounds() {
  ThreadPool pool(1);
  for (const int64_t cols : {1, 31, 64, 257, 576, 640, 1024}) {
    const int64_t rows = 301, tokens = 3;
    std::vector<float> head = random_floats(rows * cols, 0.02f), hidden = random_floats(tokens * cols, 3.0f);
    std::fill_n(head.begin() + cols, cols, 0.0f);                      // a row of zeros
    std::fill_n(head.begin() + 2 * cols, cols, 0.5f);                  // of equals
    head[static_cast<size_t>(3 * cols)] = 40.0f;                       // with an outlier
    for (int64_t i = 0; i < cols; ++i) head[static_cast<size_t>(4 * cols + i)] = hidden[static_cast<size_t>(i)];
    std::vector<float> file = head;  // pages are given back once they are read, as those of a mapped file
    const LowBitHead screen({rows, cols, FloatType::kF32, file.data()}, 4, pool);
    LowBitHead::Input input;
    screen.prepare(hidden.data(), tokens, input);
    std::vector<float> wide(tokens * rows), near(tokens * rows);
    screen.product(input, true, wide.data(), 0, rows);
    screen.product(input, false, near.data(), 0, rows);
    for (int64_t t = 0; t < tokens; ++t) {
      std::vector<float> lowered(wide.begin() + t * rows, wide.begin() + (t + 1) * rows);
      screen.refine(input, t, -INFINITY, lowered.data(), 0, rows);
      for (int64_t o = 0; o < rows; ++o) {
        double exact = 0.0, row = 0.0, token = 0.0, largest = 0.0;
        for (int64_t i = 0; i < cols; ++i) {
          const double w = head[static_cast<size_t>(o * cols + i)], h = hidden[static_cast<size_t>(t * cols + i)];
          exact += w * h, row += w * w, token += h * h, largest = std::max(largest, std::fabs(w));
        }
        if (largest == 0.0) largest = 7.0;  // the scale of such a row is 1
        const double step = largest / 7.0 * std::sqrt(token), off = 1e-4 * std::sqrt(row * token) + 1e-6;
        const double at = wide[t * rows + o], below = lowered[o], estimate = near[t * rows + o];
        const double rounding = std::sqrt(row) * std::sqrt(token) / 50.0 + 0.05 * step + off;  // of the hidden state
        const auto name = " of row " + std::to_string(o) + ", " + std::to_string(cols) + " columns";
        if (at + off < exact || below + off < exact) fail("upper end" + name);
        if (below > at + off) fail("refined upper end" + name);
        if (at > exact + 2 * 8.5 * step * 0.62 + 12 * rounding) fail("loose upper end" + name);
        if (std::fabs(estimate - exact) > 8.5 * step * 0.3 + 12 * rounding) fail("estimate" + name);
      }
      std::vector<float> kept(wide.begin() + t * rows, wide.begin() + (t + 1) * rows);
      screen.refine(input, t, INFINITY, kept.data(), 0, rows);  // below the floor nothing is touched
      if (std::memcmp(kept.data(), &wide[t * rows], rows * sizeof(float)) != 0) fail("refine below the floor");
    }
  }
  std::printf("%s: upper ends of the 4-bit screen\n", isa_name(current_isa()));
}

// Every float kernel's output, to be compared bit for bit between instruction sets.
std::vector<float> float_outputs(int64_t n, const std::vector<float>& a, const std::vector<float>& b) {
  std::vector<float> out;
  const auto keep = [&](const std::vector<float>& v) { out.insert(out.end(), v.begin(), v.end()); };
  std::vector<uint16_t> half(n);
  to_f16(b.data(), half.data(), n);
  for (uint16_t h : half) out.push_back(h);
  out.push_back(dot(a.data(), b.data(), n));
  out.push_back(dot_f16(a.data(), half.data(), n));
  std::vector<float> y = b;
  axpy(0.37f, a.data(), y.data(), n);
  axpy_f16(-1.7f, half.data(), y.data(), n);
  keep(y);
  silu_mul(a.data(), b.data(), y.data(), n);
  keep(y);
  gelu_tanh_mul(a.data(), b.data(), y.data(), n);
  keep(y);
  y = a;
  out.push_back(exp_minus_max(y.data(), n));
  keep(y);
  rmsnorm(a.data(), b.data(), n, 1e-6f, y.data());
  keep(y);
  std::vector<int8_t> codes(n);
  float scale;
  out.push_back(static_cast<float>(quantize_row(a.data(), n, codes.data(), &scale)));
  out.push_back(scale);
  for (int8_t c : codes) out.push_back(c);
  std::vector<float> w(7 * n), z(6 * 7);
  for (int64_t i = 0; i < 7 * n; ++i) w[i] = a[i % n] * static_cast<float>(i % 13);
  matmul({7, n, FloatType::kF32, w.data()}, std::vector<float>(6 * n, 0.7f).data(), 6, n, z.data(), 7, 0, 7);
  keep(z);
  for (const FloatType type : {FloatType::kBF16, FloatType::kF16}) {
    std::vector<uint16_t> w16(7 * n);
    for (size_t i = 0; i < w16.size(); ++i) w16[i] = half[i % n];
    matmul({7, n, type, w16.data()}, std::vector<float>(6 * n, 1e-3f).data(), 6, n, z.data(), 7, 0, 7);
    keep(z);
  }
  return out;
}

void check_floats() {
  for (int64_t n = 1; n <= 300; n += n < 70 ? 1 : 17) {
    const std::vector<float> a = random_floats(n, 3.0f), b = random_floats(n, 0.1f);
    const Isa isa = current_isa();
    const std::vector<float> got = float_outputs(n, a, b);
    set_isa(Isa::kScalar);
    const std::vector<float> expected = float_outputs(n, a, b);
    set_isa(isa);
    for (size_t i = 0; i < got.size(); ++i)
      if (std::memcmp(&got[i], &expected[i], 4) != 0)
        fail(std::string(isa_name(isa)) + " floats of length " + std::to_string(n) + ": value " + std::to_string(i) +
             " is " + std::to_string(got[i]) + ", scalar " + std::to_string(expected[i]));
    // Against double.
    std::vector<float> y(n), e = a;
    silu_mul(a.data(), b.data(), y.data(), n);
    const float sum = exp_minus_max(e.data(), n);
    double exact_sum = 0, top = a[0];
    for (float v : a) top = std::fmax(top, v);
    for (int64_t i = 0; i < n; ++i) {
      const double silu = a[i] / (1.0 + std::exp(-static_cast<double>(a[i]))) * b[i], exact = std::exp(a[i] - top);
      exact_sum += exact;
      if (std::fabs(y[i] - silu) > 1e-6 * std::fabs(silu)) fail("silu_mul");
      if (std::fabs(e[i] - exact) > 2e-6 * exact) fail("exp_minus_max");
      const double v = a[i], u = 0.7978845608028654 * (v + 0.044715 * v * v * v);
      const double gelu = 0.5 * v * (1 + std::tanh(u)) * b[i];
      gelu_tanh_mul(&a[i], &b[i], &y[i], 1);
      if (std::fabs(y[i] - gelu) > 2e-6 * std::fabs(b[i])) fail("gelu_tanh_mul");
    }
    if (std::fabs(sum - exact_sum) > 2e-6 * exact_sum) fail("exp_minus_max sum");
  }
  // Every half value there and back, and quantization of ties.
  for (uint32_t h = 0; h < 65536; ++h) {
    if ((h & 0x7c00) == 0x7c00 && (h & 0x3ff)) continue;
    const uint16_t half = static_cast<uint16_t>(h);
    float one = 1.0f, value;
    dequantize_row({1, 1, FloatType::kF16, &half}, 0, &value);
    uint16_t back;
    to_f16(&value, &back, 1);
    if (back != half) fail("half " + std::to_string(h));
    if (std::isfinite(value) && dot_f16(&one, &half, 1) != value) fail("widened half " + std::to_string(h));
  }
  const float ties[8] = {127.0f, 0.5f, 1.5f, 2.5f, -0.5f, -1.5f, -2.5f, -127.0f};
  int8_t codes[8];
  float scale;
  const int32_t sum = quantize_row(ties, 8, codes, &scale);
  const int8_t expected[8] = {127, 0, 2, 2, 0, -2, -2, -127};
  if (std::memcmp(codes, expected, 8) != 0 || sum != 0 || scale != 1.0f) fail("quantize_row on ties");
  std::printf("%s: float kernels equal the scalar path bit for bit\n", isa_name(current_isa()));
}

void check_threads() {
  const Problem p = random_problem(403, 517, 6);
  TernaryMatrix m = repack(p.file_bytes().data(), p.rows, p.cols, Layout::kTwoBitRows16, 0.017f);
  QuantizedRows x;
  x.resize(p.tokens, p.cols);
  const std::vector<float> floats = random_floats(p.tokens * p.cols, 2.0f);
  for (int64_t t = 0; t < p.tokens; ++t) quantize_into(x, t, &floats[t * p.cols]);
  std::vector<float> expected(p.tokens * p.rows);
  for (int64_t t = 0; t < p.tokens; ++t) {
    for (int64_t o = 0; o < p.rows; ++o) {
      int32_t sum = 0;
      for (int64_t i = 0; i < p.cols; ++i) sum += p.codes[o * p.cols + i] * x.row(t)[i];
      expected[t * p.rows + o] = static_cast<float>(sum) * (x.scales[t] * m.scale);
    }
  }
  const auto equal = [&](const std::vector<float>& y) {
    return std::memcmp(y.data(), expected.data(), y.size() * 4) == 0;
  };
  const auto once = [&](ThreadPool& pool) {
    std::vector<float> y(p.tokens * p.rows, -1.0f);
    pool.parallel_rows(p.rows, [&](int64_t begin, int64_t end, int) { matmul(m, x, y.data(), p.rows, begin, end); });
    if (!equal(y)) fail("threads: result depends on the thread count " + std::to_string(pool.threads()));
  };
  for (int threads = 1; threads <= 8; ++threads) {
    ThreadPool pool(threads);
    for (int i = 0; i < 20; ++i) once(pool);
    ThreadPool::Burst burst(pool);
    for (int i = 0; i < 20; ++i) once(pool);
    std::vector<std::thread> callers;
    for (int c = 0; c < 4; ++c) callers.emplace_back([&] { for (int i = 0; i < 10; ++i) once(pool); });
    for (std::thread& caller : callers) caller.join();
    pool.parallel_for(100, 1, [&](int64_t, int64_t, int) { once(pool); });  // nested
    bool caught = false;
    try {
      pool.parallel_for(100, 1, [](int64_t, int64_t end, int) { if (end == 100) throw ModelError("last part"); });
    } catch (const ModelError&) {
      caught = true;
    }
    if (!caught) fail("threads: an exception was lost");
    const pid_t child = fork();
    if (child == 0) {
      once(pool);
      _exit(0);
    }
    int status = 1;
    waitpid(child, &status, 0);
    if (status != 0) fail("threads: fork");
  }
  std::printf("%s: threads 1-8, 4 callers, nested calls, exceptions, fork\n", isa_name(current_isa()));
}

void check_packing() {
  for (const Layout layout : {Layout::kTwoBitRows16, Layout::kBase3Rows16}) {
    for (int64_t i = 0; i < 200; ++i) {
      const Problem p = random_problem(uniform(1, 67), i < 64 ? i + 1 : uniform(1, 300), 1);
      const TernaryMatrix m = repack(p.file_bytes().data(), p.rows, p.cols, layout, 1.0f);
      std::vector<int8_t> row(p.cols);
      for (int64_t o = 0; o < p.rows; ++o) {
        unpack_row(m, o, row.data());
        if (std::memcmp(row.data(), &p.codes[o * p.cols], p.cols) != 0) fail("repack and unpack_row " + p.name());
      }
    }
  }
  const auto refused = [](std::vector<uint8_t> bytes, int64_t rows, int64_t cols, const char* text) {
    try {
      repack(bytes.data(), rows, cols, Layout::kTwoBitRows16, 1.0f, "layer.codes");
    } catch (const ArtifactError& e) {
      return std::strstr(e.what(), text) != nullptr;
    } catch (const ModelError& e) {
      return std::strstr(e.what(), text) != nullptr;
    }
    return false;
  };
  if (!refused({0x55, 0x5d}, 2, 4, "layer.codes: value 3 at row 1, column 1")) fail("code 3");
  if (!refused({0x55, 0x65}, 2, 2, "padding of row 1")) fail("padding");
  if (!refused({}, 0, 4, "0 x 4") || !refused({}, 1, kMaxColumns + 1, "columns")) fail("sizes");
  try {
    set_isa("altivec");
    fail("unknown instruction set");
  } catch (const ModelError&) {
  }
  std::printf("packing: both layouts, refusals\n");
}

}  // namespace

int main(int argc, char** argv) {
  const int64_t shapes = argc > 1 ? std::atoll(argv[1]) : 2000;
  check_packing();
  if (argc > 2) set_isa(std::string(argv[2]));  // one that this CPU lacks ends the program with an error
  for (const Isa isa : available_isas()) {
    if (argc > 2 && std::string(argv[2]) != isa_name(isa)) continue;
    set_isa(isa);
    check_ternary(shapes);
    check_saturation();
    check_int8(shapes / 4 + 300);
    check_int3(shapes / 4 + 300);
    check_bit_dot();
    check_head_bounds();
    check_floats();
    check_threads();
  }
  std::printf("all checks passed\n");
  return 0;
}
