"""Training checkpoints: atomic folders of safetensors and JSON, each file hashed; no pickle.

A checkpoint is `<root>/step-00000120/` with model.safetensors, optimizer.safetensors, rng.safetensors and
state.json. The two newest are kept; a corrupt newest one is passed over with a warning.
"""

from __future__ import annotations

import contextlib
import json
import logging
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from bitdistill import artifact
from bitdistill.errors import ArtifactError, StorageError
from bitdistill.train.optim import OptimizerSet

log = logging.getLogger("bitdistill")
KEEP = 2


def trainable_state(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by name, tied tensors once (the first name wins)."""
    seen: set[int] = set()
    state = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) not in seen:
            seen.add(id(tensor))
            state[name] = tensor.detach().contiguous()
    return state


def _optimizer_tensors(model: nn.Module, optimizer: OptimizerSet) -> dict[str, Tensor]:
    names = {id(p): n for n, p in model.named_parameters()}
    tensors = {}
    for parameter, state in optimizer.states():
        for key, value in state.items():
            tensors[f"{names[id(parameter)]}|{key}"] = torch.as_tensor(value).detach().contiguous()
    return tensors


def _restore_optimizer(model: nn.Module, optimizer: OptimizerSet, tensors: Mapping[str, Tensor]) -> None:
    parameters = dict(model.named_parameters())
    for name, value in tensors.items():
        parameter_name, key = name.rsplit("|", 1)
        parameter = parameters[parameter_name]
        # AdamW keeps its step counter in float32 on the parameter's device when fused
        optimizer.restore(parameter, key, value.to(parameter.device))


def _rng_tensors() -> dict[str, Tensor]:
    tensors = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        tensors["cuda"] = torch.cuda.get_rng_state()
    return tensors


def estimated_bytes(model: nn.Module) -> int:
    """Bytes of one checkpoint: weights plus two AdamW moments."""
    weights = sum(t.numel() * t.element_size() for t in trainable_state(model).values())
    moments = 2 * sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
    return weights + moments


def require_space(root: Path, model: nn.Module) -> None:
    """Refuse to start when a checkpoint cannot fit.

    Raises:
        StorageError: fewer bytes free than KEEP checkpoints need.
    """
    root.mkdir(parents=True, exist_ok=True)
    held = sum(p.stat().st_size for p in root.rglob("*") if p.is_file())
    need, free = KEEP * estimated_bytes(model), shutil.disk_usage(root).free
    if free + held < need:
        raise StorageError(
            f"{root}: {KEEP} checkpoints need {need / 1e6:.0f} MB, {free / 1e6:.0f} MB are free; "
            "free some or set output_dir elsewhere"
        )


def save(
    root: Path,
    step: int,
    model: nn.Module,
    optimizer: OptimizerSet,
    state: Mapping[str, Any],
    key: str,
) -> None:
    """Write the checkpoint of `step`, then drop all but the newest two."""
    with artifact.writing(
        root / f"step-{step:08d}", {"kind": "checkpoint", "key": key, "step": step}
    ) as folder:
        save_file(trainable_state(model), folder / "model.safetensors")
        save_file(_optimizer_tensors(model, optimizer), folder / "optimizer.safetensors")
        save_file(_rng_tensors(), folder / "rng.safetensors")
        (folder / "state.json").write_text(json.dumps({"step": step, **state}), "utf-8")
    for old in sorted(root.glob("step-????????"))[:-KEEP]:
        shutil.rmtree(old, ignore_errors=True)


def newest_key(root: Path) -> str | None:
    """Key of the newest checkpoint, without a look at its content; None when there is none."""
    for folder in sorted(root.glob("step-????????"), reverse=True):
        with contextlib.suppress(ArtifactError):
            return str(artifact.read_manifest(folder).get("key"))
    return None


def restore(root: Path, model: nn.Module, optimizer: OptimizerSet, key: str) -> dict[str, Any] | None:
    """Load the newest intact checkpoint of this very stage into model, optimizer and RNG.

    Returns:
        its state.json, or None when there is no usable checkpoint.

    Raises:
        ArtifactError: a checkpoint is there but belongs to another recipe (its `key` differs).
    """
    for orphan in root.glob("step-*.partial-*"):  # of a killed save, whose step may never be saved again
        shutil.rmtree(orphan, ignore_errors=True)
    for folder in sorted(root.glob("step-????????"), reverse=True):
        try:
            manifest = artifact.verify(folder)
        except ArtifactError as error:
            log.warning("checkpoint passed over: %s", error)
            continue
        if manifest.get("key") != key:
            raise ArtifactError(
                f"{folder}: this checkpoint was made by another recipe, data or model; "
                "use --redo for this stage, or another run name"
            )
        _load_model(model, load_file(folder / "model.safetensors"), folder)
        _restore_optimizer(model, optimizer, load_file(folder / "optimizer.safetensors"))
        rng = load_file(folder / "rng.safetensors")
        torch.set_rng_state(rng["cpu"])
        if "cuda" in rng and torch.cuda.is_available():
            torch.cuda.set_rng_state(rng["cuda"])
        state: dict[str, Any] = json.loads((folder / "state.json").read_text("utf-8"))
        return state
    return None


def _load_model(model: nn.Module, tensors: Mapping[str, Tensor], folder: Path) -> None:
    own = trainable_state(model)
    if own.keys() != tensors.keys():
        odd = sorted(own.keys() ^ tensors.keys())[:3]
        raise ArtifactError(
            f"{folder}: tensors do not match the model, for example {odd}; use --redo for this stage"
        )
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(tensors[name])
