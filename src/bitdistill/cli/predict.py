"""`bitdistill predict`: ask a trained model."""

from __future__ import annotations

import itertools
import json
import sys
from collections.abc import Iterator
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeAlias

import typer

from bitdistill.cli.options import set_up_logging, stdin_lines, stdout
from bitdistill.errors import DataError, UsageError

if TYPE_CHECKING:
    from bitdistill.data.readers import Row
    from bitdistill.stages.predict import Answer

CHUNK = 512

Given: TypeAlias = "tuple[str, str | dict[str, Any] | Row]"
"""An input and its place, for errors and answers."""


class DeviceName(StrEnum):
    """Devices, as in a recipe."""

    auto = "auto"
    cpu = "cpu"
    cuda = "cuda"


def predict(
    model: Annotated[
        Path,
        typer.Argument(
            metavar="MODEL", help="A packed student's folder.", file_okay=False, show_default=False
        ),
    ],
    texts: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[TEXT]...", help="Texts to answer; without any, lines of stdin.", show_default=False
        ),
    ] = None,
    field: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=TEXT",
            help="One field of a task with several, for one row. Repeat.",
            show_default=False,
        ),
    ] = None,
    file: Annotated[
        str | None,
        typer.Option(metavar="ROWS", help="A .jsonl, .csv or .parquet of rows.", show_default=False),
    ] = None,
    top: Annotated[int, typer.Option(min=1, help="Labels to show.")] = 3,
    batch_rows: Annotated[int, typer.Option(min=1, help="Rows of one forward pass.")] = 32,
    device: Annotated[
        DeviceName, typer.Option(help="Where it runs; auto: a GPU if there is one.")
    ] = DeviceName.cpu,
    json_: Annotated[bool, typer.Option("--json", help="One JSON object a line.")] = False,
) -> None:
    """Label a text with probabilities, or generate its answer.

    Inputs: texts, --field pairs, --file, or lines of stdin (a line that starts with { is a JSON row).
    """
    set_up_logging(quiet=False)
    if sum(map(bool, (texts, field, file))) > 1:
        raise UsageError("predict: give texts, --field or --file, only one of them")
    inputs = _inputs(texts, field, file)
    if not _interactive():
        inputs = _first_checked(inputs)
    from bitdistill.stages.predict import Predictor

    answer = Predictor(model, device=device.value, batch_rows=batch_rows)
    many = bool(file) or len(texts or []) != 1
    for chunk in _chunks(inputs):
        places, values = [place for place, _ in chunk], [value for _, value in chunk]
        for value, result in zip(values, answer(values, places), strict=True):
            _print(value, result, top, json_, many)


def _interactive() -> bool:
    """Whether stdin is a terminal, so that its lines are answered one by one."""
    return sys.stdin is not None and sys.stdin.isatty()


def _first_checked(inputs: Iterator[Given]) -> Iterator[Given]:
    """The same inputs; the first is read now, so that a wrong option is found before the model loads.

    Raises:
        DataError: there is none.
    """
    for first in inputs:
        return itertools.chain([first], inputs)
    raise DataError("predict: no input; give a text, --field, --file or lines on stdin")


def _inputs(texts: list[str] | None, field: list[str] | None, file: str | None) -> Iterator[Given]:
    if texts:
        for number, text in enumerate(texts, start=1):
            yield f"input {number}", text
    elif field:
        pairs = [pair.partition("=") for pair in field]
        bad = next((name for name, equals, _ in pairs if not equals or not name), None)
        if bad is not None:
            raise UsageError(f"--field {bad}: expected NAME=TEXT")
        yield "input 1", {name: text for name, _, text in pairs}
    elif file:
        from bitdistill.data.readers import iter_rows

        for row in iter_rows(file):
            yield row.where, row
    else:
        for place, line in stdin_lines():
            if line.strip():
                yield place, _line(line.rstrip("\r\n"), place)


def _line(line: str, place: str) -> str | dict[str, Any]:
    if not line.lstrip().startswith("{"):
        return line
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{place}: starts like a JSON row but is none ({str(error)[:60]}); mend it") from None
    assert isinstance(row, dict)
    return row


def _chunks(inputs: Iterator[Given]) -> Iterator[list[Given]]:
    """Lists of at most CHUNK inputs; stdin of a terminal is answered line by line."""
    size = 1 if _interactive() else CHUNK
    chunk: list[Given] = []
    for value in inputs:
        chunk.append(value)
        if len(chunk) == size:
            yield chunk
            chunk = []
    if chunk:
        yield chunk


def _print(given: str | dict[str, Any] | Row, answer: Answer, top: int, json_: bool, many: bool) -> None:
    best = sorted(answer.probabilities.items(), key=lambda pair: -pair[1])[:top]
    if json_:
        record: dict[str, Any] = {"where": answer.where, "answer": answer.text, "label": answer.label}
        if best:
            record["probabilities"] = {label: round(share, 6) for label, share in best}
        typer.echo(json.dumps(record, ensure_ascii=False))
        return
    from rich.text import Text

    console = stdout()
    if many and isinstance(given, str):
        console.print(Text(given, style="dim"), soft_wrap=True)
    if not best:
        console.print(Text(answer.text), soft_wrap=True)
    for label, share in best:
        console.print(Text(f"{share:7.1%}  {label}"), soft_wrap=True)
