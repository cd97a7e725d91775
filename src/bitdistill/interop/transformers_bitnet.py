"""A packed student as a checkpoint that plain transformers loads (`quant_method: bitnet`), codes unchanged.

Layout of transformers' `BitLinear` (linear_class "bitlinear"):

    weight        uint8 [out/4, in]: rows i, i + out/4, i + 2 out/4, i + 3 out/4 in one byte, low bits first, code + 1
    weight_scale  [1]: the reciprocal 1/scale, because that class divides by it (our inv_scale)

What its classes can hold, by SubLN layout:

    none           the model's own class; every linear of the blocks is a BitLinear
    every_linear   the same, with `use_rms_norm` (each BitLinear has an `rms_norm` before it)
    paper          only Llama students without biases, as `BitNetForCausalLM`, whose attn_sub_norm and ffn_sub_norm
                   stand where SubLN does (its activation is a config entry, kept as the student's)

Anything else is refused: a file that loads and computes something else is worse than none.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from bitdistill import artifact
from bitdistill.config import ExportConfig
from bitdistill.errors import ModelError
from bitdistill.models.hf import plan_of
from bitdistill.models.student import load_student
from bitdistill.models.surgery import SurgeryPlan
from bitdistill.quant.linear import PackedBitLinear
from bitdistill.quant.packing import unpack_2bit

ROWS_PER_BYTE = 4
# Ours -> theirs, for the SubLN of the paper's layout in BitNetForCausalLM.
SUB_NORMS = {
    "self_attn.o_proj.subln": "self_attn.attn_sub_norm",
    "mlp.down_proj.subln": "mlp.ffn_sub_norm",
}


def pack_rows(codes_OI: Tensor) -> Tensor:
    """Codes in {-1, 0, 1} (int8 [out, in]) to transformers' bytes (uint8 [out/4, in]).

    Raises:
        ModelError: out is not a multiple of 4 (transformers' class drops the remainder).
    """
    rows = codes_OI.shape[0]
    if rows % ROWS_PER_BYTE:
        raise ModelError(
            f"{rows} output rows: transformers packs multiples of {ROWS_PER_BYTE} only; use format packed"
        )
    values = (codes_OI + 1).to(torch.uint8).reshape(ROWS_PER_BYTE, rows // ROWS_PER_BYTE, -1)
    shifts = torch.arange(ROWS_PER_BYTE, dtype=torch.uint8)[:, None, None] * 2
    return (values << shifts).sum(dim=0, dtype=torch.uint8)


def unpack_rows(packed: Tensor) -> Tensor:
    """The inverse of `pack_rows`: uint8 [out/4, in] to int8 [out, in].

    Raises:
        ModelError: a 2-bit value is 3, which is no ternary code.
    """
    shifts = torch.arange(ROWS_PER_BYTE, dtype=torch.uint8)[:, None, None] * 2
    values = (packed[None] >> shifts) & 3
    if bool((values == 3).any()):
        raise ModelError("packed rows hold the value 3, which is no ternary code; the file is damaged")
    return values.reshape(-1, packed.shape[1]).to(torch.int8) - 1


def target_config(config: Mapping[str, Any], plan: SurgeryPlan, where: str) -> dict[str, Any]:
    """config.json of the export.

    Raises:
        ModelError: transformers has no class that computes this student; the message says why.
    """
    if not plan.quantize_activations:
        raise ModelError(
            f"{where}: weights-only students have no class in transformers' bitnet; use format packed"
        )
    found = {k: v for k, v in config.items() if k not in ("quantization_config", "_name_or_path")}
    quantization: dict[str, Any] = {
        "quant_method": "bitnet",
        "linear_class": "bitlinear",
        "quantization_mode": "offline",
        "modules_to_not_convert": ["lm_head"],
    }
    if plan.subln == "every_linear":
        quantization |= {"use_rms_norm": True, "rms_norm_eps": found["rms_norm_eps"]}
    elif plan.subln == "paper":
        width = found["num_attention_heads"] * (
            found.get("head_dim") or found["hidden_size"] // found["num_attention_heads"]
        )
        biases = any(spec.bias for spec in plan.replace.values())
        if found["model_type"] != "llama" or biases or width != found["hidden_size"]:
            raise ModelError(
                f"{where}: transformers' BitNet class holds Llama students without biases and with heads as wide as "
                f"the model; this one is {found['model_type']}{' with biases' if biases else ''}, heads {width}, "
                f"model {found['hidden_size']}. It loads in transformers after `import bitdistill` (format packed)"
            )
        found |= {"model_type": "bitnet", "architectures": ["BitNetForCausalLM"]}
    return {**found, "quantization_config": quantization}


def target_tensors(model: Any, plan: SurgeryPlan, float_dtype: torch.dtype) -> dict[str, Tensor]:
    """Tensors of the export by name; a tied head is left out."""
    state: dict[str, Tensor] = {}
    ternary = {name: m for name, m in model.named_modules() if isinstance(m, PackedBitLinear)}
    for name, layer in ternary.items():
        state[f"{name}.weight"] = pack_rows(unpack_2bit(layer.codes.cpu(), layer.in_features))
        state[f"{name}.weight_scale"] = (1.0 / layer.scale.cpu()).reshape(1)
        if layer.bias is not None:
            state[f"{name}.bias"] = layer.bias.detach().to(float_dtype)
        if layer.subln is not None:
            state[_sub_norm_name(name, plan)] = layer.subln.weight.detach().to(float_dtype)
    owned = tuple(f"{name}." for name in ternary)
    for name, parameter in model.named_parameters():
        if not name.startswith(owned):
            state[name] = parameter.detach().to(float_dtype)
    return {name: tensor.contiguous() for name, tensor in state.items()}


def _sub_norm_name(linear: str, plan: SurgeryPlan) -> str:
    if plan.subln == "every_linear":
        return f"{linear}.rms_norm.weight"
    block, part, projection = linear.rsplit(".", 2)
    return f"{block}.{SUB_NORMS[f'{part}.{projection}.subln']}.weight"


def export_transformers(packed_folder: Path, out: Path, options: ExportConfig | None = None) -> Path:
    """Write the packed student at `packed_folder` as a plain transformers folder.

    The floats keep the dtype they are stored in; config.json asks for float32 computation, in which the
    integer products are exact. `options` has nothing that this format needs.

    Returns:
        `out`.

    Raises:
        ModelError: transformers has no class for this student.
        ArtifactError: the packed folder is damaged.
    """
    model, tokenizer, manifest = load_student(packed_folder)
    if manifest["kind"] != "packed":
        raise ModelError(f"{packed_folder}: kind {manifest['kind']}; export needs a packed student")
    plan = plan_of(model)
    config = target_config(model.config.to_dict(), plan, str(packed_folder))
    config["dtype"] = "float32"
    float_dtype = {"bfloat16": torch.bfloat16, "float16": torch.float16}.get(
        manifest["float_dtype"], torch.float32
    )
    tensors = target_tensors(model, plan, float_dtype)
    about = {"kind": "transformers_bitnet", "key": manifest["key"], "from": manifest["files"]}
    with artifact.writing(out, about) as folder:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", "utf-8")
        model.generation_config.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    return out
