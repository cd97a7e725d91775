"""The environment of tests and of the commands they start: what a terminal, a CI or a cache may set is gone."""

from __future__ import annotations

from collections.abc import Mapping

# They force colours and width (typer, rich, click), complete instead of run, or name the user's caches.
LEAKING = (
    "GITHUB_ACTIONS",
    "FORCE_COLOR",
    "PY_COLORS",
    "CLICOLOR_FORCE",
    "TTY_COMPATIBLE",
    "TTY_INTERACTIVE",
    "_BITDISTILL_COMPLETE",
    "HF_HUB_CACHE",
    "HUGGINGFACE_HUB_CACHE",
    "HF_DATASETS_CACHE",
)


def plain(environment: Mapping[str, str]) -> dict[str, str]:
    """`environment` without what leaks into output or caches, on a terminal that can do nothing."""
    kept = {name: value for name, value in environment.items() if name not in LEAKING}
    return {**kept, "NO_COLOR": "1", "TERM": "dumb"}
