"""Regional compilation: one transformer block at a time, so all blocks share one compiled graph."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import nn


def wants_compile(setting: bool | str, device: torch.device) -> bool:
    """Resolve a recipe's `loop.compile`: auto compiles on a GPU only."""
    return device.type == "cuda" if setting == "auto" else bool(setting)


def compile_blocks(model: nn.Module, *, skip: Collection[int] = ()) -> None:
    """Compile each decoder layer in place (parameters keep their names).

    Args:
        model: a Hugging Face causal language model (`model.model.layers`).
        skip: layer indices left eager, such as those whose states are captured.
    """
    # Gradients of parts of the loss are taken before the backward: saved buffers must survive the first.
    torch._functorch.config.donated_buffer = False
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 64)
    for index, layer in enumerate(model.get_submodule("model.layers").children()):
        if index not in skip:
            layer.compile()


def compiled(function: Callable[..., Any], enabled: bool) -> Callable[..., Any]:
    """`function`, compiled if `enabled`."""
    return torch.compile(function) if enabled else function
