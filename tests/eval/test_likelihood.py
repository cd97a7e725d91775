"""Likelihood of references against a slow twin without padding or batches."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from bitdistill.config import Task
from bitdistill.data import tasks
from bitdistill.data.readers import Row
from bitdistill.data.tasks import Example
from bitdistill.eval import likelihood as module
from bitdistill.eval.likelihood import reference_nll

TASK = Task(name="t", kind="generation", template="{text}\nTL;DR:", target_field="summary", max_new_tokens=9)
ROWS = [
    ("a film", "y"),
    ("the card is lost .", "yes no yes"),
    ("x", "a charming film , and the card is not lost yet"),
    ("a charming film , and the card is not lost yet", "no"),
    ("yes no yes", "the card"),
]


def encode(tokenizer: Any) -> list[Example]:
    return tasks.encode(
        TASK, [Row({"text": t, "summary": s}, f"t:{n}") for n, (t, s) in enumerate(ROWS)], tokenizer, 128
    )


@torch.no_grad()
def slow_nll(model: Any, prompt: tuple[int, ...], answer: tuple[int, ...]) -> float:
    nats = 0.0
    for end, token in enumerate(answer):
        logits = model(input_ids=torch.tensor([[*prompt, *answer[:end]]]), use_cache=False).logits[0, -1]
        nats -= float(logits.double().log_softmax(-1)[token])
    return nats


@pytest.mark.parametrize(("batch_rows", "elements"), [(1, 2**26), (3, 2**26), (5, 1)])
def test_it_equals_the_slow_twin(
    model: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch, batch_rows: int, elements: int
) -> None:
    monkeypatch.setattr(module, "HEAD_ELEMENTS", elements)
    examples = encode(tokenizer)
    told: list[tuple[int, int]] = []
    found = reference_nll(
        model, examples, batch_rows=batch_rows, device="cpu", pad_id=1, progress=lambda *n: told.append(n)
    )
    assert told == [(min(n, 5), 5) for n in range(batch_rows, 5 + batch_rows, batch_rows)]
    for (nats, tokens), example in zip(found, examples, strict=True):
        assert tokens == len(example.answer_ids)
        assert nats == pytest.approx(slow_nll(model, example.prompt_ids, example.answer_ids), rel=1e-4)


def test_tokens_beyond_the_context_are_not_scored(
    model: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    examples = encode(tokenizer)
    context = len(examples[2].prompt_ids) + 2
    monkeypatch.setattr(model.config, "max_position_embeddings", context)
    found = reference_nll(model, examples, batch_rows=5, device="cpu", pad_id=1)
    rooms = [max(0, context - len(e.prompt_ids)) for e in examples]
    assert [tokens for _, tokens in found] == [
        min(room, len(e.answer_ids)) for room, e in zip(rooms, examples, strict=True)
    ]
    assert found[2][0] == pytest.approx(
        slow_nll(model, examples[2].prompt_ids, examples[2].answer_ids[:2]), rel=1e-4
    )
    assert found[3] == (0.0, 0), "its prompt fills the context"
