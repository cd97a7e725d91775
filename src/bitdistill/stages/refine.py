"""Stage 1 (paper, sec. 3.1): ternary linears and SubLN, gains calibrated on general text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bitdistill import artifact
from bitdistill.config import PretrainConfig
from bitdistill.data import hub, readers
from bitdistill.data.corpus import TokenShards, tokenize_corpus, tokenizer_fingerprint
from bitdistill.data.tokenizer import eos_id, special_prefix
from bitdistill.errors import ArtifactError, MissingDependencyError
from bitdistill.models import surgery
from bitdistill.models.load import load_source, load_tokenizer, source_fingerprint
from bitdistill.stages.common import Run, log, pad_token_id


def open_corpus(run: Run, tokenizer: Any) -> TokenShards:
    """The stage-2 corpus as token shards; text is tokenized once and kept beside the ternary bases.

    Raises:
        ArtifactError: the shards were made with another tokenizer.
    """
    config = run.recipe.pretrain
    assert config is not None
    assert config.corpus is not None
    path = Path(config.corpus).expanduser()
    if not (path.is_dir() and artifact.exists(path)):
        limit_tokens = _limit_tokens(config)
        path = _cached_tokens(config, tokenizer)
        if not artifact.exists(path):
            workers = max(1, torch.get_num_threads())
            with artifact.locked(path):
                if not artifact.exists(path):  # now; another run may just have made it
                    log.info("tokenizing %s into %s", config.corpus, path)
                    tokenize_corpus(
                        [config.corpus], tokenizer, path, workers=workers, limit_tokens=limit_tokens
                    )
    return check_shards(TokenShards(path), tokenizer, run.recipe.model.path)


def _cached_tokens(config: PretrainConfig, tokenizer: Any) -> Path:
    """Where the shards of a corpus are kept that is none itself."""
    own = [tokenizer_fingerprint(tokenizer), [special_prefix(tokenizer), eos_id(tokenizer)]]
    identity = [readers.source_fingerprint(str(config.corpus)), *own, _limit_tokens(config)]
    return Path(config.cache_dir).expanduser().parent / "tokens" / artifact.hash_json(identity)[:16]


def check_corpus(run: Run) -> None:
    """Before a teacher is trained: whether what stage 2 will read can be had at all.

    Raises:
        MissingDependencyError: a corpus of the hub that was never tokenized here, and `datasets` is not installed.
    """
    config = run.recipe.pretrain
    if config is None or config.base is not None or config.corpus is None or not hub.is_hub(config.corpus):
        return
    try:
        hub.package(hub.parse(config.corpus))
    except MissingDependencyError:
        if not artifact.exists(_cached_tokens(config, load_tokenizer(run.recipe.model))):
            raise


def check_shards(shards: TokenShards, tokenizer: Any, model: str) -> TokenShards:
    """The same shards.

    Raises:
        ArtifactError: they were made with another tokenizer than this one of `model`.
    """
    if shards.tokenizer_sha256 != tokenizer_fingerprint(tokenizer):
        raise ArtifactError(
            f"{shards.folder}: tokenized with another tokenizer than {model}'s; "
            "run `bitdistill tokenize` with this model"
        )
    # Shards hold these beside the texts' ids; a tokenizer's fingerprint knows nothing of them.
    bos_ids, eos = special_prefix(tokenizer), eos_id(tokenizer)
    if (shards.bos_ids, shards.eos_id) != (bos_ids, eos):
        raise ArtifactError(
            f"{shards.folder}: documents begin with the ids {list(shards.bos_ids)} and end with {shards.eos_id}, "
            f"{model}'s tokenizer puts {list(bos_ids)} and {eos}; "
            "run `bitdistill tokenize` with this model"
        )
    return shards


def _limit_tokens(config: PretrainConfig) -> int | None:
    """Tokens of the corpus that are read. A hub corpus may be without end for our purposes: no more of it than the
    budget can use."""
    return config.budget_tokens if config.corpus is not None and hub.is_hub(config.corpus) else None


def calibration_from_task(run: Run, tokenizer: Any) -> tuple[Tensor, Tensor]:
    """Calibration tokens [B, T] from training prompts, for want of a corpus, and the mask of real ones."""
    examples = run.train_examples(tokenizer)[: run.recipe.refine.calibration_rows]
    length = min(run.recipe.refine.calibration_length, max(len(e.prompt_ids) for e in examples))
    rows = [list(e.prompt_ids[:length]) for e in examples]
    pad = pad_token_id(tokenizer)
    mask = torch.arange(length)[None, :] < torch.tensor([len(row) for row in rows])[:, None]
    return torch.tensor([row + [pad] * (length - len(row)) for row in rows]), mask


def calibration_from_corpus(run: Run, shards: TokenShards) -> Tensor:
    """Calibration tokens [rows, length], evenly spread over the corpus."""
    config = run.recipe.refine
    length = min(config.calibration_length, shards.n_tokens)
    rows = max(1, min(config.calibration_rows, shards.n_tokens // length))
    stride = (shards.n_tokens - length) // max(rows - 1, 1)
    return torch.stack(
        [torch.from_numpy(shards.read(i * stride, length).astype("int64")) for i in range(rows)]
    )


def _calibration_identity(run: Run, calibrated: bool) -> Any:
    """What the calibration text is, for the stage's key: the corpus by content, else (there is none, or a given base
    makes it needless) the task's rows."""
    if not calibrated:
        return None
    pretrain = run.recipe.pretrain
    if pretrain is None or pretrain.corpus is None or pretrain.base is not None:
        return run.train_inputs()
    path = Path(pretrain.corpus).expanduser()
    if artifact.exists(path):
        return TokenShards(path).fingerprint
    source, limit_tokens = readers.source_fingerprint(pretrain.corpus), _limit_tokens(pretrain)
    # Rows are spread over all that is read of the corpus
    return source if limit_tokens is None else [source, limit_tokens]


def refine(run: Run) -> Path:
    """Stage 1; writes `refined/`, a latent student that was not trained yet."""
    config, pretrain = run.recipe.refine, run.recipe.pretrain
    folder = run.run_dir / "refined"
    calibrated = config.gains == "calibrated" and config.subln != "none"
    # A finished base needs no corpus: what is made here is then for the report alone.
    on_corpus = pretrain is not None and pretrain.corpus is not None and pretrain.base is None
    inputs: dict[str, Any] = {
        "model": source_fingerprint(run.recipe.model),
        "refine": run.section("refine"),
        # With a task calibration the result depends on the task's rows, otherwise it must not.
        "calibration": _calibration_identity(run, calibrated),
    }
    if run.finished("refine", folder, inputs):
        return folder
    source, tokenizer = load_source(run.recipe.model, dtype="float32", device=run.device)
    plan = surgery.plan(source.config, config)
    student = surgery.apply(plan, source)
    gains = {}
    if calibrated:
        if on_corpus:
            tokens, mask = calibration_from_corpus(run, open_corpus(run, tokenizer)).to(run.device), None
        else:
            tokens, mask = (t.to(run.device) for t in calibration_from_task(run, tokenizer))
        gains = surgery.calibrate_gains(student, source, tokens, mask)
    run.save_artifact(
        "refine",
        student,
        tokenizer,
        folder,
        kind="refined",
        plan=plan,
        extra={**run.meta("refine", inputs), "gains": gains},
    )
    return folder
