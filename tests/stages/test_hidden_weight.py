"""`hidden_weight` of stages 2 and 3: what is logged adds up to the loss."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from bitdistill import pipeline
from bitdistill.config import DistillConfig
from bitdistill.models.surgery import refine
from bitdistill.stages.distill import DistillStep
from tests.models.conftest import tiny_model
from tests.stages.conftest import recipe


@pytest.mark.parametrize("error", ["relative", "normed"])
@pytest.mark.parametrize("stage", ["pretrain", "distill"])
def test_stages_train_on_it(work: Path, stage: str, error: str) -> None:
    settings = ("hidden_weight=2.0", f"hidden_error={error}", "loop.log_every_steps=1")
    chosen = recipe(work, *(f"{stage}.{setting}" for setting in settings), "bitnet_sft=null")
    result = pipeline.run(chosen, until="distill", command="test", quiet=True)
    lines = [json.loads(x) for x in (result.run_dir / f"logs/{stage}.jsonl").read_text().splitlines()]
    assert all(line["hidden"] > 0 for line in lines)
    parts = {
        "pretrain": lambda x: x["kl"],
        "distill": lambda x: x["ce"] + 10 * x["ld"] + x["gamma"] * x["ad"],
    }
    for line in lines:
        assert line["loss"] == pytest.approx(parts[stage](line) + 2.0 * line["hidden"], rel=1e-4)


def test_norms_are_measured_often_at_first_and_seldom_later() -> None:
    teacher = tiny_model("llama_tied")
    step = DistillStep(refine(teacher, gains="ones"), teacher, DistillConfig(gamma_every_steps=50), [1])
    measured = []
    for number in range(160):
        step.before_step(number)
        if step.measure:
            measured.append(number)
    assert measured == [0, 10, 20, 30, 40, 50, 100, 150]
    assert torch.is_tensor(step.gamma)
