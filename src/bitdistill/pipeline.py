"""The whole of BitDistill on one screen: full-precision model and task rows in, packed student and report out."""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Concatenate, ParamSpec, TypeVar

from bitdistill import artifact
from bitdistill.config import Recipe
from bitdistill.errors import RecipeError
from bitdistill.eval.results import ResultRow
from bitdistill.recipe import run_dir
from bitdistill.report.card import write_card
from bitdistill.report.html import write_report
from bitdistill.report.inspect import write_stats
from bitdistill.stages.augment import augment
from bitdistill.stages.common import Run
from bitdistill.stages.distill import distill, probe_only
from bitdistill.stages.evaluate import Entry, evaluate
from bitdistill.stages.export import export, export_formats
from bitdistill.stages.pretrain import pretrain
from bitdistill.stages.refine import check_corpus, refine
from bitdistill.stages.reuse import Reuse
from bitdistill.stages.sft import bitnet_sft, sft

# Each stage and the stages it reads from, in the order they run.
NEEDS: dict[str, tuple[str, ...]] = {
    "sft": (),
    "refine": (),
    "pretrain": ("refine",),
    "augment": (),
    "distill": ("sft", "refine", "pretrain", "augment"),
    "bitnet_sft": (),
    "export": ("distill", "bitnet_sft"),
    "eval": ("sft", "export"),
    "report": ("eval",),
}
STAGES = tuple(NEEDS)
# Rows of the results table, in its order, and the stages that only they need.
ROWS: dict[str, tuple[str, ...]] = {
    "teacher": ("sft",),
    "bitnet_sft": ("bitnet_sft",),
    "bitdistill": ("sft", "refine", "pretrain", "augment", "distill"),
}


@dataclass
class RunResult:
    """What a run left behind; fields of stages that did not run are None or empty."""

    run_dir: Path
    rows: list[ResultRow] = field(default_factory=list)
    base: Path | None = None
    """The ternary base of stage 2: in the cache, or where the recipe says."""
    packed: Path | None = None
    formats: dict[str, Path] = field(default_factory=dict)
    report: Path | None = None


P = ParamSpec("P")
R = TypeVar("R")


def alone(work: Callable[Concatenate[Recipe, P], R]) -> Callable[Concatenate[Recipe, P], R]:
    """`work` on a recipe's run, while no other process is at that run: it is waited for, and a warning says so.

    Two at once would train every stage twice and clear away each other's checkpoints.
    """

    @functools.wraps(work)
    def locked(recipe: Recipe, /, *args: P.args, **options: P.kwargs) -> R:
        with artifact.locked(run_dir(recipe)):
            return work(recipe, *args, **options)

    return locked


@alone
def run(
    recipe: Recipe,
    *,
    until: str | None = None,
    redo: frozenset[str] = frozenset(),
    rows: Collection[str] = tuple(ROWS),
    reuse: Reuse | None = None,
    stats: bool = True,
    command: str = "",
    quiet: bool = False,
) -> RunResult:
    """Run every stage in order, skipping what is finished.

    Args:
        until: last stage to run (one of STAGES); None runs all.
        redo: stages to run again although a finished artifact is there; so are the stages that read from them, by this
            run or, if it is interrupted, by later ones.
        rows: models to make and score (of ROWS); stages that none of them needs are left out.
        reuse: finished work of other runs, taken over where the keys are equal (sweeps).
        stats: measure the weights of every model, for the report.
        command: recorded in results and reports.
        quiet: no progress on stderr.

    Raises:
        BitDistillError: bad recipe, data or model; finished artifacts are kept.
    """
    _check_stages(until, redo)
    wanted = wanted_stages(until, rows)
    # The report is no part of it: it is never kept, but written by every run that comes so far
    marks = {stage: dependent_stages(frozenset({stage})) - {"report"} for stage in redo & wanted}
    this = Run.open(recipe, command=command, redo=marks, quiet=quiet, reuse=reuse)
    result = RunResult(this.run_dir)
    if "pretrain" in wanted:
        check_corpus(this)

    def measure(folder: Path, name: str) -> None:
        if stats:
            write_stats(folder, this.run_dir, name)

    entries: dict[str, Entry] = {}
    if "sft" in wanted:
        teacher = sft(this)
        entries["teacher"] = Entry("teacher", teacher, teacher)
    if "refine" in wanted:
        start, start_key = refine(this), this.keys["refine"]
        measure(start, "refined")
    if "pretrain" in wanted and recipe.pretrain is not None:
        start, start_key = pretrain(this, start), this.keys["pretrain"]
        result.base = start
        measure(start, "base")
    written = augment(this) if "augment" in wanted and recipe.augment is not None else None
    if "distill" in wanted:
        student = distill(this, start, start_key, teacher, written)
        measure(student, "student")
    if "bitnet_sft" in wanted and recipe.bitnet_sft is not None:
        baseline = bitnet_sft(this)
        measure(baseline, "bitnet_sft")
    if "export" in wanted:
        if "bitnet_sft" in rows and recipe.bitnet_sft is not None:
            packed_baseline = export(this, baseline, this.keys["bitnet_sft"], "bitnet_sft_packed")
            entries["bitnet_sft"] = Entry("bitnet_sft", packed_baseline, baseline)
        if "bitdistill" in rows:
            packed = result.packed = export(this, student, this.keys["distill"], "packed")
            result.formats = export_formats(this, packed)
            entries["bitdistill"] = Entry("bitdistill", packed, student)
    if "eval" in wanted:
        this.record()  # also when every stage was kept
        result.rows = evaluate(this, [entries[name] for name in ROWS if name in rows and name in entries])
    if "report" in wanted:
        result.report = write_report(this.run_dir)
        if result.packed is not None:
            write_card(this.run_dir)
    this.redo.end(wanted)
    return result


@alone
def probe_layers(recipe: Recipe, *, command: str = "", quiet: bool = False) -> dict[str, list[float]]:
    """Figures of every layer at the start of stage 3 (see stages/layer_probe.py): figure -> one value a layer.

    Teacher and base are made where they are missing; finished ones of sibling runs are taken.

    Raises:
        BitDistillError: as `run`.
    """
    if recipe.teacher is not None:
        raise RecipeError(
            f"teacher: {recipe.teacher.path}: layers of another model are not the student's; set teacher: null"
        )
    reuse = Reuse.of_runs(Path(recipe.output_dir).expanduser())
    this = Run.open(recipe, command=command, quiet=quiet, reuse=reuse)
    check_corpus(this)
    teacher = sft(this)
    start = refine(this)
    if recipe.pretrain is not None:
        start = pretrain(this, start)
    return probe_only(this, start, teacher)


def wanted_stages(until: str | None, rows: Collection[str]) -> frozenset[str]:
    """Stages of a run that ends with `until` and scores `rows`.

    Raises:
        RecipeError: a row that there is not, or none at all.
    """
    for name in rows:
        if name not in ROWS:
            raise RecipeError(f"row {name!r}: expected some of {', '.join(ROWS)}")
    if not rows:
        raise RecipeError(f"rows: none; name some of {', '.join(ROWS)}")
    wanted = set(STAGES) if until is None else set(needed_stages(until))
    needed = {stage for name in rows for stage in ROWS[name]}
    wanted -= {stage for stages in ROWS.values() for stage in stages} - needed
    if set(rows) == {"teacher"}:
        wanted.discard("export")
    return frozenset(wanted)


def needed_stages(until: str) -> frozenset[str]:
    """A stage and all the stages it reads from."""
    found = {until}
    for name in reversed(STAGES):
        if name in found:
            found |= set(NEEDS[name])
    return frozenset(found)


def dependent_stages(changed: frozenset[str]) -> frozenset[str]:
    """Stages and all the stages that read from them: what must be made again when they are."""
    found = set(changed)
    for name in STAGES:
        if found & set(NEEDS[name]):
            found.add(name)
    return frozenset(found)


def _check_stages(until: str | None, redo: frozenset[str]) -> None:
    for name in [*redo, *([until] if until else [])]:
        if name not in STAGES:
            raise RecipeError(f"stage {name!r}: expected one of {', '.join(STAGES)}")
