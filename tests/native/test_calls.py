"""Generated calls of the kernels (N6): right arguments give the exact result, wrong ones an exception."""

from __future__ import annotations

import random
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch

from bitdistill.errors import ArtifactError, ModelError
from bitdistill.quant.packing import pack_2bit

native = pytest.importorskip("bitdistill.engine._native", reason="the native extension is not built")

REFUSED = (TypeError, ValueError, ModelError, ArtifactError, OverflowError)
ISAS = native.available_isas()
COLUMNS = (1, 3, 4, 5, 16, 17, 20, 33)
DTYPES = ("float32", "float64", "float16", "int8", "uint8", "int32", "int64", "bool", "complex64")


def arrays(rng: np.random.Generator) -> list[Any]:
    """Arrays of every dtype, rank and memory order, and things that are no arrays."""
    made: list[Any] = [
        None,
        3,
        2.5,
        "x",
        b"abcd",
        [[1.0]],
        (),
        {},
        object(),
        np.float32(1),
        memoryview(b"abcd"),
    ]
    for dtype in DTYPES:
        for cols in COLUMNS:
            for rows in (0, 1, 2, 7):
                whole = rng.integers(-100, 100, (rows, cols)).astype(dtype)
                read_only = whole.copy()
                read_only.flags.writeable = False
                made += [
                    whole,
                    read_only,
                    whole.T,
                    whole[::-1],
                    whole[:, ::-1],
                    whole[:, ::2],
                    whole[:1, : cols // 2],
                ]
        made += [np.zeros((), dtype), np.zeros(4, dtype), np.zeros((2, 3, 4), dtype), np.zeros((0, 0), dtype)]
        made.append(np.lib.stride_tricks.as_strided(np.ones(1, dtype), (5, 4), (0, 0)))
        made.append(np.zeros((3, 4), np.dtype(dtype).newbyteorder(">")))
        made.append(
            np.frombuffer(bytes(4 * 8 * np.dtype(dtype).itemsize + 1), np.uint8)[1:].view(dtype).reshape(8, 4)
        )
    packed = [
        pack_2bit(torch.from_numpy(rng.integers(-1, 2, (o, i), dtype=np.int8))).numpy()
        for o in (1, 17)
        for i in COLUMNS
    ]
    return made + packed


def fits(x: Any, dtype: str, rank: int = 2) -> bool:
    """Whether a kernel must take it: exact dtype and rank, C-contiguous."""
    return (
        isinstance(x, np.ndarray)
        and x.dtype == dtype
        and x.dtype.isnative
        and x.ndim == rank
        and x.flags.c_contiguous
    )


class Calls:
    """One generated call after another, counted by outcome.

    Each method chooses arguments and returns whether they are right, the call, and a check of its result.
    """

    def __init__(self, seed: int) -> None:
        rng = np.random.default_rng(seed)
        self.random, self.outcomes = random.Random(seed), Counter[str]()
        self.arrays = arrays(rng)
        self.matrices = []
        for cols in COLUMNS:
            codes = rng.integers(-1, 2, (int(rng.integers(1, 40)), cols), dtype=np.int8)
            packed = pack_2bit(torch.from_numpy(codes)).numpy()
            for layout in ("2bit", "base3"):
                self.matrices.append(
                    (native.TernaryMatrix(packed, cols, 0.5, layout), codes.astype(np.int64))
                )
        self.good = {
            (dtype, cols): [a for a in self.arrays if fits(a, dtype) and a.shape[1] == cols]
            for dtype in ("float32", "int8")
            for cols in COLUMNS
        }
        self.packed = [(a, cols) for a in self.arrays for cols in COLUMNS if self.legal(a, cols)]

    @staticmethod
    def legal(x: Any, cols: Any) -> bool:
        """Whether x holds rows of `cols` codes (docs/format.md)."""
        if not fits(x, "uint8") or len(x) == 0 or cols not in COLUMNS or x.shape[1] != (cols + 3) // 4:
            return False
        values = ((x[:, :, None] >> np.array([0, 2, 4, 6], dtype=np.uint8)) & 3).reshape(len(x), -1)
        return bool((values != 3).all() and (values[:, cols:] == 1).all())

    def usually(self, good: Any, *bad: Any) -> Any:
        return good if self.random.random() < 0.8 else self.random.choice(bad)

    def array(self, dtype: str, cols: int) -> Any:
        return self.random.choice(self.good[dtype, cols] if self.random.random() < 0.6 else self.arrays)

    def one(self) -> None:
        name = self.random.choice(("matmul", "matmul_i32", "pack", "quantize", "rmsnorm", "isa"))
        right, call, check = getattr(self, name)()
        try:
            result = call()
        except REFUSED:
            assert not right, f"{name}: right arguments were refused"
        else:
            assert right, f"{name}: wrong arguments were taken"
            assert check(result), f"{name}: wrong result"
        self.outcomes[f"{name} {'right' if right else 'refused'}"] += 1

    def matmul(self) -> Any:
        matrix, codes = self.random.choice(self.matrices)
        x, threads = self.array("float32", codes.shape[1]), self.usually(1, 0, -1, 300, 2**40, None)
        kernel = self.usually("auto", "gemv", "gemm", "", "x", 7)
        right = fits(x, "float32") and x.shape[1] == codes.shape[1] and threads == 1
        right = right and kernel in ("auto", "gemv", "gemm")

        def check(y: Any) -> bool:
            q, scales = native.quantize_activations(x)
            sums = (q.astype(np.int64) @ codes.T).astype(np.float32)
            return bool((y == sums * (scales[:, None] * np.float32(0.5))).all())

        return right, lambda: matrix.matmul(x, threads, kernel), check

    def matmul_i32(self) -> Any:
        matrix, codes = self.random.choice(self.matrices)
        x, use_gemm = self.array("int8", codes.shape[1]), self.random.random() < 0.5
        right = fits(x, "int8") and x.shape[1] == codes.shape[1]
        return (
            right,
            lambda: matrix.matmul_i32(x, use_gemm),
            lambda y: (y == x.astype(np.int64) @ codes.T).all(),
        )

    def pack(self) -> Any:
        x, cols = self.random.choice(self.packed)
        x = self.usually(x, *self.random.choices(self.arrays, k=3))
        cols = self.usually(cols, 0, -1, 2**31, 2**63 - 1, 2**64, None, *COLUMNS)
        layout = self.usually("2bit", "base3", "3bit", None)
        right = self.legal(x, cols) and layout in ("2bit", "base3")
        return (
            right,
            lambda: native.TernaryMatrix(x, cols, 1.0, layout),
            lambda m: (m.rows, m.cols) == (len(x), cols),
        )

    def quantize(self) -> Any:
        x = self.array("float32", self.random.choice(COLUMNS))

        def check(result: Any) -> bool:
            amax = np.maximum(np.abs(x).max(1, initial=0), np.float32(1e-5))
            expected = np.rint(x * np.float32(127) / amax[:, None])
            return bool((result[0] == expected).all() and (result[1] == amax / np.float32(127)).all())

        return fits(x, "float32"), lambda: native.quantize_activations(x), check

    def rmsnorm(self) -> Any:
        x, gain = self.array("float32", self.random.choice(COLUMNS)), self.random.choice(self.arrays)
        if self.random.random() < 0.7 and fits(x, "float32"):
            gain = np.linspace(-2, 3, x.shape[1], dtype=np.float32)
        eps = self.random.choice((1e-6, 50.0))
        right = fits(x, "float32") and fits(gain, "float32", 1) and gain.shape[0] == x.shape[1]

        def check(y: Any) -> bool:
            wide = x.astype(np.float64)
            mean = (wide**2).sum(1, keepdims=True) / max(1, x.shape[1])
            return y.shape == x.shape and np.allclose(y, wide / np.sqrt(mean + eps) * gain, rtol=1e-5, atol=0)

        return right, lambda: native.rmsnorm(x, gain, eps), check

    def isa(self) -> Any:
        name = self.usually("auto", "scalar", "sse9", "", None, 3, "auto" * 50)
        return (
            name in ("auto", "scalar"),
            lambda: native.set_isa(name),
            lambda _: native.current_isa() in ISAS,
        )


def run(count: int, seed: int) -> Counter[str]:
    calls = Calls(seed)
    try:
        for _ in range(count):
            calls.one()
    finally:
        native.set_isa("auto")
    for name in ("matmul", "matmul_i32", "pack", "quantize", "rmsnorm", "isa"):
        assert calls.outcomes[f"{name} right"] > count / 1000, calls.outcomes
        assert calls.outcomes[f"{name} refused"] > count / 1000, calls.outcomes
    return calls.outcomes


def test_calls() -> None:
    run(10_000, 0)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_million_calls() -> None:
    print(dict(run(1_000_000, 1)))
