"""How a model reads held-out text: its perplexity, and how far it is from another model on the same tokens.

    perplexity = exp(mean of -log p(token))
    KL         = mean of KL(softmax(reference) || softmax(model)), what stage 2 minimises (docs/method.md)

Both are means over predicted tokens of full vocabularies, at temperature 1, in nats; logits of either model are made in
its own dtype and compared in float32. Intervals resample windows, so neighbouring windows of one long document make
them a little narrow.

Shape legend: B windows, T tokens, N predicted tokens of a batch, H hidden features, V vocabulary.
"""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor

from bitdistill.data.batches import TokenStream
from bitdistill.errors import DataError, ModelError
from bitdistill.eval.metrics import Score, perplexity_score, ratio_score
from bitdistill.eval.prediction import OnProgress
from bitdistill.models.forward import final_hidden, logits_at

HEAD_ELEMENTS = 2**26
"""Logits made at a time (256 MiB of float32), whatever the vocabulary."""


class TextScores(BaseModel):
    """A model on a text; n of every score counts predicted tokens. The last three only beside a reference."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    windows: int
    sequence_length: int
    tokens_sha256: str
    """Of the ids read, as little-endian int64: equal where two models were scored on the same text."""
    best_sha256: str
    """Of the token the model finds most likely at each place, likewise: its predictions."""
    perplexity: Score
    reference_perplexity: Score | None = None
    kl: Score | None = None
    """Nats a token."""
    same_token: Score | None = None
    """Percent of tokens for which both models find the same next token most likely."""


@torch.inference_mode()
def score_text(
    model: Any,
    tokens: TokenStream,
    *,
    reference: Any | None = None,
    sequence_length: int,
    batch_rows: int,
    device: torch.device | str,
    limit_tokens: int | None = None,
    progress: OnProgress | None = None,
) -> TextScores:
    """Score a model over successive windows of a token stream; each window's first token is context only.

    Args:
        model: a causal language model on `device`, in evaluation mode.
        tokens: for example `corpus.TokenShards`; a last incomplete window is scored too.
        reference: another model of the same vocabulary, likewise.
        sequence_length: tokens of a window.
        batch_rows: windows of one forward pass.
        limit_tokens: read no more than this many tokens.
        progress: called with (tokens read so far, tokens to read), first with 0.

    Raises:
        DataError: fewer than two tokens, or an id that is not in the model's vocabulary.
        ModelError: the vocabularies differ in size.
    """
    vocab_size = _vocab_size(model)
    if reference is not None and _vocab_size(reference) != vocab_size:
        raise ModelError(
            f"perplexity: the reference has {_vocab_size(reference):,} tokens, the model {vocab_size:,}; "
            "give the full-precision model that it was made from"
        )
    total = min(tokens.n_tokens, limit_tokens or tokens.n_tokens)
    rows: list[list[float]] = []
    counts: list[int] = []
    done = 0
    read, best = hashlib.sha256(), hashlib.sha256()
    if progress is not None:
        progress(0, total)
    for group in _groups(total, sequence_length, batch_rows):
        ids_BT = torch.stack(
            [torch.from_numpy(tokens.read(start, count).astype("int64")) for start, count in group]
        )
        if int(ids_BT.max()) >= vocab_size:
            raise DataError(
                f"perplexity: token id {int(ids_BT.max())} in the text, but the model has {vocab_size:,} tokens; "
                "tokenize it with this model"
            )
        sums, best_BT = _sums(model, reference, ids_BT.to(device))
        rows += sums.tolist()
        read.update(_bytes(ids_BT))
        best.update(_bytes(best_BT))
        counts += [ids_BT.shape[1] - 1] * len(group)
        done += ids_BT.numel()
        if progress is not None:
            progress(done, total)
    if not rows:
        raise DataError(f"perplexity: {total} tokens; give text of at least two tokens")
    columns = list(zip(*rows, strict=True))
    scores = TextScores(
        windows=len(rows),
        sequence_length=sequence_length,
        tokens_sha256=read.hexdigest(),
        best_sha256=best.hexdigest(),
        perplexity=perplexity_score(columns[0], counts),
    )
    if reference is None:
        return scores
    compared = {
        "reference_perplexity": perplexity_score(columns[1], counts),
        "kl": ratio_score(columns[2], counts),
        "same_token": ratio_score([100 * same for same in columns[3]], counts),
    }
    return scores.model_copy(update=compared)


def _groups(total: int, sequence_length: int, batch_rows: int) -> list[list[tuple[int, int]]]:
    """(start, tokens) of the windows of each forward pass; an incomplete one is alone."""
    starts = range(0, max(total - 1, 0), sequence_length)
    windows = [(start, min(sequence_length, total - start)) for start in starts]
    whole = [window for window in windows if window[1] == sequence_length]
    groups = [whole[i : i + batch_rows] for i in range(0, len(whole), batch_rows)]
    return groups + [[window] for window in windows if window[1] != sequence_length]


def _vocab_size(model: Any) -> int:
    return int(model.get_output_embeddings().weight.shape[0])


def _bytes(ids: Tensor) -> bytes:
    return ids.cpu().numpy().astype("<i8").tobytes()


def _sums(model: Any, reference: Any | None, ids_BT: Tensor) -> tuple[Tensor, Tensor]:
    """Sums over the predicted tokens of each full row [B, 1 or 4], float64: negative log-likelihood, and beside a
    reference its own, KL(reference || model), and whether the most likely tokens are the same. Then the model's most
    likely tokens [B, T - 1], int64."""
    hidden_NH = final_hidden(model, ids_BT)[:, :-1].flatten(0, 1)
    other_NH = None if reference is None else final_hidden(reference, ids_BT)[:, :-1].flatten(0, 1)
    targets_N = ids_BT[:, 1:].flatten()
    step = max(1, HEAD_ELEMENTS // _vocab_size(model))
    parts: list[Tensor] = []
    best: list[Tensor] = []
    for start in range(0, len(targets_N), step):
        rows = slice(start, start + step)
        targets_N1 = targets_N[rows, None]
        log_NV = logits_at(model, hidden_NH[rows]).float().log_softmax(-1)
        columns = [-log_NV.gather(1, targets_N1)[:, 0]]
        best.append(log_NV.argmax(-1))
        if other_NH is not None:
            other_NV = logits_at(reference, other_NH[rows]).float().log_softmax(-1)
            columns.append(-other_NV.gather(1, targets_N1)[:, 0])
            columns.append((other_NV.exp() * (other_NV - log_NV)).sum(-1))
            columns.append((other_NV.argmax(-1) == best[-1]).float())
        parts.append(torch.stack(columns, dim=-1).double())
    shape = ids_BT.shape[0], ids_BT.shape[1] - 1
    return torch.cat(parts).view(*shape, -1).sum(1), torch.cat(best).view(shape)
