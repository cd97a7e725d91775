"""Triton kernels of the blocks against their twins: same codes and scales, gradients within rounding."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="triton is not installed")

from bitdistill.kernels import matmul, norm_quantize, stack, twins, weights
from bitdistill.quant.ternary import quantize_activations, ternarize

from .conftest import DEVICE

SHAPES = [(1, 1), (3, 5), (7, 64), (5, 130), (9, 576), (4, 1000), (3, 1536)]


def randn(*shape: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale).to(DEVICE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("n", "i"), SHAPES)
def test_codes_and_scales_without_norm_are_the_reference_exactly(n: int, i: int, dtype: torch.dtype) -> None:
    x = randn(n, i, scale=30.0).to(dtype)
    codes, scale, rrms = norm_quantize.norm_quantize(x, None, 0.0, 0.0, "none")
    want_codes, want_scale = quantize_activations(x)
    assert torch.equal(codes, want_codes)
    assert torch.equal(scale, want_scale[:, 0])
    assert rrms.abs().max() == 0


def test_ties_zeros_tiny_values_and_strides_are_the_reference_exactly() -> None:
    steps = torch.arange(-254, 255, device=DEVICE) / 2.0  # every tie of an amax of 127
    rows = [steps, torch.zeros_like(steps), steps * 1e-9, steps * 1e30, steps.flip(0) - 0.0]
    x = torch.stack(rows)
    wide = torch.cat([torch.full_like(x, 7.0), x, x], dim=1)[:, 509:1018]
    for value in (x, wide):
        codes, scale, _ = norm_quantize.norm_quantize(value, None, 0.0, 0.0, "none")
        want_codes, want_scale = quantize_activations(x)
        assert torch.equal(codes, want_codes)
        assert torch.equal(scale, want_scale[:, 0])


def fma(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """float32 fma with one rounding: the product is exact in float64, and its sum with c in long double."""
    exact = a.astype(np.float64) * b.astype(np.float64)
    return (exact.astype(np.longdouble) + c.astype(np.longdouble)).astype(np.float32)


def corrected_quotient(p: np.ndarray, amax: np.ndarray) -> np.ndarray:
    """`norm_quantize._codes` on a GPU, up to the rounding to an integer."""
    inverse = np.float32(1.0) / amax
    q = p * inverse
    for _ in range(2):
        q = fma(fma(-q, amax, p), inverse, q)
    return q


@pytest.mark.skipif(np.finfo(np.longdouble).nmant < 63, reason="needs a long double of 64 bits or more")
def test_the_corrected_quotient_is_the_ieee_one() -> None:
    """The interpreter's fma rounds twice, so kernels divide there, and this is the check without a GPU."""
    rng = np.random.default_rng(0)
    count = 2_000_000
    amax = rng.uniform(1, 2, count).astype(np.float32)
    amax[: count // 4] = np.nextafter(np.float32(2), np.float32(1)) - rng.integers(
        0, 99, count // 4
    ) * np.float32(2**-23)
    amax = np.ldexp(amax, rng.integers(-16, 90, count)).astype(np.float32)
    y = (amax * rng.uniform(-1, 1, count)).astype(np.float32)
    # Half of them beside the borders between two codes
    border = (rng.integers(-254, 255, count // 2) / 2 / 127 * amax[: count // 2]).astype(np.float32)
    y[: count // 2] = border + np.spacing(border) * rng.integers(-3, 4, count // 2)
    y = np.clip(y, -amax, amax)
    p = y * np.float32(127)
    got, want = corrected_quotient(p, amax), p / amax
    usual = np.abs(p) > 1e-30  # below, remainders underflow
    assert usual.mean() > 0.99
    assert np.array_equal(got[usual], want[usual])
    assert np.array_equal(np.rint(got), np.rint(want))
    # Ties of every code, whatever amax
    ties = np.arange(-254, 255, dtype=np.float32) / 2
    for scale in (127, 127e-7, 127e20, 1.27 * np.pi):
        p = ties * np.float32(scale)
        assert np.array_equal(corrected_quotient(p, np.float32([scale])), p / np.float32(scale))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_rows_that_are_not_finite_get_scales_that_are_not(bad: float) -> None:
    x = randn(3, 20)
    x[1, 4] = bad
    _, scale, _ = norm_quantize.norm_quantize(x, None, 0.0, 0.0, "none")
    assert scale.isfinite().tolist() == [True, False, True]
    _, scale, _ = norm_quantize.norm_quantize(x, torch.ones(20, device=DEVICE), 1e-6, 0.0, "none")
    assert scale.isfinite().tolist() == [True, False, True]


@pytest.mark.parametrize("offset", [0.0, 1.0])
@pytest.mark.parametrize(("n", "i"), SHAPES)
def test_norm_then_codes_are_exact_given_the_root_mean_square(n: int, i: int, offset: float) -> None:
    x, gain = randn(n, i, scale=3.0), randn(i, seed=1).abs() + 0.3
    codes, scale, rrms = norm_quantize.norm_quantize(x, gain, 1e-5, offset, "none")
    want = twins.norm_quantize(x, gain, 1e-5, offset, "none")
    torch.testing.assert_close(rrms, want[2], rtol=3e-7, atol=0)
    # The sum of squares may be added up in another order; given its result, everything is exact.
    want_codes, want_scale = quantize_activations(x * rrms[:, None] * (gain + offset))
    assert torch.equal(codes, want_codes)
    assert torch.equal(scale, want_scale[:, 0])


@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
@pytest.mark.parametrize(("n", "i"), SHAPES)
def test_gate_norm_codes_agree_with_the_twin(n: int, i: int, activation: str) -> None:
    x, gain = randn(n, 2 * i, scale=2.0), randn(i, seed=1).abs() + 0.3
    codes, scale, rrms = norm_quantize.norm_quantize(x, gain, 1e-5, 0.0, activation)
    want_codes, want_scale, want_rrms = twins.norm_quantize(x, gain, 1e-5, 0.0, activation)
    torch.testing.assert_close(rrms, want_rrms, rtol=1e-5, atol=0)
    torch.testing.assert_close(scale, want_scale, rtol=1e-5, atol=0)
    # exp differs in its last bits, so a value beside a rounding border may take the next code
    apart = (codes.int() - want_codes.int()).abs()
    assert apart.max() <= 1
    assert apart.sum() <= max(1, apart.numel() // 500)


def straight_through(
    x: Tensor, gain: Tensor | None, offset: float, activation: str, grad: Tensor
) -> list[Tensor]:
    """Gradients of x (and gain) by autograd in float64, quantizer left out."""
    leaves = [x.double().requires_grad_()] + ([] if gain is None else [gain.double().requires_grad_()])
    h = leaves[0]
    if activation != "none":
        gate, up = h.chunk(2, dim=-1)
        kinds = {
            "silu": torch.nn.functional.silu,
            "gelu_tanh": lambda g: torch.nn.functional.gelu(g, approximate="tanh"),
        }
        h = kinds[activation](gate) * up
    if gain is not None:
        h = h * torch.rsqrt(h.square().mean(-1, keepdim=True) + 1e-5) * (leaves[1] + offset)
    return list(torch.autograd.grad(h, leaves, grad.double()))


@pytest.mark.parametrize("twin", [False, True])
@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("activation", ["none", "silu", "gelu_tanh"])
@pytest.mark.parametrize(("n", "i"), [*SHAPES, (5, 4100), (5, 12300)])
def test_backward_equals_autograd_in_float64(n: int, i: int, activation: str, norm: bool, twin: bool) -> None:
    module = twins if twin else norm_quantize
    x = randn(n, i if activation == "none" else 2 * i)
    gain = randn(i, seed=1).abs() + 0.3 if norm else None
    grad, grad_scale = randn(n, i, seed=2), torch.tensor(0.7, device=DEVICE)
    out_scale = torch.tensor([0.5, 3.0], device=DEVICE).repeat_interleave(i)
    codes, scale, rrms = module.norm_quantize(x, gain, 1e-5, 1.0, activation)
    got = module.norm_quantize_backward(
        grad, grad_scale, x, gain, rrms, codes, scale, out_scale, 1.0, activation
    )
    want = straight_through(x, gain, 1.0, activation, grad * 0.7)
    if activation != "none":
        want[0] = torch.cat([h * s for h, s in zip(want[0].chunk(2, -1), (0.5, 3.0), strict=True)], -1)
    torch.testing.assert_close(got[0].double(), want[0], rtol=1e-4, atol=2e-5)
    gain_grad = module.sum_rows([got[1]]).double()
    torch.testing.assert_close(
        gain_grad, want[1] if norm else torch.zeros_like(gain_grad), rtol=1e-4, atol=1e-4
    )
    assert torch.equal(got[2], codes * scale[:, None])


@pytest.mark.parametrize("tile", [matmul.INT_MM, *range(len(matmul.TILES))])
@pytest.mark.parametrize(("n", "o", "i"), [(1, 1, 1), (17, 33, 65), (130, 70, 200), (3, 300, 128)])
def test_product_equals_the_reference_bit_for_bit(n: int, o: int, i: int, tile: int) -> None:
    generator = torch.Generator().manual_seed(n + o)
    x = torch.randint(-128, 128, (n, i), generator=generator, dtype=torch.int8).to(DEVICE)
    w = torch.randint(-1, 2, (o, i), generator=generator, dtype=torch.int8).to(DEVICE)
    x_scale, w_scale = randn(n).abs() + 0.01, randn(o, seed=1).abs() + 0.01
    y = torch.empty(n, o, device=DEVICE)
    matmul._product(y, x, x_scale, w, w_scale, tile)
    assert torch.equal(y, twins.int8_product(x, x_scale, w, w_scale, torch.float32))


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize(("n", "i"), [*SHAPES, (5, 12300)])
def test_a_gradient_without_a_scale_is_the_one_of_scale_one(n: int, i: int, norm: bool) -> None:
    x, grad = randn(n, i), randn(n, i, seed=2)
    gain = randn(i, seed=1).abs() + 0.3 if norm else None
    codes, scale, rrms = norm_quantize.norm_quantize(x, gain, 1e-5, 1.0, "none")
    rest = (x, gain, rrms, codes, scale, torch.ones(2 * i, device=DEVICE), 1.0, "none")
    got = norm_quantize.norm_quantize_backward(grad, None, *rest)
    want = norm_quantize.norm_quantize_backward(grad, torch.ones(1, device=DEVICE), *rest)
    for value, other in zip(got, want, strict=True):
        torch.testing.assert_close(value, other, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    "shapes", [[(1, 1)], [(5, 130)], [(300, 17), (1, 64)], [(264, 40), (528, 33), (7, 3)]]
)
def test_partial_sums_of_several_gains_are_added_up(shapes: list[tuple[int, int]]) -> None:
    parts = [randn(*shape, seed=k) for k, shape in enumerate(shapes)]
    got = norm_quantize.sum_rows(parts)
    assert got.shape == (sum(columns for _, columns in shapes),)
    torch.testing.assert_close(got, twins.sum_rows(parts), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("columns", [24, 576, 4100, 12300])
@pytest.mark.parametrize("activation", ["none", "silu"])
def test_the_number_of_partial_sums_is_known_before_the_rows_are(columns: int, activation: str) -> None:
    x = randn(3, columns if activation == "none" else 2 * columns)
    gain = torch.ones(columns, device=DEVICE)
    codes, scale, rrms = norm_quantize.norm_quantize(x, gain, 1e-5, 0.0, activation)
    out_scale = torch.ones(2 * columns, device=DEVICE)
    grad = randn(3, columns)
    got = norm_quantize.norm_quantize_backward(
        grad, None, x, gain, rrms, codes, scale, out_scale, 0.0, activation
    )
    assert got[1].shape == (norm_quantize.programs_of(columns, activation, DEVICE), columns)
    assert not got[1].isnan().any()


def test_product_at_saturation_is_exact() -> None:
    x = torch.full((2, 20_001), -128, dtype=torch.int8, device=DEVICE)
    w = torch.ones(3, 20_001, dtype=torch.int8, device=DEVICE)
    y = matmul.int8_product(x, torch.ones(2, device=DEVICE), w, torch.ones(3, device=DEVICE), torch.float32)
    assert y.unique().tolist() == [-128.0 * 20_001]


def test_weights_of_many_matrices_are_the_reference_exactly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights, "PARTS", 4)
    shapes = [(1, 1), (5, 7), (33, 65), (3, 1024), (70, 40)]
    matrices = [randn(*shape, seed=k) * 10.0 ** (-2 * k) for k, shape in enumerate(shapes)]
    matrices[2][3] = 0.0
    half = matrices[4].abs().mean(dtype=torch.float64).float() * 0.5
    matrices.append(torch.zeros(4, 4, device=DEVICE))  # the scale's lower bound
    tie = torch.tensor([[2.0, 1.0, -1.0, 0.0, 1.0, 1.0]], device=DEVICE)  # mean 1: codes at +-0.5 and above
    tie[0, 1:3] = torch.tensor([0.5, -0.5])
    tie[0, 0] = 3.0
    matrices.append(tie)
    assert half > 0
    tensors = [
        (w, torch.empty(w.shape, dtype=torch.int8, device=DEVICE), torch.empty(w.shape[0], device=DEVICE))
        for w in matrices
    ]
    table = weights.TernaryTable.of(tensors)
    for _ in range(2):
        weights.ternarize_all(table)
        for weight, codes, scales in tensors:
            want_codes, want_scale = ternarize(weight)
            assert torch.equal(codes, want_codes)
            assert torch.equal(scales, want_scale.expand_as(scales))
        matrices[1].mul_(-1.7)  # in place, as an optimizer does
    assert table.fits(tensors)
    assert not table.fits([*tensors[:-1], (tie.clone(), *tensors[-1][1:])])


def test_table_refuses_what_the_kernels_cannot_read() -> None:
    weight = randn(4, 4)
    codes = torch.empty(4, 4, dtype=torch.int8, device=DEVICE)
    with pytest.raises(ValueError, match="float32"):
        weights.TernaryTable.of([(weight.bfloat16(), codes, torch.empty(4, device=DEVICE))])


@pytest.mark.parametrize("sizes", [(1, 1), (5, 130), (64, 300, 7), (576, 192, 192)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_stacked_gradients_equal_the_twin(sizes: tuple[int, ...], dtype: torch.dtype) -> None:
    parts = [randn(7, size, seed=n).to(dtype) for n, size in enumerate(sizes)]
    parts[0] = torch.cat([parts[0]] * 2, dim=1)[:, : sizes[0]]  # not contiguous
    scale = torch.cat([torch.full((size,), 0.3 + n, device=DEVICE) for n, size in enumerate(sizes)])
    got, want = stack.stack_scaled(parts, scale), twins.stack_scaled(parts, scale)
    if DEVICE.type == "cuda" or dtype == torch.float32:
        assert torch.equal(got, want)
    else:  # the interpreter cuts bfloat16 off instead of rounding
        torch.testing.assert_close(got, want, rtol=2**-7, atol=0)
