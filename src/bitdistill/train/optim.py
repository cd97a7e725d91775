"""Optimizers and learning-rate schedules."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from bitdistill.config import Optim
from bitdistill.train.muon import Muon


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


def split_parameters(
    model: nn.Module,
) -> tuple[list[nn.Parameter], list[nn.Parameter], list[nn.Parameter]]:
    """Trainable parameters: the blocks' matrices, embeddings and output head, and the rest (norms, gains, biases)."""
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    find_head = getattr(model, "get_output_embeddings", None)
    head = find_head() if callable(find_head) else None
    if head is not None:
        embeddings.add(id(head.weight))
    matrices: list[nn.Parameter] = []
    tables: list[nn.Parameter] = []
    rest: list[nn.Parameter] = []
    for parameter in model.parameters():
        if parameter.requires_grad:
            table = id(parameter) in embeddings
            (tables if table else matrices if parameter.ndim == 2 else rest).append(parameter)
    return matrices, tables, rest


class OptimizerSet:
    """One or more optimizers over disjoint parameters, stepped together."""

    def __init__(self, optimizers: list[torch.optim.Optimizer]) -> None:
        self.optimizers = optimizers
        self._owner = {id(p): o for o in optimizers for g in o.param_groups for p in g["params"]}

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """Groups of all optimizers (live: setting a group's `lr` takes effect)."""
        return [group for optimizer in self.optimizers for group in optimizer.param_groups]

    def set_learning_rate(self, rate: float) -> None:
        """The rate of the next update; groups may have a multiple of it (`optim.embedding_rate`)."""
        for group in self.param_groups:
            group["lr"] = rate * group.get("rate", 1.0)

    def step(self) -> None:
        for optimizer in self.optimizers:
            optimizer.step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=set_to_none)

    def states(self) -> Iterator[tuple[Tensor, dict[str, Any]]]:
        """Each parameter that has state, with it."""
        for optimizer in self.optimizers:
            yield from optimizer.state.items()

    def restore(self, parameter: Tensor, key: str, value: Tensor) -> None:
        """Put one tensor of state back."""
        self._owner[id(parameter)].state[parameter][key] = value


def build_optimizer(model: nn.Module, optim: Optim) -> OptimizerSet:
    """The optimizers of a stage over all trainable parameters; weight decay acts on matrices only."""
    matrices, tables, rest = split_parameters(model)
    adamw_groups: list[dict[str, Any]] = [
        {"params": rest, "weight_decay": 0.0},
        {"params": tables, "weight_decay": 0.0, "rate": optim.embedding_rate},
    ]
    optimizers: list[torch.optim.Optimizer] = []
    if optim.name == "muon":
        optimizers.append(
            Muon(
                matrices,
                learning_rate=optim.learning_rate,
                weight_decay=optim.weight_decay,
                momentum=optim.momentum,
            )
        )
    else:
        adamw_groups.insert(0, {"params": matrices, "weight_decay": optim.weight_decay})
    adamw = torch.optim.AdamW(
        [group for group in adamw_groups if group["params"]],
        lr=optim.learning_rate,
        betas=(optim.beta1, optim.beta2),
        eps=optim.epsilon,
        fused=True,
    )
    return OptimizerSet([*optimizers, adamw])
