"""results.json, predictions files and the printed table."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from bitdistill.config import Task
from bitdistill.data.tasks import Example
from bitdistill.errors import ArtifactError, StorageError
from bitdistill.eval import results
from bitdistill.eval.prediction import Prediction
from bitdistill.eval.results import (
    ResultRow,
    predictions_hash,
    read_results,
    write_predictions,
    write_results,
)

TASK = Task(name="t", kind="classification", template="{x}", labels={"0": " no", "1": " yes"})


def row(name: str = "teacher", **changes: object) -> ResultRow:
    fields = {
        "name": name,
        "label": {"teacher": "Teacher (full precision)", "bitnet_sft": "BitNet-SFT (direct ternary)"}.get(
            name, name
        ),
        "task": "banking77",
        "metric": "accuracy",
        "value": 91.234,
        "n": 3080,
        "low": 90.1,
        "high": 92.3,
        "metrics": {"accuracy": 91.234, "agreement_with_teacher": 93.21},
        "bits_per_weight": 16.0,
        "size_bytes": 269_000_000,
        "tokens_per_s": 12345.6,
        "seed": 0,
        "versions": results.versions(),
        "hardware": results.hardware(),
    }
    return ResultRow(**(fields | changes))


def printed(rows: list[ResultRow], width: int = 80) -> list[str]:
    stream = io.StringIO()
    results.print_table(rows, Console(file=stream, width=width))
    return stream.getvalue().splitlines()


def test_round_trip(tmp_path: Path) -> None:
    rows = [row(), row("bitnet_sft", seed=None, tokens_per_s=None, train_tokens=5)]
    path = tmp_path / "run" / "results.json"
    write_results(path, rows)
    assert read_results(path) == rows
    assert list(path.parent.iterdir()) == [path]  # no partial file is left
    assert set(json.loads(path.read_text("utf-8"))) == {"rows"}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", r"unreadable results"),
        ("[]", r"unreadable results"),
        ('{"rows": [{"name": "x"}]}', r"field label: Field required"),
        ('{"rows": 3}', r"unreadable results"),
    ],
)
def test_malformed_results(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "results.json"
    path.write_text(content, "utf-8")
    with pytest.raises(ArtifactError, match=message):
        read_results(path)
    with pytest.raises(ArtifactError, match="no results here"):
        read_results(tmp_path / "none.json")


def test_values_that_are_no_numbers_are_refused() -> None:
    with pytest.raises(ValueError, match="finite"):
        row(value=float("nan"))
    with pytest.raises(ValueError, match="extra"):
        row(valeu=1.0)


def test_unwritable_place(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x", "utf-8")
    with pytest.raises(StorageError, match=r"file: File exists"):
        write_results(tmp_path / "file" / "results.json", [row()])


def test_predictions_file(tmp_path: Path) -> None:
    predictions = [Prediction(0, 1, (-2.00004, -0.5), "yes"), Prediction(1, 0, (-0.1, -3.0), "no")]
    examples = [
        Example((1,), (2,), 1, ("yes",), "é?", "t.jsonl:1"),
        Example((1,), (2,), 1, ("yes",), "b", "t.jsonl:2"),
    ]
    path = tmp_path / "predictions" / "teacher.jsonl"
    write_predictions(path, predictions, examples, TASK)
    lines = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    assert lines[0] == {
        "index": 0,
        "where": "t.jsonl:1",
        "prompt": "é?",
        "reference": "yes",
        "prediction": "yes",
        "correct": True,
        "scores": [-2.0, -0.5],
    }
    assert lines[1]["correct"] is False


def test_predictions_name_the_datas_own_labels(tmp_path: Path) -> None:
    task = TASK.model_copy(update={"labels": {"0": " no", "card_arrival": " post"}})
    examples = [Example((1,), (2,), 1, ("post",), "p", "/home/someone/data/t.jsonl:7")]
    write_predictions(tmp_path / "p.jsonl", [Prediction(0, 0, (-1.0, -2.0), "no")], examples, task)
    line = json.loads((tmp_path / "p.jsonl").read_text("utf-8"))
    assert (line["reference"], line["prediction"], line["where"]) == ("card_arrival", "no", "t.jsonl:7")


def test_generated_answers_are_judged_only_by_exact_match(tmp_path: Path) -> None:
    task = Task(name="g", kind="generation", template="{x}", target_field="y")
    examples = [Example((1,), (2,), None, ("42", "forty-two"), "p", "t:1")]
    for metrics, correct in (((), None), (("rougeL", "exact_match"), None), (("exact_match",), True)):
        judged = task.model_copy(update={"metrics": metrics})
        write_predictions(tmp_path / "p.jsonl", [Prediction(0, None, (), "forty-two")], examples, judged)
        line = json.loads((tmp_path / "p.jsonl").read_text("utf-8"))
        assert (line["correct"], line["reference"]) == (correct, "42")


def test_hash_names_the_answers() -> None:
    one, two = Prediction(0, 1, (-1.0, -0.5), "yes"), Prediction(1, 0, (-0.1, -3.0), "no")
    rounded = Prediction(0, 1, (-1.0000001, -0.5), "yes")
    assert predictions_hash([one, two]) == predictions_hash([two, rounded])
    assert predictions_hash([one, two]) != predictions_hash([one])
    changed = Prediction(1, 1, (-0.1, -3.0), "yes")
    assert predictions_hash([one, two]) != predictions_hash([one, changed])
    assert len(predictions_hash([])) == 64


def test_table_fits_80_columns_and_shows_every_number() -> None:
    rows = [
        row(),
        row("bitnet_sft", value=71.5, size_bytes=36_000_000),
        row("BitDistill student", tokens_per_s=None),
    ]
    lines = printed(rows)
    assert max(map(len, lines)) <= 80
    text = " ".join(" ".join(lines).split())
    for piece in ("banking77 (3,080 rows)", "accuracy [95%]", "91.23 [90.1, 92.3]", "71.50", "93.2", "16.00"):
        assert piece in text
    for piece in ("269.0 MB", "36.0 MB", "12.3k", "BitDistill student"):
        assert piece in text
    assert "…" not in text  # nothing was cut off


def test_table_of_several_tasks_and_seeds() -> None:
    rows = [row(), row(seed=1, task="aeslc", metric="rougeL", n=1906, value=31.0, low=30.0, high=32.0)]
    text = " ".join(" ".join(printed(rows)).split())
    assert "banking77, aeslc (rows differ)" in text
    assert "seed" in text
    assert max(map(len, printed(rows))) <= 80
    assert printed([])


def test_untrusted_labels_are_not_markup() -> None:
    text = "\n".join(printed([row(label="[red]x[/red] [0.1]", task="[bold]t")]))
    assert "[red]x[/red]" in text
    assert "[bold]t" in text


@pytest.mark.parametrize(
    ("size", "text"), [(0, "0 B"), (999, "999 B"), (1000, "1.0 kB"), (13_400_000, "13.4 MB")]
)
def test_human_bytes(size: int, text: str) -> None:
    assert results.human_bytes(size) == text


@pytest.mark.parametrize(
    ("count", "text"), [(950, "950"), (12345, "12.3k"), (1.25e6, "1.2M"), (3e9, "3000.0M")]
)
def test_human_count(count: float, text: str) -> None:
    assert results.human_count(count) == text


def test_hardware_and_versions() -> None:
    found = results.hardware("cpu")
    assert found["device"] == "cpu"
    assert found["cores"] >= 1
    assert found["memory_gb"] > 0.1
    assert found["cpu"]
    assert {"python", "torch", "transformers", "numpy"} <= set(results.versions())
