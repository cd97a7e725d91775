"""Mask-free causal attention gives what transformers' masked attention gives, sliding layers included."""

from __future__ import annotations

import pytest
import torch

from bitdistill.errors import ModelError
from bitdistill.models.attention import CAUSAL_NAME, causal_only
from bitdistill.models.capture import capture_states
from tests.models.conftest import tiny_model


@pytest.mark.parametrize("tokens", [1, 7, 8, 9, 23])  # Gemma3's window here is 8
def test_logits_are_those_of_masked_attention(tiny_name: str, tokens: int) -> None:
    model = tiny_model(tiny_name)
    ids = torch.randint(3, 100, (2, tokens), generator=torch.Generator().manual_seed(tokens))
    masked = model(ids).logits
    with causal_only(model):
        assert model.config._attn_implementation == CAUSAL_NAME
        torch.testing.assert_close(model(ids).logits, masked, rtol=1e-5, atol=1e-5)
    assert model.config._attn_implementation == "sdpa"


def test_the_window_is_not_ignored() -> None:
    model = tiny_model("gemma3_text", layer_types=["sliding_attention"] * 3)
    ids = torch.randint(3, 100, (1, 40), generator=torch.Generator().manual_seed(0))
    other = ids.clone()
    other[0, 0] = 3 + (int(ids[0, 0]) - 2) % 97
    with causal_only(model):
        difference = (model(ids).logits - model(other).logits).abs().amax(dim=-1)[0]
    assert difference[21] > 0  # three layers of 8 reach 21 positions on
    assert torch.equal(difference[22:], torch.zeros_like(difference[22:]))


def test_capture_works_inside(tiny_name: str) -> None:
    model = tiny_model(tiny_name)
    ids = torch.randint(3, 100, (2, 12), generator=torch.Generator().manual_seed(1))
    with capture_states(model, [1]) as outside:
        logits = model(ids).logits
    with causal_only(model), capture_states(model, [1]) as inside:
        torch.testing.assert_close(model(ids).logits, logits, rtol=1e-5, atol=1e-5)
    for a, b in zip(outside[1], inside[1], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_other_attention_is_refused() -> None:
    model = tiny_model("llama")
    model.set_attn_implementation("eager")
    with pytest.raises(ModelError, match="sdpa"), causal_only(model):
        pass
