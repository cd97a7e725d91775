"""Cross-entropy and logits distillation (paper, Eq. 9 to 11), on the rows that count only.

    L_CE = mean over answer tokens of -log softmax(z_S)[target]
    L_LD = mean over answer tokens of KL( softmax(z_T / tau) || softmax(z_S / tau) )     no tau^2 factor

Sums are returned, not means, so that gradient accumulation can divide by the whole step's count.
All arithmetic on logits is float32. Shape legend: N tokens that count, V vocabulary, H hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def cross_entropy_sum(logits_NV: Tensor, targets_N: Tensor) -> Tensor:
    """Sum over N of -log softmax(logits)[target], float32 (paper, Eq. 9); targets of -100 count for nothing."""
    return torch.nn.functional.cross_entropy(logits_NV.float(), targets_N, reduction="sum")


def logits_distillation_sum(
    student_NV: Tensor,
    teacher_NV: Tensor,
    *,
    temperature: float,
    tau_squared: bool = False,
    counted_N: Tensor | None = None,
) -> Tensor:
    """Sum over N of KL(softmax(teacher / tau) || softmax(student / tau)), float32 (paper, Eq. 10 and 11).

    Args:
        student_NV, teacher_NV: logits, any float dtype; the teacher's get no gradient.
        temperature: tau > 0.
        tau_squared: multiply by tau^2 (the common convention, and PR 382's; not the paper's).
        counted_N: bool, False where a row is filling; None: all count.

    Raises:
        ValueError: shapes differ (teacher and student need the same vocabulary).
    """
    if student_NV.shape != teacher_NV.shape:
        raise ValueError(
            f"student logits {tuple(student_NV.shape)}, teacher logits {tuple(teacher_NV.shape)}"
        )
    log_student = torch.log_softmax(student_NV.float() / temperature, dim=-1)
    log_teacher = torch.log_softmax(teacher_NV.detach().float() / temperature, dim=-1)
    kl_N = torch.nn.functional.kl_div(log_student, log_teacher, reduction="none", log_target=True).sum(dim=-1)
    if counted_N is not None:
        kl_N = torch.where(counted_N, kl_N, 0.0)
    kl = kl_N.sum()
    return kl * (temperature**2) if tau_squared else kl


def mean_distribution(logits: Sequence[Tensor], temperature: float) -> Tensor:
    """Logits of the mean of several teachers' distributions at a temperature: softmax(result / tau) is that mean.

    Args:
        logits: each [N, V], any float dtype.
        temperature: tau > 0.

    Returns:
        float32 [N, V].
    """
    log_probs = [torch.log_softmax(z.float() / temperature, dim=-1) for z in logits]
    return temperature * torch.stack(log_probs).logsumexp(0)


def language_model_chunk(
    hidden_NH: Tensor,
    head_VH: Tensor,
    targets_N: Tensor,
    teacher_hidden_NH: Tensor | None,
    teacher_head_VH: Tensor | None,
    lm_weight: float,
    kl_weight: float,
    temperature: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Loss sums of one chunk and their analytic gradients, never keeping logits.

    d(CE)/dz = softmax(z) - onehot(target); d(KL)/dz = (softmax(z / tau) - softmax(z_T / tau)) / tau. Rows with a
    negative target count for nothing. The fast twin is `kernels.head.fused_language_model_chunk`.

    Returns:
        LM sum, KL sum (both float32 scalars), gradient of ``lm_weight * LM + kl_weight * KL`` with respect
        to hidden [N, H] and head [V, H].
    """
    logits = (hidden_NH @ head_VH.t()).float()
    log_probs = logits - torch.logsumexp(logits, dim=-1, keepdim=True)
    counted_N1 = targets_N[:, None] >= 0
    picked = log_probs.gather(1, targets_N[:, None].clamp_min(0))
    lm_sum = -torch.where(counted_N1, picked, 0.0).sum()
    grad_logits = lm_weight * log_probs.exp()
    if lm_weight:
        onehot = torch.arange(head_VH.shape[0], device=targets_N.device)[None, :] == targets_N[:, None]
        grad_logits = grad_logits - lm_weight * onehot
    if teacher_hidden_NH is not None and teacher_head_VH is not None:
        teacher_logits = (teacher_hidden_NH @ teacher_head_VH.t()).float()
        if temperature != 1.0:
            log_probs = torch.log_softmax(logits / temperature, dim=-1)
            teacher_logits = teacher_logits / temperature
        teacher_log = teacher_logits - torch.logsumexp(teacher_logits, dim=-1, keepdim=True)
        teacher_probs = teacher_log.exp()
        kl_sum = torch.where(counted_N1, teacher_probs * (teacher_log - log_probs), 0.0).sum()
        grad_logits = grad_logits + (kl_weight / temperature) * (log_probs.exp() - teacher_probs)
    else:
        kl_sum = torch.zeros_like(lm_sum)
    grad_logits = torch.where(counted_N1, grad_logits, 0.0).to(head_VH.dtype)
    return lm_sum, kl_sum, grad_logits @ head_VH, grad_logits.t() @ hidden_NH


def tokens_of_a_chunk(vocabulary: int, elements: int = 1 << 28) -> int:
    """Rows of logits made at a time: a power of two from 128 to 8192, so that batches split evenly."""
    return max(128, min(8192, 1 << max(elements // vocabulary, 1).bit_length() - 1))


class _ChunkedLanguageModelLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_NH: Tensor,
        head_VH: Tensor,
        targets_N: Tensor,
        teacher_hidden_NH: Tensor | None,
        teacher_head_VH: Tensor | None,
        lm_weight: float,
        kl_weight: float,
        temperature: float,
        chunk_tokens: int,
        dtype: torch.dtype,
        chunk_function: Any,
    ) -> tuple[Tensor, Tensor, Tensor]:
        head = head_VH.detach().to(dtype)
        teacher_head = None if teacher_head_VH is None else teacher_head_VH.to(dtype)
        grad_hidden = torch.empty_like(hidden_NH)
        one_chunk = hidden_NH.shape[0] <= chunk_tokens
        # Gradients of the head add up in float32; one chunk's alone need not be copied
        grad_head = head if one_chunk else torch.zeros(head.shape, dtype=torch.float32, device=head.device)
        lm_total = torch.zeros((), dtype=torch.float32, device=hidden_NH.device)
        kl_total = torch.zeros_like(lm_total)
        for start in range(0, hidden_NH.shape[0], chunk_tokens):
            rows = slice(start, start + chunk_tokens)
            teacher = None if teacher_hidden_NH is None else teacher_hidden_NH[rows].to(dtype)
            hidden = hidden_NH[rows].detach().to(dtype)
            lm_sum, kl_sum, grad_h, grad_w = chunk_function(
                hidden, head, targets_N[rows], teacher, teacher_head, lm_weight, kl_weight, temperature
            )
            lm_total += lm_sum
            kl_total += kl_sum
            grad_hidden[rows] = grad_h.to(grad_hidden.dtype)
            grad_head = grad_w if one_chunk else grad_head.add_(grad_w)
        ctx.save_for_backward(grad_hidden, grad_head)
        ctx.head_dtype = head_VH.dtype
        ctx.mark_non_differentiable(lm_total, kl_total)
        return lm_weight * lm_total + kl_weight * kl_total, lm_total, kl_total

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        grad_loss = grads[0]
        grad_hidden, grad_head = ctx.saved_tensors
        scaled_head = (grad_head.to(torch.float32) * grad_loss).to(ctx.head_dtype)
        return grad_hidden * grad_loss.to(grad_hidden.dtype), scaled_head, *(None,) * 9


def chunked_language_model_loss(
    hidden_NH: Tensor,
    head_VH: Tensor,
    targets_N: Tensor,
    *,
    teacher_hidden_NH: Tensor | None = None,
    teacher_head_VH: Tensor | None = None,
    lm_weight: float,
    kl_weight: float,
    temperature: float = 1.0,
    chunk_tokens: int | None = None,
    chunk_function: Any = language_model_chunk,
) -> tuple[Tensor, Tensor, Tensor]:
    """Head product, LM loss at temperature 1 and KL(teacher || student), a chunk of tokens at a time.

    Logits [N, V] never exist as a whole: the gradient with respect to hidden states and head is computed
    with each chunk. The slow twin is `cross_entropy_sum` plus `logits_distillation_sum`.

    Args:
        hidden_NH: student's final hidden states; head_VH: student's head weight.
        targets_N: next tokens, int64; a row with a negative target counts for nothing.
        teacher_hidden_NH, teacher_head_VH: frozen teacher; both or neither.
        lm_weight, kl_weight: weights of the two sums in the returned loss.
        temperature: tau of the KL (no tau^2 factor).
        chunk_tokens: None: so many that a chunk's logits have about 2^28 elements, or the chunk function's
            `chunk_elements`.
        chunk_function: `language_model_chunk`, a compiled form of it, or its fast twin.

    Returns:
        weighted sum (differentiable), LM sum, KL sum (both for the log): float32 scalars.
    """
    if kl_weight and (teacher_hidden_NH is None or teacher_head_VH is None):
        raise ValueError("kl_weight > 0 needs the teacher's hidden states and head")
    dtype = torch.bfloat16 if torch.is_autocast_enabled(hidden_NH.device.type) else head_VH.dtype
    return _ChunkedLanguageModelLoss.apply(
        hidden_NH,
        head_VH,
        targets_N,
        teacher_hidden_NH,
        teacher_head_VH,
        float(lm_weight),
        float(kl_weight),
        float(temperature),
        chunk_tokens
        or tokens_of_a_chunk(head_VH.shape[0], getattr(chunk_function, "chunk_elements", 1 << 28)),
        dtype,
        chunk_function,
    )
