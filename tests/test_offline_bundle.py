"""scripts/offline_bundle.py: what is packed comes out the same, and nothing starts where bitdistill does not run."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import random
import signal
import subprocess
import sys
import sysconfig
import tarfile
import time
import venv
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

import pytest

SCRIPT = Path(__file__).parents[1] / "scripts/offline_bundle.py"
MAIN = """
import json, pathlib, sys, time
def main():
    words = sys.argv[1:]
    if words == ["version"]:
        print("bitdistill 0.0 (a stand-in)")
    elif words == ["fail"]:
        sys.exit("error: no such recipe")
    elif words == ["wait"]:
        time.sleep(60)
    else:
        pathlib.Path("runs/a").mkdir(parents=True)
        rows = pathlib.Path("../files/rows/train.jsonl").read_text()
        pathlib.Path("runs/a/results.json").write_text(json.dumps([words, rows]))
        pathlib.Path("runs/a/model.safetensors").write_bytes(b"weights")
        print("trained")
"""


def load() -> ModuleType:
    spec = importlib.util.spec_from_file_location("offline_bundle", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


bundle = load()


@pytest.fixture
def files(tmp_path: Path) -> dict[str, bytes]:
    """Files under tmp_path/here: one that compresses, one that does not, an empty one."""
    made = {
        "rows/train.jsonl": b'{"text": "a"}\n' * 4000,
        "model/weights.bin": random.Random(0).randbytes(70_001),
        "rows/empty.jsonl": b"",
    }
    for name, data in made.items():
        path = tmp_path / "here" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return made


def packed(tmp_path: Path, main: str = MAIN, packages: Sequence[str] = ()) -> Path:
    """A bundle in pieces of 16 kB whose `bitdistill` is a stand-in."""
    out = tmp_path / "bundle"
    (out / "start").mkdir(parents=True)
    puts = [f"{tmp_path}/here/rows=rows", f"{tmp_path}/here/model/weights.bin=model/weights.bin"]
    told = bundle.pack_files(bundle.files_of(puts), out / "pieces", 16_000)
    (out / "start/bundle.json").write_text(json.dumps({"commit": "abc", "packages": packages, **told}))
    (out / "start/offline_bundle.py").write_bytes(SCRIPT.read_bytes())
    source = tmp_path / "source/src/bitdistill/cli"
    source.mkdir(parents=True)
    (source / "main.py").write_text(main)
    for package in (source, source.parent, source.parent / "sweep"):
        package.mkdir(exist_ok=True)
        (package / "__init__.py").touch()
    for module in ("pipeline.py", "sweep/parallel.py"):
        (source.parent / module).touch()
    with tarfile.open(out / "start/source.tar.gz", "w:gz") as archive:
        archive.add(tmp_path / "source/src", "src")
    return out


def other_python(folder: Path, *, packages: bool) -> Path:
    """An interpreter without bitdistill; with the other packages of this one, or none."""
    venv.create(folder, with_pip=False)
    if packages:
        (site,) = folder.glob("lib/python*/site-packages")
        # A folder named in a .pth file adds its packages, not what its own .pth files add: no editable install
        (site / "these.pth").write_text("".join(f"{sysconfig.get_path(p)}\n" for p in ("purelib", "platlib")))
    return folder / "bin/python"


def call(out: Path, *words: str | Path) -> subprocess.CompletedProcess[str]:
    """The bundle's script, as on a machine that has nothing else."""
    python = out.parent / "python/bin/python"
    if not python.exists():
        other_python(out.parent / "python", packages=False)
    command = [str(python), str(out / "start/offline_bundle.py"), *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


def state(work: Path) -> str:
    return str(json.loads((work / "state.json").read_text())["state"])


def test_files_come_out_the_same_in_whatever_order_pieces_come(
    tmp_path: Path, files: dict[str, bytes]
) -> None:
    out, work = packed(tmp_path), tmp_path / "work"
    pieces = sorted((out / "pieces").iterdir())
    assert len(pieces) > 4
    assert all(piece.stat().st_size <= 16_000 for piece in pieces)
    assert (
        sum(piece.stat().st_size for piece in pieces) < 75_000
    )  # rows are compressed, weights are not made larger
    (work / "pieces").mkdir(parents=True)
    for piece in random.Random(1).sample(pieces, len(pieces)):
        (work / "pieces" / piece.name).write_bytes(piece.read_bytes())
    bundle.unpack(work, json.loads((out / "start/bundle.json").read_text()), 1.0)
    assert {name: (work / "files" / name).read_bytes() for name in files} == files


def test_a_damaged_piece_is_named(tmp_path: Path, files: dict[str, bytes]) -> None:
    out, work = packed(tmp_path), tmp_path / "work"
    (work / "pieces").mkdir(parents=True)
    for piece in (out / "pieces").iterdir():
        data = bytearray(piece.read_bytes())
        data[-1] ^= piece.name == "piece-002"
        (work / "pieces" / piece.name).write_bytes(data)
    with pytest.raises(SystemExit, match="piece-002: damaged on its way"):
        bundle.unpack(work, json.loads((out / "start/bundle.json").read_text()), 1.0)


def test_the_command_runs_when_all_pieces_are_there(tmp_path: Path, files: dict[str, bytes]) -> None:
    out, work = packed(tmp_path), tmp_path / "work"
    begun = call(out, "start", work, "--", "run", "recipe.yaml", "--set", "seed=1")
    assert begun.returncode == 0, begun.stderr
    assert "a stand-in" in begun.stdout
    assert state(work) == "waiting"
    assert "started before" in call(out, "start", work, "--", "run").stdout
    for piece in (out / "pieces").iterdir():
        assert state(work) == "waiting"
        piece.rename(work / "pieces" / piece.name)
    told = call(out, "status", work, "--wait", "30")
    assert told.returncode == 0
    assert told.stdout.splitlines()[-2:] == ["trained", "done: exit status 0"]
    (work / "source/runs/a/answers.jsonl").write_bytes(bytes(bundle.LARGEST_RESULT + 1))
    taken = call(out, "results", work, "--into", tmp_path / "back")
    assert taken.returncode == 0
    assert "left out, larger than 8 MiB" in taken.stdout
    assert "answers.jsonl" in taken.stdout
    with tarfile.open(tmp_path / "back/results.tar.xz") as archive:
        assert sorted(archive.getnames()) == ["log.txt", "source/runs/a/results.json"]
        member = archive.extractfile("source/runs/a/results.json")
        assert member is not None
        words, rows = json.load(member)
    assert words == ["run", "recipe.yaml", "--set", "seed=1"]
    assert rows.encode() == files["rows/train.jsonl"]


def test_a_piece_that_never_comes_is_a_failure_and_can_still_come(
    tmp_path: Path, files: dict[str, bytes]
) -> None:
    out, work = packed(tmp_path), tmp_path / "work"
    assert call(out, "start", "--patience", "2", work, "--", "run").returncode == 0
    first, *others = sorted((out / "pieces").iterdir())
    for piece in others:
        piece.rename(work / "pieces" / piece.name)
    there = f"{len(others)} of {len(others) + 1} pieces are there, missing: piece-000"
    waiting = call(out, "status", work, "--wait", "0.5")
    assert waiting.returncode == 0
    assert waiting.stdout.splitlines()[-1] == f"waiting: {there}"
    told = call(out, "status", work, "--wait", "50")
    assert told.returncode == 1
    assert told.stdout.splitlines()[-1].startswith(f"failed: no piece came for 2 s, {there};")
    first.rename(work / "pieces" / first.name)
    assert call(out, "start", work, "--", "run").returncode == 0
    assert call(out, "status", work, "--wait", "50").stdout.splitlines()[-1] == "done: exit status 0"


def test_nothing_starts_where_bitdistill_does_not_run(tmp_path: Path, files: dict[str, bytes]) -> None:
    out = packed(tmp_path, "import a_package_that_is_not_there\n")
    begun = call(out, "start", tmp_path / "work", "--", "run")
    assert begun.returncode == 1
    assert "nothing was started" in begun.stderr
    assert "a_package_that_is_not_there" in begun.stderr
    told = call(out, "status", tmp_path / "work", "--wait", "30")
    assert told.returncode == 1
    assert "failed: nothing was started" in told.stdout


def test_packages_that_are_imported_late_are_missed_at_the_start(
    tmp_path: Path, files: dict[str, bytes]
) -> None:
    out = packed(tmp_path, packages=["no-such-package", "nor-this"])
    begun = call(out, "start", tmp_path / "work", "--", "run")
    assert begun.returncode == 1
    assert "nothing was started: no package no-such-package, nor-this" in begun.stderr


def test_another_bitdistill_that_comes_first_is_refused(tmp_path: Path, files: dict[str, bytes]) -> None:
    out = packed(tmp_path)
    (tmp_path / "source/src/bitdistill/__init__.py").write_text(
        "__file__ = '/elsewhere/bitdistill/__init__.py'\n"
    )
    with tarfile.open(out / "start/source.tar.gz", "w:gz") as archive:
        archive.add(tmp_path / "source/src", "src")
    begun = call(out, "start", tmp_path / "work", "--", "run")
    assert begun.returncode == 1
    assert "another bitdistill comes first: /elsewhere/bitdistill/__init__.py" in begun.stderr
    assert not (tmp_path / "work/state.json").exists()


def test_waiting_ends_when_the_command_fails(tmp_path: Path, files: dict[str, bytes]) -> None:
    out, work = packed(tmp_path), tmp_path / "work"
    assert call(out, "start", work, "--", "fail").returncode == 0
    for piece in (out / "pieces").iterdir():
        piece.rename(work / "pieces" / piece.name)
    told = call(out, "status", work, "--wait", "50")
    assert told.returncode == 1
    assert told.stdout.splitlines()[-2:] == ["error: no such recipe", "failed: exit status 1"]
    kept = work / "source/runs/b/checkpoint"
    kept.parent.mkdir(parents=True)
    kept.touch()
    again = call(out, "start", work, "--", "run")
    assert again.returncode == 0, again.stderr
    assert call(out, "status", work, "--wait", "50").returncode == 0
    assert kept.exists()


def test_a_process_that_is_gone_has_failed(tmp_path: Path, files: dict[str, bytes]) -> None:
    out, work = packed(tmp_path), tmp_path / "work"
    assert call(out, "start", work, "--", "wait").returncode == 0
    process = json.loads((work / "state.json").read_text())["pid"]
    os.kill(process, signal.SIGKILL)
    told = call(out, "status", work, "--wait", "50")
    assert told.returncode == 1
    assert "failed: its process is gone" in told.stdout


def test_wheels_are_for_what_is_missing_or_does_not_fit() -> None:
    there = bundle.packages_there(["pydantic==1.10", "numpy 2.1.0", "", "# a comment", "Typing_Extensions"])
    assert there == {"pydantic": "1.10", "numpy": "2.1.0", "typing-extensions": None}
    wanted = bundle.needed(["pydantic>=2.10,<3", "numpy>=2"], "3.12")
    assert {"pydantic", "pydantic-core", "annotated-types", "numpy"} <= set(
        wanted
    )  # what pydantic needs, too
    lacking = bundle.missing(wanted, there)
    assert {"pydantic", "pydantic-core", "annotated-types"} <= set(lacking)
    assert not {"numpy", "typing-extensions"} & set(lacking)


def test_what_is_needed_and_not_installed_is_named() -> None:
    with pytest.raises(SystemExit, match="no-such-package is needed and not installed here"):
        bundle.needed(["no-such-package"], "3.12")


@pytest.mark.parametrize("put", ["rows", "rows=", "rows=/etc/rows", "rows=../rows"])
def test_names_stay_in_their_folder(put: str) -> None:
    with pytest.raises(SystemExit, match="write PATH=NAME"):
        list(bundle.files_of([put]))


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="does not exist"):
        list(bundle.files_of([f"{tmp_path}/nothing=rows"]))


def test_a_missing_list_of_packages_and_a_start_outside_a_bundle_are_named(tmp_path: Path) -> None:
    words = [sys.executable, str(SCRIPT)]
    packing = ["pack", "--out", str(tmp_path / "out"), "--there", str(tmp_path / "there.txt")]
    for further, said in (
        (packing, "there.txt: no such file; `pip list"),
        (["start", str(tmp_path / "w"), "--", "run"], "is no bundle; `pack` writes one"),
    ):
        done = subprocess.run([*words, *further], capture_output=True, text=True)
        assert done.returncode == 1
        assert done.stderr.startswith("error: ")
        assert said in done.stderr
        assert len(done.stderr.splitlines()) == 1


def test_this_checkout_packs_and_runs(tmp_path: Path, files: dict[str, bytes]) -> None:
    """With everything there that is installed here; the real command line."""
    inside = subprocess.run(["git", "-C", str(SCRIPT.parent), "rev-parse"], capture_output=True)
    if inside.returncode != 0:
        pytest.skip("not a git checkout, so there is no commit to pack")
    listed = {d.metadata["Name"]: d.version for d in importlib.metadata.distributions()}
    (tmp_path / "there.txt").write_text("".join(f"{name}=={version}\n" for name, version in listed.items()))
    words = ["pack", "--out", str(tmp_path / "out"), "--there", str(tmp_path / "there.txt")]
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    put = f"{tmp_path}/here/rows=rows"
    made = subprocess.run(
        [sys.executable, str(SCRIPT), *words, "--python", version, "--put", put],
        capture_output=True,
        text=True,
    )
    assert made.returncode == 0, made.stderr
    assert "0 wheels: none" in made.stdout
    work = tmp_path / "work"
    python = other_python(tmp_path / "python", packages=True)
    script = [str(python), str(tmp_path / "out/start/offline_bundle.py")]
    begun = subprocess.run(
        [*script, "start", str(work), "--", "tasks", "sst2"], capture_output=True, text=True
    )
    assert begun.returncode == 0, begun.stderr
    for piece in (tmp_path / "out/pieces").iterdir():
        (work / "pieces" / piece.name).write_bytes(piece.read_bytes())
    told = subprocess.run([*script, "status", str(work), "--wait", "50"], capture_output=True, text=True)
    assert told.stdout.splitlines()[-1] == "done: exit status 0", told.stdout
    assert "sentence" in told.stdout
    assert time.time() - json.loads((work / "state.json").read_text())["time"] < 60

    # A list of commands instead of one
    other, plan = tmp_path / "other", tmp_path / "plan.yaml"
    starting = [*script, "start", str(other), "--plan", str(plan), "--seconds", "100"]
    for text, said in (
        (None, "plan.yaml: no such file"),
        ("- {name: good}", "nothing was started: "),
        ("- {name: good}", "plan.yaml, job 1: expected name, seconds and command"),
    ):
        if text is not None:
            plan.write_text(text)
        refused = subprocess.run(starting, capture_output=True, text=True)
        assert refused.returncode == 1
        assert said in refused.stderr
    plan.write_text(
        "- {name: good, seconds: 5, command: tasks sst2}\n"
        "- {name: bad, seconds: 5, command: run nothing.yaml}\n"
        "- {name: long, seconds: 500, command: tasks sst2}\n"
    )
    begun = subprocess.run(starting, capture_output=True, text=True)
    assert begun.returncode == 0, begun.stderr
    for piece in (tmp_path / "out/pieces").iterdir():
        piece.rename(other / "pieces" / piece.name)
    told = subprocess.run([*script, "status", str(other), "--wait", "50"], capture_output=True, text=True)
    assert told.returncode == 1
    lines = [line.split(",")[0] for line in told.stdout.splitlines()]
    assert {"done    good", "failed  bad", "late    long", "failed: exit status 1"} <= set(lines)
    assert "nothing.yaml" in told.stdout
    subprocess.run([*script, "results", str(other), "--into", str(tmp_path / "back")], check=True)
    with tarfile.open(tmp_path / "back/results.tar.xz") as archive:
        assert {"log.txt", "jobs/good.log", "jobs/bad.log", "jobs/plan.json"} <= set(archive.getnames())


@pytest.mark.parametrize(
    "words", ["w", "w --plan p", "--seconds 9 w -- run", "--plan p --seconds 9 w -- run", "--plan p w -- run"]
)
def test_either_a_command_or_a_plan_and_its_time(words: str) -> None:
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "start", *words.split()], capture_output=True, text=True
    )
    assert done.returncode == 1
    assert done.stderr == "error: give a command after --, or --plan and --seconds\n"
