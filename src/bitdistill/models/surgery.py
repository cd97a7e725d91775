"""Stage 1, model refinement (paper, sec. 3.1): plan which linears become ternary, then apply the plan.

Every linear of every transformer block becomes a `BitLinear`; embeddings, norms, biases and the output head
stay in high precision. SubLN goes before the attention output and the FFN down projections (the paper's
layout), before every ternary linear, or nowhere. A plan names modules exactly and can be printed or stored
before anything is touched; the source model is never mutated.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal

from bitdistill.config import RefineConfig
from bitdistill.errors import ModelError
from bitdistill.models.families import family_of, layout_of

if TYPE_CHECKING:
    from torch import Tensor

# Kinds of linear that read a SubLN, by RefineConfig.subln (paper, sec. 3.1: o_proj and down_proj).
_SUBLN_KINDS: dict[str, frozenset[str]] = {
    "paper": frozenset({"o", "down"}),
    "every_linear": frozenset({"q", "k", "v", "o", "gate", "up", "down"}),
    "none": frozenset(),
}
_CALIBRATION_ROWS_AT_ONCE = 4


@dataclass(frozen=True)
class LinearSpec:
    """One linear to replace: its shape (weight is [out, in]) and whether a SubLN precedes it."""

    in_features: int
    out_features: int
    bias: bool
    kind: str
    subln: bool


@dataclass(frozen=True)
class SurgeryPlan:
    """What stage 1 does to a model: `replace` by exact module name, `keep` with the reason.

    `keep` names modules (`lm_head`, `model.norm`), and parameters for the biases of replaced linears.
    """

    family: str
    subln: str
    quantize_activations: bool
    replace: dict[str, LinearSpec]
    keep: dict[str, str]

    def to_json(self) -> dict[str, Any]:
        """A JSON value that `from_json` reads back to an equal plan."""
        return asdict(self)

    @classmethod
    def from_json(cls, value: Any, where: str = "plan") -> SurgeryPlan:
        """Read `to_json`'s value.

        Raises:
            ModelError: the value is not a plan.
        """
        try:
            replace = {str(name): _spec(spec) for name, spec in value["replace"].items()}
            keep = {str(name): str(reason) for name, reason in value["keep"].items()}
            if not isinstance(value["quantize_activations"], bool):
                raise TypeError("quantize_activations is not a boolean")
            return cls(
                str(value["family"]), str(value["subln"]), value["quantize_activations"], replace, keep
            )
        except (KeyError, TypeError, AttributeError) as error:
            raise ModelError(
                f"{where}: not a surgery plan ({error!r}); the folder is damaged, export it again"
            ) from error


def _spec(value: Mapping[str, Any]) -> LinearSpec:
    spec = LinearSpec(**value)
    sizes_fit = all(type(n) is int and n > 0 for n in (spec.in_features, spec.out_features))
    if not sizes_fit or type(spec.bias) is not bool or type(spec.subln) is not bool:
        raise TypeError(f"bad linear {dict(value)}")
    return spec


def as_config_dict(config: Any) -> dict[str, Any]:
    """A config.json dict from itself or from a transformers config object."""
    return dict(config) if isinstance(config, Mapping) else config.to_dict()


def plan(config: Any, refine: RefineConfig, where: str = "config") -> SurgeryPlan:
    """The surgery of a model, from its configuration alone (no weights, no torch).

    Args:
        config: the dict of a config.json, or a transformers config.
        refine: the recipe section.
        where: file or name for messages.

    Raises:
        ModelError: the family is not supported, or the config is damaged.
    """
    values = as_config_dict(config)
    layout = layout_of(values, where)
    kinds = _SUBLN_KINDS[refine.subln]
    if refine.subln == "paper" and family_of(values, where).sub_norms:
        kinds = frozenset()  # the model has its own norms in these places; a second one would only rescale
    replace = {
        lin.name: LinearSpec(lin.in_features, lin.out_features, lin.bias, lin.kind, lin.kind in kinds)
        for lin in layout.linears
    }
    keep: dict[str, str] = {
        kept.name if kept.reason == "bias" else kept.name.removesuffix(".weight"): kept.reason
        for kept in layout.kept
    }
    if layout.tied:
        keep["lm_head"] = "head"
    return SurgeryPlan(layout.family, refine.subln, refine.quantize_activations, replace, keep)


def apply(plan: SurgeryPlan, model: Any) -> Any:
    """A student with the plan's linears replaced by `BitLinear`; `model` is not changed.

    Args:
        plan: from `plan(model.config, ...)`.
        model: a full-precision transformers causal language model.

    Returns:
        An independent model on the same device: latents, gains and all other parameters in float32
        (training masters), gains 1.

    Raises:
        ModelError: an entry of the plan matches no linear of the model, or one of another shape, or the
            model has a linear in its blocks that the plan does not name.
    """
    import torch

    from bitdistill.models import hf
    from bitdistill.quant.linear import BitLinear

    family = family_of(as_config_dict(model.config), "model.config").model_type
    if family != plan.family:
        raise ModelError(
            f"the plan is for {plan.family}, the model is {family}; plan from this model's config"
        )
    modules = dict(model.named_modules())
    # A deep copy in which the replaced linears are already known: their weights are copied once, as latents.
    memo: dict[int, Any] = {}
    for name, spec in plan.replace.items():
        linear = modules.get(name)
        _check_linear(name, spec, linear)
        eps = float(model.config.rms_norm_eps)
        layer = BitLinear.from_linear(linear, spec.subln, plan.quantize_activations, eps)  # type: ignore[arg-type]
        memo[id(linear)] = layer.train(model.training)
    for name, module in modules.items():
        if isinstance(module, torch.nn.Linear) and name not in plan.replace and name not in plan.keep:
            raise ModelError(
                f"{name}: a linear that the surgery plan does not name; plan from this model's config"
            )
    student = copy.deepcopy(model, memo)
    student.float()
    student.config.dtype = torch.float32
    student.requires_grad_(True)
    hf.attach(student, plan, packed=False)
    return student


def _check_linear(name: str, spec: LinearSpec, linear: Any) -> None:
    import torch

    if linear is None:
        raise ModelError(
            f"{name}: the plan replaces it, but the model has no such module; plan from its config"
        )
    if not isinstance(linear, torch.nn.Linear):
        raise ModelError(f"{name}: is a {type(linear).__name__}, not a Linear; was the surgery done already?")
    found = (linear.in_features, linear.out_features, linear.bias is not None)
    wanted = (spec.in_features, spec.out_features, spec.bias)
    if found != wanted:
        raise ModelError(
            f"{name}: in, out, bias are {found} in the model, {wanted} in the plan; "
            "plan from this model's config"
        )


def calibrate_gains(
    student: Any, source_model: Any, input_ids: Tensor, mask: Tensor | None = None
) -> dict[str, float]:
    """Start each SubLN gain at the RMS of the signal that enters its linear in the full-precision source.

    The normalised signal then has the source's magnitude: the function changes far less than with gains of 1.

    Args:
        student: from `apply`; its gains are overwritten in place.
        source_model: the full-precision model; only run forward.
        input_ids: int64 [rows, length] on the source's device.
        mask: optional boolean [rows, length]; False positions (padding) do not count.

    Returns:
        The gain of every linear that has a SubLN, by module name; empty when there is none.

    Raises:
        ModelError: a signal is zero or not finite, or the two models do not match.
    """
    import torch

    from bitdistill.quant.linear import BitLinear

    layers = {n: m for n, m in student.named_modules() if isinstance(m, BitLinear) and m.subln is not None}
    sums = dict.fromkeys(layers, 0.0)
    count = dict.fromkeys(layers, 0)
    chunk_mask: Tensor | None = None

    def record(name: str) -> Any:
        def hook(_: Any, inputs: tuple[Tensor, ...]) -> None:
            x = inputs[0] if chunk_mask is None else inputs[0][chunk_mask]
            sums[name] += float(x.detach().to(torch.float64).square().sum())
            count[name] += x.numel()

        return hook

    was_training = source_model.training
    handles = []
    try:
        for name in layers:
            handles.append(_submodule(source_model, name).register_forward_pre_hook(record(name)))
        source_model.eval()
        with torch.no_grad():
            for start in range(0, input_ids.shape[0], _CALIBRATION_ROWS_AT_ONCE):
                rows = slice(start, start + _CALIBRATION_ROWS_AT_ONCE)
                chunk_mask = None if mask is None else mask[rows]
                # The body without the head: logits over the vocabulary are not needed.
                source_model.model(input_ids=input_ids[rows], use_cache=False)
    finally:
        source_model.train(was_training)
        for handle in handles:
            handle.remove()
    gains = {name: (sums[name] / max(count[name], 1)) ** 0.5 for name in layers}
    for name, gain in gains.items():
        if not 0.0 < gain < float("inf"):
            raise ModelError(
                f"{name}: RMS of its input is {gain} over {count[name]} values; check the source's "
                "weights or use refine.gains: ones"
            )
        layers[name].subln.weight.data.fill_(gain)  # type: ignore[union-attr]
    return gains


def refine(
    teacher: Any,
    calibration_ids: Tensor | None = None,
    *,
    subln: Literal["paper", "every_linear", "none"] = "paper",
    gains: Literal["ones", "calibrated"] = "calibrated",
    quantize_activations: bool = True,
) -> Any:
    """Stage 1 in one call: an untrained ternary student of a full-precision model, which is not changed.

    Args:
        teacher: a transformers causal language model of a supported family.
        calibration_ids: int64 [rows, length], token ids of ordinary text; wanted by calibrated gains.
        subln, gains, quantize_activations: as in `RefineConfig`.

    Raises:
        ModelError: the model is not supported, or calibrated gains were asked for without tokens.
    """
    calibrated = gains == "calibrated" and subln != "none"
    if calibrated and calibration_ids is None:
        raise ModelError(
            "refine: calibrated gains need calibration_ids [rows, length]; pass some or gains='ones'"
        )
    config = RefineConfig(subln=subln, gains=gains, quantize_activations=quantize_activations)
    student = apply(plan(teacher.config, config, type(teacher).__name__), teacher)
    if calibrated and calibration_ids is not None:
        calibrate_gains(student, teacher, calibration_ids)
    return student


def _submodule(model: Any, name: str) -> Any:
    try:
        return model.get_submodule(name)
    except AttributeError:
        raise ModelError(
            f"{name}: the source model has no such module; calibrate with the student's source"
        ) from None


def set_quantization(student: Any, enabled: bool) -> None:
    """Turn weight and activation quantization of all `BitLinear` layers on or off (off: plain linears).

    Raises:
        ModelError: the model has no `BitLinear`.
    """
    from bitdistill.quant.linear import BitLinear

    layers = [m for m in student.modules() if isinstance(m, BitLinear)]
    if not layers:
        raise ModelError(
            "the model has no BitLinear layer; quantization can be switched on latent students only"
        )
    for layer in layers:
        layer.quantize_weights = enabled
