"""Forward and backward of a micro-batch: eager, or replayed from one CUDA graph a batch shape.

A fine-tuning step on short rows is hundreds of small kernels, and launching them takes longer than running
them. A graph launches them all at once. The first batch of a shape runs eagerly (which also compiles what is to
be compiled), the second is captured, later ones are replayed; gradients add up in the same buffers throughout.

A graph's kernels work in memory of its own, which nothing else writes: one that reads what was never written finds
the same there in every replay, maybe NaN, where an eager step would find some finite number (docs/log.md, run 17).
So the second batch of a shape also runs eagerly, and a graph whose gradients differ is not used.
"""

from __future__ import annotations

import contextlib
import logging
import math
import traceback
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from bitdistill.config import Loop
from bitdistill.data.batches import Batch
from bitdistill.train.optim import OptimizerSet
from bitdistill.train.step import StepFunction, StepOutput, Totals, autocast

log = logging.getLogger("bitdistill")
PACKAGE = Path(__file__).parents[1]
MAX_GRAPHS = 32
"""Shapes that get a graph of their own; further ones run eagerly."""
LAUNCH_BOUND = 2e12
"""Parameters times tokens below which a step is short for a GPU: some 10 TFLOP, forward and backward."""
FUSED_LAUNCH_BOUND = 1.2e13
"""The same for fused layers, whose operators take the host longer to launch: at stage 2 of a 135M model (32 x 1,024
tokens) about as long for a forward pass as the GPU to run it. A step of stage 3 at 270M (128 x 88) takes 108 ms with a
graph, 144 without (docs/log.md, run 27). At 0.6B (16 x 1,024) a graph is 2 % faster and takes 10 % more memory (run
14)."""
SAME_NORM, NEGLIGIBLE = 0.05, 1e-3
"""Of a graph's gradients: relative error of a parameter's norm, and of norms this small beside the whole gradient's
there is no telling. Wide by choice, for sums in another order; what these make on a GPU was not measured yet."""
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


def replayed_below(loop: Loop, device: torch.device, weights: int, fused: bool = False) -> float:
    """Resolve a recipe's `loop.cuda_graphs`: micro-batches of fewer tokens, padding included, are replayed.

    Args:
        weights: parameters that are trained. Their product with the tokens tells whether launches bind the step: large
            steps gain nothing from a graph, which holds memory of its own.
        fused: layers are fused, which has a bound of its own.

    Returns:
        0 where none is replayed, infinity where all are.
    """
    if device.type != "cuda" or loop.gradient_checkpointing or not loop.cuda_graphs:
        return 0.0
    if loop.cuda_graphs == "auto":
        return (FUSED_LAUNCH_BOUND if fused else LAUNCH_BOUND) / weights
    return math.inf


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

    When a capture fails or gives other gradients than the eager run, that is said once and training goes on eagerly.

    Args:
        parameters: by name, all that get gradients.
        below: micro-batches of so many tokens and more, padding included, run eagerly too. Each is judged by itself:
            a training's batches may lie on both sides.
    """

    def __init__(
        self,
        step_function: StepFunction,
        parameters: Mapping[str, nn.Parameter],
        device: torch.device,
        precision: str,
        among_others: bool = False,
        below: float = math.inf,
    ) -> None:
        super().__init__(step_function, device, precision)
        # What watches over exchanges with other processes asks the device from a thread of its own meanwhile
        self.errors = "thread_local" if among_others else "global"
        self.names, self.parameters = list(parameters), list(parameters.values())
        self.below = below
        self.graphs: dict[tuple[int, ...], _Graph] = {}
        self.seen: set[tuple[int, ...]] = set()
        self.enabled = True
        self._empty = True  # nothing has been added to the gradients since they were zero
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
        small = batch.input_ids_BT.numel() < self.below
        if not (small and self.enabled and getattr(self.step_function, "replayable", False)):
            return self._eager(batch, totals)
        batch = batch.with_filled_index(INDEX_MULTIPLE)
        key = (*batch.input_ids_BT.shape, batch.rows, len(batch.answer_index_N), len(batch.real_index_N))
        if key in self.graphs:
            self._empty = False
            return self.graphs[key].replay(batch, totals)
        if key not in self.seen or len(self.graphs) >= MAX_GRAPHS:
            self.seen.add(key)
            return self._eager(batch, totals)
        return self._first_replay(key, batch, totals)

    def _eager(self, batch: Batch, totals: Totals) -> dict[str, Tensor | float]:
        self._empty = False
        return super().add(batch, totals)

    def _first_replay(self, key: tuple[int, ...], batch: Batch, totals: Totals) -> dict[str, Tensor | float]:
        """Capture a graph and take its gradients, if they are those of an eager run of the same micro-batch."""
        grads: list[Tensor] = [p.grad for p in self.parameters]  # type: ignore[misc]
        held = None if self._empty else [grad.clone() for grad in grads]
        torch._foreach_zero_(grads)
        self._eager(batch, totals)
        want = _norms(grads)
        torch._foreach_zero_(grads)
        graph = self._capture(batch, totals)
        results: dict[str, Tensor | float] | None = None
        if graph is not None:
            results = graph.replay(batch, totals)
            wrong = differing(want, _norms(grads))
            if wrong:
                log.warning(
                    "CUDA graphs: %d of %d gradients differ from the eager step's, %s to %s; training goes on without",
                    len(wrong),
                    len(grads),
                    self.names[wrong[0]],
                    self.names[wrong[-1]],
                )
                self.enabled, results = False, None
                self.graphs.clear()
                torch._foreach_zero_(grads)
            else:
                self.graphs[key] = graph
        if held is not None:
            torch._foreach_add_(grads, held)
        return self._eager(batch, totals) if results is None else results

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
            log.warning("CUDA graphs: capture failed, training goes on without: %s", first_cause(error))
            torch.cuda.synchronize(self.device)
            return None
        return _Graph(graph, static, scalars, results)

    def clear(self, optimizer: OptimizerSet) -> None:
        torch._foreach_zero_([p.grad for p in self.parameters])  # type: ignore[misc]
        self._empty = True


def _norms(tensors: list[Tensor]) -> list[float]:
    return torch.stack(torch._foreach_norm(tensors)).tolist()  # type: ignore[no-any-return]


def differing(want: list[float], got: list[float]) -> list[int]:
    """Indices of norms that are not the same but for rounding; where both are not finite, the batch is the cause."""
    whole = math.hypot(*(norm for norm in want if math.isfinite(norm)))
    return [
        index
        for index, (a, b) in enumerate(zip(want, got, strict=True))
        if not (
            abs(a - b) <= SAME_NORM * a + NEGLIGIBLE * whole or not (math.isfinite(a) or math.isfinite(b))
        )
    ]


def first_cause(error: BaseException) -> str:
    """What went wrong first, and where in this package: the end of a capture fails as well and hides it."""
    while error.__context__ is not None:
        error = error.__context__
    ours = [f for f in traceback.extract_tb(error.__traceback__) if Path(f.filename).is_relative_to(PACKAGE)]
    place = f" ({Path(ours[-1].filename).name}, line {ours[-1].lineno})" if ours else ""
    return (str(error).strip() or type(error).__name__).splitlines()[0] + place


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
