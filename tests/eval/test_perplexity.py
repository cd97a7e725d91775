"""Perplexity and KL on text against slow twins: one window at a time, whole logits, float64."""

from __future__ import annotations

import copy
import hashlib
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from bitdistill.errors import DataError, ModelError
from bitdistill.eval import perplexity as module
from bitdistill.eval.perplexity import score_text


class Stream:
    def __init__(self, ids: np.ndarray) -> None:
        self.ids, self.n_tokens = ids, len(ids)

    def read(self, start: int, count: int) -> np.ndarray:
        assert start + count <= self.n_tokens
        return self.ids[start : start + count]


def text(count: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 340, count).astype(np.uint16)


@torch.no_grad()
def slow_log_probs(model: Any, ids: np.ndarray) -> Tensor:
    """Log-probabilities [T - 1, V] of what follows each token but the last."""
    logits = model(input_ids=torch.tensor(ids[None].astype("int64"))).logits
    return logits[0, :-1].double().log_softmax(-1)


def slow_nll(log_probs: Tensor, ids: np.ndarray) -> float:
    return -sum(float(log_probs[t - 1, int(ids[t])]) for t in range(1, len(ids)))


def digest(arrays: list[np.ndarray]) -> str:
    return hashlib.sha256(b"".join(a.astype("<i8").tobytes() for a in arrays)).hexdigest()


@pytest.mark.parametrize(
    ("total", "limit"), [(16 * 5, None), (16 * 5 + 1, None), (16 * 5 + 7, None), (99, 50)]
)
def test_equals_the_slow_twin(
    model: Any, monkeypatch: pytest.MonkeyPatch, total: int, limit: int | None
) -> None:
    monkeypatch.setattr(module, "HEAD_ELEMENTS", 340 * 10)  # the head in several pieces
    reference = copy.deepcopy(model)
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in reference.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    ids = text(total)
    told: list[tuple[int, int]] = []
    scores = score_text(
        model, Stream(ids), reference=reference, sequence_length=16, batch_rows=2, device="cpu",
        limit_tokens=limit, progress=lambda done, all_: told.append((done, all_)),
    )  # fmt: skip
    used = ids[:limit]
    windows = [w for w in (used[s : s + 16] for s in range(0, len(used), 16)) if len(w) > 1]
    own = [slow_log_probs(model, w) for w in windows]
    other = [slow_log_probs(reference, w) for w in windows]
    count = sum(len(w) - 1 for w in windows)

    def expected(log_probs: list[Tensor]) -> float:
        return math.exp(sum(slow_nll(p, w) for p, w in zip(log_probs, windows, strict=True)) / count)

    kl = sum(float((b.exp() * (b - a)).sum()) for a, b in zip(own, other, strict=True)) / count
    same = sum(int((a.argmax(-1) == b.argmax(-1)).sum()) for a, b in zip(own, other, strict=True)) / count
    assert scores.windows == len(windows)
    assert scores.perplexity.value == pytest.approx(expected(own), rel=1e-5)
    assert scores.reference_perplexity is not None
    assert scores.reference_perplexity.value == pytest.approx(expected(other), rel=1e-5)
    assert scores.kl is not None
    assert scores.kl.value == pytest.approx(kl, rel=1e-4)
    assert scores.same_token is not None
    assert scores.same_token.value == pytest.approx(100 * same)
    assert 0 < same < 1
    for score in (scores.perplexity, scores.reference_perplexity, scores.kl, scores.same_token):
        assert score.n == count
        assert score.low < score.value < score.high
    assert scores.tokens_sha256 == digest(windows)
    assert scores.best_sha256 == digest([a.argmax(-1).numpy() for a in own])
    assert told[0] == (0, len(used))
    assert told[-1] == (sum(map(len, windows)), len(used))


def test_a_model_beside_itself(model: Any) -> None:
    scores = score_text(
        model, Stream(text(64)), reference=model, sequence_length=16, batch_rows=2, device="cpu"
    )
    assert scores.kl is not None
    assert scores.kl.value == 0
    assert scores.same_token is not None
    assert scores.same_token.value == 100
    assert scores.reference_perplexity == scores.perplexity


def test_alone_there_is_nothing_to_compare(llama: Any) -> None:
    scores = score_text(llama, Stream(text(40)), sequence_length=16, batch_rows=2, device="cpu")
    assert (scores.reference_perplexity, scores.kl, scores.same_token) == (None, None, None)


def test_too_short_a_text(llama: Any) -> None:
    for count in (0, 1):
        with pytest.raises(DataError, match="at least two tokens"):
            score_text(llama, Stream(text(count)), sequence_length=8, batch_rows=1, device="cpu")


def test_a_text_of_another_vocabulary(llama: Any) -> None:
    with pytest.raises(DataError, match="token id 340 in the text, but the model has 340 tokens"):
        score_text(llama, Stream(np.array([1, 340, 2])), sequence_length=8, batch_rows=1, device="cpu")


def test_a_reference_of_another_vocabulary(llama: Any) -> None:
    smaller = copy.deepcopy(llama)
    smaller.resize_token_embeddings(300)
    with pytest.raises(ModelError, match="the reference has 300 tokens, the model 340"):
        score_text(llama, Stream(text(20)), reference=smaller, sequence_length=8, batch_rows=1, device="cpu")
