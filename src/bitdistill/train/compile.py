"""Regional compilation: one transformer block at a time, so all blocks share one compiled graph.

Inductor's looped reductions may store a row in one loop and read it back in the next. Triton gives the store and the
load layouts of their own, so a thread reads what another one stores, and nothing makes it wait (triton#10924,
pytorch#190519): it sees what the memory held before. In models with norms on queries and keys (Gemma 3, Qwen3) the
backward of a key's norm is such a kernel. `with_barriers` puts the missing barriers into inductor's sources.
"""

from __future__ import annotations

import functools
import logging
import re
from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import nn

log = logging.getLogger(__name__)

# Of compiled code kept on disk: what was written without barriers is not taken
CACHE_TAG = "bitdistill-barriers-1"
_BARRIER = "tl.debug_barrier()"
_STATEMENT = "    "  # indentation of a statement of a kernel
_ACCESS = re.compile(r"tl\.(load|store|atomic_\w+)\((?:tl\.make_block_ptr\()?(\w+)")


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
    put_barriers()
    for index, layer in enumerate(model.get_submodule("model.layers").children()):
        if index not in skip:
            layer.compile()


def compiled(function: Callable[..., Any], enabled: bool) -> Callable[..., Any]:
    """`function`, compiled if `enabled`."""
    if not enabled:
        return function
    put_barriers()
    return torch.compile(function)


def with_barriers(source: str) -> str:
    """Source of Triton kernels in which a statement that reads what an earlier one stored waits for it.

    Statements are those of the kernel's own level: a loop is one. What is stored and read within one loop, by one
    index, needs none. Sources that have the barriers, or need none, come back as they are.
    """
    lines: list[str] = []
    stored: set[str] = set()  # pointers, since the last barrier
    statement: list[str] = []

    def close() -> None:
        text = "\n".join(statement)
        found = _ACCESS.findall(text)
        if any(kind == "load" and pointer in stored for kind, pointer in found):
            lines.append(_STATEMENT + _BARRIER)
            stored.clear()
        if _BARRIER in text:
            stored.clear()
        stored.update(pointer for kind, pointer in found if kind != "load")
        lines.extend(statement)
        statement.clear()

    for line in source.split("\n"):
        depth = len(line) - len(line.lstrip(" "))
        if line.strip() and depth <= len(_STATEMENT):
            close()
            if depth < len(_STATEMENT):  # outside of any kernel
                stored.clear()
        statement.append(line)
    close()
    return "\n".join(lines)


def put_barriers() -> None:
    """From now on inductor's kernels have the barriers of `with_barriers`, in this process."""
    from torch._inductor.codegen.triton import TritonKernel

    write = TritonKernel.codegen_kernel
    if hasattr(write, "_without_barriers"):
        return

    @functools.wraps(write)
    def codegen_kernel(*args: Any, **kwargs: Any) -> str:
        source = write(*args, **kwargs)
        guarded = with_barriers(source)
        if guarded != source:
            log.debug("torch.compile: a barrier is put into a kernel that reads back what it stored")
        return guarded

    codegen_kernel._without_barriers = write  # type: ignore[attr-defined]
    TritonKernel.codegen_kernel = codegen_kernel  # type: ignore[method-assign]
    tag = torch.compiler.config.cache_key_tag
    if CACHE_TAG not in tag:
        torch.compiler.config.cache_key_tag = f"{tag} {CACHE_TAG}".strip()
