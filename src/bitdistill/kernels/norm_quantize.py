"""Norm and int8 quantization of rows in one pass, forward and backward (Triton).

Forward, a row at a time, float32 throughout:

    h = x                                  or act(gate) * up of the two halves of x
    y = h * rsqrt(mean(h^2) + eps) * g     if there is a norm (g: its gain, plus 1 in Gemma's convention)
    q = rint((y * 127) / amax(|y|)),  scale = amax / 127

Division and rounding are IEEE (div_rn; half to even by adding 1.5 * 2^23), so codes and scales are those of
`quant.ternary.quantize_activations` on the same y. torch.compile's own kernels divide approximately and turn
/ 127 into a product. Backward is the straight-through estimator, then the norm, then the gate; it also gives
x_hat = q * scale for the weights' gradient. The slow twins are in `kernels/twins.py`.

Shape legend: N rows, I features, P programs.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

ACTIVATIONS = {"none": 0, "silu": 1, "gelu_tanh": 2}
WIDE = 4096
"""Columns of the longest row that the backward kernel keeps in registers."""
_MAGIC = tl.constexpr(12582912.0)  # 1.5 * 2^23: adding and subtracting it rounds |v| < 2^22 half to even
_EPSILON = tl.constexpr(1e-5)
_ROOT = tl.constexpr(0.7978845608028654)  # sqrt(2 / pi)
_CUBE = tl.constexpr(0.044715)


@triton.jit
def _activation(gate, KIND: tl.constexpr):
    if KIND == 1:
        return gate * tl.sigmoid(gate)
    else:
        inner = _ROOT * (gate + _CUBE * gate * gate * gate)
        return gate * tl.sigmoid(2.0 * inner)  # (1 + tanh(u)) / 2 = sigmoid(2 u)


@triton.jit
def _activation_grad(gate, KIND: tl.constexpr):
    if KIND == 1:
        s = tl.sigmoid(gate)
        return s * (1.0 + gate * (1.0 - s))
    else:
        inner = _ROOT * (gate + _CUBE * gate * gate * gate)
        s = tl.sigmoid(2.0 * inner)
        return s + gate * s * (1.0 - s) * 2.0 * _ROOT * (1.0 + 3.0 * _CUBE * gate * gate)


@triton.jit
def _forward_kernel(
    x_ptr,
    gain_ptr,
    codes_ptr,
    scale_ptr,
    rrms_ptr,
    n_rows,
    n_columns,
    x_stride,
    eps,
    gain_offset,
    NORM: tl.constexpr,
    ACT: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, BLOCK)
    inside = (rows < n_rows)[:, None] & (columns < n_columns)[None, :]
    at = rows.to(tl.int64)[:, None] * x_stride + columns[None, :]
    y = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
    if ACT != 0:
        up = tl.load(x_ptr + at + n_columns, mask=inside, other=0.0).to(tl.float32)
        y = _activation(y, ACT) * up
    if NORM:
        mean = tl.div_rn(tl.sum(y * y, 1), tl.zeros([ROWS], tl.float32) + n_columns)
        rrms = tl.rsqrt(mean + eps)
        gain = tl.load(gain_ptr + columns, mask=columns < n_columns, other=0.0).to(tl.float32) + gain_offset
        y = (y * rrms[:, None]) * gain[None, :]
        tl.store(rrms_ptr + rows, rrms, mask=rows < n_rows)
    amax = tl.maximum(tl.max(tl.abs(y), 1), _EPSILON)
    # tl.max passes NaN over; a row that holds one (or an infinity) must not come out finite.
    poison = tl.sum(y * 0.0, 1)
    # |y * 127 / amax| is at most 127 and a rounding error, so codes stay within int8 without a clamp.
    codes = (tl.div_rn(y * 127.0, tl.broadcast_to(amax[:, None], [ROWS, BLOCK])) + _MAGIC) - _MAGIC
    scale = tl.div_rn(amax, tl.full([ROWS], 127.0, tl.float32)) + poison
    tl.store(
        codes_ptr + rows.to(tl.int64)[:, None] * n_columns + columns[None, :], codes.to(tl.int8), mask=inside
    )
    tl.store(scale_ptr + rows, scale, mask=rows < n_rows)


@triton.jit
def _backward_kernel(
    grad_ptr,
    grad_scale_ptr,
    x_ptr,
    gain_ptr,
    rrms_ptr,
    codes_ptr,
    scale_ptr,
    out_scale_ptr,
    out_ptr,
    gain_grad_ptr,
    x_hat_ptr,
    n_rows,
    n_columns,
    x_stride,
    gain_offset,
    NORM: tl.constexpr,
    ACT: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    columns = tl.arange(0, BLOCK)
    in_row = columns < n_columns
    grad_scale = tl.load(grad_scale_ptr)
    if NORM:
        gain = tl.load(gain_ptr + columns, mask=in_row, other=0.0).to(tl.float32) + gain_offset
        gain_grad = tl.zeros([BLOCK], tl.float32)
    if ACT != 0:
        gate_scale = tl.load(out_scale_ptr)
        up_scale = tl.load(out_scale_ptr + 1)
    blocks = (n_rows + ROWS - 1) // ROWS
    for block in range(tl.program_id(0), blocks, tl.num_programs(0)):
        rows = block * ROWS + tl.arange(0, ROWS)
        inside = (rows < n_rows)[:, None] & in_row[None, :]
        at = rows.to(tl.int64)[:, None] * x_stride + columns[None, :]
        dense = rows.to(tl.int64)[:, None] * n_columns + columns[None, :]

        scale = tl.load(scale_ptr + rows, mask=rows < n_rows, other=0.0)
        codes = tl.load(codes_ptr + dense, mask=inside, other=0).to(tl.float32)
        tl.store(x_hat_ptr + dense, (codes * scale[:, None]).to(x_hat_ptr.dtype.element_ty), mask=inside)

        grad = tl.load(grad_ptr + dense, mask=inside, other=0.0).to(tl.float32) * grad_scale
        h = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
        if ACT != 0:
            gate = h
            up = tl.load(x_ptr + at + n_columns, mask=inside, other=0.0).to(tl.float32)
            h = _activation(gate, ACT) * up
        if NORM:
            rrms = tl.load(rrms_ptr + rows, mask=rows < n_rows, other=0.0)
            h = h * rrms[:, None]
            gain_grad += tl.sum(grad * h, 0)
            grad = grad * gain[None, :]
            along = tl.sum(grad * h, 1) / n_columns
            grad = (grad - h * along[:, None]) * rrms[:, None]
        if ACT != 0:
            d_gate = grad * up * _activation_grad(gate, ACT) * gate_scale
            d_up = grad * _activation(gate, ACT) * up_scale
            wide = rows.to(tl.int64)[:, None] * (2 * n_columns) + columns[None, :]
            tl.store(out_ptr + wide, d_gate.to(out_ptr.dtype.element_ty), mask=inside)
            tl.store(out_ptr + wide + n_columns, d_up.to(out_ptr.dtype.element_ty), mask=inside)
        else:
            tl.store(out_ptr + dense, grad.to(out_ptr.dtype.element_ty), mask=inside)
    if NORM:
        tl.store(gain_grad_ptr + tl.program_id(0) * n_columns + columns, gain_grad, mask=in_row)


@triton.jit
def _wide_backward_kernel(
    grad_ptr,
    grad_scale_ptr,
    x_ptr,
    gain_ptr,
    rrms_ptr,
    codes_ptr,
    scale_ptr,
    out_scale_ptr,
    out_ptr,
    gain_grad_ptr,
    x_hat_ptr,
    n_rows,
    n_columns,
    x_stride,
    gain_offset,
    NORM: tl.constexpr,
    ACT: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """`_backward_kernel` for rows that do not fit registers: BLOCK columns at a time, read twice.

    A program's share of the gain's gradient lies in memory (its own row, so in L2) between the tiles.
    """
    lanes = tl.arange(0, BLOCK)
    grad_scale = tl.load(grad_scale_ptr)
    if ACT != 0:
        gate_scale = tl.load(out_scale_ptr)
        up_scale = tl.load(out_scale_ptr + 1)
    partial_ptr = gain_grad_ptr + tl.program_id(0) * n_columns
    if NORM:
        for start in range(0, n_columns, BLOCK):
            tl.store(
                partial_ptr + start + lanes, tl.zeros([BLOCK], tl.float32), mask=start + lanes < n_columns
            )
        tl.debug_barrier()
    blocks = (n_rows + ROWS - 1) // ROWS
    for block in range(tl.program_id(0), blocks, tl.num_programs(0)):
        rows = block * ROWS + tl.arange(0, ROWS)
        in_rows = rows < n_rows
        scale = tl.load(scale_ptr + rows, mask=in_rows, other=0.0)
        rrms = tl.zeros([ROWS], tl.float32)
        along = tl.zeros([ROWS], tl.float32)
        if NORM:
            rrms = tl.load(rrms_ptr + rows, mask=in_rows, other=0.0)
            for start in range(0, n_columns, BLOCK):
                columns = start + lanes
                inside = in_rows[:, None] & (columns < n_columns)[None, :]
                at = rows.to(tl.int64)[:, None] * x_stride + columns[None, :]
                dense = rows.to(tl.int64)[:, None] * n_columns + columns[None, :]
                grad = tl.load(grad_ptr + dense, mask=inside, other=0.0).to(tl.float32) * grad_scale
                h = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
                if ACT != 0:
                    up = tl.load(x_ptr + at + n_columns, mask=inside, other=0.0).to(tl.float32)
                    h = _activation(h, ACT) * up
                gain = tl.load(gain_ptr + columns, mask=columns < n_columns, other=0.0).to(tl.float32)
                along += tl.sum(grad * (gain + gain_offset)[None, :] * (h * rrms[:, None]), 1)
            along = along / n_columns
        for start in range(0, n_columns, BLOCK):
            columns = start + lanes
            in_row = columns < n_columns
            inside = in_rows[:, None] & in_row[None, :]
            at = rows.to(tl.int64)[:, None] * x_stride + columns[None, :]
            dense = rows.to(tl.int64)[:, None] * n_columns + columns[None, :]
            codes = tl.load(codes_ptr + dense, mask=inside, other=0).to(tl.float32)
            tl.store(x_hat_ptr + dense, (codes * scale[:, None]).to(x_hat_ptr.dtype.element_ty), mask=inside)
            grad = tl.load(grad_ptr + dense, mask=inside, other=0.0).to(tl.float32) * grad_scale
            h = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
            if ACT != 0:
                gate = h
                up = tl.load(x_ptr + at + n_columns, mask=inside, other=0.0).to(tl.float32)
                h = _activation(gate, ACT) * up
            if NORM:
                h = h * rrms[:, None]
                held = tl.load(partial_ptr + columns, mask=in_row, other=0.0)
                tl.store(partial_ptr + columns, held + tl.sum(grad * h, 0), mask=in_row)
                gain = tl.load(gain_ptr + columns, mask=in_row, other=0.0).to(tl.float32) + gain_offset
                grad = (grad * gain[None, :] - h * along[:, None]) * rrms[:, None]
            if ACT != 0:
                d_gate = grad * up * _activation_grad(gate, ACT) * gate_scale
                d_up = grad * _activation(gate, ACT) * up_scale
                wide = rows.to(tl.int64)[:, None] * (2 * n_columns) + columns[None, :]
                tl.store(out_ptr + wide, d_gate.to(out_ptr.dtype.element_ty), mask=inside)
                tl.store(out_ptr + wide + n_columns, d_up.to(out_ptr.dtype.element_ty), mask=inside)
            else:
                tl.store(out_ptr + dense, grad.to(out_ptr.dtype.element_ty), mask=inside)
        # The sums above are read again in the next round, maybe by another thread.
        tl.debug_barrier()


def _forward_tile(columns: int) -> tuple[int, int, int]:
    """Rows at a time, padded row length, warps."""
    block = triton.next_power_of_2(columns)
    return max(1, 2048 // block), block, 4 if block <= 2048 else 8 if block <= 4096 else 16


def _backward_tile(columns: int) -> tuple[int, int, int]:
    """Rows and columns at a time, warps; rows of more columns than that go tile by tile."""
    block = min(triton.next_power_of_2(columns), WIDE)
    if columns > WIDE:
        return 2, 2048, 8
    return max(1, 2048 // block), block, 8 if block <= 2048 else 16


def norm_quantize(
    x_NX: Tensor, gain_I: Tensor | None, eps: float, gain_offset: float, activation: str
) -> tuple[Tensor, Tensor, Tensor]:
    """int8 codes [N, I], float32 scales [N], float32 1 / rms [N] (zeros without a norm).

    Args:
        x_NX: any float dtype, last dimension contiguous, [N, I], or [N, 2 I] (gate, then up) with an activation.
        gain_I: gain of the norm; None: no norm.
        gain_offset: added to the gain (1 in Gemma's convention).
        activation: a key of `ACTIVATIONS`.
    """
    n = x_NX.shape[0]
    columns = x_NX.shape[1] // (1 if activation == "none" else 2)
    if x_NX.stride(1) != 1:
        x_NX = x_NX.contiguous()
    codes = torch.empty(n, columns, dtype=torch.int8, device=x_NX.device)
    scale = torch.empty(n, dtype=torch.float32, device=x_NX.device)
    rrms = torch.zeros_like(scale) if gain_I is None else torch.empty_like(scale)
    rows, block, warps = _forward_tile(columns)
    if n:
        _forward_kernel[(triton.cdiv(n, rows),)](
            x_NX,
            x_NX if gain_I is None else gain_I,
            codes,
            scale,
            rrms,
            n,
            columns,
            x_NX.stride(0),
            eps,
            gain_offset,
            NORM=gain_I is not None,
            ACT=ACTIVATIONS[activation],
            ROWS=rows,
            BLOCK=block,
            num_warps=warps,
        )
    return codes, scale, rrms


def norm_quantize_backward(
    grad_NI: Tensor,
    grad_scale: Tensor,
    x_NX: Tensor,
    gain_I: Tensor | None,
    rrms_N: Tensor,
    codes_NI: Tensor,
    scale_N: Tensor,
    out_scale_2: Tensor,
    gain_offset: float,
    activation: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradient of x, of the gain (float32 [I], zeros without a norm), and x_hat = codes * scale in grad's dtype.

    Args:
        grad_NI: gradient of the quantized rows, to be multiplied by the float32 scalar `grad_scale`.
        rrms_N, codes_NI, scale_N: what the forward gave.
        out_scale_2: float32 [2], multiplied into the gradients of gate and up (the scales of their weights);
            not read without an activation.

    Returns:
        the gradient of x is in x's dtype without an activation, in grad's dtype with one.
    """
    n, columns = grad_NI.shape
    if x_NX.stride(1) != 1:
        x_NX = x_NX.contiguous()
    grad_NI, codes_NI = grad_NI.contiguous(), codes_NI.contiguous()
    out = torch.empty(
        x_NX.shape, dtype=x_NX.dtype if activation == "none" else grad_NI.dtype, device=x_NX.device
    )
    x_hat = torch.empty_like(grad_NI)
    rows, block, warps = _backward_tile(columns)
    programs = min(triton.cdiv(max(n, 1), rows), 4 * _multiprocessors(x_NX.device))
    partial = torch.empty(programs, columns, dtype=torch.float32, device=x_NX.device)
    if gain_I is None or n == 0:
        partial.zero_()
    if n:
        kernel = _wide_backward_kernel if columns > WIDE else _backward_kernel
        kernel[(programs,)](
            grad_NI,
            grad_scale,
            x_NX,
            x_NX if gain_I is None else gain_I,
            rrms_N,
            codes_NI,
            scale_N,
            out_scale_2,
            out,
            partial,
            x_hat,
            n,
            columns,
            x_NX.stride(0),
            gain_offset,
            NORM=gain_I is not None,
            ACT=ACTIVATIONS[activation],
            ROWS=rows,
            BLOCK=block,
            num_warps=warps,
        )
    return out, partial.sum(0), x_hat


def _multiprocessors(device: torch.device) -> int:
    if device.type != "cuda":
        return 2
    return torch.cuda.get_device_properties(device).multi_processor_count
