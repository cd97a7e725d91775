"""Attention-relation loss with an online softmax, forward and backward (Triton): no T x T matrix in memory.

Rows of all documents lie one after the other; row t belongs to the document of rows [begin_t, end_t). For each head

    S_ts = c x_t . x_s,   R_t = softmax over s in [begin_t, end_t) of S_ts,   loss = sum_t w_t KL(R^T_t || R^S_t)

S is symmetric, and so is membership of a document. The gradient of x_t therefore needs only the log-sum-exps of
the forward pass, and one loop over s:

    dL/dx_t = c sum_s [w_t (R^S_ts - R^T_ts) + w_s (R^S_st - R^T_st)] x_s

Rows of padding have begin = end and weight 0. The slow twin is `losses.relation.relation_loss_sum`.

Shape legend: M rows (tokens of all documents), A relation heads, D size of a head.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from bitdistill.kernels.runtime import interpreted

LARGEST_HEAD = 256
"""Size of a relation head up to which a tile of rows fits registers."""
_LOW = tl.constexpr(-1e30)


@triton.jit
def _tile(
    x_ptr,
    rows,
    kept,
    head,
    stride_m,
    stride_a,
    SIZE: tl.constexpr,
    BLOCK_D: tl.constexpr,
    WIDEN: tl.constexpr,
):
    d = tl.arange(0, BLOCK_D)
    at = rows.to(tl.int64)[:, None] * stride_m + head * stride_a + d[None, :]
    x = tl.load(x_ptr + at, mask=kept[:, None] & (d < SIZE)[None, :], other=0.0)
    # Triton's interpreter multiplies the bits of bfloat16 values as integers
    return x.to(tl.float32) if WIDEN else x


@triton.jit
def _forward_kernel(
    s_ptr,
    t_ptr,
    begin_ptr,
    end_ptr,
    weight_ptr,
    s_lse_ptr,
    t_lse_ptr,
    loss_ptr,
    n_rows,
    s_stride_m,
    s_stride_a,
    t_stride_m,
    t_stride_a,
    s_factor,
    t_factor,
    S_SIZE: tl.constexpr,
    T_SIZE: tl.constexpr,
    S_BLOCK: tl.constexpr,
    T_BLOCK: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDEN: tl.constexpr,
):
    head = tl.program_id(1)
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    begin = tl.load(begin_ptr + rows, mask=rows < n_rows, other=0)
    end = tl.load(end_ptr + rows, mask=rows < n_rows, other=0)
    real = begin < end
    s_x = _tile(s_ptr, rows, real, head, s_stride_m, s_stride_a, S_SIZE, S_BLOCK, WIDEN)
    t_x = _tile(t_ptr, rows, real, head, t_stride_m, t_stride_a, T_SIZE, T_BLOCK, WIDEN)
    s_max = tl.full([BLOCK_M], _LOW, tl.float32)
    t_max = tl.full([BLOCK_M], _LOW, tl.float32)
    s_sum = tl.zeros([BLOCK_M], tl.float32)
    t_sum = tl.zeros([BLOCK_M], tl.float32)
    gap = tl.zeros([BLOCK_M], tl.float32)
    first = tl.min(tl.where(real, begin, n_rows), 0)
    last = tl.max(tl.where(real, end, 0), 0)
    for start in range(first, last, BLOCK_N):
        columns = start + tl.arange(0, BLOCK_N)
        inside = (columns[None, :] >= begin[:, None]) & (columns[None, :] < end[:, None])
        s_y = _tile(s_ptr, columns, columns < last, head, s_stride_m, s_stride_a, S_SIZE, S_BLOCK, WIDEN)
        t_y = _tile(t_ptr, columns, columns < last, head, t_stride_m, t_stride_a, T_SIZE, T_BLOCK, WIDEN)
        s = tl.where(inside, tl.dot(s_x, tl.trans(s_y), input_precision=PRECISION) * s_factor, _LOW)
        t = tl.where(inside, tl.dot(t_x, tl.trans(t_y), input_precision=PRECISION) * t_factor, _LOW)
        s_new = tl.maximum(s_max, tl.max(s, 1))
        t_new = tl.maximum(t_max, tl.max(t, 1))
        s_sum = s_sum * tl.exp(s_max - s_new) + tl.sum(tl.where(inside, tl.exp(s - s_new[:, None]), 0.0), 1)
        shrink = tl.exp(t_max - t_new)
        mass = tl.where(inside, tl.exp(t - t_new[:, None]), 0.0)
        t_sum = t_sum * shrink + tl.sum(mass, 1)
        gap = gap * shrink + tl.sum(mass * tl.where(inside, t - s, 0.0), 1)
        s_max = s_new
        t_max = t_new
    s_lse = s_max + tl.log(tl.where(real, s_sum, 1.0))
    t_lse = t_max + tl.log(tl.where(real, t_sum, 1.0))
    kl = gap / tl.where(real, t_sum, 1.0) - t_lse + s_lse
    weight = tl.load(weight_ptr + rows, mask=rows < n_rows, other=0.0)
    at = head * n_rows + rows
    tl.store(s_lse_ptr + at, tl.where(real, s_lse, 0.0), mask=rows < n_rows)
    tl.store(t_lse_ptr + at, tl.where(real, t_lse, 0.0), mask=rows < n_rows)
    tl.store(loss_ptr + at, tl.where(real, kl * weight, 0.0), mask=rows < n_rows)


@triton.jit
def _backward_kernel(
    s_ptr,
    t_ptr,
    begin_ptr,
    end_ptr,
    weight_ptr,
    s_lse_ptr,
    t_lse_ptr,
    grad_ptr,
    out_ptr,
    n_rows,
    s_stride_m,
    s_stride_a,
    t_stride_m,
    t_stride_a,
    out_stride_m,
    out_stride_a,
    s_factor,
    t_factor,
    S_SIZE: tl.constexpr,
    T_SIZE: tl.constexpr,
    S_BLOCK: tl.constexpr,
    T_BLOCK: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDEN: tl.constexpr,
):
    head = tl.program_id(1)
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    begin = tl.load(begin_ptr + rows, mask=rows < n_rows, other=0)
    end = tl.load(end_ptr + rows, mask=rows < n_rows, other=0)
    real = begin < end
    s_x = _tile(s_ptr, rows, real, head, s_stride_m, s_stride_a, S_SIZE, S_BLOCK, WIDEN)
    t_x = _tile(t_ptr, rows, real, head, t_stride_m, t_stride_a, T_SIZE, T_BLOCK, WIDEN)
    own = head * n_rows + rows
    s_lse = tl.load(s_lse_ptr + own, mask=real, other=0.0)
    t_lse = tl.load(t_lse_ptr + own, mask=real, other=0.0)
    weight = tl.load(weight_ptr + rows, mask=real, other=0.0)
    total = tl.zeros([BLOCK_M, S_BLOCK], tl.float32)
    first = tl.min(tl.where(real, begin, n_rows), 0)
    last = tl.max(tl.where(real, end, 0), 0)
    for start in range(first, last, BLOCK_N):
        columns = start + tl.arange(0, BLOCK_N)
        # Padding between two documents of this tile is zeroed: 0 * NaN would reach the product below.
        counted = tl.load(begin_ptr + columns, mask=columns < last, other=0) < tl.load(
            end_ptr + columns, mask=columns < last, other=0
        )
        inside = (columns[None, :] >= begin[:, None]) & (columns[None, :] < end[:, None])
        s_y = _tile(s_ptr, columns, counted, head, s_stride_m, s_stride_a, S_SIZE, S_BLOCK, WIDEN)
        t_y = _tile(t_ptr, columns, counted, head, t_stride_m, t_stride_a, T_SIZE, T_BLOCK, WIDEN)
        s = tl.dot(s_x, tl.trans(s_y), input_precision=PRECISION) * s_factor
        t = tl.dot(t_x, tl.trans(t_y), input_precision=PRECISION) * t_factor
        other = head * n_rows + columns
        s_lse_y = tl.load(s_lse_ptr + other, mask=counted, other=0.0)
        t_lse_y = tl.load(t_lse_ptr + other, mask=counted, other=0.0)
        weight_y = tl.load(weight_ptr + columns, mask=counted, other=0.0)
        along = weight[:, None] * (tl.exp(s - s_lse[:, None]) - tl.exp(t - t_lse[:, None]))
        across = weight_y[None, :] * (tl.exp(s - s_lse_y[None, :]) - tl.exp(t - t_lse_y[None, :]))
        pull = tl.where(inside, along + across, 0.0)
        total += tl.dot(pull.to(s_y.dtype), s_y, input_precision=PRECISION)
    d = tl.arange(0, S_BLOCK)
    at = rows.to(tl.int64)[:, None] * out_stride_m + head * out_stride_a + d[None, :]
    grad = total * (s_factor * tl.load(grad_ptr))
    tl.store(
        out_ptr + at, grad.to(out_ptr.dtype.element_ty), mask=(rows < n_rows)[:, None] & (d < S_SIZE)[None, :]
    )


def _tiles(student: Tensor, teacher: Tensor) -> dict[str, Any]:
    sizes = student.shape[2], teacher.shape[2]
    blocks = [max(16, triton.next_power_of_2(size)) for size in sizes]
    rows = 64 if max(blocks) <= 128 else 32
    return {
        "S_SIZE": sizes[0], "T_SIZE": sizes[1], "S_BLOCK": blocks[0], "T_BLOCK": blocks[1],
        "BLOCK_M": rows, "BLOCK_N": rows,
        # Products of bfloat16 values are exact; float32 states are not to be cut down to tf32
        "PRECISION": "ieee", "WIDEN": interpreted(), "num_warps": 4, "num_stages": 2,
    }  # fmt: skip


class _Relation(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        student_MAD: Tensor,
        teacher_MAD: Tensor,
        begin_M: Tensor,
        end_M: Tensor,
        weight_M: Tensor,
        s_factor: float,
        t_factor: float,
    ) -> Tensor:
        rows, heads = student_MAD.shape[:2]
        s_lse, t_lse, loss = torch.empty(3, heads, rows, dtype=torch.float32, device=student_MAD.device)
        tiles = _tiles(student_MAD, teacher_MAD)
        _forward_kernel[(triton.cdiv(rows, tiles["BLOCK_M"]), heads)](
            student_MAD, teacher_MAD, begin_M, end_M, weight_M, s_lse, t_lse, loss, rows,
            *student_MAD.stride()[:2], *teacher_MAD.stride()[:2], s_factor, t_factor, **tiles,
        )  # fmt: skip
        ctx.save_for_backward(student_MAD, teacher_MAD, begin_M, end_M, weight_M, s_lse, t_lse)
        ctx.factors = s_factor, t_factor
        return loss.sum()

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        student_MAD, teacher_MAD, begin_M, end_M, weight_M, s_lse, t_lse = ctx.saved_tensors
        rows, heads = student_MAD.shape[:2]
        out = torch.empty(student_MAD.shape, dtype=student_MAD.dtype, device=student_MAD.device)
        tiles = _tiles(student_MAD, teacher_MAD)
        _backward_kernel[(triton.cdiv(rows, tiles["BLOCK_M"]), heads)](
            student_MAD, teacher_MAD, begin_M, end_M, weight_M, s_lse, t_lse, grads[0].contiguous(), out, rows,
            *student_MAD.stride()[:2], *teacher_MAD.stride()[:2], *out.stride()[:2], *ctx.factors, **tiles,
        )  # fmt: skip
        return out, *(None,) * 6


def fits(student_MAD: Tensor, teacher_MAD: Tensor) -> bool:
    """Whether the kernels take heads of this size."""
    return max(student_MAD.shape[2], teacher_MAD.shape[2]) <= LARGEST_HEAD


def relation_rows_sum(
    student_MAD: Tensor,
    teacher_MAD: Tensor,
    begin_M: Tensor,
    end_M: Tensor,
    weight_M: Tensor,
    s_factor: float,
    t_factor: float,
) -> Tensor:
    """Weighted sum of the KLs of all rows and heads, float32, with gradient to the student's states.

    Args:
        student_MAD, teacher_MAD: states of one float dtype; sizes D may differ.
        begin_M, end_M: int32, the rows of each row's document; equal for rows that count for nothing.
        weight_M: float32, one weight a row.
        s_factor, t_factor: c of student and teacher.

    Raises:
        ValueError: shapes do not fit.
    """
    rows, heads = student_MAD.shape[:2]
    if teacher_MAD.shape[:2] != (rows, heads) or any(x.shape != (rows,) for x in (begin_M, end_M, weight_M)):
        raise ValueError(
            f"student states {tuple(student_MAD.shape)}, teacher states {tuple(teacher_MAD.shape)}, documents "
            f"{tuple(begin_M.shape)}, {tuple(end_M.shape)}, weights {tuple(weight_M.shape)}; one entry a row is needed"
        )
    student_MAD, teacher_MAD = (
        x if x.stride(2) == 1 else x.contiguous() for x in (student_MAD, teacher_MAD.detach())
    )
    loss: Tensor = _Relation.apply(
        student_MAD, teacher_MAD, begin_M, end_M, weight_M, float(s_factor), float(t_factor)
    )
    return loss
