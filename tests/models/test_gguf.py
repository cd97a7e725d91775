"""GGUF in: tiny models written with the gguf package come back equal, and damaged headers are refused."""

from __future__ import annotations

import itertools
import json
import random
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor

from bitdistill.config import ModelSource
from bitdistill.errors import ModelError
from bitdistill.models import gguf as gguf_module
from bitdistill.models.families import layout_of
from bitdistill.models.gguf_header import config_from_gguf, read_gguf
from bitdistill.models.load import config_dict, load_source, source_fingerprint
from tests.cheap import refused_cheaply

from .conftest import tiny_model

BYTES = sorted(pre_tokenizers.ByteLevel.alphabet())
MERGES = ["1 2", "12 3", "h e", "l l", "he ll", "hell o", "Ġ hello"]
TOKENS = [*BYTES, *(m.replace(" ", "") for m in MERGES), "<|start|>", "<|end|>"]
NAMES = {
    "embed_tokens": "token_embd",
    "norm": "output_norm",
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
LLAMA_NORMS = {"post_attention_layernorm": "ffn_norm"}
GEMMA_NORMS = {
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}
FAMILY = {
    "llama": "llama",
    "llama_tied": "llama",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "gemma3_text": "gemma3",
}


def gguf_name(name: str, architecture: str) -> str:
    if name == "lm_head.weight":
        return "output.weight"
    parts, kind = name.removeprefix("model.").rsplit(".", 1)
    table = NAMES | (GEMMA_NORMS if architecture == "gemma3" else LLAMA_NORMS)
    if parts.startswith("layers."):
        _, layer, rest = parts.split(".", 2)
        return f"blk.{layer}.{table[rest]}.{kind}"
    return f"{table[parts]}.{kind}"


def interleave(tensor: Tensor, heads: int) -> Tensor:
    """llama.cpp stores Llama's q and k rows with the two rotary halves interleaved."""
    size = tensor.shape[0] // heads
    return tensor.reshape(heads, 2, size // 2, -1).swapaxes(1, 2).reshape(tensor.shape)


def write_byte_level(writer: gguf.GGUFWriter, pre: str) -> None:
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(TOKENS)
    writer.add_token_types([gguf.TokenType.NORMAL] * (len(TOKENS) - 2) + [gguf.TokenType.CONTROL] * 2)
    writer.add_token_merges(MERGES)
    writer.add_bos_token_id(len(TOKENS) - 2)
    writer.add_eos_token_id(len(TOKENS) - 1)


def write_sentencepiece(writer: gguf.GGUFWriter, _: str) -> None:
    """Gemma's kind: no merges in the file, pieces in the order in which they are merged."""
    pieces = ["<pad>", "<eos>", "<bos>", "<unk>", *"▁helo", "he", "ll", "hell", "hello", "▁hello"]
    pieces += [f"<unused{i}>" for i in range(len(TOKENS) - len(pieces))]
    writer.add_tokenizer_model("llama")
    writer.add_token_list(pieces)
    writer.add_token_scores([-float(i) for i in range(len(pieces))])
    writer.add_token_types([gguf.TokenType.CONTROL] * 4 + [gguf.TokenType.NORMAL] * (len(pieces) - 4))
    writer.add_pad_token_id(0)
    writer.add_eos_token_id(1)
    writer.add_bos_token_id(2)
    writer.add_unk_token_id(3)


def by_best_pair(text: str, scores: dict[str, float]) -> list[str]:
    """SentencePiece BPE as its paper has it: join the neighbours whose piece scores most, as long as there are any."""
    pieces = list(text)
    while True:
        pairs = [
            (scores[a + b], -k) for k, (a, b) in enumerate(itertools.pairwise(pieces)) if a + b in scores
        ]
        if not pairs:
            return pieces
        k = -max(pairs)[1]
        pieces[k : k + 2] = [pieces[k] + pieces[k + 1]]


def test_a_vocabulary_loaded_as_a_unigram_model_splits_as_sentencepiece_does() -> None:
    """Gemma's scores are ranks, which transformers 5.17 takes for log-probabilities: many small pieces then win."""
    pieces = ["<unk>", "d", *"abcd", "ab", "cd", "abc", "bc", "abcd", "aa", "aaa", "dab"]
    scores = {piece: -float(rank) for rank, piece in enumerate(pieces)}
    # With the byte of d spelled as d
    backend = Tokenizer(models.Unigram([(p, -float(rank)) for rank, p in enumerate(pieces)], unk_id=0))
    apart = 0
    generator = random.Random(0)
    texts = ["".join(generator.choices("abcd", k=generator.randint(1, 12))) for _ in range(300)]
    as_unigram = [backend.encode(text).tokens for text in texts]
    gguf_module._as_bpe(backend)
    for text, before in zip(texts, as_unigram, strict=True):
        want = by_best_pair(text, {k: v for k, v in scores.items() if k != "<unk>"})
        assert backend.encode(text).tokens == want
        assert backend.encode(text).ids == [pieces.index(piece, 2) for piece in want]
        apart += before != want
    assert apart > 50
    assert backend.id_to_token(1) == "<0x64>"
    assert backend.get_vocab_size() == len(pieces)


def write_gguf(path: Path, name: str, pre: str = "smollm", quantize: Any = None, **extra: Any) -> Any:
    """A tiny model as GGUF, with the layout conventions of llama.cpp's converter."""
    changes: dict[str, Any] = {
        "head_dim": 16,
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "vocab_size": len(TOKENS),
    }
    if name == "gemma3_text":
        changes |= {"layer_types": ["sliding_attention"] * 2, "query_pre_attn_scalar": 16}
    if name == "qwen3":
        changes["head_dim"] = 24  # transformers' own reader ignores the file's and assumes 128
    model = tiny_model(name, **changes)
    config, architecture = model.config, FAMILY[name]
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(128)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(1e6 if architecture == "gemma3" else 1e4)
    if architecture == "gemma3":
        writer.add_sliding_window(config.sliding_window)
    (write_sentencepiece if architecture == "gemma3" else write_byte_level)(writer, pre)
    writer.add_chat_template("{{ messages[0].content }}")
    for key, value in extra.items():
        writer.add_string(key.replace("__", "."), value)
    for key, tensor in model.named_parameters():
        value = tensor.detach()
        if architecture == "gemma3" and key.endswith("norm.weight"):
            value = value + 1
        if architecture == "llama" and ".q_proj." in key:
            value = interleave(value, config.num_attention_heads)
        if architecture == "llama" and ".k_proj." in key:
            value = interleave(value, config.num_key_value_heads)
        array = value.numpy().astype(np.float32)
        if quantize is not None and array.ndim == 2 and array.shape[1] % 32 == 0:
            writer.add_tensor(
                gguf_name(key, architecture), gguf.quants.quantize(array, quantize), raw_dtype=quantize
            )
        else:
            writer.add_tensor(gguf_name(key, architecture), array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return model


@pytest.mark.parametrize("name", sorted(FAMILY))
def test_a_gguf_file_gives_the_model_back(name: str, tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    model = write_gguf(path, name)
    source = ModelSource(path=str(path))
    config = config_dict(source)
    assert layout_of(config, "gguf").parameters == sum(p.numel() for p in model.parameters())
    assert config["rms_norm_eps"] == model.config.rms_norm_eps
    loaded, tokenizer = load_source(source)
    for (key, left), right in zip(model.named_parameters(), loaded.parameters(), strict=True):
        # Gemma's norms are stored as w + 1, which costs them a rounding.
        gemma_norm = name == "gemma3_text" and key.endswith("norm.weight")
        torch.testing.assert_close(left, right, rtol=0, atol=1e-6 if gemma_norm else 0)
    ids = torch.randint(0, len(TOKENS) - 2, (2, 9), generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(loaded(ids).logits, model(ids).logits, rtol=1e-4, atol=1e-4)
    # It is a plain model: it saves and loads like any other, and makes a teacher.
    loaded.save_pretrained(tmp_path / "plain")
    tokenizer.save_pretrained(tmp_path / "plain")
    assert "quantization_config" not in json.loads((tmp_path / "plain" / "config.json").read_text())
    again, _ = load_source(ModelSource(path=str(tmp_path / "plain")))
    assert torch.equal(again(ids).logits, loaded(ids).logits)
    assert len(source_fingerprint(source)) == 64
    piece = "▁hello" if name == "gemma3_text" else "Ġhello"
    ids_of_text = tokenizer("hello hello", add_special_tokens=False).input_ids
    assert tokenizer.convert_ids_to_tokens(ids_of_text) == ["hello", piece]


@pytest.mark.parametrize(
    ("kind", "relative"), [("F16", 2**-11), ("BF16", 2**-8), ("Q8_0", 1 / 127), ("Q4_1", 1 / 15)]
)
def test_stored_types(kind: str, relative: float, tmp_path: Path) -> None:
    """Dequantized weights lie within the type's step of the original ones."""
    model = write_gguf(tmp_path / "m.gguf", "llama", quantize=gguf.GGMLQuantizationType[kind])
    loaded, _ = load_source(ModelSource(path=str(tmp_path / "m.gguf")))
    for (name, left), right in zip(model.named_parameters(), loaded.parameters(), strict=True):
        if left.dim() == 2 and left.shape[1] % 32 == 0:
            blocks = left.reshape(-1, 32)
            step = relative * (blocks.amax(1) - blocks.amin(1)).clamp_min(blocks.abs().amax(1))
            assert ((left - right).reshape(-1, 32).abs() <= step[:, None]).all(), name
            assert not torch.equal(left, right)
        else:
            assert torch.equal(left, right), name


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (
            lambda d: d.replace(b"blk.1.ffn_up.weight", b"blk.1.ffn_xx.weight"),
            r"blk\.1\.ffn_xx\.weight has no place",
        ),
        (
            lambda d: d.replace(b"output_norm.weight", b"rope_freqs.weights"),
            r"rope_freqs\.weights has no place",
        ),
        (
            lambda d: d.replace(struct.pack("<QQ", 64, 70), struct.pack("<QQ", 70, 64)),
            r"is \[64, 70\], not \[70, 64\]",
        ),
        (lambda d: d[:-4] + struct.pack("<f", float("nan")), "holds values that are not finite"),
    ],
)
def test_tensors_that_do_not_fit(damage: Any, words: str, sound: bytes, tmp_path: Path) -> None:
    (tmp_path / "m.gguf").write_bytes(damage(sound))
    with pytest.raises(ModelError, match=words):
        load_source(ModelSource(path=str(tmp_path / "m.gguf")))


def reference_tokenizer(*steps: Any) -> Tokenizer:
    """The same vocabulary as a tokenizers object, with a pre-tokenizer given step by step."""
    vocab = {token: i for i, token in enumerate(TOKENS)}
    merges = [tuple(m.split(" ")) for m in MERGES]
    reference = Tokenizer(models.BPE(vocab, merges))  # type: ignore[arg-type]
    reference.pre_tokenizer = pre_tokenizers.Sequence(list(steps))
    reference.decoder = decoders.ByteLevel()
    return reference


def test_digits_are_split_for_smollm_and_only_there(tmp_path: Path) -> None:
    text = "hello 1234 hello"
    level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    expected = {
        "smollm": reference_tokenizer(pre_tokenizers.Digits(individual_digits=True), level),
        "gpt-2": reference_tokenizer(level),
    }
    seen = []
    for pre, reference in expected.items():
        write_gguf(tmp_path / f"{pre}.gguf", "llama", pre)
        _, tokenizer = load_source(ModelSource(path=str(tmp_path / f"{pre}.gguf")))
        ids = tokenizer(text).input_ids
        assert ids == reference.encode(text).ids
        assert tokenizer.decode(ids) == text
        assert (tokenizer.bos_token, tokenizer.eos_token) == ("<|start|>", "<|end|>")
        assert tokenizer.chat_template == "{{ messages[0].content }}"
        seen.append(ids)
    assert TOKENS.index("123") in seen[1]
    assert TOKENS.index("123") not in seen[0]


def test_an_unknown_pre_tokenizer_is_refused(tmp_path: Path) -> None:
    write_gguf(tmp_path / "m.gguf", "llama", "mystery")
    with pytest.raises(ModelError, match=r"pre-tokenizer 'mystery' is not known; set model\.tokenizer"):
        load_source(ModelSource(path=str(tmp_path / "m.gguf")))


def test_rope_scaling_is_refused(tmp_path: Path) -> None:
    write_gguf(tmp_path / "m.gguf", "llama", llama__rope__scaling__type="yarn")
    with pytest.raises(ModelError, match="rope scaling cannot be restored"):
        config_dict(ModelSource(path=str(tmp_path / "m.gguf")))


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("gguf") / "m.gguf"
    write_gguf(path, "llama")
    return path.read_bytes()


def at(offset: int, value: bytes) -> Callable[[bytes], bytes]:
    return lambda data: data[:offset] + value + data[offset + len(value) :]


def after(text: bytes, skip: int, value: bytes) -> Callable[[bytes], bytes]:
    """Overwrite `skip` bytes after the end of a marker."""
    return lambda data: at(data.index(text) + len(text) + skip, value)(data)


def u32(value: int) -> bytes:
    return struct.pack("<I", value)


def u64(value: int) -> bytes:
    return struct.pack("<Q", value)


EMBEDDING = b"token_embd.weight"  # then rank u32, dims 2 x u64, type u32, offset u64
DAMAGE: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "empty": (lambda d: b"", "unreadable"),
    "magic": (at(0, b"GGML"), "magic b'GGML'"),
    "version 0": (at(4, u32(0)), "version 0"),
    "version 1": (at(4, u32(1)), "version 1"),
    "future version": (at(4, u32(99)), "version 99"),
    "big-endian": (at(4, struct.pack(">I", 3)), "version 50331648"),
    "tensor count -1": (at(8, b"\xff" * 8), "18446744073709551615 tensors"),
    "tensor count 2^63": (at(8, u64(1 << 63)), "9223372036854775808 tensors"),
    "pair count -1": (at(16, b"\xff" * 8), "18446744073709551615 pairs"),
    "key length": (at(24, b"\xff" * 8), "key 0 of 18446744073709551615 bytes"),
    "key not UTF-8": (at(32, b"\xff"), "key 0 is not UTF-8"),
    "value type": (after(b"llama.block_count", 0, u32(77)), "llama.block_count has unknown type 77"),
    "string length": (
        after(b"tokenizer.ggml.model", 4, b"\xff" * 8),
        "tokenizer.ggml.model of 18446744073709551615",
    ),
    "array 2^40": (after(b"tokenizer.ggml.tokens", 8, u64(1 << 40)), "tokenizer.ggml.tokens needs"),
    "number array 2^40": (
        after(b"tokenizer.ggml.token_type", 8, u64(1 << 40)),
        "tokenizer.ggml.token_type needs",
    ),
    "nested array": (
        after(b"tokenizer.ggml.tokens", 4, u32(9)),
        "tokenizer.ggml.tokens is an array of type 9",
    ),
    "duplicate key": (
        lambda d: d.replace(b"llama.attention.head_count\x04", b"llama.attention.key_length\x04"),
        "'llama.attention.key_length' is there twice",
    ),
    "zero dimensions": (after(EMBEDDING, 0, u32(0)), "token_embd.weight: 0 dimensions"),
    "five dimensions": (after(EMBEDDING, 0, u32(5)), "token_embd.weight: 5 dimensions"),
    "zero extent": (after(EMBEDDING, 4, u64(0)), "token_embd.weight: dimensions (0,"),
    "product overflow": (after(EMBEDDING, 4, u64(1 << 62)), "token_embd.weight: dimensions"),
    "tensor type": (after(EMBEDDING, 20, u32(250)), "token_embd.weight: unknown tensor type 250"),
    "unaligned offset": (after(EMBEDDING, 24, u64(8)), "token_embd.weight: offset 8 is unaligned"),
    "overlap": (after(b"output_norm.weight", 16, u64(0)), "overlaps"),
    "offset past the end": (after(b"output.weight", 24, u64(1 << 40)), "output.weight: ends at byte"),
    "duplicate tensor": (
        lambda d: d.replace(b"blk.1.attn_q.weight", b"blk.0.attn_q.weight"),
        "is there twice",
    ),
    "truncated data": (lambda d: d[:-64], "ends at byte"),
}


@pytest.mark.parametrize("case", sorted(DAMAGE))
def test_damaged_headers_are_refused(case: str, sound: bytes, tmp_path: Path) -> None:
    damage, words = DAMAGE[case]
    data = damage(sound)
    assert data != sound
    path = tmp_path / "m.gguf"
    path.write_bytes(data)
    message = refused_cheaply(lambda: read_gguf(path), ModelError)
    assert words in message
    assert str(path) in message
    assert "\n" not in message


def test_truncation_at_any_header_byte_is_refused(sound: bytes, tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    end = sound.index(EMBEDDING)
    for cut in {*range(1, 200), *range(200, end, 97)}:
        path.write_bytes(sound[:cut])
        with pytest.raises(ModelError):
            read_gguf(path)


@pytest.mark.parametrize("alignment", [0, 13, 1 << 31])
def test_alignments_that_cannot_be(alignment: int, tmp_path: Path) -> None:
    key = b"general.alignment"
    pair = u64(len(key)) + key + u32(4) + u32(alignment)
    path = tmp_path / "m.gguf"
    path.write_bytes(b"GGUF" + u32(3) + u64(0) + u64(1) + pair)
    with pytest.raises(ModelError, match=rf"general\.alignment {alignment} "):
        read_gguf(path)


def test_foreign_architectures_are_refused(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "rwkv7")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    with pytest.raises(
        ModelError, match="'rwkv7' is not supported; supported are llama, qwen2, qwen3, gemma3"
    ):
        config_from_gguf(read_gguf(tmp_path / "m.gguf"))
