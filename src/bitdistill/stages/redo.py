"""What `--redo` has yet to make again: a file in the run's folder, so that an interruption does not forget it.

A stage's key hashes the settings that led to it, not the contents: after a redo with equal settings, nothing but this
mark tells that a student was made from the teacher before.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

from bitdistill import artifact
from bitdistill.errors import ArtifactError
from bitdistill.report import text
from bitdistill.report.run_folder import FURTHER_TEACHERS

log = logging.getLogger("bitdistill")
REDO = "redo.json"
PART_OF = {"writer": "augment", "label_scores": "distill", **dict.fromkeys(FURTHER_TEACHERS, "distill")}
"""Work with an artifact of its own that is no stage: where its settings changed, it is made again with the stage."""


@dataclass
class Redo:
    """Marks of one run.

    Marks of a new command are written when its first work begins (`save`), so that a refused command leaves none.
    """

    path: Path
    named: Mapping[str, frozenset[str]]
    """Stages that this command is told to redo, and for each all that is made again with it."""
    asked: set[str]
    """Stages that a command was told to redo and that did not come to its end."""
    stale: dict[str, str]
    """Stages that must be made again, each with the key under which that was begun, or ""."""

    @classmethod
    def open(cls, run_dir: Path, named: Mapping[str, frozenset[str]]) -> Redo:
        """The marks that are there and those of this command. A command given again goes on, and does not begin again.

        Raises:
            ArtifactError: the file is damaged.
        """
        path = run_dir / REDO
        asked, stale = read(run_dir)
        for stage, also in named.items():
            if stage in asked:
                log.info("--redo %s: goes on where it stopped (remove %s to begin again)", stage, path)
            else:
                stale = {**dict.fromkeys(also, ""), **stale}
        return cls(path, named, asked | named.keys(), stale)

    def wants(self, stage: str) -> bool:
        """Whether a stage is to be made again, or may be where its settings changed since it was."""
        return not self.stale.keys().isdisjoint((stage, PART_OF.get(stage))) or self._names(stage)

    def begin(self, stage: str, key: str, checkpoints: Path) -> None:
        """Drop checkpoints of what is replaced; those that the redo itself made under this key stay.

        Raises:
            StorageError: the file system refused.
        """
        begun = self.stale.get(stage)
        # Begun with other settings, and not named by this command: whether that is dropped is for the user to say
        if begun != key and (not begun or self._names(stage)) and checkpoints.exists():
            with artifact.storage_errors(checkpoints):
                shutil.rmtree(checkpoints)
        self.stale[stage] = key
        self.save()

    def done(self, stage: str) -> None:
        """A stage was made."""
        if self.stale.pop(stage, None) is not None:
            self.save()

    def end(self, stages: Collection[str]) -> None:
        """The command came to its end: what it went through and did not make, the recipe does not have."""
        self.asked -= self.named.keys()
        self.stale = {stage: key for stage, key in self.stale.items() if stage not in stages}
        self.save()

    def save(self) -> None:
        """Write the file, or remove it when nothing is left to make again."""
        if self.stale:
            text.write(
                self.path, json.dumps({"asked": sorted(self.asked), "stale": self.stale}, indent=2) + "\n"
            )
            return
        with artifact.storage_errors(self.path):
            self.path.unlink(missing_ok=True)

    def _names(self, stage: str) -> bool:
        return any(PART_OF.get(stage, stage) in also for also in self.named.values())


def read(run_dir: Path) -> tuple[set[str], dict[str, str]]:
    """Stages asked for and stale stages of a run's folder (see `Redo`).

    Raises:
        ArtifactError: the file is damaged.
    """
    path = run_dir / REDO
    try:
        marks = json.loads(path.read_text("utf-8"))
        return {str(name) for name in marks["asked"]}, {str(k): str(v) for k, v in marks["stale"].items()}
    except FileNotFoundError:
        return set(), {}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ArtifactError(
            f"{path}: unreadable marks of a redo ({error!r}); remove the file and name the stages with --redo again"
        ) from error
