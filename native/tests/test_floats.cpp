// Float kernels flush against unreadable pages on either side, on every instruction set; int8 rows against floats.
//
//   test_floats [ISA]
//
// Prints one line a check; exits 1 at the first difference.

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "bitdistill/kernels.h"
#include "guarded.h"

using namespace bitdistill;

namespace {

std::mt19937_64 g_random(7);

[[noreturn]] void fail(const std::string& what) {
  std::printf("FAILED %s: %s\n", isa_name(current_isa()), what.c_str());
  std::exit(1);
}

// n values of a type in guarded memory.
template <class T>
struct Row {
  Row(int64_t n, Guarded::Side side) : memory(static_cast<size_t>(n) * sizeof(T), side), size(n) {}
  T* data() const { return reinterpret_cast<T*>(memory.data); }
  std::vector<T> copy() const { return std::vector<T>(data(), data() + size); }
  Guarded memory;
  int64_t size;
};

void fill(Row<float>& row, float scale) {
  std::normal_distribution<float> normal(0.0f, scale);
  for (int64_t i = 0; i < row.size; ++i) row.data()[i] = normal(g_random);
}

void same(const std::vector<float>& a, const std::vector<float>& b, const std::string& what) {
  if (a.size() != b.size() || std::memcmp(a.data(), b.data(), a.size() * sizeof(float)) != 0) fail(what);
}

// Every kernel that reads or writes rows of n floats, in guarded memory; outputs go to `out`.
void run(int64_t n, Guarded::Side side, std::vector<float>& out) {
  Row<float> a(n, side), b(n, side), y(n, side);
  Row<uint16_t> half(n, side);
  Row<int8_t> codes(n, side);
  fill(a, 3.0f);
  fill(b, 0.1f);
  const auto keep = [&](const Row<float>& row) { out.insert(out.end(), row.data(), row.data() + row.size); };
  const auto reset = [&] { std::memcpy(y.data(), b.data(), static_cast<size_t>(n) * sizeof(float)); };
  to_f16(b.data(), half.data(), n);
  float scale = 0.0f;
  out.push_back(static_cast<float>(quantize_row(a.data(), n, codes.data(), &scale)));
  out.push_back(scale);
  out.push_back(dot(a.data(), b.data(), n));
  out.push_back(dot_f16(a.data(), half.data(), n));
  reset();
  axpy(0.37f, a.data(), y.data(), n);
  axpy_f16(-1.7f, half.data(), y.data(), n);
  axpy_i8(0.013f, codes.data(), y.data(), n);
  keep(y);
  silu_mul(a.data(), b.data(), y.data(), n);
  keep(y);
  gelu_tanh_mul(a.data(), b.data(), y.data(), n);
  keep(y);
  relu2_mul(a.data(), b.data(), y.data(), n);
  keep(y);
  for (int64_t i = 0; i < n; ++i) {
    const float positive = a.data()[i] > 0.0f ? a.data()[i] : 0.0f;
    if (y.data()[i] != positive * positive * b.data()[i]) fail("relu2_mul at " + std::to_string(i));
  }
  rmsnorm(a.data(), b.data(), n, 1e-6f, y.data());
  keep(y);
  reset();
  out.push_back(exp_minus_max(y.data(), n));
  keep(y);
}

// int8 keys and values: the products are those of the same whole numbers as floats, bit for bit.
void run_int8(int64_t rows, int64_t cols, int64_t tokens, Guarded::Side side, std::vector<float>& out) {
  Row<int8_t> codes(rows * cols, side);
  Row<float> floats(rows * cols, side), x(tokens * cols, side), y(tokens * rows, side);
  for (int64_t i = 0; i < rows * cols; ++i) floats.data()[i] = codes.data()[i] = static_cast<int8_t>(g_random());
  fill(x, 1.0f);
  matmul(FloatMatrix{rows, cols, FloatType::kF32, floats.data()}, x.data(), tokens, cols, y.data(), rows, 0, rows);
  const std::vector<float> expected = y.copy();
  matmul(FloatMatrix{rows, cols, FloatType::kI8, codes.data()}, x.data(), tokens, cols, y.data(), rows, 0, rows);
  same(y.copy(), expected, "int8 matmul " + std::to_string(rows) + " x " + std::to_string(cols));
  Row<float> one(cols, side), two(cols, side);
  fill(one, 1.0f);
  std::memcpy(two.data(), one.data(), static_cast<size_t>(cols) * sizeof(float));
  axpy(0.3f, floats.data(), one.data(), cols);
  axpy_i8(0.3f, codes.data(), two.data(), cols);
  same(two.copy(), one.copy(), "axpy_i8 " + std::to_string(cols));
  out.insert(out.end(), expected.begin(), expected.end());
}

// Tiles of a product and of a mix change no bit: each sum is that of `dot` and of `axpy`, row by row.
void run_tiles(FloatType type, int64_t rows, int64_t cols, int64_t tokens, Guarded::Side side, std::vector<float>& out) {
  const std::string what = "type " + std::to_string(static_cast<int>(type)) + ", " + std::to_string(rows) + " x " +
                           std::to_string(cols) + ", " + std::to_string(tokens) + " tokens";
  Row<float> drawn(rows * cols, side), wide(rows * cols, side), x(tokens * cols, side), y(tokens * rows, side);
  Row<uint8_t> stored(rows * cols * float_bytes(type), side);
  fill(drawn, 1.0f);
  fill(x, 1.0f);
  switch (type) {
    case FloatType::kF32: std::memcpy(stored.data(), drawn.data(), static_cast<size_t>(stored.size)); break;
    case FloatType::kF16: to_f16(drawn.data(), reinterpret_cast<uint16_t*>(stored.data()), drawn.size); break;
    case FloatType::kBF16:
      for (int64_t i = 0; i < drawn.size; ++i)
        std::memcpy(stored.data() + 2 * i, reinterpret_cast<const uint8_t*>(drawn.data() + i) + 2, 2);
      break;
    case FloatType::kI8:
      for (int64_t i = 0; i < stored.size; ++i) stored.data()[i] = static_cast<uint8_t>(g_random());
      break;
  }
  const FloatMatrix m = {rows, cols, type, stored.data()};
  widen(m, 0, rows, wide.data());
  std::vector<float> row(static_cast<size_t>(cols));
  for (int64_t r = 0; r < rows && type != FloatType::kI8; ++r) {  // the slow twin knows no int8
    dequantize_row(m, r, row.data());
    same(std::vector<float>(wide.data() + r * cols, wide.data() + (r + 1) * cols), row, "widen, " + what);
  }
  matmul(m, x.data(), tokens, cols, y.data(), rows, 0, rows);
  for (int64_t t = 0; t < tokens; ++t)
    for (int64_t r = 0; r < rows; ++r)
      if (y.data()[t * rows + r] != dot(x.data() + t * cols, wide.data() + r * cols, cols)) fail("matmul, " + what);
  // The same numbers as shares: y has a value for each token and row.
  Row<float> mixed(tokens * cols, side), plain(tokens * cols, side);
  std::memcpy(mixed.data(), x.data(), static_cast<size_t>(mixed.size) * sizeof(float));
  std::memcpy(plain.data(), x.data(), static_cast<size_t>(plain.size) * sizeof(float));
  mix(m, y.data(), tokens, rows, mixed.data(), cols);
  for (int64_t t = 0; t < tokens; ++t)
    for (int64_t r = 0; r < rows; ++r)
      axpy(y.data()[t * rows + r], wide.data() + r * cols, plain.data() + t * cols, cols);
  same(mixed.copy(), plain.copy(), "mix, " + what);
  out.insert(out.end(), mixed.data(), mixed.data() + mixed.size);
}

std::vector<float> outputs() {
  g_random.seed(7);
  std::vector<float> out;
  for (int64_t n = 1; n <= 300; n += n < 100 ? 1 : 13) {
    for (const Guarded::Side side : {Guarded::kFront, Guarded::kBack}) run(n, side, out);
  }
  for (int64_t cols = 1; cols <= 130; cols += cols < 70 ? 1 : 11) {
    for (const Guarded::Side side : {Guarded::kFront, Guarded::kBack}) {
      run_int8(1 + cols % 9, cols, 1 + cols % 6, side, out);
    }
  }
  for (const FloatType type : {FloatType::kF32, FloatType::kF16, FloatType::kBF16, FloatType::kI8}) {
    for (int64_t cols = 1; cols <= 130; cols += cols < 20 ? 1 : 11) {
      for (int64_t tokens = 1; tokens <= 9; ++tokens) {
        run_tiles(type, 1 + (cols + tokens) % 11, cols, tokens, tokens % 2 ? Guarded::kFront : Guarded::kBack, out);
      }
    }
    run_tiles(type, 13, 128, 17, Guarded::kBack, out);
  }
  return out;
}

}  // namespace

int main(int argc, char** argv) {
  if (argc > 1) set_isa(std::string(argv[1]));  // one that this CPU lacks ends the program with an error
  const Isa wanted = current_isa();
  set_isa(Isa::kScalar);
  const std::vector<float> expected = outputs();
  for (const Isa isa : available_isas()) {
    if (argc > 1 && isa != wanted) continue;
    set_isa(isa);
    same(outputs(), expected, "floats differ from the scalar path");
    std::printf("%s: float kernels in guarded memory, the scalar path's bits; int8 rows equal floats\n", isa_name(isa));
  }
  std::printf("all checks passed\n");
  return 0;
}
