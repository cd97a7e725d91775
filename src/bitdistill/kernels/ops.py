"""The kernels as torch operators, opaque to torch.compile: Triton on CUDA tensors, the plain twins on others."""

from __future__ import annotations

import torch
from torch import Tensor

from bitdistill.kernels import twins


@torch.library.custom_op("bitdistill::norm_quantize", mutates_args=())
def norm_quantize(
    x_NX: Tensor, gain_I: Tensor | None, eps: float, gain_offset: float, activation: str
) -> tuple[Tensor, Tensor, Tensor]:
    """int8 codes [N, I], scales [N] and 1 / rms [N]; see `norm_quantize.py`."""
    if x_NX.is_cuda:
        from bitdistill.kernels import norm_quantize as kernels

        return kernels.norm_quantize(x_NX, gain_I, eps, gain_offset, activation)
    return twins.norm_quantize(x_NX, gain_I, eps, gain_offset, activation)


@norm_quantize.register_fake
def _(x_NX: Tensor, gain_I: Tensor | None, eps: float, gain_offset: float, activation: str) -> object:
    n, columns = x_NX.shape[0], x_NX.shape[1] // (1 if activation == "none" else 2)
    scale = x_NX.new_empty(n, dtype=torch.float32)
    return x_NX.new_empty(n, columns, dtype=torch.int8), scale, torch.empty_like(scale)


@torch.library.custom_op("bitdistill::norm_quantize_backward", mutates_args=())
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
    """Gradient of x, partial sums of the gain's, and x_hat; see `norm_quantize.py`."""
    arguments = (grad_NI, grad_scale, x_NX, gain_I, rrms_N, codes_NI, scale_N, out_scale_X)
    if x_NX.is_cuda:
        from bitdistill.kernels import norm_quantize as kernels

        return kernels.norm_quantize_backward(*arguments, gain_offset, activation)
    return twins.norm_quantize_backward(*arguments, gain_offset, activation)


@norm_quantize_backward.register_fake
def _(
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
) -> object:
    out = x_NX.new_empty(x_NX.shape, dtype=x_NX.dtype if activation == "none" else grad_NI.dtype)
    columns, programs = grad_NI.shape[1], 1
    if x_NX.is_cuda and gain_I is not None:
        from bitdistill.kernels import norm_quantize as kernels

        programs = kernels.programs_of(int(columns), activation, x_NX.device)
    gain_grad = x_NX.new_empty(programs, columns, dtype=torch.float32)
    return out, gain_grad, grad_NI.new_empty(grad_NI.shape)


@torch.library.custom_op("bitdistill::sum_rows", mutates_args=())
def sum_rows(partials: list[Tensor]) -> Tensor:
    """Sums over rows, side by side; see `norm_quantize.py`."""
    if partials[0].is_cuda:
        from bitdistill.kernels import norm_quantize as kernels

        return kernels.sum_rows(partials)
    return twins.sum_rows(partials)


@sum_rows.register_fake
def _(partials: list[Tensor]) -> object:
    return partials[0].new_empty(sum(part.shape[1] for part in partials))


@torch.library.custom_op("bitdistill::int8_product", mutates_args=())
def int8_product(
    x_NI: Tensor, x_scale_N: Tensor, w_OI: Tensor, w_scale_O: Tensor, dtype: torch.dtype
) -> Tensor:
    """float32(x w^T) * (x_scale * w_scale) in `dtype`; see `matmul.py`."""
    if x_NI.is_cuda:
        from bitdistill.kernels import matmul as kernels

        return kernels.int8_product(x_NI, x_scale_N, w_OI, w_scale_O, dtype)
    return twins.int8_product(x_NI, x_scale_N, w_OI, w_scale_O, dtype)


@int8_product.register_fake
def _(x_NI: Tensor, x_scale_N: Tensor, w_OI: Tensor, w_scale_O: Tensor, dtype: torch.dtype) -> object:
    return x_NI.new_empty(x_NI.shape[0], w_OI.shape[0], dtype=dtype)


@torch.library.custom_op("bitdistill::stack_scaled", mutates_args=())
def stack_scaled(parts: list[Tensor], scale_O: Tensor) -> Tensor:
    """Parts side by side, each times its scale; see `stack.py`."""
    if scale_O.is_cuda:
        from bitdistill.kernels import stack as kernels

        return kernels.stack_scaled(parts, scale_O)
    return twins.stack_scaled(parts, scale_O)


@stack_scaled.register_fake
def _(parts: list[Tensor], scale_O: Tensor) -> object:
    return parts[0].new_empty(parts[0].shape[0], scale_O.shape[0])
