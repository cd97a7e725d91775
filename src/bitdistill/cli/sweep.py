"""`bitdistill sweep`: a grid of runs, one after the other, into one results file."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from bitdistill.cli.options import (
    AsJson,
    Overrides,
    Quiet,
    command_line,
    print_json,
    set_up_logging,
    stderr,
    stdout,
)
from bitdistill.errors import ArtifactError, BitDistillError

if TYPE_CHECKING:
    from bitdistill.report.sweep_results import RunResult
    from bitdistill.sweep.spec import Unit


def sweep(
    spec: Annotated[Path, typer.Argument(metavar="SWEEP", help="Sweep, a YAML file.", show_default=False)],
    only: Annotated[
        list[str] | None,
        typer.Option(
            metavar="PATTERN",
            help="Only these runs: recipe, cell, recipe/cell or recipe/cell/seed, with * and ?. Repeat.",
            show_default=False,
        ),
    ] = None,
    row: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            help="Only these models of each run: teacher, bitnet_sft, bitdistill. Repeat.",
            show_default=False,
        ),
    ] = None,
    set_: Overrides = None,
    local: Annotated[
        Path | None,
        typer.Option(
            metavar="YAML",
            help="Local places of models and data, by the names in the recipes.",
            show_default=False,
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(metavar="JSON", help="Results file.", show_default="results/sweeps/NAME.json"),
    ] = None,
    parallel: Annotated[
        int | None,
        typer.Option(
            min=1,
            metavar="N",
            help="Processes at a time on each GPU (without one: in all), instead of one run after the other.",
            show_default=False,
        ),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check everything and list the runs.")] = False,
    again: Annotated[
        bool, typer.Option("--again", help="Go through finished runs again (their stages are still kept).")
    ] = False,
    json_: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Run every cell of a sweep for every seed; teachers, bases and scores are made once and shared.

    Resumable: the same command goes on where it stopped.
    """
    from bitdistill.sweep.spec import expand, load_sweep, only_rows, read_local

    set_up_logging(quiet)
    loaded = load_sweep(spec)
    options: dict[str, Any] = {"overrides": set_ or [], "local": read_local(local) if local else None}
    every = expand(loaded, spec.resolve().parent, **options)
    units = expand(loaded, spec.resolve().parent, only=only, **options) if only else every
    units = only_rows(units, row) if row else units
    target = out or Path("results/sweeps") / f"{loaded.name}.json"
    if dry_run:
        from bitdistill.planning.check import check_data
        from bitdistill.planning.plan import check_model

        for unit in units:
            try:
                check_model(unit.recipe)
                check_data(unit.recipe, scoring=True)
            except BitDistillError as error:
                raise type(error)(f"{unit.id}: {error}") from None
        _show_units(units, target, json_, quiet)
        return
    from bitdistill.sweep.run import open_results, warn_of_others

    warn_of_others(open_results(loaded, target, ""), every, units, target)
    common: dict[str, Any] = {
        "order": [unit.id for unit in every], "command": command_line(), "again": again
    }  # fmt: skip
    if parallel is None:
        from bitdistill.sweep.run import run_sweep

        found = run_sweep(loaded, units, target, quiet=quiet, **common)
    else:
        from bitdistill.sweep.parallel import Place, run_parallel
        from bitdistill.train.replicas import visible_gpus

        place = Place(visible_gpus() if any(u.recipe.device != "cpu" for u in units) else (), parallel)
        found = run_parallel(
            loaded, units, target, spec=spec, overrides=set_ or [], local=local, place=place, **common
        )
    mine = {(unit.recipe_name, unit.cell, unit.seed) for unit in units}
    failed = [r for r in found.runs if (r.recipe, r.cell, r.seed) in mine and r.status == "failed"]
    if json_:
        print_json({"results": str(target), "runs": len(found.runs), "failed": [_id(r) for r in failed]})
    else:
        from bitdistill.report.sweep_tables import print_sweep

        print_sweep(found, stdout())
        minutes = f"{found.train_s / 60:.1f} minutes of training"
        stderr(quiet).print(f"{target}: {len(found.runs)} runs, {minutes}", markup=False, soft_wrap=True)
    if failed:
        raise ArtifactError(
            f"{len(failed)} of {len(units)} runs failed, first {_id(failed[0])}: {failed[0].error}"
        )


def _id(run: RunResult) -> str:
    return f"{run.recipe}/{run.cell}/{run.seed}"


def _show_units(units: list[Unit], target: Path, json_: bool, quiet: bool) -> None:
    from bitdistill.sweep.run import describe

    listed = describe(units)
    if json_:
        print_json({"results": str(target), "runs": listed})
        return
    for entry in listed:
        settings = ", ".join(f"{key}={value}" for key, value in entry["set"].items())
        done = f"  [{', '.join(entry['finished'])} there]" if entry["finished"] else ""
        stdout().print(f"{entry['id']}  {settings}{done}", soft_wrap=True, markup=False)
    stderr(quiet).print(f"{len(listed)} runs into {target}", markup=False, soft_wrap=True)
