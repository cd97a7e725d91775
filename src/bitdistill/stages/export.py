"""Export: codes and scales are computed once from the latents and written to a packed student."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from bitdistill.models.student import load_student, pack
from bitdistill.stages.common import Run


def write_packed(
    model: Any, tokenizer: Any, manifest: dict[str, Any], folder: Path, run: Run, inputs: Any
) -> None:
    """The packed folder of docs/format.md."""
    float_dtype = run.recipe.export.float_dtype
    run.save_artifact(
        "export",
        pack(model, float_dtype),
        tokenizer,
        folder,
        kind="packed",
        plan=manifest["plan"],
        extra={
            **run.meta("export", inputs),
            "training": manifest.get("training"),
            "distilled_layers": manifest.get("distilled_layers"),
        },
        float_dtype=float_dtype,
    )


EXPORTERS: dict[str, Callable[..., None]] = {"packed": write_packed}


def export(run: Run, latent: Path, latent_key: str, name: str) -> Path:
    """Export the latent student at `latent` in every format of the recipe.

    Args:
        latent_key: key of the stage that made it.
        name: prefix of the folders: `packed` for the student, `bitnet_sft_packed` for the baseline.

    Returns:
        the packed folder.
    """
    folder = run.run_dir / name
    inputs = {"from": latent_key, "export": run.section("export")}
    if run.finished("export", folder, inputs):
        return folder
    model, tokenizer, manifest = load_student(latent)
    for kind in run.recipe.export.formats:
        EXPORTERS[kind](model, tokenizer, manifest, folder, run, inputs)
    return folder
