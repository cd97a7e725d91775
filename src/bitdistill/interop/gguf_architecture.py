"""Which llama.cpp architecture computes a student, if any does; no torch.

    llama, qwen2, qwen3, gemma3   students without SubLN
    bitnet                        SiLU, sub-norms where the paper puts SubLN, head tied, no biases: Llama students
    bitnet-b1.58                  the same with squared ReLU; in bitnet.cpp only

`llama` wants the two rotary halves of each head's q and k rows interleaved, the others take them as they are.
`bitnet` multiplies each product by a `scale` tensor, so there the scale stays float32; `qwen2` and `gemma3` ignore
such tensors in part of their layers, so for all other architectures the scale is the blocks' own.
What fits nowhere is refused: a file that loads and computes something else is worse than none.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from bitdistill.errors import ModelError
from bitdistill.models.families import FAMILIES, Layout, layout_of
from bitdistill.models.surgery import SurgeryPlan


@dataclass(frozen=True)
class Architecture:
    """An architecture of llama.cpp and how it wants its tensors."""

    name: str
    interleaved: bool = False
    """q and k rows with the two rotary halves of a head interleaved."""
    scale_tensors: bool = False
    """One float32 `scale` tensor a linear."""
    norm_offset: float = 0.0
    """Added to norm weights."""


_PLAIN = {
    "llama": Architecture("llama", interleaved=True),
    "qwen2": Architecture("qwen2"),
    "qwen3": Architecture("qwen3"),
    "gemma3_text": Architecture("gemma3", norm_offset=1.0),
}
_ACTIVATIONS = {"gemma3_text": "gelu_pytorch_tanh"}
# Kinds of linear whose bias an architecture adds.
_BIASES: dict[str, frozenset[str]] = {
    "llama": frozenset({"q", "k", "v", "o", "gate", "up", "down"}),
    "qwen2": frozenset({"q", "k", "v"}),
}


def architecture_of(config: Mapping[str, Any], plan: SurgeryPlan, weights: str, where: str) -> Architecture:
    """The architecture that computes a student exactly as `config` and `plan` say.

    Args:
        config: the dict of config.json.
        weights: type of the ternary tensors (i2_s is read by bitnet.cpp only).
        where: for messages.

    Raises:
        ModelError: none does; the message says why.
    """

    def refuse(why: str) -> ModelError:
        return ModelError(
            f"{where}: {why}; llama.cpp has no architecture for it (format packed keeps it whole)"
        )

    layout = layout_of(config, where)
    family = layout.family
    if not plan.quantize_activations:
        raise refuse(
            "a weights-only student, and llama.cpp always quantizes activations beside ternary weights"
        )
    subs = plan.subln == "paper" or FAMILIES[family].sub_norms
    if plan.subln == "every_linear":
        raise refuse("SubLN before every linear")
    if subs:
        return _with_sub_norms(layout, plan, weights, refuse)
    if layout.activation != _ACTIVATIONS.get(family, "silu"):
        raise refuse(f"{family} with activation {layout.activation}")
    target = _PLAIN[family]
    if extra := sorted(
        {s.kind for s in plan.replace.values() if s.bias} - _BIASES.get(target.name, frozenset())
    ):
        raise refuse(f"{family} with biases on {', '.join(extra)}")
    if family == "qwen2" and layout.heads * layout.head_dim != layout.hidden:
        raise refuse(f"qwen2 with {layout.heads} heads of {layout.head_dim} on hidden size {layout.hidden}")
    if family == "gemma3_text":
        _check_gemma(config, layout, refuse)
    elif "sliding_attention" in layout.layer_types:
        raise refuse(f"{family} with sliding windows")
    return target


def _with_sub_norms(layout: Layout, plan: SurgeryPlan, weights: str, refuse: Any) -> Architecture:
    family, width = layout.family, layout.heads * layout.head_dim
    if family not in ("llama", "bitnet"):
        raise refuse(
            f"{family} with SubLN (its sub-norms go with no {'q/k-norms' if family != 'qwen2' else 'biases'})"
        )
    if any(spec.bias for spec in plan.replace.values()):
        raise refuse(f"{family} with SubLN and biases")
    if width != layout.hidden:
        raise refuse(f"SubLN with heads {width} wide on hidden size {layout.hidden}")
    if not layout.tied:
        raise refuse(
            "SubLN and an output head of its own (the bitnet architecture takes the embedding as head)"
        )
    if layout.activation == "silu":
        return Architecture("bitnet", scale_tensors=weights != "i2_s")
    if layout.activation == "relu2" and weights == "i2_s":
        return Architecture("bitnet-b1.58")
    if layout.activation == "relu2":
        raise refuse("squared ReLU is computed by bitnet.cpp only: set export.gguf.weights to i2_s")
    raise refuse(f"SubLN with activation {layout.activation}")


def _check_gemma(config: Mapping[str, Any], layout: Layout, refuse: Any) -> None:
    scalar = config.get("query_pre_attn_scalar", 256)
    # llama.cpp takes the head size, but hidden / heads for the 27B model, which it knows by its 62 layers.
    expected = layout.hidden // layout.heads if layout.layers == 62 else layout.head_dim
    if scalar != expected:
        raise refuse(f"gemma3 with query_pre_attn_scalar {scalar} instead of {expected}")


def sliding_pattern(layout: Layout) -> list[bool] | None:
    """Which layers have a window; None: every layer but each sixth, which is llama.cpp's default."""
    found = [kind == "sliding_attention" for kind in layout.layer_types]
    return None if found == [(i + 1) % 6 != 0 for i in range(len(found))] else found


def rope(config: Mapping[str, Any], target: Architecture, head_dim: int, where: str) -> dict[str, Any]:
    """Rotary settings: `theta`, `theta_local` (gemma3), `factor` (linear), `factors` (one a frequency).

    Raises:
        ModelError: a scaling that llama.cpp does not compute for this architecture.
    """
    parameters = config.get("rope_parameters") or config.get("rope_scaling") or {}
    by_layer = {k: v for k, v in parameters.items() if isinstance(v, Mapping)}
    full = by_layer.get("full_attention", {} if by_layer else parameters)
    local = by_layer.get("sliding_attention", {})
    theta = (
        full.get("rope_theta")
        or config.get("rope_theta")
        or FAMILIES[config["model_type"]].defaults["rope_theta"]
    )
    found: dict[str, Any] = {"theta": float(theta)}
    if target.name == "gemma3":
        found["theta_local"] = float(
            local.get("rope_theta") or config.get("rope_local_base_freq") or 10_000.0
        )
    kind = full.get("rope_type") or full.get("type") or "default"
    plain_local = (local.get("rope_type") or "default") == "default"
    if full.get("partial_rotary_factor", 1.0) != 1.0 or not plain_local:
        raise ModelError(f"{where}: rotary positions on part of a head; llama.cpp export has no form for it")
    if kind == "linear" and target.name != "gemma3":
        found["factor"] = float(full["factor"])
    elif kind == "llama3" and target.name == "llama":
        found["factors"] = _llama3_factors(full, float(theta), head_dim)
    elif kind != "default":
        raise ModelError(f"{where}: rope_type {kind!r}; llama.cpp's {target.name} cannot hold it")
    return found


def _llama3_factors(rope: Mapping[str, Any], theta: float, head_dim: int) -> list[float]:
    """What llama.cpp divides each frequency by: 1 for short wavelengths, `factor` for long, between them a blend."""
    low, high = float(rope["low_freq_factor"]), float(rope["high_freq_factor"])
    factor, context = float(rope["factor"]), float(rope["original_max_position_embeddings"])
    factors = []
    for i in range(0, head_dim, 2):
        turns = context / (2 * math.pi * theta ** (i / head_dim))
        if turns > high:
            factors.append(1.0)
        elif turns < low:
            factors.append(factor)
        else:
            blend = (turns - low) / (high - low)
            factors.append(1.0 / ((1.0 - blend) / factor + blend))
    return factors
