"""Our batched Muon against torch's, matrix by matrix."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from bitdistill.train import muon
from bitdistill.train.muon import Muon, orthogonalize

SHAPES = [(6, 10), (6, 10), (10, 6), (8, 8), (6, 10), (1, 7)]


def parameters() -> list[nn.Parameter]:
    torch.manual_seed(0)
    return [nn.Parameter(torch.randn(s)) for s in SHAPES]


@pytest.mark.parametrize("batch_elements", [2**28, 64])  # all at once; one or two matrices at a time
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_equals_torchs_muon(
    weight_decay: float, batch_elements: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(muon, "MAX_BATCH_ELEMENTS", batch_elements)
    own, reference = parameters(), parameters()
    ours = Muon(own, learning_rate=0.01, weight_decay=weight_decay, momentum=0.95)
    torchs = torch.optim.Muon(
        reference, lr=0.01, weight_decay=weight_decay, momentum=0.95, adjust_lr_fn="match_rms_adamw"
    )
    rng = torch.Generator().manual_seed(1)
    for _ in range(5):
        for a, b in zip(own, reference, strict=True):
            a.grad = torch.randn(a.shape, generator=rng)
            b.grad = a.grad.clone()
        ours.step()
        torchs.step()
    for start, a, b in zip(parameters(), own, reference, strict=True):
        # bfloat16 products: the updates agree to a few per cent of their size
        size = (b - start).abs().mean()
        assert (a - b).abs().max() < 0.1 * size
        assert (a - start).abs().mean() > 0.5 * size


def test_singular_values_are_near_one() -> None:
    torch.manual_seed(0)
    for shape in ((4, 30, 50), (4, 50, 30)):
        values = torch.linalg.svdvals(orthogonalize(torch.randn(shape)).float())
        assert values.min() > 0.6
        assert values.max() < 1.3


def test_vectors_are_refused_and_missing_gradients_skipped() -> None:
    with pytest.raises(ValueError, match="no matrix"):
        Muon([nn.Parameter(torch.zeros(3))], learning_rate=1.0, weight_decay=0.0, momentum=0.9)
    held = nn.Parameter(torch.ones(3, 4))
    Muon([held], learning_rate=1.0, weight_decay=0.5, momentum=0.9).step()
    assert torch.equal(held, torch.ones(3, 4))
