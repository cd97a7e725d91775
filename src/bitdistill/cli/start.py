"""`bitdistill init`: a commented recipe from a model and a data file, for the user to edit."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer

from bitdistill.cli.options import command_line, stderr
from bitdistill.errors import StorageError, UsageError

SIBLINGS = {"test": ("test",), "validation": ("validation", "valid", "dev", "val")}


def init(
    model: Annotated[
        str,
        typer.Argument(metavar="MODEL", help="Hugging Face folder, hub name, or .gguf.", show_default=False),
    ],
    data: Annotated[
        str,
        typer.Argument(
            metavar="DATA", help="Training rows: .jsonl, .csv, .tsv or .parquet.", show_default=False
        ),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="Recipe to write.")] = Path("recipe.yaml"),
    test: Annotated[
        str | None, typer.Option(metavar="ROWS", help="Rows of the results table.", show_default=False)
    ] = None,
    task: Annotated[
        str | None,
        typer.Option(metavar="TASK", help="A built-in task instead of a guess.", show_default=False),
    ] = None,
    text: Annotated[
        list[str] | None,
        typer.Option(
            metavar="FIELD", help="Field of the prompt, instead of a guess. Repeat.", show_default=False
        ),
    ] = None,
    label: Annotated[
        str | None,
        typer.Option(metavar="FIELD", help="Field of the label: a classification.", show_default=False),
    ] = None,
    target: Annotated[
        str | None,
        typer.Option(metavar="FIELD", help="Field of the answer: a generation.", show_default=False),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Overwrite an existing recipe.")] = False,
) -> None:
    """Write a commented recipe: looks at the rows and guesses task, fields, labels. Edit it, then `plan`."""
    from bitdistill.planning.scaffold import Request, write_recipe

    if label and target:
        raise UsageError("init: --label means classification, --target generation; give one of them")
    if output.exists() and not force:
        raise UsageError(f"{output}: exists already; choose another --output, or --force to overwrite it")
    found = {} if test or data.startswith("hub:") else _siblings(Path(data).expanduser())
    request = Request(
        model=model,
        train=data,
        test=test or found.get("test"),
        validation=found.get("validation"),
        task=task,
        text_fields=tuple(text or ()),
        label_field=label,
        target_field=target,
        command=command_line(),
    )
    written, notes = write_recipe(request, output)
    wrong = {"test": "--test FILE", "validation": "take it out of the recipe"}
    taken = [f"took {path} as {key} rows; wrong? {wrong[key]}" for key, path in found.items()]
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(written, "utf-8")
    except OSError as error:
        raise StorageError(f"{output}: {error.strerror}; choose another --output") from error
    from rich.text import Text

    console = stderr()
    for note in [*taken, *notes]:
        console.print(Text(f"- {note}"), soft_wrap=True)
    console.print(Text(f"Wrote {output}. Look through it, then:"), soft_wrap=True)
    shown = shlex.quote(str(output))
    console.print(Text(f"  bitdistill plan {shown}\n  bitdistill run {shown}"), soft_wrap=True)


def _siblings(train: Path) -> dict[str, str]:
    """`test` and `validation` files beside `train…` of the same kind, by their customary names."""
    if "train" not in train.name:
        return {}
    found = {}
    for key, names in SIBLINGS.items():
        for name in names:
            path = train.with_name(train.name.replace("train", name))
            if path.is_file():
                found[key] = str(path)
                break
    return found
