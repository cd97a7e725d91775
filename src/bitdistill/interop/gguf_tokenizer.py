"""A tokenizer as GGUF metadata: what llama.cpp needs to split text into the same tokens.

Two kinds are written. Byte-level BPE goes out as `gpt2` with the name of its pre-tokenizer, found by comparing its
steps with those that llama.cpp knows (not by hashing its output, which only finds vocabularies on a list).
SentencePiece-like BPE goes out as `llama` with a score a piece: llama.cpp merges the neighbours whose joint piece has
the highest score, so the order of the merges must be expressible by scores, which is checked.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from bitdistill.errors import ModelError
from bitdistill.models.gguf import IGNORE_MERGES, PRE_TOKENIZERS, SINGLE_DIGITS

# llama.cpp's token types.
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
_SPACE = "\u2581"
_BYTE_PIECE = re.compile(r"<0x[0-9A-F]{2}>")
_UNREACHABLE = -1e9


@dataclass
class Vocabulary:
    """Metadata under `tokenizer.`; lists have one entry a row of the embedding."""

    model: str
    """`gpt2` or `llama`."""
    pre: str
    tokens: list[str]
    types: list[int]
    merges: list[str] = field(default_factory=list)
    scores: list[float] = field(default_factory=list)
    special_ids: dict[str, int] = field(default_factory=dict)
    """bos, eos, eot, unk, pad: those that there are."""
    add_bos: bool = False
    add_eos: bool = False
    add_space_prefix: bool = False
    chat_template: str | None = None


def vocabulary(tokenizer: Any, rows: int, eos_ids: Sequence[int], where: str) -> Vocabulary:
    """The GGUF form of a tokenizer.

    Args:
        tokenizer: a transformers tokenizer with a `tokenizers` backend.
        rows: rows of the embedding; ids without a token become unused ones.
        eos_ids: ids that end a text, the model's own first; a second one is written as end of turn.
        where: for messages.

    Raises:
        ModelError: llama.cpp would split text in another way; the message says why.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise ModelError(f"{where}: the tokenizer has no tokenizer.json, from which GGUF metadata is made")
    whole = json.loads(backend.to_str())
    model = whole["model"]
    if model["type"] != "BPE" or model.get("continuing_subword_prefix") or model.get("end_of_word_suffix"):
        raise ModelError(
            f"{where}: the tokenizer's model is {model['type']}; GGUF holds byte-level and SentencePiece BPE"
        )
    tokens, types = _tokens(whole, rows, where)
    merges = [tuple(m) if isinstance(m, list) else tuple(m.split(" ", 1)) for m in model["merges"]]
    steps = _steps(whole["pre_tokenizer"], "pretokenizers")
    if any(step["type"] == "ByteLevel" for step in steps):
        pre = _pre_name(steps, whole["normalizer"], bool(model.get("ignore_merges")), where)
        found = Vocabulary("gpt2", pre, tokens, types, merges=[_joined(m, where) for m in merges])
    else:
        prefix = _space_prefix(whole["normalizer"], steps, bool(model.get("byte_fallback")), where)
        scores = _scores(tokens, types, merges, where)
        found = Vocabulary("llama", "default", tokens, types, scores=scores, add_space_prefix=prefix)
    found.add_bos, found.add_eos = _framing(tokenizer, where)
    template = tokenizer.chat_template
    found.chat_template = template.get("default") if isinstance(template, Mapping) else template
    eos = list(
        dict.fromkeys([*eos_ids, *([] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id])])
    )
    named = {
        "bos": tokenizer.bos_token_id,
        "eos": eos[0] if eos else None,
        "eot": eos[1] if len(eos) > 1 else None,
        "unk": tokenizer.unk_token_id,
        "pad": tokenizer.pad_token_id,
    }
    found.special_ids = {
        name: number for name, number in named.items() if number is not None and number < rows
    }
    return found


def write_vocabulary(writer: Any, vocabulary: Vocabulary) -> None:
    """Add the metadata to a `gguf.GGUFWriter`."""
    writer.add_tokenizer_model(vocabulary.model)
    writer.add_tokenizer_pre(vocabulary.pre)
    writer.add_token_list(vocabulary.tokens)
    writer.add_token_types(vocabulary.types)
    if vocabulary.model == "gpt2":
        writer.add_token_merges(vocabulary.merges)
    else:
        writer.add_token_scores(vocabulary.scores)
        writer.add_add_space_prefix(vocabulary.add_space_prefix)
    for name, number in vocabulary.special_ids.items():
        getattr(writer, f"add_{name}_token_id")(number)
    writer.add_add_bos_token(vocabulary.add_bos)
    writer.add_add_eos_token(vocabulary.add_eos)
    if vocabulary.chat_template:
        writer.add_chat_template(vocabulary.chat_template)


def _tokens(whole: Mapping[str, Any], rows: int, where: str) -> tuple[list[str], list[int]]:
    """Text and type of every row."""
    tokens = [f"[PAD{i}]" for i in range(rows)]
    types = [UNUSED] * rows
    unknown = whole["model"].get("unk_token")
    fallback = whole["model"].get("byte_fallback")
    added = {entry["id"]: entry for entry in whole["added_tokens"]}
    by_id = {i: token for token, i in whole["model"]["vocab"].items()} | {
        i: e["content"] for i, e in added.items()
    }
    for i, token in by_id.items():
        if i >= rows:
            raise ModelError(f"{where}: token {i} ({token!r}) lies beyond the embedding of {rows} rows")
        tokens[i] = token
        if token == unknown:
            types[i] = UNKNOWN
        elif i in added:
            types[i] = CONTROL if added[i]["special"] else USER_DEFINED
        elif fallback and _BYTE_PIECE.fullmatch(token):
            types[i] = BYTE
        else:
            types[i] = NORMAL
    return tokens, types


def _steps(section: Mapping[str, Any] | None, key: str) -> list[dict[str, Any]]:
    """A pre-tokenizer or normalizer as a flat list."""
    if section is None:
        return []
    if section["type"] != "Sequence":
        return [dict(section)]
    return [step for part in section[key] for step in _steps(part, key)]


def _pre_name(steps: list[dict[str, Any]], normalizer: Any, ignore_merges: bool, where: str) -> str:
    """llama.cpp's name of a byte-level pre-tokenizer."""
    normalizers = [step["type"] for step in _steps(normalizer, "normalizers")]
    digits = [step for step in steps if step["type"] == "Digits"]
    splits = [step for step in steps if step["type"] == "Split"]
    level = steps[-1]
    regex = splits[0]["pattern"].get("Regex") if splits else ""
    sound = (
        level["type"] == "ByteLevel"
        and not level["add_prefix_space"]
        and level.get("use_regex", True) == (not splits)
        and len(digits) + len(splits) == len(steps) - 1 <= 1
        and all(step["individual_digits"] for step in digits)
        and all(step["behavior"] == "Isolated" and not step["invert"] for step in splits)
        # NFC leaves all but decomposed characters as they are; llama.cpp has no such step for any model.
        and set(normalizers) <= {"NFC"}
    )
    for name, split in PRE_TOKENIZERS.items():
        fits = regex == split and bool(digits) == (name in SINGLE_DIGITS)
        if sound and fits and ignore_merges == (name in IGNORE_MERGES):
            return name
    kinds = ", ".join([*normalizers, *(step["type"] for step in steps)])
    raise ModelError(
        f"{where}: llama.cpp has no pre-tokenizer like this tokenizer's ({kinds}; ignore_merges {ignore_merges}); "
        f"written are those of {', '.join(PRE_TOKENIZERS)}"
    )


def _joined(merge: Sequence[str], where: str) -> str:
    if len(merge) != 2 or any(" " in part for part in merge):
        raise ModelError(f"{where}: merge {merge!r} cannot be written as two words")
    return " ".join(merge)


def _space_prefix(normalizer: Any, steps: list[dict[str, Any]], byte_fallback: bool, where: str) -> bool:
    """Whether a space is put before a text; refuses what is not SentencePiece's treatment of spaces."""
    names = [step["type"] for step in _steps(normalizer, "normalizers")]
    texts = [step for step in _steps(normalizer, "normalizers") if step["type"] in ("Prepend", "Replace")]
    replaced = any(
        step["type"] == "Replace" and step["pattern"].get("String") == " " and step["content"] == _SPACE
        for step in texts
    )
    prepended = any(step["type"] == "Prepend" and step["prepend"] == _SPACE for step in texts)
    metaspace = next((step for step in steps if step["type"] == "Metaspace"), None)
    # Gemma splits at spaces after they have been replaced: a step without effect.
    others = [s for s in steps if s["type"] != "Metaspace" and s.get("pattern") != {"String": " "}]
    sound = set(names) <= {"Prepend", "Replace"} and len(texts) <= 2 and not others and byte_fallback
    if metaspace is not None:
        sound = (
            sound and not texts and metaspace["replacement"] == _SPACE and not metaspace.get("split", True)
        )
        prepended = metaspace.get("prepend_scheme", "always") != "never"
    else:
        sound = sound and replaced
    if not sound:
        kinds = ", ".join([*names, *(step["type"] for step in steps)]) or "none"
        raise ModelError(
            f"{where}: neither byte-level nor SentencePiece-like (steps: {kinds}; byte_fallback {byte_fallback}); "
            "llama.cpp has no such tokenizer"
        )
    return prepended


def _scores(
    tokens: Sequence[str], types: Sequence[int], merges: Sequence[Sequence[str]], where: str
) -> list[float]:
    """A score a piece, such that merging by score is merging by rank.

    That holds when all merges that make a piece stand together, and every pair of pieces that joins to a piece
    is a merge.
    """
    order: dict[str, int] = {}
    last = None
    for left, right in merges:
        piece = left + right
        if piece != last and piece in order:
            raise ModelError(
                f"{where}: the merges of {piece!r} do not stand together, so no scores give their order"
            )
        last = piece
        order.setdefault(piece, len(order))
    known = {(left, right) for left, right in merges}
    pieces = {token for token, kind in zip(tokens, types, strict=True) if kind == NORMAL}
    for piece in pieces:
        for at in range(1, len(piece)):
            pair = (piece[:at], piece[at:])
            if pair not in known and pair[0] in pieces and pair[1] in pieces:
                raise ModelError(
                    f"{where}: {pair[0]!r} and {pair[1]!r} join to a piece, but are no merge, which scores cannot say"
                )
    scores = []
    for token, kind in zip(tokens, types, strict=True):
        normal = kind == NORMAL and len(token) > 1
        scores.append(float(-order[token]) if token in order else _UNREACHABLE if normal else 0.0)
    return scores


def _framing(tokenizer: Any, where: str) -> tuple[bool, bool]:
    """Whether the tokenizer puts bos before and eos after a text, and nothing else."""
    plain = tokenizer("a b", add_special_tokens=False)["input_ids"]
    framed = tokenizer("a b", add_special_tokens=True)["input_ids"]
    bos, eos = [tokenizer.bos_token_id], [tokenizer.eos_token_id]
    for add_bos in (False, True):
        for add_eos in (False, True):
            if framed == (bos if add_bos else []) + plain + (eos if add_eos else []):
                return add_bos, add_eos
    raise ModelError(
        f"{where}: the tokenizer frames 'a b' as {framed}, not by bos and eos; llama.cpp cannot do that"
    )
