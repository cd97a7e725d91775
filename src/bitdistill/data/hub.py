"""Hub data sets by name, through the optional package `datasets`. No torch import."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from bitdistill.errors import DataError, MissingDependencyError

PREFIX = "hub:"
_FORM = "hub:owner/name[@revision][:config][:split]"
_NAME = re.compile(r"[A-Za-z0-9_.-]+(/[A-Za-z0-9_.-]+)?")
_SPLIT = re.compile(r"(train|validation|test|dev|eval)([_.-]\w+)?(\[[^\]]*\])?")


@dataclass(frozen=True, slots=True)
class HubSource:
    """A data set on the hub; `config` and `revision` None take the hub's defaults."""

    name: str
    config: str | None
    split: str
    revision: str | None

    def as_dict(self) -> dict[str, str | None]:
        """The parts as JSON values."""
        return asdict(self)


def is_hub(source: str) -> bool:
    """Whether a source names a hub data set and not a path."""
    return source.startswith(PREFIX)


def parse(source: str) -> HubSource:
    """Take `hub:owner/name[@revision][:config][:split]` apart.

    A single part after the name is a split when it looks like one (train, validation_matched, test[:100]),
    else a config. Without a split: train.

    Raises:
        DataError: the name has another form.
    """
    slice_ = re.search(r"\[[^\]]*\]$", source)
    plain = source[: slice_.start()] if slice_ else source
    first, *parts = plain.removeprefix(PREFIX).split(":")
    if slice_ and parts:
        parts[-1] += slice_.group()
    name, _, revision = first.partition("@")
    bad_name = not _NAME.fullmatch(name) or any(part in {".", ".."} for part in name.split("/"))
    if (
        bad_name
        or len(parts) > 2
        or any(not p for p in parts)
        or (slice_ and not parts)
        or first.endswith("@")
    ):
        raise DataError(
            f"{source}: not a hub name; write {_FORM}, for example hub:nyu-mll/glue:mnli:validation_matched"
        )
    config, split = None, "train"
    if len(parts) == 2:
        config, split = parts
    elif parts and _SPLIT.fullmatch(parts[0]):
        split = parts[0]
    elif parts:
        config = parts[0]
    return HubSource(name, config, split, revision or None)


def package(source: HubSource) -> Any:
    """The package `datasets`, without which this source cannot be read.

    Raises:
        MissingDependencyError: it is not installed.
    """
    try:
        import datasets
    except ImportError:
        raise MissingDependencyError(
            f"{PREFIX}{source.name}: hub data sets need `datasets`; run: pip install 'bitdistill[hub]'"
        ) from None
    return datasets


def stream(source: HubSource) -> Iterator[dict[str, Any]]:
    """Rows of a hub data set as they arrive; code in the data set's repository is never run.

    Raises:
        MissingDependencyError: the package `datasets` is not installed.
        DataError: the hub cannot be reached, or has no such data set, config or split.
    """
    datasets = package(source)
    # A slice cannot be streamed; it is small by intent, so it is loaded.
    streaming = "[" not in source.split
    try:
        rows = datasets.load_dataset(
            source.name, source.config, split=source.split, revision=source.revision, streaming=streaming
        )
        for row in rows:
            yield dict(row)
    except Exception as error:  # whatever the hub, the network or a file format brings
        message = " ".join(str(error).split())[:200] or type(error).__name__
        raise DataError(
            f"{PREFIX}{source.name}: {message}; check name, config ({source.config}) and split "
            f"({source.split}), or download the data and name the file"
        ) from error
