"""The quantizers, as pure functions (paper, sec. 2; BitNet b1.58).

    weights, per tensor:    scale = max(mean|W|, eps);  T = RoundClip(W / scale, -1, 1)
    activations, per token: amax = max(|x|, eps);       q = RoundClip(127 x / amax, -128, 127)

Contract, shared by training, packed export and native engine:

- all arithmetic on scales and codes is float32, whatever the dtype of the input (bf16 arithmetic would
  change 1.9 % of the int8 codes); rounding is half to even; eps = 1e-5;
- ``mean|W|`` is summed in float64 and rounded once, so it does not depend on the device or thread count;
- ternary codes are decided by comparison with ``scale / 2``. That equals RoundClip(W / scale) in exact
  arithmetic: |W / scale| = 1/2 is a tie and goes to the even code 0, and halving a float32 is exact;
- a scale always multiplies codes: ``w_hat = codes * scale``, ``x_hat = codes * scale``.

Shape legend: O out features, I in features, T tokens (any leading dimensions).
"""

from __future__ import annotations

import torch
from torch import Tensor

EPSILON = 1e-5
INT8_MAX = 127.0


def weight_scale(weight_OI: Tensor) -> Tensor:
    """Absmean scale of a weight matrix: a float32 scalar tensor, ``max(mean|W|, 1e-5)``."""
    mean = weight_OI.detach().abs().mean(dtype=torch.float64)
    return mean.to(torch.float32).clamp_min(EPSILON)


def ternary_codes(weight_OI: Tensor, scale: Tensor) -> Tensor:
    """Codes in {-1, 0, +1} (int8, same shape) of `weight_OI` for a given positive float32 scale."""
    weight = weight_OI.detach().to(torch.float32)
    half = scale * 0.5
    return (weight > half).to(torch.int8) - (weight < -half).to(torch.int8)


def ternarize(weight_OI: Tensor) -> tuple[Tensor, Tensor]:
    """Ternarize a weight matrix per tensor.

    Args:
        weight_OI: any float dtype, shape [out, in] (any shape works: there is one scale).

    Returns:
        codes (int8 in {-1, 0, 1}, same shape) and scale (float32 scalar): ``w_hat = codes * scale``.
    """
    scale = weight_scale(weight_OI)
    return ternary_codes(weight_OI, scale), scale


def quantize_activations(x_TI: Tensor) -> tuple[Tensor, Tensor]:
    """Quantize activations to int8, one scale a token.

    Args:
        x_TI: any float dtype, shape [..., in].

    Returns:
        codes (int8 in [-128, 127], same shape) and scale (float32, shape [..., 1]), where
        ``scale = amax / 127`` and ``x_hat = codes * scale``.
    """
    x = x_TI.detach().to(torch.float32)
    amax = x.abs().amax(dim=-1, keepdim=True).clamp_min(EPSILON)
    codes = (x * INT8_MAX / amax).round().clamp(-128.0, 127.0).to(torch.int8)
    # By a tensor, not a number: eager CUDA turns a division by a number into a product with its reciprocal, which
    # rounds differently from every other path in one row of 30
    return codes, amax / torch.full_like(amax, INT8_MAX)
