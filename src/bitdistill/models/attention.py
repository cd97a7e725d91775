"""Causal attention without mask tensors, for training on full or right-padded rows.

transformers makes its mask outside the layers and, to find packed rows, reads position ids back to the host in
every forward pass. Rows here are full or padded on the right, so causality is all the masking there is: this
attention asks sdpa for it directly and cuts the window of sliding layers itself. No mask is made and nothing is
read back, which also lets a whole step be captured in a CUDA graph.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from bitdistill.errors import ModelError

CAUSAL_NAME = "bitdistill_causal"
"""Registered as an attention, not as a mask: transformers makes no mask for a name it has no mask for."""


def causal_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """sdpa over [B, H, T, D] queries; position t sees t - sliding_window + 1 to t, or 0 to t without a window."""
    tokens = query.shape[2]
    if sliding_window is not None and tokens > sliding_window:
        position = torch.arange(tokens, device=query.device)
        distance = position[:, None] - position[None, :]
        attention_mask = ((distance >= 0) & (distance < sliding_window))[None, None]
    result: tuple[Tensor, Tensor | None] = sdpa_attention_forward(
        module, query, key, value, attention_mask, **kwargs
    )
    return result


ALL_ATTENTION_FUNCTIONS.register(CAUSAL_NAME, causal_attention)


@contextlib.contextmanager
def causal_only(*models: Any) -> Iterator[None]:
    """Inside, the models attend by `causal_attention`: for forward passes without cache on right-padded rows.

    Raises:
        ModelError: a model uses another attention implementation than sdpa.
    """
    for model in models:
        if model.config._attn_implementation != "sdpa":
            raise ModelError(
                f"attention implementation is {model.config._attn_implementation!r}; training needs sdpa"
            )
    try:
        for model in models:
            model.config._attn_implementation = CAUSAL_NAME
        yield
    finally:
        for model in models:
            model.config._attn_implementation = "sdpa"
