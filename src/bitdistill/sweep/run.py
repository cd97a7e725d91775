"""Run a sweep: one run after the other in one process, finished work of one taken over by the next."""

from __future__ import annotations

import gc
import logging
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from bitdistill import artifact, pipeline
from bitdistill.config import Recipe
from bitdistill.errors import ArtifactError, BitDistillError, Interrupted, StorageError
from bitdistill.planning.check import check_data
from bitdistill.planning.plan import check_model
from bitdistill.report import sweep_results as store
from bitdistill.report.run_folder import read_run
from bitdistill.report.sweep_results import RunResult, SweepResults
from bitdistill.stages.reuse import Reuse
from bitdistill.sweep.spec import Sweep, Unit

log = logging.getLogger("bitdistill")


def run_sweep(
    sweep: Sweep,
    units: Sequence[Unit],
    out: Path,
    *,
    order: Sequence[str],
    command: str = "",
    quiet: bool = False,
    again: bool = False,
    run: Callable[..., pipeline.RunResult] = pipeline.run,
) -> SweepResults:
    """Run `units` in order and collect their results in `out`, which is written after every run.

    Runs that `out` holds as done, made from the same recipe, are left out; those that are not finished go on
    from their checkpoints. A run that fails is recorded with its error, and the next one starts. Every run's data are
    read first: those whose rows would make them fail are recorded as failed before anything is trained.

    Args:
        units: from `spec.expand`.
        out: results file; an existing one of this sweep is continued.
        order: ids of all the sweep's runs, the order in the file.
        again: run (that is: check every stage and read the results anew) what is done, too.
        run: the pipeline (a parameter for tests).

    Raises:
        Interrupted: a signal came; what is done is in `out`.
        StorageError: the file system refused.
        ArtifactError: `out` is there and is no sweep's results, or another sweep's.
    """
    found = open_results(sweep, out, command)
    reuse: dict[Path, Reuse] = {}
    todo = unfinished(found, units, again)
    good, bad = check_units(todo)
    for result in bad:
        found = store.with_run(found, result, order)
        store.write(out, found)
    for unit in good:
        log.info("sweep: %s (%d of %d)", unit.id, units.index(unit) + 1, len(units))
        folder = Path(unit.recipe.output_dir).expanduser()
        known = reuse.setdefault(folder, Reuse.of_runs(folder))
        result = _run_one(sweep, unit, known, command, quiet, run)
        found = store.with_run(found, result, order)
        store.write(out, found)
        _release_memory()
    return found


def warn_of_others(found: SweepResults, every: Sequence[Unit], units: Sequence[Unit], out: Path) -> None:
    """Say which results stay in the file though they are not of the sweep as it now stands, or not of its settings.

    Args:
        every: all the sweep's runs.
        units: those that are to be made now, whose results are replaced.
    """
    made = {unit.id for unit in units}
    now = {unit.id: unit.digest for unit in every}
    gone, other = [], []
    for result in found.runs:
        name = f"{result.recipe}/{result.cell}/{result.seed}"
        if name not in now:
            gone.append(name)
        elif name not in made and result.digest != now[name]:
            other.append(name)
    for names, why in (
        (gone, "are no runs of this sweep any more"),
        (other, "were made with other settings or places of model and data"),
    ):
        if names:
            log.warning(
                "sweep: %s: %s %s; they stay in its table, beside rows that they do not compare with. "
                "Another --out begins a file of its own",
                out, ", ".join(names[:6]) + (" and more" if len(names) > 6 else ""), why,
            )  # fmt: skip


def unfinished(found: SweepResults, units: Sequence[Unit], again: bool) -> list[Unit]:
    """The runs that are to be made: all with `again`, otherwise those that the results do not hold as done."""
    todo = []
    for unit in units:
        before = found.find(unit.recipe_name, unit.cell, unit.seed)
        if before is not None and not again and is_done(before, unit):
            log.info("sweep: %s is done", unit.id)
        else:
            todo.append(unit)
    return todo


def check_units(units: Sequence[Unit]) -> tuple[list[Unit], list[RunResult]]:
    """Runs that can be made as far as their recipe, model's config and data say, and the records of the others.

    Rows that no stage reads before a model is trained are all read here (planning/check.py), so that a bad one is found
    before the sweep's first step and not after its last. Runs with the same data are checked once.
    """
    said: dict[str, str | None] = {}
    good, bad = [], []
    for unit in units:
        tree = unit.recipe.model_dump(mode="json", by_alias=True)
        read = ("task", "data", "eval", "augment", "refine", "pretrain")
        kept = artifact.hash_json({key: tree[key] for key in read})
        if kept not in said:
            said[kept] = _refusal(lambda recipe: check_data(recipe, whole=True), unit)
        message = _refusal(check_model, unit) or said[kept]
        if message is None:
            good.append(unit)
            continue
        log.error("sweep: %s failed: %s", unit.id, message)
        bad.append(failed_result(unit, message))
    return good, bad


def _refusal(check: Callable[[Recipe], object], unit: Unit) -> str | None:
    try:
        check(unit.recipe)
    except BitDistillError as error:
        return str(error)
    return None


def open_results(sweep: Sweep, out: Path, command: str) -> SweepResults:
    """The sweep's results so far; empty ones if there are none.

    Raises:
        ArtifactError: `out` is there and is no sweep's results, or another sweep's.
    """
    head = {key: getattr(sweep, key) for key in ("name", "title", "note", "figure", "x_label", "reference")}
    if out.is_dir():
        raise ArtifactError(
            f"{out}: a folder; --out takes the results file, for example {out / sweep.name}.json"
        )
    if not out.is_file():
        with artifact.storage_errors(out.parent):  # now, and not after the first run
            out.parent.mkdir(parents=True, exist_ok=True)
        return SweepResults(**head, command=command)
    before = store.read(out)
    if before.name != sweep.name:
        raise ArtifactError(f"{out}: results of sweep {before.name}, not {sweep.name}; choose another --out")
    return before.model_copy(update={**head, "command": command})


def is_done(before: RunResult, unit: Unit) -> bool:
    """Whether a result is of the same recipe and holds every row."""
    names = {row.name for row in before.rows}
    return before.status == "done" and before.digest == unit.digest and set(unit.rows) <= names


def _about(unit: Unit) -> dict[str, Any]:
    return {
        "recipe": unit.recipe_name,
        "cell": unit.cell,
        "label": unit.label,
        "line": unit.line,
        "x": unit.x,
        "seed": unit.seed,
        "model": Path(unit.recipe.model.path).name,
        "task": unit.recipe.task.name,
        "split": unit.recipe.eval.split,
        "settings": unit.settings,
        "digest": unit.digest,
    }


def failed_result(unit: Unit, error: str) -> RunResult:
    """The record of a run that left none."""
    return RunResult(**_about(unit), status="failed", error=error)


def _run_one(
    sweep: Sweep,
    unit: Unit,
    reuse: Reuse,
    command: str,
    quiet: bool,
    run: Callable[..., pipeline.RunResult],
) -> RunResult:
    about = _about(unit)
    started = time.monotonic()
    try:
        made = run(
            unit.recipe,
            until="eval",
            rows=unit.rows,
            reuse=reuse,
            stats=sweep.stats,
            command=command,
            quiet=quiet,
        )
    except (Interrupted, StorageError):
        raise
    except BitDistillError as error:
        log.error("sweep: %s failed: %s", unit.id, error)
        return RunResult(**about, status="failed", error=str(error), wall_s=_since(started))
    except RuntimeError as error:
        # Of the errors that are no BitDistillError only memory is the run's own matter; the rest are bugs.
        if type(error).__name__ != "OutOfMemoryError":
            raise
        log.error("sweep: %s failed: out of memory", unit.id)
        advice = "set loop.micro_batch_rows or loop.micro_batch_tokens smaller"
        message = f"out of memory ({str(error).splitlines()[0]}); {advice}"
        return RunResult(**about, status="failed", error=message, wall_s=_since(started))
    reuse.add(made.run_dir)
    folder = read_run(made.run_dir)
    layers, metrics = store.layer_metrics(made.run_dir / "student")
    curves: dict[str, dict[str, list[float]]] = {}
    for stage in sweep.curves:
        values = store.curve(folder, stage)
        if values is not None:
            curves[stage] = values
    return RunResult(
        **about,
        status="done",
        rows=made.rows,
        costs=store.costs(folder),
        wall_s=_since(started),
        layers=layers,
        layer_metrics=metrics,
        densities=store.densities(folder) if sweep.stats else {},
        near=store.near(folder) if sweep.stats else {},
        curves=curves,
    )


def _since(started: float) -> float:
    return round(time.monotonic() - started, 1)


def _release_memory() -> None:
    """Models of one run must not weigh on the next, nor its compiled graphs count against the limit of them."""
    gc.collect()
    import torch

    if torch.cuda.is_available():
        torch.compiler.reset()
        torch.cuda.empty_cache()


def describe(units: Sequence[Unit]) -> list[dict[str, Any]]:
    """What `--dry-run` prints: each run, its settings, and which stages it will find done.

    Stage keys need the data and the corpus, so only finished runs of the very same recipe are seen here.
    """
    from bitdistill.recipe import run_dir

    found: list[dict[str, Any]] = []
    for unit in units:
        folder = run_dir(unit.recipe)
        there = [name for name in ("teacher", "student", "packed") if artifact.exists(folder / name)]
        found.append(
            {
                "id": unit.id,
                "rows": list(unit.rows),
                "set": unit.settings,
                "run_dir": str(folder),
                "finished": there,
            }
        )
    return found
