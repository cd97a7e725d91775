"""Relative error of block outputs: by hand, against float64, and through the steps of stages 2 and 3."""

from __future__ import annotations

import pytest
import torch

from bitdistill.losses.hidden import block_errors_sum, normed_error, relative_error
from bitdistill.models.forward import final_hidden, hidden_states
from bitdistill.models.norms import gains_after_blocks
from bitdistill.train.compile import compile_blocks
from tests.models.conftest import tiny_model


def test_by_hand() -> None:
    teacher = torch.tensor([[[3.0, 4.0], [0.0, 2.0], [100.0, 0.0]]])
    student = torch.tensor([[[3.0, 3.0], [1.0, 2.0], [0.0, 0.0]]])
    assert relative_error(student, teacher).item() == pytest.approx(1 / 25 + 1 / 4 + 1.0)
    mask = torch.tensor([[True, True, False]])
    assert relative_error(student, teacher, mask).item() == pytest.approx(1 / 25 + 1 / 4)


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_value_and_gradient_against_float64(scale: float) -> None:
    generator = torch.Generator().manual_seed(0)
    teacher = scale * torch.randn(3, 7, 33, generator=generator)
    student = (teacher + 0.3 * scale * torch.randn(3, 7, 33, generator=generator)).requires_grad_()
    mask = torch.rand(3, 7, generator=generator) < 0.6
    value = relative_error(student, teacher, mask)
    value.backward()
    exact = student.detach().double().requires_grad_()
    t = teacher.double()
    wanted = (((exact - t) ** 2).sum(-1) / (t**2).sum(-1))[mask].sum()
    wanted.backward()
    torch.testing.assert_close(value.double(), wanted, rtol=1e-6, atol=0)
    assert student.grad is not None
    assert exact.grad is not None
    torch.testing.assert_close(student.grad.double(), exact.grad, rtol=1e-5, atol=1e-9 / scale)
    assert not student.grad[~mask].any()


@pytest.mark.parametrize("error", [relative_error, normed_error])
def test_masked_tokens_may_hold_anything(error) -> None:  # type: ignore[no-untyped-def]
    teacher, student = torch.ones(1, 2, 3), torch.ones(1, 2, 3)
    teacher[0, 1], student[0, 1] = torch.nan, torch.inf
    assert error(student, teacher, torch.tensor([[True, False]])).item() == 0.0


@pytest.mark.parametrize("family", ["llama_tied", "gemma3_text"])
def test_normed_error_is_that_of_the_next_norms_outputs(family: str) -> None:
    torch.manual_seed(0)
    teacher = tiny_model(family).eval()
    with torch.no_grad():
        for name, parameter in teacher.named_parameters():
            if "norm" in name:
                parameter.add_(torch.randn_like(parameter))
    ids = torch.randint(3, 100, (2, 9), generator=torch.Generator().manual_seed(1))
    outputs = hidden_states(teacher, ids, every=True)[1]
    students = [output + 0.2 * torch.randn_like(output) for output in outputs]
    norms = [*(layer.input_layernorm for layer in teacher.model.layers[1:]), teacher.model.norm]
    wanted = [relative_error(n(s), n(t)) for n, s, t in zip(norms, students, outputs, strict=True)]
    found = block_errors_sum(students, outputs, error=normed_error, gains=gains_after_blocks(teacher))
    torch.testing.assert_close(found, torch.stack(wanted).mean(), rtol=1e-4, atol=0)


def test_a_massive_channel_that_the_norms_gain_takes_down_does_not_hide_the_others() -> None:
    generator = torch.Generator().manual_seed(0)
    teacher = torch.randn(4, 50, 64, generator=generator)
    teacher[..., 3] += 200
    blind = teacher.clone()
    blind[..., torch.arange(64) != 3] = 0.0  # knows that channel alone
    gain = torch.ones(64)
    gain[3] = 1 / 200
    assert relative_error(blind, teacher).item() / 200 < 0.01
    assert normed_error(blind, teacher, None, gain).item() / 200 > 0.9


@pytest.mark.parametrize("family", ["llama_tied", "gemma3_text"])
def test_outputs_of_blocks_are_those_of_transformers(family: str) -> None:
    model = tiny_model(family).eval()
    ids = torch.randint(3, 100, (2, 9), generator=torch.Generator().manual_seed(1))
    hidden, outputs = hidden_states(model, ids, every=True)
    known = model.model(input_ids=ids, output_hidden_states=True).hidden_states
    assert len(outputs) == len(known) - 1
    for own, other in zip(outputs[:-1], known[1:-1], strict=True):
        assert torch.equal(own, other)
    assert torch.equal(hidden, final_hidden(model, ids))
    assert hidden_states(model, ids, every=False)[1] == []
    # Nothing is left behind: the next plain pass records nothing and blocks keep their own call.
    assert all(layer._compiled_call_impl is None for layer in model.model.layers)


@pytest.mark.slow
def test_compiled_blocks_are_recorded_too() -> None:
    model = tiny_model("llama_tied").eval()
    ids = torch.randint(3, 100, (2, 9), generator=torch.Generator().manual_seed(1))
    eager = hidden_states(model, ids, every=True)[1]
    compile_blocks(model)
    for own, other in zip(hidden_states(model, ids, every=True)[1], eager, strict=True):
        torch.testing.assert_close(own, other, rtol=1e-4, atol=1e-5)
