"""Attention-relation distillation (paper, Eq. 12 and 13; after MiniLM).

    L_AD = sum over j in {Q, K, V} of alpha_j * 1 / (A_r |x|) * sum over heads a, tokens t of
           KL( R^T_{j,a,t} || R^S_{j,a,t} )

R is the row-softmax of the states' self-similarity. Two definitions are in circulation and are not
equivalent, so the choice is a named option:

    scaled_dot:  softmax(A A^T / sqrt(d_r))                       the paper's Eq. 12
    cosine:      softmax(A_hat A_hat^T / temperature), rows of A_hat L2-normalised   Algorithm 1, PR 382

Relations run over all positions (no causal mask: states are compared, not attended to), but never over
padding. States are those after q/k-norm and RoPE and before the repetition of grouped heads.

Shape legend: B batch, H heads, T tokens, D head size, A relation heads.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def split_relation_heads(states_BHTD: Tensor, heads: int | None) -> Tensor:
    """Re-split [B, H, T, D] into `heads` relation heads [B, A, T, H*D/A]; None keeps H.

    Raises:
        ValueError: `heads` does not divide H * D.
    """
    if heads is None or heads == states_BHTD.shape[1]:
        return states_BHTD
    batch, own_heads, tokens, head_size = states_BHTD.shape
    width = own_heads * head_size
    if width % heads:
        raise ValueError(
            f"relation heads {heads} do not divide the states' width {width} ({own_heads} x {head_size})"
        )
    merged = states_BHTD.transpose(1, 2).reshape(batch, tokens, heads, width // heads)
    return merged.transpose(1, 2)


def relation_log_probs(
    states_BATD: Tensor, mask_BT: Tensor, *, form: str = "scaled_dot", temperature: float = 1.0
) -> Tensor:
    """Log of the relation matrices, float32 [B, A, T, T]; padded columns hold -inf.

    Args:
        states_BATD: Q, K or V states by relation head.
        mask_BT: True at real tokens.
        form: "scaled_dot" or "cosine".
        temperature: divides the cosine similarities.
    """
    states = states_BATD.float()
    # Under autocast the products below would be rounded to bfloat16: with a student near its teacher that made the
    # loss five times what it is.
    with torch.autocast(states.device.type, enabled=False):
        if form == "scaled_dot":
            scores = states @ states.transpose(-1, -2) / math.sqrt(states.shape[-1])
        elif form == "cosine":
            unit = torch.nn.functional.normalize(states, dim=-1)
            scores = unit @ unit.transpose(-1, -2) / temperature
        else:
            raise ValueError(f"relation form {form!r}: expected 'scaled_dot' or 'cosine'")
    scores = scores.masked_fill(~mask_BT[:, None, None, :], -torch.inf)
    return torch.log_softmax(scores, dim=-1)


def unpacked(states_1HTD: Tensor, starts_R: Tensor, longest: int) -> tuple[Tensor, Tensor]:
    """Packed rows as padded ones: states [R, H, longest, D], and the mask [R, longest] of what is real."""
    at = torch.arange(longest, device=starts_R.device)
    mask_RT = at[None, :] < (starts_R[1:-1] - starts_R[:-2])[:, None]
    index_RT = torch.where(mask_RT, starts_R[:-2, None] + at[None, :], 0)
    return states_1HTD[0][:, index_RT].transpose(0, 1), mask_RT


def relation_loss_sum(
    student_BHTD: Tensor,
    teacher_BHTD: Tensor,
    mask_BT: Tensor,
    *,
    form: str = "scaled_dot",
    temperature: float = 1.0,
    heads: int | None = None,
) -> Tensor:
    """Sum over batch rows of 1 / (A_r |x|) * sum_{a,t} KL(R^T || R^S), float32 scalar (paper, Eq. 12).

    Divide by the number of rows for the batch mean. Teacher and student may differ in width when `heads`
    is given; they must agree in relation heads.

    Raises:
        ValueError: head counts differ.
    """
    student = split_relation_heads(student_BHTD, heads)
    teacher = split_relation_heads(teacher_BHTD.detach(), heads)
    if student.shape[1] != teacher.shape[1]:
        raise ValueError(
            f"student has {student.shape[1]} relation heads, teacher {teacher.shape[1]}; set distill.relation.heads"
        )
    log_student = relation_log_probs(student, mask_BT, form=form, temperature=temperature)
    log_teacher = relation_log_probs(teacher, mask_BT, form=form, temperature=temperature)
    pair_mask = mask_BT[:, None, :, None] & mask_BT[:, None, None, :]
    # exp(-inf) * (-inf - -inf) is NaN in padding: blank it before the product, so gradients stay finite too
    difference = (log_teacher - log_student).masked_fill(~pair_mask, 0.0)
    kl_BAT = (log_teacher.exp() * difference).sum(dim=-1)
    tokens_B = mask_BT.sum(dim=-1).clamp_min(1)
    per_row = kl_BAT.sum(dim=(1, 2)) / (student.shape[1] * tokens_B)
    return per_row.sum()


def attention_distillation_sum(
    student_states: tuple[Tensor, Tensor, Tensor],
    teacher_states: tuple[Tensor, Tensor, Tensor],
    mask_BT: Tensor,
    *,
    alphas: tuple[float, float, float] = (1.0, 1.0, 1.0),
    form: str = "scaled_dot",
    temperature: float = 1.0,
    heads: int | None = None,
    starts_R: Tensor | None = None,
    longest: int = 0,
) -> Tensor:
    """Alpha-weighted sum of `relation_loss_sum` over Q, K and V of one layer (paper, Eq. 13).

    `starts_R` and `longest` (`Batch.documents`) are for packed rows.
    """
    total = torch.zeros((), dtype=torch.float32, device=mask_BT.device)
    for alpha, student, teacher in zip(alphas, student_states, teacher_states, strict=True):
        if alpha:
            if starts_R is not None:
                student, mask_BT = unpacked(student, starts_R, longest)
                teacher, mask_BT = unpacked(teacher, starts_R, longest)
            loss = relation_loss_sum(
                student, teacher, mask_BT, form=form, temperature=temperature, heads=heads
            )
            total = total + alpha * loss
    return total


def documents_of(mask_BT: Tensor, starts_R: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """First row and end of each flat row's document, int32 [B * T]; equal at padding.

    Rows are padded on the right, or packed into one row that starts at `starts_R` (`Batch.starts_R`).
    """
    if starts_R is not None:
        at_T = torch.arange(mask_BT.numel(), device=mask_BT.device, dtype=torch.int32)
        row_T = torch.searchsorted(starts_R[1:].contiguous(), at_T, right=True)
        begin_T = starts_R[row_T]
        return begin_T, torch.where(mask_BT.flatten(), starts_R[row_T + 1], begin_T)
    rows, tokens = mask_BT.shape
    first_B1 = torch.arange(rows, device=mask_BT.device, dtype=torch.int32)[:, None] * tokens
    end_B1 = first_B1 + mask_BT.sum(dim=1, keepdim=True, dtype=torch.int32)
    begin_BT = first_B1.expand(rows, tokens)
    return begin_BT.flatten(), torch.where(mask_BT, end_B1, begin_BT).flatten()


def fused_attention_distillation_sum(
    student_states: tuple[Tensor, Tensor, Tensor],
    teacher_states: tuple[Tensor, Tensor, Tensor],
    mask_BT: Tensor,
    *,
    alphas: tuple[float, float, float] = (1.0, 1.0, 1.0),
    form: str = "scaled_dot",
    temperature: float = 1.0,
    heads: int | None = None,
    starts_R: Tensor | None = None,
    longest: int = 0,
) -> Tensor:
    """`attention_distillation_sum` by the kernels of `kernels.relation`: no [T, T] matrix, scores in float32.

    States whose heads are too large for the kernels go through `relation_loss_sum`.
    """
    from bitdistill.kernels.relation import fits, relation_rows_sum

    begin_M, end_M = documents_of(mask_BT, starts_R)
    length_M = (end_M - begin_M).clamp_min(1)
    total = torch.zeros((), dtype=torch.float32, device=mask_BT.device)
    for alpha, student_BHTD, teacher_BHTD in zip(alphas, student_states, teacher_states, strict=True):
        if not alpha:
            continue
        student = _rows_first(split_relation_heads(student_BHTD, heads))
        teacher = _rows_first(split_relation_heads(teacher_BHTD.detach(), heads)).to(student.dtype)
        if form not in ("scaled_dot", "cosine") or not fits(student, teacher):
            total = total + attention_distillation_sum(
                (student_BHTD,) * 3,
                (teacher_BHTD,) * 3,
                mask_BT,
                alphas=(alpha, 0.0, 0.0),
                form=form,
                temperature=temperature,
                heads=heads,
                starts_R=starts_R,
                longest=longest,
            )
            continue
        factors = [1 / math.sqrt(x.shape[2]) for x in (student, teacher)]
        if form == "cosine":
            student, teacher = (
                torch.nn.functional.normalize(x.float(), dim=-1).to(x.dtype) for x in (student, teacher)
            )
            factors = [1 / temperature] * 2
        weight_M = 1 / (student.shape[1] * length_M.float())
        total = total + alpha * relation_rows_sum(student, teacher, begin_M, end_M, weight_M, *factors)
    return total


def _rows_first(states_BATD: Tensor) -> Tensor:
    """[B, A, T, D] -> [B * T, A, D]: a view where memory is in token order, as projections leave it."""
    return states_BATD.transpose(1, 2).flatten(0, 1)
