from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from bitdistill import artifact
from bitdistill.errors import ArtifactError
from bitdistill.report.run_folder import read_run


def test_whole_run_misses_nothing(run_folder: Path) -> None:
    run = read_run(run_folder)
    assert run.missing == []
    assert [row.name for row in run.rows] == ["teacher", "bitnet_sft", "bitdistill"]
    assert {name: len(answers) for name, answers in run.answers.items()} == dict.fromkeys(run.answers, 600)
    assert list(run.logs) == ["sft", "pretrain", "distill", "bitnet_sft"]
    assert run.split == "test"


@pytest.mark.parametrize(
    ("gone", "named"),
    [
        ("run.json", "run.json"),
        ("results.json", "results.json"),
        ("logs/distill.jsonl", "logs/distill.jsonl"),
        ("stats/base.json", "stats/base.json"),
        ("predictions/teacher.jsonl", "predictions/teacher.jsonl"),
        ("packed", "packed/"),
    ],
)
def test_each_missing_piece_is_named(run_folder: Path, gone: str, named: str) -> None:
    path = run_folder / gone
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    missing = read_run(run_folder).missing
    assert [line.split(":")[0] for line in missing] == [named]


def test_not_a_run_folder(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"no recipe\.yaml here"):
        read_run(tmp_path)


def test_left_out_stages_are_not_missed(run_folder: Path) -> None:
    recipe = (run_folder / "recipe.yaml").read_text()
    recipe = recipe.replace("pretrain: {objective: kl, budget_tokens: 2000000}", "pretrain:")
    recipe = recipe.replace("bitnet_sft: {subln: none}", "bitnet_sft:")
    (run_folder / "recipe.yaml").write_text(recipe)
    for name in ("logs/pretrain.jsonl", "logs/bitnet_sft.jsonl", "stats/base.json"):
        (run_folder / name).unlink()
    assert read_run(run_folder).missing == []


def test_reused_base_is_a_cost_of_another_run(run_folder: Path, tmp_path: Path) -> None:
    base = tmp_path / "cache" / "abc"
    training = {
        "steps": 1000,
        "tokens": 24_000_000,
        "elapsed_s": 600.0,
        "skipped_steps": 0,
        "final_loss": 0.7,
    }
    with artifact.writing(base, {"kind": "base", "training": training}) as folder:
        (folder / "model.safetensors").write_bytes(b"x")
    (run_folder / "base.json").write_text(json.dumps({"path": str(base)}))
    run = read_run(run_folder)
    assert not run.base_reused  # its log is here: this run made it
    (run_folder / "logs" / "pretrain.jsonl").unlink()
    run = read_run(run_folder)
    assert run.base_reused
    assert run.missing == []
    cost = next(cost for cost in run.costs if cost.stage == "pretrain")
    assert (cost.reused, cost.tokens, cost.tokens_per_s) == (True, 24_000_000, 40_000.0)
    assert not any(cost.reused for cost in run.costs if cost.stage != "pretrain")


def test_a_stopped_stage_costs_what_its_log_says(run_folder: Path) -> None:
    log = run_folder / "logs" / "distill.jsonl"
    lines = log.read_text().splitlines()
    log.write_text("\n".join(lines[:10]) + "\n" + lines[10][:30])  # killed in the middle of a line
    cost = next(cost for cost in read_run(run_folder).costs if cost.stage == "distill")
    assert (cost.steps, cost.steps_planned, cost.tokens) == (100, 400, 100_000)


def test_bad_line_in_the_middle_is_named(run_folder: Path) -> None:
    log = run_folder / "logs" / "sft.jsonl"
    lines = log.read_text().splitlines()
    log.write_text("\n".join([lines[0], "{oops", *lines[1:]]) + "\n")
    with pytest.raises(ArtifactError, match=r"sft\.jsonl:2: unreadable line"):
        read_run(run_folder)


def test_repeated_steps_count_once_and_nan_is_counted(run_folder: Path) -> None:
    log = run_folder / "logs" / "sft.jsonl"
    records = [
        {"step": 10, "loss": 5.0, "tokens": 100, "elapsed_s": 1.0},
        {"step": 20, "loss": float("nan"), "tokens": 200, "elapsed_s": 2.0},
        {"step": 30, "loss": 9.0, "tokens": 300, "elapsed_s": 3.0},
        {"step": 30, "loss": 3.0, "tokens": 300, "elapsed_s": 3.5},
    ]
    log.write_text("".join(json.dumps(record) + "\n" for record in records))
    found = read_run(run_folder).logs["sft"]
    assert found.series("loss") == ([100.0, 300.0], [5.0, 3.0])
    assert found.nonfinite == 1
    assert found.last("loss") == 3.0


def test_bad_prediction_is_named(run_folder: Path) -> None:
    path = run_folder / "predictions" / "teacher.jsonl"
    path.write_text('{"index": 0}\n' + path.read_text())
    with pytest.raises(ArtifactError, match=r"teacher\.jsonl:1: not a prediction"):
        read_run(run_folder)


def test_recipe_that_is_no_mapping(run_folder: Path) -> None:
    (run_folder / "recipe.yaml").write_text("- 1\n")
    with pytest.raises(ArtifactError, match="not a recipe"):
        read_run(run_folder)


def test_split_is_validation_without_test_rows(run_folder: Path) -> None:
    recipe = (run_folder / "recipe.yaml").read_text().replace(", test: test.jsonl", "")
    (run_folder / "recipe.yaml").write_text(recipe)
    assert read_run(run_folder).split == "validation"
