"""scripts/timed_jobs.py: the order, the slots and the time of jobs; one that fails stops only what needs it."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType

import pytest

from bitdistill.recipe import load_recipe
from bitdistill.sweep.parallel import Place
from bitdistill.sweep.spec import expand, load_sweep, only_rows
from bitdistill.train import replicas

SCRIPT = Path(__file__).parents[1] / "scripts/timed_jobs.py"
STAND_IN = """
import os, pathlib, sys, time
folder, name, seconds, status = sys.argv[1:5]
events = pathlib.Path(folder, "events")
def note(what):
    with events.open("a") as file:
        file.write(f"{what} {name} {os.environ.get('CUDA_VISIBLE_DEVICES', '-')}\\n")
note("start")
print("last words of", name, flush=True)
time.sleep(float(seconds))
note("end")
sys.exit(int(status))
"""


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    spec = importlib.util.spec_from_file_location("timed_jobs", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "timed_jobs", module)  # dataclasses look their module up
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "RUN", STAND_IN)
    monkeypatch.setattr(module, "POLL_S", 0.01)
    return module


def plan(folder: Path, *jobs: str) -> Path:
    """Each job: `name needs,needs sleeps status [seconds]`."""
    lines = []
    for job in jobs:
        name, needs, sleeps, status, *seconds = job.split()
        lines.append(f"- name: {name}\n  seconds: {seconds[0] if seconds else 1}")
        lines.append(f"  command: {folder} '{name}' {sleeps} {status}")
        if needs != "-":
            lines.append(f"  needs: [{needs}]")
    path = folder / "plan.yaml"
    path.write_text("\n".join(lines) + "\n")
    return path


def run(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch, path: Path, *words: str, gpus: str = ""
) -> tuple[int, dict[str, str], list[list[str]]]:
    """(exit status, state of each job, events in their order)."""
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(replicas, "visible_gpus", lambda: tuple(gpus.split(",")) if gpus else ())
    work = path.parent / "work"
    monkeypatch.setattr(sys, "argv", ["timed_jobs", "run", str(path), str(work), *words])
    status = script.main()
    jobs = json.loads((work / "plan.json").read_text())["jobs"]
    events = path.parent / "events"
    lines = [line.split() for line in events.read_text().splitlines()] if events.exists() else []
    return status, {job["name"]: job["state"] for job in jobs}, lines


def test_what_needs_a_failed_job_is_left_and_the_rest_goes_on(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    path = plan(tmp_path, "base - 0.1 1", "student base 0 0", "score student 0 0", "other - 0 0")
    status, states, events = run(script, monkeypatch, path, "--seconds", "60", "--slots", "1")
    assert status == 1
    assert states == {"base": "failed", "student": "left", "score": "left", "other": "done"}
    assert [e[:2] for e in events] == [
        ["start", "base"],
        ["end", "base"],
        ["start", "other"],
        ["end", "other"],
    ]
    assert "last words of base" in (tmp_path / "work/base.log").read_text()


def test_jobs_start_in_their_order_each_after_what_it_needs(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    path = plan(tmp_path, "base - 0.3 0", "first - 0 0", "student base 0 0", "second - 0 0")
    status, states, events = run(script, monkeypatch, path, "--seconds", "60", "--slots", "2")
    assert status == 0
    assert set(states.values()) == {"done"}
    order = [" ".join(e[:2]) for e in events]
    assert order.index("end base") < order.index("start student")
    assert order.index("end second") < order.index("end base"), "a job that waits holds up none behind it"


def test_each_gpu_takes_as_many_jobs_as_it_has_slots(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    path = plan(tmp_path, *(f"job{n} - 0.3 0" for n in range(6)))
    status, _, events = run(script, monkeypatch, path, "--seconds", "60", "--slots", "2", gpus="3,5")
    assert status == 0
    at_once: dict[str, int] = {"3": 0, "5": 0}
    most = dict(at_once)
    for what, _, gpu in events:
        at_once[gpu] += 1 if what == "start" else -1
        most[gpu] = max(most[gpu], at_once[gpu])
    assert most == {"3": 2, "5": 2}


def test_what_no_longer_fits_is_not_started_and_shorter_jobs_are(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    path = plan(tmp_path, "long - 0 0 500", "after long 0 0", "short - 0 0 1")
    status, states, events = run(script, monkeypatch, path, "--seconds", "60", "--slots", "1")
    assert status == 3
    assert states == {"long": "late", "after": "left", "short": "done"}
    assert {e[1] for e in events} == {"short"}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("name: a", "expected a list of jobs"),
        ("- {name: a, seconds: 1}", "job 1: expected name, seconds and command"),
        ("- {name: a, seconds: 1, command: version, after: [b]}", "unknown key after"),
        ("- {name: a/b, seconds: 1, command: version}", "letters, digits"),
        ("- {name: a, seconds: true, command: version}", "seconds True"),
        ("- {name: a, seconds: -1, command: version}", "seconds -1"),
        ("- {name: a, seconds: 1, command: version, needs: [b]}", "needs b; a list of jobs above it"),
        ("- {name: a, seconds: 1, command: version, needs: b}", "needs b; a list of jobs"),
        ("- {name: a, seconds: 1, command: version, needs: [{b: c}]}", "needs {'b': 'c'}"),
        ("- {name: a, seconds: 1, command: }", "command is empty"),
        ('- {name: a, seconds: 1, command: "run \'x"}', "No closing quotation; close every quote"),
        ("- &a {name: a, seconds: 1, command: version}\n- *a", "a second job named a"),
        ("- [", "plan.yaml"),
    ],
)
def test_a_wrong_plan_is_refused_with_its_place(
    script: ModuleType, tmp_path: Path, text: str, said: str
) -> None:
    path = tmp_path / "plan.yaml"
    path.write_text(text)
    with pytest.raises(SystemExit) as caught:
        script.read_plan(path)
    assert said in str(caught.value)


def test_status_tells_what_runs_what_is_over_and_what_is_gone(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def status(*words: str) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["timed_jobs", "status", str(tmp_path / "work"), *words])
        return script.main(), capsys.readouterr().out

    assert status()[0] == 1
    run(script, monkeypatch, plan(tmp_path, "good - 0 0", "bad - 0 1"), "--seconds", "60")
    code, said = status("--wait", "60")
    assert code == 0
    assert "done    good" in said
    assert "failed  bad" in said
    assert "| last words of bad" in said
    assert said.endswith("over\n")

    told = {"name": "good", "state": "running", "started": time.time() - 5, "took": 0}
    known = {"pid": os.getpid(), "end": time.time() + 100, "jobs": [told]}
    (tmp_path / "work/plan.json").write_text(json.dumps(known))
    code, said = status()
    assert code == 0
    assert "running good, 5 s" in said
    assert "s left" in said
    child = os.fork()
    if child == 0:
        os._exit(0)
    os.waitpid(child, 0)
    (tmp_path / "work/plan.json").write_text(json.dumps({**known, "pid": child}))
    code, said = status("--wait", "60")
    assert code == 1, "a waiting call ends at once when the process is gone"
    assert "gone" in said


def test_a_plan_that_is_stopped_leaves_no_job_behind(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    jobs = script.read_plan(plan(tmp_path, "long - 60 0"))
    runner = script.Runner(jobs, tmp_path, Place((), 1), time.time() + 99)
    assert runner.step()
    (job,) = runner.jobs
    assert job.process.poll() is None
    runner.stop()
    assert job.process.poll() is not None

    path = plan(tmp_path, "long - 60 0")
    code = f"import sys; sys.path.insert(0, {str(SCRIPT.parent)!r}); import timed_jobs; timed_jobs.RUN = {STAND_IN!r}"
    words = ["run", str(path), str(tmp_path / "work"), "--seconds", "99"]
    command = [sys.executable, "-c", f"{code}; sys.exit(timed_jobs.main())", *words]
    process = subprocess.Popen(command)
    log = tmp_path / "work/long.log"
    deadline = time.monotonic() + 30
    while not (log.exists() and log.read_text()):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.terminate()
    assert process.wait(30) == 128 + 15
    lines = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True).stdout
    assert f"{tmp_path} long 60 0" not in lines


def values(command: list[str], option: str) -> list[str]:
    return [value for name, value in zip(command[2::2], command[3::2], strict=True) if name == option]


def test_the_shipped_plans_find_what_they_share(script: ModuleType) -> None:
    """Each sweep command is one run, and its base is the one that the plan makes: same model, surgery, stage 2."""
    root = SCRIPT.parents[1]
    plans = sorted((root / "recipes/plans").glob("*.yaml"))
    assert plans
    for path in plans:
        jobs = script.read_plan(path)
        bases = {
            job.name: load_recipe(root / job.command[1], values(job.command, "--set"))
            for job in jobs
            if job.command[0] == "pretrain"
        }
        for job in jobs:
            assert (root / job.command[1]).is_file(), job.name
            if job.command[0] != "sweep":
                continue
            file = root / job.command[1]
            options = {"overrides": values(job.command, "--set"), "only": values(job.command, "--only")}
            found = expand(load_sweep(file), file.parent, **options)
            (unit,) = only_rows(found, values(job.command, "--row"))
            if "bitdistill" not in unit.rows:
                continue
            (base,) = (bases[name] for name in job.needs if name in bases)
            assert base.refine == unit.recipe.refine, job.name
            assert base.pretrain is not None
            assert unit.recipe.pretrain is not None
            corpus = {"corpus": None}
            assert base.pretrain.model_copy(update=corpus) == unit.recipe.pretrain.model_copy(update=corpus)
