"""Registration with transformers: `AutoModelForCausalLM.from_pretrained` reads bitdistill folders.

A student's config.json carries `"quantization_config": {"quant_method": "bitdistill", ...}` with the surgery
plan. transformers then calls the quantizer below on the empty model: the modules are replaced *before* the
weights are loaded, so SubLN gains and latents are found by name and nothing is initialised at random.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers.quantizers import auto
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from bitdistill.errors import ArtifactError, ModelError
from bitdistill.models import contents
from bitdistill.models.surgery import SurgeryPlan, as_config_dict
from bitdistill.quant.linear import BitLinear, PackedBitLinear

METHOD = "bitdistill"
FORMAT_VERSION = 1


class BitDistillConfig(QuantizationConfigMixin):  # type: ignore[misc]
    """`quantization_config` of a student's config.json (docs/format.md).

    Args:
        format_version: layout of the tensors; this code reads 1.
        packed: codes and scale (True) or float latents (False).
        plan: `SurgeryPlan.to_json()`.

    Raises:
        ArtifactError: a newer format, or keys that are not of this format.
        ModelError: the plan is malformed.
    """

    def __init__(
        self,
        quant_method: str = METHOD,
        format_version: Any = FORMAT_VERSION,
        packed: Any = False,
        plan: Any = None,
        **unknown: Any,
    ) -> None:
        if format_version != FORMAT_VERSION:
            raise ArtifactError(
                f"config.json: quantization_config.format_version is {format_version!r}, this bitdistill "
                f"reads {FORMAT_VERSION}; install a matching version"
            )
        if unknown or quant_method != METHOD or not isinstance(packed, bool):
            raise ArtifactError(
                f"config.json: quantization_config is not of format {FORMAT_VERSION} "
                f"(quant_method {quant_method!r}, packed {packed!r}, unknown keys {sorted(unknown)}); "
                "export again"
            )
        self.quant_method: str = METHOD
        self.format_version = FORMAT_VERSION
        self.packed = packed
        self.plan: dict[str, Any] = SurgeryPlan.from_json(
            plan, "config.json: quantization_config.plan"
        ).to_json()


class BitDistillQuantizer(HfQuantizer):  # type: ignore[misc]
    """Puts `BitLinear` or `PackedBitLinear` in place while transformers builds a student."""

    requires_calibration = True  # from_pretrained cannot make a student of a plain model
    state_to_save: dict[str, Any] | None = None

    @property
    def plan(self) -> SurgeryPlan:
        """The surgery plan of the folder."""
        return SurgeryPlan.from_json(self.quantization_config.plan)

    def _process_model_before_weight_loading(
        self, model: Any, checkpoint_files: list[str] | None = None, **_: Any
    ) -> Any:
        plan, packed = self.plan, self.quantization_config.packed
        if checkpoint_files:
            where = str(Path(checkpoint_files[0]).with_name("config.json"))
            expected = contents.expected_tensors(as_config_dict(model.config), plan, packed, where)
            contents.check_headers([Path(f) for f in checkpoint_files], expected)
        layer_type = PackedBitLinear if packed else BitLinear
        for name, spec in plan.replace.items():
            parent, child = name.rsplit(".", 1)
            with torch.device("meta"):
                layer = layer_type(
                    spec.in_features,
                    spec.out_features,
                    spec.bias,
                    spec.subln,
                    plan.quantize_activations,
                    float(model.config.rms_norm_eps),
                )
            if isinstance(layer, BitLinear):
                # Latents decide the codes and bf16 would change some, so they stay float32 at any `dtype`.
                layer.weight = torch.nn.Parameter(layer.weight.to(torch.float32))
            setattr(model.get_submodule(parent), child, layer)
        return model

    def _process_model_after_weight_loading(self, model: Any, **_: Any) -> Any:
        contents.check_values(model)
        return model

    def get_state_dict_and_metadata(self, *_: Any, **__: Any) -> tuple[dict[str, Any] | None, dict[str, str]]:
        """What `save_pretrained` writes: the state given by `saving`, else the model's own."""
        return self.state_to_save, {}

    def is_serializable(self, *_: Any, **__: Any) -> bool:
        """`save_pretrained` writes a folder that loads again."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Latent students train; packed ones are final."""
        return not self.quantization_config.packed

    @property
    def is_qat_trainable(self) -> bool:
        """Latents are trained through the quantizers."""
        return self.is_trainable


@contextlib.contextmanager
def saving(model: Any, state: dict[str, Any]) -> Iterator[None]:
    """Make `save_pretrained` write `state`: with a quantizer attached it ignores the state it is given."""
    quantizer = getattr(model, "hf_quantizer", None)
    if quantizer is None:
        yield
        return
    quantizer.state_to_save = state
    try:
        yield
    finally:
        quantizer.state_to_save = None


def attach(model: Any, plan: SurgeryPlan, *, packed: bool) -> None:
    """Mark a model in memory as a bitdistill student, as if it had been loaded from a folder.

    `save_pretrained` then writes `quantization_config`, without which the folder could not be read back.
    """
    config = BitDistillConfig(packed=packed, plan=plan.to_json())
    model.config.quantization_config = config
    model.hf_quantizer = BitDistillQuantizer(config, pre_quantized=True)
    model.is_quantized = True
    model.quantization_method = METHOD


def plan_of(model: Any) -> SurgeryPlan:
    """The surgery plan that a student in memory was made by.

    Raises:
        ModelError: not a bitdistill student.
    """
    quantizer = getattr(model, "hf_quantizer", None)
    if not isinstance(quantizer, BitDistillQuantizer):
        raise ModelError("the model is not a bitdistill student; make one with bd.refine or bd.load")
    return quantizer.plan


# Importing this module registers it. (Not a function: the import hook in bitdistill/__init__.py may run while
# this module is itself still importing transformers.)
if METHOD not in auto.AUTO_QUANTIZATION_CONFIG_MAPPING:
    auto.register_quantization_config(METHOD)(BitDistillConfig)
    auto.register_quantizer(METHOD)(BitDistillQuantizer)
