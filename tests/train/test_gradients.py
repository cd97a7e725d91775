"""Gradients of a step: filling changes nothing, and a replayed CUDA graph equals the eager step."""

from __future__ import annotations

import pytest
import torch

from bitdistill.config import DistillConfig, Loop, Optim, RefineConfig
from bitdistill.data.batches import TaskBatches
from bitdistill.data.tasks import Example
from bitdistill.models import surgery
from bitdistill.models.attention import causal_only
from bitdistill.stages.distill import DistillStep
from bitdistill.stages.sft import CrossEntropyStep
from bitdistill.train.gradients import (
    FUSED_LAUNCH_BOUND,
    EagerGradients,
    ReplayedGradients,
    wants_graphs,
)
from bitdistill.train.optim import build_optimizer
from bitdistill.train.step import Totals
from tests.models.conftest import tiny_model


def batches(rows: int = 12, answers: int = 2) -> TaskBatches:
    rng = torch.Generator().manual_seed(0)
    examples = []
    for n in range(rows):
        ids = torch.randint(3, 100, (4 + n % 5 + answers,), generator=rng).tolist()
        examples.append(Example(tuple(ids[:-answers]), tuple(ids[-answers:]), 0, (), "", f"row {n}"))
    return TaskBatches(examples, batch_rows=4, seed=0, pad_id=2, buckets=[8, 16])


def students(device: str = "cpu"):  # type: ignore[no-untyped-def]
    source = tiny_model("qwen3").to(device)
    return surgery.apply(surgery.plan(source.config, RefineConfig()), source).to(device), source


def totals_of(batch) -> Totals:  # type: ignore[no-untyped-def]
    return Totals(batch.input_ids_BT.shape[0], batch.tokens, len(batch.answer_index_N))


@pytest.mark.parametrize("tokens", ["answer", "all"])
def test_filling_the_index_changes_nothing(tokens: str) -> None:
    student, teacher = students()
    config = DistillConfig(gamma=3.0, distilled_tokens=tokens)  # type: ignore[arg-type]
    for step in (CrossEntropyStep(student), DistillStep(student, teacher, config, [1])):
        batch = batches().micro_batches(0)[0]
        filled = batch.with_filled_index(64)
        assert len(filled.answer_index_N) == 64
        assert int((filled.answer_index_N >= 0).sum()) == len(batch.answer_index_N)
        plain = gradients_with(step, student, batch, totals_of(batch))
        again = gradients_with(step, student, filled, totals_of(batch))
        assert plain.keys() == again.keys()
        for name, value in plain.items():
            torch.testing.assert_close(again[name], value, rtol=1e-5, atol=1e-6, msg=name)


def gradients_with(step, student, batch, totals: Totals) -> dict[str, torch.Tensor]:  # type: ignore[no-untyped-def]
    student.zero_grad()
    found = EagerGradients(step, torch.device("cpu"), "float32").add(batch, totals)
    grads = {n: p.grad.clone() for n, p in student.named_parameters() if p.grad is not None}
    return {**grads, **{k: torch.as_tensor(v) for k, v in found.items()}}


def test_the_index_names_the_answer_tokens() -> None:
    for step in range(3):
        for batch in batches().micro_batches(step):
            flat = batch.input_ids_BT.flatten()
            mask = batch.answer_mask_BT.clone()
            mask[:, 0] = False
            assert torch.equal(flat[batch.answer_index_N], batch.input_ids_BT[mask])
            assert torch.equal(flat[batch.real_index_N], batch.input_ids_BT[batch.attention_mask_BT])


def test_graphs_are_for_small_steps_on_a_gpu() -> None:
    small, cuda = (2**20, 2**10), torch.device("cuda")
    assert not wants_graphs(Loop(batch_rows=1), torch.device("cpu"), *small)
    assert not wants_graphs(Loop(batch_rows=1, cuda_graphs=True), torch.device("cpu"), *small)
    assert wants_graphs(Loop(batch_rows=1), cuda, *small)
    assert not wants_graphs(Loop(batch_rows=1), cuda, 135_000_000, 32 * 1024)
    assert wants_graphs(Loop(batch_rows=1), cuda, 135_000_000, 32 * 1024, FUSED_LAUNCH_BOUND)
    assert wants_graphs(Loop(batch_rows=1), cuda, 600_000_000, 16 * 1024, FUSED_LAUNCH_BOUND)
    assert not wants_graphs(Loop(batch_rows=1), cuda, 1_600_000_000, 8 * 1024, FUSED_LAUNCH_BOUND)
    assert wants_graphs(Loop(batch_rows=1, cuda_graphs=True), cuda, 600_000_000, 16 * 1024)
    assert not wants_graphs(Loop(batch_rows=1, gradient_checkpointing=True), cuda, *small)
    assert not wants_graphs(Loop(batch_rows=1, cuda_graphs=False), cuda, *small)


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_replayed_steps_equal_eager_ones(precision: str) -> None:
    device = torch.device("cuda")
    curves = []
    for replayed in (False, True):
        student, teacher = students("cuda")
        teacher.requires_grad_(False)
        step = DistillStep(student, teacher, DistillConfig(gamma="auto", gamma_every_steps=4), [1])
        parameters = list(student.parameters())
        way = (
            ReplayedGradients(step, parameters, device, precision)
            if replayed
            else EagerGradients(step, device, precision)
        )
        optimizer = build_optimizer(student, Optim(learning_rate=1e-3))
        source, losses = batches(), []
        with way.stream(), causal_only(student, teacher):
            for n in range(24):
                step.before_step(n)
                (batch,) = source.micro_batches(n)
                losses.append(float(way.add(batch, totals_of(batch))["loss"]))
                optimizer.step()
                way.clear(optimizer)
            if isinstance(way, ReplayedGradients):
                assert way.enabled
                assert len(way.graphs) >= 2
        curves.append(losses)
    torch.testing.assert_close(torch.tensor(curves[0]), torch.tensor(curves[1]), rtol=2e-2, atol=1e-3)
    assert curves[0][-1] < curves[0][0]
