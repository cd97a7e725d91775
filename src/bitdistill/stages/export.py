"""Export: codes and scales are computed once from the latents and written to a packed student."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from bitdistill import artifact
from bitdistill.config import ExportConfig
from bitdistill.interop.gguf_export import export_gguf
from bitdistill.interop.ollama import export_ollama
from bitdistill.interop.transformers_bitnet import export_transformers
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


# Further formats, made from the packed folder without recomputing a code.
EXPORTERS: dict[str, Callable[[Path, Path, ExportConfig], Path]] = {
    "hf": export_transformers,
    "gguf": export_gguf,
    "ollama": export_ollama,
}


def export(run: Run, latent: Path, latent_key: str, name: str) -> Path:
    """Export the latent student at `latent`.

    Args:
        latent_key: key of the stage that made it.
        name: the packed folder's name: `packed` for the student, `bitnet_sft_packed` for the baseline.

    Returns:
        the packed folder.

    Raises:
        ModelError: a further format of the recipe cannot hold this student; the packed folder is kept.
    """
    folder = run.run_dir / name
    inputs = {"from": latent_key, "float_dtype": run.recipe.export.float_dtype}
    if not run.finished("export", folder, inputs):
        model, tokenizer, manifest = load_student(latent)
        write_packed(model, tokenizer, manifest, folder, run, inputs)
    return folder


def export_formats(run: Run, packed: Path) -> dict[str, Path]:
    """The student's further formats, each in a folder of its name beside the packed one."""
    return write_formats(packed, run.run_dir, run.recipe.export)


def write_formats(packed: Path, place: Path, options: ExportConfig) -> dict[str, Path]:
    """Every format of `options` but packed itself, in `place`/FORMAT; kept when made from this very student.

    Raises:
        ModelError: a format cannot hold this student.
        ArtifactError: the packed folder is damaged.
    """
    files = artifact.read_manifest(packed)["files"]
    made: dict[str, Path] = {}
    for name in options.formats:
        if name == "packed":
            continue
        made[name] = place / name
        there = artifact.read_manifest(made[name]) if artifact.exists(made[name]) else {}
        wanted = options.gguf.model_dump(mode="json") if name in ("gguf", "ollama") else None
        if there.get("from") != files or there.get("options") != wanted:
            EXPORTERS[name](packed, made[name], options)
    return made
