"""Classification by label words through the engine: the same scores as `bitdistill.eval.classify`.

All label words of a task form a tree of tokens. The engine runs each prompt and the tree's inner nodes once,
in one pass, and scores every next token of every word there.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bitdistill.config import Task
from bitdistill.data import tasks
from bitdistill.data.readers import Row
from bitdistill.data.tasks import Example, label_token_ids
from bitdistill.errors import ArtifactError, DataError
from bitdistill.eval.prediction import OnProgress, Prediction

ROWS_AT_ONCE = 64
"""Rows of one call of the engine, which takes them one by one; between calls it is told how far the work has come."""


@dataclass(frozen=True)
class Answer:
    """One answer; `probabilities` maps label values to shares that add up to 1 (softmax over the words)."""

    where: str
    text: str
    label: str | None
    probabilities: dict[str, float]


@dataclass(frozen=True)
class LabelTree:
    """Label words as a token tree.

    tokens, parents: inner nodes; -1 is the root (the prompt).
    queries: (node, token) pairs to score. words: for each label, its queries' positions.
    """

    tokens: list[int]
    parents: list[int]
    queries: list[tuple[int, int]]
    words: list[list[int]]


def label_tree(label_ids: Sequence[tuple[int, ...]]) -> LabelTree:
    """The tree of all label words' proper prefixes, parents first."""
    nodes: dict[tuple[int, ...], int] = {(): -1}
    tokens: list[int] = []
    parents: list[int] = []
    queries: dict[tuple[int, int], int] = {}
    words: list[list[int]] = []
    for ids in label_ids:
        used = []
        for end, token in enumerate(ids):
            prefix = ids[:end]
            if prefix not in nodes:
                nodes[prefix] = len(tokens)
                tokens.append(ids[end - 1])
                parents.append(nodes[prefix[:-1]])
            used.append(queries.setdefault((nodes[prefix], token), len(queries)))
        words.append(used)
    return LabelTree(tokens, parents, list(queries), words)


class Classifier:
    """A task with its label words encoded once.

    Args:
        task: a classification task.
        tokenizer: of the model.
        max_length: longest prompt with its answer, in tokens.

    Raises:
        DataError: not a classification task, or label words that cannot be told apart.
    """

    def __init__(self, task: Task, tokenizer: Any, max_length: int) -> None:
        if task.kind != "classification":
            raise DataError(f"task {task.name} is {task.kind}, not classification; use generate")
        self.task, self.tokenizer, self.max_length = task, tokenizer, max_length
        self.tree = label_tree(label_token_ids(task, tokenizer))

    def encode(self, inputs: Sequence[str | Mapping[str, Any] | Row], vocab_size: int) -> list[Example]:
        """Inputs as examples: texts (for tasks with one field), mappings from field to value, or rows."""
        rows = tasks.as_rows(self.task, inputs)
        return tasks.encode(
            self.task, rows, self.tokenizer, self.max_length, require_answers=False, vocab_size=vocab_size
        )

    def predictions(
        self, model: Any, examples: Sequence[Example], progress: OnProgress | None = None
    ) -> list[Prediction]:
        """The most likely label of each example, the first of equals; `progress` is told (examples done, to do)."""
        tree = self.tree
        scores = np.zeros((len(examples), len(tree.words)), dtype=np.float32)
        for start in range(0, len(examples), ROWS_AT_ONCE):
            prompts = [list(example.prompt_ids) for example in examples[start : start + ROWS_AT_ONCE]]
            log_probs: NDArray[np.float32] = model.score_tree(
                prompts, tree.tokens, tree.parents, tree.queries
            )
            for label, used in enumerate(tree.words):
                for query in used:
                    scores[start : start + len(prompts), label] += log_probs[:, query]
            if progress is not None:
                progress(start + len(prompts), len(examples))
        names = [word.strip() for word in self.task.labels.values()]
        best = scores.argmax(axis=1).tolist() if len(examples) else []
        return [
            Prediction(index, label, tuple(row), names[label])
            for index, (label, row) in enumerate(zip(best, scores.tolist(), strict=True))
        ]

    def answers(self, examples: Sequence[Example], predictions: Sequence[Prediction]) -> list[Answer]:
        """Predictions with label values and their shares."""
        values = list(self.task.labels)
        return [
            Answer(
                where=example.where,
                text=prediction.text,
                label=None if prediction.label is None else values[prediction.label],
                probabilities=dict(zip(values, _softmax(prediction.scores), strict=True)),
            )
            for example, prediction in zip(examples, predictions, strict=True)
        ]


def stored_task(manifest: Mapping[str, Any] | None, place: str) -> tuple[Task, int]:
    """The task and max_length in the recipe of a student's manifest.

    Raises:
        ArtifactError: there is no manifest, or no readable recipe in it.
    """
    from pydantic import ValidationError

    if manifest is not None and "imported" in manifest:
        raise ArtifactError(
            f"{place}: was imported, so no task is stored with it; pass task=, or use generate"
        )
    recipe = None if manifest is None else manifest.get("recipe")
    try:
        if not isinstance(recipe, Mapping):
            raise TypeError("no recipe")
        return Task.model_validate(recipe["task"]), int(recipe["data"]["max_length"])
    except (KeyError, TypeError, ValueError, ValidationError) as error:
        raise ArtifactError(
            f"{place}: its manifest holds no task ({' '.join(str(error).split())[:100]}); "
            "pass task= or export again"
        ) from error


def _softmax(scores: Sequence[float]) -> list[float]:
    top = max(scores)
    weights = [math.exp(score - top) for score in scores]
    total = sum(weights)
    return [weight / total for weight in weights]
