"""`pretrain.predict_every`: the objective at drawn tokens, block outputs at all."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from bitdistill import artifact, pipeline
from bitdistill.config import PretrainConfig
from bitdistill.data.batches import Batch, PackedBatches
from bitdistill.errors import RecipeError
from bitdistill.models.surgery import refine
from bitdistill.stages.pretrain import LanguageModelStep
from bitdistill.train.step import StepOutput, Totals
from tests.data.test_batches import Stream
from tests.models.conftest import tiny_model
from tests.stages.conftest import recipe

EVERY, LENGTH = 4, 16


def step_of(objective: str, every: int) -> LanguageModelStep:
    teacher = tiny_model("llama_tied").eval()
    student = refine(tiny_model("llama_tied"), gains="ones").eval()
    config = PretrainConfig.model_validate(
        {"objective": objective, "predict_every": every, "sequence_length": LENGTH, "hidden_weight": 0.5}
    )
    return LanguageModelStep(student, None if objective == "lm" else teacher, config, compiling=False)


def batch_of(every: int) -> Batch:
    (batch,) = PackedBatches(
        Stream(60), sequence_length=LENGTH, batch_rows=3, seed=0, predict_every=every
    ).micro_batches(0)
    return batch


def run(step: LanguageModelStep, batch: Batch, answers: int | None = None) -> StepOutput:
    count = len(batch.answer_index_N) if answers is None else answers
    return step(batch, Totals(rows=3, tokens=batch.tokens, answers=count))


@pytest.mark.parametrize("objective", ["lm", "kl", "mix"])
@torch.no_grad()
def test_the_objective_is_a_mean_over_the_drawn_tokens(objective: str) -> None:
    step, batch = step_of(objective, EVERY), batch_of(EVERY)
    ids = batch.input_ids_BT
    own = step.student(input_ids=ids).logits.double().log_softmax(-1)
    chosen = [(b, t) for b, t in batch.answer_mask_BT.nonzero().tolist()]
    assert len(chosen) == 3 * LENGTH // EVERY
    lm = -sum(float(own[b, t - 1, ids[b, t]]) for b, t in chosen) / len(chosen)
    made = run(step, batch)
    assert float(made.metrics["lm"]) == pytest.approx(lm, rel=1e-4)
    expected = lm
    if step.teacher is not None:
        other = step.teacher(input_ids=ids).logits.double().log_softmax(-1)
        kl_BT = (other.exp() * (other - own)).sum(-1)
        kl = sum(float(kl_BT[b, t - 1]) for b, t in chosen) / len(chosen)
        assert float(made.metrics["kl"]) == pytest.approx(kl, rel=1e-4)
        expected = kl if objective == "kl" else 0.5 * lm + 0.5 * kl
        expected += 0.5 * float(made.metrics["hidden"])
    assert float(made.loss) == pytest.approx(expected, rel=1e-4)


def test_block_outputs_count_at_all_tokens() -> None:
    every, drawn = (run(step_of("kl", n), batch_of(n)).metrics["hidden"] for n in (1, EVERY))
    assert float(every) == pytest.approx(float(drawn), rel=1e-6)


def test_gradients_of_all_parts_add_up_to_those_of_all_tokens() -> None:
    """Each token is predicted in one of the parts: nothing is scaled, nothing counts twice."""
    whole, step = batch_of(1), step_of("kl", EVERY)
    step.hidden_weight = 0.0
    full = step_of("kl", 1)
    full.hidden_weight = 0.0
    full.student = step.student
    count = len(whole.answer_index_N)
    run(full, whole).loss.backward()
    wanted = {n: p.grad.clone() for n, p in step.student.named_parameters() if p.grad is not None}
    step.student.zero_grad()
    for residue in range(EVERY):
        index = whole.answer_index_N[whole.answer_index_N % EVERY == residue]
        run(step, dataclasses.replace(whole, answer_index_N=index), answers=count).loss.backward()
    assert wanted
    for name, parameter in step.student.named_parameters():
        torch.testing.assert_close(parameter.grad, wanted[name], rtol=1e-4, atol=1e-7)


def test_filling_of_the_index_counts_for_nothing() -> None:
    step, batch = step_of("kl", EVERY), batch_of(EVERY)
    filled = batch.with_filled_index(8)
    assert len(filled.answer_index_N) == 16
    plain, padded = (float(run(step, b, answers=12).loss.detach()) for b in (batch, filled))
    assert plain == pytest.approx(padded, rel=1e-6)


def base_of(work: Path, *options: str) -> tuple[str, Path]:
    """Key of the base, and the run's folder."""
    settings = ("pretrain.budget_tokens=640", "pretrain.loop.log_every_steps=1", "pretrain.hidden_weight=2.0")
    chosen = recipe(work, *settings, f"pretrain.cache_dir={work}/bases", *options)
    result = pipeline.run(chosen, until="pretrain", command="test", quiet=True)
    folder = json.loads((result.run_dir / "base.json").read_text())["path"]
    return artifact.read_manifest(Path(folder))["key"], result.run_dir


def test_stage_2_trains_on_it_and_it_makes_another_base(work: Path) -> None:
    whole, _ = base_of(work, "name=whole")
    told, _ = base_of(work, "name=told", "pretrain.predict_every=1")
    drawn, folder = base_of(work, "name=drawn", "pretrain.predict_every=4")
    assert whole == told != drawn
    lines = [json.loads(x) for x in (folder / "logs/pretrain.jsonl").read_text().splitlines()]
    assert len(lines) == 5
    for line in lines:
        assert line["loss"] == pytest.approx(line["kl"] + 2.0 * line["hidden"], rel=1e-4)
        assert line["tokens"] % 128 == 0  # what was read, not what was drawn


def test_groups_that_do_not_fill_a_window_are_refused(work: Path) -> None:
    with pytest.raises(RecipeError, match=r"predict_every: 3 does not divide sequence_length"):
        recipe(work, "pretrain.predict_every=3")
