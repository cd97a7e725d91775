"""A realistic finished run folder: tiny real ternary layers, synthetic logs and predictions."""

from __future__ import annotations

import json
import math
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from bitdistill import artifact
from bitdistill.quant.linear import BitLinear, PackedBitLinear
from bitdistill.report.inspect import write_stats

LABELS = ["arrival", "lost", "rate", "refund", "transfer", "fee", "pin", "limit"]
SUBLN_KINDS = ("o_proj", "down_proj")


class Block(nn.Module):
    """Seven projections, named as in transformers."""

    def __init__(self, hidden: int = 24, ffn: int = 52) -> None:
        super().__init__()
        self.self_attn, self.mlp = nn.Module(), nn.Module()
        shapes = {"q_proj": (hidden, hidden), "k_proj": (12, hidden), "v_proj": (12, hidden)}
        shapes |= {"o_proj": (hidden, hidden)}
        for name, (out, inner) in shapes.items():
            setattr(self.self_attn, name, BitLinear(inner, out, bias=False, subln=name in SUBLN_KINDS))
        for name, (out, inner) in {
            "gate_proj": (ffn, hidden),
            "up_proj": (ffn, hidden),
            "down_proj": (hidden, ffn),
        }.items():
            setattr(self.mlp, name, BitLinear(inner, out, bias=False, subln=name in SUBLN_KINDS))


class TinyModel(nn.Module):
    """`blocks` transformer-like blocks whose latents are Gaussian, or gathered near the thresholds."""

    def __init__(self, blocks: int = 4, seed: int = 0, gathered: bool = False) -> None:
        super().__init__()
        self.model = nn.Module()
        self.model.layers = nn.ModuleList(Block() for _ in range(blocks))
        generator = torch.Generator().manual_seed(seed)
        for module in self.modules():
            if isinstance(module, BitLinear):
                with torch.no_grad():
                    weight = torch.randn(module.weight.shape, generator=generator) * 0.02
                    if gathered:
                        weight = 0.02 * torch.sign(weight) * (0.3 + 0.45 * weight.abs() / 0.02)
                    module.weight.copy_(weight)


def pack_tiny(model: nn.Module) -> nn.Module:
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, BitLinear):
                setattr(parent, name, PackedBitLinear.from_bitlinear(child))
    return model


def write_log(
    run: Path, stage: str, steps: int, start: float, end: float, tokens: int, extras: bool = False
) -> None:
    noise = random.Random(stage)
    lines = []
    for step in range(10, steps + 1, 10):
        share = step / steps
        loss = end + (start - end) * math.exp(-5 * share) + noise.gauss(0, 0.03 * start)
        record: dict[str, Any] = {
            "stage": stage,
            "step": step,
            "steps": steps,
            "loss": abs(loss),
            "learning_rate": 1e-3 * (1 - share),
            "grad_norm": 1.0,
            "tokens": step * tokens // steps,
            "tokens_per_s": 5000.0,
            "elapsed_s": step * tokens / steps / 5000,
        }
        if extras:
            ratio = math.exp(math.log(30) * math.exp(-8 * share) + noise.gauss(0, 0.2))
            record |= {"ce": abs(loss) / 3, "ld": abs(loss) / 15, "ad": 4e-4 * abs(loss), "gamma": 60.0}
            record["ad_ce_ratio"] = ratio
        lines.append(json.dumps(record))
    (run / "logs").mkdir(exist_ok=True)
    (run / "logs" / f"{stage}.jsonl").write_text("\n".join(lines) + "\n")


def write_predictions(run: Path, name: str, rows: int, accuracy: float, prompts: list[str]) -> int:
    """Shared difficulty per row, so that models tend to fail on the same rows, as real ones do."""
    shared, own = random.Random(7), random.Random(name)
    lines, right = [], 0
    for index in range(rows):
        reference = LABELS[index % len(LABELS)]
        hard = 0.75 * shared.random() + 0.25 * own.random()
        correct = hard < accuracy - 0.06
        wrong = own.choice([label for label in LABELS if label != reference])
        prediction = reference if correct else wrong
        record = {"index": index, "where": f"test.jsonl:{index + 1}", "prompt": prompts[index % len(prompts)]}
        record |= {"reference": reference, "prediction": prediction, "correct": correct}
        lines.append(json.dumps(record | {"scores": [-0.1, -2.0]}))
        right += correct
    (run / "predictions").mkdir(exist_ok=True)
    (run / "predictions" / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    return right


def result_row(name: str, label: str, right: int, n: int, **other: Any) -> dict[str, Any]:
    share = right / n
    half = 1.96 * math.sqrt(share * (1 - share) / n)
    row = {
        "name": name,
        "label": label,
        "task": "banking-mini",
        "metric": "accuracy",
        "value": 100 * share,
        "n": n,
        "low": 100 * (share - half),
        "high": 100 * (share + half),
        "metrics": {"accuracy": 100 * share, "f1_macro": 100 * share - 0.4},
        "bits_per_weight": 16.0,
        "size_bytes": 14_400_000,
        "tokens_per_s": 5210.0,
        "seed": 0,
        "command": "bitdistill run banking.yaml",
        "commit": "0123abc",
        "versions": {"python": "3.11.2", "torch": "2.13.0", "transformers": "5.23.0", "bitdistill": "0.1.0"},
        "hardware": {"cpu": "x86_64", "cores": 2},
        "predictions_sha256": "ab" * 32,
        "train_tokens": 400_000,
        "train_s": 80.0,
    }
    return row | other


RECIPE = """\
name: banking
seed: 0
model: {path: assets/demo/tiny-llama}
task:
  name: banking-mini
  kind: classification
  template: "{text}\\nTopic:"
  labels: {card_arrival: " arrival", lost_card: " lost"}
data: {train: train.jsonl, test: test.jsonl}
pretrain: {objective: kl, budget_tokens: 2000000}
distill: {lambda: 10.0, temperature: 5.0, gamma: auto, gamma_ratio: 1.0}
bitnet_sft: {subln: none}
eval: {split: test, bootstrap_seed: 0}
report: {samples: 8}
"""
PROMPTS = [
    "I am still waiting on my card, it was ordered two weeks ago.\nTopic:",
    "Why was I charged a fee for a cash withdrawal abroad?\nTopic:",
    "My new PIN is not accepted at the till, what can I do now?\nTopic:",
    "Can you tell me how the exchange rate is decided when I pay in a foreign currency?\nTopic:",
    "A transfer to my friend has not arrived.\nTopic:",
]


def build_run(run: Path, *, rows: int = 600, prompts: list[str] = PROMPTS, steps: int = 400) -> Path:
    """A finished run at `run` (see the layout in report/run_folder.py)."""
    run.mkdir(parents=True)
    (run / "recipe.yaml").write_text(RECIPE)
    info: dict[str, Any] = {"name": "banking", "seed": 0, "command": "bitdistill run banking.yaml"}
    info |= {"commit": "0123abc", "versions": {"torch": "2.13.0", "bitdistill": "0.1.0"}}
    info |= {"hardware": {"cpu": "x86_64", "cores": 2}}
    info |= {"started": "2026-01-05T10:00:00Z", "recipe_hash": "cd" * 32}
    (run / "run.json").write_text(json.dumps(info))
    write_log(run, "sft", steps, 4.2, 0.5, 400_000)
    write_log(run, "pretrain", 2 * steps, 2.4, 0.7, 2_000_000)
    write_log(run, "distill", steps, 9.0, 1.6, 400_000, extras=True)
    write_log(run, "bitnet_sft", steps, 4.6, 0.9, 400_000)
    write_stats(TinyModel(), run, "refined")
    write_stats(TinyModel(gathered=True), run, "base")
    write_stats(TinyModel(seed=1, gathered=True), run, "student")
    write_stats(TinyModel(seed=2), run, "bitnet_sft")
    ternary = {"size_bytes": 1_900_000, "bits_per_weight": 2.0, "tokens_per_s": 6100.0}
    results = []
    for name, label, accuracy, extra in [
        ("teacher", "Teacher (FP-SFT)", 0.90, {}),
        ("bitnet_sft", "BitNet-SFT", 0.78, ternary),
        ("bitdistill", "BitDistill", 0.88, ternary | {"size_bytes": 1_910_000}),
    ]:
        right = write_predictions(run, name, rows, accuracy, prompts)
        results.append(result_row(name, label, right, rows, **extra))
    (run / "results.json").write_text(json.dumps({"rows": results}))
    with artifact.writing(run / "packed", {"kind": "packed"}) as folder:
        (folder / "model.safetensors").write_bytes(b"\0" * 4096)
        (folder / "config.json").write_text("{}")
    return run


@pytest.fixture(scope="session")
def _pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_run(tmp_path_factory.mktemp("runs") / "banking")


@pytest.fixture
def run_folder(_pristine: Path, tmp_path: Path) -> Path:
    """A finished run of a classification task, 600 test rows, three result rows (a copy for each test)."""
    return Path(shutil.copytree(_pristine, tmp_path / "runs" / "banking"))
