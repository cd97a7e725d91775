"""Ternary linear layers (paper, sec. 3.1) and SubLN.

Forward, exactly as exported and as the native engine computes it:

    x  = SubLN(x)                          if the layer has one; float32
    q, s_x = quantize_activations(x)       int8, per token
    T, s_w = ternarize(W)                  {-1, 0, 1}, per tensor
    y  = float32(q T^T) * (s_x * s_w) + b  the integer product is exact

Backward is the straight-through estimator on both quantizers (identity Jacobian):

    dL/dx = dL/dy (T s_w),    dL/dW = dL/dy^T (q s_x)

The integer product is carried by int8 tensor cores on a GPU and by float32 on a CPU: integers up to 128
and sums below 2^24 are exact in float32, which holds while in_features * 127 < 2^24 (checked).

Shape legend: N tokens (all leading dimensions together), O out features, I in features.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bitdistill.quant import packing
from bitdistill.quant.ternary import quantize_activations, ternarize

MAX_IN_FEATURES = (1 << 24) // 127


def integer_matmul(x_codes_NI: Tensor, weight_codes_OI: Tensor) -> Tensor:
    """Exact integer product of int8 codes as float32 [N, O].

    Raises:
        ValueError: in_features is so large that a float32 sum could round.
    """
    n, i = x_codes_NI.shape
    o = weight_codes_OI.shape[0]
    if i > MAX_IN_FEATURES:
        raise ValueError(f"in_features {i} exceeds {MAX_IN_FEATURES}: a sum of int8 products could pass 2^24")
    if x_codes_NI.device.type == "cuda":
        # cuBLASLt's int8 product wants more than 16 rows and multiples of 8; zero padding adds nothing.
        pad_n, pad_i, pad_o = max(0, 17 - n), -i % 8, -o % 8
        if pad_n or pad_i:
            x_codes_NI = F.pad(x_codes_NI, (0, pad_i, 0, pad_n))
        if pad_o or pad_i:
            weight_codes_OI = F.pad(weight_codes_OI, (0, pad_i, 0, pad_o))
        product = torch._int_mm(x_codes_NI, weight_codes_OI.t())
        return product[:n, :o].to(torch.float32)
    with torch.autocast(x_codes_NI.device.type, enabled=False):
        return x_codes_NI.to(torch.float32) @ weight_codes_OI.to(torch.float32).t()


class _TernaryMatmul(torch.autograd.Function):
    """y = float32(q T^T) * (s_x * s_w), straight-through gradients; see the module docstring."""

    @staticmethod
    def forward(ctx: Any, x_NI: Tensor, weight_OI: Tensor, out_dtype: torch.dtype) -> Tensor:
        x_codes, x_scale = quantize_activations(x_NI)
        weight_codes, w_scale = ternarize(weight_OI)
        ctx.save_for_backward(x_codes, x_scale, weight_codes, w_scale)
        ctx.x_dtype, ctx.weight_dtype = x_NI.dtype, weight_OI.dtype
        return (integer_matmul(x_codes, weight_codes) * (x_scale * w_scale)).to(out_dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (grad_NO,) = grads
        x_codes, x_scale, weight_codes, w_scale = ctx.saved_tensors
        dtype = grad_NO.dtype
        grad_x = grad_weight = None
        if ctx.needs_input_grad[0]:
            # Codes are exact in bf16, so scaling after the product loses nothing on the weights' side.
            grad_x = ((grad_NO @ weight_codes.to(dtype)).to(torch.float32) * w_scale).to(ctx.x_dtype)
        if ctx.needs_input_grad[1]:
            scaled = (grad_NO.to(torch.float32) * x_scale).to(dtype)
            grad_weight = (scaled.t() @ x_codes.to(dtype)).to(ctx.weight_dtype)
        return grad_x, grad_weight, None


class SubLN(nn.Module):
    """RMSNorm with a learned gain directly before a projection (paper, sec. 3.1). Computes in float32.

    Args:
        features: size of the last dimension.
        eps: added to the mean square.
    """

    def __init__(self, features: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(features))

    def forward(self, x: Tensor) -> Tensor:
        """[..., features], any float dtype -> float32 of the same shape (it feeds the quantizer)."""
        x = x.to(torch.float32)
        rms = torch.rsqrt(x.square().mean(dim=-1, keepdim=True) + self.eps)
        return x * rms * self.weight.to(torch.float32)

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]}, eps={self.eps}"


def out_dtype_of(x: Tensor) -> torch.dtype:
    """Dtype of a layer's output: autocast's if it is on, else the input's."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


class BitLinear(nn.Module):
    """Linear layer with ternary weights and int8 activations, trained through latent weights.

    Args:
        in_features, out_features, bias: as torch.nn.Linear.
        subln: put a SubLN on the input.
        subln_eps: its epsilon; models use their own `rms_norm_eps`, as other tools' sub-norms do.
        quantize_activations: False is an ablation (ternary weights, full-precision activations).

    Attributes:
        quantize_weights: False makes a plain linear layer (for parity checks).
        ternary_blend: lambda of the warm-up; weights are lambda * ternary + (1 - lambda) * latent.
        fused: takes the layer's input instead of the code below, while `models.fused` trains with fused kernels.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool,
        subln: bool,
        quantize_activations: bool = True,
        subln_eps: float = 1e-6,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.weight = nn.Parameter(torch.empty(out_features, in_features))
        self.bias = nn.Parameter(torch.zeros(out_features)) if bias else None
        self.subln = SubLN(in_features, subln_eps) if subln else None
        self.quantize_activations = quantize_activations
        self.quantize_weights = True
        self.ternary_blend = 1.0
        self.fused: Callable[[Tensor], Tensor] | None = None

    @classmethod
    def from_linear(
        cls, linear: nn.Linear, subln: bool, quantize_activations: bool = True, subln_eps: float = 1e-6
    ) -> BitLinear:
        """A BitLinear whose latents are a float32 copy of `linear`'s weights (which are not shared)."""
        has_bias = linear.bias is not None
        with torch.device(linear.weight.device):
            layer = cls(
                linear.in_features, linear.out_features, has_bias, subln, quantize_activations, subln_eps
            )
        with torch.no_grad():
            layer.weight.copy_(linear.weight)
            if layer.bias is not None:
                layer.bias.copy_(linear.bias)
        return layer

    def forward(self, x: Tensor) -> Tensor:
        """[..., in_features] -> [..., out_features] in x's dtype (autocast's dtype under autocast)."""
        if self.fused is not None:
            return self.fused(x)
        out_dtype = out_dtype_of(x)
        if self.subln is not None:
            x = self.subln(x)
        if not self.quantize_weights:
            return F.linear(x, self.weight, self.bias).to(out_dtype)
        if self.quantize_activations and self.ternary_blend == 1.0:
            y = _TernaryMatmul.apply(x.reshape(-1, self.in_features), self.weight, out_dtype)
            y = y.reshape(*x.shape[:-1], self.out_features)
            return y if self.bias is None else y + self.bias.to(out_dtype)
        return self._forward_blended(x).to(out_dtype)

    def _forward_blended(self, x: Tensor) -> Tensor:
        """The slow expression of the same layer, for warm-up and the weights-only ablation."""
        codes, scale = ternarize(self.weight)
        ternary = (codes * scale).to(self.weight.dtype)
        weight = self.weight + self.ternary_blend * (ternary - self.weight).detach()
        if self.quantize_activations:
            x_codes, x_scale = quantize_activations(x)
            x = x + ((x_codes * x_scale).to(x.dtype) - x).detach()
        return F.linear(x.to(weight.dtype), weight, self.bias)

    def extra_repr(self) -> str:
        parts = f"{self.in_features}, {self.out_features}, bias={self.bias is not None}"
        return parts if self.quantize_activations else parts + ", quantize_activations=False"


class PackedBitLinear(nn.Module):
    """A BitLinear as shipped: 2-bit codes and one float32 scale, fixed once (docs/format.md).

    Buffers: `codes` uint8 [out, ceil(in / 4)], `scale` float32 []. Inference only.
    """

    codes: Tensor
    scale: Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool,
        subln: bool,
        quantize_activations: bool = True,
        subln_eps: float = 1e-6,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.register_buffer("codes", torch.zeros(out_features, -(-in_features // 4), dtype=torch.uint8))
        self.register_buffer("scale", torch.ones((), dtype=torch.float32))
        self.bias = nn.Parameter(torch.zeros(out_features), requires_grad=False) if bias else None
        self.subln = SubLN(in_features, subln_eps) if subln else None
        self.quantize_activations = quantize_activations
        self._unpacked: Tensor | None = None

    @classmethod
    def from_bitlinear(cls, layer: BitLinear) -> PackedBitLinear:
        """Quantize the latents once; floats (bias, gain) are copied unrounded."""
        packed = cls(
            layer.in_features,
            layer.out_features,
            layer.bias is not None,
            layer.subln is not None,
            layer.quantize_activations,
        )
        codes, scale = ternarize(layer.weight)
        packed.codes.copy_(packing.pack_2bit(codes.cpu()))
        packed.scale.copy_(scale)
        with torch.no_grad():
            if packed.bias is not None and layer.bias is not None:
                packed.bias.copy_(layer.bias)
            if packed.subln is not None and layer.subln is not None:
                packed.subln.weight.copy_(layer.subln.weight)
                packed.subln.eps = layer.subln.eps
        return packed.to(layer.weight.device)

    def _apply(self, fn: Any, recurse: bool = True) -> PackedBitLinear:
        """Move the layer; the scale stays float32 whatever dtype the rest of a model is cast to."""
        scale = self.scale
        super()._apply(fn, recurse)
        self.scale = scale.to(self.codes.device)
        self._unpacked = None
        return self

    def weight_codes(self) -> Tensor:
        """Unpacked codes [out, in], kept after the first call: int8 on a GPU, float32 integers on a CPU."""
        kept = self._unpacked
        if kept is None or kept.device != self.codes.device:
            codes = packing.unpack_2bit(self.codes, self.in_features)
            # float32 once, so that the CPU's product needs no conversion at each call
            kept = codes if codes.is_cuda else codes.to(torch.float32)
            self._unpacked = kept
        return kept

    def forward(self, x: Tensor) -> Tensor:
        """[..., in_features] -> [..., out_features]; the same integers as BitLinear's forward."""
        out_dtype = out_dtype_of(x)
        if self.subln is not None:
            x = self.subln(x)
        codes = self.weight_codes()
        if self.quantize_activations:
            x_codes, x_scale = quantize_activations(x.reshape(-1, self.in_features))
            y = (integer_matmul(x_codes, codes) * (x_scale * self.scale)).to(out_dtype)
            y = y.reshape(*x.shape[:-1], self.out_features)
            return y if self.bias is None else y + self.bias.to(out_dtype)
        weight = (codes.to(torch.float32) * self.scale).to(x.dtype)
        return F.linear(x, weight, None if self.bias is None else self.bias.to(x.dtype)).to(out_dtype)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, bias={self.bias is not None}"
