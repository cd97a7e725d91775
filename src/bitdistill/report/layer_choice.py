"""How well a cheap figure of each layer ranks the layers: rank correlation with a layer sweep. No torch import."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

from bitdistill.errors import DataError
from bitdistill.report.sweep_results import SweepResults

MIN_LAYERS = 4


@dataclass(frozen=True)
class Correlation:
    """Rank correlation of one figure with the sweep's scores, over the swept layers."""

    metric: str
    n: int
    spearman: float | None
    spearman_p: float | None
    kendall: float | None
    """None (all four) where the figure is the same for all layers."""
    kendall_p: float | None
    best_by_metric: int
    """The swept layer with the largest figure, and what it scored below the best swept layer (points)."""
    regret_points: float


def sweep_scores(results: SweepResults, recipe: str | None = None) -> dict[int, float]:
    """Layer -> student's score (percent, mean over seeds), from runs that distilled a single layer by number.

    Args:
        recipe: of a sweep with several; None: the only one.

    Raises:
        DataError: several recipes and none is named.
    """
    names = list(dict.fromkeys(run.recipe for run in results.runs))
    if recipe is None and len(names) > 1:
        raise DataError(f"{results.name}: several recipes ({', '.join(names)}); name one")
    scores: dict[int, list[float]] = {}
    for run in results.runs:
        row = run.row("bitdistill")
        single = isinstance(run.settings.get("distill.relation.layer"), int) and len(run.layers) == 1
        if row is not None and single and run.status == "done" and recipe in (None, run.recipe):
            scores.setdefault(run.layers[0], []).append(row.value)
    return {layer: fmean(values) for layer, values in sorted(scores.items())}


def sweep_metrics(results: SweepResults, recipe: str | None = None) -> dict[str, list[float]]:
    """The fullest set of figures that a run of the sweep recorded at its start; empty without any."""
    recorded = [run.layer_metrics for run in results.runs if recipe in (None, run.recipe)]
    return max(recorded, key=len, default={})


def correlate(metrics: Mapping[str, Sequence[float]], scores: Mapping[int, float]) -> list[Correlation]:
    """Spearman's and Kendall's correlation of every figure with the scores of the swept layers.

    Raises:
        DataError: fewer than MIN_LAYERS layers swept, or a layer that the figures do not have.
    """
    from scipy.stats import kendalltau, spearmanr

    layers = sorted(scores)
    if len(layers) < MIN_LAYERS:
        raise DataError(
            f"layer sweep: {len(layers)} layers with a score; a rank correlation needs {MIN_LAYERS} or more"
        )
    found = []
    for name, values in metrics.items():
        if layers[-1] >= len(values):
            raise DataError(
                f"layer sweep: layer {layers[-1]}, the probe has {len(values)} layers; other models"
            )
        x, y = [values[layer] for layer in layers], [scores[layer] for layer in layers]
        best = max(layers, key=lambda layer, v=values: v[layer])  # type: ignore[misc]
        flat = len(set(x)) == 1 or len(set(y)) == 1
        rho, tau = (None, None) if flat else (spearmanr(x, y), kendalltau(x, y))
        found.append(
            Correlation(
                metric=name,
                n=len(layers),
                spearman=_finite(rho.statistic) if rho is not None else None,
                spearman_p=_finite(rho.pvalue) if rho is not None else None,
                kendall=_finite(tau.statistic) if tau is not None else None,
                kendall_p=_finite(tau.pvalue) if tau is not None else None,
                best_by_metric=best,
                regret_points=max(y) - scores[best],
            )
        )
    return found


def _finite(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None


def markdown(results: SweepResults) -> list[str]:
    """A table of the correlations for the results page; empty where there is too little data."""
    lines: list[str] = []
    for recipe in dict.fromkeys(run.recipe for run in results.runs):
        scores, metrics = sweep_scores(results, recipe), sweep_metrics(results, recipe)
        if len(scores) < MIN_LAYERS or not metrics:
            continue
        lines += [
            f"**{recipe}**: rank correlation of figures taken before stage 3 with the score of each layer",
            "",
        ]
        lines += [
            "| figure | layers | Spearman (p) | Kendall (p) | layer with the largest | points below the best |"
        ]
        lines += ["|" + " --- |" * 6]
        for one in correlate(metrics, scores):
            lines.append(
                f"| {one.metric} | {one.n} | {_words(one.spearman, one.spearman_p)} "
                f"| {_words(one.kendall, one.kendall_p)} | {one.best_by_metric} | {one.regret_points:.2f} |"
            )
        lines.append("")
    return lines


def _words(value: float | None, p: float | None) -> str:
    return "" if value is None else f"{value:+.2f}" + ("" if p is None else f" ({p:.2g})")
