"""The results page from made-up sweeps: lines, gaps, costs, figures; and that missing data draw nothing."""

from __future__ import annotations

import dataclasses
import io
import re
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from bitdistill.eval.metrics import wilson
from bitdistill.eval.results import ResultRow
from bitdistill.eval.row_scores import encode
from bitdistill.report import sweep_figures, sweep_results, sweep_tables
from bitdistill.report.panel import as_file, bars, interval, wrapped
from bitdistill.report.sweep_results import RunResult, StageCost, SweepResults

SCRIPT = Path(__file__).parents[2] / "scripts/make_results.py"
N = 400


def row(name: str, share: float, seed: int, key: str, shared: int = 0) -> ResultRow:
    """A row that is right on a share of the rows; models of one `shared` tend to fail together."""
    hard = np.random.default_rng(shared).random(N)
    own = np.random.default_rng([seed, *key.encode()]).random(N)
    right = 0.8 * hard + 0.2 * own < share
    score = wilson(int(right.sum()), N)
    return ResultRow(
        name=name, label=name, task="t", metric="accuracy", value=score.value, n=N, low=score.low,
        high=score.high, metrics={"accuracy": score.value}, seed=seed, commit="abc", versions={"torch": "2.13"},
        hardware={"gpu": "H200"}, score_key=f"{key}-{seed}", row_scores=encode(right.astype(float)),
    )  # fmt: skip


def run(cell: str, seed: int, share: float, **other: Any) -> RunResult:
    teacher, student = row("teacher", 0.9, seed, "teacher"), row("bitdistill", share, seed, cell)
    costs = {
        "sft": StageCost(key=f"sft-{seed}", steps=9, tokens=9, elapsed_s=60.0),
        "pretrain": StageCost(key="base", steps=9, tokens=26_000_000, elapsed_s=240.0),
        "distill": StageCost(key=f"{cell}-{seed}", steps=9, tokens=9, elapsed_s=120.0),
    }
    fields: dict[str, Any] = {"recipe": "r", "cell": cell, "label": cell, "seed": seed, "digest": "d"}
    fields |= {"status": "done", "rows": [teacher, student], "costs": costs}
    return RunResult(**(fields | other))


def results(*runs: RunResult, **other: Any) -> SweepResults:
    return SweepResults(name="s", title="Some sweep", runs=list(runs), **other)


def test_lines_have_mean_spread_gap_and_cost() -> None:
    made = results(*[run("a", seed, 0.8) for seed in range(3)], *[run("b", seed, 0.7) for seed in range(3)])
    teacher, a, b = sweep_tables.lines(made)
    assert (teacher.label, teacher.gap, teacher.train_minutes) == ("FP-SFT (teacher)", None, 1.0)
    values = [r.row("bitdistill").value for r in made.runs if r.cell == "a"]  # type: ignore[union-attr]
    assert a.mean == pytest.approx(np.mean(values))
    assert a.sd == pytest.approx(np.std(values, ddof=1))
    assert a.train_minutes == 6.0
    assert a.gap is not None
    assert b.gap is not None
    assert b.gap.points < a.gap.points < 0
    assert a.gap.low < a.gap.points < a.gap.high
    # three teachers, one base, six students
    assert made.train_s == 3 * 60 + 240 + 6 * 120
    referred = sweep_tables.lines(made.model_copy(update={"reference": "a"}))
    assert [x.against for x in referred] == ["", "teacher", "a"]
    assert referred[2].gap is not None
    assert referred[2].gap.points == pytest.approx(b.mean - a.mean)


@pytest.mark.parametrize("reference", ["", "a"])
def test_the_terminal_table_says_what_gaps_are_to(reference: str) -> None:
    made = results(run("a", 0, 0.8), run("b", 0, 0.7), reference=reference)
    out = io.StringIO()
    sweep_tables.print_sweep(made, Console(file=out, width=140))
    said = out.getvalue()
    assert ("gap to cell a [95%]" if reference else "gap to teacher [95%]") in said
    (first,) = [line for line in said.splitlines() if re.match(r"\s*r\s+a\s", line)]
    (second,) = [line for line in said.splitlines() if re.match(r"\s*r\s+b\s", line)]
    assert ("(teacher)" in first) == bool(reference)
    assert "(teacher)" not in second


def test_how_likely_references_are_has_a_column_where_some_line_has_it() -> None:
    def generated(share: float, key: str, **metrics: float) -> ResultRow:
        measured = {"rougeL": share, "bleu": 4.0, **metrics}
        return row("teacher", share, 0, key).model_copy(update={"metric": "rougeL", "metrics": measured})

    def table(*rows: ResultRow) -> list[str]:
        runs = [run(f"c{n}", 0, 50.0, rows=(r,)) for n, r in enumerate(rows)]
        return [line for line in sweep_tables.markdown(results(*runs)) if line.startswith("|")]

    head, _, first, second = table(generated(30.0, "a"), generated(31.0, "b", reference_nll=3.2346))
    assert head.endswith(" bleu | nats a token of the references |"), "the first line has none, and still"
    assert first.endswith(" 4.00 |  |")
    assert second.endswith(" 4.00 | 3.235 |")
    assert "nats" not in table(generated(30.0, "a"))[0]


def test_a_teacher_that_is_another_model_is_named() -> None:
    own, other = run("a", 0, 0.8), run("b", 0, 0.8)
    changed = {"label": "Teacher (owner/large, full precision)", "score_key": "large-0"}
    rows = [other.rows[0].model_copy(update=changed), other.rows[1]]
    made = results(own, other.model_copy(update={"rows": rows}))
    labels = [line.label for line in sweep_tables.lines(made)]
    assert labels == ["FP-SFT (teacher)", "FP-SFT (teacher, owner/large)", "a", "b"]


def test_what_cannot_be_paired_has_no_gap_and_failures_no_line() -> None:
    unscored = run("a", 0, 0.8)
    bare = [r.model_copy(update={"row_scores": None}) for r in unscored.rows]
    failed = run("c", 0, 0.8, status="failed", error="out of memory", rows=[], costs={})
    made = results(unscored.model_copy(update={"rows": bare}), failed)
    assert [(x.label, x.gap) for x in sweep_tables.lines(made)] == [("FP-SFT (teacher)", None), ("a", None)]


def test_figures_draw_only_what_has_data() -> None:
    one = results(run("a", 0, 0.8, x=1e7, line="KL"), figure="tokens", x_label="tokens")
    assert sweep_figures.of_sweep(one) == {}
    runs = [
        run(f"{o}{x}", 0, 0.6 + x / 2e8, x=float(x), line=o)
        for o in ("KL", "LM")
        for x in (13_000_000, 52_000_000)
    ]
    tokens = sweep_figures.of_sweep(results(*runs, figure="tokens", x_label="tokens"))
    assert list(tokens) == ["s-r"]
    svg = as_file(tokens["s-r"])
    ElementTree.fromstring(svg)
    assert "var(" not in svg
    for word in ("teacher", "KL", "LM", "52M"):
        assert re.search(rf">\s*{word}\s*<", svg), word
    curves = {"pretrain": {"tokens": [1.0, 2.0], "step": [1.0, 2.0], "loss": [5.0, 4.0], "kl": [3.0, 2.0]}}
    runs = [
        run(name, 0, 0.8, curves=curves, densities={"base": [0.1] * 61, "refined": [0.2] * 61})
        for name in "ab"
    ]
    drawn = sweep_figures.of_sweep(results(*runs, figure="curves"))
    assert list(drawn) == ["s-r-pretrain", "s-r-a-weights", "s-r-b-weights"]
    assert "Within" not in drawn["s-r-a-weights"].note
    near = {"refined": 0.0912, "base": 0.284}
    one = run("a", 0, 0.8, densities={"base": [0.1] * 61, "refined": [0.2] * 61}, near=near)
    (slug, weights), *rest = sweep_figures.of_sweep(results(one, figure="curves")).items()
    assert (slug, rest) == ("s-r-weights", [])
    assert weights.note.endswith("Within 0.05 of a threshold: 9.1% refined, 28.4% base.")
    assert "kl" in drawn["s-r-pretrain"].title
    gaps = sweep_figures.of_sweep(results(run("a", 0, 0.8), run("b", 0, 0.7)))
    assert list(gaps) == ["s-gaps"]
    assert gaps["s-gaps"].note.startswith("Points against teacher;")
    runs = [run("a", 0, 0.8), run("b", 0, 0.7), run("b", 0, 0.7, recipe="q"), run("a", 0, 0.8, recipe="q")]
    referred = sweep_figures.of_sweep(results(*runs, reference="a"))["s-gaps"]
    assert re.search(r"against a; .* r, a against its teacher: -\d", referred.note)
    names = re.findall(r"<text[^>]*>([^<]+)</text>|<tspan[^>]*>([^<]+)</tspan>", as_file(referred))
    assert "(b)" in {word.strip() for pair in names for word in pair}  # a dot for b, and none for a
    assert "(a)" not in {word.strip() for pair in names for word in pair}
    for figure in (*drawn.values(), *gaps.values()):
        ElementTree.fromstring(as_file(figure))


def test_names_are_wrapped_not_cut() -> None:
    long = "bitdistill v1 with one teacher, 160,000 written rows, two epochs"
    names = wrapped(["sst2-gemma3-270m (BitNet-SFT)", f"sst2-gemma3-270m ({long})"])
    assert names[0] == "sst2-gemma3-270m\n(BitNet-SFT)"
    assert names[1].replace("\n", " ") == f"sst2-gemma3-270m ({long})"
    assert max(len(line) for name in names for line in name.split("\n")) <= 26
    assert wrapped(["CE", "Teacher (full precision)"]) == ["CE", "Teacher\n(full precision)"]


def test_a_figures_file_does_not_depend_on_what_was_drawn_before() -> None:
    def draw(axes: object) -> None:
        interval(axes, 0, 1.0, 0.5, 2.0)

    files = [as_file(bars("a", "", ["one"], draw)) for _ in range(2)]
    assert files[0] == files[1]
    assert 'id="figure_1"' in files[0]


def test_the_page(tmp_path: Path) -> None:
    docs, folder = tmp_path / "docs", tmp_path / "results"
    docs.mkdir()
    (docs / "figures").mkdir()
    (docs / "figures/old.svg").write_text("stale")
    made = results(
        run("a", 0, 0.8), run("b", 0, 0.7), run("c", 0, 0.8, status="failed", error="why", rows=[], costs={})
    )
    sweep_results.write(folder / "sweeps/s.json", made)
    sweep_results.write(folder / "sweeps/none.json", SweepResults(name="none"))
    call = [sys.executable, str(SCRIPT), "--results", str(folder), "--docs", str(docs)]
    subprocess.run(call, check=True)
    text = (docs / "results.md").read_text("utf-8")
    assert "### Some sweep" in text
    assert "| FP-SFT (teacher) | " in text
    assert "- failed: r/c/0: why" in text
    assert "9.0 minutes of training in all on H200; commit abc" in text
    assert "none" not in text
    assert [p.name for p in (docs / "figures").iterdir()] == ["s-gaps.svg"]
    assert "![Some sweep: gap](figures/s-gaps.svg)" in text
    assert subprocess.run([*call, "--check"], check=False).returncode == 0
    sweep_results.write(folder / "sweeps/s.json", results(run("a", 0, 0.8)))
    assert subprocess.run([*call, "--check"], check=False, capture_output=True).returncode == 1
    sweep_results.write(folder / "sweeps/s.json", results(run("a", 0, 0.8, wall_s=510.0)))
    subprocess.run(call, check=True)
    text = (docs / "results.md").read_text("utf-8")
    assert "; 1 run, 7.0 minutes of training in all (8.5 from start to end) on H200" in text


def test_the_readmes_table_comes_from_the_headline_results(tmp_path: Path) -> None:
    folder, docs, readme = tmp_path / "results", tmp_path / "docs", tmp_path / "README.md"
    docs.mkdir()
    two = results(run("bitdistill", 0, 0.8), run("bitdistill", 1, 0.8))
    sweep_results.write(folder / "sweeps/headline-x.json", two)
    sweep_results.write(folder / "sweeps/other.json", results(run("bitdistill", 0, 0.5)))
    call = [
        sys.executable,
        str(SCRIPT),
        "--results",
        str(folder),
        "--docs",
        str(docs),
        "--readme",
        str(readme),
    ]
    readme.write_text("# A\n\nno marks\n", "utf-8")
    failed = subprocess.run(call, check=False, capture_output=True, text=True)
    assert failed.returncode == 1
    assert "marks" in failed.stderr
    readme.write_text("before\n<!-- made by scripts/make_results.py -->\nold\n<!-- end -->\nafter\n", "utf-8")
    subprocess.run(call, check=True)
    readme.write_text(readme.read_text("utf-8").replace("2 seeds", "3 seeds"), "utf-8")
    stale = subprocess.run([*call, "--check"], check=False, capture_output=True, text=True)
    assert stale.returncode == 1
    assert "its table is not what results/ say" in stale.stderr
    subprocess.run(call, check=True)
    text = readme.read_text("utf-8")
    teacher, student = (
        sum(found.value for found in (r.row(name) for r in two.runs) if found is not None) / 2
        for name in ("teacher", "bitdistill")
    )
    lines = [line for line in text.splitlines() if line.startswith("| r, ")]
    assert len(lines) == 1
    assert lines[0].startswith(f"| r, accuracy | {teacher:.2f} (2 seeds) | {student:.2f} (2 seeds) | ")
    assert lines[0].endswith("| not measured | not measured |")
    assert "\nold\n" not in text
    assert text.startswith("before\n")
    assert text.endswith("\nafter\n")
    assert subprocess.run([*call, "--check"], check=False).returncode == 0
    # Direct fine-tuning has no base: a cell of an older base may be the only one that measured it
    teacher_row, direct = row("teacher", 0.9, 0, "teacher"), row("bitnet_sft", 0.4, 0, "older")
    older = run("older", 0, 0.7, rows=[teacher_row, direct])
    literal = run("paper", 0, 0.6)
    sweep_results.write(folder / "sweeps/headline-x.json", results(*two.runs, older, literal))
    subprocess.run(call, check=True)
    line = next(line for line in readme.read_text("utf-8").splitlines() if line.startswith("| r, "))
    assert f"| {student:.2f} (2 seeds) | " in line
    assert line.endswith(f"| {direct.value:.2f} (1 seed) | {literal.rows[1].value:.2f} (1 seed) |")


def test_a_gap_over_fewer_seeds_than_the_row_says_so() -> None:
    results = sweep_results.read(Path(__file__).parents[2] / "results/sweeps/headline-gemma3-270m.json")
    line = next(x for x in sweep_tables.lines(results) if x.gap is not None)
    assert line.gap is not None
    assert "seed" not in sweep_tables.gap_words(line.gap)
    fewer = dataclasses.replace(line, values={**line.values, 99: 1.0})
    assert (
        sweep_tables.marked_gap(fewer, "")
        == f"{sweep_tables.gap_words(line.gap)} ({len(line.gap.seeds)} seeds)"
    )
    assert sweep_tables.marked_gap(line, "") == sweep_tables.gap_words(line.gap)
