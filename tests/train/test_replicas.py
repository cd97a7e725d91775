"""Stage 2 in several processes: the same training as in one, resumable, and with an error when one of them ends."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from bitdistill import pipeline
from bitdistill.config import Optim
from bitdistill.errors import RecipeError
from bitdistill.models.student import load_student
from bitdistill.train.replicas import Replicas, rows_at_a_time
from tests.stages.conftest import recipe
from tests.stages.conftest import work as work

STEPS = ("pretrain.budget_tokens=1280", "pretrain.loop.log_every_steps=1")  # 10 of 128 tokens


def base(
    work: Path, name: str, *options: str
) -> tuple[dict[str, torch.Tensor], list[dict[str, float]], Path]:
    """Weights, log lines and folder of a ternary base in a cache of its own."""
    result = pipeline.run(
        recipe(work, f"name={name}", f"pretrain.cache_dir={work}/{name}", *STEPS, *options),
        until="pretrain", stats=False, quiet=True,
    )  # fmt: skip
    folder = Path(json.loads((result.run_dir / "base.json").read_text())["path"])
    lines = (result.run_dir / "logs/pretrain.jsonl").read_text().splitlines()
    model, _, _ = load_student(folder)
    return {k: v.clone() for k, v in model.state_dict().items()}, [json.loads(x) for x in lines], folder


def assert_close(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    """Equal but for the order of float sums, where Adam may turn a rounding into a step of either sign."""
    rate = Optim(learning_rate=1e-3).learning_rate
    for name, weight in one.items():
        apart = (weight - other[name]).abs()
        assert apart.mean() < 0.02 * rate, name
        assert apart.max() < 4 * rate, name


@given(st.integers(1, 300), st.integers(1, 300), st.integers(1, 9))
def test_every_process_gets_a_micro_batch(batch_rows: int, rows: int, processes: int) -> None:
    processes = min(processes, batch_rows)
    size = rows_at_a_time(batch_rows, rows, processes)
    assert 1 <= size <= rows
    starts = range(0, batch_rows, size)
    shares = [Replicas(rank, processes).share(starts) for rank in range(processes)]
    assert all(shares)
    assert sorted(start for share in shares for start in share) == list(starts)


def test_equal_shares_where_rows_divide() -> None:
    assert [rows_at_a_time(32, 32, n) for n in (1, 2, 4, 8)] == [32, 16, 8, 4]
    assert rows_at_a_time(32, 6, 2) == 6  # 6, 6 and 4 rows, or so, for each
    assert rows_at_a_time(32, 8, 3) == 6  # six micro-batches, not four


def test_one_process_exchanges_nothing() -> None:
    alone, parameter = Replicas(), nn.Parameter(torch.ones(3))
    parameter.grad = torch.tensor([1.0, 2.0, 3.0])
    alone.sum_gradients([parameter])
    alone.check_equal([parameter], 1)
    assert parameter.grad.tolist() == [1.0, 2.0, 3.0]
    assert alone.total({"loss": 0.5}) == {"loss": 0.5}
    assert alone.any(True)
    assert not alone.any(False)
    assert alone.share([1, 2]) == [1, 2]


def test_more_processes_than_rows_are_refused(work: Path) -> None:
    with pytest.raises(RecipeError, match=r"pretrain\.processes: 9 for 8 rows"):
        base(work, "nine", "pretrain.processes=9")


def test_more_processes_than_gpus_are_refused(monkeypatch: pytest.MonkeyPatch, work: Path) -> None:
    from bitdistill.stages.pretrain import _processes

    config = recipe(work, "pretrain.processes=3").pretrain
    assert config is not None
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    with pytest.raises(RecipeError, match=r"pretrain\.processes: 3, but 2 GPUs are visible"):
        _processes(config, torch.device("cuda"))
    auto = config.model_copy(update={"processes": "auto"})
    assert _processes(auto, torch.device("cuda")) == 2
    assert _processes(auto, torch.device("cpu")) == 1


def test_two_processes_train_what_one_does(work: Path) -> None:
    alone, lines, folder = base(work, "alone")
    shared, others, other_folder = base(work, "shared", "pretrain.processes=2")
    assert folder.name == other_folder.name  # one key: the cache serves both
    assert_close(alone, shared)
    assert [line["tokens"] for line in lines] == [line["tokens"] for line in others]
    for line, other in zip(lines, others, strict=True):
        assert other["loss"] == pytest.approx(line["loss"], rel=1e-3)
        assert other["grad_norm"] == pytest.approx(line["grad_norm"], rel=1e-2)
    assert not list((work / "runs/shared/checkpoints").glob("*/step-*"))


@pytest.mark.distributed
def test_rows_that_do_not_divide_train_alike(work: Path) -> None:
    options = (
        "pretrain.loop.batch_rows=5", "pretrain.loop.micro_batch_rows=2", "pretrain.budget_tokens=800",
        "pretrain.sampled_words=90",
    )  # fmt: skip
    alone, _, _ = base(work, "alone", *options)
    shared, _, _ = base(work, "shared", "pretrain.processes=3", *options)
    assert_close(alone, shared)


def begin(work: Path, name: str) -> subprocess.Popen[str]:
    """Two processes at a stage 2 that would take minutes, with a checkpoint every second step."""
    command = [
        sys.executable, "-m", "bitdistill.cli.main", "pretrain", "recipe.yaml", "--set", f"name={name}",
        "--set", "pretrain.processes=2", "--set", "pretrain.budget_tokens=1_280_000",
        "--set", "pretrain.loop.checkpoint_every_steps=2", "--set", "pretrain.loop.log_every_steps=1",
    ]  # fmt: skip
    process = subprocess.Popen(command, cwd=work, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while not list((work / f"runs/{name}/checkpoints/pretrain").glob("step-*/bitdistill.json")):
        assert process.poll() is None, process.stderr and process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.1)
    return process


def followers(leader: int) -> list[int]:
    """Processes that the leader has started."""
    lines = subprocess.run(["ps", "-eo", "pid,ppid,args"], capture_output=True, text=True, check=True).stdout
    split = [line.split(None, 2) for line in lines.splitlines()[1:]]
    return [int(f[0]) for f in split if int(f[1]) == leader and "stages.replica" in f[2]]


@pytest.mark.distributed
def test_a_signal_saves_stops_all_and_is_taken_up_again(work: Path) -> None:
    process = begin(work, "stopped")
    (follower,) = followers(process.pid)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130, said
    assert "a checkpoint is saved" in said
    with pytest.raises(ProcessLookupError):
        os.kill(follower, 0)
    newest = max((work / "runs/stopped/checkpoints/pretrain").glob("step-*"))
    step = int(newest.name.removeprefix("step-"))
    again = subprocess.Popen(process.args, cwd=work, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    root = newest.parent
    while max(int(p.name.removeprefix("step-")) for p in root.glob("step-????????")) <= step + 2:
        assert again.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.1)
    again.send_signal(signal.SIGTERM)
    again.communicate(timeout=60)
    assert again.returncode == 143
    log = [
        json.loads(x)["step"] for x in (work / "runs/stopped/logs/pretrain.jsonl").read_text().splitlines()
    ]
    assert log == list(range(1, len(log) + 1))  # every step once, those before the first signal too
    assert len(log) > step


@pytest.mark.distributed
def test_a_process_that_ends_early_is_named(work: Path) -> None:
    process = begin(work, "broken")
    (follower,) = followers(process.pid)
    os.kill(follower, signal.SIGKILL)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 10, said
    assert "process 1 ended with status -9" in said
    assert list((work / "runs/broken/checkpoints/pretrain").glob("step-*"))


@pytest.mark.distributed
def test_followers_end_with_a_killed_leader(work: Path) -> None:
    process = begin(work, "killed")
    (follower,) = followers(process.pid)
    process.kill()
    process.communicate(timeout=60)
    deadline = time.monotonic() + 30
    while Path(f"/proc/{follower}").exists():
        assert time.monotonic() < deadline
        time.sleep(0.2)


DIFFERENT = """
import sys
from pathlib import Path
import torch
from bitdistill.train import replicas
rank = int(sys.argv[1])
group = replicas.join(rank, 2, Path(sys.argv[2]), torch.device("cpu"))
weights = torch.ones(3)
group.check_equal([torch.nn.Parameter(weights)], 7)
group.check_equal([torch.nn.Parameter(weights + 1e-6 * rank)], 8)
"""


@pytest.mark.distributed
def test_copies_that_differ_are_an_error(tmp_path: Path) -> None:
    command = [sys.executable, "-c", DIFFERENT]
    both = [
        subprocess.Popen([*command, str(rank), str(tmp_path / "meeting")], stderr=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    for process in both:
        _, said = process.communicate(timeout=60)
        assert process.returncode != 0
        assert "DivergenceError: step 8: the copies of the student in 2 processes differ in 1 tensors" in said
