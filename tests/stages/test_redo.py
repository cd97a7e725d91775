"""Redoing stages: what is begun again, what goes on after an interruption, and what a refused command leaves alone."""

from __future__ import annotations

import json
import os
import shutil
import signal
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from bitdistill import artifact, pipeline
from bitdistill.config import Recipe
from bitdistill.errors import ArtifactError, Interrupted, RecipeError
from bitdistill.stages import evaluate, sft
from bitdistill.stages.reuse import Reuse
from bitdistill.train import loop
from tests.stages.conftest import recipe, write_rows

PLAIN = ("bitnet_sft=null", "pretrain=null")
AUGMENT = ("augment={rows: 6, temperature: 2.0}", *PLAIN)


@dataclass
class Training:
    """Steps that were trained, by stage, and those at which a signal comes."""

    steps: dict[str, list[int]] = field(default_factory=dict)
    stops: dict[str, int] = field(default_factory=dict)
    stage: str = ""

    def take(self) -> dict[str, list[int]]:
        """Steps since the last call."""
        steps, self.steps = self.steps, {}
        return steps


@pytest.fixture
def training(monkeypatch: pytest.MonkeyPatch) -> Training:
    seen = Training()
    fit, rate = sft.fit, loop.learning_rate_at

    def noted(*arguments: Any, **options: Any) -> Any:
        seen.stage = options["tracker"].stage
        return fit(*arguments, **options)

    def counted(step: int, total: int, optim: Any) -> float:
        seen.steps.setdefault(seen.stage, []).append(step)
        if seen.stops.get(seen.stage) == step:
            del seen.stops[seen.stage]
            os.kill(os.getpid(), signal.SIGINT)
        return rate(step, total, optim)

    monkeypatch.setattr(sft, "fit", noted)
    monkeypatch.setattr(loop, "learning_rate_at", counted)
    return seen


def go(wanted: Recipe, *redo: str, until: str | None = "eval") -> Path:
    return pipeline.run(
        wanted, until=until, redo=frozenset(redo), command="test", stats=False, quiet=True
    ).run_dir


def stopped(training: Training, wanted: Recipe, *redo: str, **stops: int) -> None:
    """Run until a signal comes at a step of a stage."""
    training.stops.update(stops)
    with pytest.raises(Interrupted):
        go(wanted, *redo)
    assert not training.stops


def stamp(folder: Path) -> int:
    return (folder / artifact.MANIFEST).stat().st_mtime_ns


def test_an_interrupted_stage_with_other_settings_is_redone(work: Path, training: Training) -> None:
    stopped(training, recipe(work, *PLAIN), distill=1)
    changed = recipe(work, *PLAIN, "distill.optim.learning_rate=0.0007")
    record = (work / "runs/tiny/recipe.yaml").read_bytes()
    with pytest.raises(
        ArtifactError, match=r"checkpoints/distill: begun with other settings.*--redo distill"
    ):
        go(changed)
    assert (work / "runs/tiny/recipe.yaml").read_bytes() == record
    training.take()
    run = go(changed, "distill")
    assert training.take() == {"distill": [0, 1, 2, 3]}
    assert not (run / "redo.json").exists()


def test_checkpoints_left_beside_a_finished_artifact_do_not_stop_a_redo(
    work: Path, training: Training
) -> None:
    """A process may be killed between writing the artifact and removing what led to it."""
    stopped(training, recipe(work, *PLAIN), distill=1)
    run = work / "runs/tiny"
    shutil.copytree(run / "checkpoints/distill", work / "kept")
    go(recipe(work, *PLAIN))
    shutil.copytree(work / "kept", run / "checkpoints/distill")
    training.take()
    go(recipe(work, *PLAIN, "distill.lambda=1"), "distill")
    assert training.take() == {"distill": [0, 1, 2, 3]}


def test_a_redo_begins_again_once_and_then_goes_on(work: Path, training: Training) -> None:
    wanted = recipe(work, *PLAIN)
    stopped(training, wanted, distill=1)
    training.take()
    stopped(training, wanted, "distill", distill=2)
    assert training.take() == {"distill": [0, 1, 2]}  # not from the checkpoint of step 2 that was there
    stopped(training, wanted, "distill", distill=3)  # the same command
    assert training.take() == {"distill": [3]}
    go(wanted)  # or a plain one
    assert training.take() == {}  # every step was trained, and is in the checkpoint


def test_an_interrupted_redo_is_not_forgotten(work: Path, training: Training) -> None:
    wanted = recipe(work, *PLAIN)
    run = go(wanted)
    before = {name: stamp(run / name) for name in ("teacher", "student", "packed")}
    scores = (run / "results.json").stat().st_mtime_ns
    training.take()
    stopped(training, wanted, "sft", distill=1)
    teacher = stamp(run / "teacher")
    assert teacher != before["teacher"]
    assert training.take() == {"sft": [0, 1, 2, 3], "distill": [0, 1]}
    # The student of the old teacher is there, with an equal key; other runs do not take it either
    key = artifact.read_manifest(run / "student")["key"]
    assert key not in Reuse.of_runs(work / "runs").artifacts
    stopped(training, wanted, "sft", distill=2)  # the same command keeps the new teacher
    assert training.take() == {"distill": [2]}
    go(wanted)  # and so does a plain run
    assert training.take() == {"distill": [3]}
    assert stamp(run / "teacher") == teacher
    assert all(stamp(run / name) != before[name] for name in before)
    assert (run / "results.json").stat().st_mtime_ns != scores
    assert artifact.read_manifest(run / "student")["key"] == key
    assert key in Reuse.of_runs(work / "runs").artifacts
    after = {name: stamp(run / name) for name in before}
    go(wanted, until=None)
    assert {name: stamp(run / name) for name in before} == after
    assert not (run / "redo.json").exists()
    go(wanted, "sft", until="sft")  # a new redo begins again
    assert stamp(run / "teacher") != teacher


def test_later_stages_are_stale_when_a_redo_stops_before_them(work: Path, training: Training) -> None:
    wanted = recipe(work, *PLAIN)
    go(wanted)
    training.take()
    for _ in range(2):  # the first came to its end, so the second is no continuation
        go(wanted, "sft", until="sft")
        assert training.take() == {"sft": [0, 1, 2, 3]}
    go(recipe(work, *PLAIN, "sft.epochs=2"), "sft", until="sft")
    assert training.take() == {"sft": list(range(8))}
    go(recipe(work, *PLAIN, "sft.epochs=2"))
    assert training.take() == {"distill": [0, 1, 2, 3]}


def test_a_redo_goes_on_with_other_settings_when_it_is_named_again(work: Path, training: Training) -> None:
    go(recipe(work, *PLAIN))
    stopped(training, recipe(work, *PLAIN), "sft", distill=2)
    training.take()
    changed = recipe(work, *PLAIN, "distill.lambda=1")
    with pytest.raises(ArtifactError, match="begun with other settings"):
        go(changed)  # a plain run does not drop what the redo has trained
    with pytest.raises(ArtifactError, match="--redo sft"):
        go(recipe(work, *PLAIN, "sft.epochs=2"))
    stopped(training, recipe(work, *PLAIN), distill=3)
    assert training.take() == {"distill": [3]}
    go(changed, "distill")
    assert training.take() == {"distill": [0, 1, 2, 3]}
    # The teacher was finished by the redo of sft; with other settings it is made again all the same
    stopped(training, recipe(work, *PLAIN), "sft", distill=2)
    training.take()
    go(recipe(work, *PLAIN, "sft.epochs=2"), "sft")
    assert training.take() == {"sft": list(range(8)), "distill": [0, 1, 2, 3]}


def test_a_redo_of_augment_includes_its_writer_where_that_changed(work: Path, training: Training) -> None:
    run = go(recipe(work, *AUGMENT))
    training.take()
    go(recipe(work, *AUGMENT, "augment.temperature=1.5"), "augment")
    assert training.take().keys() == {"distill"}
    changed = recipe(work, *AUGMENT, "augment.temperature=1.5", "sft.epochs=2")
    stopped(training, changed, "sft", "augment", sft=3)
    stopped(training, changed, writer=3)  # a plain run goes on, and takes the writer with it
    assert training.take() == {"sft": list(range(8)), "writer": [0, 1, 2, 3]}
    changed = recipe(work, *AUGMENT, "augment.temperature=1.5", "sft.epochs=3")
    stopped(training, changed, "sft", "augment", writer=4)
    assert training.take() == {"sft": list(range(12)), "writer": [0, 1, 2, 3, 4]}
    stopped(training, changed, distill=1)
    assert training.take() == {"writer": list(range(5, 12)), "distill": [0, 1]}
    before = stamp(run / "written")
    go(changed)
    assert training.take().keys() == {"distill"}
    assert stamp(run / "written") == before
    for name in ("writer", "written"):
        artifact.verify(run / name)
    assert not (run / "redo.json").exists()


def test_an_interrupted_writer_with_other_settings_is_redone(work: Path, training: Training) -> None:
    stopped(training, recipe(work, *AUGMENT), writer=2)
    changed = recipe(work, *AUGMENT, "sft.epochs=2")
    with pytest.raises(ArtifactError, match="--redo sft"):
        go(changed)
    with pytest.raises(ArtifactError, match=r"checkpoints/writer: begun with other settings.*--redo augment"):
        go(recipe(work, *AUGMENT, "augment.seed=7"))
    training.take()
    go(changed, "sft", "augment")
    assert training.take()["writer"] == list(range(8))
    written = artifact.read_manifest(work / "runs/tiny/writer")
    shutil.rmtree(work / "runs/tiny/written")
    other = recipe(work, *AUGMENT, "sft.epochs=2", "augment.seed=7")
    with pytest.raises(ArtifactError, match=r"writer: made with other settings.*--redo augment"):
        go(other)
    assert artifact.read_manifest(work / "runs/tiny/writer") == written


def test_a_refused_command_leaves_records_and_marks_alone(work: Path, training: Training) -> None:
    run = go(recipe(work, *PLAIN), until=None)
    names = ("recipe.yaml", "run.json")
    before = [(run / name).read_bytes() for name in names]
    with pytest.raises(ArtifactError, match="--redo sft"):
        go(recipe(work, *PLAIN, "sft.epochs=2"), "distill")
    with pytest.raises(ArtifactError, match="--redo distill"):  # the teacher is kept, the student refused
        go(recipe(work, *PLAIN, "distill.lambda=1"))
    go(recipe(work, *PLAIN), "distill", until="sft")  # names a stage that this command does not reach
    assert [(run / name).read_bytes() for name in names] == before
    assert not (run / "redo.json").exists()
    training.take()
    go(recipe(work, *PLAIN, "report.samples=2"), until=None)
    assert training.take() == {}
    assert "samples: 2" in (run / "recipe.yaml").read_text("utf-8")  # every stage was accepted


def test_a_change_of_the_rows_names_every_stage_that_was_made_from_them(
    work: Path, training: Training
) -> None:
    def options(*more: str) -> Recipe:
        return recipe(work, "augment={rows: 6, temperature: 2.0}", "pretrain=null", *more)

    run = go(options())
    write_rows(work / "train.jsonl", 24, 5)
    with pytest.raises(ArtifactError, match="made with other settings") as refused:
        go(options())
    remedy = str(refused.value).rpartition("; use ")[2].partition(",")[0].replace("--redo ", "").split()
    # Stage 1 is calibrated on the rows, as there is no corpus; a writer is trained on them
    assert remedy == ["sft", "augment", "bitnet_sft", "distill", "refine"]
    training.take()
    go(options(), *remedy)
    assert training.take().keys() == {"sft", "writer", "distill", "bitnet_sft"}
    before = stamp(run / "bitnet_sft")
    # What a change does not touch is not named
    with pytest.raises(ArtifactError, match=r"teacher: made .*; use --redo sft --redo augment, or another"):
        go(options("sft.epochs=2"))
    with pytest.raises(ArtifactError, match=r"student: made .*; use --redo distill, or another name"):
        go(options("distill.lambda=1"))
    assert stamp(run / "bitnet_sft") == before


def test_an_interrupted_first_stage_leaves_its_record(work: Path, training: Training) -> None:
    stopped(training, recipe(work, *PLAIN, "sft.epochs=3"), sft=1)
    assert "epochs: 3" in (work / "runs/tiny/recipe.yaml").read_text("utf-8")
    assert json.loads((work / "runs/tiny/run.json").read_text())["command"] == "test"


def test_an_interrupted_evaluation_is_redone(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = go(recipe(work, *PLAIN))
    before = (run / "results.json").stat().st_mtime_ns

    def refused(*_: Any) -> Any:
        raise RecipeError("not now")

    for module, name, redo in ((evaluate, "predict_rows", ["eval"]), (pipeline, "write_report", [])):
        with monkeypatch.context() as patch:
            patch.setattr(module, name, refused)
            with pytest.raises(RecipeError):
                go(recipe(work, *PLAIN), *redo, until=None)
    after = (run / "results.json").stat().st_mtime_ns
    assert after != before  # by the redo
    go(recipe(work, *PLAIN), until=None)
    assert (run / "results.json").stat().st_mtime_ns == after


@pytest.mark.parametrize("content", ["", "[]", '{"asked": 3, "stale": {}}', '{"asked": [], "stale": []}'])
def test_damaged_marks_are_named(work: Path, content: str) -> None:
    (work / "runs/tiny").mkdir(parents=True)
    (work / "runs/tiny/redo.json").write_text(content)
    with pytest.raises(ArtifactError, match=r"redo\.json: unreadable .* remove the file") as caught:
        go(recipe(work))
    assert "\n" not in str(caught.value)


def test_a_redo_takes_no_work_of_other_runs(work: Path, training: Training) -> None:
    go(recipe(work, *PLAIN), until="sft")
    training.take()
    for redo, steps in ((["sft"], {"sft": [0, 1, 2, 3]}), ([], {})):
        other = recipe(work, *PLAIN, f"name=other-{len(redo)}")
        pipeline.run(other, until="sft", redo=frozenset(redo), reuse=Reuse.of_runs(work / "runs"), quiet=True)
        assert training.take() == steps


def test_a_redo_of_export_writes_both_packed_folders(work: Path) -> None:
    wanted = recipe(work, "pretrain=null")
    run = go(wanted, until="export")
    before = {name: stamp(run / name) for name in ("packed", "bitnet_sft_packed", "student", "bitnet_sft")}
    go(wanted, "export", until="export")
    changed = {name for name, time in before.items() if stamp(run / name) != time}
    assert changed == {"packed", "bitnet_sft_packed"}
