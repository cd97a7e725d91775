"""Parameter groups and learning-rate schedules."""

from __future__ import annotations

import math

import torch
from torch import nn

from bitdistill.config import Optim


def learning_rate_at(step: int, total_steps: int, optim: Optim) -> float:
    """Learning rate of update `step` (0-based) of `total_steps`: a pure function, no state to resume."""
    warmup_steps = round(optim.warmup_fraction * total_steps)
    if step < warmup_steps:
        return optim.learning_rate * (step + 1) / warmup_steps
    floor = optim.min_lr_ratio
    after = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    if optim.schedule == "constant":
        factor = 1.0
    elif optim.schedule == "linear":
        factor = floor + (1 - floor) * (1 - after)
    elif optim.schedule == "cosine":
        factor = floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * after))
    else:  # wsd: stable, then linear decay over the last decay_fraction of all steps
        decay_steps = max(1, round(optim.decay_fraction * total_steps))
        left = total_steps - step
        factor = 1.0 if left >= decay_steps else floor + (1 - floor) * left / decay_steps
    return optim.learning_rate * factor


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, object]]:
    """Two groups: matrices with weight decay; embeddings, norms, gains and biases without."""
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    decayed: list[nn.Parameter] = []
    plain: list[nn.Parameter] = []
    for parameter in model.parameters():
        if parameter.requires_grad:
            matrix = parameter.ndim >= 2 and id(parameter) not in embeddings
            (decayed if matrix else plain).append(parameter)
    groups: list[dict[str, object]] = [{"params": decayed, "weight_decay": weight_decay}]
    groups.append({"params": plain, "weight_decay": 0.0})
    return [g for g in groups if g["params"]]


def build_optimizer(model: nn.Module, optim: Optim) -> torch.optim.AdamW:
    """AdamW over all trainable parameters, fused."""
    return torch.optim.AdamW(
        parameter_groups(model, optim.weight_decay),
        lr=optim.learning_rate,
        betas=(optim.beta1, optim.beta2),
        eps=optim.epsilon,
        fused=True,
    )
