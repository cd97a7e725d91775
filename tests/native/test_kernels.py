"""Native kernels against numpy and the PyTorch contract, and the C++ test program built and run."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from bitdistill.errors import ArtifactError, ModelError
from bitdistill.quant.linear import PackedBitLinear, SubLN
from bitdistill.quant.packing import pack_2bit
from bitdistill.quant.ternary import quantize_activations

native = pytest.importorskip("bitdistill.engine._native", reason="the native extension is not built")

ROOT = Path(__file__).resolve().parents[2]
ISAS = native.available_isas()
LAYOUTS = ("2bit", "base3")


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest):
    """Each instruction set of this CPU in turn; the best one again afterwards."""
    native.set_isa(request.param)
    yield request.param
    native.set_isa("auto")


def _problem(rows: int, cols: int, tokens: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Codes int8 [rows, cols], the same packed as in a student's file, int8 activations [tokens, cols]."""
    rng = np.random.default_rng([seed, rows, cols, tokens])
    codes = rng.integers(-1, 2, (rows, cols), dtype=np.int8)
    x = rng.integers(-128, 128, (tokens, cols), dtype=np.int8)
    return codes, pack_2bit(torch.from_numpy(codes)).numpy(), x


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    "shape", [(1, 1, 1), (17, 3, 2), (16, 64, 1), (33, 130, 5), (67, 577, 9), (48, 1024, 30)]
)
def test_sums_are_exact(isa: str, layout: str, shape: tuple[int, int, int]) -> None:
    codes, packed, x = _problem(*shape)
    matrix = native.TernaryMatrix(packed, shape[1], 1.0, layout)
    expected = x.astype(np.int64) @ codes.astype(np.int64).T
    for use_gemm in (False, True):
        np.testing.assert_array_equal(matrix.matmul_i32(x, use_gemm), expected)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_product_equals_packed_layer(isa: str, layout: str) -> None:
    _, packed, _ = _problem(90, 300, 7)
    layer = PackedBitLinear(300, 90, bias=False, subln=False)
    layer.codes.copy_(torch.from_numpy(packed))
    layer.scale.fill_(0.0173)
    x = torch.randn(7, 300, generator=torch.Generator().manual_seed(1)) * 3
    expected = layer(x).numpy()
    matrix = native.TernaryMatrix(packed, 300, float(layer.scale), layout)
    for threads in (1, 2, 5):
        for kernel in ("auto", "gemv", "gemm"):
            np.testing.assert_array_equal(matrix.matmul(x.numpy(), threads, kernel), expected)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_scale_for_each_row(isa: str, layout: str) -> None:
    codes, packed, _ = _problem(35, 90, 6)
    rng = np.random.default_rng(4)
    scales = rng.uniform(0.01, 0.1, 35).astype(np.float32)
    x = rng.normal(size=(6, 90)).astype(np.float32)
    q, x_scales = native.quantize_activations(x)
    sums = (q.astype(np.int64) @ codes.T.astype(np.int64)).astype(np.float32)
    matrix = native.TernaryMatrix(packed, 90, 1.0, layout, scales)
    for kernel in ("gemv", "gemm"):
        np.testing.assert_array_equal(matrix.matmul(x, 2, kernel), sums * (x_scales[:, None] * scales))
    with pytest.raises(ModelError, match="34 values, the matrix has 35 rows"):
        native.TernaryMatrix(packed, 90, 1.0, layout, scales[:34].copy())


def test_quantized_activations_equal_contract(isa: str) -> None:
    generator = torch.Generator().manual_seed(2)
    for cols in (1, 5, 16, 17, 100, 1000):
        x = torch.randn(6, cols, generator=generator)
        x[1] *= 1e-30
        x[2] *= 1e30
        x[3] = 0.0
        x[4, 0] = 1e4
        x[5] = torch.arange(cols) - cols / 2 + 0.5
        codes, scales = native.quantize_activations(x.numpy())
        expected, expected_scales = quantize_activations(x)
        np.testing.assert_array_equal(codes, expected.numpy())
        np.testing.assert_array_equal(scales, expected_scales[:, 0].numpy())


def test_rmsnorm_equals_subln(isa: str) -> None:
    x = torch.randn(4, 333, generator=torch.Generator().manual_seed(3))
    norm = SubLN(333)
    norm.weight.data.uniform_(0.5, 2.0)
    got = native.rmsnorm(x.numpy(), norm.weight.detach().numpy(), 1e-6)
    # One order of summation against another: a few units in the last place.
    np.testing.assert_allclose(got, norm(x).detach().numpy(), rtol=1e-6, atol=1e-7)


def test_base3_needs_fewer_bytes() -> None:
    _, packed, _ = _problem(64, 1280, 1)
    two_bit, base3 = (native.TernaryMatrix(packed, 1280, 1.0, layout) for layout in LAYOUTS)
    assert two_bit.nbytes * 8 / (64 * 1280) == 2.0
    assert base3.nbytes * 8 / (64 * 1280) == 1.6


def test_malformed_codes_are_refused() -> None:
    _, packed, _ = _problem(3, 10, 1)
    bad = packed.copy()
    bad[1, 0] |= 3 << 4
    with pytest.raises(ArtifactError, match="value 3 at row 1, column 2"):
        native.TernaryMatrix(bad, 10, 1.0)
    padding = packed.copy()
    padding[2, 2] ^= 1 << 6
    with pytest.raises(ArtifactError, match="padding of row 2"):
        native.TernaryMatrix(padding, 10, 1.0)
    with pytest.raises(ModelError, match="rows hold 3 bytes; 13 columns need 4"):
        native.TernaryMatrix(packed, 13, 1.0)
    with pytest.raises(ModelError, match="layout"):
        native.TernaryMatrix(packed, 10, 1.0, "3bit")


def test_wrong_arrays_are_refused() -> None:
    _, packed, x = _problem(8, 12, 4)
    matrix = native.TernaryMatrix(packed, 12, 1.0)
    good = x.astype(np.float32)
    wrong = [
        good.astype(np.float64),
        good.T,
        good[::-1],
        good[:, ::-1],
        np.asfortranarray(good),
        good[0],
        [[1.0]],
        None,
    ]
    for value in wrong:
        with pytest.raises(TypeError):
            matrix.matmul(value)
    with pytest.raises(TypeError):
        native.TernaryMatrix(packed.astype(np.int8), 12, 1.0)
    with pytest.raises(ModelError, match="11 columns, the matrix has 12"):
        matrix.matmul(np.ascontiguousarray(good[:, :11]))
    with pytest.raises(ModelError, match="threads"):
        matrix.matmul(good, 0)
    with pytest.raises(ModelError, match="0 x 12"):
        native.TernaryMatrix(packed[:0], 12, 1.0)
    assert matrix.matmul(good[:0]).shape == (0, 8)
    read_only = good.copy()
    read_only.flags.writeable = False
    np.testing.assert_array_equal(matrix.matmul(read_only), matrix.matmul(good))


def test_isa_is_chosen_by_name() -> None:
    assert ISAS[0] == "scalar"
    try:
        for name in ISAS:
            native.set_isa(name)
            assert native.current_isa() == name
        with pytest.raises(ModelError, match="altivec"):
            native.set_isa("altivec")
        assert native.current_isa() == ISAS[-1]
    finally:
        native.set_isa("auto")


def _in_new_process(isa: str) -> subprocess.CompletedProcess[str]:
    code = "from bitdistill.engine import _native; print(_native.current_isa())"
    environment = {**os.environ, "BITDISTILL_ISA": isa}
    return subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False
    )


def test_isa_is_chosen_by_environment() -> None:
    for name in ISAS:
        assert _in_new_process(name).stdout.strip() == name
    refused = _in_new_process("sse9")
    assert refused.returncode != 0
    assert "BITDISTILL_ISA: instruction set 'sse9' is unknown or not available on this CPU" in refused.stderr


@pytest.fixture(scope="session")
def test_program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The C++ test program, built from source."""
    cmake = shutil.which("cmake") or pytest.skip("cmake is not installed")
    build = tmp_path_factory.mktemp("native")
    options = ["-DBITDISTILL_PYTHON=OFF", "-DBITDISTILL_TESTS=ON", "-DBITDISTILL_WERROR=ON"]
    subprocess.run(
        [cmake, "-S", str(ROOT / "native"), "-B", str(build), *options], check=True, capture_output=True
    )
    subprocess.run(
        [cmake, "--build", str(build), "--target", "test_kernels", "test_floats", "-j2"],
        check=True,
        capture_output=True,
    )
    return build / "test_kernels"


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("isa_name", ISAS)
def test_hundred_thousand_shapes(test_program: Path, isa_name: str) -> None:
    """Int64 sums, guard pages, saturation, threads, fork: native/tests/test_kernels.cpp."""
    done = subprocess.run([test_program, "100000", isa_name], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:]
    assert f"{isa_name}: 100000 shapes" in done.stdout


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_float_kernels_in_guarded_memory(test_program: Path) -> None:
    """native/tests/test_floats.cpp, on every instruction set of this CPU."""
    done = subprocess.run(
        [test_program.with_name("test_floats")], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-2000:]
    for name in ISAS:
        assert f"{name}: float kernels in guarded memory" in done.stdout


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.skipif(shutil.which("qemu-x86_64") is None, reason="qemu-user is not installed")
def test_a_processor_without_avx(test_program: Path) -> None:
    """A CPU of 2008 under emulation: the scalar path is taken, no instruction is illegal."""
    emulated = ["qemu-x86_64", "-cpu", "Nehalem"]
    floats = subprocess.run(
        [*emulated, test_program.with_name("test_floats")], capture_output=True, text=True
    )
    assert floats.returncode == 0, floats.stderr[-500:]
    assert floats.stdout.count("guarded memory") == 1
    assert floats.stdout.startswith("scalar:")
    forced = {**os.environ, "BITDISTILL_ISA": "avx2"}
    refused = subprocess.run(
        [*emulated, test_program.with_name("test_floats")], env=forced, capture_output=True
    )
    assert refused.returncode != 0
    assert refused.returncode != -4, "an illegal instruction"
