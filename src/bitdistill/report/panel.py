"""What every figure is drawn with: one small SVG panel, its style, axes, curves and bars.

A panel is drawn at about its final size, so that text stays readable on a phone. Colours are CSS variables
(`--ink`, `--muted`, `--line`, `--s0` ...), so one panel serves light and dark mode; `as_file` puts colours in for
figures that are files of their own. Text stays text. Nothing in an SVG points outside of it.
"""

from __future__ import annotations

import html
import io
import re
import textwrap
from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count
from typing import Any

from bitdistill.report import text

WIDTH, HEIGHT = 360, 224  # CSS pixels of a panel; also the unit of every font and line size below
MAX_POINTS = 240

# Matplotlib wants colours, the page wants variables: each has a sentinel colour, replaced in the SVG.
_VARIABLES = {"ink": "#010101", "muted": "#020202", "line": "#030303"}
SERIES = [f"#05050{index}" for index in range(6)]
_TO_CSS = {value: f"var(--{name})" for name, value in _VARIABLES.items()}
_TO_CSS |= {value: f"var(--s{index})" for index, value in enumerate(SERIES)}
INK, MUTED, LINE = _VARIABLES["ink"], _VARIABLES["muted"], _VARIABLES["line"]
_PALETTE = ("#0b62b0", "#c25100", "#00795a", "#a3408a", "#806600", "#5a636e")
STYLES = ("-", "--", "-.", ":")

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
def axes(height: float = HEIGHT) -> Any:
    """Yields axes on a fresh figure that is closed afterwards; the style does not leak into the user's."""
    import matplotlib as mpl
    from matplotlib.figure import Figure as MplFigure

    with mpl.rc_context():
        mpl.rcdefaults()
        mpl.rcParams.update(_RC)
        yield MplFigure(figsize=(WIDTH / 72, height / 72), layout="constrained").subplots()


_axes = axes


def as_svg(axes: Any, label: str) -> str:
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


# The report's light colours (template.html.j2), for figures that are files of their own.
_LIGHT = {"ink": "#16191d", "muted": "#5a636e", "line": "#dfe3e8"}
_LIGHT |= dict(zip(("s0", "s1", "s2", "s3", "s4", "s5"), _PALETTE, strict=True))


def as_file(figure: Figure) -> str:
    """The panel as an SVG file: concrete colours on white, its size in pixels."""
    svg = re.sub(r"var\(--(\w+)\)", lambda match: _LIGHT[match.group(1)], figure.svg)
    # Alone in a file it needs no ids of its own, and is the same whatever was drawn before it
    svg = re.sub(r"<[^>]*>", lambda match: re.sub(r'(id="|#)f\d+-', r"\1", match.group(0)), svg)
    box = re.search(r'viewBox="0 0 ([\d.]+) ([\d.]+)"', svg)
    assert box is not None  # _svg wrote it
    size = f'width="{1.6 * float(box.group(1)):.0f}" height="{1.6 * float(box.group(2)):.0f}"'
    head, _, body = svg.partition(">")
    head = head.replace("<svg", f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-family="sans-serif"', 1)
    return f'{head}><rect width="100%" height="100%" fill="#ffffff"/>{body}\n'


def _attribute(text: str) -> str:
    return html.escape(text, quote=True)


def thin(xs: Sequence[float], ys: Sequence[float]) -> tuple[list[float], list[float]]:
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


def curve(axes: Any, xs: Sequence[float], ys: Sequence[float], slot: int, label: str | None = None) -> None:
    """Raw values thin and pale, their moving average on top."""
    color, style = SERIES[slot % len(SERIES)], STYLES[slot % len(STYLES)]
    if len(xs) == 1:
        axes.plot(xs, ys, "o", color=color, markersize=4, label=label)
        return
    axes.plot(*thin(xs, ys), color=color, linewidth=0.7, alpha=0.35)
    axes.plot(*thin(xs, smooth(ys)), color=color, linestyle=style, label=label)


def _short(value: float, _: Any = None) -> str:
    return text.si(value)


def token_axis(axes: Any, xs: Sequence[float]) -> None:
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    axes.set_xlabel("tokens seen")
    axes.xaxis.set_major_formatter(FuncFormatter(_short))
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.set_xlim(0, max(xs) or 1)


def log_axis(axis: Any) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axis.set_major_locator(LogLocator(numticks=6))
    axis.set_major_formatter(FuncFormatter(_short))
    axis.set_minor_formatter(NullFormatter())


def series(slot: int) -> tuple[str, str]:
    """Colour and line style of the n-th curve."""
    return SERIES[slot % len(SERIES)], STYLES[slot % len(STYLES)]


def level(axes: Any, value: float, name: str) -> None:
    """A dashed, named horizontal line."""
    axes.axhline(value, color=INK, linewidth=1, linestyle=(0, (4, 3)))
    axes.annotate(name, (0.02, value), xycoords=("axes fraction", "data"), va="bottom")


def legend(axes: Any, columns: int) -> None:
    """The legend above the panel."""
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=columns, columnspacing=1.2)


def log_if_wide(axes: Any, values: Sequence[float]) -> None:
    """A log axis where positive values span more than a factor of 20."""
    if min(values) > 0 and max(values) / min(values) > 20:
        axes.set_yscale("log")
        log_axis(axes.yaxis)


def count_axis(axis: Any, values: Sequence[float]) -> None:
    """Ticks at the values themselves, as 52M."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullFormatter, NullLocator

    axis.set_major_locator(FixedLocator(sorted(set(values))))
    axis.set_major_formatter(FuncFormatter(_short))
    axis.set_minor_locator(NullLocator())
    axis.set_minor_formatter(NullFormatter())


def interval(axes: Any, index: int, value: float, low: float, high: float) -> None:
    """A dot with its interval on line `index` of `bars`."""
    color = SERIES[index % len(SERIES)]
    axes.plot([low, high], [index, index], color=color, linewidth=2.4, solid_capstyle="butt")
    axes.plot([value], [index], "o", color=color, markersize=7)
    axes.annotate(f"{value:+.1f}", (value, index), (0, 7), textcoords="offset points", ha="center")
    axes.margins(x=0.12)


def zero(axes: Any) -> None:
    """A line at zero."""
    axes.axvline(0.0, color=MUTED, linewidth=1, linestyle=(0, (2, 3)))


def wrapped(names: Sequence[str]) -> list[str]:
    """Names on as many lines as they need, `BitNet-SFT (direct)` broken before the bracket.

    Lines have at most 20 characters, a third of the panel; 26 where one of the names is long.
    """
    parts = [_before_bracket(name) for name in names]
    width = 20 if all(len(line) <= 20 for lines in parts for line in lines) else 26
    fitted = [[part for line in lines for part in textwrap.wrap(line, width) or [""]] for lines in parts]
    return ["\n".join(lines) for lines in fitted]


def _before_bracket(name: str) -> list[str]:
    first, bracket, rest = name.partition(" (")
    return [first, bracket.strip() + rest] if bracket else [first]


def bars(title: str, note: str, names: Sequence[str], draw: Any) -> Figure:
    """Horizontal panel with one named line a row of the results table, first row on top."""
    labels = wrapped(names)
    lines = max((label.count("\n") + 1 for label in labels), default=1)
    with _axes(height=38 + max(36, 15 * lines + 6) * len(names)) as axes:
        draw(axes)
        axes.set_yticks(range(len(names)), labels)
        axes.tick_params(axis="y", labelcolor=INK)
        axes.set_ylim(len(names) - 0.5, -0.5)
        axes.grid(visible=False, axis="y")
        axes.grid(visible=True, axis="x")
        axes.spines["left"].set_visible(False)
        return Figure(title, note, as_svg(axes, f"{title}: {', '.join(names)}"))
