"""Options that several commands share. Nothing heavy is imported here: `--help` stays fast."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Iterator
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from bitdistill.errors import DataError

if TYPE_CHECKING:
    from rich.console import Console


MOST_SEED = 2**63 - 1


class StageName(StrEnum):
    """Stages in the order in which they run; equal to pipeline.STAGES (tested)."""

    sft = "sft"
    refine = "refine"
    pretrain = "pretrain"
    augment = "augment"
    distill = "distill"
    bitnet_sft = "bitnet_sft"
    export = "export"
    eval = "eval"
    report = "report"


RecipePath = Annotated[
    Path, typer.Argument(metavar="RECIPE", help="Recipe, a YAML file.", show_default=False)
]
Overrides = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="Override a recipe key, for example --set distill.gamma=auto. May be given again.",
        show_default=False,
    ),
]
Redo = Annotated[
    list[StageName] | None,
    typer.Option(
        "--redo",
        metavar="STAGE",
        help="Run a stage again, and those that read from it. May be given again.",
        show_default=False,
    ),
]
AsJson = Annotated[
    bool, typer.Option("--json", help="Print JSON on stdout, for machines; logs go to stderr.")
]
Quiet = Annotated[
    bool, typer.Option("--quiet", "-q", help="Only errors on stderr: no progress, log lines or hints.")
]


def stderr(quiet: bool = False) -> Console:
    """Console for people: logs, tables of `plan`, hints. A quiet one prints nothing: errors go another way."""
    from rich.console import Console

    return Console(stderr=True, highlight=False, quiet=quiet)


def stdout() -> Console:
    """Console for results."""
    from rich.console import Console

    return Console(highlight=False)


def print_json(value: Any) -> None:
    """One JSON document on stdout. NaN and Inf are errors, not invalid JSON."""
    typer.echo(json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False))


def stdin_lines() -> Iterator[tuple[str, str]]:
    """(place, line with its end) of each line of stdin; lines are decoded one by one, so a terminal is answered.

    Raises:
        DataError: a line is not UTF-8.
    """
    # The text layer would decode by the locale and in blocks: a bad byte then has no line.
    for number, raw in enumerate([] if sys.stdin is None else sys.stdin.buffer, start=1):
        place = f"stdin:{number}"
        line = raw.removeprefix(b"\xef\xbb\xbf") if number == 1 else raw
        try:
            yield place, line.decode("utf-8")
        except UnicodeDecodeError as error:
            raise DataError(f"{place}: byte {error.start} is not UTF-8; convert it") from None


def check_sources(sources: list[str]) -> None:
    """Files and folders of text that are named must be there; hub names are looked up when they are read.

    Raises:
        DataError: one is not.
    """
    for source in sources:
        if not source.startswith("hub:") and not Path(source).expanduser().exists():
            raise DataError(f"{source}: no such file or folder; check the path (or write hub:owner/name)")


def command_line() -> str:
    """The command as typed, for results and reports."""
    return shlex.join(["bitdistill", *sys.argv[1:]])


def set_up_logging(quiet: bool) -> None:
    """bitdistill's log lines on stderr: INFO and above, or errors only when quiet."""
    import logging

    from rich.logging import RichHandler

    handler = RichHandler(
        console=stderr(), show_path=False, show_level=False, log_time_format="[%X]", markup=False
    )
    logger = logging.getLogger("bitdistill")
    logger.handlers[:] = [handler]
    logger.setLevel(logging.ERROR if quiet else logging.INFO)
    logger.propagate = False
