"""`run`, its single stages, and `demo`: all one pipeline, stopped at a stage."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from bitdistill.cli.options import (
    MOST_SEED,
    AsJson,
    Overrides,
    Quiet,
    RecipePath,
    Redo,
    StageName,
    command_line,
    print_json,
    set_up_logging,
    stderr,
    stdout,
)

if TYPE_CHECKING:
    from bitdistill.config import Recipe
    from bitdistill.pipeline import RunResult


def run(
    recipe: RecipePath,
    set_: Overrides = None,
    redo: Redo = None,
    json_: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Run every stage in order: teacher, student, baseline, packed export, scores and report.

    Finished stages are skipped, so a run that was interrupted goes on where it stopped.
    """
    run_until(recipe, set_, redo, json_, quiet, until=None)


def sft(
    recipe: RecipePath, set_: Overrides = None, redo: Redo = None, json_: AsJson = False, quiet: Quiet = False
) -> None:
    """Fine-tune the full-precision teacher on the task."""
    run_until(recipe, set_, redo, json_, quiet, until=StageName.sft)


def refine(
    recipe: RecipePath, set_: Overrides = None, redo: Redo = None, json_: AsJson = False, quiet: Quiet = False
) -> None:
    """Stage 1: make the linears ternary and add SubLN."""
    run_until(recipe, set_, redo, json_, quiet, until=StageName.refine)


class LatentDtype(StrEnum):
    """Storage of a base's copy."""

    float32 = "float32"
    float16 = "float16"
    bfloat16 = "bfloat16"


def pretrain(
    recipe: RecipePath,
    set_: Overrides = None,
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER",
            help="Write a copy of the base here, for another machine: pretrain.base names it there.",
            show_default=False,
        ),
    ] = None,
    dtype: Annotated[
        LatentDtype, typer.Option(help="Of --out: float32 is exact, float16 half as large.")
    ] = LatentDtype.float32,
    redo: Redo = None,
    json_: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Stage 2: continued pre-training on a corpus; gives a ternary base that later tasks reuse."""
    if out is not None:
        _check_copy(recipe, set_, out)
    result = run_until(recipe, set_, redo, json_, quiet, until=StageName.pretrain)
    if out is not None and result.base is not None:
        from bitdistill.stages.export import export_base

        export_base(result.base, out, dtype.value)
        stderr(quiet or json_).print(f"    copy  {out}", markup=False, soft_wrap=True)


def _check_copy(recipe: Path, set_: list[str] | None, out: Path) -> None:
    """What would stop the copy, before anything is trained."""
    from bitdistill import artifact
    from bitdistill.errors import RecipeError
    from bitdistill.recipe import load_recipe

    if load_recipe(recipe, set_ or []).pretrain is None:
        raise RecipeError(f"{recipe}: pretrain is null, so there is no base to copy to --out")
    artifact.check_place(out.absolute(), "base")


def distill(
    recipe: RecipePath, set_: Overrides = None, redo: Redo = None, json_: AsJson = False, quiet: Quiet = False
) -> None:
    """Stage 3: distil the teacher into the ternary student."""
    run_until(recipe, set_, redo, json_, quiet, until=StageName.distill)


class EngineName(StrEnum):
    """What scores."""

    pytorch = "pytorch"
    native = "native"


def evaluate(
    recipe: RecipePath,
    set_: Overrides = None,
    engine: Annotated[
        EngineName | None,
        typer.Option(
            help="Score with PyTorch or with the native CPU engine; default: the recipe's eval.engine.",
            show_default=False,
        ),
    ] = None,
    redo: Redo = None,
    json_: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Score teacher, baseline and packed student and print the results table."""
    extra = [] if engine is None else [f"eval.engine={engine.value}"]
    run_until(recipe, [*(set_ or []), *extra], redo, json_, quiet, until=StageName.eval)


def demo(
    seed: Annotated[int, typer.Option(min=0, max=MOST_SEED, help="Seed of the data order.")] = 0,
    redo_stage2: Annotated[
        Path | None,
        typer.Option(
            metavar="CORPUS",
            help="Train the ternary base anew on this text corpus instead of starting from the shipped one.",
            show_default=False,
        ),
    ] = None,
    output_dir: Annotated[Path, typer.Option(help="The run's folder goes here.")] = Path("runs"),
    redo: Redo = None,
    json_: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """The whole job on an embedded model and Banking77: minutes on two CPU cores, offline."""
    set_up_logging(quiet or json_)
    from bitdistill.stages.demo import demo_recipe

    corpus = None if redo_stage2 is None else str(redo_stage2)
    loaded = demo_recipe(seed=seed, output_dir=str(output_dir), redo_stage2=corpus)
    _go(loaded, redo, json_, quiet, until=None)


def run_until(
    path: Path, set_: list[str] | None, redo: Redo, json_: bool, quiet: bool, *, until: StageName | None
) -> RunResult:
    """Run a recipe up to a stage and print what came out."""
    from bitdistill.planning.check import check_data
    from bitdistill.planning.plan import check_model
    from bitdistill.recipe import load_recipe

    set_up_logging(quiet)
    recipe = load_recipe(path, set_ or [])
    # Before torch is even imported: what would otherwise be found after minutes or hours.
    check_model(recipe)
    check_data(recipe, scoring=until in (None, StageName.eval, StageName.report), whole=True)
    return _go(recipe, redo, json_, quiet, until=until)


def _go(recipe: Recipe, redo: Redo, json_: bool, quiet: bool, *, until: StageName | None) -> RunResult:
    from bitdistill import pipeline

    result = pipeline.run(
        recipe,
        until=until.value if until else None,
        redo=frozenset(stage.value for stage in redo or []),
        command=command_line(),
        quiet=quiet,
    )
    if json_:
        print_json(
            {
                "run_dir": str(result.run_dir),
                "rows": [row.model_dump(mode="json") for row in result.rows],
                "base": None if result.base is None else str(result.base),
                "packed": None if result.packed is None else str(result.packed),
                "formats": {name: str(path) for name, path in result.formats.items()},
                "report": None if result.report is None else str(result.report),
            }
        )
    else:
        _show(recipe, result, quiet)
    return result


def _show(recipe: Recipe, result: RunResult, quiet: bool) -> None:
    """The results table on stdout, paths and next commands on stderr."""
    import shlex

    from rich.markup import escape

    from bitdistill.eval.results import print_table

    if result.rows:
        print_table(result.rows, stdout())
    console = stderr(quiet)
    places = {"run": result.run_dir, "student": result.packed, **result.formats, "report": result.report}
    for name, path in places.items():
        if path is not None:
            console.print(f"{name:>8}  {escape(str(path))}", soft_wrap=True)
    if result.packed is None:
        return
    packed = shlex.quote(str(result.packed))
    console.print("Next:")
    console.print(f"  bitdistill predict {packed} {escape(_example(recipe))}", soft_wrap=True)
    console.print(f"  bitdistill serve {packed}", soft_wrap=True)
    console.print(f"  bitdistill inspect {packed}", soft_wrap=True)


def _example(recipe: Recipe) -> str:
    """Arguments of a `predict` that fits the task."""
    from bitdistill.data.tasks import template_fields

    fields = template_fields(recipe.task)
    if len(fields) == 1:
        return '"YOUR TEXT"'
    return " ".join(f'--field {name}="…"' for name in fields)
