"""Artifact folders: written beside their final name, fsynced, then renamed; a manifest holds each SHA-256.

A reader therefore sees a whole artifact or none, at any moment a process or machine may die. Writers of one artifact
take turns (`locked`). No pickle.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import functools
import hashlib
import json
import logging
import os
import shutil
import threading
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from bitdistill.errors import ArtifactError, StorageError

log = logging.getLogger("bitdistill")
MANIFEST = "bitdistill.json"
FORMAT_VERSION = 1
_PARTIAL = ".partial-"
_LOCK = ".lock"
_held = threading.local()


def sha256_file(path: Path) -> str:
    """Hex SHA-256 of a file, read in 1 MiB blocks."""
    digest = hashlib.sha256()
    with path.open("rb") as handle:
        while block := handle.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def hash_json(value: Any) -> str:
    """Hex SHA-256 of a JSON value in canonical form (sorted keys, no white space)."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()


def fsync_path(path: Path) -> None:
    """Flush a file or a directory entry to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def writing(folder: Path, manifest: Mapping[str, Any]) -> Iterator[Path]:
    """Write an artifact folder atomically.

    Yields a temporary sibling folder to fill. On a clean exit every file is hashed into `bitdistill.json`
    (with `manifest`'s entries), fsynced, and the folder is renamed to `folder`, replacing an older one.
    On an error the temporary folder is removed and the older artifact stays. Another writer of `folder` is waited for.

    Raises:
        ArtifactError: something else than an artifact of this kind is there; it is never replaced.
        StorageError: the file system refused a write (disk full, no permission).
    """
    folder = Path(folder).absolute()  # "." has no name
    check_place(folder, manifest.get("kind"))
    partial = folder.with_name(f"{folder.name}{_PARTIAL}{uuid.uuid4().hex[:8]}")
    with locked(folder):
        try:
            partial.mkdir()
            yield partial
            files: dict[str, dict[str, Any]] = {}
            for path in sorted(p for p in partial.rglob("*") if p.is_file()):
                name = path.relative_to(partial).as_posix()
                path.chmod(
                    partial.stat().st_mode & 0o666
                )  # as the umask says; safetensors keeps all others out
                files[name] = {"sha256": sha256_file(path), "bytes": path.stat().st_size}
                fsync_path(path)
            whole = {"format_version": FORMAT_VERSION, **manifest, "files": files}
            target = partial / MANIFEST
            target.write_text(json.dumps(whole, indent=2, ensure_ascii=False) + "\n", "utf-8")
            fsync_path(target)
            fsync_path(partial)
            _replace_folder(partial, folder)
        except OSError as error:
            shutil.rmtree(partial, ignore_errors=True)
            raise StorageError(_storage_message(folder, error)) from error
        except BaseException as error:
            shutil.rmtree(partial, ignore_errors=True)
            if _is_storage_failure(error):
                raise StorageError(f"{folder}: {error}; earlier artifacts are untouched") from error
            raise


def check_place(folder: Path, kind: str | None) -> None:
    """Refuse a place where an artifact would replace something else: somebody's folder or file, or a model of
    another kind (tokens written over a student).

    Args:
        folder: where it will be written.
        kind: its manifest's `kind`; None: any artifact may be replaced. One whose manifest is damaged always may.

    Raises:
        ArtifactError: `folder` is a file, or a folder that holds something else.
    """
    if folder.is_dir() and ((folder / MANIFEST).is_file() or not any(folder.iterdir())):
        there = None
        with contextlib.suppress(ArtifactError):
            there = read_manifest(folder).get("kind")
        if kind is not None and there not in (None, kind):
            raise ArtifactError(
                f"{folder}: holds an artifact of the kind {there}, not {kind}; name another folder"
            )
        return
    if os.path.lexists(folder):
        raise ArtifactError(f"{folder}: is there already and holds something else; name another folder")


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Be the only writer of an artifact, until the block ends or the process dies.

    Another process that writes it is waited for; look again for the artifact then. What a killed writer left is
    cleared first. A thread that holds the lock may take it again, as `writing` does.

    Where the file system has no locks, a warning says so, nobody is waited for, and what lies beside the artifact
    stays: it may be a live writer's.

    Raises:
        StorageError: the folder cannot be written.
    """
    folder = Path(folder).absolute()
    mine: set[Path] = _held.__dict__.setdefault("folders", set())
    if folder in mine:
        yield
        return
    path = folder.with_name(folder.name + _LOCK)
    with storage_errors(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        descriptor = _lock(path)
    mine.add(folder)
    try:
        if descriptor is not None:
            with storage_errors(folder):
                _sweep_partials(folder)
        yield
    finally:
        mine.discard(folder)
        if descriptor is not None:
            with contextlib.suppress(OSError):
                path.unlink()
            os.close(descriptor)


def _lock(path: Path) -> int | None:
    """Descriptor that holds the lock of this file; None where the file system has no locks."""
    waited = False
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if not waited:
                    log.warning("%s: another process is at it; waiting", path.with_suffix(""))
                waited = True
                fcntl.flock(descriptor, fcntl.LOCK_EX)
        except OSError as error:
            os.close(descriptor)
            path.unlink(missing_ok=True)
            _warn_without_locks(path.parent, error.strerror or str(error))
            return None
        except BaseException:
            os.close(descriptor)
            raise
        # Who held it removed the file at the end, so this may be the lock of a file that is gone
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(descriptor), path.stat()):
                return descriptor
        os.close(descriptor)


@functools.cache
def _warn_without_locks(place: Path, reason: str) -> None:
    log.warning(
        "%s: no file locks here (%s); never make one artifact in two processes, remove *%s* of killed ones by hand",
        place,
        reason,
        _PARTIAL,
    )


def _is_storage_failure(error: BaseException) -> bool:
    """safetensors wraps operating system errors in its own type and keeps only their text."""
    return type(error).__name__ == "SafetensorError" and any(
        text in str(error) for text in ("No space left", "Input/output error", "os error", "I/O error")
    )


@contextlib.contextmanager
def storage_errors(place: Path) -> Iterator[None]:
    """Turn operating system errors while writing at `place` into StorageError."""
    try:
        yield
    except OSError as error:
        raise StorageError(_storage_message(place, error)) from error


def _replace_folder(partial: Path, folder: Path) -> None:
    """Rename `partial` to `folder`; an older `folder` is moved aside first and removed last."""
    old = folder.with_name(f"{folder.name}{_PARTIAL}old-{uuid.uuid4().hex[:8]}")
    if folder.exists():
        folder.rename(old)
        try:
            partial.rename(folder)
        except OSError:
            old.rename(folder)
            raise
    else:
        partial.rename(folder)
    fsync_path(folder.parent)
    shutil.rmtree(old, ignore_errors=True)


def _sweep_partials(folder: Path) -> None:
    """Clear what a killed writer of this artifact left; an interrupted replacement is finished or undone."""
    for path in folder.parent.glob(f"{folder.name}{_PARTIAL}*"):
        if f"{_PARTIAL}old-" in path.name and not folder.exists() and (path / MANIFEST).exists():
            path.rename(folder)
        else:
            shutil.rmtree(path, ignore_errors=True)


def _storage_message(folder: Path, error: OSError) -> str:
    place = error.filename or folder
    if error.errno == errno.ENOSPC:
        free = shutil.disk_usage(folder.parent if folder.parent.exists() else Path.cwd()).free
        return f"{place}: no space left on the device ({free / 1e6:.0f} MB free); free some or set output_dir elsewhere"
    return f"{place}: {error.strerror or error}; earlier artifacts are untouched"


def exists(folder: Path) -> bool:
    """Whether a finished artifact is at `folder` (contents are not verified)."""
    return (Path(folder) / MANIFEST).is_file()


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of an artifact.

    Raises:
        ArtifactError: there is no artifact, or its manifest is unreadable or of a newer format.
    """
    path = Path(folder) / MANIFEST
    try:
        manifest = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        if (Path(folder) / "packed" / MANIFEST).is_file():
            raise ArtifactError(
                f"{folder}: is the folder of a run; its student is {Path(folder) / 'packed'}"
            ) from None
        raise ArtifactError(f"{folder}: no artifact here ({MANIFEST} is missing); check the path") from None
    except (OSError, ValueError) as error:
        raise ArtifactError(f"{path}: unreadable manifest ({error}); make the artifact again") from error
    if not isinstance(manifest, dict) or not isinstance(manifest.get("files"), dict):
        raise ArtifactError(f"{path}: not a bitdistill manifest; make the artifact again")
    version = manifest.get("format_version")
    if version != FORMAT_VERSION:
        raise ArtifactError(
            f"{path}: format_version {version!r}, this bitdistill reads {FORMAT_VERSION}; install a matching version"
        )
    return manifest


def training_cost(manifest: Mapping[str, Any]) -> dict[str, Any] | None:
    """steps, tokens and device_s (seconds of all processes together) that made an artifact, those of the bases that it
    was started from included; None where it names no training."""
    training, before = manifest.get("training"), manifest.get("started_from") or {}
    if not isinstance(training, Mapping):
        return None
    # Artifacts from before several processes could train side by side have no device_s
    spent = {**training, "device_s": training.get("device_s") or training["elapsed_s"]}
    return {name: spent[name] + before.get(name, 0) for name in ("steps", "tokens", "device_s")}


def verify(folder: Path) -> dict[str, Any]:
    """Check every file of an artifact against the manifest and return the manifest.

    Raises:
        ArtifactError: a file is missing, has another size, or another SHA-256.
    """
    folder = Path(folder)
    manifest = read_manifest(folder)
    for name, entry in manifest["files"].items():
        path = folder / name
        if ".." in Path(name).parts or Path(name).is_absolute():
            raise ArtifactError(
                f"{folder / MANIFEST}: file name {name!r} leaves the artifact; do not use this folder"
            )
        if not path.is_file():
            raise ArtifactError(f"{path}: missing; the artifact is incomplete, make it again")
        size = path.stat().st_size
        if size != entry["bytes"]:
            raise ArtifactError(
                f"{path}: {size} bytes, manifest says {entry['bytes']}; make the artifact again"
            )
        if sha256_file(path) != entry["sha256"]:
            raise ArtifactError(
                f"{path}: SHA-256 differs from the manifest; the file is corrupt, make it again"
            )
    return manifest
