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
        run = 0
        for text in path.read_text("utf-8").splitlines():
            line = json.loads(text) if text.startswith("{") else {}
            if line.get("section") == "machine":
                run += 1
                machine = {k: line.get(k) for k in ("gpu", "torch", "triton", "transformers", "command")}
                machine["run"] = f"{path.stem} {run}"
            elif line:
                found.append({**line, **machine})
    return found


def latest(lines: list[Line], section: str) -> dict[tuple[str, str], Line]:
    """The last line without error of each shape and case."""
    return {(line["shape"], line["case"]): line for line in timed(lines, section)}


def timed(lines: list[Line], section: str) -> list[Line]:
    return [line for line in lines if line["section"] == section and "step_ms" in line]


def run_of(line: Line) -> tuple[Any, ...]:
    """Lines of one process on one machine are alike in this."""
    return line.get("gpu"), line.get("command"), line.get("run")


def against(lines: list[Line], ours: Line, case: str) -> tuple[float | None, float | None]:
    """`ours` against another case: in the last run that has both, and `ours` against the other's fastest run.

    Both on one GPU model; None where there is none. Speeds of the same code differ from machine to machine and with
    what an autotuner chose, so a peer's slow run must not make us look fast.
    """
    alike = [x for x in lines if (x["shape"], x.get("gpu")) == (ours["shape"], ours.get("gpu"))]
    others = [x for x in alike if x["case"] == case]
    mine = {run_of(x): x["tokens_s"] for x in alike if x["case"] == ours["case"]}
    beside = [mine[run_of(x)] / x["tokens_s"] for x in others if run_of(x) in mine]
    fastest = max((x["tokens_s"] for x in others), default=None)
    return (beside[-1] if beside else None, None if fastest is None else ours["tokens_s"] / fastest)


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


def ratio_cell(ratio: float | None) -> str:
    return "" if ratio is None else f"{ratio:.2f}"


def goals_table(lines: list[Line]) -> list[str]:
    """fused_lm against the others; the lower ratio counts."""
    rows = [
        "| shape | ours (LM loss) against | in one run | ours against its fastest run | goal | |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    found = latest(lines, "train")
    for shape in SHAPES:
        ours = found.get((shape, "fused_lm"))
        for case, (about, goals) in GOALS.items():
            if ours is None:
                continue
            beside, fastest = against(timed(lines, "train"), ours, case)
            if fastest is None:
                continue
            met = beside is not None and min(fastest, beside) >= goals[shape]
            verdict = "met" if met else "missed"
            cells = [shape, about, ratio_cell(beside), ratio_cell(fastest), f"{goals[shape]:.2f}", verdict]
            rows.append("| " + " | ".join(cells) + " |")
    return rows


def stage3_table(lines: list[Line]) -> list[str]:
    rows = [
        "| shape | step | ms a step | real tokens/s | peak GB | against unfused, one run | against its fastest run |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for (shape, case), line in latest(lines, "stage3").items():
        beside, fastest = against(timed(lines, "stage3"), line, "unfused")
        rows.append(
            f"| {shape} | {case} | {line['step_ms']:.1f} | {line['tokens_s']:,.0f} | {line['peak_gb']:.1f} "
            f"| {ratio_cell(beside)} | {ratio_cell(fastest)} |"
        )
    return rows


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
        "fused_lm_residual was deleted after these lines: no gain in two runs ([log.md](log.md), runs 15 and 16).",
        "",
        "## Against the goals",
        "",
        "A peer's speed differs from run to run (torchao's products are autotuned). So there are two ratios, and the",
        "lower one counts: in the last run that timed both, and our last run against the peer's fastest on such a GPU.",
        "",
        *goals_table(lines),
        "",
        "## Whole steps on full rows (stage 2)",
        "",
        *train_table(train),
        "",
        "## Teacher and student on short rows (stage 3: 128 rows of at most 48 tokens)",
        "",
        *stage3_table(lines),
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
