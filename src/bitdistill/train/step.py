"""What a stage gives the training loop: a step function, from a micro-batch to its loss."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from bitdistill.data.batches import Batch


@dataclass(frozen=True)
class Totals:
    """Counts of one whole optimizer step; a step function divides its sums by them.

    Numbers, or float32 scalars on the device where steps are replayed from a CUDA graph.
    """

    rows: int | Tensor
    tokens: int | Tensor
    answers: int | Tensor

    @property
    def unanswered(self) -> int | Tensor:
        """Tokens that predict no answer, at least 1; without reading a tensor back, which no capture allows."""
        count = self.tokens - self.answers
        return count.clamp_min(1) if isinstance(count, Tensor) else max(1, count)


@dataclass
class StepOutput:
    """Loss of one micro-batch, already divided by the step's totals, and scalars for the log."""

    loss: Tensor
    metrics: dict[str, Tensor | float] = field(default_factory=dict)


StepFunction = Callable[[Batch, Totals], StepOutput]
"""Called with a batch on the device. One with a true attribute `replayable` reads nothing back from the device
and lets nothing but the batch, the totals and device tensors change what it computes."""


def resolve_precision(precision: str, device: torch.device) -> torch.dtype:
    """The compute dtype of a stage: auto means bfloat16 on a GPU and float32 on a CPU."""
    if precision == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return torch.bfloat16 if precision == "bfloat16" else torch.float32


def autocast(device: torch.device, precision: str) -> contextlib.AbstractContextManager[Any]:
    """Autocast for the stage's precision; does nothing in float32."""
    dtype = resolve_precision(precision, device)
    return torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32)
