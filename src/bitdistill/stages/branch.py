"""Budgets of one WSD schedule from one run: a shorter stage 2 starts from the stable phase of a longer one.

Until its decay begins, a run with the `wsd` schedule does not depend on its budget: data order is a function of
(seed, step), the rate is constant after the warm-up. So a checkpoint of the stable phase, kept by a run with
`pretrain.branch_steps`, is a point through which every budget with the same warm-up steps passes, and a run that
finds one goes on from there. The result is the same as from the start (bit for bit where training is); only the
time is saved. Nothing here enters a stage's key.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from bitdistill import artifact
from bitdistill.config import PretrainConfig
from bitdistill.errors import ArtifactError, RecipeError
from bitdistill.stages.common import log

_BRANCH = "branch.json"


def check(config: PretrainConfig, total_steps: int) -> None:
    """Whether `branch_steps` can be kept at all.

    Raises:
        RecipeError: another schedule, a step that is no checkpoint, or one after the stable phase.
    """
    if not config.branch_steps:
        return
    every = config.loop.checkpoint_every_steps
    if config.optim.schedule != "wsd" or every is None:
        raise RecipeError(
            "pretrain.branch_steps: needs optim.schedule wsd and loop.checkpoint_every_steps; set both"
        )
    last = stable_end(config, total_steps)
    for step in config.branch_steps:
        if step % every or step > last:
            raise RecipeError(
                f"pretrain.branch_steps: {step} is no multiple of loop.checkpoint_every_steps {every} "
                f"up to {last}, where the decay of {total_steps} steps begins"
            )


def stable_end(config: PretrainConfig, total_steps: int) -> int:
    """Optimizer steps before the decay of a wsd run begins."""
    return total_steps - max(1, round(config.optim.decay_fraction * total_steps))


def trunk(inputs: Mapping[str, Any], config: PretrainConfig, total_steps: int) -> Path:
    """Folder of the stable phase's checkpoints that all budgets of this run share."""
    section = json.loads(json.dumps(inputs["pretrain"]))
    section.pop("budget_tokens")
    for key in ("warmup_fraction", "decay_fraction", "min_lr_ratio"):
        section["optim"].pop(key)
    section.pop("ternary_warmup_fraction")
    steps = {
        "warmup_steps": round(config.optim.warmup_fraction * total_steps),
        "ternary_warmup_steps": round(config.ternary_warmup_fraction * total_steps),
    }
    key = artifact.hash_json({**inputs, "pretrain": section, **steps})
    return Path(config.cache_dir).expanduser().parent / "stable" / key[:16]


def start(folder: Path, checkpoints: Path, key: str, last: int) -> None:
    """Put the newest kept checkpoint up to step `last` where `fit` will find it; none is no error.

    Args:
        folder: from `trunk`.
        checkpoints: the run's own checkpoints; if there are any, nothing is done.
        key: the run's stage key, which its checkpoints carry.

    Raises:
        StorageError: the file system refused.
    """
    if any(checkpoints.glob("step-????????")):
        return
    for kept in sorted(folder.glob("step-????????"), reverse=True):
        step = int(kept.name.removeprefix("step-"))
        if step > last:
            continue
        try:
            artifact.verify(kept)
        except ArtifactError as error:
            log.warning("stable-phase checkpoint passed over: %s", error)
            continue
        state = json.loads((kept / "state.json").read_text("utf-8"))
        note = {
            "step": step,
            "tokens": state["tokens"],
            "elapsed_s": state["elapsed_s"],
            "device_s": state.get("device_s", state["elapsed_s"]),
        }
        _copy(kept, checkpoints / kept.name, key, step)
        with artifact.storage_errors(checkpoints):
            (checkpoints / _BRANCH).write_text(json.dumps(note), "utf-8")
        log.info("pretrain: branches from the stable phase of another budget at step %d", step)
        return


def branched_from(checkpoints: Path) -> dict[str, Any] | None:
    """Step, tokens and seconds that the run took over; None where it started by itself."""
    path = checkpoints / _BRANCH
    if not path.is_file():
        return None
    note: dict[str, Any] = json.loads(path.read_text("utf-8"))
    return note


def keeper(
    folder: Path, checkpoints: Path, steps: tuple[int, ...], then: Callable[[int], None] | None
) -> Callable[[int], None] | None:
    """A callback for `fit(before_step=...)` that keeps the checkpoints of `steps` in `folder`."""
    if not steps:
        return then

    def before_step(step: int) -> None:
        made, kept = checkpoints / f"step-{step:08d}", folder / f"step-{step:08d}"
        if step in steps and artifact.exists(made) and not artifact.exists(kept):
            _copy(made, kept, folder.name, step)
        if then is not None:
            then(step)

    return before_step


def _copy(source: Path, target: Path, key: str, step: int) -> None:
    """A checkpoint under another key; its files are linked where the file system can."""
    with artifact.writing(target, {"kind": "checkpoint", "key": key, "step": step}) as folder:
        for name in artifact.read_manifest(source)["files"]:
            try:
                os.link(source / name, folder / name)
            except OSError:
                shutil.copyfile(source / name, folder / name)
