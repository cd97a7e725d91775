"""Q, K and V states of chosen layers, as attention-relation distillation takes them (paper, Eq. 12).

States are recorded where transformers hands them to the attention function: after q/k-norm and RoPE, before
key and value heads are repeated for grouped queries. Only the chosen layers' attention modules see another
configuration object (a shallow copy with another attention name), so all other layers, compiled or not, run
exactly as before; the attention mask is still made for sdpa.

Shape legend: B batch, H query heads, G key/value heads, T tokens, D head size.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor, nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from bitdistill.errors import ModelError
from bitdistill.models.attention import CAUSAL_NAME, causal_attention, in_compute_dtype

FUNCTIONS = {"sdpa": sdpa_attention_forward, CAUSAL_NAME: causal_attention}
ATTENTION_NAME = "bitdistill_capture"
_SINK = "_bitdistill_capture_sink"

States = dict[int, tuple[Tensor, Tensor, Tensor]]


def _capturing_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, Tensor | None]:
    """The model's own attention (sdpa, or `attention.causal_attention`), which also records its inputs."""
    states, layer, attention_function = getattr(module, _SINK)
    # Relations of float32 states are products apart from the tensor cores: a quarter of a step of Gemma (docs/log.md,
    # run 27)
    query, key, value = in_compute_dtype(query, key, value)
    states[layer] = (query, key, value)
    result: tuple[Tensor, Tensor | None] = attention_function(
        module, query, key, value, attention_mask, **kwargs
    )
    return result


ALL_ATTENTION_FUNCTIONS.register(ATTENTION_NAME, _capturing_attention)
# Used when a mask is made from a captured layer's own configuration: the same mask as for sdpa.
ALL_MASK_ATTENTION_FUNCTIONS.register(ATTENTION_NAME, sdpa_mask)


@contextlib.contextmanager
def capture_states(model: Any, layers: Sequence[int]) -> Iterator[States]:
    """Record the attention inputs of some layers during forward passes inside the `with` block.

    Args:
        model: a transformers causal language model with sdpa attention.
        layers: layer indices; negative ones count from the end.

    Yields:
        A dict that each forward fills: `states[layer] = (q_BHTD, k_BGTD, v_BGTD)`, keyed by the indices as
        given, in the model's compute dtype (bfloat16 under autocast), with gradient if the forward has one. A second
        forward overwrites it. The model is restored on exit; the dict stays valid.

    Raises:
        ModelError: a layer that the model does not have, or another attention implementation than sdpa.
    """
    states: States = {}
    attentions = _attentions(model, layers)
    plain = [attention.config for attention in attentions.values()]
    try:
        for layer, attention in attentions.items():
            setattr(attention, _SINK, (states, layer, FUNCTIONS[attention.config._attn_implementation]))
            attention.config = _with_attention(attention.config)
        yield states
    finally:
        for attention, config in zip(attentions.values(), plain, strict=True):
            attention.config = config
            if hasattr(attention, _SINK):
                delattr(attention, _SINK)


def _attentions(model: Any, layers: Sequence[int]) -> dict[int, Any]:
    """The attention module of each requested layer."""
    blocks = list(model.get_submodule("model.layers").children())
    implementation = model.config._attn_implementation
    if implementation not in FUNCTIONS:
        raise ModelError(
            f"attention implementation is {implementation!r}; states are captured with sdpa only"
        )
    found: dict[int, Any] = {}
    for layer in layers:
        if not -len(blocks) <= layer < len(blocks):
            raise ModelError(
                f"layer {layer}: the model has layers 0 to {len(blocks) - 1} (or -{len(blocks)} to -1); "
                "set distill.relation.layer accordingly"
            )
        attention = blocks[layer].self_attn
        if any(attention is other for other in found.values()):
            raise ModelError(f"layer {layer} is named twice in {list(layers)}; name each layer once")
        found[layer] = attention
    return found


def _with_attention(config: Any) -> Any:
    """A shallow copy of a configuration that names the capturing attention."""
    copied = copy.copy(config)
    copied._attn_implementation = ATTENTION_NAME
    if config._attn_implementation == ATTENTION_NAME:
        raise ModelError("a shallow copy of the configuration shares its attention name; report this")
    return copied
