"""`distill.teachers`: the mean distribution of several teachers at the answer's tokens."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from bitdistill import artifact, pipeline
from bitdistill.config import DistillConfig
from bitdistill.data.batches import TaskBatches
from bitdistill.data.tasks import Example
from bitdistill.errors import RecipeError
from bitdistill.losses.logits import mean_distribution
from bitdistill.models.surgery import refine
from bitdistill.stages.distill import DistillStep
from bitdistill.stages.reuse import Reuse
from bitdistill.train.step import Totals
from tests.models.conftest import tiny_model
from tests.stages.conftest import recipe

ROWS = [((5, 6, 7, 8), (9, 10)), ((11, 12), (13,)), ((14, 15, 16, 17, 18), (19,))]


def teachers(count: int) -> list[torch.nn.Module]:
    found = []
    for seed in range(count):
        model = tiny_model("llama_tied").eval().requires_grad_(False)
        torch.manual_seed(seed)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1 + 0.5 * torch.randn_like(parameter))
        found.append(model)
    return found


@pytest.mark.parametrize("temperature", [1.0, 5.0])
def test_the_mean_is_of_probabilities(temperature: float) -> None:
    torch.manual_seed(0)
    logits = [3 * torch.randn(4, 7, dtype=torch.float64) for _ in range(3)]
    want = torch.stack([(z / temperature).softmax(-1) for z in logits]).mean(0)
    got = (mean_distribution(logits, temperature) / temperature).softmax(-1)
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-7)


@torch.no_grad()
def test_the_loss_is_kl_to_the_mean_at_the_answers_tokens() -> None:
    """Against a loop over rows; equal teachers are one teacher."""
    models = teachers(3)
    student = refine(tiny_model("llama_tied").eval(), gains="ones").eval()
    settings = {"gamma": 0, "hidden_weight": 0, "ce_weight": 0, "lambda": 2.0, "temperature": 3.0}
    config = DistillConfig.model_validate({**settings, "teachers": 3})
    examples = [Example(prompt, answer, 0, (), "", f"row {n}") for n, (prompt, answer) in enumerate(ROWS)]
    (batch,) = TaskBatches(examples, batch_rows=3, seed=0, pad_id=2, buckets=[8]).micro_batches(0)
    totals, total = Totals(rows=3, tokens=15, answers=4), 0.0
    for prompt, answer in ROWS:
        ids, places = torch.tensor([[*prompt, *answer]]), slice(len(prompt) - 1, -1)
        own, *others = (
            (m(input_ids=ids).logits[0, places].double() / 3).softmax(-1) for m in (student, *models)
        )
        mean = torch.stack(others).mean(0)
        total += float((mean * (mean.log() - own.log())).sum())
    value = DistillStep(student, models[0], config, [], further=models[1:])(batch, totals)
    assert float(value.loss) == pytest.approx(2.0 * total / 4, rel=1e-4)
    assert float(value.metrics["ld"]) == pytest.approx(total / 4, rel=1e-4)

    one = DistillStep(student, models[0], config, [])(batch, totals)
    same = DistillStep(student, models[0], config, [], further=[models[0]])(batch, totals)
    assert float(same.loss) == pytest.approx(float(one.loss), rel=1e-5)
    assert float(value.loss) != pytest.approx(float(one.loss), rel=1e-2)


def test_further_teachers_have_the_next_seeds_and_are_shared(work: Path) -> None:
    def run(*more: str) -> pipeline.RunResult:
        chosen = recipe(work, "bitnet_sft=null", *more)
        return pipeline.run(chosen, command="test", quiet=True, reuse=Reuse.of_runs(work / "runs"))

    sibling = run("seed=1", "name=plain")
    plain = run("name=plain")
    result = run("distill.teachers=3", "name=mean")
    found = [artifact.read_manifest(result.run_dir / name) for name in ("teacher", "teacher_1", "teacher_2")]
    assert [m["inputs"]["seed"] for m in found] == [0, 1, 2]
    assert len({m["files"]["model.safetensors"]["sha256"] for m in found}) == 3
    assert (result.run_dir / "teacher_1").resolve() == (sibling.run_dir / "teacher").resolve()
    assert not (result.run_dir / "teacher_2").is_symlink()
    student = artifact.read_manifest(result.run_dir / "student")
    assert student["training"]["elapsed_s"] > sum(m["training"]["elapsed_s"] for m in found[1:])
    # Another key than one teacher's student, whose key is what it was before there were several
    before = artifact.read_manifest(plain.run_dir / "student")
    assert before["key"] != student["key"]
    assert "teachers" not in before["inputs"]["distill"]
    weights = [m["files"]["model.safetensors"]["sha256"] for m in (before, student)]
    assert weights[0] != weights[1]
    # The own teacher is what the table compares with, and a finished run is kept as it is
    assert [row.name for row in result.rows] == ["teacher", "bitdistill"]
    times = {p: p.stat().st_mtime_ns for p in result.run_dir.glob("*/model.safetensors")}
    again = run("distill.teachers=3", "name=mean")
    assert times == {p: p.stat().st_mtime_ns for p in again.run_dir.glob("*/model.safetensors")}
    # A later run takes the third as well
    later = run("seed=2", "name=plain")
    assert (later.run_dir / "teacher").resolve() == (result.run_dir / "teacher_2").resolve()


def test_further_teachers_see_no_labels_but_the_runs_own(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`rows_per_label` draws by seed: what is drawn for another seed is not the run's to learn from."""
    from bitdistill.stages import sft

    seen: dict[str, set[str]] = {}
    train_on_task = sft.train_on_task

    def watched(run, stage, *args, examples=None, **options):  # type: ignore[no-untyped-def]
        seen[stage] = {e.where for e in (run.train_examples(args[1]) if examples is None else examples)}
        return train_on_task(run, stage, *args, examples=examples, **options)

    monkeypatch.setattr(sft, "train_on_task", watched)
    settings = ("bitnet_sft=null", "distill.teachers=3", "data.rows_per_label=4", "name=few")
    result = pipeline.run(recipe(work, *settings), until="distill", command="test", quiet=True)
    assert len(seen["sft"]) == 8
    assert seen["teacher_1"] == seen["teacher_2"] == seen["sft"]
    inputs = [artifact.read_manifest(result.run_dir / name)["inputs"] for name in ("teacher", "teacher_1")]
    assert [i["rows_per_label"] for i in inputs] == [[4, 0], [4, 0]]
    assert [i["seed"] for i in inputs] == [0, 1]


def test_an_interrupted_further_teacher_goes_on(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stopped between two teachers: the first of them is kept, and the student comes out as without the stop."""
    from bitdistill.stages import sft

    chosen = recipe(work, "bitnet_sft=null", "distill.teachers=3", "name=stopped")
    fine_tuned, trained = sft._fine_tuned, []

    def stop(run, stage, folder, seed):  # type: ignore[no-untyped-def]
        if stage == "teacher_2" and not trained:
            trained.append(stage)
            raise KeyboardInterrupt
        return fine_tuned(run, stage, folder, seed)

    monkeypatch.setattr(sft, "_fine_tuned", stop)
    with pytest.raises(KeyboardInterrupt):
        pipeline.run(chosen, until="distill", command="test", quiet=True)
    first = (work / "runs/stopped/teacher_1/model.safetensors").stat().st_mtime_ns
    assert json.loads((work / "runs/stopped/run.json").read_text())["seed"] == 0
    result = pipeline.run(chosen, until="distill", command="test", quiet=True)
    assert (result.run_dir / "teacher_1/model.safetensors").stat().st_mtime_ns == first
    whole = pipeline.run(
        chosen.model_copy(update={"name": "whole"}), until="distill", command="test", quiet=True
    )
    files = [artifact.read_manifest(r.run_dir / "student")["files"] for r in (result, whole)]
    assert files[0]["model.safetensors"]["sha256"] == files[1]["model.safetensors"]["sha256"]


@pytest.mark.parametrize(
    ("more", "why"),
    [
        (("distill.lambda=0",), "lambda above 0"),
        (("distill.distilled_tokens=all",), "distilled_tokens: answer"),
        (("teacher.path=model", "distill.gamma=0", "distill.hidden_weight=0"), "distill.teachers: 2"),
        (("distill.teachers=17",), "teachers"),
    ],
)
def test_what_cannot_be_is_refused(work: Path, more: tuple[str, ...], why: str) -> None:
    with pytest.raises(RecipeError, match=why):
        recipe(work, "distill.teachers=2", *more)
