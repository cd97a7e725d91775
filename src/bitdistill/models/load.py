"""Full-precision models in: a Hugging Face folder, a hub name, or a GGUF file.

Weights are read from safetensors or GGUF only (never pickle) and no code from a model folder is ever run.
torch and transformers are imported when a model is loaded, not before: `bitdistill plan` uses `config_dict`.
"""

from __future__ import annotations

import functools
import hashlib
import logging
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from bitdistill.artifact import hash_json, sha256_file
from bitdistill.config import ModelSource
from bitdistill.errors import ArtifactError, BitDistillError, ModelError
from bitdistill.models import contents, gguf
from bitdistill.models.families import layout_of
from bitdistill.models.gguf_header import config_from_gguf, read_gguf
from bitdistill.models.tokenizer import TOKENIZER_FILES, VOCABULARY_FILES, check_tokenizer, read_tokenizer

if TYPE_CHECKING:
    import torch

log = logging.getLogger("bitdistill")

_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
# What is fetched of a hub repository: never pickle, never code.
_HUB_PATTERNS = ["*.safetensors", "*.json", "*.txt", "*.model", "*.jinja"]


def _locate(path: str) -> tuple[Literal["folder", "gguf", "hub"], Path]:
    """Which kind of source `path` is.

    Raises:
        ModelError: neither a folder, a .gguf file nor a possible hub name.
    """
    local = Path(path).expanduser()
    if local.is_dir():
        return "folder", local
    if local.suffix.lower() == ".gguf" and local.is_file():
        return "gguf", local
    if local.exists():
        raise ModelError(f"model.path {path}: is a file; give a model folder, a hub name or a .gguf file")
    if local.suffix.lower() == ".gguf" or not re.fullmatch(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?", path):
        raise ModelError(f"model.path {path}: no such file or folder; check the path")
    return "hub", local


def _from_hub(name: str, revision: str | None, patterns: list[str]) -> Path:
    """The local snapshot folder of a hub repository (fetched once, then from the cache).

    Raises:
        ModelError: not on the hub, or the hub cannot be reached.
    """
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=patterns))
    except Exception as error:  # the hub client raises many types, httpx's and its own
        at = f" at revision {revision}" if revision else ""
        reason = " ".join(str(error).split())[:160]
        raise ModelError(
            f"model {name}{at}: not a local folder, and not readable from the hub ({reason}); "
            "check the name or download it to a folder first"
        ) from error


def config_dict(source: ModelSource) -> dict[str, Any]:
    """The dict of config.json of a source; no weights are read and torch is not imported.

    Raises:
        ModelError: not found, unreadable, or already quantized.
    """
    kind, path = _locate(source.path)
    if kind == "gguf":
        return config_from_gguf(read_gguf(path))
    if kind == "hub":
        path = _from_hub(source.path, source.revision, ["config.json"])
    config = contents.read_config(path)
    contents.check_full_precision(config, str(path))
    return config


def load_source(
    source: ModelSource, *, dtype: str | torch.dtype = "float32", device: str | torch.device = "cpu"
) -> tuple[Any, Any]:
    """Load a full-precision model and its tokenizer.

    Args:
        source: recipe section `model`.
        dtype: of all weights, for example "float32" or torch.bfloat16.
        device: where the model goes.

    Returns:
        model (evaluation mode, sdpa attention), tokenizer.

    Raises:
        ModelError: not found, unsupported, already quantized, pickle-only, incomplete, or the tokenizer does
            not belong to the model.
        MissingDependencyError: a GGUF file without the packages that read it.
    """
    import torch

    config = config_dict(source)
    layout = layout_of(config, source.path)
    resolved = getattr(torch, dtype) if isinstance(dtype, str) else dtype
    kind, path = _locate(source.path)
    try:
        if kind == "gguf":
            header = read_gguf(path)
            model = gguf.load_model(header, config, resolved)
        else:
            if kind == "hub":
                path = _from_hub(source.path, source.revision, _HUB_PATTERNS)
            model = _load_folder(path, resolved)
        if kind == "gguf" and source.tokenizer is None:
            tokenizer = gguf.load_tokenizer(header)
        else:
            tokenizer = _load_tokenizer(source.tokenizer or str(path))
    except BitDistillError:
        raise
    except (OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:240]
        raise ModelError(f"{source.path}: transformers cannot load it ({reason}); check the model") from error
    found = sum(p.numel() for p in model.parameters())
    if found != layout.parameters:
        raise ModelError(
            f"{source.path}: {found} parameters, its config says {layout.parameters}; fetch it again"
        )
    check_tokenizer(model.config.to_dict(), tokenizer, source.path)
    return model.to(device).eval(), tokenizer


def load_tokenizer(source: ModelSource) -> Any:
    """The tokenizer of a source without its model.

    Raises:
        ModelError: not found or unreadable.
    """
    return _load_tokenizer(source.tokenizer or source.path)


def _load_folder(folder: Path, dtype: torch.dtype) -> Any:
    from transformers import AutoModelForCausalLM

    from bitdistill.models.student import quiet

    try:
        for file in contents.weight_files(folder):
            contents.read_header(file)
    except ArtifactError as error:
        pickles = sorted(p.name for pattern in _PICKLES for p in folder.glob(pattern))
        if pickles and not any(folder.glob("*.safetensors")):
            raise ModelError(
                f"{folder}: weights are pickle only ({pickles[0]}), which can run code; "
                "convert them to safetensors"
            ) from error
        raise ModelError(str(error)) from error
    with quiet():
        model, info = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=dtype,
            attn_implementation="sdpa",
            use_safetensors=True,
            trust_remote_code=False,
            local_files_only=True,
            output_loading_info=True,
        )
    for problem in ("missing_keys", "mismatched_keys"):
        if info[problem]:
            first = sorted(str(k) for k in info[problem])[0]
            raise ModelError(
                f"{folder}: {problem.replace('_', ' ')}: {first}; the weights do not fit the config"
            )
    if info["unexpected_keys"]:
        unused = sorted(info["unexpected_keys"])
        log.warning("%s: %d tensors are not used, such as %s", folder, len(unused), unused[0])
    return model


def _load_tokenizer(name: str) -> Any:
    kind, path = _locate(name)
    if kind == "gguf":
        return gguf.load_tokenizer(read_gguf(path))
    if kind == "hub":
        path = _from_hub(name, None, [p for p in _HUB_PATTERNS if p != "*.safetensors"])
    if not any((path / file).is_file() for file in VOCABULARY_FILES):
        raise ModelError(f"{path}: no tokenizer files; name a folder that has them as model.tokenizer")
    return read_tokenizer(path)


def source_fingerprint(source: ModelSource) -> str:
    """Hex SHA-256 over everything that determines a source: config, weights and tokenizer files.

    It depends on contents, not on paths: a hub model and its downloaded folder have the same fingerprint.

    Raises:
        ModelError: the source is not found.
    """
    kind, path = _locate(source.path)
    if kind == "gguf":
        files = {"model.gguf": _sha256(path)}
    else:
        if kind == "hub":
            path = _from_hub(source.path, source.revision, _HUB_PATTERNS)
        config = {k: v for k, v in contents.read_config(path).items() if k != "_name_or_path"}
        files = {file.name: _sha256(file) for file in sorted(path.glob("*.safetensors"))}
        files["config"] = hash_json(config)
        files |= _tokenizer_hashes(path)
    if source.tokenizer is not None:
        kind, path = _locate(source.tokenizer)
        if kind == "hub":
            path = _from_hub(source.tokenizer, None, [p for p in _HUB_PATTERNS if p != "*.safetensors"])
        own = {"gguf": _sha256(path)} if kind == "gguf" else _tokenizer_hashes(path)
        files |= {f"tokenizer/{name}": value for name, value in own.items()}
    return hashlib.sha256(hash_json(files).encode()).hexdigest()


def _tokenizer_hashes(folder: Path) -> dict[str, str]:
    return {name: _sha256(folder / name) for name in TOKENIZER_FILES if (folder / name).is_file()}


def _sha256(path: Path) -> str:
    """SHA-256 of a file, remembered while its size and time stay the same."""
    stat = path.stat()
    return _sha256_once(str(path), stat.st_size, stat.st_mtime_ns)


@functools.lru_cache(maxsize=4096)
def _sha256_once(path: str, size: int, mtime_ns: int) -> str:
    return sha256_file(Path(path))
