"""`hidden_weight` of stages 2 and 3 and `prompt_weight` of stage 3: what is logged adds up to the loss."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from bitdistill import pipeline
from bitdistill.config import DistillConfig
from bitdistill.data.batches import TaskBatches
from bitdistill.data.tasks import Example
from bitdistill.models.surgery import refine
from bitdistill.stages.distill import DistillStep, unanswered
from bitdistill.train.step import StepOutput, Totals
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


def test_stage_3_trains_on_the_prompts_tokens(work: Path) -> None:
    settings = ("prompt_weight=3.0", "loop.log_every_steps=1", "hidden_weight=0", "temperature=2.0")
    chosen = recipe(work, *(f"distill.{setting}" for setting in settings), "bitnet_sft=null")
    result = pipeline.run(chosen, until="distill", command="test", quiet=True)
    lines = [json.loads(x) for x in (result.run_dir / "logs/distill.jsonl").read_text().splitlines()]
    assert all(line["prompt"] > 0 for line in lines)
    for line in lines:
        rest = line["ce"] + 10 * line["ld"] + line["gamma"] * line["ad"]
        assert line["loss"] == pytest.approx(rest + 3.0 * line["prompt"], rel=1e-4)


@torch.no_grad()
def test_the_prompts_loss_is_kl_where_no_answer_is_predicted() -> None:
    """Against a loop over rows; two micro-batches add up to the whole."""
    teacher = tiny_model("llama_tied").eval()
    student = refine(tiny_model("llama_tied"), gains="ones").eval()
    settings = {"gamma": 0, "hidden_weight": 0, "ce_weight": 0, "lambda": 0, "prompt_weight": 2.0}
    step = DistillStep(student, teacher, DistillConfig.model_validate({**settings, "temperature": 5.0}), [])
    rows = [((5, 6, 7, 8), (9, 10)), ((11, 12), (13,)), ((14, 15, 16, 17, 18), (19,))]
    examples = [Example(prompt, answer, 0, (), "", f"row {n}") for n, (prompt, answer) in enumerate(rows)]
    total = 0.0
    for prompt, answer in rows:
        ids = torch.tensor([[*prompt, *answer]])
        own, other = (m(input_ids=ids).logits[0].double().log_softmax(-1) for m in (student, teacher))
        kl_T = (other.exp() * (other - own)).sum(-1)
        total += float(kl_T.sum() - kl_T[len(prompt) - 1 : -1].sum())
    totals = Totals(rows=3, tokens=15, answers=4)

    def loss(part: list[Example]) -> StepOutput:
        (batch,) = TaskBatches(part, batch_rows=len(part), seed=0, pad_id=2, buckets=[8]).micro_batches(0)
        return step(batch, totals)

    whole, parts = loss(examples), [loss(examples[:2]), loss(examples[2:])]
    assert float(whole.loss) == pytest.approx(2.0 * total / 11, rel=1e-4)
    assert float(whole.metrics["prompt"]) == pytest.approx(total / 11, rel=1e-4)
    assert sum(float(part.loss) for part in parts) == pytest.approx(float(whole.loss), rel=1e-5)


def test_what_predicts_an_answer_and_what_is_filling() -> None:
    answers, real = torch.tensor([3, 7, -1]), torch.tensor([0, 1, 2, 3, 5, 6, 7, -1, -1])
    counted = unanswered(answers, real, 8).tolist()
    assert counted == [True, True, False, True, True, False, True, False, False]


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
