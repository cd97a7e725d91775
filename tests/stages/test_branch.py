"""Branches of a wsd schedule end where a run from the start ends, and save its stable phase."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from bitdistill import artifact, pipeline
from bitdistill.errors import RecipeError
from bitdistill.models.student import load_student
from tests.stages.conftest import recipe

# Steps of 8 x 16 = 128 tokens. Warm-up: 2 steps in each. Decay of the last quarter.
LONG = ("pretrain.budget_tokens=1536", "pretrain.optim.warmup_fraction=0.1667")
SHORT = ("pretrain.budget_tokens=1024", "pretrain.optim.warmup_fraction=0.25")
COMMON = ("pretrain.optim.schedule=wsd", "pretrain.optim.decay_fraction=0.25")
KEEP = ("pretrain.branch_steps=[6]", "pretrain.loop.checkpoint_every_steps=3")


def base(work: Path, name: str, *options: str) -> tuple[Path, dict[str, torch.Tensor]]:
    result = pipeline.run(
        recipe(work, f"name={name}", *COMMON, *options), until="pretrain", stats=False, quiet=True
    )
    folder = Path(json.loads((result.run_dir / "base.json").read_text())["path"])
    model, _, _ = load_student(folder)
    return folder, {k: v.clone() for k, v in model.state_dict().items()}


def test_a_branch_equals_a_run_from_the_start(work: Path) -> None:
    _, alone = base(work, "alone", *SHORT, f"pretrain.cache_dir={work}/other/bases")
    long, _ = base(work, "long", *LONG, *KEEP)
    kept = list((work / "cache/stable").glob("*/step-*"))
    assert [path.name for path in kept] == ["step-00000006"]
    branched, weights = base(work, "short", *SHORT)
    assert all(torch.equal(alone[k], weights[k]) for k in alone)
    manifest = artifact.read_manifest(branched)
    assert manifest["branched_from"]["step"] == 6
    assert manifest["training"]["steps"] == 8
    assert manifest["training"]["tokens"] == 1024
    assert manifest["branched_from"]["tokens"] == 768
    assert artifact.read_manifest(long)["branched_from"] is None
    first = json.loads((work / "runs/short/logs/pretrain.jsonl").read_text().splitlines()[0])
    assert first["step"] > 6


@pytest.mark.parametrize(
    "other",
    [("seed=1",), ("pretrain.objective=lm",), ("pretrain.optim.learning_rate=0.002",),
     ("pretrain.optim.warmup_fraction=0.125",), ("pretrain.budget_tokens=896",)],
)  # fmt: skip
def test_other_runs_and_shorter_stable_phases_start_by_themselves(work: Path, other: tuple[str, ...]) -> None:
    base(work, "long", *LONG, *KEEP)
    folder, _ = base(work, "short", *SHORT, *other)
    assert artifact.read_manifest(folder)["branched_from"] is None


def test_a_damaged_checkpoint_is_passed_over(work: Path, caplog: pytest.LogCaptureFixture) -> None:
    base(work, "long", *LONG, *KEEP)
    (kept,) = (work / "cache/stable").glob("*/step-*/model.safetensors")
    data = bytearray(kept.read_bytes())
    data[-3] ^= 1
    kept.write_bytes(data)
    folder, _ = base(work, "short", *SHORT)
    assert artifact.read_manifest(folder)["branched_from"] is None
    assert "stable-phase checkpoint passed over" in caplog.text


def test_the_seed_of_stage_2_is_its_own_if_wanted(work: Path) -> None:
    one, _ = base(work, "one", *SHORT, "pretrain.seed=0")
    two, _ = base(work, "two", *SHORT, "pretrain.seed=0", "seed=1")
    three, _ = base(work, "three", *SHORT, "seed=1")
    plain, _ = base(work, "plain", *SHORT)
    assert one == two == plain
    assert three != one


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("pretrain.branch_steps=[6]",), "needs optim.schedule wsd and loop.checkpoint_every_steps"),
        (("pretrain.branch_steps=[5]", KEEP[1]), "5 is no multiple of loop.checkpoint_every_steps 3 up to 9"),
        (("pretrain.branch_steps=[12]", KEEP[1]), "where the decay of 12 steps begins"),
    ],
)
def test_steps_that_cannot_be_kept_are_refused(work: Path, options: tuple[str, ...], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        base(work, "long", *LONG, *options)
