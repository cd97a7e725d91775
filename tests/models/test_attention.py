"""Mask-free causal attention gives what transformers' masked attention gives, sliding layers included."""

from __future__ import annotations

import contextlib
import itertools
import re
from types import SimpleNamespace
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
        (2.0, 1.0, float("nan"), "FLASH_ATTENTION"),
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
            return flash_ms, [torch.ones(4)] * 2
        if cudnn_ms is None:
            raise RuntimeError("No available kernel")
        return cudnn_ms, [torch.ones(4), torch.ones(4) + cudnn_error]

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


class Flash:
    """FlashAttention's variants in plain torch, and how they were called."""

    def __init__(self) -> None:
        self.calls: list[tuple[torch.dtype, int | None, bool]] = []

    def __call__(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        starts: torch.Tensor | None,
        longest: int,
        scaling: float | None,
        window: int | None,
    ) -> torch.Tensor:
        self.calls.append((query.dtype, window, starts is not None))
        assert query.dtype == key.dtype == value.dtype
        q, k, v = (x.transpose(-3, -2) for x in (query, key, value))
        tokens = q.shape[-2]
        if starts is None:
            assert tokens == longest
            starts = torch.tensor([0, tokens])
        distance = torch.arange(tokens)[:, None] - torch.arange(tokens)[None, :]
        seen = torch.zeros(tokens, tokens, dtype=torch.bool)
        for first, end in itertools.pairwise(starts.tolist()):
            assert end - first <= longest
            seen[first:end, first:end] = True
        seen &= (distance >= 0) & (distance < (window or tokens))
        k, v = (x.repeat_interleave(q.shape[-3] // x.shape[-3], dim=-3) for x in (k, v))
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v, seen, scale=scaling)
        return out.transpose(-3, -2)


@pytest.mark.parametrize("name", ["qwen3", "gemma3_text"])
@pytest.mark.parametrize("packed", [False, True])
def test_under_autocast_a_gpu_gets_windows_and_packed_rows_in_half_precision(
    monkeypatch: pytest.MonkeyPatch, name: str, packed: bool
) -> None:
    """Rotary embeddings give float32 there, for which there is no FlashAttention: sdpa casts, and so must we."""
    model = tiny_model(name)
    rows = {"row_starts": torch.tensor([0, 11, 12, 40], dtype=torch.int32), "longest_row": 28}
    kwargs: dict[str, Any] = {"use_cache": False}
    if packed:
        position = torch.cat([torch.arange(n) for n in (11, 1, 28)])[None]
        kwargs |= rows | {"position_ids": position}
    ids = torch.randint(3, 100, (1 if packed else 2, 40), generator=torch.Generator().manual_seed(0))
    with causal_only(model), torch.autocast("cpu", dtype=torch.bfloat16):
        want = model.model(ids, **kwargs).last_hidden_state
        flash = Flash()
        monkeypatch.setattr(attention, "_flash", flash)
        monkeypatch.setattr(attention, "_takes_flash", lambda query: query.dtype == torch.bfloat16)
        got = model.model(ids, **kwargs).last_hidden_state
    torch.testing.assert_close(got, want, rtol=0.05, atol=0.05)
    windows = [8, 8, None] if name == "gemma3_text" else [None] * model.config.num_hidden_layers
    if not packed:
        windows = [window for window in windows if window is not None]
    assert flash.calls == [(torch.bfloat16, window, packed) for window in windows]


@pytest.mark.gpu
@pytest.mark.parametrize("size", [64, 256])
@pytest.mark.parametrize(("tokens", "window"), [(640, 512), (704, 100), (96, 1), (64, 64)])
def test_a_window_on_a_gpu_is_that_of_the_mask(size: int, tokens: int, window: int) -> None:
    """Finite gradients too, where sdpa with a mask gives NaN (rows whose logits are all low)."""
    q, k, v = (torch.randn(2, tokens, h, size).transpose(1, 2).bfloat16() for h in (4, 1, 1))
    q[..., 0], k[..., 0] = 1.0, -120 * size**0.5
    found = []
    for device, dtype in (("cpu", torch.float32), ("cuda", torch.bfloat16)):
        leaves = [x.detach().to(device, dtype).requires_grad_() for x in (q, k, v)]
        out, _ = attention.causal_attention(torch.nn.Module(), *leaves, None, sliding_window=window)
        grads = torch.autograd.grad(out.float().square().sum(), leaves)
        assert all(torch.isfinite(grad).all() for grad in grads)
        # Not column 0: sums that cancel, times 120
        found.append([x.float().cpu()[..., 1:] for x in (out, *grads)])
    for want, got in zip(*found, strict=True):
        # A window of one token has gradients of exactly 0 in queries and keys
        assert float((got - want).norm()) < 0.02 * (float(want.norm()) or 1.0)


@pytest.mark.gpu
def test_a_gemma_trains_on_a_gpu_in_bfloat16() -> None:
    """Heads of 256 and rows longer than the window: gradients are finite and those of float32 on a CPU."""
    config = {"head_dim": 256, "sliding_window": 64, "layer_types": ["sliding_attention"] * 3}
    ids = torch.randint(3, 100, (2, 192), generator=torch.Generator().manual_seed(0))
    found = []
    for device in ("cpu", "cuda"):
        model = tiny_model("gemma3_text", **config).to(device)
        with causal_only(model), torch.autocast("cuda", torch.bfloat16, enabled=device == "cuda"):
            hidden = model.model(ids.to(device), use_cache=False).last_hidden_state
            hidden.float().square().mean().backward()
        found.append({n: p.grad.cpu() for n, p in model.named_parameters() if p.grad is not None})
    for name, want in found[0].items():
        error = float((found[1][name] - want).norm() / want.norm())
        assert error < 0.05, (name, error)


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


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [40, 88, 200])
def test_a_gemmas_last_logits_do_not_depend_on_what_follows(tokens: int) -> None:
    """On a GPU in bfloat16, heads of 256, padded and masked rows as in scoring: what training at the answer sees is
    what scoring sees, and the answer is not among it."""
    model = tiny_model("gemma3_text", head_dim=256, sliding_window=512).cuda()
    ids = torch.randint(3, 100, (4, tokens), generator=torch.Generator().manual_seed(tokens)).cuda()
    other = ids.clone()
    other[:, -1] = 3 + (other[:, -1] - 2) % 97
    with causal_only(model), torch.autocast("cuda", torch.bfloat16):
        first, second = (
            model.model(x, use_cache=False).last_hidden_state[:, -2].float() for x in (ids, other)
        )
    assert torch.equal(first, second)
    mask = torch.ones(4, tokens + 7, dtype=torch.long, device="cuda")
    mask[:, tokens - 1 :] = 0
    padded = torch.nn.functional.pad(ids[:, : tokens - 1], (0, 8))
    low = tiny_model("gemma3_text", head_dim=256, sliding_window=512).to("cuda", torch.bfloat16)
    scored = low.model(padded, attention_mask=mask).last_hidden_state[:, tokens - 2].float()
    assert float((scored - first).norm() / first.norm()) < 0.05


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("heads", "kv_heads", "size", "window"), [(4, 1, 256, 128), (9, 3, 64, None)])
def test_attention_is_compared_with_plain_arithmetic(
    dtype: torch.dtype, heads: int, kv_heads: int, size: int, window: int | None
) -> None:
    assert attention.why_wrong(torch.device("cpu"), dtype, heads, kv_heads, size, window, True) is None


class Broken:
    """sdpa that does one thing wrong."""

    def __init__(self, how: str) -> None:
        self.how, self.real = how, attention.sdpa_attention_forward

    def __call__(self, module: Any, query: Any, key: Any, value: Any, mask: Any, **kwargs: Any) -> Any:
        if self.how == "no kernel":
            raise RuntimeError("no kernel\nfor this head size")
        if self.how == "sees what follows" and mask is None:
            tokens = query.shape[2]
            mask = torch.ones(tokens, tokens, dtype=torch.bool).tril(1)[None, None]
        if self.how == "NaN gradient" and mask is not None:
            query = query * 1.0
            query.register_hook(lambda grad: grad * float("nan"))
        return self.real(module, query, key, value, mask, **kwargs)


@pytest.mark.parametrize(
    ("how", "window", "message"),
    [
        ("no kernel", None, r"^no kernel \(40 tokens, head size 32, window None, packed False\)$"),
        ("sees what follows", None, r"output is off by .*40 tokens, head size 32, window None, packed False"),
        ("NaN gradient", 64, r"dq is off by nan .*window 64, packed False"),
    ],
)
def test_a_gpu_whose_attention_is_wrong_is_refused(
    monkeypatch: pytest.MonkeyPatch, how: str, window: int | None, message: str
) -> None:
    monkeypatch.setattr(attention, "sdpa_attention_forward", Broken(how))
    attention.why_wrong.cache_clear()
    try:
        with torch.inference_mode():
            fault = attention.why_wrong(torch.device("cpu"), torch.float32, 4, 2, 32, window, True)
    finally:
        attention.why_wrong.cache_clear()
    assert fault is not None
    assert re.search(message, fault), fault


@pytest.mark.parametrize(("name", "window"), [("gemma3_text", 512), ("qwen3", None)])
def test_training_does_not_begin_where_attention_is_wrong(
    monkeypatch: pytest.MonkeyPatch, name: str, window: int | None
) -> None:
    model = tiny_model(name, **({"sliding_window": 4096} if window else {}))
    asked: list[Any] = []
    on_gpu = SimpleNamespace(device=torch.device("cuda"))
    monkeypatch.setattr(model, "parameters", lambda: iter([on_gpu]))
    monkeypatch.setattr(
        attention, "why_wrong", lambda *sizes: asked.append(sizes) or "dq is off by 3 (40 tokens)"
    )
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    message = r"attention on a GPU with torch .*: dq is off by 3 \(40 tokens\); use another version of torch"
    with pytest.raises(ModelError, match=message), causal_only(model, packed=True):
        pass
    config = model.config
    heads = (config.num_attention_heads, config.num_key_value_heads, config.head_dim)
    assert asked == [(on_gpu.device, torch.bfloat16, *heads, window, True)]
    assert config._attn_implementation == "sdpa"


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("heads", "kv_heads", "size", "window"), [(4, 1, 256, 512), (9, 3, 64, None), (16, 8, 128, None)]
)
def test_attention_on_a_gpu_is_right(heads: int, kv_heads: int, size: int, window: int | None) -> None:
    shape = (heads, kv_heads, size, window)
    assert attention.why_wrong(torch.device("cuda"), torch.bfloat16, *shape, packed=True) is None
