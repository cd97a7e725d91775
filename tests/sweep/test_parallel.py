"""Sweeps with several processes: what becomes a job, when it starts, and that results are those of one process."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from bitdistill.errors import StorageError
from bitdistill.report import sweep_results
from bitdistill.sweep import parallel
from bitdistill.sweep.parallel import Job, Place, Scheduler, plan_jobs
from bitdistill.sweep.run import run_sweep
from bitdistill.sweep.spec import Unit, expand, load_sweep
from bitdistill.train.replicas import visible_gpus
from tests.stages.conftest import _one_thread, work  # noqa: F401

SWEEP = """
name: losses
recipes: [recipe.yaml]
seeds: [0, 1]
set: {pretrain.seed: 0}
cells:
  - {name: both, rows: [teacher, bitnet_sft, bitdistill]}
  - {name: ce, set: {distill.lambda: 0, distill.gamma: 0}}
  - {name: other-base, set: {pretrain.objective: lm}, seeds: [0]}
  - {name: teacher, rows: [teacher], set: {sft.epochs: 3}, seeds: [0]}
"""


def units_of(folder: Path, text: str = SWEEP) -> tuple[Path, list[Unit]]:
    path = folder / "sweep.yaml"
    path.write_text(text, "utf-8")
    return path, expand(load_sweep(path), path.parent)


def test_shared_stages_are_jobs_of_their_own(work: Path) -> None:  # noqa: F811
    _, units = units_of(work)
    jobs = plan_jobs(units, on_gpu=True)
    last = [job for job in jobs if job.until is None]
    shared = [job for job in jobs if job.until is not None]
    assert [job.unit.id for job in last] == [unit.id for unit in units]
    # Two bases (KL, LM), two teachers (by seed; three epochs are the last unit's own), two baselines
    assert [job.until for job in shared] == ["pretrain"] * 2 + ["sft"] * 2 + ["bitnet_sft"] * 2
    assert [job.alone for job in shared] == [True] * 2 + [False] * 4
    needs = {job.unit.id.partition("/")[2]: {n.split("-seed")[0] for n in job.needs} for job in last}
    assert needs["both/0"] - needs["ce/0"] == {shared[4].name}
    assert needs["ce/0"] & needs["ce/1"] == {shared[0].name}
    assert needs["other-base/0"] & needs["ce/0"] == {shared[2].name}
    assert needs["teacher/0"] == set()
    assert len({job.name for job in jobs}) == len(jobs)


def test_written_rows_start_before_teachers(work: Path) -> None:  # noqa: F811
    text = """
name: s
recipes: [recipe.yaml]
seeds: [0, 1]
set: {pretrain: null, bitnet_sft: null, augment.rows: 8, augment.seed: 0}
cells: [{name: a}]
"""
    _, units = units_of(work, text)
    shared = [job.until for job in plan_jobs(units, on_gpu=True) if job.until is not None]
    assert shared == ["augment", "sft", "sft"]  # every run waits for the one, each teacher holds up one


def test_further_teachers_of_sibling_runs_are_waited_for(work: Path) -> None:  # noqa: F811
    text = """
name: s
recipes: [recipe.yaml]
seeds: [0, 1, 2]
set: {pretrain: null, bitnet_sft: null}
cells: [{name: one}, {name: three, set: {distill.teachers: 3}}, {name: t, rows: [teacher], set: {distill.teachers: 3}}]
"""
    _, units = units_of(work, text)
    jobs = plan_jobs(units, on_gpu=False)
    own = [job.name for job in jobs if job.until == "sft"]
    assert len(own) == 3
    needs = {
        job.unit.id.partition("/")[2]: sorted(own.index(n) for n in job.needs)
        for job in jobs
        if not job.until
    }
    assert [needs[f"one/{n}"] for n in range(3)] == [[0], [1], [2]]
    # Teachers of seeds 3 and 4 are no run's own
    assert [needs[f"three/{n}"] for n in range(3)] == [[0, 1, 2], [1, 2], [2]]
    assert needs["t/0"] == []


@pytest.mark.parametrize(("subln", "jobs"), [("none", 1), ("paper", 2)])
def test_baselines_are_apart_where_their_calibration_is(work: Path, subln: str, jobs: int) -> None:  # noqa: F811
    text = f"""
name: s
recipes: [recipe.yaml]
seeds: [0]
set: {{bitnet_sft.subln: {subln}}}
cells:
  - {{name: a, rows: [bitnet_sft]}}
  - {{name: b, rows: [bitnet_sft], set: {{refine.calibration_rows: 7}}}}
"""
    _, units = units_of(work, text)
    assert [job.until for job in plan_jobs(units, on_gpu=False)].count("bitnet_sft") == jobs


@dataclass
class Fake:
    """A process that ends after some steps with a status."""

    left: int
    status: int = 0
    stopped: bool = False

    def poll(self) -> int | None:
        self.left -= 1
        return None if self.left >= 0 and not self.stopped else self.status

    def terminate(self) -> None:
        self.stopped = True

    def kill(self) -> None:
        raise AssertionError("it had ended")


def scheduled(
    jobs: list[Job], place: Place, verdicts: dict[str, list[str]] | None = None
) -> tuple[list[tuple[str, tuple[int, ...]]], list[dict[int, list[str]]]]:
    """Starts (job, devices) in their order, and what ran on each device after every step."""
    starts: list[tuple[str, tuple[int, ...]]] = []
    history: list[dict[int, list[str]]] = []
    verdicts = verdicts or {}

    def launch(job: Job, devices: tuple[int, ...]) -> Fake:
        starts.append((job.name, devices))
        return Fake(2 + len(job.name) % 2)

    def ended(job: Job, status: int) -> str:
        return verdicts[job.name].pop(0) if verdicts.get(job.name) else "done"

    scheduler = Scheduler(jobs, place, launch, ended)
    for _ in range(200):
        going = scheduler.step()
        history.append(
            {
                d: [j.name for j in jobs if j.state == "running" and d in j.devices]
                for d in range(place.devices)
            }
        )
        if not going:
            return starts, history
    raise AssertionError("it never ends")


def jobs_of(unit: Unit) -> list[Job]:
    return [
        Job("last-a", unit, None, frozenset({"base", "teacher-a"})),
        Job("last-b", unit, None, frozenset({"base", "teacher-b"})),
        Job("base", unit, "pretrain", alone=True),
        Job("teacher-a", unit, "sft"),
        Job("teacher-b", unit, "sft"),
        Job("teacher-c", unit, "sft"),
    ]


@pytest.mark.parametrize(("gpus", "slots"), [("", 1), ("0", 2), ("0,1", 2), ("4,7", 3)])
def test_jobs_wait_for_what_they_need_and_devices_are_not_overfull(work: Path, gpus: str, slots: int) -> None:  # noqa: F811
    _, units = units_of(work)
    place = Place(tuple(gpus.split(",")) if gpus else (), slots)
    starts, history = scheduled(jobs_of(units[0]), place)
    order = [name for name, _ in starts]
    assert sorted(order) == ["base", "last-a", "last-b", "teacher-a", "teacher-b", "teacher-c"]
    assert order[0] == "base"
    for a, b in (("base", "last-a"), ("teacher-a", "last-a"), ("base", "last-b"), ("teacher-b", "last-b")):
        assert order.index(a) < order.index(b)
    for running in history:
        for names in running.values():
            assert len(names) <= slots
            assert "base" not in names or len(names) == 1


@pytest.mark.parametrize(
    ("processes", "gpus", "taken"),
    [("auto", 1, 1), ("auto", 2, 1), ("auto", 4, 3), (2, 4, 2), (3, 2, 2), (1, 4, 1)],
)
def test_a_base_takes_the_idle_gpus_but_one(work: Path, processes: Any, gpus: int, taken: int) -> None:  # noqa: F811
    _, units = units_of(work)
    jobs = jobs_of(units[0])
    jobs[2].processes = processes
    starts, history = scheduled(jobs, Place(tuple("0123"[:gpus]), 2))
    devices = dict(starts)
    assert len(devices["base"]) == taken
    assert sorted(devices) == ["base", "last-a", "last-b", "teacher-a", "teacher-b", "teacher-c"]
    for running in history:
        for names in running.values():
            assert "base" not in names or names == ["base"]
    if taken < gpus:  # others go on beside it
        assert any("base" in running[0] and running[gpus - 1] for running in history)


def test_several_bases_share_the_idle_gpus(work: Path) -> None:  # noqa: F811
    _, units = units_of(work)
    bases = [Job(f"base-{n}", units[0], "pretrain", alone=True, processes="auto") for n in "ab"]
    teacher = Job("teacher", units[0], "sft")
    starts, _ = scheduled([*bases, teacher], Place(tuple("01234"), 2))
    assert [len(devices) for _, devices in starts] == [2, 2, 1]
    starts, _ = scheduled(
        [Job("base", units[0], "pretrain", alone=True, processes="auto")], Place(tuple("0123"), 2)
    )
    assert starts == [("base", (0, 1, 2, 3))]  # nothing else waits for a GPU


def test_a_base_that_wants_several_gpus_gets_them_in_the_end(work: Path) -> None:  # noqa: F811
    """Smaller jobs, of which there are always some, do not keep it waiting."""
    _, units = units_of(work)
    jobs = [Job(f"teacher-{n}", units[0], "sft") for n in range(30)]
    base = Job("base", units[0], "pretrain", frozenset({"teacher-0"}), alone=True, processes=2)
    starts, _ = scheduled([base, *jobs], Place(tuple("012"), 2))
    order = [name for name, _ in starts]
    assert order.index("base") < 12
    assert len(dict(starts)["base"]) == 2


def test_a_job_gets_a_second_try_alone_and_failures_do_not_hold_others_up(work: Path) -> None:  # noqa: F811
    _, units = units_of(work)
    jobs = jobs_of(units[0])
    starts, history = scheduled(
        jobs, Place(("0",), 2), {"teacher-a": ["again", "failed"], "teacher-b": ["done"]}
    )
    assert [name for name, _ in starts].count("teacher-a") == 2
    assert {job.name: job.state for job in jobs} == {
        "last-a": "done", "last-b": "done", "base": "done",
        "teacher-a": "failed", "teacher-b": "done", "teacher-c": "done",
    }  # fmt: skip
    second = [running[0] for running in history if "teacher-a" in running[0]][-1]
    assert second == ["teacher-a"]


def test_no_process_is_left_when_results_cannot_be_written(
    work: Path,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path, units = units_of(work)
    started: list[Fake] = []

    def launch(*_: object, **__: object) -> Fake:
        started.append(Fake(10**6 if len(started) % 2 else 1, status=1))
        return started[-1]

    def full(*_: object) -> None:
        raise StorageError("no space left on device")

    monkeypatch.setattr(parallel.subprocess, "Popen", launch)
    monkeypatch.setattr(parallel.store, "write", full)
    with pytest.raises(StorageError, match="no space"):
        parallel.run_parallel(
            load_sweep(path), units, work / "out.json", spec=path, overrides=[], local=None,
            order=[u.id for u in units], place=Place((), 9),
        )  # fmt: skip
    assert len(started) > 1
    assert all(process.stopped or process.left < 0 for process in started)


def test_the_environment_of_a_job(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 12)
    environment = parallel.environment_of(Place(("3", "5"), 2), (1,))
    assert (environment["CUDA_VISIBLE_DEVICES"], environment["OMP_NUM_THREADS"]) == ("5", "3")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert parallel.environment_of(Place((), 2), (0,))["OMP_NUM_THREADS"] == "1"


def test_memory_errors_are_told_from_others(tmp_path: Path) -> None:
    lines = tmp_path / "a.log"
    lines.write_text("Traceback\ntorch.OutOfMemoryError: CUDA out of memory. Tried to\nerror: a bug\n")
    assert parallel._out_of_memory(lines, None)
    lines.write_text("sft 10/20\rsft 20/20\nerror: no such file\n")
    assert not parallel._out_of_memory(lines, None)
    assert parallel._last_line(lines) == "error: no such file"
    assert parallel._last_line(tmp_path / "none") == ""
    result = sweep_results.RunResult(
        recipe="r", cell="c", label="c", seed=0, digest="", status="failed", error="out of memory (x)"
    )
    assert parallel._out_of_memory(tmp_path / "none", result)


SMALL = """
name: losses
recipes: [recipe.yaml]
set: {bitnet_sft: null, pretrain.seed: 0, threads: 1}
cells:
  - {name: both}
  - {name: ce, set: {distill.lambda: 0, distill.gamma: 0}}
  - {name: broken, set: {data.train: none.jsonl}}
"""


def command(path: Path, out: Path, *more: str) -> list[str]:
    return [
        sys.executable,
        "-m",
        "bitdistill.cli.main",
        "sweep",
        str(path),
        "--out",
        str(out),
        "--parallel",
        "2",
        *more,
    ]


@pytest.mark.slow
def test_results_are_those_of_one_process(work: Path) -> None:  # noqa: F811
    path, units = units_of(work, SMALL)
    out = work / "out.json"
    done = subprocess.run(command(path, out), capture_output=True, text=True, check=False)
    assert done.returncode == 6, done.stderr[-2000:]  # one run failed
    found = sweep_results.read(out)
    assert [(r.cell, r.status) for r in found.runs] == [
        ("both", "done"),
        ("ce", "done"),
        ("broken", "failed"),
    ]
    assert "none.jsonl" in found.runs[2].error
    assert "base-" in " ".join(p.name for p in (work / "runs").iterdir())
    # A teacher and a base were made once: the runs hold links
    for cell in ("both", "ce"):
        (run,) = (work / "runs").glob(f"*--{cell}-*")
        assert (run / "teacher").is_symlink()
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        alone = run_sweep(
            load_sweep(path), expand(load_sweep(path), path.parent, overrides=[f"output_dir={work}/again"])[:2],
            work / "alone.json", order=[u.id for u in units], quiet=True,
        )  # fmt: skip
    finally:
        torch.set_num_threads(before)
    for mine, theirs in zip(alone.runs, found.runs, strict=False):
        assert [(r.name, r.predictions_sha256) for r in mine.rows] == [
            (r.name, r.predictions_sha256) for r in theirs.rows
        ]
        assert f"--only {theirs.recipe}/{theirs.cell}/0" in theirs.rows[-1].command
    # Again: what is done is left alone, what failed is tried once more
    again = subprocess.run(command(path, out, "--json"), capture_output=True, text=True, check=False)
    assert json.loads(again.stdout)["failed"] == ["tiny/broken/0"]
    assert "both/0 is done" in again.stderr


@pytest.mark.slow
def test_a_signal_stops_every_process_after_a_checkpoint(work: Path) -> None:  # noqa: F811
    path, _ = units_of(
        work, SMALL.replace("pretrain.seed: 0", "pretrain.seed: 0, pretrain.budget_tokens: 50_000_000")
    )
    out = work / "out.json"
    process = subprocess.Popen(command(path, out), stderr=subprocess.PIPE, text=True)
    logs = work / "runs/sweep-losses"

    def training() -> bool:
        return any("pretrain " in file.read_text("utf-8", "replace") for file in logs.glob("base-*.log"))

    deadline = time.monotonic() + 120
    while not training() and time.monotonic() < deadline:
        time.sleep(0.2)
    assert training()
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=120)
    assert process.returncode == 143, said[-2000:]
    (log,) = logs.glob("base-*.log")
    assert "a checkpoint is saved" in log.read_text("utf-8", "replace")
    alive = subprocess.run(
        ["pgrep", "-af", "bitdistill.sweep.paralle[l]"], capture_output=True, text=True, check=False
    )
    assert str(logs) not in alive.stdout


def test_gpus_are_named_as_the_environment_names_them(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert visible_gpus({}) == ("0", "1")
    assert visible_gpus({"CUDA_VISIBLE_DEVICES": "5,7"}) == ("5", "7")
    assert visible_gpus({"CUDA_VISIBLE_DEVICES": "GPU-a, GPU-b,GPU-c"}) == ("GPU-a", "GPU-b")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert visible_gpus({"CUDA_VISIBLE_DEVICES": ""}) == ()
