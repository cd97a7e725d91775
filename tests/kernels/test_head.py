"""The fused loss rows against float64 and against the slow chunk."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="triton is not installed")

from bitdistill.kernels.head import fused_language_model_chunk, rows_loss_
from bitdistill.losses.logits import (
    chunked_language_model_loss,
    language_model_chunk,
    tokens_of_a_chunk,
)

from .conftest import DEVICE


def randn(*shape: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale).to(DEVICE)


def slow_rows(
    z: Tensor, t: Tensor, targets: Tensor, a: float, b: float, tau: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Losses of each row and their gradient by autograd in float64; rows of negative targets give zeros."""
    z = z.double().requires_grad_()
    counts = targets >= 0
    log_probs = torch.log_softmax(z, -1)
    lm = torch.where(counts, -log_probs.gather(1, targets.clamp_min(0)[:, None])[:, 0], 0.0)
    teacher = torch.log_softmax(t.double() / tau, -1)
    gap = teacher - torch.log_softmax(z / tau, -1)
    kl = torch.where(counts, (teacher.exp() * gap).sum(-1), 0.0)
    (grad,) = torch.autograd.grad((a * lm + b * kl).sum(), z)
    return lm.detach(), kl.detach(), grad


@pytest.mark.parametrize("tau", [1.0, 5.0])
@pytest.mark.parametrize(("lm", "kl"), [(1.0, 0.0), (0.0, 1.0), (0.3, 0.7)])
@pytest.mark.parametrize(("n", "vocabulary"), [(1, 1), (5, 37), (3, 4096), (2, 9001)])
def test_rows_equal_float64(n: int, vocabulary: int, lm: float, kl: float, tau: float) -> None:
    z, t = randn(n, vocabulary, scale=6), randn(n, vocabulary, seed=1, scale=6)
    targets = torch.randint(0, vocabulary, (n,), generator=torch.Generator().manual_seed(2)).to(DEVICE)
    targets[n // 2] = -100 if n > 1 else 0
    want_lm, want_kl, want_grad = slow_rows(z, t, targets, lm, kl, tau)
    lm_N, kl_N = rows_loss_(z, t, targets, lm, kl, tau)
    torch.testing.assert_close(lm_N.double(), want_lm, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(kl_N.double(), want_kl, rtol=1e-5, atol=2e-5)
    torch.testing.assert_close(z.double(), want_grad, rtol=1e-4, atol=1e-6)
    if n > 1:
        assert z[n // 2].abs().max() == 0  # exactly, so that nothing reaches head or hidden states


def test_large_logits_neither_overflow_nor_lose_the_kl() -> None:
    z, t = randn(2, 70, scale=3e3), randn(2, 70, seed=1, scale=3e3)
    targets = torch.tensor([0, 69], device=DEVICE)
    want_lm, want_kl, want_grad = slow_rows(z, t, targets, 0.5, 0.5, 1.0)
    lm_N, kl_N = rows_loss_(z, t, targets, 0.5, 0.5)
    torch.testing.assert_close(lm_N.double(), want_lm, rtol=1e-5, atol=1e-3)
    torch.testing.assert_close(kl_N.double(), want_kl, rtol=1e-5, atol=1e-3)
    torch.testing.assert_close(z.double(), want_grad, rtol=1e-3, atol=1e-5)


def test_nan_logits_are_seen_in_the_loss() -> None:
    z = randn(2, 50)
    z[1, 7] = float("nan")
    lm_N, _ = rows_loss_(z, None, torch.tensor([1, 2], device=DEVICE), 1.0, 0.0)
    assert lm_N.isfinite().tolist() == [True, False]


def test_without_teacher_the_kl_is_zero_and_bfloat16_is_rounded_once() -> None:
    z = randn(4, 131, scale=4).bfloat16()
    targets = torch.tensor([0, 5, -100, 130], device=DEVICE)
    _, _, want = slow_rows(z, z, targets, 1.0, 0.0, 1.0)
    _, kl_N = rows_loss_(z, None, targets, 1.0, 0.0)
    assert kl_N.abs().max() == 0
    # The interpreter cuts bits off where the GPU rounds.
    torch.testing.assert_close(z.double(), want, rtol=2**-7, atol=1e-7)


@pytest.mark.parametrize("tau", [1.0, 2.0])
def test_chunk_equals_the_slow_chunk_and_the_whole_loss_agrees(tau: float) -> None:
    hidden, head = randn(9, 6, seed=3), randn(13, 6, seed=4)
    teacher_hidden, teacher_head = randn(9, 5, seed=5), randn(13, 5, seed=6)
    targets = torch.tensor([1, 2, -100, 4, 5, 6, 7, 12, -100], device=DEVICE)
    arguments = (hidden, head, targets, teacher_hidden, teacher_head, 0.3, 0.7, tau)
    slow = language_model_chunk(*arguments)
    for got, want in zip(fused_language_model_chunk(*arguments), slow, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    grads = []
    for chunk in (language_model_chunk, fused_language_model_chunk):
        leaves = hidden.clone().requires_grad_(), head.clone().requires_grad_()
        loss, _, _ = chunked_language_model_loss(
            *leaves,
            targets,
            teacher_hidden_NH=teacher_hidden,
            teacher_head_VH=teacher_head,
            lm_weight=0.3,
            kl_weight=0.7,
            temperature=tau,
            chunk_tokens=4,
            chunk_function=chunk,
        )
        grads.append(torch.autograd.grad(loss / 7, leaves))
    for got, want in zip(*grads, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6)
    assert grads[1][0][2].abs().max() == 0


def test_chunks_of_the_kernel_are_larger() -> None:
    elements = fused_language_model_chunk.chunk_elements  # type: ignore[attr-defined]
    assert tokens_of_a_chunk(151_936, elements) == 4096
    assert tokens_of_a_chunk(151_936) == 1024
    assert tokens_of_a_chunk(49_152, elements) == 8192


def test_refusals_name_the_shapes() -> None:
    z = randn(3, 8)
    with pytest.raises(ValueError, match="one target a row"):
        rows_loss_(z, None, torch.zeros(2, dtype=torch.long, device=DEVICE), 1.0, 0.0)
    with pytest.raises(ValueError, match="teacher logits"):
        rows_loss_(z, randn(3, 9), torch.zeros(3, dtype=torch.long, device=DEVICE), 0.0, 1.0)
