"""Regional compilation: one transformer block at a time, so all blocks share one compiled graph."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

import torch
import torch._inductor.config
from torch import nn


def wants_compile(setting: bool | str, device: torch.device) -> bool:
    """Resolve a recipe's `loop.compile`: auto compiles on a GPU only."""
    return device.type == "cuda" if setting == "auto" else bool(setting)


def _without_mix_order_reductions() -> None:
    """Inductor's fused reductions of both dimensions may leave gradients unwritten, so that they are what lay in
    memory, from 16k tokens on (pytorch/pytorch#193061; torch 2.10 to 2.13). Norms of a ternary student are in our
    kernels anyway."""
    settings = torch._inductor.config.triton
    if hasattr(settings, "mix_order_reduction"):
        settings.mix_order_reduction = False


def compile_blocks(model: nn.Module, *, skip: Collection[int] = ()) -> None:
    """Compile each decoder layer in place (parameters keep their names).

    Args:
        model: a Hugging Face causal language model (`model.model.layers`).
        skip: layer indices left eager, such as those whose states are captured.
    """
    # Gradients of parts of the loss are taken before the backward: saved buffers must survive the first.
    torch._functorch.config.donated_buffer = False
    _without_mix_order_reductions()
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 64)
    for index, layer in enumerate(model.get_submodule("model.layers").children()):
        if index not in skip:
            layer.compile()


def compiled(function: Callable[..., Any], enabled: bool) -> Callable[..., Any]:
    """`function`, compiled if `enabled`."""
    if not enabled:
        return function
    _without_mix_order_reductions()
    return torch.compile(function)
