"""Log-likelihoods of label words against a plain float64 twin, and their gradients."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from bitdistill.losses.labels import label_log_likelihoods
from bitdistill.losses.logits import logits_distillation_sum

# Words (3, 5), (3, 1) and (7,): at position 0 tokens 3 and 7 are scored, after the 3 at position 1 tokens 5 and 1
WORDS = ((3, 5), (3, 1), (7,))
POSITION, TOKEN = torch.tensor([0, 0, 1, 1]), torch.tensor([3, 7, 5, 1])
MEMBER = torch.tensor([[True, True, False], [False, False, True], [True, False, False], [False, True, False]])


def logits(seed: int = 0) -> Tensor:
    return torch.randn(4, 2, 9, generator=torch.Generator().manual_seed(seed))


def twin(logits_BPV: Tensor) -> Tensor:
    """Word by word, token by token."""
    rows = []
    for row in logits_BPV.double():
        p = [z.exp() / z.exp().sum() for z in row]
        words = [[p[i][t].log() for i, t in enumerate(word)] for word in WORDS]
        rows.append(torch.stack([torch.stack(word).sum() for word in words]))
    return torch.stack(rows)


@pytest.mark.parametrize("tau", [1.0, 5.0])
def test_label_distillation_equals_a_plain_twin(tau: float) -> None:
    student, teacher = logits().requires_grad_(), 3 * logits(1)
    scores = label_log_likelihoods(student, POSITION, TOKEN, MEMBER)
    targets = label_log_likelihoods(teacher, POSITION, TOKEN, MEMBER)
    assert scores.dtype == torch.float32
    torch.testing.assert_close(scores.double(), twin(student), rtol=1e-5, atol=1e-6)
    loss = logits_distillation_sum(scores, targets, temperature=tau)
    (grad,) = torch.autograd.grad(loss, student)
    plain = student.detach().double().requires_grad_()
    p, q = (torch.exp(twin(z) / tau) for z in (teacher, plain))
    p, q = (x / x.sum(-1, keepdim=True) for x in (p, q))
    want = (p * (p / q).log()).sum()
    (want_grad,) = torch.autograd.grad(want, plain)
    assert loss.item() == pytest.approx(want.item(), rel=1e-5)
    torch.testing.assert_close(grad.double(), want_grad, rtol=1e-4, atol=1e-6)
    # and the twin's own gradient, by differences
    step = torch.zeros_like(plain)
    step[1, 0, 3] = step[2, 1, 5] = 1e-4
    ends = []
    for sign in (1, -1):
        q = torch.exp(twin(plain.detach() + sign * step) / tau)
        ends.append((p.detach() * (p.detach() / (q / q.sum(-1, keepdim=True))).log()).sum())
    slope = (ends[0] - ends[1]) / 2e-4
    assert slope.item() == pytest.approx((want_grad[1, 0, 3] + want_grad[2, 1, 5]).item(), rel=1e-4)


def test_words_of_one_token_are_the_logits_of_their_tokens() -> None:
    """The norm over the vocabulary cancels: LD as ever, but over the labels' tokens."""
    student, teacher, token = logits()[:, :1], logits(1)[:, :1], torch.tensor([2, 7])
    where, member = torch.zeros(2, dtype=torch.int64), torch.eye(2, dtype=torch.bool)
    scores = [label_log_likelihoods(z, where, token, member) for z in (student, teacher)]
    want = logits_distillation_sum(student[:, 0, token], teacher[:, 0, token], temperature=2.0)
    torch.testing.assert_close(logits_distillation_sum(*scores, temperature=2.0), want)


def test_autocast_does_not_round() -> None:
    z = 20 * logits()
    want = label_log_likelihoods(z, POSITION, TOKEN, MEMBER)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = label_log_likelihoods(z, POSITION, TOKEN, MEMBER)
    assert torch.equal(found, want)


def test_shapes_that_do_not_fit_are_named() -> None:
    with pytest.raises(ValueError, match=r"logits \(4, 9\) \(B, P, V are needed\), 4 positions, 4 tokens"):
        label_log_likelihoods(logits()[:, 0], POSITION, TOKEN, MEMBER)
    with pytest.raises(ValueError, match="3 tokens, 4 rows of members"):
        label_log_likelihoods(logits(), POSITION, TOKEN[:3], MEMBER)
