"""A check of the Triton kernels on the GPU at hand, before a training run relies on them.

Each kernel runs once at the student's own sizes (so nothing is compiled that training does not compile anyway) and
is compared with its slow twin. Integer products must be equal; where exp or a sum's order may differ, codes may move
by one in a few places and gradients by bfloat16 roundings. What a broken compiler or driver gives is far outside.
"""

from __future__ import annotations

import functools
import logging
import time
from dataclasses import dataclass

import torch
from torch import Tensor

from bitdistill.kernels import twins

log = logging.getLogger("bitdistill")
ROWS = 80
"""No multiple of a tile's rows, so that masked rows are part of the check, but of 16, as in training."""
GRADIENT_ERROR = 0.02


@dataclass(frozen=True)
class Sizes:
    """What the kernels' tiles depend on."""

    hidden: int
    inner: int
    vocabulary: int
    activation: str
    head: int


@functools.cache
def why_wrong(device: torch.device, sizes: Sizes) -> str | None:
    """What is wrong with the kernels on this device, or None when they agree with their twins."""
    started = time.perf_counter()
    checks = {
        "codes": _codes,
        "rows": _rows,
        "gate": _gate,
        "stack": _stack,
        "product": _product,
        "weights": _weights,
        "losses": _losses,
        "relation": _relation,
    }
    for name, check in checks.items():
        try:
            fault = check(device, sizes)
        except Exception as error:  # whatever the compiler or the driver throws: training must go on without
            fault = f"{type(error).__name__}: {error}".splitlines()[0]
        if fault is not None:
            return f"self-check of {name}: {fault}"
    log.debug("kernels: self-check passed in %.1f s", time.perf_counter() - started)
    return None


def _randn(device: torch.device, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape))).to(device)


def _error(got: Tensor, want: Tensor) -> float:
    """Relative error in norm; infinite when anything is not finite."""
    error = float((got.double() - want.double()).norm() / want.double().norm().clamp_min(1e-30))
    return error if error == error else float("inf")


def _both_ways(x: Tensor, gain: Tensor, activation: str) -> str | None:
    """Norm, codes and their backward."""
    from bitdistill.kernels import norm_quantize as kernels

    codes, scale, rrms = kernels.norm_quantize(x, gain, 1e-5, 0.0, activation)
    want_codes, want_scale, _ = twins.norm_quantize(x, gain, 1e-5, 0.0, activation)
    apart = (codes.int() - want_codes.int()).abs()
    if int(apart.max()) > 1 or int(apart.sum()) > max(8, apart.numel() // 200):
        return f"{int((apart > 0).sum())} of {apart.numel()} codes differ, by up to {int(apart.max())}"
    if _error(scale, want_scale) > 1e-4:
        return f"scales are off by {_error(scale, want_scale):.2g}"
    grad = _randn(x.device, x.shape[0], gain.shape[0]).bfloat16()
    grad_scale = torch.full((1,), 0.7, device=x.device)
    out_scale = torch.tensor([0.5, 3.0], device=x.device).repeat_interleave(gain.shape[0])
    worst = 0.0
    # As fused layers call it: with one matrix' scale, or without (stacked matrices' are in the gradient already)
    for scale_of_grad in (grad_scale, None):
        rest = (scale_of_grad, x, gain, rrms, codes, scale, out_scale, 0.0, activation)
        got = list(kernels.norm_quantize_backward(grad, *rest))
        want = list(twins.norm_quantize_backward(grad, *rest))
        got[1], want[1] = kernels.sum_rows([got[1]]), twins.sum_rows([want[1]])
        worst = max(worst, *map(_error, got, want))
    return None if worst < GRADIENT_ERROR else f"gradients are off by {worst:.2g}"


def _codes(device: torch.device, sizes: Sizes) -> str | None:
    """Without a norm nothing may differ: rows at random, and every border between two codes."""
    from bitdistill.kernels import norm_quantize as kernels
    from bitdistill.quant.ternary import quantize_activations

    borders = torch.arange(-254, 255, device=device) / 254.0
    for x in (_randn(device, ROWS, sizes.hidden), borders * (_randn(device, ROWS, 1).abs() + 0.01)):
        codes, scale, _ = kernels.norm_quantize(x, None, 0.0, 0.0, "none")
        want_codes, want_scale = quantize_activations(x)
        differ = int((codes != want_codes).sum()) + int((scale != want_scale[:, 0]).sum())
        if differ:
            return f"{differ} int8 codes or scales differ"
    return None


def _stack(device: torch.device, sizes: Sizes) -> str | None:
    from bitdistill.kernels import stack

    parts = [_randn(device, ROWS, size).bfloat16() for size in (sizes.hidden, sizes.head, sizes.head)]
    scale = torch.cat(
        [torch.full((p.shape[1],), s, device=device) for p, s in zip(parts, (0.3, 2.0, 5.0), strict=True)]
    )
    error = _error(stack.stack_scaled(parts, scale), twins.stack_scaled(parts, scale))
    return None if error < GRADIENT_ERROR else f"gradients are off by {error:.2g}"


def _rows(device: torch.device, sizes: Sizes) -> str | None:
    gain = _randn(device, sizes.hidden).abs() + 0.5
    return _both_ways(_randn(device, ROWS, sizes.hidden), gain, "none")


def _gate(device: torch.device, sizes: Sizes) -> str | None:
    gain = _randn(device, sizes.inner).abs() + 0.5
    return _both_ways(_randn(device, ROWS, 2 * sizes.inner).bfloat16(), gain, sizes.activation)


def _product(device: torch.device, sizes: Sizes) -> str | None:
    from bitdistill.kernels import matmul

    generator = torch.Generator().manual_seed(0)
    x = torch.randint(-128, 128, (ROWS, sizes.hidden), generator=generator, dtype=torch.int8).to(device)
    w = torch.randint(-1, 2, (sizes.inner, sizes.hidden), generator=generator, dtype=torch.int8).to(device)
    x_scale, w_scale = _randn(device, ROWS).abs() + 0.01, _randn(device, sizes.inner).abs() + 0.01
    want = twins.int8_product(x, x_scale, w, w_scale, torch.float32)
    got = torch.full_like(want, float("nan"))
    # One way is enough here: each shape's choice is compared with cuBLASLt's product when it is made
    matmul._product(got, x, x_scale, w, w_scale, 0)
    differ = int((got != want).sum())
    return None if differ == 0 else f"{differ} of {got.numel()} int8 products differ"


def _weights(device: torch.device, sizes: Sizes) -> str | None:
    from bitdistill.kernels.weights import TernaryTable, ternarize_all
    from bitdistill.quant.ternary import ternarize

    weight = _randn(device, 33, sizes.hidden) * 0.02
    codes = torch.full(weight.shape, 7, dtype=torch.int8, device=device)
    scale = torch.full((33,), float("nan"), device=device)
    ternarize_all(TernaryTable.of([(weight, codes, scale)]))
    want_codes, want_scale = ternarize(weight)
    differ = int((codes != want_codes).sum()) + int((scale != want_scale).sum())
    return None if differ == 0 else f"{differ} ternary codes or scales differ"


def _losses(device: torch.device, sizes: Sizes) -> str | None:
    """LM loss and KL of a few rows, and their gradient, against float64."""
    from bitdistill.kernels.head import rows_loss_

    z, t = _randn(device, 5, sizes.vocabulary).bfloat16(), _randn(device, 5, sizes.vocabulary + 1)
    t = t[:, :-1].contiguous().bfloat16()
    targets = torch.arange(5, device=device)
    leaf = z.double().requires_grad_()
    log_probs, teacher = torch.log_softmax(leaf, -1), torch.log_softmax(t.double(), -1)
    want_lm = -log_probs.gather(1, targets[:, None])[:, 0]
    want_kl = (teacher.exp() * (teacher - log_probs)).sum(-1)
    (want,) = torch.autograd.grad((0.5 * want_lm + 0.5 * want_kl).sum(), leaf)
    lm, kl = rows_loss_(z, t, targets, 0.5, 0.5)
    worst = max(_error(lm, want_lm.detach()), _error(kl, want_kl.detach()), _error(z, want))
    return None if worst < GRADIENT_ERROR else f"losses or gradients are off by {worst:.2g}"


def _relation(device: torch.device, sizes: Sizes) -> str | None:
    """Relation loss of two documents and its gradient, against float64."""
    from bitdistill.kernels.relation import LARGEST_HEAD, relation_rows_sum

    if sizes.head > LARGEST_HEAD:
        return None
    s, t = (_randn(device, ROWS + k, 1, sizes.head)[:ROWS].bfloat16() for k in range(2))
    begin = torch.where(torch.arange(ROWS, device=device) < 20, 0, 20).int()
    end = torch.where(begin == 0, 20, ROWS).int()
    weight = _randn(device, ROWS).abs()
    factor = sizes.head**-0.5
    wide, leaf = s.double().requires_grad_(), s.clone().requires_grad_()
    same = begin[:, None] == begin[None, :]
    logs = [
        torch.log_softmax((x @ x.t() * factor).masked_fill(~same, -1e30), -1)
        for x in (wide[:, 0], t[:, 0].double())
    ]
    want = ((logs[1].exp() * (logs[1] - logs[0])).sum(-1) * weight).sum()
    (want_grad,) = torch.autograd.grad(want, wide)
    got = relation_rows_sum(leaf, t, begin, end, weight, factor, factor)
    (grad,) = torch.autograd.grad(got, leaf)
    worst = max(_error(got.detach(), want.detach()), _error(grad, want_grad))
    return None if worst < GRADIENT_ERROR else f"loss or gradient is off by {worst:.2g}"
