"""Data parallelism: copies of one student in processes of one machine, each with its share of a step's micro-batches.

Gradients are summed over the processes before each update, so all copies make the same update and stay equal; the sum
is that of one process in another order. The process that was called leads: it alone writes logs, checkpoints and the
artifact. The others follow it through `fit` and end with it.

Shape legend: N numbers of one gradient, flattened.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import logging
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from bitdistill.errors import DivergenceError, ReplicaError

log = logging.getLogger("bitdistill")
Item = TypeVar("Item")
BUCKET_BYTES = 256 << 20
"""Gradients are summed in buckets of about this size: few messages, and little memory beside the gradients."""
CHECK_EVERY_STEPS = 100
TIMEOUT = datetime.timedelta(minutes=30)
"""How long one process waits for another, which may be compiling."""
STOP_S = 60.0


def visible_gpus(environment: Mapping[str, str] = os.environ) -> tuple[str, ...]:
    """GPUs that this process may use, by the names that CUDA_VISIBLE_DEVICES takes."""
    count = torch.cuda.device_count()
    named = environment.get("CUDA_VISIBLE_DEVICES")
    names = [name.strip() for name in named.split(",")] if named else [str(n) for n in range(count)]
    return tuple(names[:count])


@dataclass
class Replicas:
    """This process among the copies. With `size` 1 nothing is exchanged."""

    rank: int = 0
    size: int = 1
    failed: list[str] = field(default_factory=list)
    """What became of processes that ended too early, for the error."""

    @property
    def leads(self) -> bool:
        """Whether this process writes logs and checkpoints."""
        return self.rank == 0

    def share(self, items: Sequence[Item]) -> Sequence[Item]:
        """This process's part of a step's micro-batches."""
        return items[self.rank :: self.size]

    def any(self, flag: bool) -> bool:
        """Whether `flag` is set in some process."""
        return self.total({"flag": float(flag)})["flag"] > 0 if self.size > 1 else flag

    def total(self, values: Mapping[str, float]) -> dict[str, float]:
        """Sums of host numbers, float64, over all processes; all must name the same ones."""
        if self.size == 1:
            return dict(values)
        names = sorted(values)
        sums = torch.tensor([values[name] for name in names], dtype=torch.float64)
        with self._peers():
            dist.all_reduce(sums)
        return dict(zip(names, sums.tolist(), strict=True))

    def sum_gradients(self, parameters: Sequence[nn.Parameter]) -> None:
        """Replace every gradient by its sum over all processes, in place."""
        if self.size == 1:
            return
        bucket: list[Tensor] = []
        for parameter in parameters:
            if parameter.grad is None:
                continue
            full = sum(g.nbytes for g in bucket) + parameter.grad.nbytes > BUCKET_BYTES
            if bucket and (full or bucket[0].dtype != parameter.grad.dtype):
                self._sum(bucket)
                bucket = []
            bucket.append(parameter.grad)
        if bucket:
            self._sum(bucket)

    def _sum(self, tensors: list[Tensor]) -> None:
        flat_N = torch.cat([t.reshape(-1) for t in tensors])
        with self._peers():
            dist.all_reduce(flat_N)
        parts = flat_N.split([t.numel() for t in tensors])
        torch._foreach_copy_(tensors, [p.view_as(t) for p, t in zip(parts, tensors, strict=True)])

    def check_equal(self, parameters: Sequence[nn.Parameter], step: int) -> None:
        """All copies must hold the same weights at the same step, to the last bit of their norms.

        Raises:
            DivergenceError: they do not.
        """
        if self.size == 1:
            return
        norms = torch._foreach_norm([p.detach() for p in parameters])
        own = torch.stack(
            [n.double().cpu() for n in norms] + [torch.tensor(float(step), dtype=torch.float64)]
        )
        own = own.nan_to_num(nan=-1.0)  # weights that are none are for the loop to notice
        low, high = own.clone(), own.clone()
        with self._peers():
            dist.all_reduce(low, dist.ReduceOp.MIN)
            dist.all_reduce(high, dist.ReduceOp.MAX)
        if not torch.equal(low, high):
            odd = int((low != high).sum())
            raise DivergenceError(
                f"step {step}: the copies of the student in {self.size} processes differ in {odd} tensors; "
                "train with pretrain.processes: 1, and report this"
            )

    @contextlib.contextmanager
    def _peers(self) -> Iterator[None]:
        """An exchange that breaks because another process has ended says which, and why."""
        try:
            yield
        except RuntimeError as error:  # dist.DistBackendError is one
            deadline = time.monotonic() + 5.0
            while self.leads and not self.failed and time.monotonic() < deadline:
                time.sleep(0.1)  # the watch is about to see it
            reason = "; ".join(self.failed) or str(error).splitlines()[0]
            raise ReplicaError(f"stage 2 in {self.size} processes: {reason}") from error
        if self.failed:
            raise ReplicaError(f"stage 2 in {self.size} processes: {'; '.join(self.failed)}")


ALONE = Replicas()


def rows_at_a_time(batch_rows: int, rows: int, processes: int) -> int:
    """Rows of a micro-batch, at most `rows`, such that each process gets one, and as many as the others if that can
    be."""
    share = -(-batch_rows // processes)
    even = -(-share // -(-share // rows))
    return even if -(-batch_rows // even) >= processes else batch_rows // processes


def join(rank: int, size: int, meeting: Path, device: torch.device) -> Replicas:
    """Meet the other processes of this machine.

    Args:
        meeting: a file that does not exist yet, in a folder that all share.
        device: gradients lie there.
    """
    for backend in ("GLOO", "NCCL"):  # one machine: no way out of it is needed, nor a name in a DNS
        if sys.platform == "linux":
            os.environ.setdefault(f"{backend}_SOCKET_IFNAME", "lo")
    backends = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(
        backends, init_method=f"file://{meeting}", rank=rank, world_size=size, timeout=TIMEOUT
    )
    return Replicas(rank, size)


@contextlib.contextmanager
def led(
    count: int, module: str, job: Mapping[str, Any], device: torch.device, logs: Path
) -> Iterator[Replicas]:
    """Start `count - 1` followers, and lead them for the length of the block.

    Args:
        module: run as `python -m MODULE JOB.json RANK MEETING`; it must `join`, and go through the same exchanges.
        job: what followers are told, as JSON.
        device: cuda gives each process a GPU of its own, the visible ones in order, this process the first.
        logs: followers write what they say into replica-1.log and so on here.

    Raises:
        ReplicaError: a follower ended too early.
    """
    if count == 1:
        yield ALONE
        return
    gpus = visible_gpus() if device.type == "cuda" else ()
    threads = torch.get_num_threads()
    own_threads = max(1, (threads if device.type == "cpu" else os.cpu_count() or 1) // count)
    logs.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="bitdistill-") as place:
        orders = Path(place) / "job.json"
        orders.write_text(json.dumps(dict(job)), "utf-8")
        meeting = Path(place) / "meeting"
        followers: list[subprocess.Popen[bytes]] = []
        over = threading.Event()
        try:
            for rank in range(1, count):
                environment = {**os.environ, "OMP_NUM_THREADS": str(own_threads)}
                if gpus:
                    environment["CUDA_VISIBLE_DEVICES"] = gpus[rank]
                with (logs / f"replica-{rank}.log").open("wb") as said:
                    followers.append(
                        subprocess.Popen(
                            [sys.executable, "-m", module, str(orders), str(rank), str(meeting)],
                            stdin=subprocess.DEVNULL, stdout=said, stderr=said, env=environment,
                            start_new_session=True,  # Ctrl-C reaches the leader alone, which tells the others
                        )
                    )  # fmt: skip
            if device.type == "cpu":
                torch.set_num_threads(own_threads)
            group = join(0, count, meeting, device)
            watch = threading.Thread(
                target=_watch, args=(group, followers, logs, over, bool(gpus)), daemon=True
            )
            watch.start()
            yield group
            over.set()
            for rank, follower in enumerate(followers, 1):
                with contextlib.suppress(subprocess.TimeoutExpired):
                    follower.wait(timeout=STOP_S)
                if follower.returncode != 0:  # the leader has all there is to have
                    log.warning("stage 2, after its end: %s", _ended(rank, follower.returncode, logs))
        finally:
            over.set()
            for follower in followers:  # none left, or all of them waiting for a leader that has failed
                follower.kill()
                follower.wait()
            torch.set_num_threads(threads)
            if dist.is_initialized():
                dist.destroy_process_group()


def _watch(
    group: Replicas, followers: list[subprocess.Popen[bytes]], logs: Path, over: threading.Event, on_gpu: bool
) -> None:
    """Note the first follower that ends while the block runs, and break off what waits for it."""
    while not over.wait(0.2):
        for rank, follower in enumerate(followers, 1):
            # One that has met the same non-finite loss as the leader ends by itself, like the leader
            if follower.poll() is not None and not over.wait(2.0):
                group.failed.append(_ended(rank, follower.returncode, logs))
                if on_gpu:  # gloo notices by itself, nccl would wait for TIMEOUT
                    with contextlib.suppress(Exception):
                        dist.distributed_c10d._abort_process_group()
                return


def _ended(rank: int, status: int | None, logs: Path) -> str:
    path = logs / f"replica-{rank}.log"
    lines = [line for line in path.read_text("utf-8", "replace").splitlines() if line.strip()]
    last = lines[-1].strip() if lines else "it said nothing"
    return f"process {rank} ended with status {status}: {last[:300]} (all of it in {path})"


def end_with_parent() -> None:
    """Followers: end when the leader is gone, also when it was killed and could tell nobody."""
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1.0)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
