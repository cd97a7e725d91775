"""The whole of BitDistill on one screen: full-precision model and task rows in, packed student and report out."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from bitdistill.config import Recipe
from bitdistill.errors import RecipeError
from bitdistill.eval.results import ResultRow
from bitdistill.report.card import write_card
from bitdistill.report.html import write_report
from bitdistill.report.inspect import write_stats
from bitdistill.stages.common import Run
from bitdistill.stages.distill import distill
from bitdistill.stages.evaluate import Entry, evaluate
from bitdistill.stages.export import export, export_formats
from bitdistill.stages.pretrain import pretrain
from bitdistill.stages.refine import refine
from bitdistill.stages.sft import bitnet_sft, sft

# Each stage and the stages it reads from, in the order they run.
NEEDS: dict[str, tuple[str, ...]] = {
    "sft": (),
    "refine": (),
    "pretrain": ("refine",),
    "distill": ("sft", "refine", "pretrain"),
    "bitnet_sft": (),
    "export": ("distill", "bitnet_sft"),
    "eval": ("sft", "export"),
    "report": ("eval",),
}
STAGES = tuple(NEEDS)


@dataclass
class RunResult:
    """What a run left behind; fields of stages that did not run are None or empty."""

    run_dir: Path
    rows: list[ResultRow] = field(default_factory=list)
    packed: Path | None = None
    formats: dict[str, Path] = field(default_factory=dict)
    report: Path | None = None


def run(
    recipe: Recipe,
    *,
    until: str | None = None,
    redo: frozenset[str] = frozenset(),
    command: str = "",
    quiet: bool = False,
) -> RunResult:
    """Run every stage in order, skipping what is finished.

    Args:
        until: last stage to run (one of STAGES); None runs all.
        redo: stages to run again although a finished artifact is there; so are the stages that read from them.
        command: recorded in results and reports.
        quiet: no progress on stderr.

    Raises:
        BitDistillError: bad recipe, data or model; finished artifacts are kept.
    """
    _check_stages(until, redo)
    wanted = STAGES if until is None else needed_stages(until)
    this = Run.open(recipe, command=command, redo=dependent_stages(redo), quiet=quiet)
    result = RunResult(this.run_dir)

    if "sft" in wanted:
        teacher = sft(this)
    if "refine" in wanted:
        start, start_key = refine(this), this.keys["refine"]
        write_stats(start, this.run_dir, "refined")
    if "pretrain" in wanted and recipe.pretrain is not None:
        start, start_key = pretrain(this, start), this.keys["pretrain"]
        write_stats(start, this.run_dir, "base")
    if "distill" in wanted:
        student = distill(this, start, start_key, teacher)
        write_stats(student, this.run_dir, "student")
    if "bitnet_sft" in wanted and recipe.bitnet_sft is not None:
        baseline = bitnet_sft(this)
        write_stats(baseline, this.run_dir, "bitnet_sft")
    if "export" in wanted:
        packed = result.packed = export(this, student, this.keys["distill"], "packed")
        result.formats = export_formats(this, packed)
        if recipe.bitnet_sft is not None:
            packed_baseline = export(this, baseline, this.keys["bitnet_sft"], "bitnet_sft_packed")
    if "eval" in wanted:
        entries = [Entry("teacher", teacher, teacher)]
        if recipe.bitnet_sft is not None:
            entries.append(Entry("bitnet_sft", packed_baseline, baseline))
        entries.append(Entry("bitdistill", packed, student))
        result.rows = evaluate(this, entries)
    if "report" in wanted:
        result.report = write_report(this.run_dir)
        write_card(this.run_dir)
    return result


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
