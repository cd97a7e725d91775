"""What stages share: the run's folder and device, task data, stage keys, and skipping finished work."""

from __future__ import annotations

import json
import logging
import os
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from bitdistill import artifact
from bitdistill.config import Loop, Recipe
from bitdistill.data import readers, tasks
from bitdistill.data.batches import TaskBatches
from bitdistill.data.tasks import Example
from bitdistill.errors import ArtifactError, DataError, RecipeError
from bitdistill.eval.results import hardware, versions
from bitdistill.models.student import save_student
from bitdistill.recipe import dump_recipe
from bitdistill.recipe import run_dir as run_dir_of
from bitdistill.report import text
from bitdistill.stages.redo import PART_OF, Redo
from bitdistill.stages.reuse import Reuse, drop_link
from bitdistill.train.checkpoint import newest_key
from bitdistill.train.compile import wants_compile
from bitdistill.train.loop import FitResult
from bitdistill.train.tracking import Sink, Tracker, open_sinks

log = logging.getLogger("bitdistill")
COMPILED_LENGTHS = 4
"""Lengths of rows that blocks are compiled for: each takes seconds, and a CUDA graph of its own."""


def choose_device(name: str) -> torch.device:
    """The recipe's device; auto takes a GPU when there is one.

    Raises:
        RecipeError: cuda is asked for and absent.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise RecipeError("device: cuda is asked for, but no CUDA device is visible; use device: auto or cpu")
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)


def git_commit() -> str | None:
    """Commit of the source checkout that runs, or None for an installed package."""
    here = Path(__file__).parent
    try:
        done = subprocess.run(
            ["git", "-C", str(here), "rev-parse", "--short=12", "HEAD"],
            capture_output=True,
            text=True,
            check=False,
        )
    except OSError:
        return os.environ.get("BITDISTILL_COMMIT")
    return done.stdout.strip() if done.returncode == 0 else os.environ.get("BITDISTILL_COMMIT")


@dataclass
class Run:
    """One recipe being run: where its artifacts go and what it runs on."""

    recipe: Recipe
    run_dir: Path
    device: torch.device
    command: str
    redo: Redo
    quiet: bool = False
    sinks: list[Sink] = field(default_factory=list)
    keys: dict[str, str] = field(default_factory=dict)
    reuse: Reuse | None = None
    """Finished work of sibling runs (sweeps); None: each run makes its own."""
    recorded: bool = False

    @classmethod
    def open(
        cls,
        recipe: Recipe,
        *,
        command: str,
        redo: Mapping[str, frozenset[str]] = MappingProxyType({}),
        quiet: bool = False,
        reuse: Reuse | None = None,
    ) -> Run:
        """Create or reopen the run's folder.

        Args:
            redo: stages to run again, each with all that is to be made again with it.
        """
        run_dir = run_dir_of(recipe)
        device = choose_device(recipe.device)
        if recipe.threads is not None:
            torch.set_num_threads(recipe.threads)
        with artifact.storage_errors(run_dir):
            run_dir.mkdir(parents=True, exist_ok=True)
        marks = Redo.open(run_dir, redo)
        sinks = open_sinks(recipe.track, run_dir, run_dir.name)
        return cls(recipe, run_dir, device, command, marks, quiet, sinks, reuse=reuse)

    def record(self) -> None:
        """Write recipe, command, versions, hardware and what is to be made again into the run's folder, once.

        Not before work begins: a command that is refused must not describe what an earlier one made.
        """
        if self.recorded:
            return
        about = {
            "name": self.recipe.name,
            "seed": self.recipe.seed,
            "command": self.command,
            "commit": git_commit(),
            "versions": versions(),
            "hardware": hardware(self.device),
            "started": datetime.now(UTC).isoformat(timespec="seconds"),
            "recipe_hash": artifact.hash_json(self.recipe.model_dump(mode="json", by_alias=True)),
        }
        text.write(self.run_dir / "recipe.yaml", dump_recipe(self.recipe))
        text.write(self.run_dir / "run.json", json.dumps(about, indent=2) + "\n")
        self.redo.save()
        self.recorded = True

    def section(self, name: str) -> dict[str, Any]:
        """A recipe section as JSON without the keys that cannot change a result."""
        value = getattr(self.recipe, name)
        dumped: dict[str, Any] = value.model_dump(mode="json", by_alias=True)
        for noise in ("cache_dir", "branch_steps", "processes"):
            dumped.pop(noise, None)
        for noise in ("log_every_steps", "checkpoint_every_steps", "checkpoint_every_s"):
            dumped.get("loop", {}).pop(noise, None)
        for later in (
            "packing",
            "int8_backward",
            "micro_batch_tokens",
        ):  # artifacts from before these keys stay valid
            if not dumped.get("loop", {}).get(later, True):
                del dumped["loop"][later]
        if dumped.get("optim", {}).get("matrix_rate") == "equal":
            del dumped["optim"]["matrix_rate"]
        for later in ("whole_share", "min_words"):
            if not dumped.get(later, True):
                del dumped[later]
        return dumped

    def finished(self, stage: str, folder: Path, inputs: Mapping[str, Any]) -> bool:
        """Whether `stage` need not run: its artifact is there, was made from the same inputs, and no redo is due.

        Records the stage's key for the stages after it; if the stage must run, its work begins here.

        Raises:
            ArtifactError: an artifact or a checkpoint made from other inputs is there; it is never dropped unasked.
        """
        remedy = f"use --redo {PART_OF.get(stage, stage)}, or another name in the recipe"
        key = self.keys[stage] = artifact.hash_json(dict(inputs))
        there = stage not in self.redo.stale and artifact.exists(folder)
        manifest = artifact.read_manifest(folder) if there else {}
        if there and manifest.get("key") == key:
            log.info("%s: finished before, kept (%s)", stage, folder)
            return True
        redo = self.redo.wants(stage)
        if there and not redo:
            old, new = manifest.get("inputs", {}), json.loads(json.dumps(dict(inputs)))
            changed = ", ".join(_differences(old, new)[:3]) or "inputs"
            also = "".join(f" --redo {name}" for name in self._made_from_the_same(stage, old, new))
            remedy = remedy.replace(",", f"{also},", 1)
            raise ArtifactError(f"{folder}: made with other settings ({changed}); {remedy}")
        drop_link(folder)  # a link to another run's artifact, which may be gone
        if not redo and self.reuse is not None and self.reuse.link(key, folder):
            log.info("%s: taken from %s", stage, folder.resolve())
            return True
        checkpoints = self.checkpoints(stage)
        if redo:
            self.redo.begin(stage, key, checkpoints)
        if newest_key(checkpoints) not in (None, key):
            raise ArtifactError(f"{checkpoints}: begun with other settings, data or model; {remedy}")
        self.record()
        return False

    def _made_from_the_same(self, stage: str, old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
        """Stages that are finished here and that would be refused next, for the same change: the rows or model that
        `stage` was made from and is not any more are inputs of theirs too, wherever these hold them."""
        shared = {"model", "sft", *self.train_inputs()}
        gone = {key: old[key] for key in sorted(shared & old.keys()) if old[key] != new.get(key)}
        found = set()
        for folder in self.run_dir.iterdir():
            if not artifact.exists(folder):
                continue
            manifest = artifact.read_manifest(folder)
            inputs, other = manifest.get("inputs"), manifest.get("stage", "")
            if isinstance(inputs, dict) and any(_holds(inputs, key, value) for key, value in gone.items()):
                found.add(PART_OF.get(other, other))
        return sorted(found - {PART_OF.get(stage, stage)})

    def meta(self, stage: str, inputs: Mapping[str, Any], fit: FitResult | None = None) -> dict[str, Any]:
        """Manifest entries of a stage's artifact: its key, its inputs and what it cost."""
        entries: dict[str, Any] = {"stage": stage, "key": self.keys[stage], "inputs": dict(inputs)}
        if fit is not None:
            entries["training"] = vars(fit)
        return entries

    def tracker(self, stage: str, total_steps: int) -> Tracker:
        return Tracker(stage, self.run_dir, total_steps, sinks=self.sinks, quiet=self.quiet)

    def checkpoints(self, stage: str) -> Path:
        return self.run_dir / "checkpoints" / stage

    def save_artifact(self, stage: str, model: Any, tokenizer: Any, folder: Path, **options: Any) -> None:
        """Write a stage's artifact, then drop the checkpoints that led to it."""
        save_student(
            model, tokenizer, folder, recipe=self.recipe.model_dump(mode="json", by_alias=True), **options
        )
        self.redo.done(stage)
        shutil.rmtree(self.checkpoints(stage), ignore_errors=True)

    @cached_property
    def data_fingerprints(self) -> dict[str, str]:
        """SHA-256 of each data source of the recipe."""
        data = self.recipe.data
        names = {"train": data.train, "validation": data.validation, "test": data.test}
        return {k: readers.source_fingerprint(v) for k, v in names.items() if v is not None}

    def train_inputs(self) -> dict[str, Any]:
        """What determines the training rows: part of every task stage's key."""
        data = self.recipe.data
        return {
            "task": self.recipe.task.model_dump(mode="json", by_alias=True),
            "train": self.data_fingerprints["train"],
            "limit_train": data.limit_train,
            "validation_fraction": data.validation_fraction if data.validation is None else 0.0,
            "max_length": data.max_length,
            # Not for classification, whose artifacts stay valid. Before this entry the length of its answer decided
            # where a row's prompt was cut.
            **({} if self.recipe.task.kind == "classification" else {"prompts": "cut for max_new_tokens"}),
            # Only where it is set, and with what draws the rows, so that older artifacts keep their keys
            **(
                {}
                if data.rows_per_label is None
                else {"rows_per_label": [data.rows_per_label, self.recipe.seed]}
            ),
        }

    def _split_train(self) -> tuple[list[readers.Row], list[readers.Row]]:
        """Training rows and, when no validation file is named, the fraction of them that is held out."""
        data = self.recipe.data
        rows = readers.read_rows(data.train, limit=data.limit_train)
        held_out = 0 if data.validation is not None else int(len(rows) * data.validation_fraction)
        if not held_out:
            return rows, []
        # A fixed seed: the split must not move between the seeds of one experiment.
        order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0)).tolist()
        return [rows[i] for i in order[held_out:]], [rows[i] for i in order[:held_out]]

    def train_rows(self) -> list[readers.Row]:
        """Training rows, without what is held out of them."""
        rows, task = self._split_train()[0], self.recipe.task
        if self.recipe.data.rows_per_label is None:
            return rows
        return draw_per_label(rows, task.label_field, self.recipe.data.rows_per_label, self.recipe.seed)

    def train_examples(self, tokenizer: Any) -> list[Example]:
        """Encoded training rows."""
        return tasks.encode(self.recipe.task, self.train_rows(), tokenizer, self.recipe.data.max_length)

    def eval_rows(self) -> list[readers.Row]:
        """Rows that are scored: eval.split of the recipe.

        Raises:
            DataError: the recipe names no rows for that split.
        """
        data, split = self.recipe.data, self.recipe.eval.split
        if split == "test" and data.test is not None:
            return readers.read_rows(data.test, limit=data.limit_test)
        if data.validation is not None:
            return readers.read_rows(data.validation, limit=data.limit_test)
        _, held_out = self._split_train()
        if not held_out:
            raise DataError(
                f"eval.split {split}: {'no data.test and ' if split == 'test' else ''}no data.validation is named, and "
                f"data.validation_fraction {data.validation_fraction} holds out no row; set one of them"
            )
        return held_out[: data.limit_test]

    def task_batches(
        self,
        examples: list[Example],
        loop: Loop,
        pad_id: int,
        compiling: bool,
        label_scores_NC: torch.Tensor | None = None,
    ) -> TaskBatches:
        """Batches of encoded rows; compiled runs pad to few lengths so that few graphs are built."""
        return TaskBatches(
            examples,
            batch_rows=loop.batch_rows,
            micro_batch_rows=loop.micro_batch_rows or loop.batch_rows,
            micro_batch_tokens=loop.micro_batch_tokens,
            seed=self.recipe.seed,
            pad_id=pad_id,
            few_lengths=COMPILED_LENGTHS if compiling and not loop.packing else None,
            packing=loop.packing,
            label_scores_NC=label_scores_NC,
        )

    def compiling(self, loop: Loop) -> bool:
        return wants_compile(loop.compile, self.device)


def draw_per_label(rows: list[readers.Row], field: str, count: int, seed: int) -> list[readers.Row]:
    """At most `count` rows of each value of `field`, in the order of `rows`; drawn by seed."""
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed)).tolist()
    left: dict[str, int] = {}
    chosen = []
    for index in order:
        label = str(rows[index].fields.get(field))
        left[label] = left.get(label, count) - 1
        if left[label] >= 0:
            chosen.append(index)
    return [rows[index] for index in sorted(chosen)]


def _holds(tree: Any, key: str, value: Any) -> bool:
    """Whether a JSON value has `key` with that value, at any depth."""
    if not isinstance(tree, dict):
        return False
    return (key in tree and tree[key] == value) or any(_holds(t, key, value) for t in tree.values())


def _differences(old: Any, new: Any, place: str = "") -> list[str]:
    """Paths at which two JSON values differ, with both values when they are short."""
    if isinstance(old, dict) and isinstance(new, dict):
        found = []
        for key in sorted(old.keys() | new.keys()):
            found += _differences(old.get(key), new.get(key), f"{place}.{key}" if place else key)
        return found
    if old == new:
        return []
    shown = f"{old!r} -> {new!r}"
    return [f"{place} {shown}" if len(shown) < 60 else place]


def pad_token_id(tokenizer: Any) -> int:
    """An id for padding; padded positions never count, so end-of-text serves where there is no pad token."""
    for name in ("pad_token_id", "eos_token_id"):
        value = getattr(tokenizer, name)
        if value is not None:
            return int(value)
    return 0
