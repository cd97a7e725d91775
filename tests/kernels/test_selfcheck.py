"""The check before training: passes on kernels that are right, names the one that is not."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="triton is not installed")

from bitdistill.config import Loop
from bitdistill.kernels import matmul, norm_quantize, relation, runtime, selfcheck
from bitdistill.kernels.selfcheck import Sizes, why_wrong
from bitdistill.models.surgery import refine
from bitdistill.stages import kernels
from tests.models.conftest import tiny_model

from .conftest import DEVICE

SIZES = Sizes(hidden=24, inner=40, vocabulary=97, activation="silu", head=12)


@pytest.fixture(autouse=True)
def _asked_anew() -> Iterator[None]:
    why_wrong.cache_clear()
    yield
    why_wrong.cache_clear()


def test_right_kernels_pass() -> None:
    assert why_wrong(DEVICE, SIZES) is None


def test_wrong_products_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    right = matmul._product

    def wrong(y: Tensor, *arguments: Any) -> None:
        right(y, *arguments)
        y[3, 5] += 1

    monkeypatch.setattr(matmul, "_product", wrong)
    assert "self-check of product" in str(why_wrong(DEVICE, SIZES))


def test_codes_that_are_off_by_one_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    right = norm_quantize.norm_quantize

    def wrong(*arguments: Any) -> tuple[Tensor, ...]:
        codes, scale, rrms = right(*arguments)
        codes[3, 5] ^= 1
        return codes, scale, rrms

    monkeypatch.setattr(norm_quantize, "norm_quantize", wrong)
    assert why_wrong(DEVICE, SIZES) == "self-check of codes: 1 int8 codes or scales differ"


def test_wrong_gradients_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    right = norm_quantize.norm_quantize_backward

    def wrong(*arguments: Any) -> tuple[Tensor, ...]:
        x, *rest = right(*arguments)
        return x * 1.1, *rest

    monkeypatch.setattr(norm_quantize, "norm_quantize_backward", wrong)
    assert "gradients are off" in str(why_wrong(DEVICE, SIZES))


def test_results_that_are_not_finite_and_exceptions_are_faults(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(relation, "relation_rows_sum", lambda s, *_: (s * float("nan")).sum())
    assert "self-check of relation" in str(why_wrong(DEVICE, SIZES))
    why_wrong.cache_clear()

    def broken(*_: Any) -> None:
        raise RuntimeError("no such instruction")

    monkeypatch.setattr(norm_quantize, "norm_quantize", broken)
    assert why_wrong(DEVICE, SIZES) == "self-check of codes: RuntimeError: no such instruction"


def test_a_stage_falls_back_and_says_so_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    student = refine(tiny_model("llama"), gains="ones")
    monkeypatch.setattr(kernels, "wants_kernels", lambda *_: True)
    monkeypatch.setattr(selfcheck, "why_wrong", lambda *_: "self-check of rows: wrong")
    monkeypatch.setattr(runtime, "_said", set())
    device = torch.device("cuda")  # asked about, never used
    with caplog.at_level("WARNING", logger="bitdistill"):
        assert not kernels.usable(Loop(batch_rows=1), device, student)
        assert not kernels.usable(Loop(batch_rows=1), device, student)
    assert [r.getMessage() for r in caplog.records] == [
        "kernels: the reference path is used, self-check of rows: wrong"
    ]
    monkeypatch.setattr(selfcheck, "why_wrong", lambda *_: None)
    assert kernels.usable(Loop(batch_rows=1), device, student)
    weights_only = refine(tiny_model("llama"), gains="ones", quantize_activations=False)
    assert not kernels.usable(Loop(batch_rows=1), device, weights_only)
