"""What `bitdistill perplexity --json` prints: a model on a text, with what is needed to measure it again."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from bitdistill import artifact
from bitdistill.errors import ArtifactError
from bitdistill.eval.perplexity import TextScores


class Trained(BaseModel):
    """The last training stage of a model of ours."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    stage: str
    """As in a recipe: pretrain, distill, ..."""
    key: str
    """The artifact's."""
    steps: int
    tokens: int
    device_s: float
    """Seconds of all processes, and as steps and tokens of all sittings (`pretrain.start`)."""
    settings: dict[str, Any] = {}
    """The recipe's, as far as the stage's result depends on them."""
    seed: int | None = None

    @classmethod
    def of(cls, manifest: Mapping[str, Any]) -> Trained | None:
        """From an artifact's manifest; None where it names no training (imported students)."""
        cost, stage = artifact.training_cost(manifest), manifest.get("stage")
        if cost is None or not isinstance(stage, str):
            return None
        inputs = manifest.get("inputs") or {}
        return cls(
            stage=stage,
            key=str(manifest.get("key", "")),
            **{**cost, "device_s": round(cost["device_s"], 2)},
            settings=dict(inputs.get(stage) or {}),
            seed=inputs.get("seed"),
        )


class TextResult(TextScores):
    """Scores and where they come from."""

    model: str
    text: list[str]
    reference: str | None = None
    trained: Trained | None = None
    command: str
    commit: str | None
    versions: dict[str, str]
    hardware: dict[str, Any]
    elapsed_s: float
    """Of scoring alone."""


def read_text_result(path: Path) -> TextResult:
    """What `bitdistill perplexity --json > path` wrote.

    Raises:
        ArtifactError: missing or malformed file (field named).
    """
    try:
        return TextResult.model_validate_json(path.read_text("utf-8"))
    except FileNotFoundError:
        raise ArtifactError(f"{path}: no such file; write it with `bitdistill perplexity --json`") from None
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(map(str, first["loc"])) or "the document"
        raise ArtifactError(
            f"{path}: {field}: {first['msg']}; write it again with `bitdistill perplexity --json`"
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise ArtifactError(f"{path}: unreadable ({error})") from error
