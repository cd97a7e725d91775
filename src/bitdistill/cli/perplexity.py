"""`bitdistill perplexity`: how a model reads held-out text, and how far it is from full precision there."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from bitdistill.cli.options import (
    AsJson,
    Quiet,
    check_sources,
    command_line,
    print_json,
    set_up_logging,
    stdout,
)
from bitdistill.cli.predict import DeviceName

if TYPE_CHECKING:
    from bitdistill.eval.metrics import Score
    from bitdistill.eval.text_results import TextResult


def perplexity(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help="A ternary base's or student's folder, or a full-precision model.",
            show_default=False,
        ),
    ],
    sources: Annotated[
        list[str],
        typer.Argument(
            metavar="TEXT...",
            help="Text, jsonl, parquet files, folders, hub:owner/name, or a folder of token shards.",
            show_default=False,
        ),
    ],
    reference: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL", help="Full-precision model to compare with token by token.", show_default=False
        ),
    ] = None,
    tokens: Annotated[int, typer.Option(min=0, help="Tokens to read, the first ones; 0: all.")] = 100_000,
    sequence_length: Annotated[
        int | None,
        typer.Option(
            min=2, help="Tokens of a window; 1024, or as many as the models read.", show_default=False
        ),
    ] = None,
    batch_rows: Annotated[int, typer.Option(min=1, help="Windows of one forward pass.")] = 4,
    device: Annotated[
        DeviceName, typer.Option(help="Where it runs; auto: a GPU if there is one.")
    ] = DeviceName.auto,
    json_: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Perplexity on held-out text; with --reference also the KL to that model and how often the next token is the same.

    The text should be none that the model was trained on.
    """
    set_up_logging(quiet or json_)
    check_sources(sources)
    from bitdistill.stages.perplexity import perplexity as measure
    from bitdistill.train.tracking import WorkProgress

    with WorkProgress("perplexity", "tok", quiet=quiet or json_) as progress:
        scores = measure(
            model,
            sources,
            reference=reference,
            limit_tokens=tokens or None,
            sequence_length=sequence_length,
            batch_rows=batch_rows,
            device=device.value,
            command=command_line(),
            progress=progress,
        )
    if json_:
        print_json(scores.model_dump(mode="json"))
    else:
        _show(model, scores)


def _show(model: str, scores: TextResult) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    title = f"{model}: {scores.perplexity.n:,} tokens predicted, windows of {scores.sequence_length:,}"
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
    for name in ("", "value", "95 %"):
        table.add_column(name, justify="left" if not name else "right")
    lines: list[tuple[str, Score | None, str]] = [
        ("perplexity", scores.perplexity, ".3f"),
        ("of the reference", scores.reference_perplexity, ".3f"),
        ("KL, nats a token", scores.kl, ".4f"),
        ("same next token, %", scores.same_token, ".2f"),
    ]
    for name, score, form in lines:
        if score is not None:
            cells: list[Any] = [format(value, form) for value in (score.value, score.low, score.high)]
            table.add_row(name, cells[0], f"[{cells[1]}, {cells[2]}]")
    stdout().print(table, soft_wrap=True, markup=False)
