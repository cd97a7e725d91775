"""What scores a folder's rows: PyTorch, or the native engine on the CPU (`eval.engine` of the recipe).

Both give the same predictions; tests hold them against each other.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch

from bitdistill import artifact
from bitdistill.data.tasks import Example
from bitdistill.eval.classify import classify
from bitdistill.eval.generate import generate
from bitdistill.eval.likelihood import reference_nll
from bitdistill.eval.prediction import OnProgress, Prediction
from bitdistill.eval.results import hardware
from bitdistill.models.load import load_source
from bitdistill.models.student import load_student
from bitdistill.stages.common import Run, pad_token_id

if TYPE_CHECKING:
    from bitdistill.engine import Engine


class Scorer(Protocol):
    """A loaded model that answers encoded rows."""

    tokenizer: Any
    hardware: dict[str, Any]

    def predict(self, examples: Sequence[Example], progress: OnProgress | None = None) -> list[Prediction]:
        """Answers in the order of the examples; `progress` is told (examples done, examples to do)."""

    def reference_nll(
        self, examples: Sequence[Example], progress: OnProgress | None = None
    ) -> list[tuple[float, int]]:
        """Nats of each example's reference and its scored tokens; `progress` likewise."""


class PyTorchScorer:
    """A teacher or packed folder in float32 on the run's device, hashes verified."""

    def __init__(self, run: Run, folder: Path) -> None:
        if artifact.verify(folder)["kind"] == "teacher":
            source = run.recipe.model.model_copy(
                update={"path": str(folder), "tokenizer": None, "revision": None}
            )
            model, self.tokenizer = load_source(source, dtype="float32", device=run.device)
        else:
            model, self.tokenizer, _ = load_student(folder, device=run.device)
        self.model = model.eval()
        self.task, self.device, self.batch_rows = run.recipe.task, run.device, run.recipe.eval.batch_rows
        self.hardware = hardware(run.device)

    def predict(self, examples: Sequence[Example], progress: OnProgress | None = None) -> list[Prediction]:
        score = classify if self.task.kind == "classification" else generate
        predictions = score(
            self.model,
            self.tokenizer,
            self.task,
            list(examples),
            batch_rows=self.batch_rows,
            device=self.device,
            pad_id=pad_token_id(self.tokenizer),
            progress=progress,
        )
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return predictions

    def reference_nll(
        self, examples: Sequence[Example], progress: OnProgress | None = None
    ) -> list[tuple[float, int]]:
        return reference_nll(
            self.model,
            examples,
            batch_rows=self.batch_rows,
            device=self.device,
            pad_id=pad_token_id(self.tokenizer),
            progress=progress,
        )


class NativeScorer:
    """The same folder in the native engine: on the CPU whatever the run's device."""

    def __init__(self, run: Run, folder: Path) -> None:
        from bitdistill.engine import Engine

        self.engine: Engine = Engine(folder, threads=run.recipe.threads)
        self.tokenizer = self.engine.tokenizer
        self.task, self.batch_rows = run.recipe.task, run.recipe.eval.batch_rows
        self.hardware = {
            **hardware(),
            "device": "cpu",
            "engine": "native",
            "isa": self.engine.isa,
            "threads": self.engine.facts["threads"],
        }

    def predict(self, examples: Sequence[Example], progress: OnProgress | None = None) -> list[Prediction]:
        return self.engine.predict(self.task, examples, batch_rows=self.batch_rows, progress=progress)

    def reference_nll(
        self, examples: Sequence[Example], progress: OnProgress | None = None
    ) -> list[tuple[float, int]]:
        return self.engine.reference_nll(examples, progress=progress)


SCORERS: dict[str, Callable[[Run, Path], Scorer]] = {"pytorch": PyTorchScorer, "native": NativeScorer}
"""By the recipe's `eval.engine`."""


def open_scorer(run: Run, folder: Path) -> Scorer:
    """The recipe's scorer of a folder.

    Raises:
        ArtifactError: the folder is corrupt.
        ModelError: the native engine does not run this model.
    """
    return SCORERS[run.recipe.eval.engine](run, folder)
