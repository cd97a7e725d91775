"""Norm and int8 quantization of rows in one pass, forward and backward (Triton).

Forward, a row at a time, float32 throughout:

    h = x                                  or act(gate) * up of the two halves of x
    y = h * rsqrt(mean(h^2) + eps) * g     if there is a norm (g: its gain, plus 1 in Gemma's convention)
    q = rint((y * 127) / amax(|y|)),  scale = amax / 127

Division and rounding are IEEE (see `_codes`; half to even by adding 1.5 * 2^23), so codes and scales are those of
`quant.ternary.quantize_activations` on the same y. torch.compile's own kernels divide approximately and turn
/ 127 into a product. Backward is the straight-through estimator, then the norm, then the gate; it also gives
x_hat = q * scale for the weights' gradient. The slow twins are in `kernels/twins.py`.

Shape legend: N rows, I features, P programs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

ACTIVATIONS = {"none": 0, "silu": 1, "gelu_tanh": 2}
WIDE = 12288
"""Columns of the longest row that the backward kernel keeps in registers."""
WIDE_ROWS, WIDE_BLOCK = 2, 2048
"""Rows and columns at a time of longer ones."""
SUM_ROWS, SUM_BLOCK = 256, 16
"""Rows and columns at a time of the gains' partial sums."""
MOST_PARTIALS = 3
WARPS = 16
"""Warps of a multiprocessor that the backward kernel's programs are counted for."""
_MAGIC = tl.constexpr(12582912.0)  # 1.5 * 2^23: adding and subtracting it rounds |v| < 2^22 half to even
_EPSILON_BITS = tl.constexpr(0x3727C5AC)  # of float32(1e-5)
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
def _hidden(x_row, columns, inside, n_columns, ACT: tl.constexpr):
    """gate, up and act(gate) * up of a row's columns; x three times without an activation."""
    gate = tl.load(x_row + columns, mask=inside, other=0.0).to(tl.float32)
    up = gate
    h = gate
    if ACT != 0:
        up = tl.load(x_row + n_columns + columns, mask=inside, other=0.0).to(tl.float32)
        h = _activation(gate, ACT) * up
    return gate, up, h


@triton.jit
def _gain(gain_ptr, columns, inside, gain_offset):
    return tl.load(gain_ptr + columns, mask=inside, other=0.0).to(tl.float32) + gain_offset


@triton.jit
def _magnitude(y):
    """Bits of max |y|. As integers they are in the order of the numbers, with infinity and then NaN above all, so a
    row that holds one does not come out finite (a float maximum passes NaN over)."""
    return tl.max(y.to(tl.int32, bitcast=True) & 0x7FFFFFFF, 0)


@triton.jit
def _codes(y, amax, inverse, INTERPRETED: tl.constexpr):
    """rint((y * 127) / amax) in the low byte. |y * 127 / amax| is at most 127 and a rounding error: no clamp.

    The quotient is IEEE's without its instruction, which costs a dozen others and a branch: with the reciprocal
    correctly rounded, one correction brings q within an unit in the last place, and the next one is then correctly
    rounded (Markstein, 1990; Cornea et al., 1999). Where y is so small that a remainder underflows, the code is 0.
    """
    p = y * 127.0
    if INTERPRETED:  # its fma rounds twice
        q = tl.div_rn(p, p * 0.0 + amax)
    else:
        q = p * inverse
        q = tl.fma(tl.fma(-q, amax, p), inverse, q)
        q = tl.fma(tl.fma(-q, amax, p), inverse, q)
    return (q + _MAGIC).to(tl.int32, bitcast=True).to(tl.int8)


@triton.jit
def _forward_kernel(
    x_ptr,
    gain_ptr,
    codes_ptr,
    scale_ptr,
    rrms_ptr,
    n_columns,
    x_stride,
    eps,
    gain_offset,
    NORM: tl.constexpr,
    ACT: tl.constexpr,
    MAIN: tl.constexpr,
    REST: tl.constexpr,
    VECTOR: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """A row a program; its columns are MAIN and, if that is not all, REST more, both powers of two."""
    row = tl.program_id(0).to(tl.int64)
    x_row = x_ptr + row * x_stride
    codes_row = codes_ptr + row * n_columns
    columns = tl.max_contiguous(tl.arange(0, MAIN), VECTOR)
    inside = columns < n_columns
    _, _, y = _hidden(x_row, columns, inside, n_columns, ACT)
    if REST != 0:
        more = MAIN + tl.max_contiguous(tl.arange(0, REST), VECTOR)
        more_inside = more < n_columns
        _, _, z = _hidden(x_row, more, more_inside, n_columns, ACT)
    if NORM:
        squares = tl.sum(y * y, 0)
        if REST != 0:
            squares += tl.sum(z * z, 0)
        rrms = tl.rsqrt(tl.div_rn(squares, tl.full([], 0.0, tl.float32) + n_columns) + eps)
        y = (y * rrms) * _gain(gain_ptr, columns, inside, gain_offset)
        if REST != 0:
            z = (z * rrms) * _gain(gain_ptr, more, more_inside, gain_offset)
        tl.store(rrms_ptr + row, rrms)
    bits = _magnitude(y)
    if REST != 0:
        bits = tl.maximum(bits, _magnitude(z))
    amax = tl.maximum(bits, _EPSILON_BITS).to(tl.float32, bitcast=True)
    inverse = tl.div_rn(1.0, amax)
    tl.store(codes_row + columns, _codes(y, amax, inverse, INTERPRETED), mask=inside)
    if REST != 0:
        tl.store(codes_row + more, _codes(z, amax, inverse, INTERPRETED), mask=more_inside)
    tl.store(scale_ptr + row, tl.div_rn(amax, 127.0))


@triton.jit
def _store_x_hat(x_hat_row, codes_row, scale, columns, inside):
    codes = tl.load(codes_row + columns, mask=inside, other=0).to(tl.float32)
    tl.store(x_hat_row + columns, (codes * scale).to(x_hat_row.dtype.element_ty), mask=inside)


@triton.jit
def _store_grad(out_row, grad, gate, up, gate_scale, up_scale, columns, inside, n_columns, ACT: tl.constexpr):
    kind = out_row.dtype.element_ty
    if ACT != 0:
        d_gate = grad * up * _activation_grad(gate, ACT) * gate_scale
        d_up = grad * _activation(gate, ACT) * up_scale
        tl.store(out_row + columns, d_gate.to(kind), mask=inside)
        tl.store(out_row + n_columns + columns, d_up.to(kind), mask=inside)
    else:
        tl.store(out_row + columns, grad.to(kind), mask=inside)


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
    SCALED: tl.constexpr,
    MAIN: tl.constexpr,
    REST: tl.constexpr,
    VECTOR: tl.constexpr,
):
    """Every P-th row a program, in registers as a whole; the gain's gradient is summed over them there."""
    columns = tl.max_contiguous(tl.arange(0, MAIN), VECTOR)
    inside = columns < n_columns
    gain_grad = tl.zeros([MAIN], tl.float32)
    if REST != 0:
        more = MAIN + tl.max_contiguous(tl.arange(0, REST), VECTOR)
        more_inside = more < n_columns
        more_gain_grad = tl.zeros([REST], tl.float32)
    grad_scale = 1.0
    if SCALED:
        grad_scale = tl.load(grad_scale_ptr)
    gate_scale = grad_scale
    up_scale = grad_scale
    out_stride = n_columns
    if ACT != 0:
        gate_scale = tl.load(out_scale_ptr)
        up_scale = tl.load(out_scale_ptr + n_columns)
        out_stride = 2 * n_columns
    for number in range(tl.program_id(0), n_rows, tl.num_programs(0)):
        row = tl.full([], 0, tl.int64) + number
        grad_row, x_row = grad_ptr + row * n_columns, x_ptr + row * x_stride
        codes_row, x_hat_row, out_row = (
            codes_ptr + row * n_columns,
            x_hat_ptr + row * n_columns,
            out_ptr + row * out_stride,
        )
        grad = tl.load(grad_row + columns, mask=inside, other=0.0).to(tl.float32) * grad_scale
        gate, up, h = _hidden(x_row, columns, inside, n_columns, ACT)
        if REST != 0:
            more_grad = tl.load(grad_row + more, mask=more_inside, other=0.0).to(tl.float32) * grad_scale
            more_gate, more_up, more_h = _hidden(x_row, more, more_inside, n_columns, ACT)
        scale = tl.load(scale_ptr + row)
        _store_x_hat(x_hat_row, codes_row, scale, columns, inside)
        if REST != 0:
            _store_x_hat(x_hat_row, codes_row, scale, more, more_inside)
        if NORM:
            rrms = tl.load(rrms_ptr + row)
            h = h * rrms
            gain_grad += grad * h
            grad = grad * _gain(gain_ptr, columns, inside, gain_offset)
            along = tl.sum(grad * h, 0)
            if REST != 0:
                more_h = more_h * rrms
                more_gain_grad += more_grad * more_h
                more_grad = more_grad * _gain(gain_ptr, more, more_inside, gain_offset)
                along += tl.sum(more_grad * more_h, 0)
            along = along / n_columns
            grad = (grad - h * along) * rrms
            if REST != 0:
                more_grad = (more_grad - more_h * along) * rrms
        _store_grad(out_row, grad, gate, up, gate_scale, up_scale, columns, inside, n_columns, ACT)
        if REST != 0:
            _store_grad(
                out_row,
                more_grad,
                more_gate,
                more_up,
                gate_scale,
                up_scale,
                more,
                more_inside,
                n_columns,
                ACT,
            )
    if NORM:
        own = gain_grad_ptr + tl.program_id(0).to(tl.int64) * n_columns
        tl.store(own + columns, gain_grad, mask=inside)
        if REST != 0:
            tl.store(own + more, more_gain_grad, mask=more_inside)


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
    SCALED: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """`_backward_kernel` for rows that do not fit registers: BLOCK columns at a time, read twice.

    A program's share of the gain's gradient lies in memory (its own row, so in L2) between the tiles.
    """
    lanes = tl.arange(0, BLOCK)
    grad_scale = 1.0
    if SCALED:
        grad_scale = tl.load(grad_scale_ptr)
    if ACT != 0:
        gate_scale = tl.load(out_scale_ptr)
        up_scale = tl.load(out_scale_ptr + n_columns)
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


@dataclass(frozen=True)
class Tile:
    """How a row lies in the registers of a program."""

    main: int
    rest: int
    """Columns: two powers of two, the second 0 if the first is enough. One power of two would leave up to half of
    the lanes idle (576 columns in 1,024)."""
    warps: int


def tile(columns: int, held: int = 24) -> Tile:
    """At most `held` columns a thread (up to 16 warps), so that a row's values fit registers; one warp needs no
    barriers for its sums. The gate's backward holds the most values a column, 121 registers of them with 12."""
    main = 1 << (columns.bit_length() - 1)
    rest = triton.next_power_of_2(columns - main) if columns > main else 0
    warps = triton.next_power_of_2(triton.cdiv(main + rest, 32 * held))
    return Tile(main, rest, min(warps, 16))


def _vector(x_NX: Tensor) -> int:
    """Neighbouring columns of a thread, the same for every tensor of a kernel: where some had more, values would
    change threads through shared memory. 16 bytes of the widest tensor."""
    return 16 // max(x_NX.element_size(), 2)


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
    shape = tile(columns)
    if n:
        _forward_kernel[(n,)](
            x_NX,
            x_NX if gain_I is None else gain_I,
            codes,
            scale,
            rrms,
            columns,
            x_NX.stride(0),
            eps,
            gain_offset,
            NORM=gain_I is not None,
            ACT=ACTIVATIONS[activation],
            MAIN=shape.main,
            REST=shape.rest,
            VECTOR=_vector(x_NX),
            INTERPRETED=not x_NX.is_cuda,
            num_warps=shape.warps,
        )
    return codes, scale, rrms


def programs_of(columns: int, activation: str, device: torch.device) -> int:
    """Programs of the backward kernel: rows of the partial sums, whatever the number of tokens (a compiled graph must
    know the shape)."""
    if columns > WIDE:
        return 4 * _multiprocessors(device)
    return max(1, WARPS // _backward_tile(columns, activation).warps) * _multiprocessors(device)


def _backward_tile(columns: int, activation: str) -> Tile:
    return tile(columns, 24 if activation == "none" else 12)


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
    """Gradient of x; partial sums [P, I] of the gain's, float32 (zeros [1, I] without a norm; `sum_rows` ends them);
    and x_hat = codes * scale in grad's dtype.

    Args:
        grad_NI: gradient of the quantized rows, to be multiplied by the float32 scalar `grad_scale` (None: 1).
        rrms_N, codes_NI, scale_N: what the forward gave.
        out_scale_X: float32; elements 0 and I are multiplied into the gradients of gate and up (the scales of their
            weights, which are the same along each half); not read without an activation.

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
    programs, shape = programs_of(columns, activation, x_NX.device), _backward_tile(columns, activation)
    kept = 1 if gain_I is None else programs
    partial = torch.empty(kept, columns, dtype=torch.float32, device=x_NX.device)
    if gain_I is None or n == 0:
        partial.zero_()
    arguments = (
        grad_NI, scale_N if grad_scale is None else grad_scale, x_NX, x_NX if gain_I is None else gain_I, rrms_N,
        codes_NI, scale_N, out_scale_X, out, partial, x_hat, n, columns, x_NX.stride(0), gain_offset,
    )  # fmt: skip
    kind = {
        "NORM": gain_I is not None,
        "ACT": ACTIVATIONS[activation],
        "SCALED": grad_scale is not None,
    }
    if n and columns > WIDE:
        _wide_backward_kernel[(programs,)](*arguments, **kind, ROWS=WIDE_ROWS, BLOCK=WIDE_BLOCK, num_warps=8)
    elif n:
        _backward_kernel[(programs,)](
            *arguments, **kind, MAIN=shape.main, REST=shape.rest, VECTOR=_vector(x_NX), num_warps=shape.warps
        )
    return out, partial, x_hat


@triton.jit
def _sum_rows_kernel(
    first_ptr,
    second_ptr,
    third_ptr,
    out_ptr,
    first_rows,
    second_rows,
    third_rows,
    first_size,
    second_size,
    third_size,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    part = tl.program_id(1)
    source = first_ptr
    n_rows = first_rows
    size = first_size
    start = 0
    if part == 1:
        source = second_ptr
        n_rows = second_rows
        size = second_size
        start = first_size
    if part == 2:
        source = third_ptr
        n_rows = third_rows
        size = third_size
        start = first_size + second_size
    columns = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    if tl.program_id(0) * BLOCK < size:
        total = tl.zeros([ROWS, BLOCK], tl.float32)
        for begin in range(0, n_rows, ROWS):
            rows = begin + tl.arange(0, ROWS)
            inside = (rows < n_rows)[:, None] & (columns < size)[None, :]
            total += tl.load(source + rows[:, None] * size + columns[None, :], mask=inside, other=0.0)
        tl.store(out_ptr + start + columns, tl.sum(total, 0), mask=columns < size)


def sum_rows(partials: Sequence[Tensor]) -> Tensor:
    """Sums over the rows of one to three float32 tensors [P_k, I_k], side by side in one tensor: one launch for all
    gains of a layer, in an order that does not change from run to run."""
    parts = [part.contiguous() for part in partials]
    sizes = [part.shape[1] for part in parts]
    out = torch.empty(sum(sizes), dtype=torch.float32, device=parts[0].device)
    fill = MOST_PARTIALS - len(parts)
    _sum_rows_kernel[(triton.cdiv(max(sizes), SUM_BLOCK), len(parts))](
        *parts, *[parts[0]] * fill, out, *[part.shape[0] for part in parts], *[0] * fill, *sizes, *[0] * fill,
        ROWS=SUM_ROWS, BLOCK=SUM_BLOCK, num_warps=8,
    )  # fmt: skip
    return out


def _multiprocessors(device: torch.device) -> int:
    if device.type != "cuda":
        return 2
    return torch.cuda.get_device_properties(device).multi_processor_count
