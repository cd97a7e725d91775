// Which instruction set runs, and the public functions that lead to it.

#include <atomic>
#include <cstdlib>
#include <mutex>

#include "bitdistill/errors.h"
#include "bitdistill/kernels.h"
#include "kernels/table.h"

#if defined(BITDISTILL_X86)
#include <cpuid.h>
#endif
#if defined(BITDISTILL_ARM64) && defined(__linux__)
#include <asm/hwcap.h>
#include <sys/auxv.h>
#endif

namespace bitdistill {
namespace {

struct Row {
  const KernelTable* table;
  const char* name;
  bool (*runs)();
  bool automatic;  // false: only by name, until it has run on its own hardware or under emulation
};

bool always() { return true; }

#if defined(BITDISTILL_X86)
// __builtin_cpu_supports asks cpuid and, for the wide registers, whether the operating system saves them (xgetbv).
bool has_avx2() {
  // f16c is not among clang 14's names: cpuid leaf 1, ecx bit 29.
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  const bool has_f16c = __get_cpuid(1, &eax, &ebx, &ecx, &edx) && (ecx >> 29 & 1);
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_f16c;
}
#if defined(BITDISTILL_AVXVNNI_AS_EVEX)
bool has_avxvnni() {  // a test build, see kernels/avxvnni.cpp
  return has_avx2() && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512vnni");
}
#else
// Not among the names of __builtin_cpu_supports in the oldest compilers: cpuid leaf 7, subleaf 1, eax bit 4.
bool has_avxvnni() {
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  return has_avx2() && __get_cpuid_count(7, 1, &eax, &ebx, &ecx, &edx) && (eax >> 4 & 1);
}
#endif
bool has_avx512vnni() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
         __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512vbmi");
}
#endif
#if defined(BITDISTILL_ARM64)
bool has_dot_product() {
#if defined(__linux__)
  return (getauxval(AT_HWCAP) & HWCAP_ASIMDDP) != 0;
#else
  return true;  // every 64-bit Apple processor that runs a supported system
#endif
}
#endif

// Best last.
const Row kRows[] = {
    {&kScalarKernels, "scalar", always, true},
#if defined(BITDISTILL_X86)
    {&kAvx2Kernels, "avx2", has_avx2, true},
    {&kAvxVnniKernels, "avxvnni", has_avxvnni, false},
    {&kAvx512VnniKernels, "avx512vnni", has_avx512vnni, true},
#endif
#if defined(BITDISTILL_ARM64)
    {&kNeonDotKernels, "neondot", has_dot_product, true},
#endif
};

std::string available_names() {
  std::string names = "auto";
  for (const Row& row : kRows)
    if (row.runs()) names += std::string(", ") + row.name;
  return names;
}

const KernelTable* find(const std::string& name, const char* where) {
  const KernelTable* found = nullptr;
  for (const Row& row : kRows)
    if ((name == "auto" ? row.automatic : name == row.name) && row.runs()) found = row.table;
  if (!found)
    throw ModelError(std::string(where) + ": instruction set '" + name +
                     "' is unknown or not available on this CPU; choose one of " + available_names());
  return found;
}

std::atomic<const KernelTable*> g_table{nullptr};

}  // namespace

const KernelTable& kernels() {
  const KernelTable* table = g_table.load(std::memory_order_acquire);
  if (!table) {
    const char* wanted = std::getenv("BITDISTILL_ISA");
    table = find(wanted && *wanted ? wanted : "auto", "BITDISTILL_ISA");
    const KernelTable* none = nullptr;
    if (!g_table.compare_exchange_strong(none, table)) table = none;
  }
  return *table;
}

const char* isa_name(Isa isa) {
  switch (isa) {
    case Isa::kScalar: return "scalar";
    case Isa::kAvx2: return "avx2";
    case Isa::kAvxVnni: return "avxvnni";
    case Isa::kAvx512Vnni: return "avx512vnni";
    case Isa::kNeonDot: return "neondot";
  }
  return "unknown";
}

std::vector<Isa> available_isas() {
  std::vector<Isa> isas;
  for (const Row& row : kRows)
    if (row.runs()) isas.push_back(row.table->isa);
  return isas;
}

Isa current_isa() { return kernels().isa; }
void set_isa(Isa isa) { set_isa(std::string(isa_name(isa))); }
void set_isa(const std::string& name) { g_table.store(find(name, "set_isa"), std::memory_order_release); }

// ------------------------------------------------------------------------------------------- activations

int32_t quantize_row(const float* x, int64_t n, int8_t* codes, float* scale) {
  return kernels().quantize_row(x, n, codes, scale);
}

void quantize_into(QuantizedRows& rows, int64_t t, const float* x) {
  const size_t i = static_cast<size_t>(t);
  rows.sums[i] = kernels().quantize_row(x, rows.cols, rows.row(t), &rows.scales[i]);
}

void rmsnorm(const float* x, const float* gain, int64_t n, float eps, float* y) {
  kernels().rmsnorm(x, gain, n, eps, y);
}

void rmsnorm_quantize_into(QuantizedRows& rows, int64_t t, const float* x, const float* gain, float eps,
                           float* scratch) {
  kernels().rmsnorm(x, gain, rows.cols, eps, scratch);  // stays in the first-level cache for the second pass
  quantize_into(rows, t, scratch);
}

// ---------------------------------------------------------------------------------------------- products

namespace {

void check(int64_t rows, int64_t cols, int64_t x_cols, int64_t row_begin, int64_t row_end) {
  if (x_cols != cols)
    throw ModelError("matmul: activations have " + std::to_string(x_cols) + " columns, the matrix " +
                     std::to_string(cols) + "; the layer does not fit its input");
  if (row_begin < 0 || row_begin > row_end || row_end > rows || row_begin % kGroupRows != 0 ||
      (row_end % kGroupRows != 0 && row_end != rows))
    throw ModelError("matmul: rows " + std::to_string(row_begin) + " to " + std::to_string(row_end) + " of " +
                     std::to_string(rows) + " are no range of whole groups of 16");
}

ActivationView view(const QuantizedRows& x) {
  return {x.row(0), x.stride, x.scales.data(), x.sums.data(), x.tokens};
}

void ternary(const TernaryMatrix& m, const QuantizedRows& x, const OutputView& out, int64_t row_begin,
             int64_t row_end, bool use_gemm) {
  check(m.rows, m.cols, x.cols, row_begin, row_end);
  if (row_begin == row_end || x.tokens == 0) return;
  const TernaryView w = {m.codes,  m.rows,  m.quads(), m.group_quads(),
                         m.layout, m.scale, m.row_scales.empty() ? nullptr : m.row_scales.data()};
  const KernelTable& table = kernels();
  if (!use_gemm) return table.ternary_gemv(w, view(x), out, row_begin, row_end);
  thread_local AlignedBuffer tile;
  const size_t bytes = static_cast<size_t>(table.gemm_tile_groups * tile_bytes(w.quads));
  if (tile.size() < bytes) tile = AlignedBuffer(bytes);
  table.ternary_gemm(w, view(x), out, row_begin, row_end, tile.data());
}

void int8(const Int8Matrix& m, const QuantizedRows& x, const OutputView& out, int64_t row_begin, int64_t row_end) {
  check(m.rows, m.cols, x.cols, row_begin, row_end);
  if (row_begin == row_end || x.tokens == 0) return;
  const Int8View w = {m.codes, m.rows, m.block_count(), m.row_scales.data()};
  kernels().int8_matmul(w, view(x), out, row_begin, row_end);
}

void int3(const Int3Matrix& m, const QuantizedRows& x, const OutputView& out, int64_t row_begin, int64_t row_end) {
  check(m.rows, m.cols, x.cols, row_begin, row_end);
  if (row_begin == row_end || x.tokens == 0) return;
  kernels().int3_matmul({m.codes, m.rows, m.block_count(), m.row_scales.data()}, view(x), out, row_begin, row_end);
}

}  // namespace

void gemv(const TernaryMatrix& matrix, const QuantizedRows& x, float* y, int64_t ldy, int64_t row_begin,
          int64_t row_end) {
  ternary(matrix, x, {y, nullptr, ldy}, row_begin, row_end, false);
}
void gemm(const TernaryMatrix& matrix, const QuantizedRows& x, float* y, int64_t ldy, int64_t row_begin,
          int64_t row_end) {
  ternary(matrix, x, {y, nullptr, ldy}, row_begin, row_end, true);
}
void matmul(const TernaryMatrix& matrix, const QuantizedRows& x, float* y, int64_t ldy, int64_t row_begin,
            int64_t row_end) {
  ternary(matrix, x, {y, nullptr, ldy}, row_begin, row_end, x.tokens > kernels().gemv_tokens);
}
void matmul_i32(const TernaryMatrix& matrix, const QuantizedRows& x, int32_t* y, int64_t ldy, int64_t row_begin,
                int64_t row_end, bool use_gemm) {
  ternary(matrix, x, {nullptr, y, ldy}, row_begin, row_end, use_gemm);
}
void matmul(const Int8Matrix& matrix, const QuantizedRows& x, float* y, int64_t ldy, int64_t row_begin,
            int64_t row_end) {
  int8(matrix, x, {y, nullptr, ldy}, row_begin, row_end);
}
void matmul_i32(const Int8Matrix& matrix, const QuantizedRows& x, int32_t* y, int64_t ldy, int64_t row_begin,
                int64_t row_end) {
  int8(matrix, x, {nullptr, y, ldy}, row_begin, row_end);
}
void matmul(const Int3Matrix& matrix, const QuantizedRows& x, float* y, int64_t ldy, int64_t row_begin,
            int64_t row_end) {
  int3(matrix, x, {y, nullptr, ldy}, row_begin, row_end);
}
void matmul_i32(const Int3Matrix& matrix, const QuantizedRows& x, int32_t* y, int64_t ldy, int64_t row_begin,
                int64_t row_end) {
  int3(matrix, x, {nullptr, y, ldy}, row_begin, row_end);
}
int32_t bit_dot(const uint8_t* bits, int64_t blocks, const int8_t* x) { return kernels().bit_dot(bits, blocks, x); }
void spread_columns(const int8_t* x, int64_t cols, int8_t* spread) {
  for (int64_t i = 0; i < (cols + 255) / 256 * 256; ++i) spread[i / 256 * 256 + i % 8 * 32 + i % 256 / 8] = i < cols ? x[i] : 0;
}
void matmul(const FloatMatrix& matrix, const float* x, int64_t tokens, int64_t ldx, float* y, int64_t ldy,
            int64_t row_begin, int64_t row_end) {
  if (row_begin < 0 || row_begin > row_end || row_end > matrix.rows)
    throw ModelError("matmul: rows " + std::to_string(row_begin) + " to " + std::to_string(row_end) +
                     " are not within the " + std::to_string(matrix.rows) + " of the matrix");
  const FloatView w = {matrix.data, matrix.rows, matrix.cols, matrix.type};
  kernels().float_matmul(w, x, tokens, ldx, y, ldy, row_begin, row_end);
}

// ------------------------------------------------------------------------------------ float vector kernels

float dot(const float* a, const float* b, int64_t n) { return kernels().dot(a, b, n); }
float dot_f16(const float* a, const uint16_t* b, int64_t n) { return kernels().dot_f16(a, b, n); }
void axpy(float alpha, const float* x, float* y, int64_t n) { kernels().axpy(alpha, x, y, n); }
void axpy_f16(float alpha, const uint16_t* x, float* y, int64_t n) { kernels().axpy_f16(alpha, x, y, n); }
void axpy_i8(float alpha, const int8_t* x, float* y, int64_t n) { kernels().axpy_i8(alpha, x, y, n); }
void mix(const FloatMatrix& values, const float* shares, int64_t groups, int64_t ld, float* y, int64_t ldy) {
  kernels().mix({values.data, values.rows, values.cols, values.type}, shares, groups, ld, y, ldy);
}
void widen(const FloatMatrix& matrix, int64_t row_begin, int64_t row_end, float* y) {
  kernels().widen({matrix.data, matrix.rows, matrix.cols, matrix.type}, row_begin, row_end, y);
}
void to_f16(const float* x, uint16_t* y, int64_t n) { kernels().to_f16(x, y, n); }
void silu_mul(const float* gate, const float* up, float* y, int64_t n) { kernels().silu_mul(gate, up, y, n); }
void gelu_tanh_mul(const float* gate, const float* up, float* y, int64_t n) {
  kernels().gelu_tanh_mul(gate, up, y, n);
}
void relu2_mul(const float* gate, const float* up, float* y, int64_t n) { kernels().relu2_mul(gate, up, y, n); }
float exp_minus_max(float* x, int64_t n) { return kernels().exp_minus_max(x, n); }

}  // namespace bitdistill
