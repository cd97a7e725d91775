"""`bitdistill augment`: further rows of a task, without answers."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from bitdistill.cli.options import Overrides, Quiet, RecipePath, command_line, set_up_logging, stderr


def augment(
    recipe: RecipePath,
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Written here, .jsonl or .jsonl.zst, instead of to the run's folder.",
            show_default=False,
        ),
    ] = None,
    rows: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Rows to write with --out; empty and repeated ones are left out. [default: augment.rows]",
            show_default=False,
        ),
    ] = None,
    texts: Annotated[
        list[str] | None,
        typer.Option(
            metavar="SOURCE",
            help="Sentences of these texts stand in for the first of two fields, or are the rows of a task of one "
            "field. May be given again.",
            show_default=False,
        ),
    ] = None,
    texts_share: Annotated[
        float | None,
        typer.Option(min=0.0, max=1.0, help="Share of rows from such sentences.", show_default=False),
    ] = None,
    min_words: Annotated[
        int | None,
        typer.Option(min=0, help="Rows of fewer words are neither written nor imitated.", show_default=False),
    ] = None,
    whole_share: Annotated[
        float | None,
        typer.Option(
            min=0.0,
            max=1.0,
            help="Share of rows that are written whole, not their last field alone.",
            show_default=False,
        ),
    ] = None,
    temperature: Annotated[
        float | None, typer.Option(min=0.01, help="Of sampling.", show_default=False)
    ] = None,
    set_: Overrides = None,
    quiet: Quiet = False,
) -> None:
    """Write further rows of a task, without answers, by a model trained on its rows.

    In stage 3 the teacher answers the rows, and the student learns them beside the training rows. With an `augment`
    section in the recipe `run` does this by itself. A file made with --out is named as data.unlabelled.
    """
    from bitdistill import artifact
    from bitdistill.config import AugmentConfig
    from bitdistill.errors import RecipeError, UsageError
    from bitdistill.planning.check import check_data
    from bitdistill.recipe import load_recipe, parse_recipe

    set_up_logging(quiet)
    if out is not None and not out.name.endswith((".jsonl", ".jsonl.zst")):
        raise UsageError(f"--out {out}: name a .jsonl or .jsonl.zst file")
    loaded = load_recipe(recipe, set_ or [])
    given = {
        "rows": rows, "texts": texts, "texts_share": texts_share, "min_words": min_words,
        "whole_share": whole_share, "temperature": temperature,
    }  # fmt: skip
    if out is None and (loaded.augment is None or any(value is not None for value in given.values())):
        # Rows in the run's folder are those of the recipe: `run` would not take up any others.
        raise RecipeError(
            f"{recipe}: without --out the rows are those of the recipe's augment section; "
            "set them there (--set augment.rows=50000), or name a file with --out"
        )
    section = (loaded.augment or AugmentConfig()).model_dump()
    section.update({key: value for key, value in given.items() if value is not None})
    tree = loaded.model_dump(mode="json", by_alias=True)
    loaded = parse_recipe({**tree, "augment": section}, str(recipe))
    check_data(loaded, scoring=False)
    from bitdistill.stages import augment as stage
    from bitdistill.stages.common import Run

    run = Run.open(loaded, command=command_line(), quiet=quiet)
    if out is None:
        with artifact.locked(run.run_dir):
            folder = stage.augment(run)
        stderr(quiet).print(f"rows in {folder}", markup=False, soft_wrap=True)
        return
    assert loaded.augment is not None
    with artifact.locked(run.run_dir):  # where the writer is trained
        count = stage.write_rows(stage.written_rows(run, loaded.augment), out)
    stderr(quiet).print(
        f"{count} rows in {out}; name it in the recipe: data.unlabelled", markup=False, soft_wrap=True
    )
