"""Forward and backward of a micro-batch: eager, or replayed from one CUDA graph a batch shape.

A fine-tuning step on short rows is hundreds of small kernels, and launching them takes longer than running
them. A graph launches them all at once. The first batch of a shape runs eagerly (which also compiles what is to
be compiled), the second is captured, later ones are replayed; gradients add up in the same buffers throughout.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from bitdistill.config import Loop
from bitdistill.data.batches import Batch
from bitdistill.train.optim import OptimizerSet
from bitdistill.train.step import StepFunction, StepOutput, Totals, autocast

log = logging.getLogger("bitdistill")
MAX_GRAPHS = 32
"""Shapes that get a graph of their own; further ones run eagerly."""
LAUNCH_BOUND = 2e12
"""Parameters times tokens below which a step is short for a GPU: some 10 TFLOP, forward and backward. A step function
may have a bound of its own (`launch_bound`)."""
FUSED_LAUNCH_BOUND = 1.2e13
"""The same for fused layers, whose operators take the host longer to launch: at stage 2 of a 135M model (32 x 1,024
tokens) about as long for a forward pass as the GPU to run it. At 0.6B (16 x 1,024) a graph is 2 % faster and takes
10 % more memory (docs/log.md, run 14)."""
INDEX_MULTIPLE = 128
"""Indices of answer and real tokens are filled up to this multiple, so that few shapes occur."""


class Gradients(Protocol):
    """How gradients of a step come about."""

    def stream(self) -> contextlib.AbstractContextManager[Any]:
        """Context in which the whole training runs."""

    def add(self, batch: Batch, totals: Totals) -> dict[str, Tensor | float]:
        """Add the gradients of a micro-batch (on the host) to the parameters' `grad`; returns loss and metrics."""

    def clear(self, optimizer: OptimizerSet) -> None:
        """Start the next step from zero gradients."""


def wants_graphs(
    loop: Loop, device: torch.device, weights: int, tokens: int, bound: float = LAUNCH_BOUND
) -> bool:
    """Resolve a recipe's `loop.cuda_graphs`.

    Args:
        weights: parameters that are trained.
        tokens: tokens of a micro-batch, padding included. Their product tells whether launches bind the step: large
            steps gain nothing from a graph, which holds memory of its own.
        bound: what the product must be below.
    """
    if device.type != "cuda" or loop.gradient_checkpointing:
        return False
    if loop.cuda_graphs == "auto":
        return weights * tokens < bound
    return bool(loop.cuda_graphs)


def _named(output: StepOutput) -> dict[str, Tensor | float]:
    return {"loss": output.loss.detach(), **output.metrics}


class EagerGradients:
    """The plain way: one forward, one backward."""

    def __init__(self, step_function: StepFunction, device: torch.device, precision: str) -> None:
        self.step_function, self.device, self.precision = step_function, device, precision

    def stream(self) -> contextlib.AbstractContextManager[Any]:
        return contextlib.nullcontext()

    def add(self, batch: Batch, totals: Totals) -> dict[str, Tensor | float]:
        return self._run(batch.to(self.device), totals)

    def _run(self, batch: Batch, totals: Totals) -> dict[str, Tensor | float]:
        with autocast(self.device, self.precision):
            output = self.step_function(batch, totals)
        output.loss.backward()
        return _named(output)

    def clear(self, optimizer: OptimizerSet) -> None:
        optimizer.zero_grad(set_to_none=True)


@dataclass
class _Graph:
    graph: torch.cuda.CUDAGraph
    batch: Batch
    totals: Totals
    results: dict[str, Tensor | float]

    def replay(self, batch: Batch, totals: Totals) -> dict[str, Tensor | float]:
        _copy_tensors(batch, self.batch)
        _copy_tensors(totals, self.totals)
        self.graph.replay()
        # The graph's outputs are overwritten by its next replay
        return {name: v.clone() if isinstance(v, Tensor) else v for name, v in self.results.items()}


class ReplayedGradients(EagerGradients):
    """CUDA graphs for step functions that declare themselves `replayable`; the others run eagerly.

    When a capture fails, that is said once and training goes on eagerly.
    """

    def __init__(
        self,
        step_function: StepFunction,
        parameters: Sequence[nn.Parameter],
        device: torch.device,
        precision: str,
        among_others: bool = False,
    ) -> None:
        super().__init__(step_function, device, precision)
        # What watches over exchanges with other processes asks the device from a thread of its own meanwhile
        self.errors = "thread_local" if among_others else "global"
        self.parameters = list(parameters)
        self.graphs: dict[tuple[int, ...], _Graph] = {}
        self.seen: set[tuple[int, ...]] = set()
        self.enabled = True
        self._stream = torch.cuda.Stream(device)
        self._pool = torch.cuda.graph_pool_handle()
        for parameter in self.parameters:
            parameter.grad = torch.zeros_like(parameter)  # graphs keep the address

    @contextlib.contextmanager
    def stream(self) -> Any:
        """A stream of its own: captures are not possible on the default stream."""
        self._stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self._stream):
            yield
        torch.cuda.current_stream(self.device).wait_stream(self._stream)
        self.graphs.clear()

    def add(self, batch: Batch, totals: Totals) -> dict[str, Tensor | float]:
        if not (self.enabled and getattr(self.step_function, "replayable", False)):
            return super().add(batch, totals)
        batch = batch.with_filled_index(INDEX_MULTIPLE)
        key = (*batch.input_ids_BT.shape, batch.rows, len(batch.answer_index_N), len(batch.real_index_N))
        if key in self.graphs:
            return self.graphs[key].replay(batch, totals)
        if key not in self.seen or len(self.graphs) >= MAX_GRAPHS:
            self.seen.add(key)
            return super().add(batch, totals)
        graph = self._capture(batch, totals)
        if graph is None:
            return super().add(batch, totals)
        self.graphs[key] = graph
        return graph.replay(batch, totals)

    def _capture(self, batch: Batch, totals: Totals) -> _Graph | None:
        static = batch.to(self.device)
        scalars = Totals(
            *(
                torch.tensor(float(getattr(totals, f.name)), dtype=torch.float32, device=self.device)
                for f in fields(totals)
            )
        )
        graph = torch.cuda.CUDAGraph()
        try:
            torch.cuda.synchronize(self.device)
            # What the eager step before left in the allocator's cache is of no use to the graph's own pool
            torch.cuda.empty_cache()
            with torch.cuda.graph(
                graph, pool=self._pool, stream=self._stream, capture_error_mode=self.errors
            ):
                results = self._run(static, scalars)
        except RuntimeError as error:
            self.enabled = False
            log.warning(
                "CUDA graphs: capture failed, training goes on without: %s", str(error).splitlines()[0]
            )
            torch.cuda.synchronize(self.device)
            return None
        return _Graph(graph, static, scalars, results)

    def clear(self, optimizer: OptimizerSet) -> None:
        torch._foreach_zero_([p.grad for p in self.parameters])  # type: ignore[misc]


def _copy_tensors(source: Any, target: Any) -> None:
    """Copy each tensor or number field of one dataclass into the tensor of the same field of another."""
    for item in fields(target):
        held = getattr(target, item.name)
        if isinstance(held, Tensor):
            value = getattr(source, item.name)
            if isinstance(value, Tensor):
                held.copy_(value, non_blocking=True)
            else:
                held.fill_(float(value))
