"""Train on a machine without network: pack what it lacks, check it there before anything starts, run one command.

Here: the wheels that the other machine lacks, this checkout, and models, tokens and rows, in pieces if transfers have a
limit.

    python scripts/offline_bundle.py pack --out bundle --python 3.12 --there there.txt --piece-mb 48 \
        --put models/gemma3-270m=model --put tokens=tokens --put rows=rows

`there.txt` has the packages of the other machine, a name or name==version a line (`pip list --format=freeze`).

There, with bundle/start copied; the pieces may come later, in any order, each moved to WORK/pieces when it is whole:

    python3 start/offline_bundle.py start WORK -- sweep recipes/sweeps/stages.yaml --local ../files/local.yaml
    python3 start/offline_bundle.py status WORK --wait 300     # ends early, with exit status 1, if the work has failed
    python3 start/offline_bundle.py results WORK --into .      # logs, results and predictions, no weights

or, where the machine is there for a limited time, a list of commands instead of one (see timed_jobs.py):

    python3 start/offline_bundle.py start WORK --plan plan.yaml --seconds 1700 --slots 3

`start` installs the wheels in WORK/site and ends with an error if a package is missing or the pipeline cannot be
imported; then a process of its own waits for the pieces, puts the files together in WORK/files, checks their hashes and
runs the command in WORK/source. If no further piece comes for `--patience` seconds, the work has failed: transfers that
are lined up in advance would otherwise go on for hours beside a machine that waits for one lost piece. After a failure
the same `start` goes on from what is there. Needs Python 3.11 and pip there, nothing else.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import importlib.metadata
import json
import lzma
import os
import re
import shutil
import subprocess
import sys
import tarfile
import time
import tomllib
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NoReturn

ROOT = Path(__file__).resolve().parents[1]
BLOCK = 1 << 24
"""Files are packed in blocks of so many bytes, so that all cores pack and unpack them."""
PLATFORMS = ("manylinux_2_28", "manylinux_2_27", "manylinux_2_17", "manylinux2014", "manylinux1")
KEPT = (".json", ".jsonl", ".yaml", ".log", ".txt", ".csv")
LARGEST_RESULT = 8 << 20
LINES = 15
"""Of the log, that `status` prints."""
POLL_S = 0.2
PLAN = "plan:"
"""In place of bitdistill's command: the end of the machine (time.time()) and the jobs at a time on a GPU follow."""
CHECK = """
import importlib.metadata as metadata, json, sys
def absent(name):
    try:
        metadata.version(name)
    except metadata.PackageNotFoundError:
        return True
names = [name for name in json.loads(sys.argv.pop(1)) if absent(name)]
if names:
    sys.exit("no package " + ", ".join(names))
import bitdistill
print(bitdistill.__file__, flush=True)
import bitdistill.pipeline, bitdistill.sweep.parallel
from bitdistill.cli.main import main
main()
"""
"""What `start` runs there: packages that are imported late are looked for too."""


def fail(message: str) -> NoReturn:
    sys.exit(f"error: {message}")


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


# ---- here ----


def packages_there(lines: Iterable[str]) -> dict[str, str | None]:
    """Name -> version (None: not known) from lines of names, name==version or name version."""
    from packaging.utils import canonicalize_name

    found: dict[str, str | None] = {}
    for line in lines:
        parts = re.split(r"\s*==\s*|\s+", line.split("#")[0].strip())
        if parts[0]:
            found[canonicalize_name(parts[0])] = parts[1] if len(parts) > 1 else None
    return found


def needed(requirements: Iterable[str], python: str) -> dict[str, list[str]]:
    """Every distribution that the requirements need, and theirs -> version ranges, by what is installed here.

    Raises:
        SystemExit: one of them is not installed here.
    """
    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name

    environment = {"python_version": python, "python_full_version": f"{python}.0", "sys_platform": "linux",
                   "platform_system": "Linux", "platform_machine": "x86_64", "extra": ""}  # fmt: skip
    found: dict[str, list[str]] = {}
    waiting = [Requirement(text) for text in requirements]
    seen: set[tuple[str, frozenset[str]]] = set()
    while waiting:
        requirement = waiting.pop()
        name = canonicalize_name(requirement.name)
        found.setdefault(name, []).append(str(requirement.specifier))
        if (name, frozenset(requirement.extras)) in seen:
            continue
        seen.add((name, frozenset(requirement.extras)))
        try:
            own = importlib.metadata.requires(requirement.name) or []
        except importlib.metadata.PackageNotFoundError:
            fail(f"{requirement.name} is needed and not installed here; install bitdistill first")
        for text in own:
            further = Requirement(text)
            extras = ("", *requirement.extras)
            if further.marker is None or any(
                further.marker.evaluate({**environment, "extra": e}) for e in extras
            ):
                waiting.append(further)
    return found


def missing(wanted: dict[str, list[str]], there: dict[str, str | None]) -> list[str]:
    """Names that are not there, or there in a version outside the ranges."""
    from packaging.specifiers import SpecifierSet

    def fits(name: str) -> bool:
        if name not in there:
            return False
        version = there[name]
        return version is None or all(
            SpecifierSet(text).contains(version.split("+")[0], prereleases=True) for text in wanted[name]
        )

    return sorted(name for name in wanted if not fits(name))


def fetch_wheels(names: Iterable[str], python: str, folder: Path) -> None:
    """Wheels of the versions installed here, for Python `python` on x86-64 Linux; pure Python is built from source.

    Raises:
        SystemExit: there is no such wheel.
    """
    folder.mkdir(parents=True, exist_ok=True)
    platforms = [word for tag in PLATFORMS for word in ("--platform", f"{tag}_x86_64")]
    for name in names:
        exact = f"{name}=={importlib.metadata.version(name)}"
        pip = [sys.executable, "-m", "pip"]
        target = ["--only-binary=:all:", "--python-version", python, "--implementation", "cp", *platforms]
        done = subprocess.run(
            [*pip, "download", "-q", "--no-deps", *target, "-d", str(folder), exact],
            capture_output=True,
            text=True,
        )
        if done.returncode == 0:
            continue
        built = folder / "built"
        done = subprocess.run(
            [*pip, "wheel", "-q", "--no-deps", "-w", str(built), exact], capture_output=True, text=True
        )
        wheels = list(built.glob("*-none-any.whl"))
        if done.returncode != 0 or not wheels:
            fail(
                f"{exact}: no wheel for Python {python} on Linux; install it on the other machine and add it to --there"
            )
        for wheel in wheels:
            wheel.replace(folder / wheel.name)
        shutil.rmtree(built)


def files_of(puts: Iterable[str]) -> Iterator[tuple[str, Path]]:
    """(name there, path here) of PATH=NAME arguments; a folder gives all files in it.

    Raises:
        SystemExit: no such path, or a name that leaves WORK/files.
    """
    for put in puts:
        path_text, separator, name = put.rpartition("=")
        path = Path(path_text)
        if not separator or not name or Path(name).is_absolute() or ".." in Path(name).parts:
            fail(f"--put {put}: write PATH=NAME, NAME relative to WORK/files")
        if not path.exists():
            fail(f"--put {put}: {path} does not exist")
        if path.is_file():
            yield name, path
        else:
            for file in sorted(p for p in path.rglob("*") if p.is_file()):
                yield f"{name}/{file.relative_to(path).as_posix()}", file


def pack_files(files: Iterable[tuple[str, Path]], folder: Path, piece_bytes: int) -> dict[str, Any]:
    """Write the pieces; returns what `start` must know of files and pieces.

    Raises:
        SystemExit: a block is larger than a piece may be.
    """
    folder.mkdir(parents=True, exist_ok=True)
    block = min(BLOCK, piece_bytes)
    told: dict[str, Any] = {"files": {}, "pieces": {}}
    piece = bytearray()

    def close() -> None:
        if piece:
            name = f"piece-{len(told['pieces']):03d}"
            (folder / name).write_bytes(piece)
            told["pieces"][name] = {"bytes": len(piece), "sha256": sha256(bytes(piece))}
            piece.clear()

    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        for name, path in files:
            blocks: list[dict[str, Any]] = []
            digest = hashlib.sha256()
            for at, (raw, packed) in zip(
                range(0, sys.maxsize, block), _packed_blocks(pool, path, block), strict=False
            ):
                digest.update(raw)
                data = packed if len(packed) < 0.95 * len(raw) else raw
                if len(piece) + len(data) > piece_bytes:
                    close()
                about = {"piece": f"piece-{len(told['pieces']):03d}", "at": len(piece), "bytes": len(data)}
                blocks.append({**about, "packed": data is packed, "to": at})
                piece += data
            told["files"][name] = {
                "bytes": path.stat().st_size,
                "sha256": digest.hexdigest(),
                "blocks": blocks,
            }
    close()
    return told


def _packed_blocks(pool: ThreadPoolExecutor, path: Path, size: int) -> Iterator[tuple[bytes, bytes]]:
    """(block, the same compressed), as many at a time as there are cores."""
    workers = os.cpu_count() or 1
    with path.open("rb") as file:
        while group := [data for _ in range(workers) if (data := file.read(size))]:
            # Higher presets take four to ten times as long and save 2 to 4 % of tokens and bfloat16 weights
            yield from zip(group, pool.map(functools.partial(lzma.compress, preset=0), group), strict=True)


def pack(args: argparse.Namespace) -> None:
    """Write bundle/start and bundle/pieces."""
    start = args.out / "start"
    if not args.there.is_file():
        fail(f"--there {args.there}: no such file; `pip list --format=freeze` on the other machine writes it")
    if args.out.exists() and any(args.out.iterdir()):
        fail(f"{args.out} is not empty; name another --out")
    start.mkdir(parents=True)
    requirements = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]["dependencies"]
    there = packages_there(args.there.read_text("utf-8").splitlines())
    wanted = needed(requirements, args.python)
    names = missing(wanted, there)
    fetch_wheels(names, args.python, start / "wheels")
    subprocess.run(
        ["git", "-C", str(ROOT), "archive", "-o", str((start / "source.tar.gz").resolve()), "HEAD"],
        check=True,
    )
    commit = subprocess.run(
        ["git", "-C", str(ROOT), "rev-parse", "--short=12", "HEAD"],
        capture_output=True,
        text=True,
        check=True,
    )
    told = pack_files(files_of(args.put), args.out / "pieces", int(args.piece_mb * 1e6))
    about = {"commit": commit.stdout.strip(), "packages": sorted(wanted), **told}
    (start / "bundle.json").write_text(json.dumps(about) + "\n", "utf-8")
    shutil.copyfile(__file__, start / Path(__file__).name)
    print(f"{len(names)} wheels: {', '.join(names) or 'none'}")
    print(
        f"{len(told['files'])} files in {len(told['pieces'])} pieces in {args.out / 'pieces'}; start with {start}"
    )


# ---- there ----


def environment(work: Path) -> dict[str, str]:
    """Of every process that runs bitdistill from the bundle."""
    commit = json.loads((work / "bundle.json").read_text("utf-8"))["commit"]
    path = f"{work / 'source/src'}{os.pathsep}{work / 'site'}"
    return {**os.environ, "PYTHONPATH": path, "BITDISTILL_COMMIT": commit, "PYTHONUNBUFFERED": "1"}


def bitdistill(words: list[str]) -> list[str]:
    return [sys.executable, "-c", "from bitdistill.cli.main import main; main()", *words]


def note(work: Path, **values: Any) -> None:
    """Write WORK/state.json: state (waiting, running, done or failed), pid, and the reason or exit status."""
    text = json.dumps({"pid": os.getpid(), "time": round(time.time()), **values})
    (work / "state.json.new").write_text(text + "\n", "utf-8")
    (work / "state.json.new").replace(work / "state.json")


def state_of(work: Path) -> dict[str, Any]:
    """What is known of the work; a process that is gone without a word has failed."""
    try:
        state: dict[str, Any] = json.loads((work / "state.json").read_text("utf-8"))
    except FileNotFoundError:
        return {"state": "failed", "why": f"nothing was started in {work}"}
    if state["state"] in ("waiting", "running"):
        try:
            os.kill(state["pid"], 0)
        except ProcessLookupError:
            return {**state, "state": "failed", "why": "its process is gone"}
    return state


def start(args: argparse.Namespace) -> None:
    """Install, check, and leave a process behind that waits for the pieces and runs the command."""
    here, work = Path(__file__).resolve().parent, args.work.resolve()
    if (args.plan is None) != bool(args.command) or (args.plan is None) != (args.seconds is None):
        fail("give a command after --, or --plan and --seconds")
    if args.plan is not None and not args.plan.is_file():
        fail(f"--plan {args.plan}: no such file")
    if not (here / "bundle.json").is_file():
        fail(f"{here} is no bundle; `pack` writes one, and its start/ has the script to run")
    if (work / "state.json").exists() and state_of(work)["state"] != "failed":
        print(f"{work}: started before")
        return
    (work / "pieces").mkdir(parents=True, exist_ok=True)
    shutil.copyfile(here / "bundle.json", work / "bundle.json")
    with tarfile.open(here / "source.tar.gz") as archive:  # over what is there: runs stay, and go on
        archive.extractall(work / "source", filter="data")
    wheels = sorted(str(path) for path in (here / "wheels").glob("*.whl"))
    if wheels:
        pip = [sys.executable, "-m", "pip", "install", "-q", "--no-index", "--no-deps", "--no-compile"]
        subprocess.run([*pip, "--upgrade", "--target", str(work / "site"), *wheels], check=True)
    names = json.dumps(json.loads((work / "bundle.json").read_text("utf-8"))["packages"])
    checked = subprocess.run(
        [sys.executable, "-c", CHECK, names, "version"],
        cwd=work / "source",
        env=environment(work),
        capture_output=True,
        text=True,
    )
    if checked.returncode != 0:
        last = (checked.stderr.strip() or checked.stdout.strip()).splitlines()[-3:]
        fail(f"bitdistill does not run here; nothing was started: {' '.join(last)}")
    place, _, versions = checked.stdout.strip().partition("\n")
    if not Path(place).resolve().is_relative_to(work):
        fail(f"another bitdistill comes first: {place}; uninstall it here, or take a Python without it")
    own = [str(Path(__file__).resolve()), "work", "--patience", str(args.patience), str(work)]
    words = [sys.executable, *own, "--", *(args.command if args.plan is None else _plan(args, work))]
    with (work / "log.txt").open("ab") as log:
        process = subprocess.Popen(
            words, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
        )
    deadline = time.monotonic() + 20
    while not (work / "state.json").exists() or state_of(work)["pid"] != process.pid:
        if process.poll() is not None or time.monotonic() > deadline:
            fail(f"the process that waits for the pieces did not start; see {work / 'log.txt'}")
        time.sleep(POLL_S)
    print(f"{versions}\n{work}: started, process {process.pid}")


def _plan(args: argparse.Namespace, work: Path) -> list[str]:
    """Copy the plan and have it read; returns the words of its start, whose clock runs from now.

    Raises:
        SystemExit: it is no plan.
    """
    shutil.copyfile(args.plan, work / "plan.yaml")
    command = [sys.executable, "scripts/timed_jobs.py", "check", str(work / "plan.yaml")]
    checked = subprocess.run(
        command, cwd=work / "source", env=environment(work), capture_output=True, text=True
    )
    if checked.returncode != 0:
        fail(f"nothing was started: {checked.stderr.strip().removeprefix('error: ')}")
    return [PLAN, str(time.time() + args.seconds), str(args.slots)]


def unpack(work: Path, told: dict[str, Any], patience: float) -> None:
    """Wait for the pieces and put the files together, each piece when it comes.

    Raises:
        SystemExit: a piece or a file has another hash than it had when it was packed, or no piece came for `patience`
            seconds.
    """
    for name, file in told["files"].items():
        path = work / "files" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("wb") as handle:
            handle.truncate(file["bytes"])
    left = dict(told["pieces"])
    deadline = time.monotonic() + patience
    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        while left:
            come = [n for n, p in left.items() if _size(work / "pieces" / n) == p["bytes"]]
            for piece in come:
                data = (work / "pieces" / piece).read_bytes()
                if sha256(data) != left.pop(piece)["sha256"]:
                    fail(f"{work / 'pieces' / piece}: damaged on its way; copy it again and start again")
                blocks = [
                    (work / "files" / name, block)
                    for name, file in told["files"].items()
                    for block in file["blocks"]
                    if block["piece"] == piece
                ]
                list(pool.map(functools.partial(_write, data), blocks))
            if come:
                note(work, state="waiting", why=_missing(told, left))
                deadline = time.monotonic() + patience
            elif time.monotonic() > deadline:
                fail(
                    f"no piece came for {patience:g} s, {_missing(told, left)}; copy what is missing and start again"
                )
            else:
                time.sleep(POLL_S)
    for name, file in told["files"].items():
        with (work / "files" / name).open("rb") as handle:
            if hashlib.file_digest(handle, "sha256").hexdigest() != file["sha256"]:
                fail(f"{work / 'files' / name}: not what was packed")


def _missing(told: dict[str, Any], left: Iterable[str]) -> str:
    names = sorted(left)
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    count = f"{len(told['pieces']) - len(names)} of {len(told['pieces'])} pieces are there"
    return f"{count}, missing: {', '.join(names[:3])}{more}" if names else count


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else -1


def _write(piece: bytes, target: tuple[Path, dict[str, Any]]) -> None:
    """Write a block to where it belongs in its file."""
    path, block = target
    data = piece[block["at"] : block["at"] + block["bytes"]]
    with path.open("r+b") as handle:
        handle.seek(block["to"])
        handle.write(lzma.decompress(data) if block["packed"] else data)


def work_on(args: argparse.Namespace) -> None:
    """The process that `start` leaves behind."""
    work: Path = args.work
    told = json.loads((work / "bundle.json").read_text("utf-8"))
    note(work, state="waiting", why=_missing(told, told["pieces"]))
    try:
        unpack(work, told, args.patience)
    except SystemExit as ended:
        note(work, state="failed", why=str(ended.code).removeprefix("error: "))
        raise
    note(work, state="running")
    print(f"[{time.strftime('%X')}] files are there", flush=True)
    command = bitdistill(args.command)
    if args.command[0] == PLAN:
        end, slots = args.command[1:]
        jobs = ["run", str(work / "plan.yaml"), str(work / "jobs"), "--slots", slots]
        command = [sys.executable, "scripts/timed_jobs.py", *jobs, "--seconds", str(float(end) - time.time())]
    done = subprocess.run(command, cwd=work / "source", env=environment(work))
    note(work, state="done" if done.returncode == 0 else "failed", why=f"exit status {done.returncode}")


def status(args: argparse.Namespace) -> int:
    """Print the state and the log's last lines; exit status 1 when the work has failed."""
    deadline = time.monotonic() + args.wait
    while (state := state_of(args.work))["state"] in ("waiting", "running") and time.monotonic() < deadline:
        time.sleep(POLL_S)
    log = args.work / "log.txt"
    if log.exists():
        text = log.read_bytes()[-8192:].decode("utf-8", "replace").replace("\r", "\n")
        print("\n".join(text.splitlines()[-LINES:]))
    if (args.work / "jobs/plan.json").exists():
        subprocess.run(
            [
                sys.executable,
                str(args.work / "source/scripts/timed_jobs.py"),
                "status",
                str(args.work / "jobs"),
            ]
        )
    print(f"{state['state']}: {state['why']}" if "why" in state else state["state"])
    return int(state["state"] == "failed")


def results(args: argparse.Namespace) -> None:
    """Write results.tar.xz: the log, and logs, results and predictions of the runs; files of weights stay."""
    args.into.mkdir(parents=True, exist_ok=True)
    target = args.into / "results.tar.xz"
    with tarfile.open(target, "w:xz") as archive:
        for base in (
            args.work / "log.txt",
            *(args.work / name for name in ("jobs", "source/runs", "source/results")),
        ):
            for path in [base] if base.is_file() else sorted(base.rglob("*")):
                if not path.is_file() or path.suffix not in KEPT:
                    continue
                if path.stat().st_size > LARGEST_RESULT:
                    print(f"left out, larger than {LARGEST_RESULT >> 20} MiB: {path}")
                else:
                    archive.add(path, path.relative_to(args.work).as_posix())
    print(target)


def parser() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = found.add_subparsers(required=True, metavar="VERB")
    verb = verbs.add_parser("pack", help="write the bundle, here")
    verb.add_argument("--out", type=Path, required=True, help="folder of the bundle")
    verb.add_argument("--python", default="3.12", help="Python version there (default 3.12)")
    verb.add_argument("--there", type=Path, required=True, help="file with the packages there")
    verb.add_argument(
        "--put", action="append", default=[], metavar="PATH=NAME", help="a file or folder; repeat"
    )
    verb.add_argument(
        "--piece-mb", type=float, default=1000.0, help="largest piece, in 10^6 bytes (default 1000)"
    )
    verb.set_defaults(do=pack)
    own = verbs.add_parser("work")  # the process that `start` leaves behind
    own.set_defaults(do=work_on)
    verb = verbs.add_parser("start", help="install, check and start, there")
    verb.set_defaults(do=start)
    for takes_command in (own, verb):
        takes_command.add_argument(
            "--patience",
            type=float,
            default=600.0,
            metavar="S",
            help="the work has failed when no further piece comes for so long (default 600)",
        )
        takes_command.add_argument("work", type=Path, metavar="WORK")
        takes_command.add_argument(
            "command", nargs="*", metavar="COMMAND", help="after --: bitdistill's command and options"
        )
    verb.add_argument("--plan", type=Path, metavar="YAML", help="a list of commands instead (timed_jobs.py)")
    verb.add_argument(
        "--seconds", type=float, metavar="S", help="with --plan: until the machine goes, from now"
    )
    verb.add_argument(
        "--slots", type=int, default=3, help="with --plan: jobs at a time on each GPU (default 3)"
    )
    verb = verbs.add_parser("status", help="state and last lines, there")
    verb.add_argument("work", type=Path, metavar="WORK")
    verb.add_argument("--wait", type=float, default=0.0, metavar="S", help="wait so long for the work to end")
    verb.set_defaults(do=status)
    verb = verbs.add_parser("results", help="pack logs and results, there")
    verb.add_argument("work", type=Path, metavar="WORK")
    verb.add_argument("--into", type=Path, default=Path(), help="folder for results.tar.xz")
    verb.set_defaults(do=results)
    return found


def main() -> int:
    args = parser().parse_args()
    return args.do(args) or 0


if __name__ == "__main__":
    sys.exit(main())
