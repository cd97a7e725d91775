"""Speed and memory of an engine: what `bitdistill bench` prints."""

from __future__ import annotations

import resource
import statistics
import sys
import time
from typing import Any

import numpy as np

from bitdistill.engine import _native
from bitdistill.engine.engine import Engine
from bitdistill.errors import ModelError


def measure(
    engine: Engine, *, prefill_tokens: int, decode_tokens: int, sequences: int, repeats: int
) -> dict[str, Any]:
    """Medians over `repeats` of prefill and decode with made-up token ids (speed does not depend on them).

    Args:
        engine: what is measured.
        prefill_tokens: prompt of each prefill run, up to its first greedy token.
        decode_tokens: greedy tokens after a prompt of one token.
        sequences: decoded together; tokens/s counts all of them.
        repeats: runs of each, interleaved.

    Raises:
        ModelError: the lengths do not fit the model's context.
    """
    context = engine.facts["max_positions"]
    longest = max(prefill_tokens, decode_tokens + 1)
    if context and longest > context:
        raise ModelError(f"bench: {longest} tokens pass the model's context of {context}; ask for fewer")
    rng = np.random.default_rng(0)
    prompt = rng.integers(0, engine.facts["vocab_size"], prefill_tokens, dtype=np.int32)
    prefills, decodes, steps = [], [], []
    for _ in range(repeats + 1):  # the first is a warm-up
        prefills.append(_prefill(engine, prompt))
        seconds, each = _decode(engine, prompt[:1], decode_tokens, sequences)
        decodes.append(seconds)
        steps += each
    facts = engine.model.facts
    screened = facts["screened_tokens"]
    return {
        "model": str(engine.path),
        "isa": engine.isa,
        "threads": facts["threads"],
        "prefill_tokens_per_s": prefill_tokens / statistics.median(prefills[1:]),
        "decode_tokens_per_s": sequences * decode_tokens / statistics.median(decodes[1:]),
        "decode_step_ms_median": 1e3 * statistics.median(steps[decode_tokens:]),
        "prefill_tokens": prefill_tokens,
        "decode_tokens": decode_tokens,
        "sequences": sequences,
        "repeats": repeats,
        "block_bytes": facts["ternary_bytes"] + facts["dense_bytes"],
        "head_bytes": facts["head_bytes"],
        "weight_bytes_per_step": facts["ternary_bytes"] + facts["dense_bytes"] + facts["head_bytes"],
        "rescored_rows_per_token": facts["rescored_rows"] / screened if screened else 0.0,
        "peak_rss_bytes": peak_rss_bytes(),
    }


def _prefill(engine: Engine, prompt: Any) -> float:
    sequence = _native.Sequence(engine.model)
    sampler = _native.Sampler(0.0, 0, 1.0, 0)
    start = time.perf_counter()
    engine.model.step([(sequence, prompt)], [sampler], [0], [0])
    return time.perf_counter() - start


def _decode(engine: Engine, first: Any, tokens: int, count: int) -> tuple[float, list[float]]:
    sampler = _native.Sampler(0.0, 0, 1.0, 0)
    rows = [_native.Sequence(engine.model) for _ in range(count)]
    ids = [first] * count
    streams = list(range(count))
    each = []
    start = before = time.perf_counter()
    for step in range(tokens):
        chosen = engine.model.step(
            list(zip(rows, ids, strict=True)), [sampler] * count, streams, [step] * count
        )
        ids = [np.array([token], dtype=np.int32) for token in chosen]
        now = time.perf_counter()
        each.append(now - before)
        before = now
    return time.perf_counter() - start, each


def peak_rss_bytes() -> int:
    """Largest resident set of this process so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
