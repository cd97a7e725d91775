"""RMS norms of the supported families as numbers: gain, epsilon and what is added to the gain."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from bitdistill.quant.linear import SubLN

_NO_NORM = (None, 0.0, 0.0)


def norm_arguments(norm: nn.Module | None) -> tuple[Tensor | None, float, float]:
    """Gain, epsilon and what is added to the gain."""
    if norm is None:
        return _NO_NORM
    if isinstance(norm, SubLN):
        return norm.weight, norm.eps, 0.0
    eps = getattr(norm, "variance_epsilon", None)
    if eps is not None:
        return norm.weight, float(eps), 0.0  # type: ignore[return-value]
    return norm.weight, float(norm.eps), 1.0  # type: ignore[return-value, arg-type]  # Gemma: 1 + gain


def gains_after_blocks(model: Any) -> list[Tensor]:
    """float32 [H] for every block: the gain of the norm that its output meets next, the next block's or the last."""
    blocks = list(model.get_submodule("model.layers").children())
    norms = [*(block.input_layernorm for block in blocks[1:]), model.get_submodule("model.norm")]
    found = []
    for norm in norms:
        gain, _, offset = norm_arguments(norm)
        assert gain is not None
        found.append(gain.detach().float() + offset)
    return found
