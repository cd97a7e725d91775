"""Malformed folders: each is refused with file and byte (or field), quickly, and nothing crashes."""

from __future__ import annotations

import json
import os
import random
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from bitdistill.errors import ArtifactError, ModelError
from bitdistill.models.student import pack
from tests.cheap import refused_cheaply
from tests.models.test_student import save, trained_student

_native = pytest.importorskip("bitdistill.engine._native", reason="the native engine is not built")

LAYER = "model.layers.1.mlp.down_proj"


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("good") / "packed"
    save(pack(trained_student("qwen3"), "bfloat16"), folder, "packed", float_dtype="bfloat16")
    return folder


@pytest.fixture
def folder(good: Path, tmp_path: Path) -> Path:
    """A copy to damage, without a manifest's guard: sizes in it are brought up to date by `load`."""
    return Path(shutil.copytree(good, tmp_path / "model"))


def load(folder: Path) -> Any:
    manifest_path = folder / "bitdistill.json"
    if manifest_path.is_file():
        manifest = json.loads(manifest_path.read_text())
        for name, entry in manifest["files"].items():
            if (folder / name).is_file():
                entry["bytes"] = (folder / name).stat().st_size
        manifest_path.write_text(json.dumps(manifest))
    return _native.Model.load(str(folder), threads=1, layout="2bit", kv="float32", head="float")


def read(folder: Path) -> tuple[dict[str, Any], bytes]:
    blob = (folder / "model.safetensors").read_bytes()
    size = struct.unpack("<Q", blob[:8])[0]
    return json.loads(blob[8 : 8 + size]), blob[8 + size :]


def write(folder: Path, header: Any, data: bytes) -> None:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + data)


def refused(folder: Path, *words: str) -> None:
    message = refused_cheaply(lambda: load(folder), ArtifactError, ModelError)
    assert "\n" not in message
    assert ";" in message, "no remedy"
    for word in words:
        assert word in message, message


def test_the_good_folder_loads(folder: Path) -> None:
    assert load(folder).facts["packed"] is True


@pytest.mark.parametrize("length", [0, 1, 100_000_001, 2**31, 2**32, 2**63, 2**64 - 1])
def test_header_length(folder: Path, length: int) -> None:
    blob = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", length) + blob[8:])
    refused(folder, "model.safetensors", "byte" if length == 1 else "byte 0")


@pytest.mark.parametrize("size", [0, 1, 7, 8, 9, 100, 2000])
def test_truncated_file(folder: Path, size: int) -> None:
    blob = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(blob[:size])
    refused(folder, "model.safetensors", "byte")


def test_truncation_at_every_header_byte(folder: Path) -> None:
    blob = (folder / "model.safetensors").read_bytes()
    header = struct.unpack("<Q", blob[:8])[0]
    for size in range(8, 8 + header, 37):
        (folder / "model.safetensors").write_bytes(struct.pack("<Q", size - 7) + blob[8:size] + b" ")
        refused(folder, "model.safetensors", "byte")


Change = Callable[[dict[str, Any]], None]


def entry(name: str, **changes: Any) -> Change:
    return lambda header: header[name].update(changes)


def shifted(header: dict[str, Any]) -> None:
    header[f"{LAYER}.codes"]["data_offsets"] = [n + 1 for n in header[f"{LAYER}.codes"]["data_offsets"]]


def swapped(header: dict[str, Any]) -> None:
    header[f"{LAYER}.codes"]["data_offsets"] = header[f"{LAYER}.codes"]["data_offsets"][::-1]


def shared(header: dict[str, Any]) -> None:
    header["model.norm.weight"]["data_offsets"] = header["model.layers.0.input_layernorm.weight"][
        "data_offsets"
    ]


def without(name: str) -> Change:
    return lambda header: header.pop(name)


NORM = "model.norm.weight"
HEADERS: dict[str, tuple[Change, tuple[str, ...]]] = {
    "dtype unknown": (entry(NORM, dtype="F13"), (NORM, "F13")),
    "dtype integer": (entry(NORM, dtype="I16"), (NORM, "I16")),
    "codes as I8": (entry(f"{LAYER}.codes", dtype="I8"), (f"{LAYER}.codes", "I8")),
    "dtype a number": (entry(NORM, dtype=7), (NORM,)),
    "shape negative": (entry(NORM, shape=[-1]), (NORM, "shape")),
    "shape a float": (entry(NORM, shape=[44.5]), (NORM, "shape")),
    "shape a string": (entry(NORM, shape="44"), (NORM,)),
    "shape product overflows": (entry(NORM, shape=[2**40, 2**40]), (NORM, "overflow")),
    "shape beyond 64 bits": (entry(NORM, shape=[2**70]), (NORM, "shape")),
    "shape zero": (entry(NORM, shape=[0]), (NORM,)),
    "shape of another rank": (entry(NORM, shape=[44, 1]), (NORM, "[44, 1]")),
    "shape too short": (entry(NORM, shape=[43]), (NORM,)),
    "offsets past the end": (entry(NORM, data_offsets=[0, 2**40]), (NORM, "data_offsets")),
    "offsets negative": (entry(NORM, data_offsets=[-88, 0]), (NORM, "data_offsets")),
    "offsets of three": (entry(NORM, data_offsets=[0, 1, 2]), (NORM,)),
    "offsets shifted": (shifted, ("model.safetensors", "byte")),
    "offsets swapped": (swapped, (f"{LAYER}.codes", "data_offsets")),
    "offsets shared": (shared, ("overlaps",)),
    "extra key": (entry(NORM, more=1), (NORM,)),
    "tensor missing": (without(NORM), ("byte",)),
    "metadata no strings": (lambda h: h.update(__metadata__={"a": 1}), ("__metadata__",)),
}


@pytest.mark.parametrize("case", HEADERS)
def test_malformed_header(folder: Path, case: str) -> None:
    change, words = HEADERS[case]
    header, data = read(folder)
    change(header)
    write(folder, header, data)
    refused(folder, *words)


TEXTS: dict[str, bytes] = {
    "empty": b" ",
    "an array": b"[]",
    "a number": b"12",
    "not JSON": b"{]",
    "open": b'{"a": {',
    "duplicate": b"{%s, %s}" % ((b'"a": {"dtype":"U8","shape":[0],"data_offsets":[0,0]}',) * 2),
    "not UTF-8": b'{"\xff\xfe": 1}',
    "overlong UTF-8": b'{"\xc0\xaf": 1}',
    "surrogate": b'{"\\ud800": 1}',
    "deep": b"[" * 100_000,
    "deep objects": b'{"a":' * 50_000,
    "control character": b'{"a\n": 1}',
    "trailing text": b"{} x",
    "NaN": b'{"a": NaN}',
    "leading zero": b'{"a": 01}',
    "huge number": b'{"a": 1e999}',
    "long number": b'{"a": ' + b"1" * 5000 + b"}",
    "many values": b"[" + b"0," * 500_000 + b"0]",
    "NUL": b'{"a": 1\0}',
}


@pytest.mark.parametrize("case", TEXTS)
def test_malformed_json(folder: Path, case: str) -> None:
    _, data = read(folder)
    write(folder, TEXTS[case], data)
    refused(folder, "model.safetensors", "byte")
    (folder / "model.safetensors").unlink()
    (folder / "config.json").write_bytes(TEXTS[case])
    refused(folder, "config.json")


def patch(folder: Path, name: str, values: np.ndarray, at: int = 0) -> None:
    """Overwrite a tensor's bytes from element `at` on."""
    header, data = read(folder)
    begin = header[name]["data_offsets"][0] + at * values.itemsize
    raw = values.tobytes()
    write(folder, header, data[:begin] + raw + data[begin + len(raw) :])


@pytest.mark.parametrize("position", [0, 1, 17, 44 * 18 - 1])
@pytest.mark.parametrize("shift", [0, 2, 4, 6])
def test_code_three(folder: Path, position: int, shift: int) -> None:
    """in_features 70: 18 bytes a row, the last byte holds two codes and padding."""
    header, data = read(folder)
    byte = data[header[f"{LAYER}.codes"]["data_offsets"][0] + position]
    patch(folder, f"{LAYER}.codes", np.array([byte | (3 << shift)], np.uint8), position)
    refused(folder, f"{LAYER}.codes", "model.safetensors")


def test_padding_of_a_row(folder: Path) -> None:
    header, data = read(folder)
    byte = data[header[f"{LAYER}.codes"]["data_offsets"][0] + 17]
    patch(folder, f"{LAYER}.codes", np.array([byte & 0x0F], np.uint8), 17)
    refused(folder, f"{LAYER}.codes")


@pytest.mark.parametrize("scale", [0.0, -1.0, float("nan"), float("inf"), -float("inf")])
def test_scale(folder: Path, scale: float) -> None:
    patch(folder, f"{LAYER}.scale", np.array([scale], np.float32))
    refused(folder, f"{LAYER}.scale", "not positive and finite")


@pytest.mark.parametrize("name", ["model.embed_tokens.weight", NORM, f"{LAYER}.subln.weight"])
@pytest.mark.parametrize("bits", [0x7FC0, 0x7F80, 0xFF80])
def test_floats_that_are_not_finite(folder: Path, name: str, bits: int) -> None:
    patch(folder, name, np.array([bits], np.uint16), 5)
    refused(folder, name, "value 5 is not finite")


CONFIGS: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "family": ({"model_type": "mamba"}, ("model_type", "mamba")),
    "no family": ({"model_type": None}, ("model_type",)),
    "layers 0": ({"num_hidden_layers": 0}, ("num_hidden_layers",)),
    "layers huge": ({"num_hidden_layers": 10**6}, ("num_hidden_layers",)),
    "layers more": ({"num_hidden_layers": 4, "layer_types": None}, ("model.layers.3",)),
    "layers fewer": ({"num_hidden_layers": 2, "layer_types": None}, ("model.layers.2",)),
    "hidden text": ({"hidden_size": "44"}, ("hidden_size",)),
    "hidden float": ({"hidden_size": 44.0}, ("hidden_size",)),
    "hidden true": ({"hidden_size": True}, ("hidden_size",)),
    "hidden 2^40": ({"hidden_size": 2**40}, ("hidden_size",)),
    "vocabulary": ({"vocab_size": 102}, ("model.embed_tokens.weight",)),
    "heads": ({"num_attention_heads": 3, "num_key_value_heads": 2}, ("num_attention_heads",)),
    "head size odd": ({"head_dim": 17}, ("head_dim",)),
    "window": ({"layer_types": ["sliding_attention"]}, ("layer_types",)),
    "activation": ({"hidden_act": "relu"}, ("activation",)),
    "rope": ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, ("rope_type", "yarn")),
    "eps": ({"rms_norm_eps": -1.0}, ("rms_norm_eps",)),
    "tied": ({"tie_word_embeddings": True}, ("lm_head",)),
}


@pytest.mark.parametrize("case", CONFIGS)
def test_config_that_does_not_fit(folder: Path, case: str) -> None:
    changes, words = CONFIGS[case]
    config = json.loads((folder / "config.json").read_text())
    config.update(changes)
    (folder / "config.json").write_text(json.dumps(config))
    refused(folder, *words)


def test_plans(folder: Path) -> None:
    original = json.loads((folder / "config.json").read_text())

    def changed(change: Change, *words: str) -> None:
        config = json.loads(json.dumps(original))
        change(config["quantization_config"])
        (folder / "config.json").write_text(json.dumps(config))
        refused(folder, *words)

    replace = "model.layers.0.self_attn.q_proj"
    changed(lambda q: q.update(format_version=2), "format_version")
    changed(lambda q: q.update(packed=False), "latent")
    changed(lambda q: q.update(quant_method="bitnet"), "bitnet")
    changed(lambda q: q.update(plan=None), "plan")
    changed(lambda q: q["plan"].update(quantize_activations="yes"), "quantize_activations")
    changed(lambda q: q["plan"]["replace"].pop(replace), replace)
    changed(lambda q: q["plan"]["replace"][replace].update(in_features=45), replace)
    changed(lambda q: q["plan"]["replace"][replace].update(subln=True), replace)
    changed(
        lambda q: q["plan"]["replace"].update({"model.layers.9.x": q["plan"]["replace"][replace]}), "layers.9"
    )


def test_missing_and_foreign_files(folder: Path, tmp_path: Path) -> None:
    refused(tmp_path / "nowhere", "config.json")
    kept = (folder / "bitdistill.json").read_bytes()
    (folder / "bitdistill.json").unlink()
    refused(folder, "bitdistill.json", "missing")
    (folder / "bitdistill.json").write_bytes(kept.replace(b'"format_version": 1', b'"format_version": 9'))
    refused(folder, "format_version")
    (folder / "bitdistill.json").write_bytes(kept)
    shutil.move(folder / "model.safetensors", tmp_path / "elsewhere.safetensors")
    refused(folder, "model.safetensors")
    os.symlink(tmp_path / "elsewhere.safetensors", folder / "model.safetensors")
    refused(folder, "model.safetensors")


@pytest.mark.parametrize(
    "name",
    [
        "../model.safetensors",
        "/etc/passwd",
        "a/b.safetensors",
        "x.bin",
        "a\0.safetensors",
        "none.safetensors",
        "",
    ],
)
def test_index_that_leaves_the_folder(folder: Path, name: str) -> None:
    shutil.move(folder / "model.safetensors", folder / "part.safetensors")
    header, _ = read_from(folder / "part.safetensors")
    index = {"weight_map": {key: name for key in header if key != "__metadata__"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "bitdistill.json").write_text(
        json.dumps({**json.loads((folder / "bitdistill.json").read_text()), "files": {}})
    )
    refused(folder, "index.json", "not a plain file")


def read_from(path: Path) -> tuple[dict[str, Any], bytes]:
    blob = path.read_bytes()
    size = struct.unpack("<Q", blob[:8])[0]
    return json.loads(blob[8 : 8 + size]), blob[8 + size :]


def test_shards(folder: Path) -> None:
    """A good index loads; a tensor in two shards, or one that the index misses, is refused."""
    shutil.move(folder / "model.safetensors", folder / "part.safetensors")
    header, _ = read_from(folder / "part.safetensors")
    manifest = json.loads((folder / "bitdistill.json").read_text())
    (folder / "bitdistill.json").write_text(json.dumps({**manifest, "files": {}}))
    names = [key for key in header if key != "__metadata__"]
    path = folder / "model.safetensors.index.json"
    path.write_text(json.dumps({"weight_map": dict.fromkeys(names, "part.safetensors")}))
    assert load(folder).facts["packed"]
    path.write_text(json.dumps({"weight_map": dict.fromkeys(names[1:], "part.safetensors")}))
    refused(folder, names[0])
    shutil.copy(folder / "part.safetensors", folder / "twin.safetensors")
    mapping = {**dict.fromkeys(names, "part.safetensors"), names[0]: "twin.safetensors"}
    path.write_text(json.dumps({"weight_map": mapping}))
    refused(folder, "two shards")
    shutil.copy(folder / "part.safetensors", folder / "model.safetensors")
    refused(folder, "both")


def test_random_damage(folder: Path) -> None:
    """Bytes of the header flipped at random: the folder loads or is refused with a typed error."""
    blob = (folder / "model.safetensors").read_bytes()
    header = struct.unpack("<Q", blob[:8])[0]
    rng = random.Random(5)
    for _ in range(400):
        damaged = bytearray(blob)
        for _ in range(rng.choice((1, 1, 2, 8))):
            damaged[rng.randrange(8 + header)] = rng.choice(
                (0, 34, 44, 48, 57, 91, 123, 125, 255, rng.randrange(256))
            )
        (folder / "model.safetensors").write_bytes(damaged)
        try:
            load(folder)
        except (ArtifactError, ModelError):
            continue
