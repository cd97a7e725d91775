"""The bounded GGUF header reader: real headers, and refusal of malformed ones with the byte offset."""

from __future__ import annotations

import struct
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bitdistill.errors import ModelError
from bitdistill.models.families import layout_of
from bitdistill.planning.gguf_header import read_gguf_config

STRING, ARRAY, UINT32, FLOAT32 = 8, 9, 4, 6


def text(value: str | bytes) -> bytes:
    raw = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(raw)) + raw


def pair(key: str, kind: int, value: bytes) -> bytes:
    return text(key) + struct.pack("<I", kind) + value


def u32(key: str, value: int) -> bytes:
    return pair(key, UINT32, struct.pack("<I", value))


def tensor(name: str, *dimensions: int) -> bytes:
    return text(name) + struct.pack(f"<I{len(dimensions)}QIQ", len(dimensions), *dimensions, 0, 0)


PAIRS = [
    pair("general.architecture", STRING, text("llama")),
    u32("llama.embedding_length", 48),
    u32("llama.feed_forward_length", 96),
    u32("llama.block_count", 3),
    u32("llama.attention.head_count", 4),
    u32("llama.attention.head_count_kv", 2),
    u32("llama.context_length", 256),
    pair("llama.rope.freq_base", FLOAT32, struct.pack("<f", 1e5)),
    pair("tokenizer.ggml.tokens", ARRAY, struct.pack("<IQ", STRING, 2) + text("a") + text("b")),
    pair("tokenizer.ggml.scores", ARRAY, struct.pack("<IQ", FLOAT32, 2) + bytes(8)),
]
TENSORS = [tensor("token_embd.weight", 48, 320), tensor("blk.0.attn_q.weight", 48, 48)]


def gguf(pairs: list[bytes] = PAIRS, tensors: list[bytes] = TENSORS, version: int = 3) -> bytes:
    head = b"GGUF" + struct.pack("<IQQ", version, len(tensors), len(pairs))
    return head + b"".join(pairs) + b"".join(tensors)


@pytest.fixture
def read(tmp_path: Path):
    def _read(content: bytes) -> dict:
        path = tmp_path / "model.gguf"
        path.write_bytes(content)
        return read_gguf_config(path)

    return _read


def test_config_of_a_header(read):
    config = read(gguf())
    layout = layout_of(config, "header")
    assert (layout.family, layout.layers, layout.hidden, layout.vocab) == ("llama", 3, 48, 320)
    assert (layout.kv_heads, layout.tied, config["rope_theta"]) == (2, True, 1e5)
    assert layout.ternary_parameters == 3 * (2 * 48 * 48 + 2 * 48 * 24 + 3 * 48 * 96)


def test_head_and_biases_are_read_from_the_tensor_names(read):
    more = [tensor("output.weight", 48, 320), tensor("blk.0.attn_q.bias", 48)]
    config = read(gguf(tensors=TENSORS + more))
    assert config["tie_word_embeddings"] is False
    assert config["attention_bias"] is True


def test_agrees_with_the_gguf_package(read, tmp_path):
    writer = pytest.importorskip("gguf").GGUFWriter(tmp_path / "written.gguf", "qwen3")
    numpy = pytest.importorskip("numpy")
    writer.add_embedding_length(64)
    writer.add_feed_forward_length(128)
    writer.add_block_count(2)
    writer.add_head_count(4)
    writer.add_head_count_kv(1)
    writer.add_key_length(16)
    writer.add_token_list(["a", "b", "c"])
    writer.add_tensor("token_embd.weight", numpy.zeros((96, 64), numpy.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    layout = layout_of(read_gguf_config(tmp_path / "written.gguf"), "written")
    assert (layout.family, layout.vocab, layout.head_dim, layout.kv_heads) == ("qwen3", 96, 16, 1)


def with_pair(*extra: bytes) -> bytes:
    return gguf(pairs=[*PAIRS, *extra])


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", "the file ends before"),
        (b"GGML" + bytes(64), "byte 0: not a GGUF file"),
        (gguf(version=0), "GGUF version 0"),
        (gguf(version=1), "GGUF version 1"),
        (gguf(version=4), "GGUF version 4"),
        (gguf(version=3 << 24), "GGUF version"),
        (b"GGUF" + struct.pack("<IQQ", 3, 2**63, 1), "tensor count"),
        (b"GGUF" + struct.pack("<Iqq", 3, 0, -1), "key count"),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + struct.pack("<Q", 2**64 - 1), "string length"),
        (with_pair(pair("x", STRING, struct.pack("<Q", 2**64 - 1))), "string length"),
        (with_pair(pair("x", ARRAY, struct.pack("<IQ", FLOAT32, 2**40))), "array length"),
        (with_pair(pair("x", ARRAY, struct.pack("<IQ", STRING, 2**21) + bytes(64))), "exceeds 1048576"),
        (with_pair(pair("x", ARRAY, struct.pack("<IQ", ARRAY, 1) + bytes(12))), "array of type 9"),
        (with_pair(pair("x", 13, b"")), "unknown value type 13"),
        (with_pair(PAIRS[0]), "is there twice"),
        (with_pair(pair("x", STRING, text(b"\xff\xfe"))), "not UTF-8"),
        (gguf(tensors=[text("t") + struct.pack("<I", 0)]), "has 0 dimensions"),
        (gguf(tensors=[text("t") + struct.pack("<I", 5)]), "has 5 dimensions"),
        (gguf(pairs=PAIRS[1:]), "general.architecture None is not supported"),
        (
            gguf(pairs=[pair("general.architecture", STRING, text("rwkv")), *PAIRS[1:]]),
            "'rwkv' is not supported",
        ),
    ],
)
def test_malformed_headers_are_refused(read, content, expected):
    started = time.perf_counter()
    with pytest.raises(ModelError, match=expected) as caught:
        read(content)
    assert time.perf_counter() - started < 0.1
    assert "\n" not in str(caught.value)


def test_every_truncation_is_refused(read):
    whole = gguf()
    for end in range(len(whole)):
        with pytest.raises(ModelError):
            read(whole[:end])


@settings(max_examples=300, deadline=None)
@given(st.integers(0, len(gguf()) - 1), st.integers(0, 255))
def test_any_changed_byte_gives_a_config_or_a_typed_error(tmp_path_factory, position, value):
    content = bytearray(gguf())
    content[position] = value
    path = tmp_path_factory.getbasetemp() / "flipped.gguf"
    path.write_bytes(content)
    try:
        layout_of(read_gguf_config(path), str(path))
    except ModelError as error:
        assert "\n" not in str(error)
