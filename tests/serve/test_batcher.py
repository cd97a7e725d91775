"""Continuous batching: the tokens of each request alone, whatever comes and goes beside it."""

from __future__ import annotations

import threading
import time
from typing import Any

import numpy as np
import pytest

from bitdistill.engine import Engine
from bitdistill.engine import batcher as module
from bitdistill.engine.batcher import Batcher, Closed, Overloaded
from bitdistill.errors import ModelError

PROMPTS = [
    "How do I",
    "My card",
    "Why was I charged for a transfer",
    "When",
    "The exchange rate is",
    "I lost",
] * 2


def test_requests_get_the_tokens_they_get_alone(engine: Engine, batcher: Batcher) -> None:
    """Twelve requests in four places, with settings of their own, some arriving while others run."""
    settings = [
        {"max_new_tokens": 5 + 3 * n, "temperature": 0.9 * (n % 2), "seed": n, "top_k": 7 * (n % 3)}
        for n in range(len(PROMPTS))
    ]
    tickets = []
    for n, (prompt, options) in enumerate(zip(PROMPTS, settings, strict=True)):
        tickets.append(batcher.submit(prompt, **options))
        if n % 5 == 4:
            tickets[-1].future.result(timeout=60)
        while batcher.counters().waiting >= 8:
            time.sleep(0.001)
    got = [ticket.future.result(timeout=60) for ticket in tickets]
    fresh = Engine(engine.path, threads=1, verify=False)
    for prompt, options, generation in zip(PROMPTS, settings, got, strict=True):
        alone = fresh.generate(prompt, **options)
        assert (generation.ids, generation.text) == (alone.ids, alone.text)
        assert generation.finish_reason == alone.finish_reason
    counters = batcher.counters()
    assert (counters.requests, counters.active, counters.waiting) == (12, 0, 0)
    assert counters.steps < counters.new_tokens  # some steps had company


def test_long_prompts_run_in_pieces_beside_others(
    engine: Engine, batcher: Batcher, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "PROMPT_TOKENS_A_TURN", 16)
    long = (engine.encode("the card was charged twice and ") * 30)[:150]
    arrived: list[str] = []
    release = threading.Event()
    batcher.call(release.wait)  # so that both begin in the same turn
    short = batcher.submit("How do I", max_new_tokens=40, on_text=lambda text: arrived.append("short"))
    other = batcher.submit(long, max_new_tokens=4, on_text=lambda text: arrived.append("long"))
    release.set()
    first, second = short.future.result(timeout=60), other.future.result(timeout=60)
    assert first.ids == engine.generate("How do I", max_new_tokens=40).ids
    assert second.ids == engine.generate(long, max_new_tokens=4).ids
    assert arrived.index("long") >= 5  # ten turns of sixteen prompt tokens, a token of the other in each


def test_a_conversation_reuses_what_was_run(engine: Engine, batcher: Batcher) -> None:
    ids = engine.encode(
        "My card has not arrived yet and I would like to know when it will come to my home address"
    )
    first = batcher.submit(ids, max_new_tokens=6).future.result(timeout=60)
    again = [*ids, *first.ids, *engine.encode(" thanks")]
    second = batcher.submit(again, max_new_tokens=6).future.result(timeout=60)
    assert first.reused_tokens == 0
    assert second.reused_tokens >= len(ids)
    assert second.ids == Engine(engine.path, threads=1, verify=False).generate(again, max_new_tokens=6).ids
    assert batcher.counters().reused_tokens == second.reused_tokens


def test_cancelled_requests_end_and_leave_the_others_alone(engine: Engine, batcher: Batcher) -> None:
    release = threading.Event()
    batcher.call(release.wait)
    victim = batcher.submit("How do I", max_new_tokens=400, on_text=lambda text: victim.cancel())
    other = batcher.submit("My card", max_new_tokens=30)
    release.set()
    cut = victim.future.result(timeout=30)
    assert cut.finish_reason == "callback"
    assert 1 <= len(cut.ids) < 10
    assert cut.ids == engine.generate("How do I", max_new_tokens=len(cut.ids)).ids
    assert other.future.result(timeout=60).ids == engine.generate("My card", max_new_tokens=30).ids
    assert batcher.counters().cancelled == 1


def test_a_failing_callback_ends_its_own_request_only(engine: Engine, batcher: Batcher) -> None:
    def fail(text: str) -> None:
        raise RuntimeError("broken pipe")

    bad = batcher.submit("How do I", max_new_tokens=20, on_text=fail)
    good = batcher.submit("My card", max_new_tokens=20)
    with pytest.raises(RuntimeError, match="broken pipe"):
        bad.future.result(timeout=30)
    assert good.future.result(timeout=60).ids == engine.generate("My card", max_new_tokens=20).ids


def test_a_failed_pass_ends_its_requests_and_the_next_ones_run(
    engine: Engine, batcher: Batcher, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Broken:
        def step(self, *_: Any) -> list[int]:
            raise MemoryError("no room")

        def forward(self, *_: Any) -> None:
            raise MemoryError("no room")

    with monkeypatch.context() as patch:
        patch.setattr(engine, "model", Broken())
        patch.setattr(module._native, "Sequence", lambda model: None)
        broken = batcher.submit("How do I", max_new_tokens=5)
        with pytest.raises(MemoryError):
            broken.future.result(timeout=30)
    assert batcher.submit("How do I", max_new_tokens=5).future.result(timeout=60).ids
    assert batcher.counters().failed == 1


def test_refusals(engine: Engine, batcher: Batcher) -> None:
    context = engine.facts["max_positions"]
    for prompt, options, message in (
        ("", {}, "no tokens"),
        ("x", {"max_new_tokens": 0}, "max_new_tokens 0"),
        ("x", {"temperature": -1.0}, "temperature"),
        ("x", {"stop": [""]}, "empty string"),
        ([1] * (context + 1), {}, "context"),
        ([10**6], {}, "vocabulary"),
    ):
        with pytest.raises(ModelError, match=message):
            batcher.submit(prompt, **options)
    full = batcher.submit([1] * context, max_new_tokens=5).future.result(timeout=60)
    assert (full.ids, full.finish_reason) == ((), "length")


def test_a_full_queue_refuses_and_a_closed_batcher_fails_what_is_left(engine: Engine) -> None:
    batcher = Batcher(engine, max_sequences=1, max_waiting=2)
    release = threading.Event()
    batcher.call(release.wait)  # holds the thread
    while batcher.counters().waiting:
        time.sleep(0.001)
    tickets = [batcher.submit("How do I", max_new_tokens=5) for _ in range(2)]
    with pytest.raises(Overloaded, match="2 requests are waiting"):
        batcher.submit("How do I")
    closing = threading.Thread(target=batcher.close)
    closing.start()
    while not batcher._closed:
        time.sleep(0.001)
    release.set()
    closing.join(30)
    ended = [ticket.future.exception(timeout=30) for ticket in tickets]
    assert all(isinstance(error, Closed) for error in ended)
    with pytest.raises(Closed):
        batcher.submit("x")


def test_calls_run_between_steps(engine: Engine, batcher: Batcher) -> None:
    running = batcher.submit("How do I", max_new_tokens=30)
    answers = batcher.call(lambda: engine.classify(["my card has not arrived"])).result(timeout=60)
    assert answers[0].label is not None
    assert np.isclose(sum(answers[0].probabilities.values()), 1)
    with pytest.raises(ZeroDivisionError):
        batcher.call(lambda: 1 // 0).result(timeout=30)
    assert running.future.result(timeout=60).ids
