"""What prompts, answers and corpora ask of a Hugging Face tokenizer. No torch import."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from bitdistill.errors import ModelError


def plain_ids(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    """Ids of each text without special tokens, in one batch."""
    if not texts:
        return []
    return tokenizer(list(texts), add_special_tokens=False, return_attention_mask=False)["input_ids"]


def special_prefix(tokenizer: Any) -> tuple[int, ...]:
    """What the tokenizer puts before a text by itself (the bos token, or nothing)."""
    plain = plain_ids(tokenizer, ["a"])[0]
    whole = list(tokenizer("a")["input_ids"])
    for start in range(len(whole) - len(plain) + 1):
        if whole[start : start + len(plain)] == plain:
            return tuple(whole[:start])
    raise ModelError(
        "tokenizer: special tokens change the ids of ordinary text; such tokenizers are not supported"
    )


def eos_id(tokenizer: Any) -> int:
    """The end-of-text id.

    Raises:
        ModelError: the tokenizer has none.
    """
    if tokenizer.eos_token_id is None:
        raise ModelError(
            "tokenizer: no eos token, which answers and corpora need; set eos_token in its config"
        )
    return int(tokenizer.eos_token_id)


def answer_encoder(tokenizer: Any) -> Callable[[Sequence[str]], list[list[int]]]:
    """How to tokenize texts that follow other text.

    Some SentencePiece tokenizers put a blank before each text; there an answer is tokenized after a newline,
    whose ids are taken off again, so that " yes" is the token it is within a sentence.
    """
    newline, text, joined = plain_ids(tokenizer, ["\n", "a", "\na"])
    adds_blank = joined[: len(newline)] == newline and joined[len(newline) :] != text
    if not adds_blank:
        return lambda texts: plain_ids(tokenizer, texts)

    def encode_after_newline(texts: Sequence[str]) -> list[list[int]]:
        every = plain_ids(tokenizer, ["\n" + t for t in texts])
        for text, ids in zip(texts, every, strict=True):
            if ids[: len(newline)] != newline:
                raise ModelError(
                    f"tokenizer: joins a newline with {text[:20]!r}, so the answer has no ids of its own; "
                    "begin answers with a blank"
                )
        return [ids[len(newline) :] for ids in every]

    return encode_after_newline
