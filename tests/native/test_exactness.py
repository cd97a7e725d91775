"""Greedy tokens of the engine against PyTorch: 50 prompts x 128 tokens on each family (docs/engine.md, "Arithmetic").

The rule: the engine writes 128 tokens; PyTorch then reads the same text in one pass. At every place the engine's token
must be PyTorch's best one, or PyTorch's own logits must put the two within TIE of each other, in units of the logits'
standard deviation there: then a rounding border of the int8 quantizer decides, not the model. PyTorch differs from
itself in the same way, reading the text in one pass and token by token; the engine of a trained student may be no
further from PyTorch than that. Full-precision models have no such borders: there every token is the same.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import bitdistill as bd
from tests.models.conftest import TINY, VOCAB, tiny_model
from tests.models.test_student import save

pytest.importorskip("bitdistill.engine._native", reason="the native engine is not built")

from bitdistill.engine import Engine
from bitdistill.models.student import load_student, pack

PROMPTS, TOKENS = 50, 128
TIE = 5e-2

pytestmark = pytest.mark.slow


def decisions(
    engine: Engine, model: Any, prompts: list[list[int]], own_gaps: list[float] | None = None
) -> tuple[int, list[float], float]:
    """Greedy decisions made, the gaps of those that differ, and the largest difference of logits; both over spread.

    Args:
        own_gaps: takes the gaps of PyTorch's own decisions, token by token, that differ from its one pass.
    """
    engine.stop_ids = frozenset()
    made, gaps, largest = 0, [], 0.0
    for prompt, result in zip(prompts, engine.generate(prompts, max_new_tokens=TOKENS), strict=True):
        text = [*prompt, *result.ids]
        with torch.inference_mode():
            logits = model(torch.tensor([text])).logits[0].float().numpy()
        own = engine.logits(text)
        rows = np.arange(len(prompt) - 1, len(text) - 1)
        chosen = np.array(result.ids)
        np.testing.assert_array_equal(own[rows].argmax(1), chosen)  # decoding and reading are the same
        spread = logits[rows].std(1)
        gap = (logits[rows].max(1) - logits[rows, chosen]) / spread
        gaps += gap[gap > 0].tolist()
        if own_gaps is not None:
            stepped = token_by_token(model, prompt, list(result.ids))
            gap = (logits[rows].max(1) - logits[rows, stepped]) / spread
            own_gaps += gap[gap > 0].tolist()
        made += len(rows)
        largest = max(largest, float((np.abs(own - logits)[rows].max(1) / spread).max()))
    return made, gaps, largest


@torch.inference_mode()
def token_by_token(model: Any, prompt: list[int], written: list[int]) -> list[int]:
    """PyTorch's best token after each prefix of `written`, the prompt in one pass and then a token at a time."""
    out = model(torch.tensor([prompt]), use_cache=True)
    best = [int(out.logits[0, -1].argmax())]
    for token in written[:-1]:
        out = model(torch.tensor([[token]]), past_key_values=out.past_key_values, use_cache=True)
        best.append(int(out.logits[0, -1].argmax()))
    return best


def random_prompts(vocab: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(5)
    return [torch.randint(3, vocab, (1 + n % 20,), generator=generator).tolist() for n in range(PROMPTS)]


@pytest.mark.parametrize("name", sorted(TINY))
def test_greedy_tokens_of_every_family(tmp_path: Path, name: str) -> None:
    torch.set_num_threads(1)
    ids = torch.tensor(random_prompts(VOCAB)[19:20])
    student = bd.refine(tiny_model(name, max_position_embeddings=256), ids)
    save(pack(student, "bfloat16"), tmp_path / "m", "packed", float_dtype="bfloat16")
    engine = Engine(tmp_path / "m", threads=1)
    made, gaps, largest = decisions(engine, load_student(tmp_path / "m")[0], random_prompts(VOCAB))
    print(
        f"{name}: {made} tokens, {len(gaps)} differ, gaps up to {max(gaps, default=0):.2g}, logits {largest:.2g}"
    )
    assert made == PROMPTS * TOKENS
    assert max(gaps, default=0.0) < TIE
    assert len(gaps) < made / 500


@pytest.mark.parametrize("kind", ["packed", "float"])
def test_greedy_tokens_of_the_demo(demo_student: Path, kind: str) -> None:
    """A trained student: no further from PyTorch than PyTorch from itself. Full precision: no token differs."""
    from bitdistill.data import readers
    from bitdistill.models.load import load_source
    from bitdistill.stages.demo import demo_folder, demo_recipe

    torch.set_num_threads(1)
    recipe = demo_recipe()
    assert recipe.data.test is not None
    texts = [str(row.fields["text"]) for row in readers.read_rows(recipe.data.test, limit=PROMPTS)]
    folder = demo_student if kind == "packed" else demo_folder() / "model"
    engine = Engine(folder, threads=2)
    if kind == "packed":
        model = load_student(folder)[0]
    else:
        model = load_source(recipe.model, dtype="float32", device="cpu")[0].eval()
    prompts = [engine.encode(text) for text in texts]
    own: list[float] | None = [] if kind == "packed" else None
    made, gaps, largest = decisions(engine, model, prompts, own)
    print(
        f"demo {kind}: {made} tokens, {len(gaps)} differ, gaps up to {max(gaps, default=0):.2g}, logits {largest:.2g}"
    )
    assert made == PROMPTS * TOKENS
    if own is None:
        assert not gaps
        return
    print(f"PyTorch against itself: {len(own)} differ, gaps up to {max(own, default=0):.2g}")
    # Counts of rare events scatter by their root; a gap may be half as large again.
    assert len(gaps) <= len(own) + 3 * max(1, len(own)) ** 0.5
    assert max(gaps, default=0.0) <= 1.5 * max(own, default=0.0)
    assert len(gaps) < made / 200
