"""Forward passes that stop before the output head, so that logits are made only where they count."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


def final_hidden(model: Any, input_ids_BT: Tensor) -> Tensor:
    """Final hidden states [B, T, H] (after the last norm). Rows are right-padded or full: no mask is needed."""
    output = model.model(input_ids=input_ids_BT, use_cache=False)
    hidden: Tensor = output.last_hidden_state
    return hidden


def head_weight(model: Any) -> nn.Parameter:
    """Weight [V, H] of the output head (the embedding itself when tied)."""
    weight: nn.Parameter = model.get_output_embeddings().weight
    return weight


def logits_at(model: Any, hidden_NH: Tensor) -> Tensor:
    """Logits [N, V] of chosen final hidden states, with the model's soft cap if it has one."""
    head = model.get_output_embeddings()
    if not torch.is_autocast_enabled(hidden_NH.device.type):
        hidden_NH = hidden_NH.to(head.weight.dtype)
    logits: Tensor = head(hidden_NH)
    cap = getattr(model.config, "final_logit_softcapping", None)
    return logits if cap is None else torch.tanh(logits / cap) * cap


def answer_positions(answer_mask_BT: Tensor) -> Tensor:
    """Boolean [B, T] of the positions whose logits predict an answer token: the mask moved left by one."""
    positions = torch.zeros_like(answer_mask_BT)
    positions[:, :-1] = answer_mask_BT[:, 1:]
    return positions
