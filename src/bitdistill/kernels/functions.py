"""Autograd of ternary products with cached weight codes: norm, one quantization and one product for linears that
share an input, and the whole gated feed-forward layer.

Forward as in `quant.linear`. Backward with few roundings and no scaled copy of an activation gradient:

    dL/dx_hat = (dL/dy * s_w) T          s_w: the scale of each output row
    dL/dW     = (dL/dy)^T x_hat          x_hat = codes * scale, rounded to the compute dtype

Where rows of several matrices are stacked, dL/dy * s_w feeds both products, and dL/dW is divided by s_w after.

With `int8_backward` the first product is an int8 one: dL/dy * s_w is quantized by rows as activations are, which
rounds each of its values to 1/127 of the row's largest. The second product stays in the compute dtype.

Shape legend: N tokens, I in features, O out features (of all stacked matrices together).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bitdistill.kernels import ops


def _parts(stacked_OI: Tensor, rows: list[int], dtype: torch.dtype) -> list[Tensor]:
    return [part.to(dtype) for part in stacked_OI.split(rows)]


def _gain_grads(partials: list[Tensor], gains: list[Tensor | None]) -> list[Tensor | None]:
    """The gains' gradients from their partial sums, in one launch; None where there is no gain."""
    there = [part for part, gain in zip(partials, gains, strict=True) if gain is not None]
    if not there:
        return [None] * len(gains)
    sums = ops.sum_rows(there).split([part.shape[1] for part in there])
    grads: list[Tensor | None] = []
    used = 0
    for gain in gains:
        grads.append(None if gain is None else sums[used].to(gain.dtype))
        used += gain is not None
    return grads


def _grad_hat(scaled_NO: Tensor, codes_OI: Tensor, int8_backward: bool) -> Tensor:
    """dL/dx_hat [N, I] in the compute dtype."""
    if not int8_backward:
        return scaled_NO @ codes_OI.to(scaled_NO.dtype)
    grad_codes, grad_scale, _ = ops.norm_quantize(scaled_NO, None, 0.0, 0.0, "none")
    ones_I = torch.ones(codes_OI.shape[1], dtype=torch.float32, device=codes_OI.device)
    return ops.int8_product(grad_codes, grad_scale, codes_OI.t().contiguous(), ones_I, scaled_NO.dtype)


class TernaryProjections(torch.autograd.Function):
    """y [N, O] = quantize(norm(x)) (stacked codes)^T with scales, as a tuple of each matrix' part [N, O_p].

    Arguments: x [N, I]; gain [I] or None (no norm); eps; gain_offset; codes int8 [O, I]; row_scale float32 [O];
    compute dtype; whether dL/dx is an int8 product; then the latent weights, whose rows are stacked in `codes`.
    Latents are not read.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x_NI: Tensor,
        gain_I: Tensor | None,
        eps: float,
        gain_offset: float,
        codes_OI: Tensor,
        row_scale_O: Tensor,
        dtype: torch.dtype,
        int8_backward: bool,
        *weights: Tensor,
    ) -> tuple[Tensor, ...]:
        x_codes, x_scale, rrms = ops.norm_quantize(x_NI, gain_I, eps, gain_offset, "none")
        ctx.save_for_backward(x_NI, gain_I, x_codes, x_scale, rrms, codes_OI, row_scale_O)
        ctx.gain_offset, ctx.weight_dtype = gain_offset, weights[0].dtype
        ctx.int8_backward = int8_backward
        ctx.rows = [w.shape[0] for w in weights]
        y = ops.int8_product(x_codes, x_scale, codes_OI, row_scale_O, dtype)
        return (y,) if len(weights) == 1 else y.split(ctx.rows, dim=-1)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        x_NI, gain_I, x_codes, x_scale, rrms, codes_OI, row_scale_O = ctx.saved_tensors
        one = len(ctx.rows) == 1
        scaled = grads[0] if one else ops.stack_scaled(list(grads), row_scale_O)
        grad_hat = _grad_hat(scaled, codes_OI, ctx.int8_backward)
        grad_scale = row_scale_O[:1] if one else None
        grad_x, partial, x_hat = ops.norm_quantize_backward(
            grad_hat, grad_scale, x_NI, gain_I, rrms, x_codes, x_scale, row_scale_O, ctx.gain_offset, "none"
        )
        grad_weight = scaled.t() @ x_hat
        if not one:
            grad_weight = grad_weight.to(torch.float32) / row_scale_O[:, None]
        (grad_gain,) = _gain_grads([partial], [gain_I])
        parts = _parts(grad_weight, ctx.rows, ctx.weight_dtype)
        return grad_x, grad_gain, *(None,) * 6, *parts


class TernaryGatedMlp(torch.autograd.Function):
    """The feed-forward layer [N, I] -> [N, I]: norm, gate and up, activation, norm (SubLN), down.

    Arguments: x; gain or None, eps, gain_offset of the norm before gate and up; gain or None, eps of the SubLN before
    down; activation; codes [2 F, I] and row_scale [2 F] of gate and up; codes [I, F] and row_scale [I] of down;
    compute dtype; whether dL/dx are int8 products; the three latents.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x_NI: Tensor,
        gain_I: Tensor | None,
        eps: float,
        gain_offset: float,
        sub_gain_F: Tensor | None,
        sub_eps: float,
        activation: str,
        codes: Tensor,
        row_scale: Tensor,
        down_codes: Tensor,
        down_scale: Tensor,
        dtype: torch.dtype,
        int8_backward: bool,
        gate: Tensor,
        up: Tensor,
        down: Tensor,
    ) -> Tensor:
        x_codes, x_scale, rrms = ops.norm_quantize(x_NI, gain_I, eps, gain_offset, "none")
        gate_up = ops.int8_product(x_codes, x_scale, codes, row_scale, dtype)
        h_codes, h_scale, h_rrms = ops.norm_quantize(gate_up, sub_gain_F, sub_eps, 0.0, activation)
        ctx.save_for_backward(
            x_NI, gain_I, x_codes, x_scale, rrms, gate_up, sub_gain_F, h_codes, h_scale, h_rrms,
            codes, row_scale, down_codes, down_scale,
        )  # fmt: skip
        ctx.gain_offset, ctx.activation, ctx.weight_dtype = gain_offset, activation, gate.dtype
        ctx.features, ctx.int8_backward = gate.shape[0], int8_backward
        return ops.int8_product(h_codes, h_scale, down_codes, down_scale, dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (grad_NI,) = grads
        (
            x_NI, gain_I, x_codes, x_scale, rrms, gate_up, sub_gain_F, h_codes, h_scale, h_rrms,
            codes, row_scale, down_codes, down_scale,
        ) = ctx.saved_tensors  # fmt: skip
        features, int8 = ctx.features, ctx.int8_backward
        scaled, sub_partial, h_hat = ops.norm_quantize_backward(
            _grad_hat(grad_NI, down_codes, int8), down_scale[:1], gate_up, sub_gain_F, h_rrms, h_codes, h_scale,
            row_scale, 0.0, ctx.activation,
        )  # fmt: skip
        grad_down = grad_NI.t() @ h_hat
        grad_x, partial, x_hat = ops.norm_quantize_backward(
            _grad_hat(scaled, codes, int8), None, x_NI, gain_I, rrms, x_codes, x_scale,
            row_scale, ctx.gain_offset, "none",
        )  # fmt: skip
        grad_gate_up = (scaled.t() @ x_hat).to(torch.float32) / row_scale[:, None]
        grad_gain, grad_sub_gain = _gain_grads([partial, sub_partial], [gain_I, sub_gain_F])
        weights = (
            *_parts(grad_gate_up, [features, features], ctx.weight_dtype),
            grad_down.to(ctx.weight_dtype),
        )
        return grad_x, grad_gain, None, None, grad_sub_gain, *(None,) * 8, *weights
