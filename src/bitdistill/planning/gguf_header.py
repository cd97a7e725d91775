"""Architecture of a GGUF file from its metadata keys: a small, bounded reader (no weights, no package).

Layout read here (GGUF version 2 and 3, little-endian): magic, u32 version, u64 tensor count, u64 key count,
then key-value pairs (string key, u32 type, value), then tensor infos (string name, u32 dimensions, u64 each,
u32 type, u64 offset). Every count and length is checked against the bytes that are left.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

from bitdistill.errors import ModelError
from bitdistill.models.families import FAMILIES

MAX_KEYS = 4096
MAX_TENSORS = 65_536
MAX_STRING = 1 << 20
MAX_ELEMENTS = 4_000_000

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9

# config.json key <- metadata key without the architecture's prefix
_KEYS = {
    "hidden_size": "embedding_length",
    "intermediate_size": "feed_forward_length",
    "num_hidden_layers": "block_count",
    "num_attention_heads": "attention.head_count",
    "num_key_value_heads": "attention.head_count_kv",
    "head_dim": "attention.key_length",
    "vocab_size": "vocab_size",
    "max_position_embeddings": "context_length",
    "rope_theta": "rope.freq_base",
    "sliding_window": "attention.sliding_window",
}


class _Reader:
    """Little-endian values from a file; every error names file and byte offset."""

    def __init__(self, handle: BinaryIO, path: Path, size: int) -> None:
        self.handle, self.path, self.size = handle, path, size

    def fail(self, problem: str) -> ModelError:
        return ModelError(f"{self.path}: byte {self.handle.tell()}: {problem}; get the file again")

    def take(self, count: int) -> bytes:
        if count > self.size - self.handle.tell():
            raise self.fail(f"{count} bytes wanted, the file ends before")
        return self.handle.read(count)

    def scalar(self, code: str) -> Any:
        return struct.unpack(f"<{code}", self.take(struct.calcsize(code)))[0]

    def count(self, limit: int, what: str) -> int:
        value = int(self.scalar("Q"))
        if value > limit:
            raise self.fail(f"{what} {value} exceeds {limit}")
        return value

    def string(self) -> str:
        raw = self.take(self.count(MAX_STRING, "string length"))
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError:
            raise self.fail("a string is not UTF-8") from None

    def value(self, kind: int) -> Any:
        """A metadata value; arrays are skipped and given as their length, they can hold the vocabulary."""
        if kind in _SCALARS:
            return self.scalar(_SCALARS[kind])
        if kind == _STRING:
            return self.string()
        if kind != _ARRAY:
            raise self.fail(f"unknown value type {kind}")
        inner = int(self.scalar("I"))
        length = self.count(MAX_ELEMENTS, "array length")
        if inner in _SCALARS:
            self.skip(length * struct.calcsize(_SCALARS[inner]))
        elif inner == _STRING:
            for _ in range(length):
                self.skip(self.count(MAX_STRING, "string length"))
        else:
            raise self.fail(f"array of type {inner} is not supported")
        return length

    def skip(self, count: int) -> None:
        if count > self.size - self.handle.tell():
            raise self.fail(f"{count} bytes wanted, the file ends before")
        self.handle.seek(count, 1)


def read_gguf_config(path: Path) -> dict[str, Any]:
    """The config.json keys that fix a GGUF model's shapes (`models.families` reads them).

    Raises:
        ModelError: not a GGUF file of version 2 or 3, cut off or malformed (with the byte offset), or an
            architecture that is not supported.
    """
    try:
        with path.open("rb") as handle:
            return _config(_Reader(handle, path, path.stat().st_size))
    except OSError as error:
        raise ModelError(f"{path}: cannot be read ({error.strerror}); check the path") from None


def _config(reader: _Reader) -> dict[str, Any]:
    if reader.take(4) != b"GGUF":
        raise ModelError(f"{reader.path}: byte 0: not a GGUF file (wrong magic); check the path")
    version = reader.scalar("I")
    if version not in (2, 3):
        raise reader.fail(f"GGUF version {version}, this reads 2 and 3")
    tensors = reader.count(MAX_TENSORS, "tensor count")
    metadata: dict[str, Any] = {}
    for _ in range(reader.count(MAX_KEYS, "key count")):
        key = reader.string()
        if key in metadata:
            raise reader.fail(f"key {key!r} is there twice")
        metadata[key] = reader.value(int(reader.scalar("I")))
    shapes: dict[str, list[int]] = {}
    for _ in range(tensors):
        name = reader.string()
        dimensions = int(reader.scalar("I"))
        if not 1 <= dimensions <= 4:
            raise reader.fail(f"tensor {name!r} has {dimensions} dimensions")
        shapes[name] = [int(reader.scalar("Q")) for _ in range(dimensions)]
        reader.skip(4 + 8)
    return _translate(metadata, shapes, reader.path)


def _translate(metadata: Mapping[str, Any], shapes: Mapping[str, list[int]], path: Path) -> dict[str, Any]:
    architecture = metadata.get("general.architecture")
    known = {family.gguf_architecture: name for name, family in FAMILIES.items()}
    if not isinstance(architecture, str) or architecture not in known:
        raise ModelError(
            f"{path}: general.architecture {architecture!r} is not supported; known are {', '.join(known)}"
        )
    config: dict[str, Any] = {"model_type": known[architecture]}
    for key, suffix in _KEYS.items():
        value = metadata.get(f"{architecture}.{suffix}")
        if value is not None:
            config[key] = value
    # Dimensions are stored innermost first: the embedding is [hidden, vocabulary].
    embedding = shapes.get("token_embd.weight")
    if embedding and len(embedding) == 2:
        config["vocab_size"] = embedding[1]
    config["tie_word_embeddings"] = "output.weight" not in shapes
    config["attention_bias"] = "blk.0.attn_q.bias" in shapes
    config["mlp_bias"] = "blk.0.ffn_up.bias" in shapes
    return config
