"""Keys and values: types, rings of sliding layers, branches; each against PyTorch or the plain cache."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from bitdistill.errors import ModelError
from bitdistill.quant.ternary import quantize_activations
from tests.models.conftest import VOCAB, tiny_model
from tests.models.test_student import save

pytest.importorskip("bitdistill.engine._native", reason="the native engine is not built")

from bitdistill.engine import Engine
from bitdistill.engine import _native as native

WINDOW, RING = 8, 320  # window + one pass of 256 rows, in whole 64s
TYPES = ("float32", "float16", "int8")
HEADS, DIM, LAYERS = 2, 18, 3  # of the tiny gemma3_text: two sliding layers, one full


def prompt_ids(n: int, seed: int = 1) -> list[int]:
    return torch.randint(3, VOCAB, (n,), generator=torch.Generator().manual_seed(seed)).tolist()


@pytest.fixture(scope="module")
def gemma(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two sliding layers and a full one, in float32: no quantizer hides or magnifies a difference."""
    folder = tmp_path_factory.mktemp("gemma") / "m"
    save(tiny_model("gemma3_text", max_position_embeddings=4096), folder, "teacher")
    return folder


def rounded(kind: str, x: torch.Tensor) -> torch.Tensor:
    """Keys or values [B, H, T, D] as the cache holds them: the slow twin."""
    if kind == "float16":
        return x.half().float()
    if kind == "int8":
        codes, scales = quantize_activations(x.reshape(-1, x.shape[-1]))
        return (codes.float() * scales).reshape(x.shape)
    return x


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma3_text"])
def test_cache_types_equal_pytorch_with_rounded_keys_and_values(tmp_path: Path, name: str, kind: Any) -> None:
    model = tiny_model(name)
    save(model, tmp_path / "m", "teacher")
    ids = prompt_ids(90)

    def attention(module: Any, query: Any, key: Any, value: Any, mask: Any, **options: Any) -> Any:
        plain = ALL_ATTENTION_FUNCTIONS["sdpa"]
        return plain(module, query, rounded(kind, key), rounded(kind, value), mask, **options)

    ALL_ATTENTION_FUNCTIONS.register("rounded_cache", attention)
    from transformers import AutoModelForCausalLM
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

    ALL_MASK_ATTENTION_FUNCTIONS.register("rounded_cache", ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
    twin = AutoModelForCausalLM.from_pretrained(tmp_path / "m", attn_implementation="rounded_cache")
    with torch.inference_mode():
        expected = twin(torch.tensor([ids])).logits[0].float().numpy()
    got = Engine(tmp_path / "m", threads=1, kv=kind).logits(ids)
    difference = np.abs(got - expected).max(axis=1)
    # A last bit may carry a key over a rounding border of the cache; few rows see one.
    assert np.median(difference) < 2e-5
    assert difference.max() < (2e-5 if kind == "float32" else 2e-2)
    if kind != "float32":
        plain = Engine(tmp_path / "m", threads=1).logits(ids)
        assert np.abs(got - plain).max() > 1e-4, "nothing was rounded"


@pytest.mark.parametrize("kind", TYPES)
def test_rings_give_the_same_bits_in_any_pieces(gemma: Path, kind: Any) -> None:
    """A text of nearly three rings: at once, in pieces, token by token; float32 as PyTorch too."""
    ids = np.array(prompt_ids(900), dtype=np.int32)
    engine = Engine(gemma, threads=2, kv=kind)
    assert engine.facts["ring_rows"] == RING
    whole = engine.logits(ids.tolist())
    if kind == "float32":
        with torch.inference_mode():
            expected = tiny_model("gemma3_text", max_position_embeddings=4096)(
                torch.tensor(ids[None].astype("int64"))
            )
        np.testing.assert_allclose(whole, expected.logits[0].numpy(), atol=2e-5, rtol=2e-5)
    for cuts in ([1, 2, 63, 64, 319, 320, 321, 576, 577, 899], list(range(300, 400)), [255, 256, 600]):
        sequence = native.Sequence(engine.model)
        pieces = [engine.model.forward([(sequence, part)], "all") for part in np.split(ids, cuts)]
        np.testing.assert_array_equal(np.concatenate(pieces), whole)


@pytest.mark.parametrize("kind", TYPES)
def test_branches_continue_a_ring(gemma: Path, kind: Any) -> None:
    engine = Engine(gemma, threads=2, kv=kind)
    ids = np.array(prompt_ids(700), dtype=np.int32)
    for cut in (1, 5, 300, 321, 650):
        root = native.Sequence(engine.model)
        engine.model.forward([(root, ids[:cut])], "none")
        one, two = root.branch(), root.branch()
        del root  # a branch keeps what it stands on
        other = np.array(prompt_ids(20, seed=7), dtype=np.int32)
        rows = engine.model.forward([(one, ids[cut:]), (two, other)], "last")
        expected = engine.logits(ids.tolist())[-1], engine.logits([*ids[:cut].tolist(), *other.tolist()])[-1]
        np.testing.assert_array_equal(rows, np.stack(expected))
        assert len(one) == 700
        with pytest.raises(ModelError, match="cannot be cut"):
            two.truncate(cut - 1)


def test_cutting_a_sequence_back(gemma: Path) -> None:
    engine = Engine(gemma, threads=1)
    ids = np.array(prompt_ids(800), dtype=np.int32)
    whole = engine.logits(ids.tolist())
    sequence = native.Sequence(engine.model)
    engine.model.forward([(sequence, ids)], "none")
    lowest = 800 - RING + WINDOW - 1  # the next token looks at this many before it
    assert sequence.keepable(lowest) == lowest
    assert sequence.keepable(lowest - 1) == 0
    with pytest.raises(ModelError, match="sliding layers keep the last 320 of 800"):
        sequence.truncate(lowest - 1)
    assert len(sequence) == 800, "a refused cut changes nothing"
    sequence.truncate(790)
    engine.model.forward([(sequence, ids[790:795])], "none")
    sequence.truncate(lowest)
    np.testing.assert_array_equal(engine.model.forward([(sequence, ids[lowest:])], "all"), whole[lowest:])
    sequence.truncate(0)
    np.testing.assert_array_equal(engine.model.forward([(sequence, ids[:50])], "all"), whole[:50])
    assert sequence.keepable(3) == 3


def test_a_prompt_that_a_ring_cannot_continue_is_run_again(gemma: Path) -> None:
    engine = Engine(gemma, threads=2)
    ids = prompt_ids(800)
    engine.generate(ids, max_new_tokens=4)
    again = engine.generate([*ids[:780], 5], max_new_tokens=4)
    assert again.reused_tokens == 780
    shorter = engine.generate(ids[:200], max_new_tokens=4)
    assert shorter.reused_tokens == 0
    assert shorter.ids == Engine(gemma, threads=2).generate(ids[:200], max_new_tokens=4).ids


def test_prompts_of_a_batch_share_their_beginning(gemma: Path) -> None:
    engine = Engine(gemma, threads=2)
    start = prompt_ids(500)
    prompts = [start + prompt_ids(n, seed=n) for n in (3, 9, 5)] + [start]
    alone = [Engine(gemma, threads=1).generate(p, max_new_tokens=9).ids for p in prompts]
    together = engine.generate(prompts, max_new_tokens=9)
    assert [g.ids for g in together] == alone
    assert [g.reused_tokens for g in together] == [0, 499, 499, 499]
    drawn = {"max_new_tokens": 9, "temperature": 1.0, "seed": 3}
    assert engine.generate([start, start], **drawn)[1].ids != engine.generate([start, start], **drawn)[0].ids
    few = engine.generate([[5, 6, 7], [5, 6, 8]], max_new_tokens=3)
    assert [g.reused_tokens for g in few] == [0, 0]


def up(n: int) -> int:
    return (n + 63) // 64 * 64


@pytest.mark.parametrize(("kind", "each", "scale"), [("float32", 4, 0), ("float16", 2, 0), ("int8", 1, 4)])
def test_memory_of_the_cache(gemma: Path, kind: Any, each: int, scale: int) -> None:
    engine = Engine(gemma, kv=kind)

    def plane(rows: int) -> int:
        return up(rows * DIM * each) + (up(rows * scale) if scale else 0)

    for tokens in (0, 1, 64, 319, 320, 321, 4096):
        expected = 2 * HEADS * (2 * plane(min(tokens, RING)) + plane(tokens))
        assert engine.model.kv_bytes(tokens) == expected
    sequence = native.Sequence(engine.model)
    engine.model.forward([(sequence, np.array(prompt_ids(640), dtype=np.int32))], "none")
    assert sequence.kv_bytes == engine.model.kv_bytes(640)
    grown = native.Sequence(engine.model)  # by half, by 512 tokens at most; what it held moves along
    ids = np.array(prompt_ids(2050), dtype=np.int32)
    for begin, end in ((0, 640), (640, 641), (641, 1152), (1152, 1600), (1600, 1601), (1601, 2050)):
        engine.model.forward([(grown, ids[begin:end])], "none")
        capacity = {640: 640, 641: 960, 1152: 1472, 1600: 1984, 1601: 1984, 2050: 2496}[end]
        assert grown.kv_bytes == engine.model.kv_bytes(capacity)
    whole = native.Sequence(engine.model)
    engine.model.forward([(whole, ids)], "none")
    last = np.array([7], dtype=np.int32)
    logits = [engine.model.forward([(s, last)], "last") for s in (grown, whole)]
    assert np.array_equal(*logits)
    with pytest.raises(ModelError, match="kv_bytes"):
        engine.model.kv_bytes(-1)
