"""Tokenizers as GGUF metadata: which pre-tokenizer, SentencePiece scores, and what llama.cpp has no form for."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import gguf
import pytest
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from bitdistill.errors import ModelError
from bitdistill.interop.gguf_tokenizer import (
    BYTE,
    CONTROL,
    NORMAL,
    UNKNOWN,
    UNUSED,
    USER_DEFINED,
    vocabulary,
    write_vocabulary,
)
from bitdistill.models.gguf import PRE_TOKENIZERS, load_tokenizer
from bitdistill.models.gguf_header import read_gguf

BYTES = sorted(pre_tokenizers.ByteLevel.alphabet())
TEXTS = ["hello 1234 hello", " two  spaces", "Ünï 漢字 🙂", "hell\no\n\nhe'll", ""]


def wrapped(backend: Tokenizer, **special: Any) -> Any:
    return PreTrainedTokenizerFast(tokenizer_object=backend, clean_up_tokenization_spaces=False, **special)


def byte_level(name: str, normalizer: Any = None) -> Any:
    merges = [("1", "2"), ("12", "3"), ("h", "e"), ("l", "l"), ("he", "ll"), ("hell", "o"), ("Ġ", "hello")]
    pieces = [*BYTES, *(a + b for a, b in merges), "<|end|>"]
    backend = Tokenizer(
        models.BPE(
            {p: i for i, p in enumerate(pieces)}, merges, ignore_merges=name in ("llama-bpe", "llama3")
        )
    )
    split = PRE_TOKENIZERS[name]
    steps: list[Any] = [pre_tokenizers.Digits(individual_digits=True)] if name == "smollm" else []
    steps += [pre_tokenizers.Split(Regex(split), behavior="isolated")] if split else []
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=not split))
    backend.pre_tokenizer = pre_tokenizers.Sequence(steps)
    backend.decoder = decoders.ByteLevel()
    if normalizer is not None:
        backend.normalizer = normalizer
    backend.add_special_tokens(["<|end|>"])
    return wrapped(backend, eos_token="<|end|>")


def sentencepiece(prefix: bool = True) -> Any:
    """Pieces by score, all their splits as merges: what converters make of a SentencePiece model."""
    pieces = ["▁hello", "hello", "hell", "he", "ll", "▁he", "lo", "▁▁", "12"]
    letters = list("▁helo123")
    special = ["<unk>", "<s>", "</s>"]
    vocab = {p: i for i, p in enumerate([*special, *(f"<0x{b:02X}>" for b in range(256)), *pieces, *letters])}
    merges = [
        (piece[:at], piece[at:])
        for piece in pieces
        for at in range(1, len(piece))
        if piece[:at] in vocab and piece[at:] in vocab
    ]
    backend = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    replace = normalizers.Replace(" ", "▁")
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), replace]) if prefix else replace
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    backend.add_special_tokens(special)
    return wrapped(backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


def as_gguf(tokenizer: Any, path: Path) -> Any:
    """Through a file and back."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(64)
    write_vocabulary(writer, vocabulary(tokenizer, len(tokenizer), [], "t"))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    return load_tokenizer(read_gguf(path))


@pytest.mark.parametrize("name", ["gpt-2", "smollm", "qwen2", "llama-bpe"])
def test_byte_level_comes_back_by_name(name: str, tmp_path: Path) -> None:
    ours = byte_level(name, normalizers.NFC() if name == "qwen2" else None)
    ours.chat_template = "{{ messages[0].content }}"
    found = vocabulary(ours, 300, [len(BYTES) + 7], "t")
    assert (found.model, found.pre) == ("gpt2", name)
    assert found.types.count(CONTROL) == 1
    assert found.types[-1] == UNUSED
    assert found.tokens[-1] == "[PAD299]"
    assert found.special_ids == {"eos": len(BYTES) + 7}
    back = as_gguf(ours, tmp_path / "t.gguf")
    assert [back(t).input_ids for t in TEXTS] == [ours(t).input_ids for t in TEXTS]
    assert back.chat_template == ours.chat_template
    assert back.eos_token == "<|end|>"


def test_names_are_told_apart() -> None:
    assert (
        len({vocabulary(byte_level(n), 300, [], "t").pre for n in ("gpt-2", "smollm", "qwen2", "llama-bpe")})
        == 4
    )


@pytest.mark.parametrize("prefix", [True, False])
def test_sentencepiece_scores_merge_in_the_order_of_the_ranks(prefix: bool, tmp_path: Path) -> None:
    ours = sentencepiece(prefix)
    found = vocabulary(ours, len(ours), [], "t")
    assert (found.model, found.add_space_prefix) == ("llama", prefix)
    assert found.types[:4] == [UNKNOWN, CONTROL, CONTROL, BYTE]
    assert found.types.count(BYTE) == 256
    assert found.types[-1] == NORMAL
    score = dict(zip(found.tokens, found.scores, strict=True))
    assert score["▁hello"] > score["hello"] > score["hell"] > score["he"] > score["ll"]
    back = as_gguf(ours, tmp_path / "t.gguf")
    assert [back(t).input_ids for t in TEXTS] == [ours(t).input_ids for t in TEXTS]
    assert back.decode(back("hello 1234").input_ids, skip_special_tokens=True) == "hello 1234"
    for text in ["hello hello", "hellohe", "he  12llo", "lohello 123"]:
        text_in = ("▁" if prefix else "") + text.replace(" ", "▁")
        assert by_score(text_in, score) == ours.convert_ids_to_tokens(ours(text).input_ids), text


def by_score(text: str, score: dict[str, float]) -> list[str]:
    """llama.cpp's rule, slowly: join the neighbours whose piece has the highest score, leftmost first."""
    parts = list(text)
    while True:
        joins = [(score[a + b], -i) for i, (a, b) in enumerate(itertools.pairwise(parts)) if a + b in score]
        if not joins:
            return parts
        at = -max(joins)[1]
        parts[at : at + 2] = [parts[at] + parts[at + 1]]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gpt-2", "smollm", "qwen2", "llama-bpe", "spaced", "unspaced"])
def test_llama_cpp_splits_alike(name: str, tmp_path: Path) -> None:
    llama_cpp = pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
    ours = sentencepiece(name == "spaced") if name.endswith("spaced") else byte_level(name)
    as_gguf(ours, tmp_path / "t.gguf")
    llama = llama_cpp.Llama(str(tmp_path / "t.gguf"), vocab_only=True, verbose=False)
    for text in [*TEXTS, "hellohe 12", "he  12llo lohello"]:
        if text:
            assert llama.tokenize(text.encode(), add_bos=True, special=True) == ours(text).input_ids, text


def edited(tokenizer: Any, **steps: Any) -> Any:
    for name, step in steps.items():
        setattr(tokenizer.backend_tokenizer, name, step)
    return tokenizer


def scattered() -> Any:
    backend = sentencepiece().backend_tokenizer
    merges = [("h", "e"), ("l", "l"), ("▁", "he"), ("he", "ll"), ("l", "o"), ("hel", "l")]
    vocab = backend.get_vocab() | {"hel": backend.get_vocab_size()}
    backend.model = models.BPE(vocab, merges, unk_token="<unk>", byte_fallback=True)
    return wrapped(backend, unk_token="<unk>")


def words() -> Any:
    return wrapped(Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="a")), unk_token="a")


def framed() -> Any:
    from tokenizers.processors import TemplateProcessing

    return edited(
        byte_level("gpt-2"),
        post_processor=TemplateProcessing("<|end|> <|end|> $A", None, [("<|end|>", len(BYTES) + 7)]),
    )


@pytest.mark.parametrize(
    ("tokenizer", "words"),
    [
        (words, "model is WordLevel"),
        (
            lambda: edited(byte_level("gpt-2"), normalizer=normalizers.Lowercase()),
            "no pre-tokenizer like this",
        ),
        (
            lambda: edited(byte_level("gpt-2"), pre_tokenizer=pre_tokenizers.ByteLevel(True)),
            "no pre-tokenizer like",
        ),
        (
            lambda: edited(
                byte_level("gpt-2"),
                pre_tokenizer=pre_tokenizers.Sequence(
                    [
                        pre_tokenizers.Split(Regex(r"\d"), "isolated"),
                        pre_tokenizers.ByteLevel(False, use_regex=False),
                    ]
                ),
            ),
            "no pre-tokenizer like this tokenizer's .Split, ByteLevel",
        ),
        (lambda: edited(sentencepiece(), normalizer=None), "neither byte-level nor SentencePiece-like"),
        (scattered, "do not stand together|are no merge"),
        (framed, "frames 'a b' as"),
    ],
)
def test_what_gguf_cannot_hold_is_refused(tokenizer: Any, words: str) -> None:
    with pytest.raises(ModelError, match=words) as caught:
        vocabulary(tokenizer(), 400, [], "t")
    assert "\n" not in str(caught.value)


def test_tokens_beyond_the_embedding_and_other_types() -> None:
    ours = byte_level("gpt-2")
    with pytest.raises(ModelError, match="lies beyond the embedding of 100 rows"):
        vocabulary(ours, 100, [], "t")
    ours.add_tokens(["<tool>"])
    found = vocabulary(ours, 300, [5, 6], "t")
    assert found.types[found.tokens.index("<tool>")] == USER_DEFINED
    assert (found.special_ids["eos"], found.special_ids["eot"]) == (5, 6)
