"""`bitdistill augment`: further rows of a classification task, without answers."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from bitdistill.cli.options import Overrides, Quiet, RecipePath, command_line, set_up_logging, stderr


def augment(
    recipe: RecipePath,
    out: Annotated[
        Path, typer.Option(metavar="FILE", help="Written here: .jsonl or .jsonl.zst.", show_default=False)
    ],
    rows: Annotated[
        int, typer.Option(min=1, help="Rows to write; empty and repeated ones are left out.")
    ] = 50_000,
    texts: Annotated[
        list[str] | None,
        typer.Option(
            metavar="SOURCE",
            help="Sentences of these texts stand in for the first of two fields. May be given again.",
            show_default=False,
        ),
    ] = None,
    texts_share: Annotated[float, typer.Option(min=0.0, max=1.0, help="Share of rows that begin so.")] = 0.5,
    temperature: Annotated[float, typer.Option(min=0.01, help="Of sampling.")] = 1.0,
    set_: Overrides = None,
    quiet: Quiet = False,
) -> None:
    """Write further rows of a task, without answers, by a model trained on its rows.

    Name the file in the recipe as data.unlabelled: in stage 3 the teacher answers the rows, and the student learns them
    beside the training rows.
    """
    from bitdistill.errors import DataError
    from bitdistill.planning.check import check_data
    from bitdistill.recipe import load_recipe

    set_up_logging(quiet)
    if not out.name.endswith((".jsonl", ".jsonl.zst")):
        raise DataError(f"--out {out}: name a .jsonl or .jsonl.zst file")
    loaded = load_recipe(recipe, set_ or [])
    check_data(loaded, scoring=False)
    from bitdistill.stages import augment as stage
    from bitdistill.stages.common import Run

    run = Run.open(loaded, command=command_line(), quiet=quiet)
    made = stage.augment(run, rows, texts=texts or [], texts_share=texts_share, temperature=temperature)
    count = stage.write_rows(made, out)
    stderr().print(
        f"{count} rows in {out}; name it in the recipe: data.unlabelled", markup=False, soft_wrap=True
    )
