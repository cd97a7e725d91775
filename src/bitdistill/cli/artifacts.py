"""Commands on things that are there: results, report, inspect, tokenize, tasks, version."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from bitdistill.cli.options import AsJson, check_sources, print_json, set_up_logging, stderr, stdout
from bitdistill.errors import ArtifactError, UsageError

RunPath = Annotated[
    Path, typer.Argument(metavar="RUN", help="A run's folder, or the recipe of the run.", show_default=False)
]


def run_folder(path: Path) -> Path:
    """The run folder that `path` names: itself, or the folder of a recipe's run.

    Raises:
        ArtifactError: there is no such folder, or that run was not started yet.
        RecipeError: `path` is a recipe that is not valid.
    """
    if path.is_dir():
        return path
    if not path.exists() and path.suffix not in (".yaml", ".yml"):
        raise ArtifactError(f"{path}: no such folder; give a run's folder or its recipe")
    if path.suffix == ".json":
        raise ArtifactError(
            f"{path}: a file of results; give the run's folder or its recipe (a sweep's table: the same "
            "`bitdistill sweep` again, which makes nothing anew; two of its rows: `bitdistill compare`)"
        )
    from bitdistill.recipe import load_recipe, run_dir

    folder = run_dir(load_recipe(path))
    if not folder.is_dir():
        raise ArtifactError(f"{folder}: no run there yet; `bitdistill run {path}` makes it")
    return folder


def results(run: RunPath, json_: AsJson = False) -> None:
    """Print the results table of a run."""
    from bitdistill.eval.results import print_table, read_results

    rows = read_results(run_folder(run) / "results.json")
    if json_:
        print_json({"rows": [row.model_dump(mode="json") for row in rows]})
    else:
        print_table(rows, stdout())


def report(run: RunPath) -> None:
    """Write a run's HTML report again, from whatever has finished; prints its path."""
    from bitdistill.report.html import write_report

    typer.echo(write_report(run_folder(run)))


def inspect(
    model: Annotated[
        Path,
        typer.Argument(
            metavar="MODEL",
            help="A ternary model's folder, latent or packed.",
            file_okay=False,
            show_default=False,
        ),
    ],
    json_: AsJson = False,
) -> None:
    """Per layer: shares of -1, 0 and +1, scale, and how far the latents are from the thresholds."""
    from bitdistill.report.inspect import as_json, inspect_model, stats_table

    stats = inspect_model(model)
    if json_:
        print_json(as_json(stats))
    else:
        stdout().print(stats_table(stats, title=str(model)))


def tokenize(
    sources: Annotated[
        list[str],
        typer.Argument(metavar="SOURCE...", help="Text, jsonl, parquet files, folders, or hub:owner/name."),
    ],
    tokenizer: Annotated[
        str, typer.Option(help="Model or tokenizer folder, or hub name.", show_default=False)
    ],
    out: Annotated[Path, typer.Option(help="Folder to write the token shards to.", show_default=False)],
    workers: Annotated[int, typer.Option(min=0, help="Processes; 0 takes one a core.")] = 0,
    limit_tokens: Annotated[
        int | None, typer.Option(min=1, help="Stop after this many.", show_default=False)
    ] = None,
    include: Annotated[
        list[str] | None,
        typer.Option(
            metavar="FIELD=VALUE", help="Keep only such documents. May be given again.", show_default=False
        ),
    ] = None,
    exclude: Annotated[
        list[str] | None,
        typer.Option(
            metavar="FIELD=VALUE", help="Leave such documents out. May be given again.", show_default=False
        ),
    ] = None,
    json_: AsJson = False,
) -> None:
    """Write a corpus as memory-mapped token shards for stage 2, in parallel."""
    set_up_logging(quiet=json_)
    kept, dropped = _conditions(include, "--include"), _conditions(exclude, "--exclude")
    check_sources(sources)
    from bitdistill.data.corpus import TokenShards, tokenize_corpus

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    folder = tokenize_corpus(
        sources,
        tokenizer,
        out,
        workers=workers or cores,
        limit_tokens=limit_tokens,
        include=kept,
        exclude=dropped,
    )
    shards = TokenShards(folder)
    if json_:
        print_json({"folder": str(folder), "tokens": shards.n_tokens, "fingerprint": shards.fingerprint})
    else:
        stderr().print(f"{shards.n_tokens:,} tokens in {folder}", soft_wrap=True)


def _conditions(pairs: list[str] | None, option: str) -> dict[str, set[str]] | None:
    found: dict[str, set[str]] = {}
    for pair in pairs or []:
        field, equals, value = pair.partition("=")
        if not equals or not field:
            raise UsageError(f"{option} {pair}: expected FIELD=VALUE, for example {option} source=books")
        found.setdefault(field, set()).add(value)
    return found or None


def needle(
    out: Annotated[Path, typer.Option(help="File to write (JSON lines).", show_default=False)],
    rows: Annotated[int, typer.Option(min=1, help="Rows.")] = 1000,
    words: Annotated[int, typer.Option(min=1, help="Words of a context; 1 word is about 1.4 tokens.")] = 600,
    keys: Annotated[int, typer.Option(min=1, help="Pass codes in a context, one of which is asked for.")] = 4,
    seed: Annotated[int, typer.Option(min=0, help="Use another one for test rows.")] = 0,
) -> None:
    """Make rows of the built-in task `needle`: retrieval of a pass code from a long context."""
    from bitdistill.data.needle import write

    typer.echo(write(out, rows, words=words, keys=keys, seed=seed))


def tasks(
    name: Annotated[
        str | None, typer.Argument(metavar="[TASK]", help="Print this task in full.", show_default=False)
    ] = None,
    json_: AsJson = False,
) -> None:
    """List the built-in tasks."""
    from bitdistill.recipe import builtin_task, builtin_tasks

    found = {name: builtin_task(name)} if name else builtin_tasks()
    if json_:
        print_json({key: task.model_dump(mode="json") for key, task in found.items()})
        return
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    console = stdout()
    if name:
        for key, value in found[name].model_dump(mode="json", exclude_none=True).items():
            console.print(Text(f"{key}: {value!r}"), soft_wrap=True)
        return
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    for heading in ("task", "kind", "fields", "labels", "licence"):
        table.add_column(heading, overflow="fold")
    from bitdistill.data.tasks import template_fields

    for key, task in found.items():
        answer = task.label_field if task.kind == "classification" else task.target_field
        fields = f"{', '.join(template_fields(task))} -> {answer}"
        table.add_row(
            *(Text(cell) for cell in (key, task.kind, fields, _labels(task.labels), task.licence or "-"))
        )
    console.print(table)


def _labels(labels: dict[str, str]) -> str:
    words = [word.strip() for word in labels.values()]
    return ", ".join(words) if len(words) <= 4 else f"{len(words)} words"


def installed_version() -> str:
    """Version of the installed package, or `0+source` from a bare source tree."""
    import importlib.metadata

    try:
        return importlib.metadata.version("bitdistill")
    except importlib.metadata.PackageNotFoundError:
        return "0+source"


def version(json_: AsJson = False) -> None:
    """Print the versions of bitdistill and of the packages that decide numbers."""
    from bitdistill.eval.results import versions

    found = {"bitdistill": installed_version(), **versions()}
    if json_:
        print_json(found)
    else:
        for name, number in found.items():
            typer.echo(f"{name} {number}")
