"""The relation kernels against float64 and the slow loss: both forms, odd sizes, padding, gradients."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="triton is not installed")

from bitdistill.kernels.relation import relation_rows_sum
from bitdistill.losses.relation import (
    attention_distillation_sum,
    documents_of,
    fused_attention_distillation_sum,
    relation_loss_sum,
)

from .conftest import DEVICE

ROUNDING = 1e-6 if DEVICE.type == "cpu" else 3e-6
"""Of gradients that are 0; a GPU fuses other additions than the interpreter (1.1e-6 on an H200)."""


def states(rows: int, heads: int, tokens: int, size: int, seed: int) -> Tensor:
    """In the layout that projections give: [B, T, H, D] in memory."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, tokens, heads, size, generator=generator).to(DEVICE).transpose(1, 2)


def mask_of(lengths: list[int], tokens: int) -> Tensor:
    return (torch.arange(tokens)[None, :] < torch.tensor(lengths)[:, None]).to(DEVICE)


@pytest.mark.parametrize("form", ["scaled_dot", "cosine"])
@pytest.mark.parametrize(
    ("lengths", "tokens", "heads", "size", "relation_heads"),
    [
        ([1], 1, 1, 8, None),
        ([5, 3, 1], 5, 2, 16, None),
        ([70, 7], 70, 1, 20, None),  # more than one tile of rows
        ([9, 9, 4], 11, 3, 8, 2),  # heads re-split: 24 values into 2 x 12
    ],
)
def test_loss_and_gradients_equal_float64(
    lengths: list[int], tokens: int, heads: int, size: int, relation_heads: int | None, form: str
) -> None:
    mask = mask_of(lengths, tokens)
    student = [states(len(lengths), heads, tokens, size, k).requires_grad_() for k in range(3)]
    teacher = [states(len(lengths), heads, tokens, size, k + 9) for k in range(3)]
    options = {"form": form, "temperature": 0.5, "heads": relation_heads, "alphas": (1.0, 0.3, 2.0)}
    doubles = [s.detach().double().requires_grad_() for s in student]
    want = torch.zeros((), dtype=torch.float64, device=DEVICE)
    for alpha, s, t in zip((1.0, 0.3, 2.0), doubles, teacher, strict=True):
        want = want + alpha * slow(s, t.double(), mask, form, 0.5, relation_heads)
    want_grads = torch.autograd.grad(want, doubles)
    got = fused_attention_distillation_sum(tuple(student), tuple(teacher), mask, **options)  # type: ignore[arg-type]
    grads = torch.autograd.grad(got * 3.0, student)
    torch.testing.assert_close(got.double(), want.detach(), rtol=1e-5, atol=1e-6)
    for grad, want_grad in zip(grads, want_grads, strict=True):
        torch.testing.assert_close(grad.double(), want_grad * 3.0, rtol=1e-4, atol=ROUNDING)
        assert grad.masked_select(~mask[:, None, :, None]).abs().sum() == 0
    plain = attention_distillation_sum(tuple(student), tuple(teacher), mask, **options)  # type: ignore[arg-type]
    torch.testing.assert_close(got, plain, rtol=1e-5, atol=1e-6)


def slow(s: Tensor, t: Tensor, mask: Tensor, form: str, temperature: float, heads: int | None) -> Tensor:
    """The loss document by document, without any mask, in the dtype of its arguments."""
    total = torch.zeros((), dtype=s.dtype, device=s.device)
    for b, length in enumerate(mask.sum(1).tolist()):
        logs = []
        for x in (s, t):
            rows = x[b, :, :length].transpose(0, 1)
            rows = rows if heads is None else rows.reshape(length, heads, -1)
            rows = rows.transpose(0, 1)
            if form == "cosine":
                rows = rows / rows.norm(dim=-1, keepdim=True)
            factor = 1 / temperature if form == "cosine" else rows.shape[-1] ** -0.5
            logs.append(torch.log_softmax(rows @ rows.transpose(1, 2) * factor, -1))
        kl = (logs[1].exp() * (logs[1] - logs[0])).sum(-1)
        total = total + kl.mean()
    return total


@pytest.mark.parametrize("form", ["scaled_dot", "cosine"])
def test_bfloat16_states_give_the_float32_loss_of_their_values(form: str) -> None:
    mask = mask_of([40, 33], 40)
    student = states(2, 2, 40, 32, 0).bfloat16().requires_grad_()
    teacher = states(2, 2, 40, 32, 1).bfloat16()
    wide = student.detach().double().requires_grad_()
    want = slow(wide, teacher.double(), mask, form, 1.0, None)
    (want_grad,) = torch.autograd.grad(want, wide)
    got = fused_attention_distillation_sum(
        (student,) * 3, (teacher,) * 3, mask, alphas=(1.0, 0.0, 0.0), form=form
    )
    (grad,) = torch.autograd.grad(got, student)
    torch.testing.assert_close(got.double(), want.detach(), rtol=2e-2, atol=1e-5)
    assert float((grad.double() - want_grad).norm() / want_grad.norm()) < 0.02


def test_padding_that_is_not_finite_reaches_nothing() -> None:
    mask = mask_of([4, 6, 2], 7)
    student, teacher = states(3, 2, 7, 8, 0), states(3, 2, 7, 8, 1)
    want = relation_loss_sum(student, teacher, mask)
    hole = ~mask[:, None, :, None]
    student = student.masked_fill(hole, float("nan")).requires_grad_()
    options = {"alphas": (1.0, 0.0, 0.0)}
    three = (student,) * 3, (teacher.masked_fill(hole, float("inf")),) * 3
    got = fused_attention_distillation_sum(*three, mask, **options)  # type: ignore[arg-type]
    (grad,) = torch.autograd.grad(got, student)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
    assert bool(grad.isfinite().all())


def test_widths_may_differ_and_large_heads_take_the_slow_way() -> None:
    mask = mask_of([5, 4], 5)
    student, teacher = states(2, 2, 5, 8, 0).requires_grad_(), states(2, 3, 5, 16, 1)
    for heads, s, t in ((4, student, teacher), (1, states(2, 2, 5, 200, 2), states(2, 2, 5, 200, 3))):
        got = fused_attention_distillation_sum((s,) * 3, (t,) * 3, mask, heads=heads)
        want = attention_distillation_sum((s,) * 3, (t,) * 3, mask, heads=heads)
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


def test_documents_may_follow_one_another_without_padding() -> None:
    """Rows of a packed batch: the same loss as each document alone."""
    lengths, size = [3, 20, 1, 50], 16
    flat = [states(1, 2, sum(lengths), size, k)[0].transpose(0, 1) for k in (0, 1)]
    ends = torch.tensor(lengths).cumsum(0)
    begin = torch.repeat_interleave(ends - torch.tensor(lengths), torch.tensor(lengths)).int().to(DEVICE)
    end = torch.repeat_interleave(ends, torch.tensor(lengths)).int().to(DEVICE)
    weight = 1 / (2 * (end - begin).float())
    got = relation_rows_sum(*flat, begin, end, weight, size**-0.5, size**-0.5)
    want = sum(
        relation_loss_sum(
            *(x[e - n : e].transpose(0, 1)[None] for x in flat),
            torch.ones(1, n, dtype=torch.bool, device=DEVICE),
        )
        for n, e in zip(lengths, ends.tolist(), strict=True)
    )
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


def test_documents_of_a_padded_batch() -> None:
    begin, end = documents_of(mask_of([2, 3], 3))
    assert begin.tolist() == [0, 0, 0, 3, 3, 3]
    assert end.tolist() == [2, 2, 0, 6, 6, 6]


def test_shapes_that_do_not_fit_are_refused() -> None:
    x = torch.zeros(4, 2, 8, device=DEVICE)
    index = torch.zeros(3, dtype=torch.int32, device=DEVICE)
    with pytest.raises(ValueError, match="one entry a row"):
        relation_rows_sum(x, x, index, index, index.float(), 1.0, 1.0)
