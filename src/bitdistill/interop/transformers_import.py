"""A transformers checkpoint with `quant_method: bitnet` as a packed student (BitNet b1.58 2B and its like).

Both classes of linear are read. They store the same bytes (`unpack_rows`) and differ in `weight_scale`:

    bitlinear       divides by it: it holds 1/scale
    autobitlinear   multiplies by it: it holds scale; the codes may also be stored unpacked, as floats

`quantization_mode: online` keeps float latents and no codes: that is a model to distil or pack, not to import.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from bitdistill import artifact
from bitdistill.config import RefineConfig
from bitdistill.errors import ArtifactError, ModelError
from bitdistill.interop.packed_writer import write_packed_folder
from bitdistill.interop.transformers_bitnet import SUB_NORMS, unpack_rows
from bitdistill.models import contents, surgery
from bitdistill.models.families import FAMILIES, family_of, layout_of
from bitdistill.models.surgery import LinearSpec
from bitdistill.models.tokenizer import check_tokenizer, read_tokenizer

_LINEAR_CLASSES = ("bitlinear", "autobitlinear")


def import_transformers(source: Path, out: Path) -> Path:
    """Write the packed folder of a `bitnet` checkpoint; see `foreign.import_student`.

    Raises:
        ModelError: an unsupported model or variant, or tensors that do not fit the config.
        ArtifactError: a file is damaged.
    """
    config = contents.read_config(source)
    section = config.pop("quantization_config", None)
    if not isinstance(section, dict) or section.get("quant_method") != "bitnet":
        raise ModelError(f"{source}: quantization_config does not say quant_method bitnet")
    linear_class, subln = _variant(section, str(source))
    family = family_of(config, str(source))
    activation = config.get(family.activation_key) or family.defaults[family.activation_key]
    as_llama = family.model_type == "bitnet" and activation == "silu"
    if as_llama:
        # Exactly a Llama student with SubLN as in the paper.
        if subln != "none":
            raise ModelError(
                f"{source}: use_rms_norm in a model with sub-norms of its own; no format holds that"
            )
        rope = {"rope_theta": layout_of(config, str(source)).rope_theta, "rope_type": "default"}
        config = {"rope_parameters": rope, **config, "model_type": "llama", "hidden_act": "silu"}
        config["architectures"] = [FAMILIES["llama"].architecture]
        subln = "paper"
    eps = section.get("rms_norm_eps")
    if subln == "every_linear" and eps is not None and eps != config.get("rms_norm_eps"):
        raise ModelError(
            f"{source}: rms_norm_eps {eps} before linears, {config.get('rms_norm_eps')} elsewhere"
        )
    plan = surgery.plan(config, RefineConfig(subln=subln), str(source))  # type: ignore[arg-type]
    tensors = _Tensors(source)
    ternary = {name: _ternary(tensors, name, spec, linear_class) for name, spec in plan.replace.items()}
    floats: dict[str, Tensor] = {}
    for ours in contents.expected_tensors(config, plan, True, str(source)):
        if not ours.endswith((".codes", ".scale")):
            floats[ours] = tensors.take(_their_name(ours, as_llama))
            if not floats[ours].is_floating_point():
                raise ModelError(f"{source}: {ours} has dtype {floats[ours].dtype}, not a float")
    if layout_of(config, str(source)).tied:
        tensors.left.discard("lm_head.weight")
    if tensors.left:
        raise ModelError(f"{source}: tensor {min(tensors.left)} has no place in this model")
    tokenizer = read_tokenizer(source)
    check_tokenizer(config, tokenizer, str(source))
    ids = {name: config.get(name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    generation = source / "generation_config.json"
    if generation.is_file():
        ids |= {k: v for k, v in contents.read_json(generation).items() if k in ids}
    files = {file.name: artifact.sha256_file(file) for file in contents.weight_files(source)}
    return write_packed_folder(
        out,
        config,
        plan,
        ternary,
        floats,
        tokenizer,
        generation=ids,
        origin={"format": "transformers", "linear_class": linear_class, "sha256": files},
        where=str(source),
    )


def _variant(section: dict[str, Any], where: str) -> tuple[str, str]:
    """Class of linear and SubLN layout."""
    linear_class = section.get("linear_class", "bitlinear")
    if linear_class not in _LINEAR_CLASSES:
        raise ModelError(f"{where}: linear_class {linear_class!r}; read are {' and '.join(_LINEAR_CLASSES)}")
    if linear_class == "autobitlinear" and section.get("quantization_mode", "offline") != "offline":
        raise ModelError(
            f"{where}: quantization_mode {section['quantization_mode']!r} stores float latents, not codes; "
            "import reads offline checkpoints"
        )
    return linear_class, "every_linear" if section.get("use_rms_norm") else "none"


def _their_name(ours: str, as_llama: bool) -> str:
    if ours.endswith(".subln.weight"):
        if not as_llama:
            return ours.replace(".subln.", ".rms_norm.")
        for here, there in SUB_NORMS.items():
            ours = ours.replace(here, there)
    return ours


class _Tensors:
    """Tensors of a folder by name, read one at a time; `left` are those that nobody took."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.files: dict[str, Path] = {}
        for file in contents.weight_files(folder):
            for name in contents.read_header(file):
                if name in self.files:
                    raise ArtifactError(f"{file}: tensor {name} is stored twice; fetch the model again")
                self.files[name] = file
        self.left = set(self.files)

    def take(self, name: str) -> Tensor:
        if name not in self.files:
            raise ModelError(
                f"{self.folder}: tensor {name} is missing; the model is incomplete, fetch it again"
            )
        self.left.discard(name)
        with safe_open(self.files[name], framework="pt") as handle:
            tensor: Tensor = handle.get_tensor(name)
        return tensor


def _ternary(tensors: _Tensors, name: str, spec: LinearSpec, linear_class: str) -> tuple[Tensor, float]:
    """Codes [out, in] and scale of one linear."""
    where = f"{tensors.folder}: {name}"
    weight = tensors.take(f"{name}.weight")
    rows = spec.out_features
    if weight.dtype == torch.uint8 and tuple(weight.shape) == (-(-rows // 4), spec.in_features):
        if rows % 4:
            raise ModelError(
                f"{where}: {rows} rows do not fill bytes of 4, which no reader of this format agrees on"
            )
        try:
            codes = unpack_rows(weight)
        except ModelError as error:
            raise ModelError(f"{where}: {error}") from error
    elif linear_class == "autobitlinear" and tuple(weight.shape) == (rows, spec.in_features):
        if not bool(torch.isin(weight.float(), torch.tensor([-1.0, 0.0, 1.0])).all()):
            raise ModelError(f"{where}: weights other than -1, 0 and 1, which are no ternary codes")
        codes = weight.to(torch.int8)
    else:
        raise ModelError(
            f"{where}: weight is {weight.dtype} {list(weight.shape)}, not packed codes of "
            f"{rows} x {spec.in_features} (uint8 [{rows // 4}, {spec.in_features}])"
        )
    stored = tensors.take(f"{name}.weight_scale").to(torch.float32)
    scale = float(stored) if stored.numel() == 1 else math.nan
    if linear_class == "bitlinear" and scale > 0:
        scale = float(1.0 / stored)
    if not (math.isfinite(scale) and scale > 0):
        raise ModelError(
            f"{where}: weight_scale {stored.flatten()[:4].tolist()} is not one positive finite number"
        )
    return codes, scale
