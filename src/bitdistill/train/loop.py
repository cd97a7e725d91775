"""The one training loop. A stage gives batches and a step function; the maths lives in the step.

Data order is a pure function of (seed, step), the learning rate of (step, total), so a checkpoint is
weights, optimizer moments, RNG and a step count, and resuming is bit-identical at equal threads.
"""

from __future__ import annotations

import contextlib
import logging
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from bitdistill.config import Loop, Optim
from bitdistill.data.batches import Batch
from bitdistill.errors import DivergenceError, Interrupted
from bitdistill.train import checkpoint
from bitdistill.train.gradients import (
    EagerGradients,
    Gradients,
    ReplayedGradients,
    replayed_below,
)
from bitdistill.train.optim import OptimizerSet, build_optimizer, describe_rate, learning_rate_at
from bitdistill.train.replicas import ALONE, CHECK_EVERY_STEPS, Replicas
from bitdistill.train.step import StepFunction, Totals
from bitdistill.train.tracking import Tracker, truncate_log

log = logging.getLogger("bitdistill")
MAX_SKIPPED_IN_A_ROW = 10
LOOKED_AT = 16
"""Steps whose micro-batches tell whether any is small enough for a CUDA graph: gradients that graphs write to stay
allocated between steps."""


class Batches(Protocol):
    """Micro-batches as a pure function of the step number."""

    def micro_batches(self, step: int) -> list[Batch]: ...


class Stateful(Protocol):
    """Extra state of a step function (such as the gamma balance) that must survive a resume."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


@dataclass(frozen=True)
class FitResult:
    """What a stage did: optimizer steps, tokens seen (over all resumes), seconds of training."""

    steps: int
    tokens: int
    elapsed_s: float
    skipped_steps: int
    final_loss: float
    device_s: float = 0.0
    """Seconds of all processes that trained side by side, each of them counted."""


class Signals:
    """SIGINT and SIGTERM ask the loop to save and stop; a second SIGINT stops at once."""

    def __init__(self) -> None:
        self.received: int | None = None

    def _handle(self, number: int, frame: Any) -> None:
        if self.received is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = number

    @contextlib.contextmanager
    def installed(self) -> Iterator[Signals]:
        if threading.current_thread() is not threading.main_thread():
            yield self
            return
        before = {n: signal.signal(n, self._handle) for n in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def fit(
    model: nn.Module,
    batches: Batches,
    step_function: StepFunction,
    *,
    optim: Optim,
    loop: Loop,
    total_steps: int,
    device: torch.device,
    tracker: Tracker,
    checkpoint_root: Path,
    key: str,
    state: Stateful | None = None,
    before_step: Callable[[int], None] | None = None,
    replicas: Replicas = ALONE,
    fused: bool = False,
) -> FitResult:
    """Train `model` in place for `total_steps` optimizer steps, resuming from `checkpoint_root` if it can.

    Args:
        step_function: forward and loss of one micro-batch; its loss is summed over the step.
        key: hash of everything that determines the result; a checkpoint with another key is refused.
        state: extra state saved in checkpoints.
        before_step: called with the step number before each step (for schedules such as the ternary warm-up).
        replicas: this process among several that train copies of the model, each called with the same arguments.
            Only the one that leads writes logs and checkpoints.
        fused: the model's layers are fused, so that `cuda_graphs: auto` replays larger steps too.

    Raises:
        DivergenceError: non-finite loss or gradient and `loop.on_nonfinite` is "stop", or 10 in a row.
        Interrupted: a signal came; a checkpoint was saved first.
        ReplicaError: another process ended too early.
    """
    optimizer = build_optimizer(model, optim)
    if replicas.leads:
        log.info("%s: %s", tracker.stage, describe_rate(model, optim))
        checkpoint.require_space(checkpoint_root, model)
    done = checkpoint.restore(checkpoint_root, model, optimizer, key) or {}
    if "elapsed_s" in done:  # of a checkpoint from before several processes could train
        done.setdefault("device_s", done["elapsed_s"])
    progress = _Progress(**{k: done[k] for k in _Progress.__dataclass_fields__ if k in done})
    if state is not None and "extra" in done:
        state.load_state_dict(done["extra"])
    if replicas.leads:
        truncate_log(tracker.path, progress.step)
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    parameters = [p for p in model.parameters() if p.requires_grad]
    replicas.check_equal(parameters, progress.step)
    gradients: Gradients = EagerGradients(step_function, device, loop.precision)
    weights = sum(p.numel() for p in parameters)
    below = replayed_below(loop, device, weights, fused)
    if below and _fewest_tokens(batches, total_steps) < below:
        gradients = ReplayedGradients(
            step_function,
            dict(zip(names, parameters, strict=True)),
            device,
            loop.precision,
            among_others=replicas.size > 1,
            below=below,
        )
    saved_at = time.monotonic()

    def save() -> None:
        extra = {} if state is None else {"extra": state.state_dict()}
        checkpoint.save(checkpoint_root, progress.step, model, optimizer, {**vars(progress), **extra}, key)

    model.train()
    with Signals().installed() as signals, tracker, gradients.stream():
        tracker.advance(progress.step)
        while progress.step < total_steps:
            started = time.perf_counter()
            if before_step is not None:
                before_step(progress.step)
            micro_batches = batches.micro_batches(progress.step)
            rate = learning_rate_at(progress.step, total_steps, optim)
            metrics, wrong = update(
                parameters, optimizer, micro_batches, gradients, rate, optim.grad_clip, replicas
            )
            _note_nonfinite(metrics, [names[index] for index in wrong], progress, loop, micro_batches)
            progress.step += 1
            progress.tokens += sum(b.tokens for b in micro_batches)
            took = time.perf_counter() - started
            progress.elapsed_s += took
            progress.device_s += took * replicas.size
            if progress.step == total_steps or progress.step % CHECK_EVERY_STEPS == 0:
                replicas.check_equal(parameters, progress.step)
            logged = progress.step % loop.log_every_steps == 0 or progress.step == total_steps
            if logged and replicas.leads:
                _log(tracker, progress, metrics, rate)
            else:
                tracker.advance(progress.step)
            if replicas.any(signals.received is not None):
                if replicas.leads:
                    save()
                number = signals.received or signal.SIGTERM
                raise Interrupted(
                    f"{tracker.stage}: stopped by signal {number} at step {progress.step} of "
                    f"{total_steps}; a checkpoint is saved, the same command goes on from there",
                    number,
                )
            if replicas.leads and progress.step < total_steps and _due(loop, progress.step, saved_at):
                save()
                saved_at = time.monotonic()
    model.eval()
    return FitResult(
        progress.step,
        progress.tokens,
        progress.elapsed_s,
        progress.skipped_steps,
        progress.last_loss,
        progress.device_s,
    )


def _fewest_tokens(batches: Batches, total_steps: int) -> int:
    """Of a micro-batch among those of the first steps, padding included."""
    steps = range(min(LOOKED_AT, total_steps))
    return min(batch.input_ids_BT.numel() for step in steps for batch in batches.micro_batches(step))


@dataclass
class _Progress:
    step: int = 0
    tokens: int = 0
    elapsed_s: float = 0.0
    device_s: float = 0.0
    skipped_steps: int = 0
    skipped_in_a_row: int = 0
    last_loss: float = math.nan
    logged_tokens: int = 0
    logged_elapsed_s: float = 0.0


def _due(loop: Loop, step: int, saved_at: float) -> bool:
    if loop.checkpoint_every_steps is not None:
        return step % loop.checkpoint_every_steps == 0
    return time.monotonic() - saved_at >= loop.checkpoint_every_s


def update(
    parameters: list[nn.Parameter],
    optimizer: OptimizerSet,
    micro_batches: list[Batch],
    gradients: Gradients,
    learning_rate: float,
    grad_clip: float,
    replicas: Replicas = ALONE,
) -> tuple[dict[str, float], list[int]]:
    """One optimizer step; the update is left out when loss or gradient is not finite.

    Returns:
        loss, metrics and gradient norm; indices of the parameters whose gradients are not finite.
    """
    totals = Totals(
        rows=sum(b.rows for b in micro_batches),
        tokens=sum(b.tokens for b in micro_batches),
        answers=sum(len(b.answer_index_N) for b in micro_batches),
    )
    sums: dict[str, Tensor | float] = {}
    for batch in replicas.share(micro_batches):
        for name, value in gradients.add(batch, totals).items():
            sums[name] = sums.get(name, 0.0) + value
    replicas.sum_gradients(parameters)
    limit = grad_clip if grad_clip > 0 else math.inf
    given = [index for index, p in enumerate(parameters) if p.grad is not None]
    # As clip_grad_norm_ computes it; norms apart, because clipping by a NaN makes every gradient one
    norms = torch.stack(torch._foreach_norm([parameters[index].grad for index in given]))  # type: ignore[misc]
    sums["grad_norm"] = total = torch.linalg.vector_norm(norms)
    torch.nn.utils.clip_grads_with_norm_(parameters, limit, total)
    metrics = _to_host(sums)
    norm = metrics.pop("grad_norm")  # of the sum already
    metrics = {**replicas.total(metrics), "grad_norm": norm}
    wrong: list[int] = []
    if math.isfinite(metrics["loss"]) and math.isfinite(metrics["grad_norm"]):
        optimizer.set_learning_rate(learning_rate)
        optimizer.step()
    else:
        wrong = [given[k] for k in (~norms.isfinite()).nonzero().flatten().tolist()]
    gradients.clear(optimizer)
    return metrics, wrong


def _to_host(values: Mapping[str, Tensor | float]) -> dict[str, float]:
    """Scalars as floats, with one transfer for all that lie on the device."""
    tensors = {name: v for name, v in values.items() if isinstance(v, Tensor)}
    host = torch.stack([t.detach().double() for t in tensors.values()]).tolist()
    read = dict(zip(tensors, host, strict=True))
    return {name: read[name] if name in read else float(v) for name, v in values.items()}


def _note_nonfinite(
    metrics: dict[str, float], wrong: list[str], progress: _Progress, loop: Loop, batches: list[Batch]
) -> None:
    if math.isfinite(metrics["loss"]) and math.isfinite(metrics["grad_norm"]):
        progress.skipped_in_a_row = 0
        progress.last_loss = metrics["loss"]
        return
    progress.skipped_steps += 1
    progress.skipped_in_a_row += 1
    rows = [i for b in batches for i in b.indices][:8]
    place = (
        f"step {progress.step}: loss {metrics['loss']}, gradient norm {metrics['grad_norm']} "
        f"(rows {rows} and following); the update was not applied"
    )
    if wrong:  # the last one is the first that the backward pass reaches
        place += f"; {len(wrong)} gradients are not finite, {wrong[0]} to {wrong[-1]}"
    if loop.on_nonfinite == "stop" or progress.skipped_in_a_row >= MAX_SKIPPED_IN_A_ROW:
        # Never a finite step: neither the rate nor these rows can be it
        remedy = (
            "no step was finite, so try loop.cuda_graphs: false, and loop.kernels: reference if that does not help"
            if progress.skipped_steps > progress.step and loop.on_nonfinite != "stop"
            else "lower the learning rate or look at these rows"
        )
        raise DivergenceError(f"{place}; {remedy}")
    checkpoint.log.warning("%s", place)


def _log(tracker: Tracker, progress: _Progress, metrics: dict[str, float], rate: float) -> None:
    seconds = max(progress.elapsed_s - progress.logged_elapsed_s, 1e-9)
    tokens_per_s = (progress.tokens - progress.logged_tokens) / seconds
    progress.logged_tokens, progress.logged_elapsed_s = progress.tokens, progress.elapsed_s
    entry = {
        **metrics,
        "learning_rate": rate,
        "tokens": progress.tokens,
        "tokens_per_s": round(tokens_per_s, 1),
        "elapsed_s": round(progress.elapsed_s, 3),
    }
    tracker.log(progress.step, entry)
