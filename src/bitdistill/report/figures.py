"""Figures of the report as inline SVG panels; pages lay them out in a grid."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from bitdistill.report import panel, text
from bitdistill.report.inspect import HISTOGRAM_BINS, HISTOGRAM_LIMIT, LayerStats, by_kind
from bitdistill.report.panel import (
    INK,
    MUTED,
    SERIES,
    STYLES,
    Figure,
    as_svg,
    curve,
    log_axis,
    smooth,
    token_axis,
)
from bitdistill.report.run_folder import StageLog

GAUSSIAN_ZERO_SHARE = 0.3101  # P(|x| <= 0.5 mean|x|) for a Gaussian: erf(0.5 * sqrt(2 / pi) / sqrt(2))
ATTENTION_KINDS = ("q", "k", "v", "o")


def loss_curve(log: StageLog, title: str, objective: str = "loss") -> Figure | None:
    """Training loss of one stage against tokens seen; None when the log has no finite loss."""
    xs, ys = log.series("loss")
    if not xs:
        return None
    with panel.axes() as axes:
        curve(axes, xs, ys, 0)
        spread = sorted(ys)
        if spread[0] > 0 and spread[-1] / spread[0] > 20:
            axes.set_yscale("log")
            log_axis(axes.yaxis)
        axes.set_ylabel(f"{objective} (nats)")
        token_axis(axes, xs)
        tail = smooth(ys)[-1]
        svg = as_svg(axes, f"{title}: loss from {ys[0]:.3g} to {tail:.3g} over {text.si(xs[-1])} tokens")
    steps, first = int(log.records[-1]["step"]), int(log.records[0]["step"])
    if len(ys) == 1:  # a short stage: the value of its end is no start
        note = f"{ys[0]:.3g} nats after {steps:,} steps."
    else:
        start = f" (step {first:,})" if first > 1 else ""
        note = f"{ys[0]:.3g}{start} → {tail:.3g} nats in {steps:,} steps. Pale: logged values; bold: moving average."
    if log.nonfinite:
        note += f" {log.nonfinite} non-finite values are not drawn."
    return Figure(title, note, svg)


def loss_terms(log: StageLog) -> Figure | None:
    """Stage 3: the terms of L = CE + lambda LD + gamma AD and of what the recipe adds, unweighted, on a log axis."""
    named = [("ce", "cross-entropy"), ("ld", "logits"), ("ad", "attention relations")]
    named += [("hidden", "block outputs"), ("prompt", "prompt's tokens")]
    drawn = [(slot, label, *log.series(key)) for slot, (key, label) in enumerate(named)]
    drawn = [item for item in drawn if item[2] and max(item[3]) > 0]
    if not drawn:
        return None
    with panel.axes() as axes:
        for slot, label, xs, ys in drawn:
            positive = [(x, y) for x, y in zip(xs, ys, strict=True) if y > 0]
            curve(axes, [x for x, _ in positive], [y for _, y in positive], slot, label)
        axes.set_yscale("log")
        log_axis(axes.yaxis)
        axes.set_ylabel("term")
        token_axis(axes, drawn[0][2])
        axes.legend(
            loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2 if len(drawn) > 3 else 3, columnspacing=1.2
        )
        svg = as_svg(axes, f"Stage 3: {', '.join(item[1] for item in drawn)} over tokens")
    note = "Before weighting. Nats; block outputs: relative squared error. Log axis."
    return Figure("Stage 3: the losses", note, svg)


def gamma_balance(log: StageLog, target: float | None) -> Figure | None:
    """Ratio of gradient norms gamma*AD : CE on the Q/K/V projections, with its target."""
    xs, ys = log.series("ad_ce_ratio")
    positive = [(x, y) for x, y in zip(xs, ys, strict=True) if y > 0]
    if not positive:
        return None
    xs, ys = [x for x, _ in positive], [y for _, y in positive]
    with panel.axes() as axes:
        curve(axes, xs, ys, 0)
        if target:
            axes.axhline(target, color=INK, linewidth=1, linestyle=(0, (4, 3)))
            axes.annotate("target", (0.02, target), xycoords=("axes fraction", "data"), va="bottom")
        axes.set_yscale("log")
        log_axis(axes.yaxis)
        axes.set_ylabel("‖γ∇AD‖ / ‖∇CE‖")
        token_axis(axes, xs)
        svg = as_svg(axes, "Stage 3: ratio of attention to cross-entropy gradient norms over tokens")
    gamma = log.last("gamma")
    note = f"On the Q, K and V projections. γ at the end: {text.si(gamma)}." if gamma is not None else ""
    return Figure("Stage 3: attention against CE gradient", note, svg)


def density(layers: Sequence[LayerStats]) -> list[float] | None:
    """Share of weights in each inner histogram bin, all layers together; None without latents."""
    latents = [layer.latent for layer in layers if layer.latent is not None]
    if not latents:
        return None
    total = sum(sum(latent.histogram) for latent in latents)
    return [sum(latent.histogram[bin_ + 1] for latent in latents) / total for bin_ in range(HISTOGRAM_BINS)]


def weight_histogram(title: str, models: Mapping[str, Sequence[LayerStats]]) -> Figure | None:
    """W / scale of several models over each other, thresholds at +-0.5 marked (paper, Figure 2)."""
    densities = {name: shares for name, layers in models.items() if (shares := density(layers))}
    if not densities:
        return None
    return density_histogram(title, near_note(near_shares(models)), densities)


def near_shares(models: Mapping[str, Sequence[LayerStats]]) -> dict[str, float]:
    """Model -> share (0..1) of its latent weights within 0.05 of a threshold; packed models have none."""
    shares = {name: by_kind(layers)[-1].near_share for name, layers in models.items() if layers}
    return {name: share for name, share in shares.items() if share is not None}


def near_note(near: Mapping[str, float]) -> str:
    """The same in words."""
    return f"Within 0.05 of a threshold: {', '.join(f'{100 * x:.1f}% {name}' for name, x in near.items())}."


def density_histogram(title: str, note: str, densities: Mapping[str, Sequence[float]]) -> Figure:
    """Shares of weights by bin (from `density`) of several models over each other."""
    width = 2 * HISTOGRAM_LIMIT / HISTOGRAM_BINS
    edges = [index * width - HISTOGRAM_LIMIT for index in range(HISTOGRAM_BINS + 1)]
    with panel.axes() as axes:
        for slot, (name, shares) in enumerate(densities.items()):
            percent = [100 * share for share in shares]
            color = SERIES[slot]
            if slot == 0:  # one filled shape; the others are lines over it
                axes.stairs(percent, edges, fill=True, color=color, alpha=0.18)
            axes.stairs(percent, edges, color=color, linewidth=1.6, linestyle=STYLES[slot], label=name)
        for threshold in (-0.5, 0.5):
            axes.axvline(threshold, color=MUTED, linewidth=1, linestyle=(0, (2, 3)))
        axes.set_xlim(-HISTOGRAM_LIMIT, HISTOGRAM_LIMIT)
        axes.set_ylim(bottom=0)
        axes.set_xlabel("latent weight / scale")
        axes.set_ylabel("% of weights")
        axes.legend(loc="lower center", bbox_to_anchor=(0.46, 1.0), ncols=3, columnspacing=0.9)
        svg = as_svg(axes, f"{title}: histogram of latent weights over their scale: {', '.join(densities)}")
    return Figure(title, note, svg)


def zero_shares(title: str, layers: Sequence[LayerStats]) -> Figure | None:
    """Share of zero codes by block, one line a kind of projection."""
    kinds: dict[str, list[LayerStats]] = {}
    for layer in layers:
        if layer.layer is not None:
            kinds.setdefault(layer.kind, []).append(layer)
    if not kinds:
        return None
    with panel.axes() as axes:
        from matplotlib.ticker import MaxNLocator

        for slot, (kind, group) in enumerate(kinds.items()):
            xs, ys = [layer.layer for layer in group], [100 * layer.zero for layer in group]
            color, style = SERIES[slot % len(SERIES)], STYLES[slot % len(STYLES)]
            axes.plot(
                xs, ys, color=color, linestyle=style, marker="o", markersize=3, linewidth=1.4, label=kind
            )
        axes.axhline(100 * GAUSSIAN_ZERO_SHARE, color=MUTED, linewidth=1, linestyle=(0, (2, 3)))
        axes.set_xlabel("block")
        axes.set_ylabel("zero codes (%)")
        axes.set_ylim(bottom=0)
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=4, columnspacing=1.2)
        svg = as_svg(axes, f"{title}: share of zero codes by block for {', '.join(kinds)}")
    return Figure(title, "Dotted: 31%, where Gaussian weights would be.", svg)


def score_bars(rows: Sequence[tuple[str, float, float, float]], label: str) -> Figure | None:
    """Score and 95% interval of each (name, value, low, high): dots, since the axis does not start at 0."""
    if not rows:
        return None

    def draw(axes: Any) -> None:
        for index, (_, value, low, high) in enumerate(rows):
            color = SERIES[index % len(SERIES)]
            axes.plot([low, high], [index, index], color=color, linewidth=2.4, solid_capstyle="butt")
            axes.plot([value], [index], "o", color=color, markersize=7)
            axes.annotate(f"{value:.1f}", (value, index), (0, 7), textcoords="offset points", ha="center")
        axes.margins(x=0.12)

    note = "Dot: score; bar: 95% interval. The axis does not start at 0."
    return panel.bars(f"{label[:1].upper()}{label[1:]}", note, [row[0] for row in rows], draw)


def size_bars(rows: Sequence[tuple[str, int]]) -> Figure | None:
    """Megabytes on disk of each (name, bytes)."""
    if not rows:
        return None

    def draw(axes: Any) -> None:
        for index, (_, size) in enumerate(rows):
            axes.barh([index], [size / 1e6], height=0.5, color=SERIES[index % len(SERIES)])
            axes.annotate(
                f"{size / 1e6:.3g}", (size / 1e6, index), (5, 0), textcoords="offset points", va="center"
            )
        axes.set_xlim(0, max(size for _, size in rows) / 1e6 * 1.16)

    note = "Weights, embeddings and head together."
    return panel.bars("Size on disk (MB)", note, [row[0] for row in rows], draw)
