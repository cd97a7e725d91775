"""How likely the engine finds reference answers: the same figures as `bitdistill.eval.likelihood`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bitdistill.engine import _native

LOGITS = 2**26
"""Logits made at a time (256 MiB of float32), whatever the vocabulary."""


def nats(model: Any, prompts: Sequence[NDArray[np.int32]], answers: Sequence[Sequence[int]]) -> list[float]:
    """Negative log-likelihood of each answer's tokens after its prompt, summed."""
    sequences = [_native.Sequence(model) for _ in prompts]
    found = np.zeros(len(prompts))
    # The prompt's last token predicts the answer's first one, the answer's tokens the next of it.
    first = model.forward(list(zip(sequences, prompts, strict=True)), "last")
    begun = [n for n, answer in enumerate(answers) if answer]
    if begun:
        found[begun] += _nll(first[begun], np.array([answers[n][0] for n in begun]))
    limit = max(1, LOGITS // first.shape[1])
    for group in _groups(answers, limit):
        parts = [(n, answers[n][at : at + count + 1]) for n, at, count in group]
        segments = [(sequences[n], np.array(ids[:-1], dtype=np.int32)) for n, ids in parts]
        values = _nll(model.forward(segments, "all"), np.concatenate([ids[1:] for _, ids in parts]))
        np.add.at(found, np.repeat([n for n, _ in parts], [len(ids) - 1 for _, ids in parts]), values)
    return [float(value) for value in found]


def _groups(answers: Sequence[Sequence[int]], limit: int) -> Iterator[list[tuple[int, int, int]]]:
    """(answer, first token, tokens) of each forward pass: at most `limit` tokens together, each answer once in a pass
    and its tokens in their order. Its last token predicts nothing that is scored."""
    group: list[tuple[int, int, int]] = []
    room = limit
    for n, answer in enumerate(answers):
        at = 0
        while at < len(answer) - 1:
            count = min(len(answer) - 1 - at, room)
            group.append((n, at, count))
            at, room = at + count, room - count
            if not room:
                yield group
                group, room = [], limit
    if group:
        yield group


def _nll(logits_NV: NDArray[np.float32], targets_N: NDArray[np.integer]) -> NDArray[np.float64]:
    """-log softmax(logits)[target] of each row: float64 [N]."""
    found = np.empty(len(targets_N))
    for n, (logits_V, target) in enumerate(zip(logits_NV, targets_N, strict=True)):
        most = float(logits_V.max())
        total = np.exp(logits_V - most, dtype=np.float32).sum(dtype=np.float64)
        found[n] = most + np.log(total) - float(logits_V[target])
    return found
