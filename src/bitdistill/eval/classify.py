"""Classification by the likelihood of label words: the label whose word the model would rather write.

Shape legend: B rows, T tokens (padded on the right), P positions, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bitdistill.config import Task
from bitdistill.data.tasks import Example, label_token_ids
from bitdistill.eval.prediction import OnProgress, Prediction
from bitdistill.models.forward import final_hidden, logits_at

__all__ = ["LabelPath", "Prediction", "classify", "label_paths", "label_scores"]


@torch.inference_mode()
def classify(
    model: Any,
    tokenizer: Any,
    task: Task,
    examples: Sequence[Example],
    *,
    batch_rows: int,
    device: torch.device | str,
    pad_id: int,
    progress: OnProgress | None = None,
) -> list[Prediction]:
    """Label every example by exact summed log-likelihood of each label word's tokens after the prompt.

    One forward pass of a prompt scores all label words of one token. Longer words share prefixes: a prompt is
    repeated only once for each longest proper prefix among the words (see `label_paths`).

    Args:
        model: causal LM on `device`, in eval mode.
        tokenizer: the tokenizer that made the examples.
        task: its labels.
        examples: encoded rows; their answers are not read.
        batch_rows: rows of one forward pass.
        device: where the model is.
        pad_id: token id of the padding (its value changes nothing).
        progress: see `label_scores`.

    Returns:
        Predictions in the order of `examples`.

    Raises:
        DataError: label words that cannot be told apart.
    """
    words = [word.strip() for word in task.labels.values()]
    scores = label_scores(
        model,
        label_token_ids(task, tokenizer),
        examples,
        batch_rows=batch_rows,
        device=device,
        pad_id=pad_id,
        progress=progress,
    )
    best = scores.argmax(dim=1).tolist()
    return [
        Prediction(index, label, tuple(row), words[label])
        for index, (label, row) in enumerate(zip(best, scores.tolist(), strict=True))
    ]


@torch.inference_mode()
def label_scores(
    model: Any,
    label_ids: Sequence[tuple[int, ...]],
    examples: Sequence[Example],
    *,
    batch_rows: int,
    device: torch.device | str,
    pad_id: int,
    progress: OnProgress | None = None,
) -> Tensor:
    """Log-likelihood in nats of each label's tokens after each prompt: float32 [examples, labels], on CPU.

    Args:
        progress: called after each batch with (examples done, examples to do).
    """
    paths = label_paths(label_ids)
    rows = [(n, path) for n in range(len(examples)) for path in paths]
    # Equal lengths meet in a batch; the longest first, so that memory runs out early or never.
    rows.sort(key=lambda row: -(len(examples[row[0]].prompt_ids) + len(row[1].prefix)))
    scores = np.zeros((len(examples), len(label_ids)), dtype=np.float32)
    for start in range(0, len(rows), batch_rows):
        batch = rows[start : start + batch_rows]
        sequences = [(*examples[n].prompt_ids, *path.prefix) for n, path in batch]
        log_likelihoods = _step_log_probs(model, sequences, [path for _, path in batch], device, pad_id)
        added = [
            (n, label, value)
            for (n, path), values in zip(batch, log_likelihoods, strict=True)
            for (_, labels, _), value in zip(path.steps, values, strict=True)
            for label in labels
        ]
        at_row, at_label, values = zip(*added, strict=True)
        np.add.at(scores, (at_row, at_label), np.asarray(values, dtype=np.float32))
        if progress is not None:
            progress((start + len(batch)) // len(paths), len(examples))
    return torch.from_numpy(scores)


@dataclass(frozen=True, slots=True)
class LabelPath:
    """Tokens put after a prompt, and which next tokens to score where.

    steps: (position, labels, token): at `position` tokens of the prefix, `token` continues these labels.
    """

    prefix: tuple[int, ...]
    steps: tuple[tuple[int, tuple[int, ...], int], ...]


def label_paths(label_ids: Sequence[tuple[int, ...]]) -> list[LabelPath]:
    """Longest proper prefixes of the label words that cover all of them; each next token is scored once."""
    prefixes = {ids[:end] for ids in label_ids for end in range(len(ids))}
    longest = sorted(p for p in prefixes if not any(q != p and q[: len(p)] == p for q in prefixes))
    done: set[tuple[int, ...]] = set()
    paths = []
    for prefix in longest:
        steps = []
        for end in range(len(prefix) + 1):
            if (node := prefix[:end]) in done:
                continue
            done.add(node)
            for token in sorted({ids[end] for ids in label_ids if len(ids) > end and ids[:end] == node}):
                labels = tuple(n for n, ids in enumerate(label_ids) if ids[: end + 1] == (*node, token))
                steps.append((end, labels, token))
        paths.append(LabelPath(prefix, tuple(steps)))
    return paths


def _step_log_probs(
    model: Any,
    sequences: Sequence[tuple[int, ...]],
    paths: Sequence[LabelPath],
    device: torch.device | str,
    pad_id: int,
) -> list[list[float]]:
    """Log-probability of each path's steps, in their order."""
    width = max(len(s) for s in sequences)
    ids = torch.full((len(sequences), width), pad_id, dtype=torch.int64)
    for n, sequence in enumerate(sequences):
        ids[n, : len(sequence)] = torch.tensor(sequence)
    hidden = final_hidden(model, ids.to(device))
    # (row, position) pairs whose next token matters; the head runs on these alone.
    needed = sorted({(n, end) for n, path in enumerate(paths) for end, _, _ in path.steps})
    index = {pair: i for i, pair in enumerate(needed)}
    row = torch.tensor([n for n, _ in needed], device=device)
    position = torch.tensor(
        [len(sequences[n]) - len(paths[n].prefix) - 1 + end for n, end in needed], device=device
    )
    logits = logits_at(model, hidden[row, position]).float()
    log_norm = logits.logsumexp(dim=-1)
    pick = [(index[n, end], token) for n, path in enumerate(paths) for end, _, token in path.steps]
    at = torch.tensor([i for i, _ in pick], device=device)
    tokens = torch.tensor([t for _, t in pick], device=device)
    flat = iter((logits[at, tokens] - log_norm[at]).tolist())
    return [[next(flat) for _ in path.steps] for path in paths]
