"""Export: codes and scales are computed once from the latents and written to a packed student."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from bitdistill import artifact
from bitdistill.config import ExportConfig
from bitdistill.errors import ArtifactError
from bitdistill.interop.gguf_export import export_gguf
from bitdistill.interop.ollama import export_ollama
from bitdistill.interop.transformers_bitnet import export_transformers
from bitdistill.models.student import load_student, pack, round_parameters, save_student
from bitdistill.quant.linear import BitLinear
from bitdistill.quant.ternary import ternarize
from bitdistill.stages.common import Run, log


def write_packed(
    model: Any, tokenizer: Any, manifest: dict[str, Any], folder: Path, run: Run, inputs: Any
) -> None:
    """The packed folder of docs/format.md.

    A redo's mark stays (`Run.save_artifact` would clear it): the stage writes two folders.
    """
    float_dtype = run.recipe.export.float_dtype
    save_student(
        pack(model, float_dtype),
        tokenizer,
        folder,
        kind="packed",
        plan=manifest["plan"],
        recipe=run.recipe.model_dump(mode="json", by_alias=True),
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


def export_base(base: Path, folder: Path, float_dtype: str) -> Path:
    """A copy of a ternary base, to keep or to hand on; elsewhere `pretrain.base` names it.

    float16 halves it. Rounded latents are other latents, a few of which change their code (the share is logged), so
    such a copy has a key of its own, and so has what is distilled from it.

    Args:
        base: a ternary base's folder.
        folder: written; what is there is never replaced.
        float_dtype: storage of the latents: float32 (bit-exact), float16 or bfloat16.

    Returns:
        `folder`.

    Raises:
        ArtifactError: `base` is no ternary base, or something else is at `folder`.
        ModelError: a latent does not fit `float_dtype`.
        StorageError: the file system refused a write.
    """
    manifest = artifact.verify(base)
    if manifest.get("kind") != "base":
        raise ArtifactError(f"{base}: kind {manifest.get('kind')!r}, a ternary base is needed")
    key = str(manifest["key"])
    if float_dtype != "float32":
        key = artifact.hash_json({"base": key, "float_dtype": float_dtype})
    if folder.exists():
        if artifact.exists(folder) and artifact.read_manifest(folder).get("key") == key:
            log.info("pretrain: %s holds this base, kept", folder)
            return folder
        raise ArtifactError(f"{folder}: is there already and holds something else; name another folder")
    model, tokenizer, _ = load_student(base)
    codes = _codes(model)
    round_parameters(model, float_dtype)
    changed = sum(int((a != b).sum()) for a, b in zip(codes, _codes(model), strict=True))
    if changed:
        share = changed / sum(a.numel() for a in codes)
        log.info("pretrain: %s changes %.4f %% of the ternary codes", float_dtype, 100 * share)
    kept = ("stage", "inputs", "training", "branched_from", "started_from")
    save_student(
        model, tokenizer, folder, kind="base", plan=manifest["plan"], recipe=manifest["recipe"],
        extra={"key": key, **{name: manifest[name] for name in kept if name in manifest}}, float_dtype=float_dtype,
    )  # fmt: skip
    return folder


def _codes(model: torch.nn.Module) -> list[torch.Tensor]:
    return [ternarize(m.weight.detach())[0] for m in model.modules() if isinstance(m, BitLinear)]


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
