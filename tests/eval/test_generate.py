"""Greedy generation against a slow twin without padding, batches or caches."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from bitdistill.config import Task
from bitdistill.data import tasks
from bitdistill.data.readers import Row
from bitdistill.data.tasks import Example
from bitdistill.eval import generate as module
from bitdistill.eval.generate import decode_answer, generate, stop_ids
from bitdistill.models.attention import decoding_attention

TASK = Task(name="t", kind="generation", template="{text}\nTL;DR:", target_field="summary", max_new_tokens=9)
TEXTS = ["a film", "the card is lost .", "x", "a charming film , and the card is not lost yet", "yes no yes"]


def encode(tokenizer: Any) -> list[Example]:
    rows = [Row({"text": t, "summary": "y"}, f"t:{n}") for n, t in enumerate(TEXTS)]
    return tasks.encode(TASK, rows, tokenizer, 128)


@torch.no_grad()
def slow_greedy(model: Any, prompt: tuple[int, ...], stops: set[int], count: int) -> list[int]:
    ids = list(prompt)
    for _ in range(count):
        token = int(model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax())
        if token in stops:
            break
        ids.append(token)
    return ids[len(prompt) :]


@pytest.mark.parametrize("batch_rows", [1, 3])
def test_generation_equals_the_slow_twin(model: Any, tokenizer: Any, batch_rows: int) -> None:
    examples = encode(tokenizer)
    told: list[tuple[int, int]] = []
    predictions = generate(
        model, tokenizer, TASK, examples, batch_rows=batch_rows, device="cpu", pad_id=1,
        progress=lambda *rows: told.append(rows),
    )  # fmt: skip
    assert told == [(min(n, 5), 5) for n in range(batch_rows, 5 + batch_rows, batch_rows)]
    stops = stop_ids(model, tokenizer)
    for n, (prediction, example) in enumerate(zip(predictions, examples, strict=True)):
        expected = slow_greedy(model, example.prompt_ids, stops, 9)
        assert prediction.text == tokenizer.decode(expected, skip_special_tokens=True).strip()
        assert (prediction.index, prediction.label, prediction.scores) == (n, None, ())


def test_sampling_draws_from_the_models_own_distribution(model: Any, tokenizer: Any) -> None:
    """Near a temperature of 0 the draws are the slow twin's best tokens: cache and attention of sampling are right."""
    examples = encode(tokenizer)
    own = model.config._attn_implementation
    told: list[tuple[int, int]] = []
    drawn = module.sample(
        model, tokenizer, TASK, examples, temperature=1e-6, seed=0, batch_rows=3, device="cpu", pad_id=1,
        rounds=[4], progress=lambda *rows: told.append(rows),
    )  # fmt: skip
    assert told == sorted(told)
    assert told[-1] == (5, 5)
    assert told[1][0] < 5, "after the first round, four tokens, not all are finished"
    stops = stop_ids(model, tokenizer)
    for prediction, example in zip(drawn, examples, strict=True):
        expected = slow_greedy(model, example.prompt_ids, stops, 9)
        assert prediction.text == tokenizer.decode(expected, skip_special_tokens=True).strip()
    assert model.config._attn_implementation == own


@pytest.mark.parametrize(("heads", "groups"), [(6, 2), (4, 4), (3, 1)])
def test_attention_of_decoding_is_that_of_sdpa(heads: int, groups: int) -> None:
    g = torch.Generator().manual_seed(heads)
    query, key, value = (
        torch.randn(5, n, t, 8, generator=g) for n, t in ((heads, 1), (groups, 7), (groups, 7))
    )
    mask = torch.rand(5, 1, 1, 7, generator=g) < 0.6
    mask[..., 3] = True
    layer = torch.nn.Module()
    layer.num_key_value_groups, layer.is_causal = heads // groups, True  # type: ignore[assignment]
    for given, scaling in ((mask, None), (mask, 0.3), (None, None)):
        out, _ = decoding_attention(layer, query, key, value, given, scaling=scaling)
        expected, _ = sdpa_attention_forward(layer, query, key, value, given, scaling=scaling)
        torch.testing.assert_close(out, expected)
    longer = torch.randn(5, heads, 7, 8, generator=g)
    out, _ = decoding_attention(layer, longer, key, value, None)
    torch.testing.assert_close(out, sdpa_attention_forward(layer, longer, key, value, None)[0])


def test_batches_fit_a_gpus_memory(llama: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    config = llama.config
    token = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * 4
    row = 3 * 20 * token + 16 * config.vocab_size
    memory = int(5 * row / module.CACHE_SHARE) + 1
    assert [module.rows_that_fit(llama, 20, most, memory) for most in (4, 9)] == [4, 5]
    assert module.rows_that_fit(llama, 40, 9, memory) < 5
    assert module.rows_that_fit(llama, 10**9, 9, memory) == 1
    # The batches that come of it hold every row, and give the same answers
    examples = encode(tokenizer)
    whole = generate(llama, tokenizer, TASK, examples, batch_rows=5, device="cpu", pad_id=1)
    sizes = []
    own = llama.generate

    def counted(**kwargs: Any) -> Any:
        sizes.append(len(kwargs["input_ids"]))
        return own(**kwargs)

    monkeypatch.setattr(llama, "generate", counted)
    longest = max(len(e.prompt_ids) for e in examples) + TASK.max_new_tokens
    two = 2 * (3 * longest * token + 16 * config.vocab_size)
    monkeypatch.setattr(module, "memory_bytes", lambda _: int(two / module.CACHE_SHARE) + 1)
    assert generate(llama, tokenizer, TASK, examples, batch_rows=5, device="cpu", pad_id=1) == whole
    assert sizes[0] == 2
    assert sum(sizes) == 5
    # A limit of tokens: whatever is shorter goes in larger batches, and one row is always taken
    monkeypatch.undo()
    monkeypatch.setattr(llama, "generate", counted)
    for tokens, first in ((2 * longest + 1, 2), (3 * longest, 3), (1, 1)):
        sizes.clear()
        options = {"batch_rows": 5, "batch_tokens": tokens, "device": "cpu", "pad_id": 1}
        assert generate(llama, tokenizer, TASK, examples, **options) == whole
        assert (sizes[0], sum(sizes)) == (first, 5)


def test_sampling_in_rounds_continues_rows_where_they_were(
    llama: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At a temperature near 0 a draw is the best token, so rounds must give what one round gives."""
    import copy

    examples = encode(tokenizer)
    free = [slow_greedy(llama, e.prompt_ids, set(), 9) for e in examples]
    stopping = copy.deepcopy(llama)
    stopping.generation_config.eos_token_id = [free[0][3], free[1][0]]
    lengths = []
    own = stopping.generate

    def counted(**kwargs: Any) -> Any:
        lengths.append((kwargs["input_ids"].shape, stopping.generation_config.max_new_tokens))
        return own(**kwargs)

    monkeypatch.setattr(stopping, "generate", counted)
    options: dict[str, Any] = {"batch_rows": 5, "device": "cpu", "pad_id": 1}
    whole = generate(stopping, tokenizer, TASK, examples, **options)
    lengths.clear()
    drawn = module.sample(
        stopping, tokenizer, TASK, examples, temperature=1e-6, seed=0, rounds=[2, 5, 50], **options
    )
    assert drawn == whole
    assert [count for _, count in lengths] == [2, 3, 4]
    assert [shape[0] for shape, _ in lengths] == sorted((shape[0] for shape, _ in lengths), reverse=True)
    assert (
        lengths[2][0][0] < lengths[1][0][0] < 5
    )  # one row ends with its first token, another with its fourth
    assert lengths[1][0][1] <= max(len(e.prompt_ids) for e in examples) + 2


def test_generation_stops_at_eos(llama: Any, tokenizer: Any) -> None:
    """With an eos that the model is known to write after a few tokens, answers end there."""
    import copy

    examples = encode(tokenizer)
    free = [slow_greedy(llama, e.prompt_ids, set(), 9) for e in examples]
    stop = free[0][3]
    stopping = copy.deepcopy(llama)
    stopping.generation_config.eos_token_id = [stop]
    predictions = generate(stopping, tokenizer, TASK, examples, batch_rows=5, device="cpu", pad_id=1)
    for prediction, ids in zip(predictions, free, strict=True):
        kept = ids[: ids.index(stop)] if stop in ids else ids
        assert prediction.text == decode_answer(tokenizer, kept, [tokenizer.eos_token_id])
        assert prediction.ended == (stop in ids)
    assert {p.ended for p in predictions} == {True, False}
    assert stop_ids(stopping, tokenizer) == {stop, tokenizer.eos_token_id}


def test_sampling_settings_of_the_model_are_not_used(llama: Any, tokenizer: Any) -> None:
    import copy

    examples = encode(tokenizer)
    hot = copy.deepcopy(llama)
    hot.generation_config.do_sample = True
    hot.generation_config.temperature = 50.0
    hot.generation_config.repetition_penalty = 3.0
    options = {"batch_rows": 5, "device": "cpu", "pad_id": 1}
    assert generate(hot, tokenizer, TASK, examples, **options) == generate(
        llama, tokenizer, TASK, examples, **options
    )
