"""`bitdistill compare`: two models on the same test rows, with intervals and tests. No torch."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from bitdistill.cli.options import AsJson, print_json, stdout
from bitdistill.errors import ArtifactError

if TYPE_CHECKING:
    from bitdistill.report.paired import Comparison, Scored

Model = Annotated[
    str,
    typer.Argument(
        metavar="RUN[:ROW]",
        help="A run's folder, its results.json, or a sweep's results (ROW is then CELL or CELL/ROW).",
        show_default=False,
    ),
]


def compare(
    first: Model,
    second: Model,
    seeds: Annotated[
        bool, typer.Option("--seeds", help="Take the runs' other seeds (NAME-seedN) too.")
    ] = False,
    bootstrap_seed: Annotated[int, typer.Option(min=0, help="Seed of the resampling.")] = 0,
    json_: AsJson = False,
) -> None:
    """First minus second on the same rows: gap, paired bootstrap interval, McNemar test.

    Without ROW every row of the same name is compared. A teacher and its student:
    `bitdistill compare runs/x:bitdistill runs/x:teacher`.
    """
    from bitdistill.report.paired import as_json
    from bitdistill.report.paired import compare as paired

    pairs = _pairs(_models(first, seeds), _models(second, seeds), first, second)
    found = [paired(a, b, bootstrap_seed=bootstrap_seed) for a, b in pairs]
    if json_:
        print_json({"comparisons": [as_json(one) for one in found]})
    else:
        for one in found:
            stdout().print(_lines(one), soft_wrap=True, markup=False)


def _models(text: str, seeds: bool) -> tuple[dict[str, Scored], str | None]:
    """Models by name, and the one that is asked for."""
    from bitdistill.cli.artifacts import run_folder
    from bitdistill.report.paired import read_models

    path, row = Path(text), None
    if not path.exists() and ":" in text:
        head, _, row = text.rpartition(":")
        path = Path(head)
    if not path.exists():
        raise ArtifactError(
            f"{text}: no such run; give a run's folder, its results.json, or either with :ROW"
        )
    if path.suffix in (".yaml", ".yml"):
        path = run_folder(path)
    return read_models(path, seeds=seeds), row


def _pairs(
    first: tuple[dict[str, Scored], str | None], second: tuple[dict[str, Scored], str | None], a: str, b: str
) -> list[tuple[Scored, Scored]]:
    first, second = (
        (models, row if row is None or row in models else row.removesuffix("/bitdistill"))
        for models, row in (first, second)
    )
    for (models, row), text in ((first, a), (second, b)):
        if row is not None and row not in models:
            raise ArtifactError(f"{text}: no row {row!r} here; rows: {', '.join(models)}")
    if first[1] or second[1]:
        name = first[1] or second[1] or ""
        for (models, row), text in ((first, a), (second, b)):
            if row is None and name not in models:
                raise ArtifactError(
                    f"{text}: no row {name!r} here; name one of {', '.join(models)} as RUN:ROW"
                )
        return [(first[0][first[1] or name], second[0][second[1] or name])]
    names = [name for name in first[0] if name in second[0]]
    if not names:
        raise ArtifactError(
            f"{a} and {b}: no row of the same name ({', '.join(first[0])} and {', '.join(second[0])}); "
            "name them as RUN:ROW"
        )
    return [(first[0][name], second[0][name]) for name in names]


def _lines(one: Comparison) -> str:
    """Three or four lines for people."""
    from bitdistill.report import text

    many = len(one.seeds) > 1
    lines = [
        f"{one.task}, {one.metric}, {one.n:,} rows, seed{'s' if many else ''} {', '.join(map(str, one.seeds))}",
        f"  {one.first} {one.first_mean:.2f}, {one.second} {one.second_mean:.2f}: {one.points:+.2f} points",
        f"  over rows   95% [{one.low:+.2f}, {one.high:+.2f}] (paired bootstrap"
        + (", mean of the seeds)" if many else ")"),
    ]
    tests = ", ".join(text.exact_p(p, 3) for p in one.p_by_seed)
    lines.append(f"  p {tests} ({one.test}{', by seed' if many else ''})")
    if many and one.seeds_low is not None:
        by_seed = ", ".join(f"{points:+.2f}" for points in one.by_seed)
        p = "" if one.seeds_p is None else f", p {one.seeds_p:.3g}"
        lines.append(
            f"  over seeds  95% [{one.seeds_low:+.2f}, {one.seeds_high:+.2f}] (paired t{p}; by seed {by_seed})"
        )
    return "\n".join(lines)
