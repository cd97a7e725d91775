// Kernels for Python: the choice of instruction set, and the products on numpy arrays (tests, research).
//
// Arrays must be C-contiguous and of the exact dtype: anything else is a TypeError, nothing is copied silently.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <memory>
#include <optional>
#include <tuple>

#include "bitdistill/errors.h"
#include "bitdistill/kernels.h"
#include "bitdistill/threads.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace bitdistill {

void register_kernels(nb::module_& module);

namespace {

template <class T, int N>
using In = nb::ndarray<const T, nb::ndim<N>, nb::c_contig, nb::device::cpu>;
template <class T, int N>
using Out = nb::ndarray<nb::numpy, T, nb::ndim<N>>;

template <class T, int N>
Out<T, N> give(std::unique_ptr<std::vector<T>> values, std::initializer_list<std::size_t> shape) {
  T* data = values->data();
  nb::capsule owner(values.release(), [](void* p) noexcept { delete static_cast<std::vector<T>*>(p); });
  return Out<T, N>(data, shape, owner);
}

Layout layout_of(const std::string& name) {
  if (name == "2bit") return Layout::kTwoBitRows16;
  if (name == "base3") return Layout::kBase3Rows16;
  throw ModelError("layout '" + name + "' is not one of 2bit, base3");
}

TernaryMatrix pack(const In<std::uint8_t, 2>& codes, std::int64_t cols, float scale, const std::string& layout,
                   const std::optional<In<float, 1>>& row_scales) {
  const auto rows = static_cast<std::int64_t>(codes.shape(0)), width = static_cast<std::int64_t>(codes.shape(1));
  if (cols < 1 || width != (cols + 3) / 4)
    throw ModelError("codes: rows hold " + std::to_string(width) + " bytes; " + std::to_string(cols) +
                     " columns need " + std::to_string((cols + 3) / 4));
  const Layout chosen = layout_of(layout);
  std::vector<float> scales;
  if (row_scales) {
    scales.assign(row_scales->data(), row_scales->data() + row_scales->shape(0));
    if (static_cast<std::int64_t>(scales.size()) != rows)
      throw ModelError("row_scales: " + std::to_string(scales.size()) + " values, the matrix has " +
                       std::to_string(rows) + " rows; give one a row");
  }
  const nb::gil_scoped_release released;
  TernaryMatrix matrix = repack(codes.data(), rows, cols, chosen, scale);
  matrix.row_scales = std::move(scales);
  return matrix;
}

void check_activations(std::int64_t cols, std::size_t given, std::size_t tokens) {
  if (static_cast<std::size_t>(cols) != given)
    throw ModelError("x: " + std::to_string(given) + " columns, the matrix has " + std::to_string(cols));
  if (tokens > (std::size_t{1} << 20))
    throw ModelError("x: " + std::to_string(tokens) + " tokens; give at most 1048576");
}

QuantizedRows quantized(const In<float, 2>& x) {
  QuantizedRows rows;
  rows.resize(static_cast<std::int64_t>(x.shape(0)), static_cast<std::int64_t>(x.shape(1)));
  for (std::int64_t t = 0; t < rows.tokens; ++t) quantize_into(rows, t, x.data() + t * rows.cols);
  return rows;
}

// T tokens, O rows
Out<float, 2> multiply(const TernaryMatrix& m, const In<float, 2>& x, int threads, const std::string& kernel) {
  check_activations(m.cols, x.shape(1), x.shape(0));
  if (kernel != "auto" && kernel != "gemv" && kernel != "gemm")
    throw ModelError("kernel '" + kernel + "' is not one of auto, gemv, gemm");
  auto y = std::make_unique<std::vector<float>>(x.shape(0) * static_cast<std::size_t>(m.rows));
  {
    const nb::gil_scoped_release released;
    const QuantizedRows rows = quantized(x);
    ThreadPool pool(threads);
    pool.parallel_rows(m.rows, [&](std::int64_t begin, std::int64_t end, int) {
      const auto product = kernel == "auto" ? static_cast<decltype(&gemv)>(matmul) : kernel == "gemv" ? gemv : gemm;
      product(m, rows, y->data(), m.rows, begin, end);
    });
  }
  return give<float, 2>(std::move(y), {x.shape(0), static_cast<std::size_t>(m.rows)});
}

Out<std::int32_t, 2> multiply_i32(const TernaryMatrix& m, const In<std::int8_t, 2>& x, bool use_gemm) {
  check_activations(m.cols, x.shape(1), x.shape(0));
  QuantizedRows rows;
  rows.resize(static_cast<std::int64_t>(x.shape(0)), m.cols);
  for (std::int64_t t = 0; t < rows.tokens; ++t) {
    std::int32_t sum = 0;
    for (std::int64_t i = 0; i < m.cols; ++i) sum += rows.row(t)[i] = x.data()[t * m.cols + i];
    rows.sums[static_cast<std::size_t>(t)] = sum;
  }
  auto y = std::make_unique<std::vector<std::int32_t>>(x.shape(0) * static_cast<std::size_t>(m.rows));
  matmul_i32(m, rows, y->data(), m.rows, 0, m.rows, use_gemm);
  return give<std::int32_t, 2>(std::move(y), {x.shape(0), static_cast<std::size_t>(m.rows)});
}

std::tuple<Out<std::int8_t, 2>, Out<float, 1>> quantize(const In<float, 2>& x) {
  const std::size_t tokens = x.shape(0), cols = x.shape(1);
  auto codes = std::make_unique<std::vector<std::int8_t>>(tokens * cols);
  auto scales = std::make_unique<std::vector<float>>(tokens);
  for (std::size_t t = 0; t < tokens; ++t)
    quantize_row(x.data() + t * cols, static_cast<std::int64_t>(cols), codes->data() + t * cols, &(*scales)[t]);
  return {give<std::int8_t, 2>(std::move(codes), {tokens, cols}), give<float, 1>(std::move(scales), {tokens})};
}

Out<float, 2> normalize(const In<float, 2>& x, const In<float, 1>& gain, float eps) {
  if (gain.shape(0) != x.shape(1))
    throw ModelError("gain: " + std::to_string(gain.shape(0)) + " values, x has " + std::to_string(x.shape(1)) +
                     " columns");
  const std::size_t tokens = x.shape(0), cols = x.shape(1);
  auto y = std::make_unique<std::vector<float>>(tokens * cols);
  for (std::size_t t = 0; t < tokens; ++t)
    rmsnorm(x.data() + t * cols, gain.data(), static_cast<std::int64_t>(cols), eps, y->data() + t * cols);
  return give<float, 2>(std::move(y), {tokens, cols});
}

}  // namespace

void register_kernels(nb::module_& m) {
  m.def(
      "available_isas",
      [] {
        std::vector<std::string> names;
        for (const Isa isa : available_isas()) names.emplace_back(isa_name(isa));
        return names;
      },
      "Instruction sets that this CPU can run, best last.");
  m.def("current_isa", [] { return std::string(isa_name(current_isa())); }, "The instruction set in use.");
  m.def("set_isa", [](const std::string& name) { set_isa(name); }, "isa"_a,
        "Use this instruction set ('auto': the best) from now on, in the whole process.");

  m.def(
      "read_bandwidth",
      [](int threads) {
        const nb::gil_scoped_release released;
        ThreadPool pool(threads);
        return read_bandwidth(pool, bandwidth_memory(std::int64_t{256} << 20));
      },
      "threads"_a, "Bytes a second that this many threads read from memory, measured once over 256 MiB.");

  nb::class_<TernaryMatrix>(m, "TernaryMatrix", "A packed ternary matrix (docs/engine.md).")
      .def("__init__",
           [](TernaryMatrix* self, const In<std::uint8_t, 2>& codes, std::int64_t cols, float scale,
              const std::string& layout, const std::optional<In<float, 1>>& row_scales) {
             new (self) TernaryMatrix(pack(codes, cols, scale, layout, row_scales));
           },
           "codes"_a.noconvert(), "cols"_a, "scale"_a, "layout"_a = "2bit", "row_scales"_a.noconvert() = nb::none(),
           "From the codes of a packed student (docs/format.md): uint8 [O, ceil(cols / 4)]. row_scales: float32 [O], one "
           "scale a row in place of `scale`.")
      .def_ro("rows", &TernaryMatrix::rows)
      .def_ro("cols", &TernaryMatrix::cols)
      .def_prop_ro("nbytes", &TernaryMatrix::bytes)
      .def("matmul", &multiply, "x"_a.noconvert(), "threads"_a = 1, "kernel"_a = "auto",
           "float32 [T, cols] -> float32 [T, O]; kernel: 'auto', 'gemv' or 'gemm' (the same bits).")
      .def("matmul_i32", &multiply_i32, "x"_a.noconvert(), "use_gemm"_a = false,
           "int8 [T, cols] -> the exact sums, int32 [T, O].");

  m.def("quantize_activations", &quantize, "x"_a.noconvert(), "float32 [T, I] -> int8 [T, I], scales float32 [T].");
  m.def("rmsnorm", &normalize, "x"_a.noconvert(), "gain"_a.noconvert(), "eps"_a = 1e-6f,
        "float32 [T, I], [I] -> float32 [T, I].");
}

}  // namespace bitdistill
