"""A GGUF file with ternary tensors (TQ1_0, TQ2_0, I2_S, or Q4_0 that holds ternary codes) as a packed student.

Architectures are the ones that are exported (gguf_architecture.py) and bitnet.cpp's. One scale a tensor: block
scales that differ are refused, for the packed format has one. A `scale` tensor multiplies it; the exact scale in
`bitdistill.scale.TENSOR` replaces one that was rounded to float16. A llama.cpp `bitnet` model is a Llama student with
SubLN as in the paper; with squared ReLU it is one of family bitnet.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bitdistill import artifact
from bitdistill.config import RefineConfig
from bitdistill.errors import ModelError
from bitdistill.interop import gguf_codec
from bitdistill.interop.gguf_export import SCALE_KEY
from bitdistill.interop.packed_writer import check_finite, write_packed_folder
from bitdistill.models import surgery
from bitdistill.models.contents import expected_tensors
from bitdistill.models.families import FAMILIES, Layout, layout_of
from bitdistill.models.gguf import dequantize, gguf_name, load_tokenizer, to_halves
from bitdistill.models.gguf_header import GgufHeader, config_from_gguf, read_gguf, type_sizes
from bitdistill.models.surgery import SurgeryPlan
from bitdistill.models.tokenizer import check_tokenizer

_SUB_NORMS = {"self_attn.o_proj.subln": "attn_sub_norm", "mlp.down_proj.subln": "ffn_sub_norm"}
_F16 = 1


def import_gguf(path: Path, out: Path) -> Path:
    """Write the packed folder of a GGUF file; see `foreign.import_student`.

    Raises:
        ModelError: damaged, of an unsupported architecture, not ternary, or with scales that are not one a tensor.
        MissingDependencyError: the `gguf` package is not installed.
    """
    header = read_gguf(path)
    config = config_from_gguf(header)
    subln = "none"
    if config["model_type"] == "bitnet" and config["hidden_act"] == "silu":
        # Exactly a Llama student with SubLN, which is also what exports to this architecture.
        config |= {"model_type": "llama", "architectures": [FAMILIES["llama"].architecture]}
        subln = "paper"
    layout = layout_of(config, str(path))
    plan = surgery.plan(config, RefineConfig(subln=subln), str(path))  # type: ignore[arg-type]
    halved = header.metadata["general.architecture"] == "llama"
    used: set[str] = set()
    ternary = {name: _ternary(header, name, layout, plan, halved, used) for name in plan.replace}
    floats = dict(_floats(header, config, layout, plan, halved, used))
    check_finite(floats, str(path))
    if unknown := header.tensors.keys() - used:
        raise ModelError(f"{path}: tensor {min(unknown)} has no place in a {layout.family} model")
    tokenizer = load_tokenizer(header)
    check_tokenizer(config, tokenizer, str(path))
    ids = {name: config[name] for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    return write_packed_folder(
        out,
        config,
        plan,
        ternary,
        floats,
        tokenizer,
        generation=ids,
        origin={"format": "gguf", "sha256": artifact.sha256_file(path), "bytes": path.stat().st_size},
        where=str(path),
    )


def _ternary(
    header: GgufHeader, linear: str, layout: Layout, plan: SurgeryPlan, halved: bool, used: set[str]
) -> tuple[Tensor, float]:
    """Codes and scale of one linear."""
    spec = plan.replace[linear]
    base = gguf_name(f"{linear}.weight", layout.family).removesuffix(".weight")
    name, where = f"{base}.weight", f"{header.path}: {base}.weight"
    entry = _entry(header, name)
    shape = (spec.out_features, spec.in_features)
    if tuple(reversed(entry.dims)) != shape:
        raise ModelError(f"{where} is {list(reversed(entry.dims))}, not {list(shape)}")
    kind = gguf_codec.NAMES.get(entry.ggml_type)
    if kind is None:
        raise ModelError(
            f"{where} has type {_type_name(entry.ggml_type)}, which is not ternary; import reads TQ1_0, TQ2_0 and I2_S "
            "(a full-precision GGUF file is a recipe's model.path)"
        )
    raw = np.memmap(
        header.path, np.uint8, "r", header.data_start + entry.offset, (gguf_codec.tensor_bytes(kind, shape),)
    )
    values, scale = gguf_codec.decode(kind, raw, shape, where)
    codes = torch.from_numpy(values)
    used.add(name)
    if halved and spec.kind in ("q", "k"):
        codes = to_halves(codes, layout.heads if spec.kind == "q" else layout.kv_heads)
    if f"{base}.scale" in header.tensors:
        factor = dequantize(header, f"{base}.scale")
        if factor.numel() != 1 or not (math.isfinite(float(factor)) and float(factor) > 0):
            raise ModelError(
                f"{header.path}: {base}.scale is {factor.flatten()[:4].tolist()}, not one positive number"
            )
        used.add(f"{base}.scale")
        # In float32, as the tool that reads both multiplies.
        scale = float(np.float32(scale) * np.float32(float(factor)))
    exact = header.metadata.get(f"{SCALE_KEY}{base}")
    if exact is not None:
        if not isinstance(exact, float) or not abs(exact - scale) <= 2 * gguf_codec.FLOAT16_ERROR * scale:
            raise ModelError(
                f"{header.path}: {SCALE_KEY}{base} is {exact!r}, the tensor's scale {scale:g}; damaged"
            )
        scale = exact
    return codes, scale


def _floats(
    header: GgufHeader,
    config: dict[str, Any],
    layout: Layout,
    plan: SurgeryPlan,
    halved: bool,
    used: set[str],
) -> Iterator[tuple[str, Tensor]]:
    """Every other tensor by our name; float16 stays float16, all other types become float32."""
    for ours in expected_tensors(config, plan, True, str(header.path)):
        if ours.endswith((".codes", ".scale")):
            continue
        inner = ours.removesuffix(".weight")
        sub_norm = next((theirs for end, theirs in _SUB_NORMS.items() if inner.endswith(end)), None)
        if sub_norm is None:
            theirs = gguf_name(ours, layout.family)
        else:
            theirs = f"blk.{inner.split('.')[2]}.{sub_norm}.weight"
        entry = _entry(header, theirs)
        tensor = dequantize(header, theirs)
        if halved and theirs.endswith(("attn_q.bias", "attn_k.bias")):
            tensor = to_halves(tensor, layout.heads if ".attn_q." in theirs else layout.kv_heads)
        if layout.family == "gemma3_text" and theirs.endswith("norm.weight"):
            tensor = tensor - 1  # llama.cpp stores what the norm multiplies by, transformers adds the 1
        used.add(theirs)
        yield ours, tensor.to(torch.float16) if entry.ggml_type == _F16 else tensor


def _entry(header: GgufHeader, name: str) -> Any:
    if name not in header.tensors:
        raise ModelError(f"{header.path}: tensor {name} is missing; the GGUF file is incomplete")
    return header.tensors[name]


def _type_name(number: int) -> str:
    from bitdistill.interop.gguf_package import gguf

    assert number in type_sizes()  # read_gguf has refused all others
    return str(gguf().GGMLQuantizationType(number).name)
