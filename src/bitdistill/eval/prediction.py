"""What a model answered to one row. No torch import."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

OnProgress = Callable[[int, int], None]
"""Told now and then how far scoring has come: (done, to do), in rows or tokens."""


@dataclass(frozen=True, slots=True)
class Prediction:
    """One answer."""

    index: int
    """Position of the row among the examples that were scored."""
    label: int | None
    """Classification: index of the most likely label (the first of equals). Generation: None."""
    scores: tuple[float, ...]
    """Classification: log-likelihood of each label word after the prompt, in nats. Generation: empty."""
    text: str
    """The label word or generated text, stripped."""
    ended: bool = True
    """Generation: whether the model ended the text by an end-of-text token; False where a limit cut it."""
    reference_nll: float | None = None
    """Generation: negative log-likelihood of the first reference after the prompt, in nats; None: not measured."""
    reference_tokens: int = 0
    """Tokens of the reference that were scored."""
