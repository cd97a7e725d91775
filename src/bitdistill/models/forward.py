"""Forward passes that stop before the output head, so that logits are made only where they count."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

IGNORED = -100
"""Target of a position that counts for nothing (the convention of torch's cross-entropy)."""


def final_hidden(model: Any, input_ids_BT: Tensor, **packing: Any) -> Tensor:
    """Final hidden states [B, T, H] (after the last norm). Rows are right-padded or full: no mask is needed.

    Args:
        packing: `Batch.packing`, for rows packed into one; the model must attend by `attention.causal_only` then.
    """
    output = model.model(input_ids=input_ids_BT, use_cache=False, **packing)
    hidden: Tensor = output.last_hidden_state
    return hidden


def hidden_states(
    model: Any, input_ids_BT: Tensor, *, every: bool, **packing: Any
) -> tuple[Tensor, list[Tensor]]:
    """Final hidden states, and with `every` the output of each block [B, T, H]; `packing` as for `final_hidden`."""
    if not every:
        return final_hidden(model, input_ids_BT, **packing), []
    with _recorded_blocks(model) as outputs:
        hidden = final_hidden(model, input_ids_BT, **packing)
    return hidden, outputs


@contextlib.contextmanager
def _recorded_blocks(model: Any) -> Iterator[list[Tensor]]:
    """Collects what each block returns. Outside of the blocks' compiled graphs, which forward hooks would break up."""
    outputs: list[Tensor] = []
    blocks: list[Any] = list(model.get_submodule("model.layers").children())
    before = [block._compiled_call_impl for block in blocks]

    def recording(call: Any) -> Any:
        def run(*args: Any, **kwargs: Any) -> Any:
            output = call(*args, **kwargs)
            outputs.append(output[0] if isinstance(output, tuple) else output)
            return output

        return run

    for block, compiled_call in zip(blocks, before, strict=True):
        block._compiled_call_impl = recording(compiled_call or block._call_impl)
    try:
        yield outputs
    finally:
        for block, compiled_call in zip(blocks, before, strict=True):
            block._compiled_call_impl = compiled_call


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


def predicting(hidden_BTH: Tensor, answer_index_N: Tensor) -> Tensor:
    """Hidden states [N, H] that predict the tokens at `answer_index_N` (those one position before)."""
    return rows_at(hidden_BTH, answer_index_N - 1)


def rows_at(hidden_BTH: Tensor, index_N: Tensor) -> Tensor:
    """Hidden states [N, H] at flat positions b * T + t; negative entries (filling) give row 0."""
    return hidden_BTH.flatten(0, 1).index_select(0, index_N.clamp_min(0))


def tokens_at(input_ids_BT: Tensor, index_N: Tensor) -> Tensor:
    """Token ids [N] at flat positions; IGNORED where the index is filling."""
    tokens = input_ids_BT.flatten().index_select(0, index_N.clamp_min(0))
    return torch.where(index_N < 0, IGNORED, tokens)


def next_tokens(input_ids_BT: Tensor) -> Tensor:
    """What each position predicts, [B, T]; IGNORED at the last one, so that row counts stay even."""
    return torch.nn.functional.pad(input_ids_BT[:, 1:], (0, 1), value=IGNORED)
