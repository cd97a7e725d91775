"""bitnet.cpp runs our I2_S files: the same greedy text and perplexity. Needs a build of it, which no package index has.

BITDISTILL_BITNET_CPP names the folder of its programs (`llama-cli` and `llama-perplexity`), built for x86 with default
settings from microsoft/BitNet; without it these tests are skipped. The rule for greedy text is that of
test_llama_cpp.py: equal, or parted at a near-tie of our own logits.
"""

from __future__ import annotations

import math
import os
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

from bitdistill.config import ExportConfig, GgufConfig
from bitdistill.interop.gguf_export import export_gguf
from bitdistill.models.student import load_student
from tests.interop.test_llama_cpp import NEAR_TIE, PROMPT_TOKENS, PROMPTS, WINDOW
from tests.interop.trained import packed_student, save_packed, task_examples, texts, train_task_student

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]
NEW_TOKENS = 16


@pytest.fixture(scope="module")
def programs() -> Path:
    folder = os.environ.get("BITDISTILL_BITNET_CPP")
    if not folder:
        pytest.skip(
            "BITDISTILL_BITNET_CPP is not set: the folder with bitnet.cpp's llama-cli and llama-perplexity"
        )
    assert (Path(folder) / "llama-cli").is_file(), f"BITDISTILL_BITNET_CPP={folder}: no llama-cli there"
    return Path(folder)


def call(program: Path, *arguments: str) -> str:
    """What a program of bitnet.cpp prints: llama-cli the text on standard output, llama-perplexity all it says."""
    done = subprocess.run(
        [str(program), *arguments], capture_output=True, text=True, errors="replace", timeout=600, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout if program.name == "llama-cli" else done.stdout + done.stderr


def their_text(programs: Path, model: Path, prompt: str, tokens: int) -> str:
    return (
        call(
            programs / "llama-cli",
            *("-m", str(model), "-p", prompt, "-n", str(tokens), "--temp", "0", "--no-display-prompt"),
            *("-t", "1", "-c", "256"),
        )
        .rstrip("\n")
        .removesuffix(" [end of text]")
    )


def i2_s(packed: Path, out: Path) -> Path:
    return export_gguf(packed, out, ExportConfig(gguf=GgufConfig(weights="i2_s"))) / "model.gguf"


@torch.no_grad()
def ours(model: Any, prompt: list[int], tokens: int) -> list[int]:
    output = model.generate(
        torch.tensor([prompt]), max_new_tokens=tokens, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    found = output[0, len(prompt) :].tolist()
    return found[: found.index(0)] if 0 in found else found  # up to the end of the text


@torch.no_grad()
def test_greedy_text_and_perplexity(programs: Path, tmp_path: Path) -> None:
    packed = packed_student(tmp_path, "llama", "paper", steps=300)
    path = i2_s(packed, tmp_path / "gguf")
    model, tokenizer, _ = load_student(packed)
    equal, gaps = 0, []
    for text in texts("test")[:PROMPTS]:
        prompt = tokenizer(text).input_ids[:PROMPT_TOKENS]
        mine = ours(model, prompt, NEW_TOKENS)
        theirs = their_text(programs, path, tokenizer.decode(prompt), NEW_TOKENS)
        if tokenizer.decode(mine).strip() == theirs.strip():
            equal += 1
            continue
        same = next(
            (
                i
                for i in range(len(mine))
                if not theirs.lstrip().startswith(tokenizer.decode(mine[: i + 1]).lstrip())
            ),
            len(mine),  # theirs goes on
        )
        best = model(torch.tensor([prompt + mine[:same]])).logits[0, -1].topk(2).values
        gaps.append((best[0] - best[1]).item())
    print(
        f"\nequal continuations {equal} of {PROMPTS}; gaps where they part: {[round(g, 3) for g in sorted(gaps)]}"
    )

    # llama-perplexity counts the second half of each window; no token is put in front.
    (tmp_path / "text.txt").write_text("\n".join(texts("test")[:400]), "utf-8")
    ids = torch.tensor(tokenizer("\n".join(texts("test")[:400])).input_ids)
    windows = ids[: len(ids) // WINDOW * WINDOW].reshape(-1, WINDOW)
    losses = [
        torch.nn.functional.cross_entropy(
            model(row[None]).logits[0, WINDOW // 2 : -1].double(), row[WINDOW // 2 + 1 :]
        )
        for row in windows
    ]
    mine_ppl = math.exp(torch.stack(losses).mean().item())
    said = call(
        programs / "llama-perplexity",
        *("-m", str(path), "-f", str(tmp_path / "text.txt"), "-c", str(WINDOW), "-t", "1", "-b", str(WINDOW)),
    )
    found = re.search(r"Final estimate: PPL = ([\d.]+)", said)
    assert found, said[-2000:]
    change = float(found[1]) / mine_ppl - 1
    print(f"perplexity {mine_ppl:.4f}, bitnet.cpp {change:+.3%}")
    assert abs(change) < 0.01
    assert all(gap < NEAR_TIE for gap in gaps)
    assert equal >= 0.5 * PROMPTS


@torch.no_grad()
def test_a_task_student_gives_the_same_answers(programs: Path, tmp_path: Path) -> None:
    packed = save_packed(train_task_student("llama", "paper", steps=500), tmp_path)
    path = i2_s(packed, tmp_path / "gguf")
    model, tokenizer, _ = load_student(packed)
    examples = task_examples("test")
    for row in torch.randperm(len(examples), generator=torch.Generator().manual_seed(0))[:PROMPTS].tolist():
        prompt = list(examples[row].prompt_ids)
        answer = tokenizer.decode(ours(model, prompt, 1))
        assert their_text(programs, path, tokenizer.decode(prompt), 1).strip() == answer.strip()
