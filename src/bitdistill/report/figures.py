"""Figures of the report as inline SVG.

Each figure is one small panel drawn at about its final size, so that text stays readable on a phone; pages
lay panels out in a grid. Colours are CSS variables (`--ink`, `--muted`, `--line`, `--s0` ...), so one file
serves light and dark mode. Text stays text. Nothing in an SVG points outside of it.
"""

from __future__ import annotations

import html
import io
import re
from collections.abc import Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count
from typing import Any

from bitdistill.report import text
from bitdistill.report.inspect import HISTOGRAM_BINS, HISTOGRAM_LIMIT, LayerStats
from bitdistill.report.run_folder import StageLog

WIDTH, HEIGHT = 360, 224  # CSS pixels of a panel; also the unit of every font and line size below
MAX_POINTS = 240
GAUSSIAN_ZERO_SHARE = 0.3101  # P(|x| <= 0.5 mean|x|) for a Gaussian: erf(0.5 * sqrt(2 / pi) / sqrt(2))
ATTENTION_KINDS = ("q", "k", "v", "o")

# Matplotlib wants colours, the page wants variables: each has a sentinel colour, replaced in the SVG.
_VARIABLES = {"ink": "#010101", "muted": "#020202", "line": "#030303"}
_SERIES = [f"#05050{index}" for index in range(6)]
_TO_CSS = {value: f"var(--{name})" for name, value in _VARIABLES.items()}
_TO_CSS |= {value: f"var(--s{index})" for index, value in enumerate(_SERIES)}
INK, MUTED, LINE = _VARIABLES["ink"], _VARIABLES["muted"], _VARIABLES["line"]
_STYLES = ("-", "--", "-.", ":")

_RC: dict[str, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "bitdistill",
    "text.parse_math": False,  # labels come from data: "$" is a character, not TeX
    "font.family": "sans-serif",
    "font.size": 12,
    "axes.titlesize": 12,
    "axes.labelsize": 11.5,
    "xtick.labelsize": 11.5,
    "ytick.labelsize": 11.5,
    "legend.fontsize": 11.5,
    "text.color": INK,
    "axes.labelcolor": MUTED,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "axes.edgecolor": LINE,
    "axes.linewidth": 1.0,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.facecolor": "none",
    "figure.facecolor": "none",
    "grid.color": LINE,
    "grid.linewidth": 0.7,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "legend.frameon": False,
    "legend.borderaxespad": 0.2,
    "legend.handlelength": 1.4,
    "lines.linewidth": 1.8,
    "axes.formatter.useoffset": False,
}


@dataclass(frozen=True)
class Figure:
    """One panel: `title` and `note` are plain text (escape them), `svg` is safe markup."""

    title: str
    note: str
    svg: str


_numbers = count()


@contextmanager
def _axes(height: float = HEIGHT) -> Any:
    """Yields axes on a fresh figure that is closed afterwards; the style does not leak into the user's."""
    import matplotlib as mpl
    from matplotlib.figure import Figure as MplFigure

    with mpl.rc_context():
        mpl.rcdefaults()
        mpl.rcParams.update(_RC)
        yield MplFigure(figsize=(WIDTH / 72, height / 72), layout="constrained").subplots()


def _svg(axes: Any, label: str) -> str:
    """The axes' figure as an inline <svg> element with unique ids and CSS colours."""
    buffer = io.StringIO()
    # No metadata: dates would break repeatability and its namespaces are outside addresses.
    nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    axes.figure.savefig(buffer, format="svg", metadata=nothing)
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>|<!--.*?-->|<style.*?</style>", "", svg, flags=re.DOTALL)
    size = re.search(r'viewBox="0 0 ([\d.]+) ([\d.]+)"', svg)
    assert size is not None  # matplotlib always writes one
    prefix = f"f{next(_numbers)}-"
    # Tags only: text between them comes from data and stays as matplotlib escaped it.
    svg = re.sub(r"<[^>]*>", lambda match: _tag(match.group(0), prefix), svg[svg.index(">") + 1 :])
    head = f'<svg role="img" aria-label="{_attribute(label)}" viewBox="0 0 {size.group(1)} {size.group(2)}">'
    return head + re.sub(r"\n\s*", "\n", svg).strip()


def _tag(tag: str, prefix: str) -> str:
    """One tag of matplotlib's SVG, made fit for a page that holds several of them."""
    tag = tag.replace('id="', f'id="{prefix}').replace('xlink:href="#', f'href="#{prefix}')
    tag = tag.replace("url(#", f"url(#{prefix}")
    tag = re.sub(r"font:\s*([\d.]+)px[^;\"]*", r"font-size: \1px", tag)  # the page's own font family
    tag = re.sub(r"#0[1-5]0[1-5]0[0-5]", lambda match: _TO_CSS[match.group(0)], tag)
    return re.sub(r"(\d+\.\d{2})\d+", r"\1", tag)


def _attribute(text: str) -> str:
    return html.escape(text, quote=True)


def _thin(xs: Sequence[float], ys: Sequence[float]) -> tuple[list[float], list[float]]:
    """At most MAX_POINTS points that keep each bucket's extremes, so that spikes stay visible."""
    if len(xs) <= MAX_POINTS:
        return list(xs), list(ys)
    buckets = MAX_POINTS // 2
    kept: set[int] = {0, len(xs) - 1}
    for bucket in range(buckets):
        span = range(bucket * len(xs) // buckets, (bucket + 1) * len(xs) // buckets)
        kept |= {min(span, key=ys.__getitem__), max(span, key=ys.__getitem__)}
    order = sorted(kept)
    return [xs[i] for i in order], [ys[i] for i in order]


def smooth(values: Sequence[float], window: int | None = None) -> list[float]:
    """Centred moving average; `window` defaults to a twentieth of the values (ends use what is there)."""
    half = (window or max(1, len(values) // 20)) // 2
    sums = [0.0]
    for value in values:
        sums.append(sums[-1] + value)
    result = []
    for index in range(len(values)):
        low, high = max(0, index - half), min(len(values), index + half + 1)
        result.append((sums[high] - sums[low]) / (high - low))
    return result


def _curve(axes: Any, xs: Sequence[float], ys: Sequence[float], slot: int, label: str | None = None) -> None:
    """Raw values thin and pale, their moving average on top."""
    color, style = _SERIES[slot % len(_SERIES)], _STYLES[slot % len(_STYLES)]
    if len(xs) == 1:
        axes.plot(xs, ys, "o", color=color, markersize=4, label=label)
        return
    axes.plot(*_thin(xs, ys), color=color, linewidth=0.7, alpha=0.35)
    axes.plot(*_thin(xs, smooth(ys)), color=color, linestyle=style, label=label)


def _short(value: float, _: Any = None) -> str:
    return text.si(value)


def _token_axis(axes: Any, xs: Sequence[float]) -> None:
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    axes.set_xlabel("tokens seen")
    axes.xaxis.set_major_formatter(FuncFormatter(_short))
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.set_xlim(0, max(xs) or 1)


def _log_axis(axis: Any) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axis.set_major_locator(LogLocator(numticks=6))
    axis.set_major_formatter(FuncFormatter(_short))
    axis.set_minor_formatter(NullFormatter())


def loss_curve(log: StageLog, title: str, objective: str = "loss") -> Figure | None:
    """Training loss of one stage against tokens seen; None when the log has no finite loss."""
    xs, ys = log.series("loss")
    if not xs:
        return None
    with _axes() as axes:
        _curve(axes, xs, ys, 0)
        spread = sorted(ys)
        if spread[0] > 0 and spread[-1] / spread[0] > 20:
            axes.set_yscale("log")
            _log_axis(axes.yaxis)
        axes.set_ylabel(f"{objective} (nats)")
        _token_axis(axes, xs)
        tail = smooth(ys)[-1]
        svg = _svg(axes, f"{title}: loss from {ys[0]:.3g} to {tail:.3g} over {text.si(xs[-1])} tokens")
    steps = int(log.records[-1]["step"])
    note = f"{ys[0]:.3g} → {tail:.3g} nats in {steps:,} steps. Pale: logged values; bold: moving average."
    if log.nonfinite:
        note += f" {log.nonfinite} non-finite values are not drawn."
    return Figure(title, note, svg)


def loss_terms(log: StageLog) -> Figure | None:
    """Stage 3: the three terms of L = CE + lambda LD + gamma AD, unweighted, on a log axis."""
    named = [("ce", "cross-entropy"), ("ld", "logits"), ("ad", "attention relations")]
    drawn = [(slot, label, *log.series(key)) for slot, (key, label) in enumerate(named)]
    drawn = [item for item in drawn if item[2] and max(item[3]) > 0]
    if not drawn:
        return None
    with _axes() as axes:
        for slot, label, xs, ys in drawn:
            positive = [(x, y) for x, y in zip(xs, ys, strict=True) if y > 0]
            _curve(axes, [x for x, _ in positive], [y for _, y in positive], slot, label)
        axes.set_yscale("log")
        _log_axis(axes.yaxis)
        axes.set_ylabel("term (nats)")
        _token_axis(axes, drawn[0][2])
        axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=3, columnspacing=1.2)
        svg = _svg(axes, "Stage 3: cross-entropy, logit and attention-relation losses over tokens")
    return Figure("Stage 3: the three losses", "Before weighting by λ and γ. Log axis.", svg)


def gamma_balance(log: StageLog, target: float | None) -> Figure | None:
    """Ratio of gradient norms gamma*AD : CE on the Q/K/V projections, with its target."""
    xs, ys = log.series("ad_ce_ratio")
    positive = [(x, y) for x, y in zip(xs, ys, strict=True) if y > 0]
    if not positive:
        return None
    xs, ys = [x for x, _ in positive], [y for _, y in positive]
    with _axes() as axes:
        _curve(axes, xs, ys, 0)
        if target:
            axes.axhline(target, color=INK, linewidth=1, linestyle=(0, (4, 3)))
            axes.annotate("target", (0.02, target), xycoords=("axes fraction", "data"), va="bottom")
        axes.set_yscale("log")
        _log_axis(axes.yaxis)
        axes.set_ylabel("‖γ∇AD‖ / ‖∇CE‖")
        _token_axis(axes, xs)
        svg = _svg(axes, "Stage 3: ratio of attention to cross-entropy gradient norms over tokens")
    gamma = log.last("gamma")
    note = f"On the Q, K and V projections. γ at the end: {text.si(gamma)}." if gamma is not None else ""
    return Figure("Stage 3: attention against CE gradient", note, svg)


def _density(layers: Sequence[LayerStats]) -> list[float] | None:
    """Share of weights in each inner histogram bin, all layers together; None without latents."""
    latents = [layer.latent for layer in layers if layer.latent is not None]
    if not latents:
        return None
    total = sum(sum(latent.histogram) for latent in latents)
    return [sum(latent.histogram[bin_ + 1] for latent in latents) / total for bin_ in range(HISTOGRAM_BINS)]


def weight_histogram(title: str, models: Mapping[str, Sequence[LayerStats]]) -> Figure | None:
    """W / scale of several models over each other, thresholds at +-0.5 marked (paper, Figure 2)."""
    densities = {name: density for name, layers in models.items() if (density := _density(layers))}
    if not densities:
        return None
    width = 2 * HISTOGRAM_LIMIT / HISTOGRAM_BINS
    edges = [index * width - HISTOGRAM_LIMIT for index in range(HISTOGRAM_BINS + 1)]
    with _axes() as axes:
        for slot, (name, density) in enumerate(densities.items()):
            percent = [100 * share for share in density]
            color = _SERIES[slot]
            if slot == 0:  # one filled shape; the others are lines over it
                axes.stairs(percent, edges, fill=True, color=color, alpha=0.18)
            axes.stairs(percent, edges, color=color, linewidth=1.6, linestyle=_STYLES[slot], label=name)
        for threshold in (-0.5, 0.5):
            axes.axvline(threshold, color=MUTED, linewidth=1, linestyle=(0, (2, 3)))
        axes.set_xlim(-HISTOGRAM_LIMIT, HISTOGRAM_LIMIT)
        axes.set_ylim(bottom=0)
        axes.set_xlabel("latent weight / scale")
        axes.set_ylabel("% of weights")
        axes.legend(loc="lower center", bbox_to_anchor=(0.46, 1.0), ncols=3, columnspacing=0.9)
        svg = _svg(axes, f"{title}: histogram of latent weights over their scale: {', '.join(densities)}")
    near = []
    for name in densities:
        latents = [(layer.latent, layer.weights) for layer in models[name] if layer.latent is not None]
        weights = sum(weight for _, weight in latents)
        share = sum(latent.near_share * weight for latent, weight in latents) / weights
        near.append(f"{100 * share:.1f}% {name}")
    return Figure(title, f"Within 0.05 of a threshold: {', '.join(near)}.", svg)


def zero_shares(title: str, layers: Sequence[LayerStats]) -> Figure | None:
    """Share of zero codes by block, one line a kind of projection."""
    kinds: dict[str, list[LayerStats]] = {}
    for layer in layers:
        if layer.layer is not None:
            kinds.setdefault(layer.kind, []).append(layer)
    if not kinds:
        return None
    with _axes() as axes:
        from matplotlib.ticker import MaxNLocator

        for slot, (kind, group) in enumerate(kinds.items()):
            xs, ys = [layer.layer for layer in group], [100 * layer.zero for layer in group]
            color, style = _SERIES[slot % len(_SERIES)], _STYLES[slot % len(_STYLES)]
            axes.plot(
                xs, ys, color=color, linestyle=style, marker="o", markersize=3, linewidth=1.4, label=kind
            )
        axes.axhline(100 * GAUSSIAN_ZERO_SHARE, color=MUTED, linewidth=1, linestyle=(0, (2, 3)))
        axes.set_xlabel("block")
        axes.set_ylabel("zero codes (%)")
        axes.set_ylim(bottom=0)
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=4, columnspacing=1.2)
        svg = _svg(axes, f"{title}: share of zero codes by block for {', '.join(kinds)}")
    return Figure(title, "Dotted: 31%, where Gaussian weights would be.", svg)


def _two_lines(name: str) -> str:
    """`BitNet-SFT (direct)` on two lines; each is cut where it would take half of the panel."""
    first, bracket, rest = name.partition(" (")
    lines = [first, bracket.strip() + rest] if bracket else [first]
    return "\n".join(line if len(line) <= 20 else line[:19] + "…" for line in lines)


def _bars(title: str, note: str, names: Sequence[str], draw: Any) -> Figure:
    """Horizontal panel with one named line a row of the results table, first row on top."""
    with _axes(height=38 + 36 * len(names)) as axes:
        draw(axes)
        axes.set_yticks(range(len(names)), [_two_lines(name) for name in names])
        axes.tick_params(axis="y", labelcolor=INK)
        axes.set_ylim(len(names) - 0.5, -0.5)
        axes.grid(visible=False, axis="y")
        axes.grid(visible=True, axis="x")
        axes.spines["left"].set_visible(False)
        return Figure(title, note, _svg(axes, f"{title}: {', '.join(names)}"))


def score_bars(rows: Sequence[tuple[str, float, float, float]], label: str) -> Figure | None:
    """Score and 95% interval of each (name, value, low, high): dots, since the axis does not start at 0."""
    if not rows:
        return None

    def draw(axes: Any) -> None:
        for index, (_, value, low, high) in enumerate(rows):
            color = _SERIES[index % len(_SERIES)]
            axes.plot([low, high], [index, index], color=color, linewidth=2.4, solid_capstyle="butt")
            axes.plot([value], [index], "o", color=color, markersize=7)
            axes.annotate(f"{value:.1f}", (value, index), (0, 7), textcoords="offset points", ha="center")
        axes.margins(x=0.12)

    note = "Dot: score; bar: 95% interval. The axis does not start at 0."
    return _bars(f"{label[:1].upper()}{label[1:]}", note, [row[0] for row in rows], draw)


def size_bars(rows: Sequence[tuple[str, int]]) -> Figure | None:
    """Megabytes on disk of each (name, bytes)."""
    if not rows:
        return None

    def draw(axes: Any) -> None:
        for index, (_, size) in enumerate(rows):
            axes.barh([index], [size / 1e6], height=0.5, color=_SERIES[index % len(_SERIES)])
            axes.annotate(
                f"{size / 1e6:.3g}", (size / 1e6, index), (5, 0), textcoords="offset points", va="center"
            )
        axes.set_xlim(0, max(size for _, size in rows) / 1e6 * 1.16)

    note = "Weights, embeddings and head together."
    return _bars("Size on disk (MB)", note, [row[0] for row in rows], draw)
