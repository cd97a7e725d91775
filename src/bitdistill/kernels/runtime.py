"""Whether the fused kernels can run here, and what a recipe's `loop.kernels` comes to."""

from __future__ import annotations

import importlib.util
import logging
import os

import torch

log = logging.getLogger("bitdistill")
_said: set[str] = set()


def interpreted() -> bool:
    """Whether Triton runs its kernels in Python (TRITON_INTERPRET=1), as tests do without a GPU."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def why_not(device: torch.device) -> str | None:
    """The reason why the Triton kernels cannot run on `device`, or None when they can."""
    if device.type != "cuda":
        return f"device {device.type} is not a CUDA GPU"
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    major, minor = torch.cuda.get_device_capability(device)
    if (major, minor) < (8, 0):
        return f"compute capability {major}.{minor} is below 8.0"
    return None


def say_once(reason: str, level: int = logging.WARNING) -> None:
    """Log why the reference path is used, the first time that this reason comes up."""
    if reason not in _said:
        _said.add(reason)
        log.log(level, "kernels: the reference path is used, %s", reason)


def wants_kernels(setting: str, device: torch.device) -> bool:
    """Resolve a recipe's `loop.kernels`: auto takes the fused kernels where they run.

    On a GPU without them, says so once.
    """
    if setting == "reference":
        return False
    reason = why_not(device)
    if reason is not None:
        say_once(reason, logging.WARNING if device.type == "cuda" else logging.INFO)
    return reason is None
