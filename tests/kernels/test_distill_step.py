"""Stage 3 with the loss kernels is stage 3: same losses, same gradients as the plain step."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from bitdistill.config import DistillConfig
from bitdistill.data.batches import Batch, TaskBatches
from bitdistill.data.tasks import Example
from bitdistill.models.attention import causal_only
from bitdistill.models.fused import fused_layers
from bitdistill.models.surgery import refine
from bitdistill.stages.distill import DistillStep
from bitdistill.train.gradients import EagerGradients
from bitdistill.train.step import Totals
from tests.models.conftest import tiny_model

from .conftest import DEVICE


def batch_of(rows: int = 5, packing: bool = False) -> Batch:
    rng = torch.Generator().manual_seed(0)
    examples = []
    for n in range(rows):
        ids = torch.randint(3, 100, (5 + 3 * n,), generator=rng).tolist()
        examples.append(Example(tuple(ids[:-2]), tuple(ids[-2:]), 0, (), "", f"row {n}"))
    return TaskBatches(examples, batch_rows=rows, seed=0, pad_id=2, packing=packing).micro_batches(0)[0]


def gradients_of(step: Any, student: Any, batch: Batch) -> dict[str, torch.Tensor]:
    student.zero_grad()
    totals = Totals(batch.rows, batch.tokens, len(batch.answer_index_N))
    with causal_only(student, step.teacher):
        found = EagerGradients(step, DEVICE, "float32").add(batch, totals)
    grads = {n: p.grad.clone() for n, p in student.named_parameters() if p.grad is not None}
    return {**grads, **{k: torch.as_tensor(v) for k, v in found.items()}}


@pytest.mark.parametrize("layout", ["padded", "filled", "packed"])
@pytest.mark.parametrize(
    "options",
    [
        {"distilled_tokens": "answer"},
        {"distilled_tokens": "all", "tau_squared": True, "relation": {"form": "cosine", "heads": 2}},
        {"lambda": 0.0},
        {"prompt_weight": 2.0, "temperature": 3.0},
        {"lambda": 0.0, "ce_weight": 0.0, "prompt_weight": 0.5},
    ],
)
def test_losses_and_gradients_are_those_of_the_plain_step(options: dict[str, Any], layout: str) -> None:
    torch.manual_seed(0)
    teacher = tiny_model("llama_tied").to(DEVICE).requires_grad_(False).eval()
    student = refine(tiny_model("llama_tied").to(DEVICE), gains="ones").to(DEVICE).train()
    config = DistillConfig.model_validate({"gamma": 30.0, **options})
    batch = batch_of(packing=layout == "packed")
    batch = batch.with_filled_index(16) if layout == "filled" else batch
    plain, fused = (DistillStep(student, teacher, config, [1], fused=f) for f in (False, True))
    assert fused.chunk is not None
    want = gradients_of(plain, student, batch)
    got = gradients_of(fused, student, batch)
    with fused_layers(student):
        layers_too = gradients_of(fused, student, batch)
    assert want.keys() == got.keys() == layers_too.keys()
    assert ("ld" in want) == (config.lambda_ != 0)
    for name, value in want.items():
        scale = float(value.abs().max())
        for other in (got, layers_too):
            torch.testing.assert_close(other[name], value, rtol=1e-3, atol=1e-4 * scale + 1e-8, msg=name)


def test_several_teachers_take_the_plain_head_beside_fused_layers() -> None:
    torch.manual_seed(0)
    teachers = [tiny_model("llama_tied").to(DEVICE).requires_grad_(False).eval() for _ in range(2)]
    for parameter in teachers[1].parameters():
        parameter.mul_(1 + 0.2 * torch.randn_like(parameter))
    student = refine(tiny_model("llama_tied").to(DEVICE), gains="ones").to(DEVICE).train()
    config, batch = (
        DistillConfig.model_validate({"gamma": 30.0, "teachers": 2, "prompt_weight": 1.0}),
        batch_of(),
    )
    plain, fused = (
        DistillStep(student, teachers[0], config, [1], fused=f, further=teachers[1:]) for f in (False, True)
    )
    want = gradients_of(plain, student, batch)
    with fused_layers(student):
        got = gradients_of(fused, student, batch)
    assert want.keys() == got.keys()
    for name, value in want.items():
        scale = float(value.abs().max())
        torch.testing.assert_close(got[name], value, rtol=1e-3, atol=1e-4 * scale + 1e-8, msg=name)


def test_a_measuring_step_takes_the_plain_head_and_balances_gamma() -> None:
    teacher = tiny_model("llama").to(DEVICE).requires_grad_(False).eval()
    student = refine(tiny_model("llama").to(DEVICE), gains="ones").to(DEVICE).train()
    batch = batch_of()
    steps = [DistillStep(student, teacher, DistillConfig(), [1], fused=f) for f in (False, True)]
    with fused_layers(student):
        for step in steps:
            step.before_step(0)
            assert not step.replayable
            gradients_of(step, student, batch)
            assert step.replayable
    assert steps[0].balancer.gamma > 0
    assert steps[1].balancer.gamma == pytest.approx(steps[0].balancer.gamma, rel=1e-3)
