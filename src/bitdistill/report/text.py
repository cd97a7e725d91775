"""Numbers as people read them; shared by the HTML report and the model card. Plain text, not markup."""

from __future__ import annotations

import contextlib
import math
import os
import unicodedata
from pathlib import Path
from typing import Any

from bitdistill import artifact

NONE = "–"


def _scaled(value: float, units: tuple[tuple[str, float], ...]) -> str | None:
    for unit, unit_size in units:
        if abs(value) >= 0.9995 * unit_size:  # what three digits round up to the unit belongs to it
            shown = value / unit_size
            return (f"{shown:.3g}" if abs(shown) < 999.5 else f"{shown:,.0f}") + unit
    return None


def si(value: float | None) -> str:
    """Three digits: 12345 -> `12.3k`."""
    if value is None or not math.isfinite(value):
        return NONE
    return _scaled(value, (("B", 1e9), ("M", 1e6), ("k", 1e3), ("", 1))) or f"{value:.3g}"


def size(count: float | None) -> str:
    """Bytes in decimal units: 1900000 -> `1.9 MB`."""
    if count is None:
        return NONE
    return _scaled(count, ((" GB", 1e9), (" MB", 1e6), (" kB", 1e3))) or f"{count:.0f} bytes"


def duration(seconds: float | None) -> str:
    """Seconds: 75 -> `1 min 15 s`."""
    if seconds is None:
        return NONE
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    hours, minutes, rest = whole // 3600, whole % 3600 // 60, whole % 60
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


def count(value: float | None) -> str:
    """Whole number with thousands separators."""
    return NONE if value is None else f"{value:,.0f}"


def number(value: float | None, digits: int = 1) -> str:
    """Fixed decimals."""
    return NONE if value is None or not math.isfinite(value) else f"{value:,.{digits}f}"


def signed(value: float | None, digits: int = 1) -> str:
    """With a sign: `+1.2`, `−0.4` (a minus, not a hyphen)."""
    if value is None:
        return NONE
    text = f"{value:+.{digits}f}"
    return f"{0:.{digits}f}" if float(text) == 0 else text.replace("-", "−")


def p_value(value: float) -> str:
    """`p = 0.03`, `p < 0.001`."""
    return "p < 0.001" if value < 0.001 else f"p = {value:.2g}"


def exact_p(value: float, digits: int = 2) -> str:
    """`0.03`, `7.3e-190`; below 1e-300, where doubles lose their digits, only that."""
    return "< 1e-300" if value < 1e-300 else f"{value:.{digits}g}"


def clean(text: Any, limit: int | None = None) -> str:
    """Text from data, safe to write: no control characters or lone surrogates, at most `limit` characters.

    A cut is marked with an ellipsis. Markup characters are left for the template to escape.
    """
    raw = str(text)
    cut = limit is not None and len(raw) > limit
    kept = raw[:limit] if cut else raw
    safe = "".join(
        character if character in "\n\t" or unicodedata.category(character) not in ("Cc", "Cs") else "\ufffd"
        for character in kept
    )
    return safe + "…" if cut else safe


METRIC_NAMES = {
    "accuracy": "accuracy (%)",
    "rouge1": "ROUGE-1",
    "rouge2": "ROUGE-2",
    "rougeL": "ROUGE-L",
    "rougeLsum": "ROUGE-Lsum",
    "bleu": "BLEU",
    "exact_match": "exact match (%)",
    "final_number": "right final number (%)",
    "perplexity": "perplexity",
    "reference_nll": "nats a token of the references",
    "f1": "F1",
    "f1_binary": "F1 (binary)",
    "f1_macro": "F1 (macro)",
}


def metric_name(metric: str) -> str:
    """A metric as people write it; an unknown one under its own name."""
    return METRIC_NAMES.get(metric, metric)


def model_name(path: str) -> str:
    """A model as people know it: the last part of a local folder, a hub name ("owner/name") whole."""
    return Path(path).name if path.startswith((".", "/", "~")) or path.count("/") > 1 else path


def write(path: Path, content: str) -> Path:
    """Write a UTF-8 file so that a reader sees the old content or the new one, never a part; returns `path`.

    Raises:
        StorageError: the file system refused.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with artifact.storage_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            partial.write_text(content, "utf-8")
            partial.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            partial.unlink()
        raise
    return path
