"""config.json of a recipe's model without loading the model: folder, GGUF header, hub cache, shipped copy."""

from __future__ import annotations

import json
import os
from importlib import resources
from pathlib import Path
from typing import Any

from bitdistill.config import ModelSource
from bitdistill.engine.text import FolderTokenizer
from bitdistill.errors import ModelError
from bitdistill.models.gguf_header import config_from_gguf, read_gguf

MAX_CONFIG_BYTES = 4 << 20


def find_config(source: ModelSource, key: str = "model.path") -> tuple[dict[str, Any], str]:
    """The model's config and where it was read; `key` is the recipe's, for errors.

    Looked for in this order: a `.gguf` file's header; `config.json` of a local folder; the local Hugging
    Face cache (`HF_HUB_CACHE`, `HF_HOME`); a copy shipped with bitdistill. Nothing is downloaded.

    Raises:
        ModelError: none of these has it, or the file is unreadable.
    """
    path = Path(source.path).expanduser()
    if source.path.endswith(".gguf"):
        if not path.is_file():
            raise ModelError(f"{key}: {source.path}: no such file; check the path")
        return config_from_gguf(read_gguf(path)), f"GGUF header of {path}"
    if path.is_dir():
        return read_config(path / "config.json"), str(path / "config.json")
    if not _is_hub_name(source.path):
        raise ModelError(
            f"{key}: {source.path}: no such folder; give a Hugging Face folder, hub name or .gguf"
        )
    cached = cached_config(source.path, source.revision)
    if cached is not None:
        return read_config(cached), f"Hugging Face cache: {cached}"
    shipped = resources.files("bitdistill.assets") / "configs" / f"{source.path.replace('/', '--')}.json"
    if shipped.is_file():
        config: dict[str, Any] = json.loads(shipped.read_text("utf-8"))
        return config, f"copy of {source.path}'s config shipped with bitdistill"
    raise ModelError(
        f"{key}: {source.path}: not in the local Hugging Face cache, and bitdistill ships no copy of "
        f"its config; download it first (hf download {source.path}) or give a folder"
    )


def is_at_hand(source: ModelSource) -> bool:
    """Whether `find_config` need not wait for a download."""
    if source.path.endswith(".gguf") or Path(source.path).expanduser().is_dir():
        return True
    return not _is_hub_name(source.path) or cached_config(source.path, source.revision) is not None


def read_config(path: Path) -> dict[str, Any]:
    """A config.json.

    Raises:
        ModelError: missing, too large, or not a JSON object.
    """
    try:
        with path.open("rb") as handle:
            raw = handle.read(MAX_CONFIG_BYTES + 1)
        if len(raw) > MAX_CONFIG_BYTES:
            raise ModelError(f"{path}: larger than {MAX_CONFIG_BYTES} bytes; this is no model config")
        config = json.loads(raw)
    except FileNotFoundError:
        raise ModelError(f"{path}: missing; model.path must be a Hugging Face model folder") from None
    except OSError as error:
        raise ModelError(f"{path}: cannot be read ({error.strerror}); check its rights") from None
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{path}: not JSON ({str(error)[:80]}); get the file again") from None
    if not isinstance(config, dict):
        raise ModelError(f"{path}: not a JSON object; get the file again")
    return config


def cached_config(name: str, revision: str | None) -> Path | None:
    """config.json of a hub model in the local cache (models--owner--name/snapshots/commit/), or None."""
    home = os.environ.get("HF_HOME") or os.path.join(
        os.environ.get("XDG_CACHE_HOME", "~/.cache"), "huggingface"
    )
    hub = os.environ.get("HF_HUB_CACHE") or os.path.join(home, "hub")
    folder = Path(hub).expanduser() / f"models--{name.replace('/', '--')}"
    wanted = revision or "main"
    ref = folder / "refs" / wanted
    try:
        commit = ref.read_text("utf-8").strip() if ref.is_file() else wanted
    except (OSError, UnicodeDecodeError):
        return None
    path = folder / "snapshots" / commit / "config.json"
    return path if path.is_file() else None


def find_tokenizer(source: ModelSource) -> FolderTokenizer | None:
    """The model's tokenizer where a fast one lies in a local folder or in the Hugging Face cache, else None.

    Raises:
        ModelError: a tokenizer is there and unreadable.
    """
    name = source.path if source.tokenizer is None else source.tokenizer
    folder = Path(name).expanduser()
    if not folder.is_dir():
        cached = cached_config(name, source.revision) if _is_hub_name(name) else None
        if cached is None:
            return None
        folder = cached.parent
    return FolderTokenizer(folder) if (folder / "tokenizer.json").is_file() else None


def _is_hub_name(text: str) -> bool:
    owner, slash, name = text.partition("/")
    return bool(slash and owner and name) and "/" not in name and not text.startswith((".", "~"))
