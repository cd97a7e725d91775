"""Losses against slow float64 twins and hand-worked examples."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from bitdistill.losses.balance import GammaBalancer, gradient_norm
from bitdistill.losses.logits import (
    chunked_language_model_loss,
    cross_entropy_sum,
    logits_distillation_sum,
    tokens_of_a_chunk,
)
from bitdistill.losses.relation import attention_distillation_sum, relation_log_probs, relation_loss_sum


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_logits_distillation_by_hand() -> None:
    # teacher softmax = (3/4, 1/4), student = (1/2, 1/2): KL = 3/4 ln(3/2) + 1/4 ln(1/2)
    teacher = torch.tensor([[math.log(3.0), 0.0]])
    student = torch.tensor([[7.0, 7.0]])
    want = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    assert logits_distillation_sum(student, teacher, temperature=1.0).item() == pytest.approx(want, rel=1e-6)
    # at tau = 2 the same logits doubled give the same value; tau^2 is applied only when asked for
    assert logits_distillation_sum(student, 2 * teacher, temperature=2.0).item() == pytest.approx(
        want, rel=1e-6
    )
    squared = logits_distillation_sum(student, 2 * teacher, temperature=2.0, tau_squared=True)
    assert squared.item() == pytest.approx(4 * want, rel=1e-6)


def test_logits_distillation_equals_a_float64_twin() -> None:
    student, teacher = randn(6, 11).requires_grad_(), randn(6, 11, seed=1) * 3
    loss = logits_distillation_sum(student, teacher, temperature=5.0)
    (grad,) = torch.autograd.grad(loss, student)
    z_s, z_t = student.detach().double().requires_grad_(), teacher.double()
    p_t = torch.exp(z_t / 5) / torch.exp(z_t / 5).sum(-1, keepdim=True)
    p_s = torch.exp(z_s / 5) / torch.exp(z_s / 5).sum(-1, keepdim=True)
    want = (p_t * (p_t / p_s).log()).sum()
    (want_grad,) = torch.autograd.grad(want, z_s)
    assert loss.item() == pytest.approx(want.item(), rel=1e-5)
    torch.testing.assert_close(grad.double(), want_grad, rtol=1e-4, atol=1e-7)


def test_logits_distillation_refuses_other_vocabularies() -> None:
    with pytest.raises(ValueError, match="logits"):
        logits_distillation_sum(randn(2, 5), randn(2, 6), temperature=1.0)


@pytest.mark.parametrize(("lm", "kl"), [(1.0, 0.0), (0.0, 1.0), (0.3, 0.7)])
@pytest.mark.parametrize("chunk_tokens", [1, 4, 100, None])
@pytest.mark.parametrize("tau", [1.0, 3.0])
def test_chunked_loss_equals_the_unchunked_twin(
    lm: float, kl: float, tau: float, chunk_tokens: int | None
) -> None:
    hidden, head = randn(9, 6).requires_grad_(), randn(13, 6, seed=1).requires_grad_()
    teacher_hidden, teacher_head = randn(9, 5, seed=2), randn(13, 5, seed=3)
    targets = torch.randint(0, 13, (9,), generator=torch.Generator().manual_seed(4))
    loss, lm_sum, kl_sum = chunked_language_model_loss(
        hidden,
        head,
        targets,
        teacher_hidden_NH=teacher_hidden if kl else None,
        teacher_head_VH=teacher_head if kl else None,
        lm_weight=lm,
        kl_weight=kl,
        temperature=tau,
        chunk_tokens=chunk_tokens,
    )
    (loss * 0.5).backward()
    got = hidden.grad, head.grad
    hidden64, head64 = hidden.detach().double().requires_grad_(), head.detach().double().requires_grad_()
    logits = hidden64 @ head64.t()
    want_lm = torch.nn.functional.cross_entropy(logits, targets, reduction="sum")
    teacher = torch.log_softmax((teacher_hidden @ teacher_head.t()).double() / tau, -1)
    want_kl = torch.nn.functional.kl_div(
        torch.log_softmax(logits / tau, -1), teacher, reduction="sum", log_target=True
    )
    ((lm * want_lm + kl * want_kl) * 0.5).backward()
    assert lm_sum.item() == pytest.approx(want_lm.item(), rel=1e-5)
    if kl:
        assert kl_sum.item() == pytest.approx(want_kl.item(), rel=1e-4)
    torch.testing.assert_close(got[0].double(), hidden64.grad, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(got[1].double(), head64.grad, rtol=1e-4, atol=1e-5)


def test_chunked_loss_leaves_rows_without_target_out() -> None:
    hidden, head, teacher_hidden = randn(5, 6), randn(13, 6, seed=1), randn(5, 6, seed=2)
    targets = torch.tensor([3, -100, 0, 12, -100])
    results = []
    for rows in (torch.arange(5), torch.tensor([0, 2, 3])):
        leaves = hidden.clone().requires_grad_(), head.clone().requires_grad_()
        loss, lm_sum, kl_sum = chunked_language_model_loss(
            leaves[0][rows],
            leaves[1],
            targets[rows],
            teacher_hidden_NH=teacher_hidden[rows],
            teacher_head_VH=head,
            lm_weight=0.4,
            kl_weight=0.6,
        )
        results.append((lm_sum, kl_sum, *torch.autograd.grad(loss, leaves)))
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want)
    assert results[0][2][1].abs().max() == 0


@pytest.mark.parametrize(("vocabulary", "rows"), [(49152, 4096), (151936, 1024), (13, 8192), (1 << 40, 128)])
def test_chunks_are_powers_of_two_within_their_budget(vocabulary: int, rows: int) -> None:
    assert tokens_of_a_chunk(vocabulary) == rows


def slow_relation_loss(
    student: Tensor, teacher: Tensor, mask: Tensor, form: str, temperature: float, heads: int | None
) -> float:
    """Eq. 12 with Python loops in float64."""

    def relations(states_THD: Tensor, head: int) -> Tensor:
        rows = states_THD[:, head].double()
        if form == "cosine":
            rows = rows / rows.norm(dim=-1, keepdim=True)
            return torch.softmax(rows @ rows.t() / temperature, -1)
        return torch.softmax(rows @ rows.t() / math.sqrt(rows.shape[-1]), -1)

    total = 0.0
    for b in range(student.shape[0]):
        count = int(mask[b].sum())
        pair = []
        for states in (student, teacher):
            flat = states[b].transpose(0, 1)[mask[b]]  # T, H, D
            if heads is not None:
                flat = flat.reshape(count, heads, -1)
            pair.append(flat)
        number = pair[0].shape[1]
        for a in range(number):
            r_s, r_t = relations(pair[0], a), relations(pair[1], a)
            total += float((r_t * (r_t / r_s).log()).sum()) / (number * count)
    return total


@pytest.mark.parametrize(("form", "temperature"), [("scaled_dot", 1.0), ("cosine", 0.2)])
@pytest.mark.parametrize("heads", [None, 1, 8])
def test_relation_loss_equals_a_slow_twin(form: str, temperature: float, heads: int | None) -> None:
    student, teacher = randn(3, 4, 7, 6), randn(3, 4, 7, 6, seed=1)
    mask = torch.tensor([[1] * 7, [1] * 4 + [0] * 3, [1] * 1 + [0] * 6], dtype=torch.bool)
    got = relation_loss_sum(student, teacher, mask, form=form, temperature=temperature, heads=heads)
    want = slow_relation_loss(student, teacher, mask, form, temperature, heads)
    assert got.item() == pytest.approx(want, rel=1e-4)


def test_relation_loss_by_hand() -> None:
    """Two tokens, one head, d_r = 1. Teacher states (0, 0): R is uniform. Student (s, 0), s^2 = ln 3."""
    s = math.sqrt(math.log(3.0))
    student = torch.tensor([s, 0.0]).reshape(1, 1, 2, 1)
    teacher = torch.zeros(1, 1, 2, 1)
    # row 0 of R_S: softmax(ln 3, 0) = (3/4, 1/4); row 1: uniform. KL(1/2 || .) of row 0 = ln(2/sqrt(3))
    want = math.log(2 / math.sqrt(3)) / 2  # mean over |x| = 2 tokens
    got = relation_loss_sum(student, teacher, torch.ones(1, 2, dtype=torch.bool))
    assert got.item() == pytest.approx(want, rel=1e-6)


def test_padding_changes_neither_loss_nor_gradient() -> None:
    student, teacher = randn(2, 3, 5, 4).requires_grad_(), randn(2, 3, 5, 4, seed=1)
    mask = torch.ones(2, 5, dtype=torch.bool)
    states = (student, student * 2, student + 1)
    teachers = (teacher, teacher * 0.5, teacher - 1)
    loss = attention_distillation_sum(states, teachers, mask)
    (grad,) = torch.autograd.grad(loss, student)

    def pad(t: Tensor) -> Tensor:
        return torch.cat([t, torch.full((2, 3, 3, 4), 1e4)], dim=2)

    longer = student.detach().requires_grad_()
    padded = attention_distillation_sum(
        (pad(longer), pad(longer * 2), pad(longer + 1)),
        tuple(pad(t) for t in teachers),  # type: ignore[arg-type]
        torch.cat([mask, torch.zeros(2, 3, dtype=torch.bool)], dim=1),
    )
    (padded_grad,) = torch.autograd.grad(padded, longer)
    assert padded.item() == pytest.approx(loss.item(), rel=1e-5)
    assert torch.isfinite(padded_grad).all()
    torch.testing.assert_close(padded_grad, grad, rtol=1e-4, atol=1e-6)


def test_relation_rows_are_distributions_over_real_tokens() -> None:
    mask = torch.tensor([[True, True, False]])
    probs = relation_log_probs(randn(1, 2, 3, 4), mask).exp()
    assert probs[..., 2].abs().max() == 0
    torch.testing.assert_close(probs.sum(-1), torch.ones(1, 2, 3))


def test_equal_states_have_no_loss_and_alphas_weigh() -> None:
    states, other = randn(1, 2, 4, 3), randn(1, 2, 4, 3, seed=1)
    mask = torch.ones(1, 4, dtype=torch.bool)
    same = (states, states, states)
    assert attention_distillation_sum(same, same, mask).item() == pytest.approx(0.0, abs=1e-6)
    only_v = attention_distillation_sum((other, other, other), same, mask, alphas=(0.0, 0.0, 2.0))
    assert only_v.item() == pytest.approx(2 * relation_loss_sum(other, states, mask).item(), rel=1e-6)


def test_relation_errors_say_what_to_change() -> None:
    mask = torch.ones(1, 4, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"distill\.relation\.heads"):
        relation_loss_sum(randn(1, 2, 4, 3), randn(1, 4, 4, 3), mask)
    with pytest.raises(ValueError, match="do not divide"):
        relation_loss_sum(randn(1, 2, 4, 3), randn(1, 2, 4, 3), mask, heads=5)
    with pytest.raises(ValueError, match="scaled_dot"):
        relation_log_probs(randn(1, 2, 4, 3), mask, form="dot")


def test_gamma_balances_gradient_norms() -> None:
    weight = randn(4, 4).requires_grad_()
    x = randn(4)
    ce, ad = (weight @ x).square().sum(), 1e-3 * (weight @ x).sum()
    balancer = GammaBalancer(target_ratio=0.5)
    assert balancer.gamma == 0.0
    balancer.update(gradient_norm(ce, [weight]), gradient_norm(ad, [weight]))
    combined = balancer.gamma * gradient_norm(ad, [weight]) / gradient_norm(ce, [weight])
    assert combined == pytest.approx(0.5, rel=1e-5)
    assert balancer.ratio == pytest.approx(0.5, rel=1e-6)


def test_gamma_fixed_still_measures_the_ratio_and_state_survives() -> None:
    balancer = GammaBalancer(fixed=60.0)
    balancer.update(2.0, 0.1)
    assert (balancer.gamma, balancer.ratio) == (60.0, pytest.approx(3.0))
    balancer.update(float("nan"), 1.0)
    assert balancer.measurements == 1
    other = GammaBalancer(fixed=60.0)
    other.load_state_dict(balancer.state_dict())
    assert other == balancer


def test_cross_entropy_by_hand() -> None:
    logits = torch.tensor([[0.0, math.log(3.0)]])
    assert cross_entropy_sum(logits, torch.tensor([1])).item() == pytest.approx(math.log(4 / 3), rel=1e-6)


@pytest.mark.parametrize("form", ["scaled_dot", "cosine"])
def test_relations_are_computed_in_float32_under_autocast(form: str) -> None:
    """States that hardly differ: scores rounded to bfloat16 would give a loss of roundings."""
    generator = torch.Generator().manual_seed(0)
    teacher = torch.randn(2, 3, 12, 16, generator=generator)
    student = teacher + 0.02 * torch.randn(teacher.shape, generator=generator)
    mask = torch.ones(2, 12, dtype=torch.bool)
    want = relation_loss_sum(student, teacher, mask, form=form)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = relation_loss_sum(student, teacher, mask, form=form)
    torch.testing.assert_close(got, want)
