"""Which tools read a packed student, and why the others do not: from its config.json and plan, no weight is read."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from bitdistill import artifact
from bitdistill.errors import ModelError
from bitdistill.interop.gguf_architecture import architecture_of, rope
from bitdistill.interop.transformers_bitnet import target_config
from bitdistill.models.families import layout_of
from bitdistill.models.surgery import SurgeryPlan


@dataclass(frozen=True)
class Reader:
    """A tool, the format it would read, and the reason why it cannot (None: it can)."""

    tool: str
    format: str
    why_not: str | None = None


def readers(packed: Path) -> list[Reader]:
    """Every tool that an export is for, whether or not it can hold this student.

    Raises:
        ArtifactError, ModelError: `packed` is no packed student.
    """
    manifest = artifact.read_manifest(packed)
    if manifest.get("kind") != "packed":
        raise ModelError(f"{packed}: kind {manifest.get('kind')}; a packed student is needed")
    config = json.loads((packed / "config.json").read_text("utf-8"))
    plan = SurgeryPlan.from_json(manifest["plan"], str(packed))
    head_dim = layout_of(config, str(packed)).head_dim

    def gguf(weights: str) -> None:
        rope(config, architecture_of(config, plan, weights, ""), head_dim, "")

    checks: list[tuple[str, str, Callable[[], object]]] = [
        ("plain transformers", "hf", lambda: target_config(config, plan, "")),
        ("llama.cpp and Ollama", "gguf", lambda: gguf("tq2_0")),
        ("bitnet.cpp", "gguf with i2_s", lambda: gguf("i2_s")),
    ]
    found = [
        Reader("bitdistill and its engine", "packed"),
        Reader("transformers after import bitdistill", "packed"),
    ]
    for tool, form, check in checks:
        try:
            check()
            found.append(Reader(tool, form))
        except ModelError as error:
            found.append(Reader(tool, form, str(error).removeprefix(": ").split("; ")[0]))
    return found
