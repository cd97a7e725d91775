"""A packed folder (docs/format.md) from codes, scales and float tensors, without building a model."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoConfig, GenerationConfig

from bitdistill import artifact
from bitdistill.errors import ModelError
from bitdistill.models import contents
from bitdistill.models.hf import BitDistillConfig
from bitdistill.models.surgery import SurgeryPlan
from bitdistill.quant.packing import pack_2bit
from bitdistill.version import __version__


def check_finite(floats: Mapping[str, Tensor], where: str) -> None:
    """Cheap, so it comes before codes are packed.

    Raises:
        ModelError: a tensor holds NaN or Inf.
    """
    for name, tensor in floats.items():
        if not bool(torch.isfinite(tensor).all()):
            raise ModelError(f"{where}: {name} holds values that are not finite; fetch the model again")


def write_packed_folder(
    out: Path,
    config: Mapping[str, Any],
    plan: SurgeryPlan,
    ternary: Mapping[str, tuple[Tensor, float]],
    floats: Mapping[str, Tensor],
    tokenizer: Any,
    *,
    generation: Mapping[str, Any],
    origin: Mapping[str, Any],
    where: str,
) -> Path:
    """Write `out` atomically and check it against the format.

    Args:
        config: of the model, without quantization_config.
        ternary: linear -> codes (int8 in {-1, 0, 1}, [out, in]) and scale.
        floats: every other tensor by its name in the packed folder, SubLN gains included.
        generation: token ids for generation_config.json.
        origin: manifest entry `imported`: what the model was.
        where: for messages.

    Raises:
        ModelError: a tensor is missing, unexpected, of another shape, or not finite.
    """
    # auto_map names code of the source's folder, which is never run and does not come along.
    left_out = ("model_type", "quantization_config", "dtype", "torch_dtype", "auto_map", "_name_or_path")
    values = {k: v for k, v in config.items() if k not in left_out}
    check_finite(floats, where)
    tensors: dict[str, Tensor] = {}
    for name, (codes, scale) in ternary.items():
        tensors[f"{name}.codes"] = pack_2bit(codes)
        tensors[f"{name}.scale"] = torch.tensor(scale, dtype=torch.float32)
    tensors |= {name: tensor.contiguous() for name, tensor in floats.items()}
    expected = contents.expected_tensors(config, plan, True, where)
    for name in sorted(expected.keys() | tensors.keys()):
        if name not in tensors:
            raise ModelError(f"{where}: {name} is missing; the model is incomplete, fetch it again")
        if name not in expected:
            raise ModelError(f"{where}: {name} has no place in a {config['model_type']} model")
        if tuple(tensors[name].shape) != expected[name][0]:
            shape = list(tensors[name].shape)
            raise ModelError(f"{where}: {name} is {shape}, config says {list(expected[name][0])}")
    whole = AutoConfig.for_model(config["model_type"], **values)
    whole.dtype = torch.float32
    whole.quantization_config = BitDistillConfig(packed=True, plan=plan.to_json())
    manifest = {
        "kind": "packed",
        "family": config["model_type"],
        "packed": True,
        "float_dtype": None,
        "plan": plan.to_json(),
        "versions": {
            "bitdistill": __version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "recipe": {},
        "key": artifact.hash_json(dict(origin)),
        "imported": dict(origin),
    }
    with artifact.writing(out, manifest) as folder:
        save_file(tensors, folder / contents.WEIGHTS, metadata={"format": "pt"})
        text = json.dumps(whole.to_dict(), indent=2, sort_keys=True, default=str)
        (folder / "config.json").write_text(text + "\n", "utf-8")
        GenerationConfig(**{k: v for k, v in generation.items() if v is not None}).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    return out
