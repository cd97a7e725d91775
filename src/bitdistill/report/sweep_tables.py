"""A sweep's results as lines of a table: mean and spread over seeds, paired gap, cost. No torch import."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import TYPE_CHECKING

from bitdistill.errors import ArtifactError, DataError
from bitdistill.eval.results import ResultRow
from bitdistill.report import text
from bitdistill.report.paired import Comparison, compare, gather
from bitdistill.report.sweep_results import RunResult, SweepResults

if TYPE_CHECKING:
    from rich.console import Console

# Stages that a row's own training consists of; a student's teacher is counted with the teacher.
OWN_STAGES = {
    "teacher": ("sft",),
    "bitnet_sft": ("bitnet_sft",),
    "bitdistill": ("pretrain", "augment", "distill"),
}
NAMES = {"teacher": "FP-SFT (teacher)", "bitnet_sft": "BitNet-SFT"}
# What stages/evaluate.py calls a row of another model
_OTHER_TEACHER = re.compile(r"Teacher \((.+), full precision\)")


@dataclass(frozen=True)
class Line:
    """One model of a sweep, over its seeds."""

    recipe: str
    cell: str
    row: str
    label: str
    line: str
    x: float | None
    task: str
    metric: str
    split: str
    values: dict[int, float]
    """Seed -> headline metric."""
    metrics: dict[str, float]
    """Every metric, mean over seeds."""
    gap: Comparison | None
    against: str
    train_minutes: float | None
    """Of its own stages, mean over seeds, artifacts that were taken over included."""
    tokens: int | None
    """Of stage 2, where the row has one."""
    n: int
    size_bytes: int | None

    @property
    def mean(self) -> float:
        return fmean(self.values.values())

    @property
    def sd(self) -> float | None:
        """Sample standard deviation over seeds; None for one."""
        return stdev(self.values.values()) if len(self.values) > 1 else None


def lines(results: SweepResults, *, tests: bool = True) -> list[Line]:
    """Lines by recipe, in the sweep's order; a teacher or baseline that several cells share comes once.

    Args:
        tests: False leaves the per-seed significance tests of the gaps out.
    """
    found: list[Line] = []
    for recipe in dict.fromkeys(run.recipe for run in results.runs):
        for row in NAMES:
            shown: set[str] = set()
            for cell in _cells(results, recipe):
                keys = {
                    found_row.score_key or f"{cell}/{seed}"
                    for seed, found_row in _rows(results, recipe, cell, row).items()
                }
                line = None if keys <= shown else _line(results, recipe, cell, row, tests)
                shown |= keys
                found += [line] if line is not None else []
        students = (_line(results, recipe, cell, "bitdistill", tests) for cell in _cells(results, recipe))
        found += [line for line in students if line is not None]
    return found


def _cells(results: SweepResults, recipe: str) -> list[str]:
    return list(dict.fromkeys(run.cell for run in results.runs if run.recipe == recipe))


def _done(results: SweepResults, recipe: str, cell: str) -> list[RunResult]:
    return [r for r in results.runs if (r.recipe, r.cell, r.status) == (recipe, cell, "done")]


def _line(results: SweepResults, recipe: str, cell: str, row: str, tests: bool) -> Line | None:
    runs = [run for run in _done(results, recipe, cell) if run.row(row) is not None]
    if not runs:
        return None
    rows = {run.seed: _row(run, row) for run in runs}
    first = next(iter(rows.values()))
    gap, against = _gap(results, recipe, cell, row, rows, tests)
    stages = OWN_STAGES[row]
    minutes = [sum(run.costs[s].elapsed_s for s in stages if s in run.costs) / 60 for run in runs]
    tokens = [run.costs["pretrain"].tokens for run in runs if row == "bitdistill" and "pretrain" in run.costs]
    names = set.intersection(*(set(r.metrics) for r in rows.values()))
    return Line(
        recipe=recipe,
        cell=cell,
        row=row,
        label=_label(runs[0], first),
        line=runs[0].line,
        x=runs[0].x,
        task=first.task,
        metric=first.metric,
        split=runs[0].split,
        values={seed: r.value for seed, r in sorted(rows.items())},
        metrics={
            name: fmean(r.metrics[name] for r in rows.values()) for name in first.metrics if name in names
        },
        gap=gap,
        against=against,
        train_minutes=fmean(minutes) if any(minutes) else None,
        tokens=tokens[0] if tokens else None,
        n=first.n,
        size_bytes=first.size_bytes,
    )


def _label(run: RunResult, row: ResultRow) -> str:
    other = _OTHER_TEACHER.fullmatch(row.label) if row.name == "teacher" else None
    return NAMES.get(row.name, run.label) if other is None else f"FP-SFT (teacher, {other[1]})"


def _row(run: RunResult, name: str) -> ResultRow:
    row = run.row(name)
    assert row is not None
    return row


def _gap(
    results: SweepResults, recipe: str, cell: str, row: str, rows: dict[int, ResultRow], tests: bool
) -> tuple[Comparison | None, str]:
    """The paired comparison with the reference cell's same row, or else with each seed's own teacher."""
    if row == "teacher" or (results.reference == cell and row == "bitdistill"):
        against, other = (
            ("", {}) if row == "teacher" else ("teacher", _rows(results, recipe, cell, "teacher"))
        )
    elif results.reference and row == "bitdistill":
        against, other = results.reference, _rows(results, recipe, results.reference, row)
    else:
        against, other = "teacher", _rows(results, recipe, cell, "teacher")
    common = sorted(rows.keys() & other.keys())
    if not common:
        return None, ""
    try:
        first = gather({seed: (rows[seed], None) for seed in common}, row, f"{recipe}/{cell}")
        second = gather({seed: (other[seed], None) for seed in common}, against, f"{recipe}/{against}")
        return compare(first, second, tests=tests), against
    except (ArtifactError, DataError):
        return None, ""  # scored with another metric or on other rows: no gap to show


def _rows(results: SweepResults, recipe: str, cell: str, row: str) -> dict[int, ResultRow]:
    return {run.seed: found for run in _done(results, recipe, cell) if (found := run.row(row)) is not None}


# --- words --------------------------------------------------------------------------------------------


def score(line: Line) -> str:
    """`91.23 ± 0.31`, or without the spread for one seed."""
    return f"{line.mean:.2f}" + (f" ± {line.sd:.2f}" if line.sd is not None else "")


def gap_words(gap: Comparison | None) -> str:
    """`-0.52 [-1.10, +0.08]`: points and the interval over rows."""
    return "" if gap is None else f"{gap.points:+.2f} [{gap.low:+.2f}, {gap.high:+.2f}]"


def p_words(gap: Comparison | None) -> str:
    """McNemar's p of each seed (or of the permutation test)."""
    return "" if gap is None else ", ".join(map(text.exact_p, gap.p_by_seed))


def seeds_words(gap: Comparison | None) -> str:
    """The t interval over seeds."""
    if gap is None or gap.seeds_low is None or gap.seeds_high is None:
        return ""
    return f"[{gap.seeds_low:+.2f}, {gap.seeds_high:+.2f}]"


def markdown(results: SweepResults) -> list[str]:
    """Lines of a Markdown table per recipe."""
    found: list[str] = []
    by_recipe: dict[str, list[Line]] = {}
    for line in lines(results):
        by_recipe.setdefault(line.recipe, []).append(line)
    for recipe, group in by_recipe.items():
        first = group[0]
        against = f"cell {results.reference}" if results.reference else "its teacher"
        with_tokens = any(line.tokens for line in group)
        head = ["model", f"{first.metric}, mean ± sd", "seeds", f"gap to {against} [95 %, rows]"]
        head += ["[95 %, seeds]", "p by seed", "training, min"]
        head += ["stage-2 tokens"] if with_tokens else []
        with_kl = any("kl_to_teacher" in line.metrics for line in group)
        head += ["KL to its teacher"] if with_kl else []
        with_nll = any("reference_nll" in line.metrics for line in group)
        apart = (first.metric, "agreement_with_teacher", "reference_nll")
        others = [m for m in first.metrics if m not in apart]
        head += others if first.metric.startswith("rouge") else []
        head += [text.metric_name("reference_nll")] if with_nll else []
        found += [f"**{recipe}** ({first.task}, {first.n:,} {first.split} rows)", ""]
        found += ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
        for line in group:
            gap = marked_gap(line, results.reference)
            cells = [line.label, score(line), str(len(line.values)), gap, seeds_words(line.gap)]
            cells += [p_words(line.gap), "" if line.train_minutes is None else f"{line.train_minutes:.1f}"]
            cells += ["" if line.tokens is None else f"{line.tokens / 1e6:.1f}M"] if with_tokens else []
            kl = line.metrics.get("kl_to_teacher")
            cells += ["" if kl is None else f"{kl:.3f}"] if with_kl else []
            cells += (
                [f"{line.metrics[m]:.2f}" if m in line.metrics else "" for m in others]
                if first.metric.startswith("rouge")
                else []
            )
            nll = line.metrics.get("reference_nll")
            cells += ["" if nll is None else f"{nll:.3f}"] if with_nll else []
            found.append("| " + " | ".join(cells) + " |")
        found.append("")
    return found


def marked_gap(line: Line, reference: str) -> str:
    """The gap; one to the teacher where gaps are to a cell, and one over fewer seeds than the row has, say so."""
    marks = []
    if line.gap and reference and line.against == "teacher":
        marks.append("teacher")
    if line.gap and len(line.gap.seeds) < len(line.values):
        marks.append(f"{len(line.gap.seeds)} seed{'s' if len(line.gap.seeds) > 1 else ''}")
    return gap_words(line.gap) + (f" ({', '.join(marks)})" if marks else "")


def print_sweep(results: SweepResults, console: Console) -> None:
    """The lines as a table, and the runs that failed."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    table = Table(title=results.title or results.name, title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
    for heading in ("recipe", "model"):
        table.add_column(heading, overflow="fold")
    gap_heading = f"gap to {f'cell {results.reference}' if results.reference else 'teacher'} [95%]"
    for heading in ("score", "seeds", gap_heading, "min"):
        table.add_column(heading, justify="right")
    for line in lines(results, tests=False):
        minutes = "" if line.train_minutes is None else f"{line.train_minutes:.1f}"
        cells = (
            line.recipe,
            line.label,
            score(line),
            str(len(line.values)),
            marked_gap(line, results.reference),
            minutes,
        )
        table.add_row(*(Text(cell) for cell in cells))
    console.print(table)
    for run in results.runs:
        if run.status == "failed":
            console.print(Text(f"failed: {run.recipe}/{run.cell}/{run.seed}: {run.error}"), soft_wrap=True)


def hardware_of(results: Sequence[SweepResults] | SweepResults) -> list[str]:
    """Devices that the runs were made on, each once."""
    many = [results] if isinstance(results, SweepResults) else results
    rows = [row for one in many for run in one.runs for row in run.rows]
    return list(dict.fromkeys(str(row.hardware.get("gpu") or row.hardware.get("cpu")) for row in rows))


def command_of(results: SweepResults, path: Path) -> str:
    """How the results were made, for the page."""
    return results.command or f"bitdistill sweep recipes/sweeps/{path.stem}.yaml"
