"""`export` and `import`: students to other tools' formats, and back."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from bitdistill.cli.options import (
    AsJson,
    Overrides,
    Quiet,
    Redo,
    StageName,
    print_json,
    set_up_logging,
    stderr,
)
from bitdistill.errors import ArtifactError, UsageError


def export(
    source: Annotated[
        Path,
        typer.Argument(
            metavar="RECIPE|PACKED", help="Recipe, or a packed student's folder.", show_default=False
        ),
    ],
    set_: Overrides = None,
    format_: Annotated[
        list[str] | None,
        typer.Option(
            "--format",
            help="A further format beside the packed student: hf, gguf or ollama. Repeat.",
            show_default=False,
        ),
    ] = None,
    gguf_weights: Annotated[
        str | None,
        typer.Option(help="Ternary type of gguf and ollama: tq2_0, tq1_0 or i2_s.", show_default=False),
    ] = None,
    gguf_table: Annotated[
        str | None,
        typer.Option(help="Type of embedding and head: f16, q8_0, q6_k or q4_k.", show_default=False),
    ] = None,
    push: Annotated[
        str | None,
        typer.Option(
            metavar="OWNER/NAME",
            help="Upload the student (or its one further format) with a model card.",
            show_default=False,
        ),
    ] = None,
    private: Annotated[bool, typer.Option(help="With --push: make the repository private.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="With --push: list files and sizes, upload nothing.")
    ] = False,
    redo: Redo = None,
    json_: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Write the packed student (2-bit codes, scales, tokenizer), and further formats beside it."""
    _check_choices(format_ or [], gguf_weights, gguf_table)
    if push is None and (dry_run or private):
        raise UsageError("--dry-run and --private go with --push OWNER/NAME")
    if push is not None and len(format_ or []) > 1:
        raise UsageError("--push uploads one folder; give one --format, or none for the packed student")
    if push is not None:
        from bitdistill.interop.hub import check_repo

        check_repo(push)  # before anything is trained
    overrides = [f"export.formats=[{', '.join(['packed', *format_])}]"] if format_ else []
    overrides += [] if gguf_weights is None else [f"export.gguf.weights={gguf_weights}"]
    overrides += [] if gguf_table is None else [f"export.gguf.table={gguf_table}"]
    if source.is_dir():
        packed, made = _from_folder(source, [*(set_ or []), *overrides], quiet or json_)
        if json_ and push is None:
            formats = {n: str(p) for n, p in made.items()}
            print_json({"packed": str(packed), "formats": formats, "readers": _readers(packed)})
    elif not source.exists() and source.suffix not in (".yaml", ".yml"):
        raise ArtifactError(f"{source}: no such folder; give a packed student's folder or a recipe")
    else:
        from bitdistill.cli.runs import run_until

        result = run_until(
            source, [*(set_ or []), *overrides], redo, json_ and push is None, quiet, until=StageName.export
        )
        assert result.packed is not None  # the pipeline ran up to export
        packed, made = result.packed, result.formats
    if not (quiet or json_):
        for reader in _readers(packed):
            why = f"no: {reader['why_not']}" if reader["why_not"] else "yes"
            stderr().print(
                f"{reader['tool']} (format {reader['format']}): {why}", soft_wrap=True, markup=False
            )
    if push is not None:
        _push(packed if not format_ else made.get(format_[0], packed), packed, push, private, dry_run, json_)


def _check_choices(formats: list[str], weights: str | None, table: str | None) -> None:
    """Refuse what the recipe's keys would refuse by the option's own name."""
    from typing import get_args

    from bitdistill.config import ExportFormat, GgufTable, GgufWeights

    for option, given, known in (
        ("--format", formats, ExportFormat),
        ("--gguf-weights", [weights], GgufWeights),
        ("--gguf-table", [table], GgufTable),
    ):
        for value in given:
            if value is not None and value not in get_args(known):
                raise UsageError(f"{option} {value}: expected {', '.join(get_args(known))}")


def _from_folder(packed: Path, overrides: list[str], quiet: bool) -> tuple[Path, dict[str, Path]]:
    """Further formats of a packed student that is there, beside it."""
    set_up_logging(quiet)
    from bitdistill.recipe import export_options
    from bitdistill.stages.export import write_formats

    options = export_options(overrides)
    made = write_formats(packed, packed.resolve().parent, options)
    for name, path in made.items():
        if not quiet:
            stderr().print(f"{name:>8}  {path}", soft_wrap=True, markup=False)
    return packed, made


def _readers(packed: Path) -> list[dict[str, Any]]:
    """Which tools can read the student, and why the others cannot."""
    from bitdistill.interop.readers import readers

    return [vars(reader) for reader in readers(packed)]


def _push(folder: Path, packed: Path, repo: str, private: bool, dry_run: bool, json_: bool) -> None:
    from bitdistill.interop.hub import plan_push, push

    plan = plan_push(folder, packed, repo)
    url = None if dry_run else push(plan, private=private)
    if json_:
        files: list[dict[str, Any]] = [{"name": f.name, "bytes": f.size} for f in plan.files]
        print_json({"repo": repo, "files": files, "bytes": plan.size, "url": url})
        return
    for file in plan.files:
        typer.echo(f"{file.size:>14,}  {file.name}")
    typer.echo(
        f"{plan.size:>14,}  total for {repo}" + (" (dry run: nothing was uploaded)" if dry_run else "")
    )
    if url is not None:
        typer.echo(url)


def import_(
    source: Annotated[
        Path,
        typer.Argument(
            metavar="SOURCE",
            help="A GGUF file with TQ1_0, TQ2_0 or I2_S tensors, or a transformers folder with quant_method bitnet.",
            show_default=False,
        ),
    ],
    out: Annotated[
        Path,
        typer.Argument(
            metavar="OUT",
            help="The packed folder to write; an earlier import there is replaced.",
            show_default=False,
        ),
    ],
    json_: AsJson = False,
) -> None:
    """Turn a ternary model of another tool into a packed student, its codes and scales unchanged."""
    from bitdistill.interop.foreign import import_student

    set_up_logging(quiet=json_)
    folder = import_student(source, out)
    if json_:
        print_json({"folder": str(folder)})
    else:
        stderr().print(f"packed student in {folder}", soft_wrap=True, markup=False)
