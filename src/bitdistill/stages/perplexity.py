"""A model on held-out text, and beside the full-precision model that it was made from."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from bitdistill import artifact
from bitdistill.config import ModelSource
from bitdistill.data.corpus import TokenShards, tokenize_corpus, tokenizer_fingerprint
from bitdistill.errors import ModelError, UsageError
from bitdistill.eval.perplexity import score_text
from bitdistill.eval.prediction import OnProgress
from bitdistill.eval.results import hardware, versions
from bitdistill.eval.text_results import TextResult, Trained
from bitdistill.models.load import load_source
from bitdistill.models.student import load_student
from bitdistill.stages.common import choose_device, git_commit
from bitdistill.stages.refine import check_shards

WINDOW = 1024
"""Tokens of a window where a caller names no number."""


def perplexity(
    model: str,
    sources: Sequence[str],
    *,
    reference: str | None = None,
    limit_tokens: int | None = 100_000,
    sequence_length: int | None = None,
    batch_rows: int = 4,
    device: str = "auto",
    command: str = "",
    progress: OnProgress | None = None,
) -> TextResult:
    """Load models and text, and score the first `limit_tokens` of it. Weights are float32 but where a full-precision
    model is saved otherwise in a bitdistill folder.

    Args:
        model: any bitdistill folder (ternary base, student, packed student, teacher), or a full-precision model
            (folder, hub name, .gguf file).
        sources: files, folders or hub data sets of text, or one folder of token shards of this model.
        reference: a model of the same tokenizer, as `model`; its KL and most likely tokens are compared then.
        sequence_length: tokens of a window; None: 1,024, or as many as both models read.
        batch_rows: windows of one forward pass.
        device: as in a recipe.
        command: the command line, for the result.
        progress: called with (tokens read so far, tokens to read).

    Raises:
        ArtifactError, ModelError: a model or the shards are not usable, or the tokenizers differ.
        DataError: the text is not readable, or too short.
        UsageError: windows longer than a model's positions.
    """
    where = choose_device(device)
    commit = git_commit()  # of the code that runs, whatever is checked out meanwhile
    student, tokenizer, manifest = _load(model, where)
    other = None
    if reference is not None:
        other, others_tokenizer, _ = _load(reference, where)
        if tokenizer_fingerprint(others_tokenizer) != tokenizer_fingerprint(tokenizer):
            raise ModelError(
                f"{reference}: another tokenizer than {model}'s, so their tokens cannot be compared; "
                "give the full-precision model that it was made from"
            )
    given = {model: student} if reference is None else {model: student, reference: other}
    most = {name: int(one.config.max_position_embeddings) for name, one in given.items()}
    shortest = min(most, key=lambda name: most[name])
    if sequence_length is None:
        sequence_length = min(WINDOW, most[shortest])
    if sequence_length > most[shortest]:
        raise UsageError(
            f"--sequence-length {sequence_length}: {shortest} reads at most {most[shortest]} tokens"
        )
    with ExitStack() as stack:
        shards = _open(sources, tokenizer, model, limit_tokens, stack)
        begin = time.monotonic()
        scores = score_text(
            student,
            shards,
            reference=other,
            sequence_length=sequence_length,
            batch_rows=batch_rows,
            device=where,
            limit_tokens=limit_tokens,
            progress=progress,
        )
        took = time.monotonic() - begin
    return TextResult(
        model=model,
        text=list(sources),
        reference=reference,
        **dict(scores),
        trained=Trained.of(manifest),
        command=command,
        commit=commit,
        versions=versions(),
        hardware=hardware(where),
        elapsed_s=round(took, 2),
    )


def _load(path: str, device: torch.device) -> tuple[Any, Any, Mapping[str, Any]]:
    """Model in evaluation mode, tokenizer, and what a folder of ours says of itself."""
    folder = Path(path).expanduser()
    if artifact.exists(folder):
        model, tokenizer, manifest = load_student(folder, device=device)
        return model.eval(), tokenizer, manifest
    return *load_source(ModelSource(path=path), device=device), {}


def _open(
    sources: Sequence[str], tokenizer: Any, model: str, limit_tokens: int | None, stack: ExitStack
) -> TokenShards:
    """Token shards as they are, or of text, tokenized into a folder that is gone when the stack is."""
    folder = Path(sources[0]).expanduser()
    if len(sources) == 1 and artifact.exists(folder):
        artifact.verify(folder)
        return check_shards(TokenShards(folder), tokenizer, model)
    place = stack.enter_context(tempfile.TemporaryDirectory(prefix="bitdistill-"))
    workers = max(1, torch.get_num_threads())
    out = Path(place) / "tokens"
    tokenize_corpus(list(sources), tokenizer, out, workers=workers, limit_tokens=limit_tokens)
    return TokenShards(out)
