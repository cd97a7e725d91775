"""Tokenizers: read exactly what the files say, and check that they belong to the model."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bitdistill.errors import ModelError

log = logging.getLogger("bitdistill")

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
)
VOCABULARY_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")
# Class names that mean "tokenizer.json, as it is".
_GENERIC = ("TokenizersBackend", "PreTrainedTokenizerFast")


def read_tokenizer(folder: Path) -> Any:
    """The tokenizer of a local folder; no code of the folder is run.

    A generic tokenizer is read by the generic class. `AutoTokenizer` would rebuild some by model type (for
    qwen2 a Qwen2Tokenizer, whatever tokenizer.json says) and so split text in another way.
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    try:
        declared = json.loads((folder / "tokenizer_config.json").read_text("utf-8")).get("tokenizer_class")
    except (OSError, ValueError, AttributeError):
        declared = None  # AutoTokenizer knows the older layouts, and reports what is unreadable
    if declared in _GENERIC and (folder / "tokenizer.json").is_file():
        found = PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True)
    else:
        found = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    return quiet_on_length(found)


def quiet_on_length(tokenizer: Any) -> Any:
    """The tokenizer, as if it had warned already of a text longer than the model's context: we cut or refuse such texts
    ourselves."""
    tokenizer.deprecation_warnings["sequence-length-is-longer-than-the-specified-maximum"] = True
    return tokenizer


def check_tokenizer(config: Mapping[str, Any], tokenizer: Any, where: str) -> None:
    """Check that a tokenizer belongs to a model.

    Raises:
        ModelError: it makes ids beyond the model's embedding, or lacks the model's special ids.
    """
    rows = int(config["vocab_size"])
    if tokenizer.vocab_size > rows:
        raise ModelError(
            f"{where}: the tokenizer has {tokenizer.vocab_size} tokens, the model {rows}; "
            "set model.tokenizer to the model's own"
        )
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        in_model, in_tokenizer = config.get(name), getattr(tokenizer, name)
        if in_tokenizer is not None and in_tokenizer >= rows:
            raise ModelError(
                f"{where}: the tokenizer's {name} is {in_tokenizer}, the model has {rows} tokens"
            )
        ids = in_model if isinstance(in_model, list) else [in_model]
        beyond = [i for i in ids if i is not None and i >= len(tokenizer)]
        if name != "pad_token_id" and beyond:
            raise ModelError(
                f"{where}: the model's {name} {beyond[0]} is not among the tokenizer's {len(tokenizer)}; "
                "set model.tokenizer to the model's own"
            )
    if len(tokenizer) > rows:
        log.warning(
            "%s: %d added tokens lie beyond the embedding of %d rows", where, len(tokenizer) - rows, rows
        )
