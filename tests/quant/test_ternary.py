"""The quantizers against a float64 oracle, on adversarial input."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bitdistill.quant.ternary import EPSILON, quantize_activations, ternarize


def oracle_ternarize(weight: np.ndarray) -> tuple[np.ndarray, np.float32]:
    """RoundClip(W / scale, -1, 1) in float64 with the float32 scale of the contract."""
    scale = np.float32(max(np.float32(np.abs(weight.astype(np.float64)).mean()), np.float32(EPSILON)))
    codes = np.clip(np.rint(weight.astype(np.float64) / np.float64(scale)), -1, 1)
    return codes.astype(np.int8), scale


def oracle_activations(x: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Codes in float64, the float32 scale, and the distance of 127 x / amax to the nearest rounding tie."""
    amax = np.maximum(np.abs(x).max(axis=-1, keepdims=True), np.float32(EPSILON)).astype(np.float64)
    exact = 127.0 * x.astype(np.float64) / amax
    codes = np.clip(np.rint(exact), -128, 127).astype(np.int8)
    tie = np.abs(np.abs(exact - np.floor(exact)) - 0.5)
    return codes, (amax.astype(np.float32) / np.float32(127)), tie


CASES = {
    "ties": [[0.5, 1.5, -0.5, -1.5], [1.0, 1.0, -1.0, -1.0]],
    "ties_scale_3": [[1.5, 4.5, -1.5, 4.5], [3.0, 3.0, 3.0, 3.0]],
    "zeros": [[0.0, 0.0], [0.0, -0.0]],
    "one_outlier": [[1e-3] * 63 + [1e4]],
    "denormals": [[1e-40, -1e-42, 5e-41, 0.0]],
    "tiny_but_normal": [[1e-30, -3e-31]],
    "huge": [[3e38, -3e38, 1e38, 0.0]],
    "single": [[0.25]],
}


@pytest.mark.parametrize("name", CASES)
def test_ternarize_equals_oracle(name: str) -> None:
    weight = np.array(CASES[name], dtype=np.float32)
    codes, scale = ternarize(torch.from_numpy(weight))
    want_codes, want_scale = oracle_ternarize(weight)
    assert codes.dtype == torch.int8
    assert scale.dtype == torch.float32
    assert scale.item() == want_scale
    np.testing.assert_array_equal(codes.numpy(), want_codes)


def test_ternarize_ties_go_to_the_even_code() -> None:
    codes, scale = ternarize(torch.tensor([[1.0, -1.0, 3.0, -3.0]]))
    assert scale.item() == 2.0
    assert codes.tolist() == [[0, 0, 1, -1]]  # 1/2 -> 0, 3/2 -> 2 clipped to 1


@given(st.integers(0, 2**32 - 1), st.sampled_from(["normal", "lognormal", "grid"]), st.integers(1, 40))
@settings(max_examples=150, deadline=None)
def test_ternarize_equals_oracle_on_random_input(seed: int, kind: str, size: int) -> None:
    rng = np.random.default_rng(seed)
    if kind == "grid":  # many exact ties
        weight = rng.integers(-4, 5, (size, 7)).astype(np.float32) / 4
    else:
        weight = (
            rng.normal(size=(size, 7))
            * (np.exp(rng.normal(size=(size, 7)) * 3) if kind == "lognormal" else 1)
        ).astype(np.float32)
    codes, scale = ternarize(torch.from_numpy(weight))
    want_codes, want_scale = oracle_ternarize(weight)
    assert scale.item() == want_scale
    np.testing.assert_array_equal(codes.numpy(), want_codes)


@pytest.mark.parametrize("name", CASES)
def test_activations_equal_oracle(name: str) -> None:
    x = np.array(CASES[name], dtype=np.float32)
    if name == "huge":
        x = x / 256  # 127 x must stay finite in float32
    codes, scale = quantize_activations(torch.from_numpy(x))
    want_codes, want_scale, _ = oracle_activations(x)
    np.testing.assert_array_equal(codes.numpy(), want_codes)
    np.testing.assert_array_equal(scale.numpy(), want_scale)


@given(st.integers(0, 2**32 - 1), st.integers(1, 300))
@settings(max_examples=150, deadline=None)
def test_activations_equal_oracle_on_random_input(seed: int, size: int) -> None:
    x = np.random.default_rng(seed).normal(size=(3, size)).astype(np.float32)
    codes, _ = quantize_activations(torch.from_numpy(x))
    want, _, tie = oracle_activations(x)
    # two float32 roundings of relative size 2^-24 at a magnitude of at most 127
    clear = tie > 127 * 2.0**-23
    np.testing.assert_array_equal(codes.numpy()[clear], want[clear])
    assert np.abs(codes.numpy().astype(int) - want).max() <= 1


def test_activation_ties_are_exact_for_bfloat16_input() -> None:
    """bf16 values times 127 are exact in float32, so every tie is decided as in exact arithmetic."""
    x = torch.randn(64, 257, generator=torch.Generator().manual_seed(1)).bfloat16()
    codes, _ = quantize_activations(x)
    want, _, _ = oracle_activations(x.float().numpy())
    np.testing.assert_array_equal(codes.numpy(), want)


def test_activation_codes_use_the_whole_range() -> None:
    codes, scale = quantize_activations(torch.tensor([[-2.0, 2.0, 0.0], [0.0, 0.0, 0.0]]))
    assert codes.tolist() == [[-127, 127, 0], [0, 0, 0]]
    assert scale[0].item() == pytest.approx(2 / 127)
    assert scale[1].item() == pytest.approx(EPSILON / 127)


def test_bfloat16_input_is_quantized_in_float32() -> None:
    weight = torch.randn(33, 65, generator=torch.Generator().manual_seed(0)).bfloat16()
    codes, scale = ternarize(weight)
    want_codes, want_scale = oracle_ternarize(weight.float().numpy())
    assert scale.item() == want_scale
    np.testing.assert_array_equal(codes.numpy(), want_codes)


def test_requantizing_dequantized_weights_shrinks_the_scale() -> None:
    """Why codes and scale are exported once (docs/method.md, trap 1): codes survive, the scale does not."""
    weight = torch.randn(256, 256, generator=torch.Generator().manual_seed(0))
    codes, scale = ternarize(weight)
    again, shrunk = ternarize(codes * scale)
    assert torch.equal(codes, again)
    assert 0.6 < (shrunk / scale).item() < 0.72


def test_scale_does_not_depend_on_the_order_of_the_sum() -> None:
    weight = torch.randn(300, 700, generator=torch.Generator().manual_seed(3)) * torch.logspace(-6, 3, 700)
    shuffled = weight.flatten()[torch.randperm(weight.numel(), generator=torch.Generator().manual_seed(4))]
    assert ternarize(weight)[1].item() == ternarize(shuffled)[1].item()
