// Kernels of the native engine: packed ternary matrices, int8 activations, exact integer products.
//
// The contract is that of quant/ternary.py and quant/linear.py (docs/format.md, "Scale and arithmetic"):
//
//   amax = max(max|x|, 1e-5);  q_i = clamp(rint(x_i * 127 / amax), -128, 127);  x_scale = amax / 127
//   y_o  = float(sum_i q_i * code_oi) * (x_scale * w_scale)
//
// in float32, multiplication before division, the sum an exact integer. Every instruction set gives the same
// integers, hence the same y bit for bit; so does every thread count. Float kernels (norms, float matrices,
// softmax, ...) agree to rounding between instruction sets, and bit for bit between thread counts and between
// one token alone and the same token in a batch.
//
// Shapes: O output rows, I input columns (in_features), T tokens. All matrices are row-major before packing.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <utility>
#include <vector>

namespace bitdistill {

// ---------------------------------------------------------------------------------------------- dispatch

enum class Isa { kScalar, kAvx2, kAvxVnni, kAvx512Vnni, kNeonDot };

const char* isa_name(Isa isa);  // "scalar", "avx2", "avxvnni", "avx512vnni", "neondot"
// Instruction sets that are compiled in and that this CPU and operating system can run, best last. "auto" takes the
// best of those that were tested on hardware or under emulation: avxvnni, so far, only runs when asked for by name.
std::vector<Isa> available_isas();
// The instruction set in use: the best available, or the one named by the environment variable BITDISTILL_ISA
// when the library is first used, or the one of the last set_isa call. A name that is unknown or that this CPU
// lacks throws ModelError (never a silent fallback).
Isa current_isa();
void set_isa(Isa isa);
void set_isa(const std::string& name);  // also "auto"

// ----------------------------------------------------------------------------------------------- storage

// Owning, 64-byte aligned, zero-initialised bytes; move-only. Large ones lie in huge pages where there are any.
class AlignedBuffer {
 public:
  AlignedBuffer() = default;
  explicit AlignedBuffer(size_t bytes);
  // For weights that stay: buffers of any size share huge pages, which are given back when all of them are gone.
  static AlignedBuffer for_weights(size_t bytes);
  AlignedBuffer(AlignedBuffer&& other) noexcept { *this = std::move(other); }
  AlignedBuffer& operator=(AlignedBuffer&& other) noexcept {
    owner_ = std::move(other.owner_);
    data_ = std::exchange(other.data_, nullptr);
    size_ = std::exchange(other.size_, 0);
    return *this;
  }
  uint8_t* data() { return data_; }
  const uint8_t* data() const { return data_; }
  size_t size() const { return size_; }

 private:
  std::shared_ptr<void> owner_;
  uint8_t* data_ = nullptr;
  size_t size_ = 0;
};

// Rows are stored in groups of 16, a group as a sequence of 64-byte blocks; byte 4 * r + j of a block belongs to
// row r of the group. With block number b:
//   kTwoBitRows16: 16 columns a block. Bits 2p, 2p + 1 hold code + 1 of column 16 b + 4 p + j, p = 0..3.
//   kBase3Rows16:  five quads of four columns a block. The byte is sum over p = 0..4 of 3^p * (code + 1) of column
//                  4 (5 b + p - lead) + j. Groups follow each other without padding: group g's first quad is quad
//                  g * ceil(cols / 4) of the whole stream, `lead` places into its first block, so that a matrix takes
//                  1.6 bits a weight whatever its width.
// So four consecutive activations, broadcast, meet one digit of all sixteen rows, and one cache line of output
// is one group. Columns and rows beyond the matrix hold code 0.
enum class Layout { kTwoBitRows16, kBase3Rows16 };

constexpr int64_t kGroupRows = 16;
constexpr int64_t kBlockBytes = 64;
constexpr int64_t block_quads(Layout layout) { return layout == Layout::kTwoBitRows16 ? 4 : 5; }

// Largest in_features: float32(sum) is exact below 2^24 = 127 * 132104 (docs/format.md). int32 accumulators of
// every kernel hold far more (their own bounds are stated beside them).
constexpr int64_t kMaxColumns = (int64_t{1} << 24) / 127;

struct TernaryMatrix {
  int64_t rows = 0, cols = 0;
  Layout layout = Layout::kTwoBitRows16;
  float scale = 1.0f;             // w_hat = codes * scale
  std::vector<float> row_scales;  // empty, or one scale a row that replaces `scale`
  const uint8_t* codes = nullptr;  // bytes(), 64-byte aligned
  AlignedBuffer storage;           // owns `codes`, or is empty when they are mapped from elsewhere

  int64_t group_count() const { return (rows + kGroupRows - 1) / kGroupRows; }
  int64_t quads() const { return (cols + 3) / 4; }
  // Quads from one group to the next: whole blocks in two bits, no padding in base 3.
  int64_t group_quads() const { return layout == Layout::kTwoBitRows16 ? (quads() + 3) / 4 * 4 : quads(); }
  int64_t bytes() const {
    const int64_t per_block = block_quads(layout);
    return (group_count() * group_quads() + per_block - 1) / per_block * kBlockBytes;
  }
};

// From the student's file (docs/format.md): row-major, ceil(cols / 4) bytes a row, value = code + 1, four codes a
// byte, low bits first. `name` is the tensor's name, for errors.
// Throws ArtifactError: value 3, padding that is not value 1; ModelError: sizes out of range.
TernaryMatrix repack(const uint8_t* codes_2bit, int64_t rows, int64_t cols, Layout layout, float scale,
                     const std::string& name = "codes");
// Codes of one row, -1, 0, 1: the slow inverse.
void unpack_row(const TernaryMatrix& matrix, int64_t row, int8_t* codes);

// Row-wise quantized int8 matrix (embedding and output head): w_hat[o] = codes[o] * row_scales[o].
// Blocks of 64 bytes as above, one signed byte a column: byte 4 r + j of block b is column 4 b + j of row r.
struct Int8Matrix {
  int64_t rows = 0, cols = 0;
  std::vector<float> row_scales;
  const int8_t* codes = nullptr;
  AlignedBuffer storage;

  int64_t group_count() const { return (rows + kGroupRows - 1) / kGroupRows; }
  int64_t block_count() const { return (cols + 3) / 4; }
  int64_t group_bytes() const { return block_count() * kBlockBytes; }
};

// Row-wise quantized 3-bit matrix (screen of the output head): w_hat[o] = codes[o] * row_scales[o], codes -4 to 3.
// Three blocks of 64 bytes as above, A, B and C, hold eight quads. With d_p = code + 4 of column 32 b + 4 p + j of row r,
// byte 4 r + j is
//   A: d_0 + 8 d_1 + 64 (d_6 mod 4),   B: d_2 + 8 d_3 + 64 (d_7 mod 4),   C: d_4 + 8 d_5 + 64 (d_6 / 4) + 128 (d_7 / 4).
struct Int3Matrix {
  int64_t rows = 0, cols = 0;
  std::vector<float> row_scales;
  const uint8_t* codes = nullptr;
  AlignedBuffer storage;

  int64_t group_count() const { return (rows + kGroupRows - 1) / kGroupRows; }
  int64_t block_count() const { return (cols + 31) / 32; }  // of three
  int64_t group_bytes() const { return block_count() * 3 * kBlockBytes; }
};

// kI8: whole numbers that the caller scales (cached keys and values); only `matmul` on floats takes it.
enum class FloatType { kF32, kBF16, kF16, kI8 };
constexpr int64_t float_bytes(FloatType type) {
  return type == FloatType::kF32 ? 4 : type == FloatType::kI8 ? 1 : 2;
}

// A row-major float matrix that somebody else owns (a mapped file).
struct FloatMatrix {
  int64_t rows = 0, cols = 0;
  FloatType type = FloatType::kF32;
  const void* data = nullptr;
};

// absmax int8 a row: scale = max|w| / 127 (1 for a row of zeros), code = rint(w / scale).
Int8Matrix quantize_int8(const FloatMatrix& matrix);
void dequantize_row(const Int8Matrix& matrix, int64_t row, float* out);
void dequantize_row(const FloatMatrix& matrix, int64_t row, float* out);

// ------------------------------------------------------------------------------------------- activations

// int8 activations of T tokens: row t at row(t), zero from `cols` to `stride` and for kFrontBytes before the first
// row (every other row has the end of the one before it there).
struct QuantizedRows {
  static constexpr int64_t kFrontBytes = 64;  // kernels may read whole blocks before a row and beyond its cols

  int64_t tokens = 0, cols = 0;
  int64_t stride = 0;  // a multiple of 64, at least cols + 64
  AlignedBuffer codes;
  std::vector<float> scales;  // amax / 127
  std::vector<int32_t> sums;  // sum of the codes of a row

  // Makes room for tokens x cols (never shrinks; zeroes the padding).
  void resize(int64_t new_tokens, int64_t new_cols);
  int8_t* row(int64_t t) { return reinterpret_cast<int8_t*>(codes.data()) + kFrontBytes + t * stride; }
  const int8_t* row(int64_t t) const {
    return reinterpret_cast<const int8_t*>(codes.data()) + kFrontBytes + t * stride;
  }
};

// q and scale of one row; returns the sum of the codes. Throws nothing: NaN and Inf must be refused by the caller
// (their codes are unspecified; no memory is harmed).
int32_t quantize_row(const float* x, int64_t n, int8_t* codes, float* scale);
// Into rows.row(t), scales[t], sums[t] (after rows.resize).
void quantize_into(QuantizedRows& rows, int64_t t, const float* x);
// RMSNorm, then quantize: y = x * rsqrt(mean(x^2) + eps) * gain, quantized. `scratch` holds n floats.
// SubLN and the norms before q/k/v and gate/up. For Gemma's 1 + w pass gains with 1 added at load.
void rmsnorm_quantize_into(QuantizedRows& rows, int64_t t, const float* x, const float* gain, float eps,
                           float* scratch);
// y may be x.
void rmsnorm(const float* x, const float* gain, int64_t n, float eps, float* y);

// ---------------------------------------------------------------------------------------------- products
// All compute rows [row_begin, row_end) of y for every token: y[t * ldy + o]. row_begin is a multiple of 16;
// row_end too, or equal to matrix.rows. Nothing outside that range is written. Split work between threads by
// ThreadPool::parallel_rows. x.cols must equal matrix.cols.

// Decode: any number of tokens, best for a handful; weights are read once for all of them.
void gemv(const TernaryMatrix& matrix, const QuantizedRows& x, float* y, int64_t ldy, int64_t row_begin,
          int64_t row_end);
// Prefill and batches: a tile of weights is unpacked once into bytes and meets all tokens.
void gemm(const TernaryMatrix& matrix, const QuantizedRows& x, float* y, int64_t ldy, int64_t row_begin,
          int64_t row_end);
// gemv or gemm by the number of tokens; both give the same bits.
void matmul(const TernaryMatrix& matrix, const QuantizedRows& x, float* y, int64_t ldy, int64_t row_begin,
            int64_t row_end);
// The exact sums instead of floats: the tests' view.
void matmul_i32(const TernaryMatrix& matrix, const QuantizedRows& x, int32_t* y, int64_t ldy, int64_t row_begin,
                int64_t row_end, bool use_gemm);

// y = float(sum) * (x_scale * row_scale).
void matmul(const Int8Matrix& matrix, const QuantizedRows& x, float* y, int64_t ldy, int64_t row_begin,
            int64_t row_end);
void matmul_i32(const Int8Matrix& matrix, const QuantizedRows& x, int32_t* y, int64_t ldy, int64_t row_begin,
                int64_t row_end);

void matmul(const Int3Matrix& matrix, const QuantizedRows& x, float* y, int64_t ldy, int64_t row_begin,
            int64_t row_end);
void matmul_i32(const Int3Matrix& matrix, const QuantizedRows& x, int32_t* y, int64_t ldy, int64_t row_begin,
                int64_t row_end);

// Sum of the x whose bit is set. `blocks` of 256 columns, 32 bytes of bits each: column 8 i + p of a block is bit p of
// byte i, and stands at x[32 p + i]: `spread_columns` orders it so, with zeros from `cols` to the end of the block.
int32_t bit_dot(const uint8_t* bits, int64_t blocks, const int8_t* x);
void spread_columns(const int8_t* x, int64_t cols, int8_t* spread);

// Float weights and float32 activations (row t at x + t * ldx); float32 accumulation.
void matmul(const FloatMatrix& matrix, const float* x, int64_t tokens, int64_t ldx, float* y, int64_t ldy,
            int64_t row_begin, int64_t row_end);

// ------------------------------------------------------------------------------------ float vector kernels

float dot(const float* a, const float* b, int64_t n);
float dot_f16(const float* a, const uint16_t* b, int64_t n);            // b in IEEE half
void axpy(float alpha, const float* x, float* y, int64_t n);            // y += alpha * x
void axpy_f16(float alpha, const uint16_t* x, float* y, int64_t n);
void axpy_i8(float alpha, const int8_t* x, float* y, int64_t n);
// y_g += sum over rows t of shares[g * ld + t] * row t: the bits of axpy row by row.
void mix(const FloatMatrix& values, const float* shares, int64_t groups, int64_t ld, float* y, int64_t ldy);
// Rows [row_begin, row_end) as float32, [rows][cols].
void widen(const FloatMatrix& matrix, int64_t row_begin, int64_t row_end, float* y);
void to_f16(const float* x, uint16_t* y, int64_t n);                    // round to nearest even
void silu_mul(const float* gate, const float* up, float* y, int64_t n);       // silu(gate) * up
void gelu_tanh_mul(const float* gate, const float* up, float* y, int64_t n);  // gelu_tanh(gate) * up
void relu2_mul(const float* gate, const float* up, float* y, int64_t n);      // max(gate, 0)^2 * up
// x_i = exp(x_i - max); returns the sum. Softmax is this, then a division.
float exp_minus_max(float* x, int64_t n);

}  // namespace bitdistill
