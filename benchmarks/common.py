"""What the training benchmarks share: shapes, timing on the device, JSON lines."""

from __future__ import annotations

import contextlib
import gc
import json
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoConfig

from bitdistill.config import Optim
from bitdistill.data.batches import Batch, TaskBatches, index_of
from bitdistill.data.tasks import Example
from bitdistill.train.loop import update
from bitdistill.train.optim import build_optimizer

DEVICE = torch.device("cuda")
OPTIM = Optim(learning_rate=1e-4, schedule="constant", warmup_fraction=0.0)
NOMINAL_BF16 = 989e12
"""Dense bfloat16 operations a second of an H100/H200 (SXM) by its data sheet."""


@dataclass(frozen=True)
class Shape:
    model_type: str
    rows: int
    length: int
    options: dict[str, Any]

    def config(self) -> Any:
        return AutoConfig.for_model(self.model_type, max_position_embeddings=4096, **self.options)


SHAPES = {
    "135m": Shape(
        "llama",
        32,
        1024,
        dict(  # noqa: C408
            vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, head_dim=64,
            num_attention_heads=9, num_key_value_heads=3, tie_word_embeddings=True,
        ),
    ),
    "270m": Shape(
        "gemma3_text",
        32,
        1024,
        dict(  # noqa: C408
            vocab_size=262144, hidden_size=640, intermediate_size=2048, num_hidden_layers=18, head_dim=256,
            num_attention_heads=4, num_key_value_heads=1, tie_word_embeddings=True, sliding_window=512,
            query_pre_attn_scalar=256,
        ),
    ),
    "0.6b": Shape(
        "qwen3",
        16,
        1024,
        dict(  # noqa: C408
            vocab_size=151936, hidden_size=1024, intermediate_size=3072, num_hidden_layers=28, head_dim=128,
            num_attention_heads=16, num_key_value_heads=8, tie_word_embeddings=True,
        ),
    ),
    # 12 of the 36 layers of 4b: with float32 masters and moments the whole does not fit in 80 GB
    "4b_12l": Shape(
        "qwen3",
        8,
        1024,
        dict(  # noqa: C408
            vocab_size=151936, hidden_size=2560, intermediate_size=9728, num_hidden_layers=12, head_dim=128,
            num_attention_heads=32, num_key_value_heads=8, tie_word_embeddings=True,
        ),
    ),
    "4b": Shape(
        "qwen3",
        8,
        1024,
        dict(  # noqa: C408
            vocab_size=151936, hidden_size=2560, intermediate_size=9728, num_hidden_layers=36, head_dim=128,
            num_attention_heads=32, num_key_value_heads=8, tie_word_embeddings=True,
        ),
    ),
}  # fmt: skip


def block_matrices(config: Any) -> dict[str, tuple[int, int]]:
    """Out and in features of one block's products, those that are stacked together."""
    d, heads, kv, size = (
        config.hidden_size,
        config.num_attention_heads,
        config.num_key_value_heads,
        config.head_dim,
    )
    return {
        "qkv": ((heads + 2 * kv) * size, d),
        "o": (d, heads * size),
        "gate_up": (2 * config.intermediate_size, d),
        "down": (d, config.intermediate_size),
    }


def flops_a_token(config: Any, length: int, teacher: bool) -> float:
    """Model operations of forward and backward a token (products and causal attention), a teacher's forward added."""
    products = config.num_hidden_layers * sum(o * i for o, i in block_matrices(config).values())
    products += config.vocab_size * config.hidden_size
    attention = config.num_hidden_layers * config.num_attention_heads * config.head_dim * length
    forward = 2 * (products + attention)
    return forward * (4 if teacher else 3)


def milliseconds(function: Callable[[], Any], rounds: int = 5, calls: int = 3) -> float:
    """Median over rounds of the mean time of a call on the device, after two calls."""
    for _ in range(2):
        function()
    times = []
    for _ in range(rounds):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(calls):
            function()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / calls)
    return statistics.median(times)


class Report:
    """JSON lines to stdout and to a file, written at once."""

    def __init__(self, path: Path | None) -> None:
        self.file = None if path is None else path.open("a", encoding="utf-8")
        self.failed = 0
        self.deadline = float("inf")

    def line(self, section: str, **values: Any) -> None:
        rounded = {k: round(v, 4) if isinstance(v, float) else v for k, v in values.items()}
        text = json.dumps({"section": section, **rounded})
        print(text, flush=True)
        if self.file is not None:
            self.file.write(text + "\n")
            self.file.flush()

    def over(self, section: str, **values: Any) -> bool:
        """Whether the time for new cases is over; says so for this one if it is."""
        if time.monotonic() <= self.deadline:
            return False
        self.line(section, **values, error="not run: --total-s is over")
        return True

    @contextlib.contextmanager
    def caught(self, section: str, **values: Any) -> Iterator[None]:
        started = time.monotonic()
        try:
            yield
        except Exception as error:
            self.failed += 1
            self.line(section, **values, error=f"{type(error).__name__}: {error}"[:600])
            traceback.print_exc(file=sys.stderr)
        finally:
            gc.collect()
            torch.cuda.empty_cache()
            print(f"# {section} {values}: {time.monotonic() - started:.1f} s", file=sys.stderr, flush=True)


def corpus_batch(config: Any, rows: int, length: int, seed: int) -> Batch:
    """Random full rows, as stage 2 sees them."""
    ids = torch.randint(0, config.vocab_size, (rows, length), generator=torch.Generator().manual_seed(seed))
    mask = torch.ones(rows, length, dtype=torch.bool)
    answers = mask.clone()
    answers[:, 0] = False
    return Batch(
        ids, mask, answers, torch.full((rows,), -1), list(range(rows)), 1.0, rows * length,
        answer_index_N=index_of(answers), real_index_N=index_of(mask),
    )  # fmt: skip


def task_batch(config: Any, rows: int, length: int, seed: int, packing: bool = False) -> Batch:
    """Random rows of half to the whole length with one answer token each, as stage 3 sees them."""
    rng = np.random.default_rng(seed)
    examples = []
    for size in rng.integers(length // 2, length + 1, rows):
        ids = tuple(rng.integers(0, config.vocab_size, size).tolist())
        examples.append(Example(ids[:-1], ids[-1:], 0, (), "", ""))
    return TaskBatches(
        examples, batch_rows=rows, seed=seed, pad_id=0, buckets=[length], packing=packing
    ).micro_batches(0)[0]


def timed_steps(
    model: Any, gradients: Any, batches: list[list[Batch]], refresh: Callable[[], None], limit_s: float
) -> dict[str, Any]:
    """Steps a second after three steps of warming up: at most 20, or as many as fit the limit."""
    optimizer = build_optimizer(model, OPTIM)
    parameters = [p for p in model.parameters() if p.requires_grad]
    times: list[float] = []
    losses: list[float] = []
    with gradients.stream():
        warm_from = time.perf_counter()
        started = warm_from
        for k in range(23):
            if k == 3:
                torch.cuda.synchronize()
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats()
                started = time.perf_counter()
                warm_s = started - warm_from
            if k > 5 and time.perf_counter() - started > limit_s:
                break
            at = time.perf_counter()
            refresh()
            metrics, _ = update(parameters, optimizer, batches[k % len(batches)], gradients, 1e-4, 1.0)
            losses.append(metrics["loss"])
            times.append(time.perf_counter() - at)
        torch.cuda.synchronize()
    tokens = sum(b.tokens for b in batches[0])
    step_s = statistics.median(times[3:])
    return {
        "step_ms": step_s * 1e3, "tokens_s": tokens / step_s, "steps": len(times) - 3, "warm_up_s": warm_s,
        # Reserved: what a CUDA graph works in is not "allocated" while it is replayed
        "peak_gb": torch.cuda.max_memory_reserved() / 1e9, "first_loss": losses[0], "last_loss": losses[-1],
    }  # fmt: skip


def profiled(
    report: Report,
    section: str,
    shape: str,
    case: str,
    model: Any,
    gradients: Any,
    batch: list[Any],
    refresh: Callable[[], None],
) -> None:
    """Lines of a whole optimizer step's device time, kernels by total time."""
    from torch.profiler import ProfilerActivity, profile

    optimizer = build_optimizer(model, OPTIM)
    parameters = [p for p in model.parameters() if p.requires_grad]

    def one() -> None:
        refresh()
        update(parameters, optimizer, batch, gradients, 1e-4, 1.0)

    for _ in range(3):
        one()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as found:
        at = time.perf_counter()
        for _ in range(2):
            one()
        torch.cuda.synchronize()
        wall_ms = (time.perf_counter() - at) * 500
    kernels: dict[str, list[float]] = {}
    for event in found.events():
        if event.device_type.name == "CUDA":
            entry = kernels.setdefault(event.name, [0.0, 0])
            entry[0] += event.device_time_total / 2e3
            entry[1] += 1
    top = sorted(kernels.items(), key=lambda item: -item[1][0])
    report.line(
        section, shape=shape, case=case, wall_ms=wall_ms,
        device_ms=sum(v[0] for v in kernels.values()), launches=sum(int(v[1]) for v in kernels.values()) // 2,
    )  # fmt: skip
    for kernel, (ms, count) in top[:45]:
        report.line(section, shape=shape, case=case, kernel=kernel[:110], ms=ms, launches=count / 2)
