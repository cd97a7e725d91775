"""A whole working folder on a tiny scale: a random model, task rows, a corpus and a recipe."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from bitdistill.config import Recipe
from bitdistill.recipe import load_recipe
from tests.models.conftest import make_tokenizer, tiny_model

RECIPE = """
name: tiny
output_dir: {folder}/runs
model: {{path: model}}
task:
  name: parity
  kind: classification
  template: "{{text}} w9"
  labels: {{a: " w90", b: " w91"}}
data: {{train: train.jsonl, test: test.jsonl, max_length: 32}}
sft: {{epochs: 1, loop: {{batch_rows: 8}}}}
refine: {{calibration_rows: 4, calibration_length: 16}}
pretrain:
  corpus: corpus.txt
  cache_dir: {folder}/cache/bases
  budget_tokens: 512
  sequence_length: 16
  loop: {{batch_rows: 8, micro_batch_rows: 4}}
distill: {{epochs: 1, loop: {{batch_rows: 8, micro_batch_rows: 4}}, gamma_every_steps: 2}}
bitnet_sft: {{epochs: 1, loop: {{batch_rows: 8}}}}
report: {{samples: 3}}
"""


def write_rows(path: Path, count: int, seed: int) -> None:
    rng = random.Random(seed)
    lines = []
    for _ in range(count):
        words = [f"w{rng.randrange(30, 90)}" for _ in range(rng.randrange(2, 9))]
        lines.append(json.dumps({"text": " ".join(words), "label": rng.choice("ab")}))
    path.write_text("\n".join(lines) + "\n", "utf-8")


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def work(tmp_path: Path) -> Path:
    """Folder with model/, train.jsonl, test.jsonl, corpus.txt and recipe.yaml."""
    tiny_model("llama_tied").save_pretrained(tmp_path / "model")
    make_tokenizer().save_pretrained(tmp_path / "model")
    write_rows(tmp_path / "train.jsonl", 32, 0)
    write_rows(tmp_path / "test.jsonl", 12, 1)
    rng = random.Random(2)
    (tmp_path / "corpus.txt").write_text(" ".join(f"w{rng.randrange(30, 90)}" for _ in range(900)), "utf-8")
    (tmp_path / "recipe.yaml").write_text(RECIPE.format(folder=tmp_path), "utf-8")
    return tmp_path


def recipe(work: Path, *overrides: Any) -> Recipe:
    return load_recipe(work / "recipe.yaml", list(overrides))
