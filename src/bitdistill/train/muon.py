"""Muon (K. Jordan and others, 2024): momentum whose matrices are orthogonalised by a Newton-Schulz iteration.

Matrices of one shape are orthogonalised together in one batched product: a transformer has few shapes and many
layers, and one launch a matrix would cost more time than the arithmetic. Slow twin: torch.optim.Muon.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
STEPS = 5
EPSILON = 1e-7
RMS = 0.2
"""Root mean square of AdamW's updates, which Muon's are scaled to (J. Liu and others, 2025, sec. 2.2)."""
MAX_BATCH_ELEMENTS = 2**28
"""Elements orthogonalised at once: bounds the extra memory."""


def orthogonalize(matrices_KRC: Tensor) -> Tensor:
    """Nearest semi-orthogonal matrices, roughly (singular values end between 0.7 and 1.2), in bfloat16 [K, R, C]."""
    a, b, c = COEFFICIENTS
    x = matrices_KRC.to(torch.bfloat16)
    wide = x.shape[-2] <= x.shape[-1]
    if not wide:
        x = x.mT
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=EPSILON)
    for _ in range(STEPS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x if wide else x.mT


class Muon(torch.optim.Optimizer):
    """Muon over matrices, with Nesterov momentum, decoupled weight decay and updates of AdamW's size.

    Args:
        parameters: two-dimensional parameters, or groups of them.
        learning_rate: the size that AdamW would use.

    Raises:
        ValueError: a parameter that is no matrix.
    """

    def __init__(
        self,
        parameters: Iterable[Tensor] | Iterable[dict[str, Any]],
        *,
        learning_rate: float,
        weight_decay: float,
        momentum: float,
    ) -> None:
        super().__init__(
            parameters, {"lr": learning_rate, "weight_decay": weight_decay, "momentum": momentum}
        )
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.ndim != 2:
                    raise ValueError(f"Muon: a parameter of shape {tuple(parameter.shape)} is no matrix")

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One update; parameters without gradient are left alone."""
        for group in self.param_groups:
            by_shape: dict[torch.Size, list[Tensor]] = defaultdict(list)
            for parameter in group["params"]:
                if parameter.grad is not None:
                    by_shape[parameter.shape].append(parameter)
            for shape, parameters in by_shape.items():
                size = max(1, MAX_BATCH_ELEMENTS // shape.numel())
                for start in range(0, len(parameters), size):
                    self._update(parameters[start : start + size], group)

    def _update(self, parameters: list[Tensor], group: dict[str, Any]) -> None:
        """Parameters of one shape."""
        rate, momentum = group["lr"], group["momentum"]
        grads = [p.grad for p in parameters if p.grad is not None]
        for parameter in parameters:
            if "momentum_buffer" not in self.state[parameter]:
                self.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
        buffers = [self.state[p]["momentum_buffer"] for p in parameters]
        torch._foreach_lerp_(buffers, grads, 1.0 - momentum)
        updates = orthogonalize(torch.stack(torch._foreach_lerp(grads, buffers, momentum)))
        scale = RMS * math.sqrt(max(parameters[0].shape))
        if group["weight_decay"]:
            torch._foreach_mul_(parameters, 1.0 - rate * group["weight_decay"])
        torch._foreach_add_(parameters, list(updates.to(parameters[0].dtype).unbind()), alpha=-rate * scale)
