#!/usr/bin/env python3
"""docs/train-speed.md from the lines of train_speed.py; nothing in it is typed by hand.

python benchmarks/train_render.py speed.jsonl     takes these lines into results/train-speed.json, then renders
python benchmarks/train_render.py                 renders what is there
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "results/train-speed.json"
PAGE = ROOT / "docs/train-speed.md"
SHAPES = ("135m", "0.6b", "4b_12l", "4b")
GOALS = {
    # other case: what it is, goal by shape
    "hf_bf16": ("Hugging Face Trainer's step, bf16", {"135m": 1.5, "0.6b": 1.6, "4b_12l": 1.5, "4b": 1.5}),
    "bf16_compiled": (
        "compiled bf16, fused cross-entropy",
        {"135m": 1.0, "0.6b": 1.1, "4b_12l": 1.25, "4b": 1.25},
    ),
    "onebitllms": ("onebitllms", dict.fromkeys(SHAPES, 1.7)),
    "torchao": (
        "torchao's bitnet training, compiled",
        {"135m": 1.15, "0.6b": 1.15, "4b_12l": 1.25, "4b": 1.25},
    ),
}
Line = dict[str, Any]


def read_lines(paths: list[Path]) -> list[Line]:
    """Lines of several files, each with the machine it ran on."""
    found = []
    for path in paths:
        machine: Line = {}
        for text in path.read_text("utf-8").splitlines():
            line = json.loads(text) if text.startswith("{") else {}
            if line.get("section") == "machine":
                machine = {k: line.get(k) for k in ("gpu", "torch", "triton", "transformers", "command")}
            elif line:
                found.append({**line, **machine})
    return found


def latest(lines: list[Line], section: str) -> dict[tuple[str, str], Line]:
    """The last line without error of each shape and case."""
    return {
        (line["shape"], line["case"]): line
        for line in lines
        if line["section"] == section and "step_ms" in line
    }


def train_table(found: dict[tuple[str, str], Line]) -> list[str]:
    lines = [
        "| shape | step | objective | tokens/s | model TFLOP/s | MFU of 989 | peak GB | graph | loss, first and last |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    order = sorted(found, key=lambda key: SHAPES.index(key[0]))
    for shape, case in order:
        line = found[shape, case]
        cells = [
            shape,
            f"{case}: {line['about']}",
            line["objective"],
            f"{line['tokens_s']:,.0f}",
            f"{line['model_tflops']:.0f}",
            f"{100 * line['mfu']:.0f} %",
            f"{line['peak_gb']:.1f}",
            "yes" if line.get("replayed") else "no",
            f"{line['first_loss']:.3f}, {line['last_loss']:.3f}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def goals_table(found: dict[tuple[str, str], Line]) -> list[str]:
    """fused_lm against the others, each only within one GPU model."""
    lines = ["| shape | ours (LM loss) against | ratio | goal | |", "| --- | --- | --- | --- | --- |"]
    for shape in SHAPES:
        ours = found.get((shape, "fused_lm"))
        for case, (about, goals) in GOALS.items():
            other = found.get((shape, case))
            if ours is None or other is None or ours.get("gpu") != other.get("gpu"):
                continue
            ratio = ours["tokens_s"] / other["tokens_s"]
            verdict = "met" if ratio >= goals[shape] else "missed"
            lines.append(f"| {shape} | {about} | {ratio:.2f} | {goals[shape]:.2f} | {verdict} |")
    return lines


def stage3_table(found: dict[tuple[str, str], Line]) -> list[str]:
    lines = [
        "| shape | step | ms a step | real tokens/s | peak GB | against the unfused loop |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for (shape, case), line in found.items():
        plain = found.get((shape, "unfused"))
        same = plain is not None and plain.get("gpu") == line.get("gpu")
        ratio = f"{line['tokens_s'] / plain['tokens_s']:.2f}" if plain is not None and same else ""
        lines.append(
            f"| {shape} | {case} | {line['step_ms']:.1f} | {line['tokens_s']:,.0f} | {line['peak_gb']:.1f} | {ratio} |"
        )
    return lines


def page(lines: list[Line]) -> str:
    """The page as text."""
    train, stage3 = latest(lines, "train"), latest(lines, "stage3")
    used = [*train.values(), *stage3.values()]
    machines = sorted({f"{x.get('gpu')}, torch {x.get('torch')}, triton {x.get('triton')}" for x in used})
    commands = sorted({f"`python {x.get('command')}`" for x in used})
    failed = [x for x in lines if "error" in x and "not run" not in str(x["error"])]
    text = [
        "# Training speed",
        "",
        "Made by `python benchmarks/train_render.py` from [results/train-speed.json](../results/train-speed.json).",
        "",
        f"GPU: {'; '.join(machines)}. Commands: {'; '.join(commands)}.",
        "",
        "Random weights and tokens; whole optimizer steps with gradient clipping and AdamW (fused), float32 masters.",
        "Shapes: 135m (SmolLM2), 0.6b and 4b (Qwen3); 4b_12l has 12 of the 36 layers of 4b. Compiled cases, ours and",
        "others', use the faster of FlashAttention and cuDNN and are replayed from a CUDA graph where steps are small.",
        "",
        "## Against the goals",
        "",
        *goals_table(train),
        "",
        "## Whole steps on full rows (stage 2)",
        "",
        *train_table(train),
        "",
        "## Teacher and student on short rows (stage 3: 128 rows of at most 48 tokens)",
        "",
        *stage3_table(stage3),
        "",
    ]
    if failed:
        text += ["## What failed", ""]
        text += [f"- {x['section']} {x.get('shape')} {x.get('case', '')}: {x['error'][:200]}" for x in failed]
        text.append("")
    return "\n".join(text)


def main() -> None:
    lines: list[Line] = json.loads(RESULTS.read_text("utf-8")) if RESULTS.exists() else []
    lines += read_lines([Path(name) for name in sys.argv[1:]])
    kept = {json.dumps(line, sort_keys=True): line for line in lines}
    RESULTS.write_text(json.dumps(list(kept.values()), indent=1) + "\n", "utf-8")
    PAGE.write_text(page(list(kept.values())), "utf-8")
    print(PAGE)


if __name__ == "__main__":
    main()
