"""Metrics of a run: always metrics.jsonl lines, a progress bar for people, optional adapters."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from bitdistill.config import TrackConfig
from bitdistill.errors import MissingDependencyError

LINE_EVERY_S = 15.0
"""Seconds between two lines of progress where there is no terminal."""


class Sink(Protocol):
    """An extra receiver of metrics (tensorboard, trackio)."""

    def log(self, stage: str, step: int, metrics: Mapping[str, float]) -> None: ...

    def close(self) -> None: ...


class _Tensorboard:
    def __init__(self, run_dir: Path, name: str) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise MissingDependencyError(
                "track.tensorboard: the package is not installed; pip install 'bitdistill[track]'"
            ) from None
        self.writer = SummaryWriter(str(run_dir / "tensorboard"))

    def log(self, stage: str, step: int, metrics: Mapping[str, float]) -> None:
        for key, value in metrics.items():
            self.writer.add_scalar(f"{stage}/{key}", value, step)

    def close(self) -> None:
        self.writer.close()


class _Trackio:
    def __init__(self, run_dir: Path, name: str) -> None:
        try:
            import trackio
        except ImportError:
            raise MissingDependencyError(
                "track.trackio: the package is not installed; pip install 'bitdistill[track]'"
            ) from None
        self.trackio = trackio
        trackio.init(project="bitdistill", name=name)

    def log(self, stage: str, step: int, metrics: Mapping[str, float]) -> None:
        self.trackio.log(
            {f"{stage}/{key}": value for key, value in metrics.items()} | {f"{stage}/step": step}
        )

    def close(self) -> None:
        self.trackio.finish()


SINKS: dict[str, Callable[[Path, str], Sink]] = {"tensorboard": _Tensorboard, "trackio": _Trackio}


def open_sinks(config: TrackConfig, run_dir: Path, name: str) -> list[Sink]:
    """The adapters that the recipe asks for.

    Raises:
        MissingDependencyError: one is asked for and not installed.
    """
    return [SINKS[key](run_dir, name) for key, wanted in config.model_dump().items() if wanted]


def truncate_log(path: Path, last_step: int) -> None:
    """Drop log lines after `last_step`, so that a resumed run's log equals an uninterrupted one's."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text("utf-8").splitlines():
        try:
            entry = json.loads(line)
        except ValueError:
            continue  # the line that a kill cut short
        if entry.get("step", 0) <= last_step:
            kept.append(line)
    partial = path.with_suffix(".partial")
    partial.write_text("".join(line + "\n" for line in kept), "utf-8")
    os.replace(partial, path)


class Tracker:
    """Writes one stage's metrics and shows its progress; use as a context manager.

    Args:
        stage: name of the stage, also of its log file `logs/<stage>.jsonl`.
        run_dir: the run's folder.
        total_steps: optimizer steps of the stage.
        sinks: extra receivers.
        quiet: no progress on stderr.
    """

    def __init__(
        self,
        stage: str,
        run_dir: Path,
        total_steps: int,
        *,
        sinks: list[Sink] | None = None,
        quiet: bool = False,
    ) -> None:
        self.stage, self.total_steps = stage, total_steps
        self.path = run_dir / "logs" / f"{stage}.jsonl"
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.sinks = sinks or []
        self.console = Console(stderr=True, quiet=quiet)
        self.live = self.console.is_terminal
        self._progress = Progress(
            TextColumn("[bold]{task.fields[stage]:<11}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[summary]}"),
            TextColumn("ETA"),
            TimeRemainingColumn(compact=True, elapsed_when_finished=True),
            console=self.console,
            disable=quiet or not self.live,
            speed_estimate_period=60.0,
        )
        self._task = self._progress.add_task(stage, total=total_steps, stage=stage, summary="")
        self._printed_at = time.monotonic()

    def __enter__(self) -> Tracker:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def advance(self, step: int) -> None:
        """Show that `step` optimizer steps are done."""
        self._progress.update(self._task, completed=step)

    def log(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Write one line of metrics for `step` (1-based count of finished steps)."""
        entry = {"stage": self.stage, "step": step, "steps": self.total_steps, **metrics}
        with self.path.open("a", encoding="utf-8") as handle:
            handle.write(json.dumps(entry) + "\n")
        numbers = {k: float(v) for k, v in metrics.items() if isinstance(v, int | float)}
        for sink in self.sinks:
            sink.log(self.stage, step, numbers)
        summary = (
            f"loss {numbers.get('loss', float('nan')):.4g}  {_rate(numbers.get('tokens_per_s', 0.0))} tok/s"
        )
        self._progress.update(self._task, completed=step, summary=summary)
        if not self.live:
            self._print_line(step, summary, numbers)

    def _print_line(self, step: int, summary: str, numbers: Mapping[str, float]) -> None:
        """Without a terminal: a line every 15 s and at the end, not a bar."""
        now = time.monotonic()
        if step < self.total_steps and now - self._printed_at < LINE_EVERY_S:
            return
        self._printed_at = now
        elapsed = numbers.get("elapsed_s", 0.0)
        left = elapsed / max(step, 1) * (self.total_steps - step)
        self.console.print(
            f"{self.stage:<11} {step}/{self.total_steps}  {summary}  ETA {left:.0f}s",
            highlight=False,
            soft_wrap=True,
        )
        sys.stderr.flush()


class WorkProgress:
    """Shows how far work has come that is no training, such as scoring; use as a context manager.

    A bar in a terminal, gone when the work is done; elsewhere a line every 15 s.

    Args:
        what: a word for the work.
        unit: what is counted.
        quiet: nothing on stderr.
    """

    def __init__(self, what: str, unit: str = "rows", *, quiet: bool = False) -> None:
        self.what, self.unit = what, unit
        self.console = Console(stderr=True, quiet=quiet)
        self._bar = Progress(
            TextColumn(f"[bold]{what:<11}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn(f"{unit}  {{task.fields[rate]}}  ETA"),
            TimeRemainingColumn(compact=True),
            console=self.console,
            disable=quiet or not self.console.is_terminal,
            transient=True,
            refresh_per_second=4,
            speed_estimate_period=60.0,
        )
        self._task = self._bar.add_task(what, total=None, rate="", visible=False)

    def __enter__(self) -> WorkProgress:
        self._begun = self._printed_at = time.monotonic()
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def __call__(self, done: int, total: int) -> None:
        """So many are done of so many. The clock starts anew where none is: what came before was getting ready."""
        now = time.monotonic()
        if not done:
            self._begun = now
        per_s = done / max(now - self._begun, 1e-9)
        rate = f"{_rate(per_s) if per_s >= 10 else f'{per_s:.1f}'}/s" if done else ""
        self._bar.update(self._task, completed=done, total=total, rate=rate, visible=True)
        if self.console.is_terminal or done >= total or now - self._printed_at < LINE_EVERY_S:
            return
        self._printed_at = now
        speed = f"  {rate}  ETA {(total - done) / per_s:.0f}s" if done else ""
        self.console.print(
            f"{self.what:<11} {done}/{total} {self.unit}{speed}", highlight=False, soft_wrap=True
        )
        sys.stderr.flush()


def _rate(tokens_per_s: float) -> str:
    for unit, size in (("M", 1e6), ("k", 1e3)):
        if tokens_per_s >= size:
            return f"{tokens_per_s / size:.1f}{unit}"
    return f"{tokens_per_s:.0f}"
