"""BitLinear: exact integers, straight-through gradients, equality with the packed layer."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from bitdistill.quant.linear import (
    MAX_IN_FEATURES,
    BitLinear,
    PackedBitLinear,
    SubLN,
    integer_matmul,
)
from bitdistill.quant.ternary import quantize_activations, ternarize


def make(i: int, o: int, *, bias: bool = False, subln: bool = False, seed: int = 0) -> BitLinear:
    torch.manual_seed(seed)
    layer = BitLinear.from_linear(nn.Linear(i, o, bias=bias), subln=subln)
    if layer.subln is not None:
        nn.init.uniform_(layer.subln.weight, 0.5, 2.0)
    return layer


def slow_forward(layer: BitLinear, x: Tensor) -> Tensor:
    """The straight-through expression in float64: the slow twin of forward and of both gradients."""
    x = x.double()
    if layer.subln is not None:
        x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + layer.subln.eps) * layer.subln.weight.double()
    codes, scale = ternarize(layer.weight)
    weight = layer.weight.double()
    weight = weight + ((codes * scale).double() - weight).detach()
    x_codes, x_scale = quantize_activations(x.float())
    x = x + ((x_codes.double() * x_scale.double()) - x).detach()
    y = x @ weight.t()
    return y if layer.bias is None else y + layer.bias.double()


@pytest.mark.parametrize(("n", "i", "o"), [(1, 1, 1), (3, 5, 7), (17, 33, 65), (64, 257, 40)])
def test_integer_matmul_is_exact(n: int, i: int, o: int) -> None:
    generator = torch.Generator().manual_seed(n)
    x = torch.randint(-128, 128, (n, i), generator=generator, dtype=torch.int8)
    w = torch.randint(-1, 2, (o, i), generator=generator, dtype=torch.int8)
    product = integer_matmul(x, w)
    assert product.dtype == torch.float32
    assert torch.equal(product.long(), x.long() @ w.long().t())


def test_integer_matmul_is_exact_at_saturation_and_under_autocast() -> None:
    x = torch.full((2, 100_003), -128, dtype=torch.int8)
    w = torch.ones(3, 100_003, dtype=torch.int8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        product = integer_matmul(x, w)
    assert product.unique().tolist() == [-128.0 * 100_003]


def test_integer_matmul_refuses_sums_that_could_round() -> None:
    x = torch.zeros(1, MAX_IN_FEATURES + 1, dtype=torch.int8)
    with pytest.raises(ValueError, match="in_features"):
        integer_matmul(x, x)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("subln", [False, True])
@pytest.mark.parametrize(("i", "o"), [(8, 8), (33, 17), (130, 65)])
def test_forward_and_gradients_equal_the_slow_twin(i: int, o: int, subln: bool, bias: bool) -> None:
    layer = make(i, o, bias=bias, subln=subln)
    x = torch.randn(2, 5, i, generator=torch.Generator().manual_seed(1), requires_grad=True)
    weights = torch.randn(2, 5, o, generator=torch.Generator().manual_seed(2))

    y = layer(x)
    (y * weights).sum().backward()
    got = [y.detach(), x.grad, *(p.grad for p in layer.parameters())]
    x.grad = None
    layer.zero_grad()
    y = slow_forward(layer, x)
    (y * weights).sum().backward()
    want = [y.detach(), x.grad, *(p.grad for p in layer.parameters())]
    for a, b in zip(got, want, strict=True):
        assert a is not None
        assert b is not None
        torch.testing.assert_close(a.double(), b.double(), rtol=2e-5, atol=2e-5)


def test_blended_at_one_equals_the_integer_path() -> None:
    layer = make(48, 24, bias=True, subln=True)
    x = torch.randn(7, 48, generator=torch.Generator().manual_seed(1))
    assert layer.subln is not None
    torch.testing.assert_close(layer._forward_blended(layer.subln(x)), layer(x), rtol=1e-5, atol=1e-5)


def test_blend_zero_keeps_the_latents() -> None:
    layer = make(48, 24)
    layer.ternary_blend = 0.0
    layer.quantize_activations = False
    x = torch.randn(7, 48)
    torch.testing.assert_close(layer(x), nn.functional.linear(x, layer.weight))


def test_quantization_off_is_a_plain_linear_layer() -> None:
    torch.manual_seed(0)
    linear = nn.Linear(24, 12)
    layer = BitLinear.from_linear(linear, subln=False)
    layer.quantize_weights = False
    x = torch.randn(3, 24)
    assert torch.equal(layer(x), linear(x))


@pytest.mark.parametrize("quantize_activations", [True, False])
@pytest.mark.parametrize(("i", "o"), [(1, 3), (33, 17), (64, 64)])
def test_packed_layer_is_bit_identical(i: int, o: int, quantize_activations: bool) -> None:
    layer = make(i, o, bias=True, subln=True)
    layer.quantize_activations = quantize_activations
    packed = PackedBitLinear.from_bitlinear(layer)
    x = torch.randn(4, 6, i, generator=torch.Generator().manual_seed(1))
    if quantize_activations:
        assert torch.equal(packed(x), layer(x))
    else:
        torch.testing.assert_close(packed(x), layer(x), rtol=1e-5, atol=1e-6)


def test_bfloat16_autocast_keeps_the_integers_exact() -> None:
    layer = make(300, 40)
    x = torch.randn(9, 300, generator=torch.Generator().manual_seed(1))
    plain = layer(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = layer(x)
    assert cast.dtype == torch.bfloat16
    assert torch.equal(cast, plain.bfloat16())


def test_subln_normalises_in_float32() -> None:
    norm = SubLN(16)
    nn.init.uniform_(norm.weight, 0.5, 2.0)
    x = torch.randn(5, 16).bfloat16()
    y = norm(x)
    assert y.dtype == torch.float32
    want = x.double() / (x.double().square().mean(-1, keepdim=True) + 1e-6).sqrt() * norm.weight.double()
    torch.testing.assert_close(y.double(), want, rtol=1e-6, atol=1e-6)


def test_from_linear_does_not_share_weights() -> None:
    linear = nn.Linear(4, 4)
    layer = BitLinear.from_linear(linear, subln=False)
    with torch.no_grad():
        layer.weight.add_(1.0)
    assert not torch.equal(layer.weight, linear.weight)


def test_casting_a_packed_layer_keeps_codes_and_scale() -> None:
    packed = PackedBitLinear.from_bitlinear(make(24, 8, subln=True))
    codes, scale = packed.codes.clone(), packed.scale.clone()
    packed.to(torch.bfloat16)
    assert packed.scale.dtype == torch.float32
    assert torch.equal(packed.scale, scale)
    assert torch.equal(packed.codes, codes)
