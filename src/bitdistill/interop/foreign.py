"""Ternary models of other tools: found, imported to a packed folder, and loaded as if they were ours.

Read are a transformers checkpoint with `quant_method: bitnet` (transformers_import.py) and a GGUF file with ternary
tensors (gguf_import.py). `bd.load` and `bd.Engine` import such a model at first use into a cache, keyed by the
SHA-256 of its files; `bitdistill import` writes the packed folder where you want it. No torch at module level.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from bitdistill import artifact
from bitdistill.errors import ArtifactError, ModelError

if TYPE_CHECKING:
    import torch

Kind = Literal["gguf", "transformers"]
CACHE_VARIABLE = "BITDISTILL_CACHE"
_MAX_CONFIG_BYTES = 16_000_000


def foreign_kind(path: Path) -> Kind | None:
    """Which foreign format `path` is in; None: none of them (perhaps a bitdistill folder)."""
    if path.is_file():
        return "gguf" if path.suffix.lower() == ".gguf" else None
    config = path / "config.json"
    if artifact.exists(path) and artifact.read_manifest(path).get("kind") != "transformers_bitnet":
        return None
    try:
        if config.stat().st_size > _MAX_CONFIG_BYTES:
            return None
        values = json.loads(config.read_text("utf-8"))
    except (OSError, ValueError, RecursionError):
        return None  # whoever loads the folder says what is wrong with it
    section = values.get("quantization_config") if isinstance(values, dict) else None
    method = section.get("quant_method") if isinstance(section, dict) else None
    return "transformers" if method == "bitnet" else None


def import_student(source: Path, out: Path) -> Path:
    """Write a foreign ternary model as a packed folder: its codes and scales unchanged, floats as they are stored.

    Args:
        source: a .gguf file, or a folder whose config.json says `quant_method: bitnet`.
        out: an earlier import there is replaced, nothing else is.

    Returns:
        `out`.

    Raises:
        ModelError: not such a model, or one that cannot be held; the message names file and tensor.
        ArtifactError: a safetensors file is damaged, or `out` holds something else than an earlier import.
        MissingDependencyError: a GGUF file without the `gguf` package.
    """
    kind = foreign_kind(source)
    if kind is None:
        raise ModelError(
            f"{source}: neither a .gguf file nor a folder with quant_method bitnet; "
            "bitdistill folders need no import, full-precision models are a recipe's model.path"
        )
    _check_out(source, out)
    if kind == "gguf":
        from bitdistill.interop.gguf_import import import_gguf

        return import_gguf(source, out)
    from bitdistill.interop.transformers_import import import_transformers

    return import_transformers(source, out)


def _check_out(source: Path, out: Path) -> None:
    """Refuse to replace the source, or a model that no import made: its latents or its task would be lost."""
    whole, place = source.resolve(), out.resolve()
    if place == whole or place in whole.parents:
        raise ArtifactError(f"{out}: holds the source {source}; name another folder")
    artifact.check_place(out, "packed")
    if artifact.exists(out) and "imported" not in artifact.read_manifest(out):
        raise ArtifactError(f"{out}: holds a packed student that no import made; name another folder")


def packed_folder(path: Path | str) -> Path:
    """`path` itself, or for a foreign model its packed folder in the cache, imported if it is not there yet.

    The cache is $BITDISTILL_CACHE, or bitdistill/imported under the user's cache folder.
    """
    path = Path(path)
    kind = foreign_kind(path)
    if kind is None:
        return path
    files = [path] if kind == "gguf" else sorted(p for p in path.iterdir() if p.is_file())
    hashes = {file.name: artifact.sha256_file(file) for file in files}
    folder = _cache() / artifact.hash_json(hashes if kind != "gguf" else {"gguf": hashes[path.name]})[:32]
    if not artifact.exists(folder):
        with artifact.locked(folder):
            if not artifact.exists(folder):  # now; another process may just have made it
                import_student(path, folder)
    return folder


def _cache() -> Path:
    if named := os.environ.get(CACHE_VARIABLE):
        return Path(named)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "bitdistill" / "imported"


def load(path: Path | str, *, device: str | torch.device = "cpu", dtype: torch.dtype | None = None) -> Any:
    """The model of any bitdistill folder, GGUF file with ternary tensors or `bitnet` checkpoint, ready to run.

    `models.student.load_student` also gives the tokenizer.

    Args:
        device: where the model goes.
        dtype: compute dtype of everything but latents and scales; None: as saved (float32 for students).

    Raises:
        ArtifactError: missing, corrupt or malformed.
        ModelError: the model is not supported.
    """
    from bitdistill.models.student import load_student

    return load_student(packed_folder(path), device=device, dtype=dtype)[0]
