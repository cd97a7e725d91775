"""Run a list of bitdistill commands on a machine that is there for a limited time, the most wanted first.

    python scripts/timed_jobs.py check PLAN.yaml
    python scripts/timed_jobs.py run PLAN.yaml WORK --seconds 1600 --slots 3    # returns when the last job has ended
    python scripts/timed_jobs.py status WORK [--wait 300]                       # returns at once when all is over

A plan is a list of jobs, in the order in which they should start:

    - name: base
      seconds: 450                # what it takes beside others: it is not started later than that before the end
      command: pretrain recipes/mnli-gemma3-270m.yaml --set method=paper
    - name: mnli-0
      needs: [base]               # jobs that must have ended well before
      seconds: 250
      command: sweep recipes/sweeps/headline-gemma3-270m.yaml --only 'mnli-*/paper/0' --out results/mnli-0.json

A job runs on one GPU (the least busy; without one, on the CPU) with up to `--slots` jobs on each. Its log is
WORK/NAME.log. What needs a job that failed is not started; everything else goes on. Exit status of `run`: 0 if every
job was done, 1 if one failed, 3 if the time did not suffice for all of them; of `status`: 1 if the plan is not running
and not over. Needs an importable bitdistill.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:
    from bitdistill.sweep.parallel import Place

POLL_S = 0.2
LINES = 2
"""Of each running job's log, that `status` prints."""
RUN = "from bitdistill.cli.main import main; main()"


def fail(message: str) -> NoReturn:
    sys.exit(f"error: {message}")


@dataclass
class Job:
    """One command; seconds are wall-clock."""

    name: str
    command: list[str]
    seconds: float
    needs: tuple[str, ...] = ()
    state: str = "waiting"
    """waiting, running, done, failed, late (its time no longer sufficed) or left (what it needs did not end well)."""
    gpu: int = -1
    started: float = 0.0
    took: float = 0.0
    process: subprocess.Popen[bytes] | None = field(default=None, repr=False)


def read_plan(path: Path) -> list[Job]:
    """Jobs of a plan.

    Raises:
        SystemExit: the file is no plan, or a job needs one that does not stand before it.
    """
    from ruamel.yaml import YAML  # `status` is asked where only the jobs have bitdistill's packages
    from ruamel.yaml.error import YAMLError

    try:
        rows = YAML(typ="safe").load(path.read_text("utf-8"))
    except (OSError, UnicodeDecodeError, YAMLError) as error:
        fail(f"{path}: {error}")
    if not isinstance(rows, list) or not rows:
        fail(f"{path}: expected a list of jobs, `- name: ...`")
    jobs: list[Job] = []
    for number, row in enumerate(rows, 1):
        place = f"{path}, job {number}"
        if not isinstance(row, dict) or not {"name", "seconds", "command"} <= row.keys():
            fail(f"{place}: expected name, seconds and command")
        if unknown := row.keys() - {"name", "seconds", "command", "needs"}:
            fail(
                f"{place}: unknown key {', '.join(sorted(map(str, unknown)))}; name, seconds, command, needs"
            )
        name, seconds, needs = str(row["name"]), row["seconds"], row.get("needs", [])
        if not name.replace("-", "").replace("_", "").isalnum():
            fail(f"{place}: name {name!r} names a log file; letters, digits, - and _")
        if isinstance(seconds, bool) or not isinstance(seconds, int | float) or seconds <= 0:
            fail(f"{place}: seconds {seconds!r}; a number above 0")
        before = {job.name for job in jobs}
        if name in before:
            fail(f"{place}: a second job named {name}; every name once")
        wanted = tuple(map(str, needs)) if isinstance(needs, list) else (str(needs),)
        if not isinstance(needs, list) or not before.issuperset(wanted):
            fail(f"{place}: needs {', '.join(n for n in wanted if n not in before)}; a list of jobs above it")
        try:
            command = shlex.split(str(row["command"] or ""))
        except ValueError as error:
            fail(f"{place}: command: {error}; close every quote")
        if not command:
            fail(f"{place}: command is empty; bitdistill's command and options")
        jobs.append(Job(name, command, float(seconds), wanted))
    return jobs


@dataclass
class Runner:
    """Starts jobs in their order as needs are met, a GPU has room, and their time suffices."""

    jobs: list[Job]
    work: Path
    place: Place
    end: float
    """time.time() at which the machine goes."""

    def start(self, job: Job, gpu: int) -> None:
        from bitdistill.sweep.parallel import environment_of

        with (self.work / f"{job.name}.log").open("ab") as log:
            job.process = subprocess.Popen(
                [sys.executable, "-c", RUN, *job.command], stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                env=environment_of(self.place, (gpu,)), start_new_session=True,
            )  # fmt: skip
        job.state, job.gpu, job.started = "running", gpu, time.time()

    def step(self) -> bool:
        """Take in what has ended and start what can start; False when all is over."""
        for job in self.jobs:
            status = job.process.poll() if job.process is not None and job.state == "running" else None
            if status is not None:
                job.state, job.took = ("done" if status == 0 else "failed"), time.time() - job.started
        states = {job.name: job.state for job in self.jobs}
        for job in self.jobs:
            if job.state != "waiting":
                continue
            if any(states[name] in ("failed", "late", "left") for name in job.needs):
                job.state = "left"
            elif time.time() + job.seconds > self.end:
                job.state = "late"
            elif all(states[name] == "done" for name in job.needs):
                running = [other.gpu for other in self.jobs if other.state == "running"]
                gpu = min(range(self.place.devices), key=running.count)
                if running.count(gpu) < self.place.slots:
                    self.start(job, gpu)
            states[job.name] = job.state
        self.note()
        return any(job.state in ("waiting", "running") for job in self.jobs)

    def stop(self) -> None:
        """Tell what runs to stop, and wait for its checkpoints."""
        from bitdistill.sweep.parallel import stop_processes

        stop_processes([j.process for j in self.jobs if j.process is not None and j.state == "running"])

    def note(self) -> None:
        """Write WORK/plan.json: process, end, and each job's state and seconds."""
        told = [
            {"name": j.name, "state": j.state, "started": j.started, "took": round(j.took, 1)}
            for j in self.jobs
        ]
        new = self.work / "plan.json.new"
        new.write_text(json.dumps({"pid": os.getpid(), "end": self.end, "jobs": told}) + "\n", "utf-8")
        new.replace(self.work / "plan.json")


def check(args: argparse.Namespace) -> int:
    """Print a plan's jobs."""
    for job in read_plan(args.plan):
        needs = f", after {', '.join(job.needs)}" if job.needs else ""
        print(f"{job.name}, {job.seconds:.0f} s{needs}: {shlex.join(job.command)}")
    return 0


def run(args: argparse.Namespace) -> int:
    """Run the plan; see the module for its exit status."""
    from bitdistill.sweep.parallel import Place
    from bitdistill.train import replicas

    jobs = read_plan(args.plan)
    args.work.mkdir(parents=True, exist_ok=True)
    runner = Runner(
        jobs, args.work.resolve(), Place(replicas.visible_gpus(), args.slots), time.time() + args.seconds
    )
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        while runner.step():
            time.sleep(POLL_S)
    finally:  # also when it is stopped: no job is left behind
        runner.stop()
    states = [job.state for job in jobs]
    return 1 if "failed" in states else 3 if "late" in states else 0


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def status(args: argparse.Namespace) -> int:
    """Print each job's state and the last lines of those that run or have failed."""
    deadline = time.monotonic() + args.wait
    while True:
        try:
            told: dict[str, Any] = json.loads((args.work / "plan.json").read_text("utf-8"))
        except FileNotFoundError:
            print(f"no plan was started in {args.work}")
            return 1
        over = all(job["state"] not in ("waiting", "running") for job in told["jobs"])
        alive = _alive(told["pid"])
        if over or not alive or time.monotonic() >= deadline:
            break
        time.sleep(POLL_S)
    for job in told["jobs"]:
        took = job["took"] or (time.time() - job["started"] if job["state"] == "running" else 0)
        print(f"{job['state']:8}{job['name']}" + (f", {took:.0f} s" if took else ""))
        log = args.work / f"{job['name']}.log"
        if job["state"] in ("running", "failed") and log.exists():
            text = log.read_bytes()[-8192:].decode("utf-8", "replace").replace("\r", "\n")
            lines = [line for line in text.splitlines() if line.strip()]
            print("\n".join(f"        | {line[:200]}" for line in lines[-LINES:]))
    left = told["end"] - time.time()
    print("over" if over else f"{left:.0f} s left" if alive else "its process is gone")
    return int(not over and not alive)


def parser() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = found.add_subparsers(required=True, metavar="VERB")
    verb = verbs.add_parser("check", help="read a plan and print it")
    verb.add_argument("plan", type=Path, metavar="PLAN", help="YAML file")
    verb.set_defaults(do=check)
    verb = verbs.add_parser("run", help="run a plan")
    verb.add_argument("plan", type=Path, metavar="PLAN", help="YAML file")
    verb.add_argument("work", type=Path, metavar="WORK", help="folder of logs and state")
    verb.add_argument("--seconds", type=float, required=True, help="until the machine goes")
    verb.add_argument("--slots", type=int, default=3, help="jobs at a time on each GPU (default 3)")
    verb.set_defaults(do=run)
    verb = verbs.add_parser("status", help="state of a plan")
    verb.add_argument("work", type=Path, metavar="WORK")
    verb.add_argument("--wait", type=float, default=0.0, metavar="S", help="wait so long for the plan to end")
    verb.set_defaults(do=status)
    return found


def main() -> int:
    args = parser().parse_args()
    if getattr(args, "slots", 1) < 1:
        fail(f"--slots {args.slots}; 1 or more")
    return int(args.do(args))


if __name__ == "__main__":
    sys.exit(main())
