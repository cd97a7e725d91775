"""Paired comparisons over rows and seeds, against hand-made cases and scipy; reading and the command."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from scipy import stats
from typer.testing import CliRunner

from bitdistill.cli.main import app
from bitdistill.errors import ArtifactError, DataError
from bitdistill.eval import row_scores
from bitdistill.report import paired
from bitdistill.report.paired import Scored


def scored(name: str, *seeds: list[float], metric: str = "accuracy", sha: str | None = None) -> Scored:
    return Scored(name, "t", metric, {n: np.array(s, dtype=float) for n, s in enumerate(seeds)}, sha)


def test_one_seed_by_hand() -> None:
    a = [100.0] * 82 + [0.0] * 18
    b = [100.0] * 80 + [0.0] * 2 + [100.0] * 12 + [0.0] * 6
    found = paired.compare(scored("a", a), scored("b", b))
    assert (found.n, found.seeds, found.points) == (100, (0,), pytest.approx(-10.0))
    assert found.p_by_seed == (pytest.approx(2 * 106 / 2**14),)  # 2 against 12 rows
    assert found.p_value == found.p_by_seed[0]
    assert found.low < -10 < found.high < 0
    assert found.clear
    assert (found.seeds_low, found.seeds_p, found.test) == (None, None, "McNemar, exact")


def test_seeds_are_paired_with_their_own() -> None:
    rng = np.random.default_rng(0)
    base = [100.0 * (rng.random(300) < p) for p in (0.7, 0.8, 0.9)]  # seeds differ by 10 points ...
    gains = (6, 9, 12)  # ... and the gain within a seed by few rows
    better = []
    for seed, rows in enumerate(base):
        lifted = rows.copy()
        lifted[np.flatnonzero(rows == 0)[: gains[seed]]] = 100.0
        better.append(lifted)
    found = paired.compare(scored("a", *better), scored("b", *base))
    assert found.by_seed == pytest.approx([2.0, 3.0, 4.0])
    expected = stats.ttest_rel([x.mean() for x in better], [x.mean() for x in base])
    assert found.seeds_p == pytest.approx(expected.pvalue)
    interval = expected.confidence_interval()
    assert (found.seeds_low, found.seeds_high) == (pytest.approx(interval.low), pytest.approx(interval.high))
    assert found.p_value == found.seeds_p
    assert found.seeds_low < found.low < 3.0 < found.high < found.seeds_high


def test_graded_scores_take_a_permutation_test() -> None:
    rng = np.random.default_rng(0)
    a = 100 * rng.random(120)
    b = np.clip(a - rng.normal(3, 8, 120), 0, 100)
    found = paired.compare(scored("a", a, metric="rougeL"), scored("b", b, metric="rougeL"))
    assert "permutation" in found.test
    assert found.p_by_seed[0] == pytest.approx(stats.ttest_rel(a, b).pvalue, abs=0.02)
    same = paired.compare(scored("a", a), scored("b", a))
    assert (same.points, same.p_value, same.clear) == (0.0, 1.0, False)


def test_equal_differences_have_no_t_interval_to_speak_of() -> None:
    found = paired.compare(scored("a", [100, 0], [0, 100]), scored("b", [0, 0], [0, 0]))
    assert (found.seeds_low, found.seeds_high, found.seeds_p) == (50.0, 50.0, None)
    assert found.p_value == found.p_by_seed[0]


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (scored("b", [100, 0], metric="f1"), "metric accuracy against f1"),
        (scored("b", [100]), "different rows \\(2 and 1\\)"),
        (scored("b", [100, 0], sha="y"), "different rows"),
        (Scored("b", "t", "accuracy", {7: np.zeros(2)}), "no seed in common"),
    ],
)
def test_unlike_things_are_refused(other: Scored, message: str) -> None:
    with pytest.raises(DataError, match=message):
        paired.compare(scored("a", [100, 0], sha="x"), other)


def test_row_scores_round_trip() -> None:
    values = [0.0, 1.0, 0.33333, 1.0]
    text = row_scores.encode(values)
    assert row_scores.decode(text, 4) == pytest.approx([0, 100, 33.33, 100], abs=1e-9)
    assert len(row_scores.encode([1.0] * 25_000)) < 200
    with pytest.raises(ValueError, match="not in"):
        row_scores.encode([1.1])
    for bad, n in ((text, 3), (text, 5), ("!", 4), ("", 4), (text[:-8], 4), (text, 10**9)):
        with pytest.raises(ArtifactError, match="x: unreadable row scores"):
            row_scores.decode(bad, n, "x")


def seeds_of(run: Path) -> None:
    """A second seed beside the run, whose student lost the rows 0..4."""
    other = Path(shutil.copytree(run, run.with_name(f"{run.name}-seed1")))
    rows = json.loads((other / "results.json").read_text())
    for row in rows["rows"]:
        row["seed"] = 1
    (other / "results.json").write_text(json.dumps(rows))
    path = other / "predictions/bitdistill.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    for line in lines[:5]:
        line["correct"] = False
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_the_command(run_folder: Path) -> None:
    seeds_of(run_folder)
    runner = CliRunner()
    done = runner.invoke(
        app, ["compare", f"{run_folder}:bitdistill", f"{run_folder}:teacher", "--seeds", "--json"]
    )
    assert done.exit_code == 0, done.output
    (one,) = json.loads(done.output)["comparisons"]
    assert (one["n"], one["seeds"]) == (600, [0, 1])
    assert one["by_seed"][1] < one["by_seed"][0]
    done = runner.invoke(app, ["compare", str(run_folder), f"{run_folder}-seed1"])
    assert isinstance(done.exception, DataError)
    assert "no seed in common" in str(done.exception)
    assert done.output == ""
    shown = runner.invoke(app, ["compare", f"{run_folder}:bitdistill", f"{run_folder}:teacher"]).output
    assert "points" in shown
    assert "McNemar, exact" in shown
    same = runner.invoke(app, ["compare", str(run_folder), str(run_folder)]).output
    assert same.count("+0.00 points") == 3


def test_what_cannot_be_compared_is_said(run_folder: Path) -> None:
    runner = CliRunner()
    for second, message in (
        (f"{run_folder}:nobody", "no row 'nobody' here; rows: teacher"),
        (f"{run_folder}/gone", "no such run"),
    ):
        done = runner.invoke(app, ["compare", str(run_folder), second])
        assert isinstance(done.exception, ArtifactError)
        assert message in str(done.exception)
    (run_folder / "predictions/teacher.jsonl").unlink()
    with pytest.raises(ArtifactError, match="row teacher has no scores of single test rows"):
        paired.read_models(run_folder)
