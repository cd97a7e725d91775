"""Loss and logits gradient of LM loss + KL, one pass over two logits matrices (Triton).

For each row, with z the student's logits, t the teacher's, at temperature tau of the KL:

    LM = lse(z) - z[target]
    KL = sum_v softmax(t / tau)_v (t_v - z_v) / tau - lse(t / tau) + lse(z / tau)
    dz = a (softmax(z) - onehot(target)) + b / tau (softmax(z / tau) - softmax(t / tau))

The first pass is an online softmax with running maxima; the second writes dz over z. Logits are read in their
own dtype (bfloat16 in training) and all arithmetic is float32. The slow twin is
`losses.logits.language_model_chunk`.

Shape legend: N tokens, V vocabulary, H hidden size.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _rows_kernel(
    student_ptr,
    teacher_ptr,
    target_ptr,
    lm_ptr,
    kl_ptr,
    student_stride,
    teacher_stride,
    vocabulary,
    lm_weight,
    kl_weight,
    inv_tau,
    HAS_TEACHER: tl.constexpr,
    ONE_TEMPERATURE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    student_ptr += row * student_stride
    teacher_ptr += row * teacher_stride
    target = tl.load(target_ptr + row)
    counts = target >= 0
    columns = tl.arange(0, BLOCK)

    # Lane by lane: running maxima and sums, joined after the loop. Maxima start at a finite value so that
    # inf - inf cannot appear in a lane that saw no column.
    z_max = tl.full([BLOCK], -1e30, tl.float32)
    z_sum = tl.zeros([BLOCK], tl.float32)
    s_max = tl.full([BLOCK], -1e30, tl.float32)
    s_sum = tl.zeros([BLOCK], tl.float32)
    t_max = tl.full([BLOCK], -1e30, tl.float32)
    t_sum = tl.zeros([BLOCK], tl.float32)
    t_gap = tl.zeros([BLOCK], tl.float32)
    for start in range(0, vocabulary, BLOCK):
        inside = start + columns < vocabulary
        z = tl.load(student_ptr + start + columns, mask=inside, other=-1e30).to(tl.float32)
        new = tl.maximum(z_max, z)
        z_sum = z_sum * tl.exp(z_max - new) + tl.where(inside, tl.exp(z - new), 0.0)
        z_max = new
        if HAS_TEACHER:
            t = tl.load(teacher_ptr + start + columns, mask=inside, other=-1e30).to(tl.float32) * inv_tau
            s = z * inv_tau
            if not ONE_TEMPERATURE:
                new_s = tl.maximum(s_max, s)
                s_sum = s_sum * tl.exp(s_max - new_s) + tl.where(inside, tl.exp(s - new_s), 0.0)
                s_max = new_s
            new_t = tl.maximum(t_max, t)
            shrink = tl.exp(t_max - new_t)
            mass = tl.where(inside, tl.exp(t - new_t), 0.0)
            t_sum = t_sum * shrink + mass
            t_gap = t_gap * shrink + mass * tl.where(inside, t - s, 0.0)
            t_max = new_t
    z_top = tl.max(z_max, 0)
    z_lse = z_top + tl.log(tl.sum(z_sum * tl.exp(z_max - z_top), 0))
    picked = tl.load(student_ptr + target, mask=counts, other=0.0).to(tl.float32)
    lm = tl.where(counts, z_lse - picked, 0.0)
    tl.store(lm_ptr + row, lm)
    s_lse = z_lse
    t_lse = z_lse
    if HAS_TEACHER:
        if not ONE_TEMPERATURE:
            s_top = tl.max(s_max, 0)
            s_lse = s_top + tl.log(tl.sum(s_sum * tl.exp(s_max - s_top), 0))
        t_top = tl.max(t_max, 0)
        weights = tl.exp(t_max - t_top)
        mass_sum = tl.sum(t_sum * weights, 0)
        t_lse = t_top + tl.log(mass_sum)
        kl = tl.sum(t_gap * weights, 0) / mass_sum - t_lse + s_lse
        tl.store(kl_ptr + row, tl.where(counts, kl, 0.0))
    # Every thread has read `picked` before any overwrites it.
    tl.debug_barrier()

    a = tl.where(counts, lm_weight, 0.0)
    b = tl.where(counts, kl_weight * inv_tau, 0.0)
    for start in range(0, vocabulary, BLOCK):
        column = start + columns
        inside = column < vocabulary
        z = tl.load(student_ptr + column, mask=inside, other=0.0).to(tl.float32)
        probs = tl.exp(z - z_lse)
        grad = a * (probs - tl.where(column == target, 1.0, 0.0))
        if HAS_TEACHER:
            t = tl.load(teacher_ptr + column, mask=inside, other=0.0).to(tl.float32) * inv_tau
            probs_tau = probs
            if not ONE_TEMPERATURE:
                probs_tau = tl.exp(z * inv_tau - s_lse)
            grad += b * (probs_tau - tl.exp(t - t_lse))
        # A row that does not count gives exact zeros, whatever its logits are.
        grad = tl.where(counts, grad, 0.0)
        tl.store(student_ptr + column, grad.to(student_ptr.dtype.element_ty), mask=inside)


def rows_loss_(
    student_NV: Tensor,
    teacher_NV: Tensor | None,
    targets_N: Tensor,
    lm_weight: float,
    kl_weight: float,
    temperature: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """LM loss and KL of each row (float32 [N]); `student_NV` is overwritten with the gradient of
    ``lm_weight * LM + kl_weight * KL``.

    Args:
        student_NV, teacher_NV: logits of one float dtype, last dimension contiguous.
        targets_N: int64; a negative target makes a row count for nothing (losses 0, gradient 0).

    Raises:
        ValueError: shapes or strides do not fit.
    """
    n, vocabulary = student_NV.shape
    if targets_N.shape != (n,) or student_NV.stride(1) != 1:
        raise ValueError(
            f"student logits {tuple(student_NV.shape)} with strides {student_NV.stride()}, "
            f"targets {tuple(targets_N.shape)}; one target a row and contiguous rows are needed"
        )
    if teacher_NV is not None and (teacher_NV.shape != student_NV.shape or teacher_NV.stride(1) != 1):
        raise ValueError(
            f"student logits {tuple(student_NV.shape)}, teacher logits {tuple(teacher_NV.shape)} with strides "
            f"{teacher_NV.stride()}; equal shapes and contiguous rows are needed"
        )
    lm_N = torch.empty(n, dtype=torch.float32, device=student_NV.device)
    kl_N = torch.empty_like(lm_N) if teacher_NV is not None else torch.zeros_like(lm_N)
    if n == 0:
        return lm_N, kl_N
    teacher = student_NV if teacher_NV is None else teacher_NV
    block = min(2048, triton.next_power_of_2(vocabulary))
    _rows_kernel[(n,)](
        student_NV,
        teacher,
        targets_N,
        lm_N,
        kl_N,
        student_NV.stride(0),
        teacher.stride(0),
        vocabulary,
        float(lm_weight),
        float(kl_weight),
        1.0 / temperature,
        HAS_TEACHER=teacher_NV is not None,
        ONE_TEMPERATURE=temperature == 1.0,
        BLOCK=block,
        num_warps=8,
    )
    return lm_N, kl_N


def fused_language_model_chunk(
    hidden_NH: Tensor,
    head_VH: Tensor,
    targets_N: Tensor,
    teacher_hidden_NH: Tensor | None,
    teacher_head_VH: Tensor | None,
    lm_weight: float,
    kl_weight: float,
    temperature: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`losses.logits.language_model_chunk` with the kernel above: same arguments, same results."""
    logits = hidden_NH @ head_VH.t()
    teacher = None
    if teacher_hidden_NH is not None and teacher_head_VH is not None:
        teacher = teacher_hidden_NH @ teacher_head_VH.t()
    lm_N, kl_N = rows_loss_(logits, teacher, targets_N, lm_weight, kl_weight, temperature)
    return lm_N.sum(), kl_N.sum(), logits @ head_VH, logits.t() @ hidden_NH


# Logits exist in bfloat16 only, so chunks may be four times as large as the plain twin's. With the head's gradient
# read and written once a chunk, that is 7 of about 110 ms a step at a vocabulary of 152k and 0.6B parameters.
fused_language_model_chunk.chunk_elements = 1 << 30  # type: ignore[attr-defined]
