"""Mask-free causal attention gives what transformers' masked attention gives, sliding layers included."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch

from bitdistill.errors import ModelError
from bitdistill.models import attention
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


@pytest.mark.parametrize(
    ("flash_ms", "cudnn_ms", "cudnn_error", "first"),
    [
        (2.0, 1.0, 0.0, "CUDNN_ATTENTION"),
        (1.0, 1.0, 0.0, "FLASH_ATTENTION"),
        (2.0, 1.0, 0.5, "FLASH_ATTENTION"),  # fast and wrong
        (2.0, None, 0.0, "FLASH_ATTENTION"),  # not there
    ],
)
def test_the_faster_attention_is_preferred_when_it_is_right(
    monkeypatch: pytest.MonkeyPatch,
    flash_ms: float,
    cudnn_ms: float | None,
    cudnn_error: float,
    first: str,
) -> None:
    def timed(config: Any, rows: int, tokens: int, device: torch.device, backend: Any) -> Any:
        if backend.name == "FLASH_ATTENTION":
            return flash_ms, [torch.ones(4)]
        if cudnn_ms is None:
            raise RuntimeError("No available kernel")
        return cudnn_ms, [torch.ones(4) + cudnn_error]

    orders = []
    monkeypatch.setattr(attention, "_timed_attention", timed)
    monkeypatch.setattr(
        attention,
        "sdpa_kernel",
        lambda order, set_priority: orders.append([b.name for b in order]) or contextlib.nullcontext(),
    )
    config = tiny_model("llama").config
    with attention.fastest_attention(config, 4, 16, torch.device("cuda")):
        pass
    assert orders[0][0] == first
    assert sorted(orders[0]) == ["CUDNN_ATTENTION", "EFFICIENT_ATTENTION", "FLASH_ATTENTION", "MATH"]
    with attention.fastest_attention(config, 4, 16, torch.device("cpu")):
        assert len(orders) == 1


@pytest.mark.gpu
def test_packed_attention_on_a_gpu_is_that_of_the_mask() -> None:
    starts = torch.tensor([0, 5, 6, 40, 40, 64], dtype=torch.int32)
    q, k, v = (torch.randn(1, 64, h, 32).transpose(1, 2).bfloat16() for h in (4, 2, 2))
    found = []
    for device in ("cpu", "cuda"):
        leaves = [x.detach().to(device).requires_grad_() for x in (q, k, v)]
        out = attention.packed_attention(*leaves, starts.to(device), 34, None)
        found.append([out, *torch.autograd.grad(out.float().square().sum(), leaves)])
    for want, got in zip(*found, strict=True):
        torch.testing.assert_close(got.cpu(), want, rtol=0.05, atol=0.05)
