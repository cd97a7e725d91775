"""`bitdistill probe-layers`: cheap figures of every layer at the start of stage 3."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from bitdistill.cli.options import (
    AsJson,
    Overrides,
    Quiet,
    RecipePath,
    command_line,
    print_json,
    set_up_logging,
    stdout,
)

if TYPE_CHECKING:
    from bitdistill.report.layer_choice import Correlation


def probe_layers(
    recipe: RecipePath,
    set_: Overrides = None,
    sweep: Annotated[
        Path | None,
        typer.Option(
            metavar="JSON",
            help="Results of a layer sweep: print each figure's rank correlation with its scores.",
            show_default=False,
        ),
    ] = None,
    sweep_recipe: Annotated[
        str | None, typer.Option(metavar="NAME", help="Of a sweep with several recipes.", show_default=False)
    ] = None,
    json_: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Figures by which `distill.relation.layer: auto` can choose a layer, after a few batches.

    Teacher and ternary base are made first where they are missing; finished ones, of other runs in the same
    output folder too, are taken.
    """
    from bitdistill.recipe import load_recipe

    set_up_logging(quiet or json_)
    loaded = load_recipe(recipe, set_ or [])
    scores: dict[int, float] = {}
    if sweep is not None:  # before anything is trained
        from bitdistill.report import layer_choice, sweep_results

        scores = layer_choice.sweep_scores(sweep_results.read(sweep), sweep_recipe)
    from bitdistill import pipeline
    from bitdistill.stages.layer_probe import AUTO_RULE, RULES, choose

    metrics = pipeline.probe_layers(loaded, command=command_line(), quiet=quiet or json_)
    choices = {rule: choose(metrics, rule) for rule in RULES}
    correlations: list[Correlation] = []
    if sweep is not None:
        correlations = layer_choice.correlate(metrics, scores)
    if json_:
        from dataclasses import asdict

        print_json(
            {
                "metrics": metrics,
                "choices": choices,
                "auto": AUTO_RULE,
                "correlations": [asdict(one) for one in correlations],
            }
        )
        return
    _show(metrics, choices, AUTO_RULE, scores, correlations)


def _show(
    metrics: dict[str, list[float]],
    choices: dict[str, int],
    auto: str,
    scores: dict[int, float],
    correlations: list[Correlation],
) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("layer", justify="right")
    for name in metrics:
        table.add_column(name, justify="right")
    if scores:
        table.add_column("sweep", justify="right")
    for layer in range(len(metrics["divergence"])):
        cells = [f"{values[layer]:.4g}" for values in metrics.values()]
        swept = [f"{scores[layer]:.2f}" if layer in scores else ""] if scores else []
        table.add_row(str(layer), *cells, *swept)
    console = stdout()
    console.print(table)
    words: list[Any] = [
        f"auto:{rule} takes layer {layer}" + (" (auto)" if rule == auto else "")
        for rule, layer in choices.items()
    ]
    console.print("\n".join(words), markup=False)
    for one in correlations:
        rho = "none (all equal)" if one.spearman is None else f"Spearman {one.spearman:+.2f}"
        tau = "" if one.kendall is None else f", Kendall {one.kendall:+.2f}"
        console.print(
            f"{one.metric}: {rho}{tau} over {one.n} layers; its largest, layer {one.best_by_metric}, "
            f"is {one.regret_points:.2f} points below the best",
            markup=False,
        )
