"""The kernels' mathematics in plain torch: slow twins for tests, and what CPU tensors run through.

Arguments and results are those of `norm_quantize.py` and `matmul.py`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from bitdistill.quant.linear import integer_matmul
from bitdistill.quant.ternary import quantize_activations


def gated(x_NX: Tensor, activation: str) -> Tensor:
    """float32 act(gate) * up of [N, 2 I], or float32 x."""
    x = x_NX.to(torch.float32)
    if activation == "none":
        return x
    # Contiguous: torch's vectorised exp on a CPU and the one for strided rows differ in last bits.
    gate, up = (half.contiguous() for half in x.chunk(2, dim=-1))
    return (F.silu(gate) if activation == "silu" else F.gelu(gate, approximate="tanh")) * up


def norm_quantize(
    x_NX: Tensor, gain_I: Tensor | None, eps: float, gain_offset: float, activation: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Codes [N, I], scales [N], 1 / rms [N]."""
    h = gated(x_NX, activation)
    rrms = torch.zeros(h.shape[0], dtype=torch.float32, device=h.device)
    if gain_I is not None:
        rrms = torch.rsqrt(h.square().mean(dim=-1) + eps)
        h = h * rrms[:, None] * (gain_I.to(torch.float32) + gain_offset)
    codes, scale = quantize_activations(h)
    return codes, scale[:, 0], rrms


def norm_quantize_backward(
    grad_NI: Tensor,
    grad_scale: Tensor | None,
    x_NX: Tensor,
    gain_I: Tensor | None,
    rrms_N: Tensor,
    codes_NI: Tensor,
    scale_N: Tensor,
    out_scale_X: Tensor,
    gain_offset: float,
    activation: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradient of x, of the gain [1, I], and x_hat."""
    grad = grad_NI.to(torch.float32) * (1.0 if grad_scale is None else grad_scale)
    h = gated(x_NX, activation)
    gain_grad = torch.zeros(1, grad.shape[1], dtype=torch.float32, device=grad.device)
    if gain_I is not None:
        normed = h * rrms_N[:, None]
        gain_grad = (grad * normed).sum(0, keepdim=True)
        grad = grad * (gain_I.to(torch.float32) + gain_offset)
        grad = (grad - normed * (grad * normed).mean(dim=-1, keepdim=True)) * rrms_N[:, None]
    x_hat = (codes_NI.to(torch.float32) * scale_N[:, None]).to(grad_NI.dtype)
    if activation == "none":
        return grad.to(x_NX.dtype), gain_grad, x_hat
    gate, up = x_NX.to(torch.float32).chunk(2, dim=-1)
    if activation == "silu":
        s = torch.sigmoid(gate)
        acted, slope = gate * s, s * (1 + gate * (1 - s))
    else:
        root, cube = 0.7978845608028654, 0.044715
        s = torch.sigmoid(2 * root * (gate + cube * gate**3))
        acted, slope = gate * s, s + gate * s * (1 - s) * 2 * root * (1 + 3 * cube * gate**2)
    d_gate, d_up = grad * up * slope * out_scale_X[0], grad * acted * out_scale_X[grad.shape[1]]
    return torch.cat([d_gate, d_up], dim=-1).to(grad_NI.dtype), gain_grad, x_hat


def sum_rows(partials: Sequence[Tensor]) -> Tensor:
    """Sums over the rows of each, side by side."""
    return torch.cat([part.sum(0) for part in partials])


def int8_product(
    x_NI: Tensor, x_scale_N: Tensor, w_OI: Tensor, w_scale_O: Tensor, dtype: torch.dtype
) -> Tensor:
    """y [N, O] = float32(x w^T) * (x_scale * w_scale), rounded to `dtype`."""
    return (integer_matmul(x_NI, w_OI) * (x_scale_N[:, None] * w_scale_O[None, :])).to(dtype)


def stack_scaled(parts: Sequence[Tensor], scale_O: Tensor) -> Tensor:
    """[N, O]: parts side by side, each times its scale, rounded to the parts' dtype."""
    return (torch.cat(list(parts), dim=-1).to(torch.float32) * scale_O).to(parts[0].dtype)
