"""Models out and in: teacher folders, latent students and packed students (docs/format.md).

Each is a Hugging Face folder (config.json, safetensors, tokenizer, chat template) and an artifact with a
manifest. Latent folders are bit-exact both ways. Packing computes codes and scale once; they are never
recomputed from the dequantized weights, whose absmean is another scale.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
import transformers
from transformers import AutoModelForCausalLM
from transformers.utils import logging as hf_logging

from bitdistill import artifact
from bitdistill.errors import ArtifactError, BitDistillError, ModelError
from bitdistill.models import contents, hf
from bitdistill.models.surgery import SurgeryPlan, as_config_dict
from bitdistill.models.tokenizer import read_tokenizer
from bitdistill.quant.linear import BitLinear, PackedBitLinear
from bitdistill.version import __version__

Kind = Literal["teacher", "refined", "base", "student", "bitnet_sft", "packed"]
LATENT_KINDS = ("refined", "base", "student", "bitnet_sft")
_FLOAT_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
MAX_SHARD_BYTES = 5_000_000_000


def pack(model: Any, float_dtype: str) -> Any:
    """The packed twin of a latent student: 2-bit codes and one scale a layer; `model` is not changed.

    Embeddings, norms, gains, biases and head are rounded to `float_dtype` here, once, and are kept in float32
    registers: the packed model computes in float32 on rounded values, exactly as after save and load.

    Args:
        model: a latent student (from `apply`, `load_student` or training).
        float_dtype: bfloat16, float16 or float32.

    Raises:
        ModelError: not a latent student, or a value does not fit `float_dtype`.
    """
    plan = hf.plan_of(model)
    layers = {name: module for name, module in model.named_modules() if isinstance(module, BitLinear)}
    if layers.keys() != plan.replace.keys():
        raise ModelError(
            "the model's BitLinear layers are not those of its plan; only latent students can be packed"
        )
    memo: dict[int, Any] = {id(layer): PackedBitLinear.from_bitlinear(layer) for layer in layers.values()}
    packed = copy.deepcopy(model, memo)
    round_parameters(packed, float_dtype)
    packed.config.dtype = torch.float32
    hf.attach(packed, plan, packed=True)
    packed.requires_grad_(False)
    return packed.eval()


def round_parameters(model: torch.nn.Module, float_dtype: str) -> None:
    """Round every parameter to `float_dtype`, in place; they stay float32.

    Raises:
        ModelError: a value does not fit `float_dtype`.
    """
    dtype = _float_dtype(float_dtype)
    for name, parameter in model.named_parameters():
        rounded = parameter.data.to(dtype).to(torch.float32)
        if not bool(torch.isfinite(rounded).all()):
            raise ModelError(
                f"{name}: a value does not fit {float_dtype}; use float32 (export.float_dtype or --dtype)"
            )
        parameter.data = rounded


def _float_dtype(name: str) -> torch.dtype:
    try:
        return _FLOAT_DTYPES[name]
    except KeyError:
        raise ModelError(f"float_dtype {name!r} is not one of {', '.join(_FLOAT_DTYPES)}") from None


def save_student(
    model: Any,
    tokenizer: Any,
    folder: Path | str,
    *,
    kind: Kind,
    plan: SurgeryPlan | Mapping[str, Any] | None,
    recipe: Mapping[str, Any],
    extra: Mapping[str, Any],
    float_dtype: str | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Write a model as an artifact folder, atomically.

    Args:
        model: a plain model (kind teacher), a latent student, or one from `pack` (kind packed).
        tokenizer: saved beside it, chat template included.
        folder: replaced if it exists.
        kind: what it is; written to the manifest.
        plan: the surgery plan (None for a teacher).
        recipe: the resolved recipe, for the manifest.
        extra: further manifest entries.
        float_dtype: storage of the float tensors; None keeps each as it is. It must lose nothing.
        max_shard_bytes: larger models are split into shards with an index.

    Raises:
        ModelError: the model's tensors are not those of its kind and plan, or `float_dtype` would round one.
        StorageError: the file system refused a write.
    """
    if isinstance(plan, Mapping):
        plan = SurgeryPlan.from_json(plan)
    packed = kind == "packed"
    if (plan is None) != (kind == "teacher") or (plan is not None and hf.plan_of(model) != plan):
        raise ModelError(
            f"{folder}: kind {kind} does not go with this model and plan; pass the plan it was made by"
        )
    config = as_config_dict(model.config)
    expected = contents.expected_tensors(config, plan, packed, str(folder))
    state = _tensors(model, expected, float_dtype)
    manifest = {
        "kind": kind,
        "family": config["model_type"],
        "packed": packed,
        "float_dtype": float_dtype,
        "plan": None if plan is None else plan.to_json(),
        "versions": {
            "bitdistill": __version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "recipe": dict(recipe),
    }
    if clash := manifest.keys() & extra.keys():
        raise ValueError(f"extra manifest entries {sorted(clash)} are written by save_student itself")
    with artifact.writing(Path(folder), {**manifest, **extra}) as partial:
        with quiet(), hf.saving(model, state):
            model.save_pretrained(partial, state_dict=state, max_shard_size=max_shard_bytes)
        tokenizer.save_pretrained(partial)


def _tensors(model: Any, expected: contents.Expected, float_dtype: str | None) -> dict[str, torch.Tensor]:
    """The tensors to store, by the names of `expected`; a tied head is left out."""
    state = model.state_dict()
    tied = {"lm_head.weight"} if model.config.tie_word_embeddings else set()
    if wrong := (state.keys() - tied) ^ expected.keys():
        raise ModelError(
            f"tensor {min(wrong)}: not as the plan says; save the model that the plan was applied to"
        )
    chosen = {}
    for name in expected:
        tensor = state[name]
        if tuple(tensor.shape) != expected[name][0]:
            raise ModelError(f"{name}: shape {list(tensor.shape)}, config says {list(expected[name][0])}")
        if float_dtype is not None and tensor.is_floating_point() and not name.endswith(".scale"):
            stored = tensor.to(_float_dtype(float_dtype))
            if not torch.equal(stored.to(tensor.dtype), tensor):
                raise ModelError(
                    f"{name}: storing it as {float_dtype} would round it; round first with pack()"
                )
            tensor = stored
        chosen[name] = tensor
    return chosen


def load_student(
    folder: Path | str, *, device: str | torch.device = "cpu", dtype: torch.dtype | None = None
) -> tuple[Any, Any, dict[str, Any]]:
    """Load any bitdistill folder: teacher, latent student, ternary base or packed student.

    Every file is checked against the manifest's SHA-256, and every tensor's name, shape, dtype and content
    before the model is used. No remote code and no pickle, ever.

    Args:
        folder: an artifact folder.
        device: where the model goes.
        dtype: compute dtype of everything but latents and scales; None: as saved (float32 for students).

    Returns:
        model (in evaluation mode), tokenizer, manifest.

    Raises:
        ArtifactError: missing, corrupt or malformed; the message names file and tensor.
        ModelError: the family is not supported.
    """
    folder = Path(folder)
    manifest = artifact.verify(folder)
    config = contents.read_config(folder)
    plan, packed = _plan_in(config, manifest, folder)
    expected = contents.expected_tensors(config, plan, packed, str(folder / "config.json"))
    contents.check_headers(contents.weight_files(folder), expected)
    try:
        with quiet():
            model, info = AutoModelForCausalLM.from_pretrained(
                folder,
                dtype="auto" if dtype is None else dtype,
                attn_implementation="sdpa",
                use_safetensors=True,
                output_loading_info=True,
                local_files_only=True,
                trust_remote_code=False,
            )
        tokenizer = read_tokenizer(folder)
    except BitDistillError:
        raise
    except (OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
        raise ArtifactError(
            f"{folder}: transformers cannot read it ({_one_line(error)}); make it again"
        ) from error
    for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if info[problem]:
            raise ArtifactError(f"{folder}: {problem} {sorted(info[problem])[:3]}; make the folder again")
    if plan is None:
        contents.check_values(model)
    return model.to(device), tokenizer, manifest


def _plan_in(
    config: Mapping[str, Any], manifest: Mapping[str, Any], folder: Path
) -> tuple[SurgeryPlan | None, bool]:
    """Plan and form of a folder; config.json and manifest must agree.

    Raises:
        ArtifactError: they do not.
    """
    section = config.get("quantization_config")
    kind = manifest.get("kind")
    if kind == "teacher" and section is None:
        return None, False
    if kind == "transformers_bitnet":
        raise ArtifactError(
            f"{folder}: an export for plain transformers; use the packed student, or `bitdistill import` this folder"
        )
    if not isinstance(section, dict) or kind not in (*LATENT_KINDS, "packed"):
        raise ArtifactError(
            f"{folder}: kind {kind!r} does not go with its config.json; make the folder again"
        )
    parsed = hf.BitDistillConfig(**section)
    if parsed.packed != (kind == "packed") or parsed.plan != manifest.get("plan"):
        raise ArtifactError(f"{folder}: config.json and bitdistill.json disagree; make the folder again")
    return SurgeryPlan.from_json(parsed.plan), parsed.packed


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """No progress bars and load reports of transformers; what is wrong we say in one line ourselves."""
    bars, level = hf_logging.is_progress_bar_enabled(), hf_logging.get_verbosity()
    hf_logging.disable_progress_bar()
    hf_logging.set_verbosity(max(level, hf_logging.ERROR))
    try:
        yield
    finally:
        hf_logging.set_verbosity(level)
        if bars:
            hf_logging.enable_progress_bar()


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300]
