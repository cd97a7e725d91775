"""Small ternary students that have learnt something: a random model's greedy tokens are all near-ties.

Hidden sizes are multiples of 256, as TQ1_0 and TQ2_0 want; tokenizer and text are the demo's.
"""

from __future__ import annotations

import io
import json
from functools import cache
from pathlib import Path
from typing import Any

import torch
import zstandard
from transformers import AutoConfig, AutoModelForCausalLM

from bitdistill.config import RefineConfig
from bitdistill.data import readers, tasks
from bitdistill.data.batches import TaskBatches
from bitdistill.models import surgery
from bitdistill.models.student import pack, save_student
from bitdistill.models.tokenizer import read_tokenizer
from bitdistill.stages.demo import demo_folder, demo_recipe
from bitdistill.stages.sft import CrossEntropyStep
from bitdistill.train.step import Totals

SIZES: dict[str, Any] = {
    "vocab_size": 4096,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": 512,
    "tie_word_embeddings": True,
    "bos_token_id": None,
    "eos_token_id": 0,
    "pad_token_id": 0,
    "initializer_range": 0.04,
}
# What a family needs to run in other tools as it does here.
OWN: dict[str, dict[str, Any]] = {
    "llama": {"rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0}},
    "gemma3_text": {
        "sliding_window": 16,
        "layer_types": ["sliding_attention", "full_attention"],
        "query_pre_attn_scalar": 64,
    },
    "bitnet": {"rms_norm_eps": 1e-5},
}


def texts(split: str) -> list[str]:
    """The demo's task rows, as plain text."""
    raw = (demo_folder() / f"banking77-{split}.jsonl.zst").read_bytes()
    with zstandard.ZstdDecompressor().stream_reader(io.BytesIO(raw)) as stream:
        lines = stream.read().decode().splitlines()
    return [json.loads(line)["text"] for line in lines]


@cache
def tokenizer() -> Any:
    return read_tokenizer(demo_folder() / "model")


def stream(split: str, limit: int | None = None) -> torch.Tensor:
    """Rows as one line of token ids, an end-of-text id between them."""
    ids: list[int] = []
    for row in tokenizer()(texts(split)[:limit])["input_ids"]:
        ids += [*row, 0]
    return torch.tensor(ids)


@torch.enable_grad()
def train_student(family: str, subln: str, *, steps: int, seed: int = 0, **changes: Any) -> Any:
    """A latent student of a random model, trained on the demo's rows with the language-model loss.

    With no steps it keeps its random weights: enough where only bytes are compared.
    """
    torch.manual_seed(seed)
    config = AutoConfig.for_model(family, **{**SIZES, **OWN.get(family, {}), **changes})
    source = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")
    plan = surgery.plan(config, RefineConfig(subln=subln))  # type: ignore[arg-type]
    student = surgery.apply(plan, source.train())
    if steps == 0:
        return student.eval()
    ids = stream("train")
    optimizer = torch.optim.AdamW(student.parameters(), lr=2e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        starts = torch.randint(0, len(ids) - 49, (16,), generator=generator)
        rows = torch.stack([ids[start : start + 48] for start in starts.tolist()])
        student(rows, labels=rows).loss.backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    return student.eval()


def task_examples(split: str) -> list[tasks.Example]:
    """The demo's rows as prompts and answers."""
    recipe = demo_recipe()
    rows = readers.read_rows(recipe.data.train if split == "train" else str(recipe.data.test))
    return tasks.encode(recipe.task, rows, tokenizer(), recipe.data.max_length)


@torch.enable_grad()
def train_task_student(family: str, subln: str, *, steps: int, seed: int = 0, **changes: Any) -> Any:
    """A latent student of a random model, trained to answer the demo's task: 89 % right after 700 steps."""
    student = train_student(family, subln, steps=0, seed=seed, **changes).train()
    batches = TaskBatches(task_examples("train"), batch_rows=32, seed=seed, pad_id=0)
    step = CrossEntropyStep(student)
    optimizer = torch.optim.AdamW(student.parameters(), lr=2e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps, pct_start=0.1)
    for number in range(steps):
        (batch,) = batches.micro_batches(number)
        answers = int(batch.answer_mask_BT.sum())
        step(batch, Totals(rows=len(batch.indices), tokens=batch.tokens, answers=answers)).loss.backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    return student.eval()


def packed_student(folder: Path, family: str, subln: str, *, steps: int = 300, **changes: Any) -> Path:
    """A trained student's packed folder at `folder/packed`."""
    return save_packed(train_student(family, subln, steps=steps, **changes), folder)


def save_packed(student: Any, folder: Path) -> Path:
    """A latent student's packed folder at `folder/packed`."""
    save_student(
        pack(student, "bfloat16"),
        tokenizer(),
        folder / "packed",
        kind="packed",
        plan=student.hf_quantizer.plan,
        recipe={},
        extra={"key": "k"},
        float_dtype="bfloat16",
    )
    return folder / "packed"
