"""The header of a GGUF file, read with every length checked against the file before it is believed.

The usual readers trust lengths (an array of 2^40 elements hangs them), so this one goes first. It also serves
`bitdistill plan`, which needs the configuration without the weights.
"""

from __future__ import annotations

import math
import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bitdistill.errors import MissingDependencyError, ModelError
from bitdistill.models.families import FAMILIES, MAX_LAYERS, Family

# GGUF value types: struct format of the fixed-size ones; 8 is a string, 9 an array.
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
I2_S = 36
"""bitnet.cpp's ternary type: 4 weights a byte over the whole tensor, then 32 bytes that begin with its scale."""
_MAX_STRING = 1 << 24
_MAX_KEY = 1 << 16
_MAX_ALIGNMENT = 1 << 20
_MAX_LIST = 1024


@dataclass(frozen=True)
class GgufTensor:
    """One entry of the tensor table; dims are fastest first, offset counts from the data section."""

    name: str
    dims: tuple[int, ...]
    ggml_type: int
    offset: int


@dataclass(frozen=True)
class GgufHeader:
    """Metadata (arrays only as their length, under the same key) and the tensor table."""

    path: Path
    metadata: dict[str, Any]
    tensors: dict[str, GgufTensor]
    data_start: int
    """Byte of the file from which tensor offsets count."""
    lists: dict[str, tuple[Any, ...]]
    """Arrays of numbers with at most 1024 elements (one a layer, such as which have a sliding window)."""


class _Cursor:
    """Reads forward in the mapped file; each step is checked."""

    def __init__(self, path: Path, data: mmap.mmap) -> None:
        self.path, self.data, self.at = path, data, 0
        self.lists: dict[str, tuple[Any, ...]] = {}

    def fail(self, what: str) -> ModelError:
        return ModelError(f"{self.path}: {what} at byte {self.at}; the GGUF file is damaged, fetch it again")

    def need(self, count: int, what: str) -> None:
        if count > len(self.data) - self.at:
            raise self.fail(f"{what} needs {count} bytes, {len(self.data) - self.at} are left")

    def scalar(self, letter: str, what: str) -> Any:
        size = struct.calcsize("<" + letter)
        self.need(size, what)
        (value,) = struct.unpack_from("<" + letter, self.data, self.at)
        self.at += size
        return value

    def string(self, limit: int, what: str) -> str:
        length = self.scalar("Q", what)
        if length > limit:
            raise self.fail(f"{what} of {length} bytes")
        self.need(length, what)
        raw = self.data[self.at : self.at + length]
        try:
            text = raw.decode("utf-8")
        except UnicodeDecodeError:
            raise self.fail(f"{what} is not UTF-8") from None
        self.at += length
        return text

    def value(self, kind: int, what: str) -> Any:
        if kind in _SCALARS:
            return self.scalar(_SCALARS[kind], what)
        if kind == _STRING:
            return self.string(_MAX_STRING, what)
        if kind != _ARRAY:
            raise self.fail(f"{what} has unknown type {kind}")
        element, count = self.scalar("I", what), self.scalar("Q", what)
        if element in _SCALARS:
            size = struct.calcsize("<" + _SCALARS[element]) * count
            self.need(size, what)
            if count <= _MAX_LIST:
                self.lists[what] = struct.unpack_from(f"<{count}{_SCALARS[element]}", self.data, self.at)
            self.at += size
        elif element == _STRING:
            self.need(8 * count, what)
            for _ in range(count):
                length = self.scalar("Q", what)
                self.need(length, what)
                self.at += length
        else:
            raise self.fail(f"{what} is an array of type {element}")
        return count


def read_gguf(path: Path) -> GgufHeader:
    """Read and check the header of a GGUF file (version 2 or 3, little-endian).

    Raises:
        ModelError: damaged or hostile; the message names file, field and byte.
        MissingDependencyError: the `gguf` package (sizes of tensor types) is not installed.
    """
    try:
        with path.open("rb") as handle, mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _read(_Cursor(path, data))
    except (OSError, ValueError) as error:
        raise ModelError(f"{path}: unreadable ({error}); fetch the GGUF file again") from error


def _read(cursor: _Cursor) -> GgufHeader:
    cursor.need(24, "the header")
    if cursor.data[:4] != b"GGUF":
        raise cursor.fail(f"magic {bytes(cursor.data[:4])!r} instead of b'GGUF'")
    cursor.at = 4
    version = cursor.scalar("I", "version")
    if version not in (2, 3):
        raise cursor.fail(f"version {version}; 2 and 3 are read")
    tensor_count, pair_count = cursor.scalar("Q", "tensor count"), cursor.scalar("Q", "metadata count")
    # The smallest tensor entry and metadata pair take 24 and 13 bytes.
    cursor.need(tensor_count * 24 + pair_count * 13, f"{tensor_count} tensors and {pair_count} pairs")
    metadata: dict[str, Any] = {}
    for index in range(pair_count):
        key = cursor.string(_MAX_KEY, f"key {index}")
        if key in metadata:
            raise cursor.fail(f"key {key!r} is there twice")
        metadata[key] = cursor.value(cursor.scalar("I", key), key)
    tensors: dict[str, GgufTensor] = {}
    for index in range(tensor_count):
        tensor = _tensor(cursor, index)
        if tensor.name in tensors:
            raise cursor.fail(f"tensor {tensor.name!r} is there twice")
        tensors[tensor.name] = tensor
    start = _check_extents(cursor, metadata, list(tensors.values()))
    return GgufHeader(cursor.path, metadata, tensors, start, cursor.lists)


def _tensor(cursor: _Cursor, index: int) -> GgufTensor:
    name = cursor.string(_MAX_KEY, f"name of tensor {index}")
    rank = cursor.scalar("I", f"{name}: rank")
    if not 1 <= rank <= 4:
        raise cursor.fail(f"{name}: {rank} dimensions")
    dims = tuple(cursor.scalar("Q", f"{name}: dims") for _ in range(rank))
    if min(dims) < 1 or math.prod(dims) >= 1 << 48:
        raise cursor.fail(f"{name}: dimensions {dims}")
    return GgufTensor(name, dims, cursor.scalar("I", f"{name}: type"), cursor.scalar("Q", f"{name}: offset"))


def _check_extents(cursor: _Cursor, metadata: dict[str, Any], tensors: list[GgufTensor]) -> int:
    """Check that every tensor lies aligned inside the file and overlaps no other; gives the data's start."""
    alignment = metadata.get("general.alignment", 32)
    if not isinstance(alignment, int) or not 8 <= alignment <= _MAX_ALIGNMENT or alignment & (alignment - 1):
        raise cursor.fail(f"general.alignment {alignment!r}")
    start = -(-cursor.at // alignment) * alignment
    sizes, end, before = type_sizes(), 0, ""
    for tensor in sorted(tensors, key=lambda t: t.offset):
        if tensor.ggml_type not in sizes:
            raise cursor.fail(f"{tensor.name}: unknown tensor type {tensor.ggml_type}")
        block, size = sizes[tensor.ggml_type]
        if tensor.dims[0] % block:
            raise cursor.fail(f"{tensor.name}: rows of {tensor.dims[0]} do not fill blocks of {block}")
        tail = 32 if tensor.ggml_type == I2_S else 0
        if tensor.offset % alignment or tensor.offset < end:
            raise cursor.fail(f"{tensor.name}: offset {tensor.offset} is unaligned or overlaps {before!r}")
        end, before = tensor.offset + math.prod(tensor.dims) // block * size + tail, tensor.name
        if start + end > len(cursor.data):
            raise cursor.fail(f"{tensor.name}: ends at byte {start + end}, the file has {len(cursor.data)}")
    return start


def type_sizes() -> dict[int, tuple[int, int]]:
    """Tensor type -> (elements, bytes) of a block; I2_S has 32 bytes more a tensor."""
    try:
        from gguf.constants import GGML_QUANT_SIZES
    except ImportError:
        raise MissingDependencyError(
            'reading GGUF files needs two more packages: pip install "bitdistill[gguf]"'
        ) from None
    return {int(kind): sizes for kind, sizes in GGML_QUANT_SIZES.items()} | {I2_S: (128, 32)}


# The files do not name the activation: each architecture has its own (llama.cpp's bitnet, bitnet.cpp's others).
_BITNET_ACTIVATIONS = {"bitnet": "silu", "bitnet-25": "relu2", "bitnet-b1.58": "relu2"}


def config_from_gguf(header: GgufHeader) -> dict[str, Any]:
    """The config.json dict that a GGUF header describes.

    Raises:
        ModelError: an unsupported architecture, a missing key, or rope scaling that cannot be restored.
    """
    metadata, tensors, where = header.metadata, header.tensors, header.path
    architecture = metadata.get("general.architecture")
    families = {f.gguf_architecture: f for f in FAMILIES.values()}
    families |= dict.fromkeys(_BITNET_ACTIVATIONS, FAMILIES["bitnet"])
    family = families.get(str(architecture))
    if family is None:
        supported = ", ".join(families)
        raise ModelError(
            f"{where}: GGUF architecture {architecture!r} is not supported; supported are {supported}"
        )
    scaling = metadata.get(f"{architecture}.rope.scaling.type", "none")
    plain = scaling == "none" or (
        scaling == "linear" and _is_one(metadata, f"{architecture}.rope.scaling.factor")
    )
    if not plain or "rope_freqs.weight" in tensors:
        raise ModelError(
            f"{where}: rope scaling cannot be restored from GGUF; use the Hugging Face folder instead"
        )

    def key(name: str) -> Any:
        full = f"{architecture}.{name}"
        if full not in metadata:
            raise ModelError(f"{where}: metadata key {full} is missing; use the Hugging Face folder instead")
        return metadata[full]

    if "token_embd.weight" not in tensors or len(tensors["token_embd.weight"].dims) != 2:
        raise ModelError(f"{where}: no token_embd.weight of two dimensions; not a language model")
    heads, hidden = key("attention.head_count"), key("embedding_length")
    config = {
        "model_type": family.model_type,
        "architectures": [family.architecture],
        "vocab_size": tensors["token_embd.weight"].dims[1],
        "hidden_size": hidden,
        "intermediate_size": key("feed_forward_length"),
        "num_hidden_layers": key("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": metadata.get(f"{architecture}.attention.head_count_kv", heads),
        "head_dim": _head_dim(metadata, str(architecture), hidden, heads),
        "max_position_embeddings": key("context_length"),
        "rms_norm_eps": _short(key("attention.layer_norm_rms_epsilon")),
        "rope_parameters": _rope(family, metadata, str(architecture)),
        "tie_word_embeddings": "output.weight" not in tensors,
        "attention_bias": "blk.0.attn_q.bias" in tensors,
        "mlp_bias": "blk.0.ffn_up.bias" in tensors,
        "bos_token_id": metadata.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": metadata.get("tokenizer.ggml.eos_token_id"),
        "pad_token_id": metadata.get("tokenizer.ggml.padding_token_id"),
    }
    if family.model_type == "bitnet":
        config["hidden_act"] = _BITNET_ACTIVATIONS[str(architecture)]
    if family.model_type == "gemma3_text":
        config["sliding_window"] = key("attention.sliding_window")
        config["layer_types"] = _layer_types(header, config["num_hidden_layers"])
        config["final_logit_softcapping"] = metadata.get(f"{architecture}.final_logit_softcapping")
        # Not in the file: the head size, but hidden / heads for the 27B model (62 layers), as in llama.cpp.
        largest = config["num_hidden_layers"] == 62
        config["query_pre_attn_scalar"] = hidden // heads if largest else config["head_dim"]
    return config


def _layer_types(header: GgufHeader, layers: Any) -> list[str]:
    """Which layers have a window: a list, or every layer but each sixth (or each Nth)."""
    name = f"{header.metadata['general.architecture']}.attention.sliding_window_pattern"
    each = header.metadata.get(name, 6)
    if not isinstance(layers, int) or not 0 < layers <= MAX_LAYERS:
        return []  # the layout refuses it
    sliding = header.lists.get(name) or tuple((i + 1) % max(each, 1) != 0 for i in range(layers))
    if len(sliding) != layers:
        raise ModelError(
            f"{header.path}: {name} has {len(sliding)} entries for {layers} layers; the file is damaged"
        )
    return ["sliding_attention" if flag else "full_attention" for flag in sliding]


def _is_one(metadata: dict[str, Any], key: str) -> bool:
    """Linear rope scaling by 1 (as llama.cpp writes it for BitNet) is none."""
    return metadata.get(key, 1.0) == 1.0


def _short(value: float) -> float:
    """The shortest decimal of a float32 (1e-05, not 9.999999747378752e-06): what the original config said."""
    return float(f"{value:.7g}")


def _head_dim(metadata: dict[str, Any], architecture: str, hidden: Any, heads: Any) -> Any:
    for name in ("attention.key_length", "rope.dimension_count"):
        if f"{architecture}.{name}" in metadata:
            return metadata[f"{architecture}.{name}"]
    return hidden // heads if isinstance(heads, int) and heads else None


def _rope(family: Family, metadata: dict[str, Any], architecture: str) -> dict[str, Any]:
    theta = _short(metadata.get(f"{architecture}.rope.freq_base", family.defaults["rope_theta"]))
    if family.model_type != "gemma3_text":
        return {"rope_type": "default", "rope_theta": theta}
    local = _short(metadata.get(f"{architecture}.rope.freq_base_swa", 10_000.0))
    return {
        "full_attention": {"rope_type": "default", "rope_theta": theta},
        "sliding_attention": {"rope_type": "default", "rope_theta": local},
    }
