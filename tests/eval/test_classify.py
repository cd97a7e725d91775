"""Label-word likelihoods against a slow twin: one prompt at a time, with its KV cache, token by token."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from bitdistill.config import Task
from bitdistill.data import tasks
from bitdistill.data.readers import Row
from bitdistill.data.tasks import Example
from bitdistill.errors import DataError
from bitdistill.eval import classify as module
from bitdistill.eval.classify import classify, label_scores
from bitdistill.eval.prediction import Prediction

TEXTS = [
    "a film",
    "the card is lost .",
    "x",
    "a charming film , and the card is not lost yet " * 2,
    "yes no yes",
]
SINGLE = {"0": " positive", "1": " negative", "2": " neutral"}
# Two of one token, three that share the first and two that share the first two tokens.
MIXED_IDS = [(5,), (9,), (7, 11), (7, 12, 13), (7, 12, 14), (6, 5, 5, 5)]


def task_of(labels: dict[str, str]) -> Task:
    return Task(name="t", kind="classification", template="{text}\nAnswer:", labels=labels)


def encode(task: Task, tokenizer: Any) -> list[Example]:
    rows = [Row({"text": t}, f"t:{n}") for n, t in enumerate(TEXTS)]
    return tasks.encode(task, rows, tokenizer, 128, require_answers=False)


@torch.no_grad()
def slow_score(model: Any, prompt: tuple[int, ...], word: tuple[int, ...]) -> float:
    """log p(word | prompt) by single steps with the KV cache."""
    output = model(input_ids=torch.tensor([prompt]), use_cache=True)
    total = 0.0
    for token in word:
        total += float(output.logits[0, -1].double().log_softmax(-1)[token])
        output = model(
            input_ids=torch.tensor([[token]]), past_key_values=output.past_key_values, use_cache=True
        )
    return total


@pytest.mark.parametrize("batch_rows", [1, 3, 64])
def test_scores_equal_the_slow_twin(model: Any, tokenizer: Any, batch_rows: int) -> None:
    examples = encode(task_of(SINGLE), tokenizer)
    told: list[tuple[int, int]] = []
    scores = label_scores(
        model,
        MIXED_IDS,
        examples,
        batch_rows=batch_rows,
        device="cpu",
        pad_id=1,
        progress=lambda *rows: told.append(rows),
    )
    assert told == sorted(told)
    assert told[-1] == (len(examples), len(examples))
    assert {total for _, total in told} == {len(examples)}
    expected = [[slow_score(model, e.prompt_ids, word) for word in MIXED_IDS] for e in examples]
    torch.testing.assert_close(scores, torch.tensor(expected), rtol=1e-4, atol=1e-4)


def test_padding_value_changes_nothing(model: Any, tokenizer: Any) -> None:
    examples = encode(task_of(SINGLE), tokenizer)
    one, other = (
        label_scores(model, MIXED_IDS, examples, batch_rows=4, device="cpu", pad_id=pad) for pad in (0, 77)
    )
    assert torch.equal(one, other)


def test_classify_in_the_order_of_the_examples(llama: Any, tokenizer: Any) -> None:
    task = task_of(SINGLE)
    examples = encode(task, tokenizer)
    predictions = classify(llama, tokenizer, task, examples, batch_rows=2, device="cpu", pad_id=1)
    words = tasks.label_token_ids(task, tokenizer)
    for n, (prediction, example) in enumerate(zip(predictions, examples, strict=True)):
        expected = [slow_score(llama, example.prompt_ids, word) for word in words]
        best = max(range(3), key=expected.__getitem__)
        assert isinstance(prediction, Prediction)
        assert (prediction.index, prediction.label) == (n, best)
        assert prediction.scores == pytest.approx(expected, rel=1e-4, abs=1e-4)
        assert prediction.text == ["positive", "negative", "neutral"][best]


def test_forward_rows(llama: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """One-token words cost one row a prompt; longer ones one for each longest shared prefix."""
    examples = encode(task_of(SINGLE), tokenizer)
    rows = 0
    forward = module.final_hidden

    def count(model: Any, ids: torch.Tensor) -> torch.Tensor:
        nonlocal rows
        rows += len(ids)
        return forward(model, ids)

    monkeypatch.setattr(module, "final_hidden", count)
    label_scores(llama, [(3,), (4,), (5,)], examples, batch_rows=4, device="cpu", pad_id=1)
    assert rows == len(examples)
    rows = 0
    label_scores(llama, MIXED_IDS, examples, batch_rows=4, device="cpu", pad_id=1)
    assert rows == 2 * len(examples)  # after (7, 12) and after (6, 5, 5)


def test_words_that_cannot_be_told_apart(llama: Any, tokenizer: Any) -> None:
    task = task_of({"0": " no", "1": " no yes"})
    with pytest.raises(DataError, match=r"' no' begin those of ' no yes'"):
        classify(llama, tokenizer, task, encode(task, tokenizer), batch_rows=2, device="cpu", pad_id=1)
