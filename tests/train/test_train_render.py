"""The page of training speeds says what the lines say."""

from __future__ import annotations

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import train_render


def line(case: str, tokens_s: float, section: str = "train", shape: str = "135m") -> str:
    values = {
        "section": section, "shape": shape, "case": case, "about": "it", "objective": "lm", "step_ms": 10.0,
        "tokens_s": tokens_s, "model_tflops": 1.0, "mfu": 0.1, "peak_gb": 2.0, "first_loss": 3.0, "last_loss": 2.0,
    }  # fmt: skip
    return json.dumps(values)


def test_ratios_are_within_one_gpu_and_failures_are_shown(tmp_path: Path) -> None:
    first, second = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    machine = json.dumps({"section": "machine", "gpu": "H100", "torch": "2", "triton": "3", "command": "x"})
    failure = json.dumps({"section": "train", "shape": "135m", "case": "torchao", "error": "broke"})
    rows = [
        line("fused_lm", 1.0),
        line("fused_lm", 300.0),
        line("hf_bf16", 100.0),
        line("bf16_compiled", 400.0),
    ]
    stage3 = [line("unfused", 10.0, "stage3"), line("fused", 25.0, "stage3")]
    first.write_text("\n".join([machine, *rows, failure, *stage3]) + "\n", "utf-8")
    second.write_text(machine.replace("H100", "H200") + "\n" + line("onebitllms", 1.0) + "\n", "utf-8")
    text = train_render.page(train_render.read_lines([first, second]))
    assert "| 135m | Hugging Face Trainer's step, bf16 | 3.00 | 3.00 | 1.50 | met |" in text
    assert "| 135m | compiled bf16, fused cross-entropy | 0.75 | 0.75 | 1.00 | missed |" in text
    assert "| 135m | onebitllms |" not in text  # timed on another GPU
    assert "torchao: broke" in text
    assert "| 135m | fused | 10.0 | 25 | 2.0 | 2.50 | 2.50 |" in text


def test_the_lower_of_two_ratios_counts(tmp_path: Path) -> None:
    machine = {"section": "machine", "gpu": "H200", "torch": "2", "triton": "3"}
    runs = [
        [line("fused_lm", 100.0), line("torchao", 120.0), line("hf_bf16", 50.0), line("onebitllms", 55.0)],
        [line("fused_lm", 130.0), line("torchao", 80.0), line("hf_bf16", 50.0)],
        [line("fused_lm", 150.0), line("bf16_compiled", 100.0)],
    ]
    texts = [
        "\n".join([json.dumps({**machine, "command": f"run {number}"}), *rows])
        for number, rows in enumerate(runs)
    ]
    (tmp_path / "a.jsonl").write_text("\n".join(texts) + "\n", "utf-8")
    text = train_render.page(train_render.read_lines([tmp_path / "a.jsonl"]))
    assert "| 135m | torchao's bitnet training, compiled | 1.62 | 1.25 | 1.15 | met |" in text
    assert "| 135m | Hugging Face Trainer's step, bf16 | 2.60 | 3.00 | 1.50 | met |" in text
    assert "| 135m | onebitllms | 1.82 | 2.73 | 1.70 | met |" in text
    assert "| 135m | compiled bf16, fused cross-entropy | 1.50 | 1.50 | 1.00 | met |" in text
