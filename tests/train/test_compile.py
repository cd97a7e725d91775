"""Regional compilation: what it must not leave to inductor."""

from __future__ import annotations

import pytest
import torch
import torch._inductor.config
import torch.nn.functional as F
from torch import Tensor

from bitdistill.train.compile import compile_blocks, compiled


class _Model(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.model = torch.nn.Module()
        self.model.layers = torch.nn.ModuleList([torch.nn.Linear(4, 4)])


@pytest.mark.parametrize("call", [lambda: compile_blocks(_Model()), lambda: compiled(torch.sin, True)])
def test_what_is_compiled_has_no_mix_order_reductions(call, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[no-untyped-def]
    settings = torch._inductor.config.triton
    if not hasattr(settings, "mix_order_reduction"):
        pytest.skip(f"torch {torch.__version__} has none")
    monkeypatch.setattr(settings, "mix_order_reduction", True)
    call()
    assert settings.mix_order_reduction is False


def test_a_function_that_is_not_compiled_is_itself() -> None:
    assert compiled(torch.sin, False) is torch.sin


@pytest.mark.gpu
def test_gradients_side_by_side_are_written_at_16k_tokens_and_more() -> None:
    """The case of pytorch/pytorch#193061: scales and shifts of two norms, all parts of one parameter."""
    size, generator = 1024, torch.Generator("cuda").manual_seed(0)

    def chained(x: Tensor, table: Tensor) -> Tensor:
        for shift, scale in table.chunk(4, dim=1)[:2], table.chunk(4, dim=1)[2:]:
            x = x + F.layer_norm(x, (size,)) * (1 + scale) + shift
        return x

    x = torch.randn(1, 32768, size, device="cuda", generator=generator)
    weight = torch.randn(x.shape, device="cuda", generator=generator)
    grads = []
    for function in (chained, compiled(chained, True)):
        table = torch.zeros(1, 4, size, device="cuda", requires_grad=True)
        (function(x, table) * weight).sum().backward()
        assert table.grad is not None
        grads.append(table.grad)
    assert float((grads[1] - grads[0]).norm() / grads[0].norm()) < 1e-4
