"""Runs of a sweep side by side: jobs in processes of their own, some to a GPU.

What several runs share (a teacher, a base, written rows) is a job of its own, made once and before the runs that
need it; a base takes GPUs for itself, with `pretrain.processes: auto` all idle ones but one. A run's last job makes
what is left and scores it. A job that runs out of memory beside others gets one more try alone; a shared job that
fails otherwise leaves its error to the runs that need it, which meet and record it as a sweep in one process does.

    python -m bitdistill.sweep.parallel JOB.json      what this module starts for each job
"""

from __future__ import annotations

import json
import logging
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal, Protocol

from bitdistill.artifact import hash_json
from bitdistill.config import Recipe
from bitdistill.errors import ArtifactError, Interrupted
from bitdistill.report import sweep_results as store
from bitdistill.report.sweep_results import RunResult, SweepResults
from bitdistill.sweep.run import check_units, failed_result, open_results, run_sweep, unfinished
from bitdistill.sweep.spec import Sweep, Unit, expand, load_sweep, only_rows, read_local
from bitdistill.train.loop import Signals

log = logging.getLogger("bitdistill")
SHARED = ("pretrain", "augment", "sft", "bitnet_sft")
"""Stages that are jobs of their own, in the order in which they start: what most runs wait for, and longest, first."""
POLL_S = 0.2
STOP_S = 120.0
"""How long jobs may take to save their checkpoints when they are told to stop."""


@dataclass
class Job:
    """One process: a run's shared stage, or the rest of a run (`until` is None)."""

    name: str
    unit: Unit
    until: str | None
    needs: frozenset[str] = frozenset()
    alone: bool = False
    """Takes a GPU for itself."""
    processes: int | Literal["auto"] = 1
    """Of a base: GPUs that it takes; auto: what is idle when it starts, but for one that is left to other jobs."""
    state: str = "waiting"
    """waiting, running, done, failed."""
    devices: tuple[int, ...] = ()


class Process(Protocol):
    """What a launcher gives back; subprocess.Popen is one."""

    def poll(self) -> int | None: ...
    def terminate(self) -> None: ...
    def kill(self) -> None: ...


@dataclass(frozen=True)
class Place:
    """Where jobs run."""

    gpus: tuple[str, ...]
    """As CUDA_VISIBLE_DEVICES names them; empty: the CPU."""
    slots: int
    """Jobs at a time on each GPU, or on the CPU."""

    @property
    def devices(self) -> int:
        return max(1, len(self.gpus))


def plan_jobs(units: Sequence[Unit], *, on_gpu: bool) -> list[Job]:
    """Jobs of a sweep's runs, in the order in which they are to start as soon as they can."""
    from bitdistill.pipeline import wanted_stages

    shared: dict[str, Job] = {}
    last: list[Job] = []
    for unit in units:
        needs = set()
        wanted = wanted_stages(None, unit.rows)
        for stage in () if unit.rows == ("teacher",) else SHARED:  # a teacher alone is all of its run
            if stage not in wanted or not _has(unit.recipe, stage):
                continue
            name = _job_name(unit, stage, unit.recipe)
            if stage == "pretrain":  # the same for every task of a model
                name = f"base-{_signature(unit.recipe, stage)}"
            job = Job(name, unit, stage)
            if on_gpu and stage == "pretrain" and unit.recipe.pretrain is not None:
                job.alone, job.processes = True, unit.recipe.pretrain.processes
            shared.setdefault(name, job)
            needs.add(name)
        last.append(Job(f"run-{unit.recipe.name}-seed{unit.seed}", unit, None, frozenset(needs)))
    for job in last:  # further teachers that are other runs' own are waited for, not trained twice
        job.needs |= shared.keys() & set(_further_teachers(job.unit))
    first = sorted(shared.values(), key=lambda job: SHARED.index(str(job.until)))
    return [*last, *first]


def _further_teachers(unit: Unit) -> Iterator[str]:
    """Names that the jobs of a run's further teachers have where they are other runs' own."""
    if (
        "bitdistill" not in unit.rows or unit.recipe.data.rows_per_label is not None
    ):  # each seed has rows of its own
        return
    for n in range(1, unit.recipe.distill.teachers):
        yield _job_name(unit, "sft", unit.recipe.model_copy(update={"seed": unit.recipe.seed + n}))


def _job_name(unit: Unit, stage: str, recipe: Recipe) -> str:
    return f"{unit.recipe_name}--{stage}-{_signature(recipe, stage)}"


def _has(recipe: Recipe, stage: str) -> bool:
    if stage == "pretrain":
        return recipe.pretrain is not None and recipe.pretrain.base is None
    return stage == "sft" or getattr(recipe, stage) is not None


def _signature(recipe: Recipe, stage: str) -> str:
    """Equal for runs whose stage is the same work. Stage keys are not known before the data are read; where they are
    equal and these are not, work is done twice, never wrongly."""
    tree = recipe.model_dump(mode="json", by_alias=True)
    sections = {
        "sft": ("model", "task", "data", "sft", "seed"),
        "augment": ("model", "task", "data", "sft", "augment"),
        "bitnet_sft": ("model", "task", "data", "bitnet_sft", "seed"),
        "pretrain": ("model", "refine", "pretrain"),
    }[stage]
    about = {name: tree[name] for name in (*sections, "device")}
    if stage == "sft" and recipe.teacher is not None:
        about["model"] = tree["teacher"]
    own_seed = (tree[stage] or {}).get("seed") if stage in ("augment", "pretrain") else 0
    if own_seed is None:
        about["seed"] = tree["seed"]
    if stage == "bitnet_sft" and recipe.bitnet_sft is not None and recipe.bitnet_sft.calibrated:
        about["calibration"] = [recipe.refine.calibration_rows, recipe.refine.calibration_length]
    return hash_json(about)[:8]


@dataclass
class Scheduler:
    """Starts jobs as their needs are met and slots are free.

    Args:
        launch: starts a job on devices (indices).
        ended: told about each job that has ended, with its exit status; returns "done", "failed" or "again" (once more,
            alone).
    """

    jobs: list[Job]
    place: Place
    launch: Callable[[Job, tuple[int, ...]], Process]
    ended: Callable[[Job, int], str]
    running: dict[str, Process] = field(default_factory=dict)

    def weight(self, job: Job) -> int:
        return self.place.slots if job.alone else 1

    def load(self, device: int) -> int:
        return sum(self.weight(j) for j in self.jobs if j.state == "running" and device in j.devices)

    def places(self, job: Job, free: list[int], ready: list[Job]) -> tuple[int, ...]:
        """Devices for a job among those that are free to start on; none: it waits."""
        least = min(free, key=self.load)
        idle = [d for d in free if self.load(d) == 0]
        if not job.alone or job.processes == 1:
            return (least,) if self.load(least) + self.weight(job) <= self.place.slots else ()
        if job.processes == "auto":
            bases = sum(other.processes == "auto" and other.alone for other in ready)
            others = len(ready) > bases
            return tuple(idle[: max(1, (len(idle) - others) // bases)])
        count = min(job.processes, self.place.devices)  # more than there are: its own process says so
        return tuple(idle[:count]) if len(idle) >= count else ()

    def step(self) -> bool:
        """Take in what has ended and start what can start; False when all is over."""
        for job in self.jobs:
            status = self.running[job.name].poll() if job.state == "running" else None
            if status is not None:
                del self.running[job.name]
                verdict = self.ended(job, status)
                job.state = "waiting" if verdict == "again" else verdict
                job.alone = job.alone or verdict == "again"
        over = {job.name for job in self.jobs if job.state in ("done", "failed")}
        kept_free: set[int] = set()
        ready = [job for job in self.jobs if job.state == "waiting" and job.needs <= over]
        for job in list(ready):
            free = sorted(set(range(self.place.devices)) - kept_free, key=lambda d: (self.load(d), d))
            if not free:
                break
            devices = self.places(job, free, ready)
            if not devices:
                # One that needs devices for itself would wait for ever if smaller ones went on filling them.
                count = job.processes if isinstance(job.processes, int) else 1
                kept_free |= set(free[:count]) if job.alone else set()
                continue
            ready.remove(job)
            job.state, job.devices = "running", devices
            self.running[job.name] = self.launch(job, devices)
        return any(job.state in ("waiting", "running") for job in self.jobs)

    def stop(self) -> None:
        stop_processes(list(self.running.values()))


def stop_processes(processes: Sequence[Process]) -> None:
    """Tell all to stop, wait for their checkpoints, and kill what does not end."""
    for process in processes:
        process.terminate()
    deadline = time.monotonic() + STOP_S
    while any(p.poll() is None for p in processes) and time.monotonic() < deadline:
        time.sleep(POLL_S)
    for process in processes:
        if process.poll() is None:
            process.kill()


@dataclass(frozen=True)
class Order:
    """What a job's process is told."""

    spec: str
    overrides: list[str]
    local: str | None
    unit: str
    rows: tuple[str, ...]
    until: str | None
    name: str
    out: str
    command: str


def run_parallel(
    sweep: Sweep,
    units: Sequence[Unit],
    out: Path,
    *,
    spec: Path,
    overrides: Sequence[str],
    local: Path | None,
    order: Sequence[str],
    place: Place,
    command: str = "",
    again: bool = False,
) -> SweepResults:
    """`run_sweep` with several jobs at a time; results are the same, costs in seconds are those of shared devices.

    Args:
        spec, overrides, local: what the units were expanded from, for the jobs' processes.
        place: where jobs run, and how many at a time.

    Raises:
        Interrupted: a signal came; jobs were told to save checkpoints, and what is done is in `out`.
        StorageError, ArtifactError: as `run_sweep`.
    """
    found = open_results(sweep, out, command)
    todo, bad = check_units(unfinished(found, units, again))
    for result in bad:
        found = store.with_run(found, result, order)
        store.write(out, found)
    if not todo:
        return found
    folder = Path(todo[0].recipe.output_dir).expanduser() / f"sweep-{sweep.name}"
    folder.mkdir(parents=True, exist_ok=True)
    base = ["bitdistill", "sweep", str(spec)]
    base += [] if local is None else ["--local", str(local)]
    base += [word for text in overrides for word in ("--set", text)]
    started: dict[str, float] = {}

    def launch(job: Job, devices: tuple[int, ...]) -> subprocess.Popen[bytes]:
        written = folder / f"{job.name}.json"
        written.unlink(missing_ok=True)
        told = Order(
            str(spec), list(overrides), None if local is None else str(local), job.unit.id, job.unit.rows, job.until,
            job.name, str(written), shlex.join([*base, "--only", job.unit.id]),
        )  # fmt: skip
        orders = folder / f"{job.name}.job.json"
        orders.write_text(json.dumps(asdict(told), indent=1) + "\n", "utf-8")
        where = f" on GPU {', '.join(place.gpus[d] for d in devices)}" if place.gpus else ""
        log.info("sweep: %s starts%s", _named(job), where)
        started[job.name] = time.monotonic()
        with (folder / f"{job.name}.log").open("ab") as lines:
            return subprocess.Popen(
                [sys.executable, "-m", "bitdistill.sweep.parallel", str(orders)],
                stdin=subprocess.DEVNULL, stdout=lines, stderr=lines, env=environment_of(place, devices),
                start_new_session=True,
            )  # fmt: skip

    def ended(job: Job, status: int) -> str:
        nonlocal found
        took = (time.monotonic() - started[job.name]) / 60
        result = None if job.until else _result(folder / f"{job.name}.json", job.unit)
        ok = status == 0 and (job.until is not None or (result is not None and result.status == "done"))
        if not ok and not job.alone and _out_of_memory(folder / f"{job.name}.log", result):
            log.warning("sweep: %s ran out of memory beside others; once more, alone", _named(job))
            return "again"
        if job.until is None:
            if result is None:
                last = _last_line(folder / f"{job.name}.log")
                result = failed_result(job.unit, f"exit status {status}: {last}")
            found = store.with_run(found, result, order)
            store.write(out, found)
        say = log.info if ok else log.error
        say("sweep: %s %s after %.1f minutes", _named(job), "is done" if ok else "failed", took)
        return "done" if ok else "failed"

    scheduler = Scheduler(plan_jobs(todo, on_gpu=bool(place.gpus)), place, launch, ended)
    with Signals().installed() as signals:
        try:
            while scheduler.step():
                if signals.received is not None:
                    raise Interrupted(
                        f"sweep: stopped by signal {signals.received}; the same command goes on from the checkpoints",
                        signals.received,
                    )
                time.sleep(POLL_S)
        finally:  # also when the results cannot be written: no job is left behind
            scheduler.stop()
    return found


def _named(job: Job) -> str:
    return job.unit.id if job.until is None else f"{job.unit.id}, {job.until}"


def environment_of(place: Place, devices: tuple[int, ...]) -> dict[str, str]:
    """Of a job's process on these devices."""
    environment = dict(os.environ)
    if place.gpus:
        environment["CUDA_VISIBLE_DEVICES"] = ",".join(place.gpus[d] for d in devices)
    # Processes that each take every core are in one another's way
    threads = max(1, (os.cpu_count() or 1) // (place.slots * place.devices))
    environment.setdefault("OMP_NUM_THREADS", str(threads))
    return environment


def _result(path: Path, unit: Unit) -> RunResult | None:
    try:
        return store.read(path).find(unit.recipe_name, unit.cell, unit.seed)
    except ArtifactError:
        return None


def _out_of_memory(log_file: Path, result: RunResult | None) -> bool:
    said = result.error if result is not None else _last_line(log_file, lines=40)
    return "out of memory" in said.lower()


def _last_line(path: Path, lines: int = 1) -> str:
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - 16_384))
            text = file.read().decode("utf-8", "replace")
    except OSError:
        return ""
    kept = [line.strip() for line in text.replace("\r", "\n").splitlines() if line.strip()]
    return " ".join(kept[-lines:])


def run_job(order: Order) -> None:
    """Do one job in this process.

    Raises:
        BitDistillError: a shared stage failed. A run's own failure is recorded in its results.
    """
    spec = Path(order.spec)
    sweep = load_sweep(spec)
    local = None if order.local is None else read_local(Path(order.local))
    found = expand(sweep, spec.resolve().parent, overrides=order.overrides, local=local, only=[order.unit])
    (unit,) = only_rows(found, order.rows)
    if order.until is None:
        run_sweep(sweep, [unit], Path(order.out), order=[unit.id], command=order.command, again=True)
        return
    from bitdistill import pipeline
    from bitdistill.stages.reuse import Reuse

    reuse = Reuse.of_runs(Path(unit.recipe.output_dir).expanduser())
    recipe = unit.recipe.model_copy(update={"name": order.name})
    pipeline.run(
        recipe,
        until=order.until,
        rows=unit.rows,
        reuse=reuse,
        stats=False,
        command=order.command,
        quiet=False,
    )


def main(arguments: Sequence[str]) -> int:
    """Exit status 0, or that of the error."""
    from bitdistill.errors import BitDistillError

    logging.basicConfig(format="[%(asctime)s] %(message)s", datefmt="%X", level=logging.WARNING)
    log.setLevel(logging.INFO)
    try:
        run_job(Order(**json.loads(Path(arguments[0]).read_text("utf-8"))))
    except BitDistillError as error:
        log.error("%s", error)
        return int(getattr(error, "exit_code", 1))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
