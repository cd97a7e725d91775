"""What the engine's smaller formats cost: perplexity of a packed student by type of cache, head and embedding.

    python benchmarks/engine_loss.py MODEL TEXTS.jsonl [--field text] [--rows 400]

MODEL is a packed student, TEXTS rows of ordinary text. Texts are joined to windows of --length tokens; each window's
first token is context only. Cache and int8 head are measured in the engine. 4-bit and ternary tables, which the
engine does not hold, are put in place of the float ones in PyTorch (dequantized), head and embedding apart.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bitdistill.data import readers
from bitdistill.engine import Engine
from bitdistill.models.student import load_student


def nll(logits: np.ndarray, ids: list[int]) -> float:
    """Summed negative log-likelihood of ids[1:], nats."""
    x = logits[:-1].astype(np.float64)
    top = x.max(1)
    norm = top + np.log(np.exp(x - top[:, None]).sum(1))
    return float((norm - x[np.arange(len(x)), ids[1:]]).sum())


def grouped(bits: int, group: int | None) -> Callable[[torch.Tensor], torch.Tensor]:
    """absmax codes of so many bits, a float32 scale a row or a group of columns; bits 0: ternary (absmean)."""

    def quantize(weight: torch.Tensor) -> torch.Tensor:
        w = weight.float()
        pieces = w.reshape(w.shape[0], -1, group or w.shape[1])
        if bits == 0:
            scale = pieces.abs().mean(2, keepdim=True).clamp_min(1e-5)
            return (torch.clamp(torch.round(pieces / scale), -1, 1) * scale).reshape(w.shape)
        top = 2 ** (bits - 1) - 1
        scale = pieces.abs().amax(2, keepdim=True).clamp_min(1e-12) / top
        return (torch.clamp(torch.round(pieces / scale), -top, top) * scale).reshape(w.shape)

    return quantize


TABLES: dict[str, tuple[float, Callable[[torch.Tensor], torch.Tensor]]] = {
    "int8, a scale a row": (8, grouped(8, None)),
    "4-bit, a scale a row": (4, grouped(4, None)),
    "4-bit, a scale for 64 columns": (4 + 16 / 64, grouped(4, 64)),
    "4-bit, a scale for 32 columns": (4 + 16 / 32, grouped(4, 32)),
    "ternary, a scale a row": (2, grouped(0, None)),
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path)
    parser.add_argument("texts")
    parser.add_argument("--field", default="text")
    parser.add_argument("--rows", type=int, default=400)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    engine = Engine(options.model, threads=options.threads)
    ids: list[int] = []
    for row in readers.read_rows(options.texts, limit=options.rows):
        ids += [*engine.encode(str(row.fields[options.field])), *sorted(engine.stop_ids)[:1]]
    windows = [ids[n : n + options.length] for n in range(0, len(ids) - options.length + 1, options.length)]
    if not windows:
        sys.exit(
            f"{options.texts}: {len(ids)} tokens are fewer than one window of {options.length}; add rows"
        )
    scored = sum(len(w) - 1 for w in windows)
    rows: list[dict[str, Any]] = []

    def add(name: str, total: float) -> None:
        rows.append({"variant": name, "perplexity": math.exp(total / scored)})
        value = rows[-1]["perplexity"]
        print(f"{name:45} {value:10.4f} {100 * (value / rows[0]['perplexity'] - 1):+8.3f} %", flush=True)

    add("engine: float32 cache, stored head", sum(nll(engine.logits(w), w) for w in windows))
    for name, extra in {
        "engine: float16 cache": {"kv": "float16"},
        "engine: int8 cache": {"kv": "int8"},
        "engine: int8 head": {"head": "int8"},
    }.items():
        other = Engine(options.model, threads=options.threads, verify=False, **extra)  # type: ignore[arg-type]
        add(name, sum(nll(other.logits(w), w) for w in windows))
    model, _, _ = load_student(options.model)
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    table, stored = embedding.weight.detach().clone(), head.weight.detach().clone()
    head.weight = torch.nn.Parameter(stored.clone())  # untied, so that one can be changed alone

    def run() -> float:
        with torch.inference_mode():
            return sum(nll(model(torch.tensor([w])).logits[0].float().numpy(), w) for w in windows)

    add("PyTorch: tables as stored", run())
    for name, (bits, quantize) in TABLES.items():
        for place, layers in {"head": (head,), "embedding": (embedding,), "both": (head, embedding)}.items():
            for layer in layers:
                layer.weight.data.copy_(quantize(stored if layer is head else table))
            add(f"PyTorch: {place} {name} ({bits:g} bits)", run())
            head.weight.data.copy_(stored)
            embedding.weight.data.copy_(table)
    print(json.dumps({"model": str(options.model), "windows": len(windows), "tokens": scored, "rows": rows}))


if __name__ == "__main__":
    main()
