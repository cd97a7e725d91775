"""Several writers of one artifact: they take turns, and what a killed one left is cleared."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from bitdistill import artifact
from bitdistill.errors import ArtifactError, StorageError

WRITER = """
import sys
from pathlib import Path
from bitdistill import artifact
with artifact.writing(Path(sys.argv[1]), {"kind": "other"}) as folder:
    (folder / "data").write_text("other")
    print("in", flush=True)
    sys.stdin.read()
"""


def start_writer(folder: Path) -> subprocess.Popen[str]:
    """Another process, in the middle of writing `folder` until its stdin is closed."""
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(WRITER), str(folder)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout is not None
    assert process.stdout.readline() == "in\n"
    return process


def write(folder: Path, text: str) -> None:
    with artifact.writing(folder, {"kind": "own"}) as partial:
        (partial / "data").write_text(text)


def in_thread(work: Callable[[], None]) -> threading.Thread:
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    return thread


def wait_for(said: str, caplog: pytest.LogCaptureFixture) -> None:
    deadline = time.monotonic() + 30
    while said not in caplog.text:
        assert time.monotonic() < deadline, f"never said: {said}"
        time.sleep(0.01)


def test_a_second_writer_waits_and_harms_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = tmp_path / "a.b"
    other = start_writer(folder)
    mine = in_thread(lambda: write(folder, "own"))
    wait_for("a.b: another process is at it; waiting", caplog)
    assert not artifact.exists(folder)
    assert other.communicate(timeout=30)[0] == ""
    assert other.returncode == 0
    mine.join(30)
    assert artifact.verify(folder)["kind"] == "own"
    assert caplog.text.count("waiting") == 1
    assert os.listdir(tmp_path) == ["a.b"]  # neither lock nor partial folder is left


def test_who_waited_finds_what_the_other_made(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder, found = tmp_path / "a", []

    def look() -> None:
        with artifact.locked(folder):
            found.append(artifact.exists(folder))

    other = start_writer(folder)
    threads = [in_thread(look) for _ in range(3)]
    wait_for("waiting", caplog)
    other.communicate(timeout=30)
    for thread in threads:
        thread.join(30)
    assert found == [True] * 3


def test_one_thread_may_write_within_its_lock(tmp_path: Path) -> None:
    folder = tmp_path / "a"
    with artifact.locked(folder), artifact.writing(folder, {"kind": "outer"}) as partial:
        (partial / "data").write_text("outer")
        write(folder, "inner")
        assert artifact.verify(folder)["kind"] == "own"
    assert artifact.verify(folder)["kind"] == "outer"


def test_what_a_killed_writer_left_is_cleared(tmp_path: Path) -> None:
    folder = tmp_path / "a"
    other = start_writer(folder)
    other.send_signal(signal.SIGKILL)
    other.wait(30)
    assert len(os.listdir(tmp_path)) == 2  # its partial folder and its lock
    write(folder, "own")
    assert os.listdir(tmp_path) == ["a"]
    # Killed between the two renames of a replacement: the older artifact comes back.
    folder.rename(tmp_path / "a.partial-old-12345678")
    with artifact.locked(folder):
        assert artifact.verify(folder)["kind"] == "own"


def test_without_file_locks_nothing_of_others_is_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refused(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(artifact.fcntl, "flock", refused)
    other = tmp_path / "a.partial-12345678"
    other.mkdir()
    for text in ("one", "two"):
        write(tmp_path / "a", text)
    assert (tmp_path / "a" / "data").read_text() == "two"
    assert sorted(os.listdir(tmp_path)) == ["a", other.name]
    assert caplog.text.count("no file locks here") == 1


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_read_only_place_is_a_typed_error(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(StorageError, match=r"a\.lock: Permission denied"):
        write(tmp_path / "a", "own")
    tmp_path.chmod(0o700)


def test_a_place_that_is_no_folder_is_a_typed_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="file"):
        write(tmp_path / "file" / "a", "own")


@pytest.mark.parametrize("kind", ["folder", "file", "link"])
def test_what_is_no_artifact_is_never_replaced(tmp_path: Path, kind: str) -> None:
    place, thesis = tmp_path / "mine", tmp_path / "mine/thesis.txt"
    if kind == "folder":
        place.mkdir()
        thesis.write_text("years of work", "utf-8")
    elif kind == "file":
        place.write_text("years of work", "utf-8")
    else:
        place.symlink_to(tmp_path / "nowhere")
    with pytest.raises(ArtifactError, match="holds something else; name another folder"):  # noqa: SIM117
        with artifact.writing(place, {}):
            pytest.fail("work began")
    assert kind != "folder" or thesis.read_text("utf-8") == "years of work"
    assert kind != "file" or place.read_text("utf-8") == "years of work"
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_a_runs_folder_names_its_student(tmp_path: Path) -> None:
    with artifact.writing(tmp_path / "run/packed", {"kind": "packed"}):
        pass
    with pytest.raises(ArtifactError, match=r"run: is the folder of a run; its student is .*run/packed"):
        artifact.read_manifest(tmp_path / "run")


def test_an_artifact_of_another_kind_is_never_replaced(tmp_path: Path) -> None:
    place = tmp_path / "student"
    with artifact.writing(place, {"kind": "student"}) as folder:
        (folder / "latents").write_text("hours of training", "utf-8")
    with (
        pytest.raises(
            ArtifactError, match=r"student: holds an artifact of the kind student, not tokens; name"
        ),
        artifact.writing(place, {"kind": "tokens"}),
    ):
        pytest.fail("a place that holds a student was given")
    assert (place / "latents").read_text("utf-8") == "hours of training"
    with artifact.writing(place, {"kind": "student"}):
        pass  # a newer one of its kind
    assert not (place / "latents").exists()
    (place / artifact.MANIFEST).write_text("{", "utf-8")
    with artifact.writing(place, {"kind": "tokens"}):
        pass  # what it was is not to be known, and it is of no use


def test_an_empty_folder_and_the_working_directory_are_places(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = tmp_path / "here"
    here.mkdir()
    with artifact.writing(here, {}) as partial:
        (partial / "a").write_text("x", "utf-8")
    monkeypatch.chdir(here)
    with artifact.writing(Path(), {}) as partial:
        (partial / "b").write_text("x", "utf-8")
    assert sorted(path.name for path in here.iterdir()) == ["b", "bitdistill.json"]


def test_files_may_be_read_by_whom_the_umask_lets(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        with artifact.writing(tmp_path / "a", {}) as partial:
            (partial / "weights").write_text("x", "utf-8")
            (partial / "weights").chmod(0o600)
    finally:
        os.umask(before)
    assert (tmp_path / "a/weights").stat().st_mode & 0o777 == 0o640
