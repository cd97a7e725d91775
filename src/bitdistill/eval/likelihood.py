"""How likely a model finds the reference answers of a generation task.

ROUGE of one answer a row is a coarse measure: on some thousand rows two students that differ by a point of it cannot be
told apart. The negative log-likelihood of every token of every reference is measured on the same rows and can.

Shape legend: B rows, T tokens, N scored tokens, H hidden features, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from bitdistill.data.tasks import Example
from bitdistill.eval.perplexity import HEAD_ELEMENTS
from bitdistill.eval.prediction import OnProgress
from bitdistill.models.forward import final_hidden, logits_at


@torch.inference_mode()
def reference_nll(
    model: Any,
    examples: Sequence[Example],
    *,
    batch_rows: int,
    device: torch.device | str,
    pad_id: int,
    progress: OnProgress | None = None,
) -> list[tuple[float, int]]:
    """Negative log-likelihood of each row's first reference after its prompt.

    Args:
        model: causal LM on `device`, in eval mode.
        examples: encoded rows with answers.
        batch_rows: rows of one forward pass.
        device: where the model is.
        pad_id: token id of the padding (its value changes nothing).
        progress: called after each batch with (examples done, examples to do).

    Returns:
        (nats, scored tokens) of each example, in their order; tokens beyond the model's context are not scored.
    """
    context = getattr(model.config, "max_position_embeddings", None)
    answers = [example.answer_within(context) for example in examples]
    # Equal lengths meet in a batch; the longest first, so that memory runs out early or never.
    order = sorted(range(len(examples)), key=lambda n: -(len(examples[n].prompt_ids) + len(answers[n])))
    found = [(0.0, 0)] * len(examples)
    for start in range(0, len(order), batch_rows):
        batch = order[start : start + batch_rows]
        sums = _sums(model, [(examples[n].prompt_ids, answers[n]) for n in batch], device, pad_id)
        for n, nats in zip(batch, sums, strict=True):
            found[n] = (nats, len(answers[n]))
        if progress is not None:
            progress(start + len(batch), len(examples))
    return found


def _sums(
    model: Any,
    rows: Sequence[tuple[Sequence[int], Sequence[int]]],
    device: torch.device | str,
    pad_id: int,
) -> list[float]:
    """Nats of each row's answer after its prompt; logits are made for the answers' tokens alone, some at a time."""
    width = max(len(prompt) + len(answer) for prompt, answer in rows)
    ids_BT = torch.full((len(rows), width), pad_id, dtype=torch.int64)
    at: list[int] = []
    for n, (prompt, answer) in enumerate(rows):
        ids_BT[n, : len(prompt) + len(answer)] = torch.tensor([*prompt, *answer])
        at += range(n * width + len(prompt), n * width + len(prompt) + len(answer))
    index_N = torch.tensor(at, dtype=torch.int64)
    hidden_NH = final_hidden(model, ids_BT.to(device)).flatten(0, 1)[(index_N - 1).to(device)]
    targets_N = ids_BT.flatten()[index_N].to(device)
    step = max(1, HEAD_ELEMENTS // int(model.get_output_embeddings().weight.shape[0]))
    parts: list[Tensor] = []
    for start in range(0, len(targets_N), step):
        logits_NV = logits_at(model, hidden_NH[start : start + step]).float()
        chosen_N = logits_NV.gather(1, targets_N[start : start + step, None])[:, 0]
        parts.append((logits_NV.logsumexp(-1) - chosen_N).double().cpu())
    nats_B = torch.zeros(len(rows), dtype=torch.float64)
    if parts:
        nats_B.index_add_(0, index_N // width, torch.cat(parts))
    return [float(nats) for nats in nats_B]
