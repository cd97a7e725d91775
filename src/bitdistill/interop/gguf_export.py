"""A packed student as a GGUF file for llama.cpp, Ollama or bitnet.cpp, codes unchanged.

Ternary tensors are TQ1_0, TQ2_0 or I2_S (gguf_codec.py); rows that fill no block of the type go out as Q4_0, which
holds the same codes in 4.5 bits a weight and is reported. Embedding and head are F16, Q8_0, Q6_K or Q4_K, norms and
biases F32. Where the scale has to be float16, the exact one is kept in the metadata (`bitdistill.scale.TENSOR`),
so that importing the file gives back the student's own.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from bitdistill import artifact
from bitdistill.config import ExportConfig
from bitdistill.errors import ModelError
from bitdistill.interop import gguf_codec, gguf_kquants
from bitdistill.interop.gguf_architecture import Architecture, architecture_of, rope, sliding_pattern
from bitdistill.interop.gguf_package import gguf
from bitdistill.interop.gguf_tokenizer import vocabulary, write_vocabulary
from bitdistill.models.families import Layout, layout_of
from bitdistill.models.gguf import from_halves, gguf_name
from bitdistill.models.hf import plan_of
from bitdistill.models.student import load_student
from bitdistill.models.surgery import SurgeryPlan
from bitdistill.quant.linear import PackedBitLinear
from bitdistill.quant.packing import unpack_2bit
from bitdistill.version import __version__

log = logging.getLogger("bitdistill")

# LLAMA_FTYPE numbers: what the file says it mostly is (I2_S is bitnet.cpp's).
_FILE_TYPES = {"tq1_0": 36, "tq2_0": 37, "i2_s": 40}
_TABLE_TYPES = {"f16": 1, "q8_0": 8, "q4_k": 12, "q6_k": 14}
_SUB_NORMS = {"self_attn.o_proj": "attn_sub_norm", "mlp.down_proj": "ffn_sub_norm"}
SCALE_KEY = "bitdistill.scale."


@dataclass(frozen=True)
class GgufTensorData:
    """One tensor as it goes to the file: dims in torch's order, ggml's type number, bytes."""

    name: str
    shape: tuple[int, ...]
    ggml_type: int
    data: NDArray


def export_gguf(packed_folder: Path, out: Path, options: ExportConfig) -> Path:
    """Write the packed student at `packed_folder` as `out/model.gguf`, with a manifest beside it.

    Returns:
        `out`.

    Raises:
        ModelError: llama.cpp has no architecture for this student, or cannot tokenize as it does.
        ArtifactError: the packed folder is damaged.
        MissingDependencyError: the `gguf` package is not installed.
    """
    about = {"kind": "gguf", "from": artifact.read_manifest(packed_folder)["files"]}
    with artifact.writing(out, {**about, "options": options.gguf.model_dump(mode="json")}) as folder:
        write_gguf(packed_folder, folder / "model.gguf", options)
    return out


def write_gguf(packed_folder: Path, path: Path, options: ExportConfig) -> None:
    """As `export_gguf`, to a plain file."""
    package = gguf()
    model, tokenizer, manifest = load_student(packed_folder)
    if manifest["kind"] != "packed":
        raise ModelError(f"{packed_folder}: kind {manifest['kind']}; export needs a packed student")
    where, plan, config = str(packed_folder), plan_of(model), model.config.to_dict()
    weights = options.gguf.weights
    target = architecture_of(config, plan, weights, where)
    layout = layout_of(config, where)
    vocab = vocabulary(tokenizer, layout.vocab, _eos_ids(model), where)
    writer = package.GGUFWriter(path, target.name)
    writer.add_name(str((manifest.get("recipe") or {}).get("name") or packed_folder.parent.name or "student"))
    writer.add_file_type(_FILE_TYPES[weights])
    writer.add_quantization_version(2)
    writer.add_string("bitdistill.version", __version__)
    factors = _write_config(writer, config, layout, target, where)
    write_vocabulary(writer, vocab)
    kinds = {name: _kind(spec.in_features, weights, name, where) for name, spec in plan.replace.items()}
    if other := [name for name, kind in kinds.items() if kind != weights]:
        log.warning(
            "%s: %d of %d linears have rows that fill no block of %s: written as q4_0 (the same codes)",
            where, len(other), len(kinds), weights,
        )  # fmt: skip
    if not target.scale_tensors:
        for name, layer in _ternary(model).items():
            if kinds[name] != "i2_s":
                writer.add_float32(f"{SCALE_KEY}{_base(name, layout)}", float(layer.scale))
    tensors = list(_tensors(model, plan, layout, target, kinds, options, factors, where))
    for tensor in tensors:
        # The dtype only says "not raw bytes": then the shape is taken in weights, for every type.
        writer.add_tensor_info(
            tensor.name, tensor.shape, np.dtype(np.int8), tensor.data.nbytes, tensor.ggml_type
        )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for tensor in tensors:
        writer.write_tensor_data(tensor.data)
    writer.close()


def _eos_ids(model: Any) -> list[int]:
    ids = model.generation_config.eos_token_id
    ids = model.config.eos_token_id if ids is None else ids
    return [] if ids is None else list(ids) if isinstance(ids, list | tuple) else [ids]


def _kind(in_features: int, weights: gguf_codec.TernaryType, name: str, where: str) -> gguf_codec.TernaryType:
    if in_features % gguf_codec.TYPES[weights][1] == 0:
        return weights
    if in_features % gguf_codec.TYPES["q4_0"][1] == 0:
        return "q4_0"
    raise ModelError(
        f"{where}: {name} has rows of {in_features} weights; GGUF's ternary types want multiples of "
        f"{gguf_codec.TYPES[weights][1]}, and q4_0 multiples of 32; use format packed"
    )


def _ternary(model: Any) -> dict[str, PackedBitLinear]:
    return {name: m for name, m in model.named_modules() if isinstance(m, PackedBitLinear)}


def _base(linear: str, layout: Layout) -> str:
    """`model.layers.0.self_attn.q_proj` -> `blk.0.attn_q`."""
    return gguf_name(f"{linear}.weight", layout.family).removesuffix(".weight")


def _write_config(
    writer: Any, config: dict[str, Any], layout: Layout, target: Architecture, where: str
) -> list[float] | None:
    """Hyperparameters; returns the rotary factors, which are a tensor."""
    writer.add_vocab_size(layout.vocab)
    writer.add_context_length(layout.max_positions or 2048)
    writer.add_embedding_length(layout.hidden)
    writer.add_block_count(layout.layers)
    writer.add_feed_forward_length(layout.intermediate)
    writer.add_head_count(layout.heads)
    writer.add_head_count_kv(layout.kv_heads)
    writer.add_key_length(layout.head_dim)
    writer.add_value_length(layout.head_dim)
    writer.add_layer_norm_rms_eps(float(config["rms_norm_eps"]))
    writer.add_rope_dimension_count(layout.head_dim)
    positions = rope(config, target, layout.head_dim, where)
    writer.add_rope_freq_base(positions["theta"])
    if "factor" in positions:
        writer.add_rope_scaling_type(gguf().RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(positions["factor"])
    if target.name == "gemma3":
        writer.add_rope_freq_base_swa(positions["theta_local"])
        writer.add_sliding_window(int(config["sliding_window"]))
        if (pattern := sliding_pattern(layout)) is not None:
            writer.add_sliding_window_pattern(pattern)
        if config.get("final_logit_softcapping"):
            writer.add_final_logit_softcapping(float(config["final_logit_softcapping"]))
    factors: list[float] | None = positions.get("factors")
    return factors


def _tensors(
    model: Any,
    plan: SurgeryPlan,
    layout: Layout,
    target: Architecture,
    kinds: dict[str, gguf_codec.TernaryType],
    options: ExportConfig,
    factors: list[float] | None,
    where: str,
) -> Iterator[GgufTensorData]:
    """Every tensor of the file, in the order of the file."""
    heads = {"q": layout.heads, "k": layout.kv_heads} if target.interleaved else {}
    layers = _ternary(model)
    owned = tuple(f"{name}." for name in layers)
    for name, parameter in model.named_parameters():
        if name.startswith(owned):
            continue
        values = parameter.detach().to(torch.float32).numpy()
        theirs = gguf_name(name, layout.family)
        if values.ndim == 2:
            table = options.gguf.table
            data = gguf_kquants.encode_table(table, values, f"{where}: {name}")
            yield GgufTensorData(theirs, values.shape, _TABLE_TYPES[table], data)
        else:
            yield _float(theirs, values + np.float32(target.norm_offset))
    if factors is not None:
        yield _float("rope_freqs.weight", np.array(factors, np.float32))
    for name, layer in layers.items():
        spec, base = plan.replace[name], _base(name, layout)
        codes = unpack_2bit(layer.codes.cpu(), layer.in_features)
        bias: torch.Tensor | None = layer.bias
        if spec.kind in heads:
            codes = from_halves(codes, heads[spec.kind])
            bias = None if bias is None else from_halves(bias, heads[spec.kind])
        scale = float(layer.scale)
        try:
            data = gguf_codec.encode(kinds[name], codes.numpy(), 1.0 if target.scale_tensors else scale)
        except ModelError as error:
            raise ModelError(f"{where}: {name}: {error}") from error
        yield GgufTensorData(f"{base}.weight", tuple(codes.shape), gguf_codec.TYPES[kinds[name]][0], data)
        if target.scale_tensors:
            yield _float(f"{base}.scale", np.array([scale], np.float32))
        if bias is not None:
            yield _float(f"{base}.bias", bias.detach().to(torch.float32).numpy())
        if layer.subln is not None:
            block, _, projection = name.removeprefix("model.layers.").partition(".")
            yield _float(
                f"blk.{block}.{_SUB_NORMS[projection]}.weight",
                layer.subln.weight.detach().to(torch.float32).numpy(),
            )


def _float(name: str, values: NDArray) -> GgufTensorData:
    return GgufTensorData(name, values.shape, 0, np.ascontiguousarray(values, np.float32))
