"""Answers of a trained model to new rows: label probabilities, or generated text."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bitdistill.config import Task
from bitdistill.data import tasks
from bitdistill.data.readers import Row
from bitdistill.errors import ArtifactError, DataError
from bitdistill.eval.classify import classify
from bitdistill.eval.generate import generate
from bitdistill.models.student import load_student
from bitdistill.recipe import parse_recipe
from bitdistill.stages.common import choose_device, pad_token_id


@dataclass(frozen=True)
class Answer:
    """One answer. `probabilities` maps label values to shares that add up to 1; empty for generation.

    They are softmax over the label words' log-likelihoods, so they say how the model weighs these labels
    against each other, not how likely it would write one at all.
    """

    where: str
    text: str
    label: str | None
    probabilities: dict[str, float]


class Predictor:
    """A model folder ready to answer: load once, call often.

    Args:
        path: a packed student, or any other folder that a run wrote (its manifest names the task).
        device: where to run; auto takes a GPU when there is one.
        batch_rows: rows of one forward pass.

    Raises:
        ArtifactError: no model there, corrupt, or without a recipe in its manifest.
        RecipeError: cuda is asked for and absent.
    """

    def __init__(self, path: str | Path, *, device: str = "cpu", batch_rows: int = 32) -> None:
        self.device, self.batch_rows = choose_device(device), batch_rows
        model, self.tokenizer, manifest = load_student(Path(path), device=self.device)
        self.model = model.eval()
        if not isinstance(manifest.get("recipe"), dict):
            raise ArtifactError(
                f"{path}: its manifest has no recipe, so the task is not known; export it again"
            )
        if "imported" in manifest:
            raise ArtifactError(
                f"{path}: was imported, so no task is stored with it; use `bitdistill generate`"
            )
        recipe = parse_recipe(_by_alias(manifest["recipe"]), f"{path}: recipe in the manifest")
        self.task: Task = recipe.task
        self.max_length = recipe.data.max_length

    @torch.inference_mode()
    def __call__(
        self, inputs: Sequence[str | Mapping[str, Any] | Row], places: Sequence[str] | None = None
    ) -> list[Answer]:
        """Answer each input, in order.

        Args:
            inputs: texts (for tasks with one field), mappings from field to value, or rows from a file.
            places: where each comes from, for errors and answers; default: input 1, input 2 and so on. Rows know.

        Raises:
            DataError: a field is missing, a text holds half a character, or a text is given to a task with
                several fields.
        """
        rows = tasks.as_rows(self.task, inputs, places)
        if not rows:
            raise DataError("predict: no input; give a text, --field or --file")
        vocab = self.model.get_input_embeddings().weight.shape[0]
        examples = tasks.encode(
            self.task, rows, self.tokenizer, self.max_length, require_answers=False, vocab_size=vocab
        )
        score = classify if self.task.kind == "classification" else generate
        predictions = score(
            self.model,
            self.tokenizer,
            self.task,
            examples,
            batch_rows=self.batch_rows,
            device=self.device,
            pad_id=pad_token_id(self.tokenizer),
        )
        labels = list(self.task.labels)
        return [
            Answer(
                where=row.where,
                text=prediction.text,
                label=None if prediction.label is None else labels[prediction.label],
                probabilities=dict(zip(labels, softmax(prediction.scores), strict=True)),
            )
            for row, prediction in zip(rows, predictions, strict=True)
        ]


def predict(
    path: str | Path,
    inputs: Sequence[str | Mapping[str, Any] | Row],
    *,
    device: str = "cpu",
    batch_rows: int = 32,
) -> list[Answer]:
    """Load the model at `path` and answer `inputs`; see `Predictor`."""
    return Predictor(path, device=device, batch_rows=batch_rows)(inputs)


def softmax(scores: Sequence[float]) -> list[float]:
    """exp(s) / sum exp(s), stable; empty for no scores."""
    if not scores:
        return []
    top = max(scores)
    weights = [math.exp(score - top) for score in scores]
    total = sum(weights)
    return [weight / total for weight in weights]


def _by_alias(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """Manifests may hold `lambda_` for `lambda`; both are read."""
    tree = dict(recipe)
    distill = tree.get("distill")
    if isinstance(distill, dict) and "lambda_" in distill:
        tree["distill"] = {("lambda" if k == "lambda_" else k): v for k, v in distill.items()}
    return tree
