"""Finished work of sibling runs, found by key: a sweep trains a teacher once, whatever its cells are called.

A key is the hash of everything that determines an artifact (model, rows, recipe section, seed), so an artifact
with the same key is the same artifact. It is linked, not copied, into the run that needs it.
"""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass, field
from pathlib import Path

from bitdistill import artifact
from bitdistill.config import Task
from bitdistill.errors import ArtifactError
from bitdistill.eval.prediction import Prediction
from bitdistill.eval.results import ResultRow, read_results
from bitdistill.report.run_folder import ARTIFACTS, read_answers
from bitdistill.stages import redo


@dataclass
class Reuse:
    """Artifacts and scored rows by key."""

    artifacts: dict[str, Path] = field(default_factory=dict)
    rows: dict[str, tuple[ResultRow, Path]] = field(default_factory=dict)
    """score_key -> (row, folder of the run that scored it)."""

    @classmethod
    def of_runs(cls, output_dir: Path) -> Reuse:
        """Everything finished in the run folders below `output_dir`; unreadable ones are left out."""
        found = cls()
        if output_dir.is_dir():
            for run in sorted(output_dir.iterdir()):
                if (run / "recipe.yaml").is_file():
                    found.add(run)
        return found

    def add(self, run: Path) -> None:
        """Take up a run's finished artifacts and rows; what is there already stays."""
        try:
            _, stale = redo.read(run)
        except ArtifactError:
            return
        for name in ARTIFACTS:
            folder = run / name
            if folder.is_symlink() or not artifact.exists(folder):
                continue
            try:
                manifest = artifact.read_manifest(folder)
            except ArtifactError:
                continue
            key = manifest.get("key")
            if isinstance(key, str) and manifest.get("stage") not in stale:
                self.artifacts.setdefault(key, folder.resolve())
        if not (run / "results.json").is_file():
            return
        try:
            rows = read_results(run / "results.json")
        except ArtifactError:
            return
        for row in rows:
            if row.score_key is not None and (run / "predictions" / f"{row.name}.jsonl").is_file():
                self.rows.setdefault(row.score_key, (row, run))

    def link(self, key: str, folder: Path) -> bool:
        """Link a finished artifact of that key to `folder`; False when there is none.

        Raises:
            StorageError: the file system refused.
        """
        found = self.artifacts.get(key)
        if found is None or not artifact.exists(found):
            return False
        with artifact.storage_errors(folder):
            folder.parent.mkdir(parents=True, exist_ok=True)
            folder.symlink_to(os.path.relpath(found, folder.parent.resolve()), target_is_directory=True)
        return True

    def row(self, key: str, name: str, run_dir: Path) -> ResultRow | None:
        """A scored row of that key, renamed to `name`, its predictions copied into `run_dir`; None without one.

        Rates are only comparable within one run, so the row has none.

        Raises:
            StorageError: the file system refused.
        """
        if key not in self.rows:
            return None
        row, run = self.rows[key]
        target = run_dir / "predictions" / f"{name}.jsonl"
        source = run / "predictions" / f"{row.name}.jsonl"
        if not source.is_file():
            return None
        if source.resolve() != target.resolve():
            with artifact.storage_errors(target):
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(source, target)
        return row.model_copy(update={"name": name, "tokens_per_s": None})


def drop_link(folder: Path) -> None:
    """Remove a link to another run's artifact (not the artifact), so that `folder` can be written."""
    if folder.is_symlink():
        with artifact.storage_errors(folder):
            folder.unlink()


def read_predictions(run_dir: Path, name: str, task: Task) -> list[Prediction] | None:
    """Predictions of a run's row, scores to four places; None when there is no such file."""
    answers = read_answers(run_dir, name)
    if answers is None:
        return None
    names = {shown: index for index, shown in enumerate(task.shown_labels)}
    return [
        Prediction(
            answer.index,
            names[answer.prediction] if task.kind == "classification" else None,
            answer.scores,
            answer.prediction,
        )
        for answer in answers
    ]
