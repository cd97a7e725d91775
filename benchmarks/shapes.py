"""Models of a given shape with random weights: as a packed student, and as GGUF files of llama.cpp's types.

Speed does not depend on the values, but for the rows that a screened head computes again: real weights are the easier
case there, and `source` takes them from a model folder. Without one, a single layer is drawn and stored in every
layer's place; weights of block linears are ternary (scale times code), embeddings and norms are Gaussian.
"""

from __future__ import annotations

import ctypes
import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from safetensors.numpy import save_file

from bitdistill import artifact
from bitdistill.config import RefineConfig
from bitdistill.interop import gguf_export
from bitdistill.interop.gguf_architecture import Architecture
from bitdistill.models import contents
from bitdistill.models.families import layout_of
from bitdistill.models.surgery import plan as make_plan

ASSETS = Path(__file__).parents[1] / "src/bitdistill/assets/configs"
SHAPES = {
    "135M": "HuggingFaceTB--SmolLM2-135M-Instruct",
    "270M": "google--gemma-3-270m",
    "0.6B": "Qwen--Qwen3-0.6B",
    "1.7B": "Qwen--Qwen3-1.7B",
    "4B": "Qwen--Qwen3-4B",
}
SCALE = 0.02
# Name -> (ftype of llama.h, type of the token embedding or None: llama.cpp's choice).
GGUF_TYPES = {
    "Q8_0": (7, None),
    "Q4_0": (2, None),
    "TQ1_0": (36, None),
    "TQ2_0": (37, None),
    "TQ2_0-eQ4_K": (37, 12),
}


def config_of(shape: str) -> dict[str, Any]:
    """The config.json of a shape."""
    config: dict[str, Any] = json.loads((ASSETS / f"{SHAPES[shape]}.json").read_text("utf-8"))
    return config


def gguf_types(shape: str) -> list[str]:
    """The quantized types that llama.cpp has for this shape: its ternary and K types need columns in 256s."""
    config = config_of(shape)
    whole = config["hidden_size"] % 256 == 0 and config["intermediate_size"] % 256 == 0
    return [name for name in GGUF_TYPES if whole or name in ("Q8_0", "Q4_0")]


def _codes(rng: np.random.Generator, rows: int, cols: int) -> np.ndarray:
    """Ternary codes, int8 [rows, cols]."""
    return rng.integers(-1, 2, (rows, cols), dtype=np.int8)


def _layer_key(name: str) -> str:
    parts = name.split(".")
    return ".".join(parts[3:]) if name.startswith("model.layers.") else name


def real_tensors(source: Path | None) -> Callable[[str], np.ndarray | None]:
    """float32 tensors of a model folder by name; without a folder, None for each."""
    if source is None:
        return lambda name: None
    from safetensors import safe_open

    files = [safe_open(path, "pt") for path in sorted(source.glob("*.safetensors"))]
    places = {name: handle for handle in files for name in handle.keys()}  # noqa: SIM118
    return lambda name: places[name].get_tensor(name).float().numpy() if name in places else None


def _ternary_bytes(weight: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    import torch

    from bitdistill.quant.packing import pack_2bit
    from bitdistill.quant.ternary import ternarize

    codes, scale = ternarize(torch.from_numpy(weight))
    return pack_2bit(codes.to(torch.int8)).numpy(), np.array(float(scale), dtype=np.float32)


def write_student(shape: str, folder: Path, source: Path | None = None) -> Path:
    """A packed student (SubLN as in the paper, BF16 floats) of this shape; kept if it is already there.

    Args:
        source: a full-precision model whose weights it takes, untrained.
    """
    if artifact.exists(folder):
        return folder
    config = config_of(shape)
    plan = make_plan(config, RefineConfig(), shape)
    rng = np.random.default_rng(0)
    drawn: dict[str, np.ndarray] = {}
    tensors: dict[str, np.ndarray] = {}
    real = real_tensors(source)
    for name, (dims, _) in contents.expected_tensors(config, plan, True, shape).items():
        if (weight := real(f"{name.rpartition('.')[0]}.weight")) is not None and name.endswith(".codes"):
            tensors[name], tensors[f"{name.removesuffix('.codes')}.scale"] = _ternary_bytes(weight)
            continue
        if name in tensors:
            continue
        if (values := real(name)) is not None:
            tensors[name] = _bf16(values)
            continue
        key = _layer_key(name)
        if key not in drawn:
            if name.endswith(".codes"):
                rows, width = dims
                values = (_codes(rng, rows, 4 * width) + 1).astype(np.uint8).reshape(rows, width, 4)
                shifts = np.arange(0, 8, 2, dtype=np.uint8)
                drawn[key] = np.bitwise_or.reduce(values << shifts, axis=2)
                _pad(drawn[key], plan.replace[name.removesuffix(".codes")].in_features)
            elif name.endswith(".scale"):
                drawn[key] = np.array(SCALE, dtype=np.float32)
            else:
                drawn[key] = _bf16(_floats(rng, name, dims))
        tensors[name] = drawn[key]
    config["dtype"] = "float32"
    config["quantization_config"] = {
        "quant_method": "bitdistill",
        "format_version": 1,
        "packed": True,
        "plan": plan.to_json(),
    }
    manifest = {"kind": "packed", "family": config["model_type"], "packed": True, "plan": plan.to_json()}
    manifest |= {"float_dtype": "bfloat16", "versions": {}, "recipe": {}}
    folder.parent.mkdir(parents=True, exist_ok=True)
    with artifact.writing(folder, manifest) as partial:
        (partial / "config.json").write_text(json.dumps(config), "utf-8")
        _write_tokenizer(partial)
        _save_bf16(tensors, partial / "model.safetensors")
    return folder


def _floats(rng: np.random.Generator, name: str, dims: tuple[int, ...]) -> np.ndarray:
    if "norm" in name or "subln" in name:
        return 1.0 + 0.1 * rng.standard_normal(dims, dtype=np.float32)
    return 0.02 * rng.standard_normal(dims, dtype=np.float32)


def _pad(codes: np.ndarray, cols: int) -> None:
    """Value 1 in the fields of the last byte that lie beyond `cols` (docs/format.md)."""
    if used := cols % 4:
        mask = np.uint8((1 << (2 * used)) - 1)
        codes[:, -1] = (codes[:, -1] & mask) | (np.uint8(0x55) & ~mask)


def _bf16(values: np.ndarray) -> np.ndarray:
    """Rounded to bfloat16, as uint16 bits."""
    bits = values.view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def _save_bf16(tensors: dict[str, np.ndarray], path: Path) -> None:
    """safetensors with the uint16 arrays declared as BF16 (numpy has no such type)."""
    save_file(tensors, path)
    with path.open("r+b") as handle:
        length = int.from_bytes(handle.read(8), "little")
        header = handle.read(length).replace(b'"U16"', b'"BF16"')
        shorter = header.rstrip(b" ")
        if len(shorter) > length:  # the name is a byte longer: write the file again with a longer header
            data = path.read_bytes()[8 + length :]
            padded = shorter + b" " * (-len(shorter) % 8)
            path.write_bytes(len(padded).to_bytes(8, "little") + padded + data)
        else:
            handle.seek(8)
            handle.write(shorter + b" " * (length - len(shorter)))


def _write_tokenizer(folder: Path) -> None:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel

    Tokenizer(WordLevel({"<unk>": 0, "a": 1}, unk_token="<unk>")).save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text("{}", "utf-8")


def write_f16(shape: str, path: Path, source: Path | None = None, other: str | None = None) -> Path:
    """The same shape as a GGUF of F16 matrices for llama.cpp, without SubLN; kept if it is there.

    Query and key rows keep transformers' order, which llama.cpp reads otherwise for llama: right for speed alone.

    Args:
        other: another architecture than the shape's own, for engines that lack it; what it has no name for is left out.
    """
    if path.exists():
        return path
    config = config_of(shape)
    arch = other or {"qwen3": "qwen3", "llama": "llama", "gemma3_text": "gemma3"}[config["model_type"]]
    layout = layout_of(config, shape)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    writer = gguf.GGUFWriter(partial, arch)
    gguf_export._write_config(writer, config, layout, Architecture(arch), shape)
    writer.add_file_type(1)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([f"t{i}".encode() for i in range(config["vocab_size"])])
    writer.add_token_types([1] * config["vocab_size"])
    writer.add_token_merges(["t 1"])
    arch_id = next(a for a, name in gguf.MODEL_ARCH_NAMES.items() if name == arch)
    names = gguf.get_tensor_name_map(arch_id, config["num_hidden_layers"])
    rng = np.random.default_rng(0)
    drawn: dict[str, np.ndarray] = {}
    real = real_tensors(source)

    def add(name: str, dims: tuple[int, ...], linear: bool) -> None:
        key = name if source is not None else _layer_key(name)
        if (given := real(name)) is not None:
            drawn[key] = given + (arch == "gemma3") if len(dims) == 1 else given.astype(np.float16)
        elif key not in drawn:
            if linear:
                drawn[key] = (SCALE * _codes(rng, *dims).astype(np.float32)).astype(np.float16)
            else:
                values = _floats(rng, name, dims)
                drawn[key] = values if len(dims) == 1 else values.astype(np.float16)
        target = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if target is None and other is not None:
            return
        if target is None:
            raise SystemExit(f"{name}: {arch} has no such tensor in GGUF")
        writer.add_tensor(target, drawn[key])

    for kept in layout.kept:
        add(kept.name, kept.shape, False)
    for lin in layout.linears:
        add(f"{lin.name}.weight", (lin.out_features, lin.in_features), True)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    partial.rename(path)
    return path


def write_quantized(f16: Path, name: str, threads: int) -> Path:
    """The F16 file in another of GGUF_TYPES, by llama.cpp's own quantizer; kept if it is there."""
    import llama_cpp

    path = f16.with_name(f16.name.replace("F16", name))
    if path.exists():
        return path
    ftype, embedding = GGUF_TYPES[name]
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = ftype
    params.nthread = threads
    if embedding is not None:
        params.token_embedding_type = embedding
        params.output_tensor_type = embedding
    partial = path.with_suffix(".partial")
    code = llama_cpp.llama_model_quantize(str(f16).encode(), str(partial).encode(), ctypes.byref(params))
    if code != 0:
        raise SystemExit(f"llama.cpp could not quantize {f16} to {name} (code {code})")
    partial.rename(path)
    return path


def write_by_build(f16: Path, quantizer: Path, name: str, kind: str) -> Path:
    """The F16 file in a type of another engine, by that engine's own quantizer; kept if it is there."""
    path = f16.with_name(f"{name}-{kind}.gguf")
    if path.exists():
        return path
    target, _, embedding = kind.partition("+")
    options = ["--token-embedding-type", embedding, "--output-tensor-type", embedding] if embedding else []
    partial = path.with_suffix(".partial")
    done = subprocess.run(
        [quantizer, *options, f16, partial, target],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    if done.returncode != 0:
        raise SystemExit(f"{name} could not quantize {f16} to {kind}:\n{done.stdout[-2000:]}")
    partial.rename(path)
    return path
