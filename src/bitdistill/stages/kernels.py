"""Where a stage trains with fused kernels: whether it can, and what then runs before each step."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch

from bitdistill.config import Loop
from bitdistill.kernels.runtime import say_once, wants_kernels
from bitdistill.models.families import layout_of
from bitdistill.models.fused import ACTIVATIONS, FusedLayers, fused_layers
from bitdistill.quant.linear import BitLinear


def usable(loop: Loop, device: torch.device, student: Any) -> bool:
    """Resolve `loop.kernels` for a student: what runs here, what the student needs, and the kernels' self-check.

    The reference path is what is left in every other case, and the reason is said once.
    """
    if not wants_kernels(loop.kernels, device):
        return False
    if not all(m.quantize_activations for m in student.modules() if isinstance(m, BitLinear)):
        say_once("refine.quantize_activations is off")
        return False
    if device.type != "cuda":  # a test that wants the fused layers' plain twins
        return True
    from bitdistill.kernels.selfcheck import Sizes, why_wrong

    layout = layout_of(student.config.to_dict(), "student")
    activation = ACTIVATIONS.get(layout.activation, "silu")
    sizes = Sizes(layout.hidden, layout.intermediate, layout.vocab, activation, layout.head_dim)
    fault = why_wrong(device, sizes)
    if fault is not None:
        say_once(fault)
    return fault is None


class FusedAfterWarmup:
    """Before each step: make the weight codes anew, once for all its micro-batches.

    Layers are fused when the ternary warm-up is over; until then their weights are blends.
    """

    def __init__(
        self,
        student: Any,
        stack: contextlib.ExitStack,
        before: Callable[[int], None] | None,
        int8_backward: bool = False,
    ) -> None:
        self.student, self.stack, self.before = student, stack, before
        self.int8_backward = int8_backward
        self.layers = [m for m in student.modules() if isinstance(m, BitLinear)]
        self.fused: FusedLayers | None = None

    def __call__(self, step: int) -> None:
        if self.before is not None:
            self.before(step)
        if self.fused is not None:
            self.fused.refresh()
        elif all(layer.ternary_blend == 1.0 for layer in self.layers):
            self.fused = self.stack.enter_context(fused_layers(self.student, self.int8_backward))


def fused_chunk() -> Any:
    """The Triton twin of `losses.logits.language_model_chunk`."""
    from bitdistill.kernels.head import fused_language_model_chunk  # needs triton

    return fused_language_model_chunk
