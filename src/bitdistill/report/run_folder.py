"""A run folder as values: what is there is parsed and checked, what is not there is named.

Nothing here draws or formats. A missing piece (a run that is not finished) is None or empty and adds one
line to `RunFolder.missing`; a piece that is there but cannot be read is an ArtifactError.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bitdistill import artifact
from bitdistill.config import MOST_TEACHERS
from bitdistill.errors import ArtifactError
from bitdistill.report.inspect import LayerStats, read_stats

if TYPE_CHECKING:
    from bitdistill.eval.results import ResultRow

STAGES = {
    "sft": "Teacher (full-precision fine-tune)",
    "refine": "Stage 1: refine",
    "pretrain": "Stage 2: continued pre-training",
    "augment": "Further rows, written by the model",
    "distill": "Stage 3: distillation",
    "bitnet_sft": "Baseline: BitNet-SFT",
}
ARTIFACT_OF = {
    "sft": "teacher",
    "pretrain": "base",
    "augment": "written",
    "distill": "student",
    "bitnet_sft": "bitnet_sft",
}
TRAINED = tuple(ARTIFACT_OF)
FURTHER_TEACHERS = tuple(f"teacher_{n}" for n in range(1, MOST_TEACHERS))
"""Artifacts, and work with keys of its own, of those that `distill.teachers` adds."""
ARTIFACTS = (
    "teacher",
    *FURTHER_TEACHERS,
    "refined",
    "base",
    "writer",
    "written",
    "label_scores",
    "student",
    "bitnet_sft",
    "packed",
    "bitnet_sft_packed",
)
STATS = ("refined", "base", "student", "bitnet_sft")
_MAX_LINE = 16 << 20


@dataclass(frozen=True)
class StageLog:
    """One stage's metrics, one record a step, in step order."""

    stage: str
    records: list[dict[str, Any]]
    nonfinite: int = 0
    """Logged values that were NaN or Inf; they are not drawn."""

    def series(self, key: str, x: str = "tokens") -> tuple[list[float], list[float]]:
        """Finite (x, value) pairs of one metric; x is a logged counter (`tokens` or `step`)."""
        pairs = [(row[x], row[key]) for row in self.records if _finite(row.get(key)) and _finite(row.get(x))]
        return [float(a) for a, _ in pairs], [float(b) for _, b in pairs]

    def last(self, key: str) -> float | None:
        """Last finite value of a metric."""
        return next((float(row[key]) for row in reversed(self.records) if _finite(row.get(key))), None)


@dataclass(frozen=True)
class Cost:
    """What one training stage took."""

    stage: str
    steps: int
    steps_planned: int
    tokens: int
    elapsed_s: float
    reused: bool = False
    """Spent by an earlier run whose artifact this run reused: a ternary base, or in a sweep any stage."""

    @property
    def tokens_per_s(self) -> float | None:
        """Whole-stage average, waiting and checkpoints included."""
        return self.tokens / self.elapsed_s if self.elapsed_s > 0 else None


@dataclass(frozen=True)
class Answer:
    """One line of predictions/<row>.jsonl."""

    index: int
    where: str
    prompt: str
    reference: str
    prediction: str
    correct: bool | None
    """None for generation, where an answer is scored and not right or wrong."""
    scores: tuple[float, ...] = ()
    """Classification: log-likelihood of each label, in nats and to four places."""


@dataclass(frozen=True)
class RunFolder:
    """Everything the report says, read from `path`."""

    path: Path
    recipe: dict[str, Any]
    recipe_text: str
    info: dict[str, Any]
    rows: list[ResultRow]
    logs: dict[str, StageLog]
    stats: dict[str, list[LayerStats]]
    manifests: dict[str, dict[str, Any]]
    base_path: str | None
    """Folder of the ternary base (base.json): a shared cache, or what the recipe names."""
    answers: dict[str, list[Answer]]
    missing: list[str] = field(default_factory=list)

    def row(self, name: str) -> ResultRow | None:
        """The results row of that name."""
        return next((row for row in self.rows if row.name == name), None)

    @property
    def bootstrap_seed(self) -> int:
        """Seed of paired bootstrap intervals."""
        return int(self._section("eval").get("bootstrap_seed", 0))

    @property
    def split(self) -> str:
        """Name of the rows that were scored: test, or validation where the recipe has no test rows."""
        asked = str(self._section("eval").get("split", "test"))
        return asked if self._section("data").get("test") else "validation"

    def _section(self, name: str) -> dict[str, Any]:
        value = self.recipe.get(name)
        return value if isinstance(value, dict) else {}

    @property
    def costs(self) -> list[Cost]:
        """One entry a trained stage whose artifact or log says what it took, in pipeline order."""
        return [cost for stage in TRAINED if (cost := self._cost(stage))]

    @property
    def base_reused(self) -> bool:
        """Whether the ternary base was made by another run (it is cached, or named by the recipe)."""
        return self.base_path is not None and "pretrain" not in self.logs

    def _cost(self, stage: str) -> Cost | None:
        """From the artifact's manifest when the stage is finished, else as far as its log goes."""
        manifest = self.manifests.get(ARTIFACT_OF[stage], {})
        done = manifest.get("training")
        reused = (stage == "pretrain" and self.base_reused) or (self.path / ARTIFACT_OF[stage]).is_symlink()
        if isinstance(done, dict) and all(_finite(done.get(key)) for key in ("steps", "tokens", "elapsed_s")):
            steps = int(done["steps"])
            return Cost(stage, steps, steps, int(done["tokens"]), float(done["elapsed_s"]), reused)
        log = self.logs.get(stage)
        last = log.records[-1] if log else {}
        if not (_finite(last.get("tokens")) and _finite(last.get("elapsed_s"))):
            return None
        planned = last.get("steps")
        planned = planned if isinstance(planned, int) else last["step"]
        return Cost(stage, last["step"], planned, int(last["tokens"]), float(last["elapsed_s"]), reused)


def read_run(run_dir: str | Path) -> RunFolder:
    """Read a run folder, finished or not.

    Raises:
        ArtifactError: `run_dir` is not a run folder, or a file in it cannot be understood.
    """
    path = Path(run_dir)
    if not (path / "recipe.yaml").is_file():
        raise ArtifactError(f"{path}: no recipe.yaml here; give the folder that `bitdistill run` made")
    missing: list[str] = []
    text, recipe = _read_recipe(path / "recipe.yaml")
    info = _read_json(path / "run.json") if (path / "run.json").is_file() else {}
    if not info:
        missing.append("run.json: command, commit, versions and hardware of the run are not recorded.")
    rows = _read_rows(path / "results.json")
    if not rows:
        missing.append("results.json: nothing has been evaluated yet, so there is no results table.")
    manifests, base_path = _read_manifests(path)
    logs = {name: log for name in TRAINED if (log := read_log(path / "logs" / f"{name}.jsonl", name))}
    stats = {name: layers for name in STATS if (layers := read_stats(path, name))}
    answers = {row.name: found for row in rows if (found := read_answers(path, row.name))}
    missing += _missing_pieces(recipe, rows, manifests, base_path, logs, stats, answers)
    return RunFolder(path, recipe, text, info, rows, logs, stats, manifests, base_path, answers, missing)


def _missing_pieces(
    recipe: Mapping[str, Any],
    rows: list[ResultRow],
    manifests: Mapping[str, Any],
    base_path: str | None,
    logs: Mapping[str, StageLog],
    stats: Mapping[str, Any],
    answers: Mapping[str, Any],
) -> list[str]:
    """One plain sentence for each thing a whole run would have and this one has not."""
    lines = []
    with_pretrain = recipe.get("pretrain") is not None
    wanted = {"sft": True, "pretrain": with_pretrain and not base_path, "distill": True}
    wanted["bitnet_sft"] = recipe.get("bitnet_sft") is not None
    for stage, due in wanted.items():
        if due and stage not in logs:
            lines.append(f"logs/{stage}.jsonl: no training log, so no curve and no cost of this stage.")
    for name in ("refined", "base") if with_pretrain else ("refined",):
        if name not in stats:
            lines.append(f"stats/{name}.json: no weight statistics, so no histogram of the {name} model.")
    if "packed" not in manifests:
        lines.append("packed/: the student has not been exported yet.")
    lines += [
        f"predictions/{row.name}.jsonl: no single predictions, so no paired comparison of this row."
        for row in rows
        if row.name not in answers
    ]
    return lines


def _read_recipe(path: Path) -> tuple[str, dict[str, Any]]:
    from ruamel.yaml import YAML
    from ruamel.yaml.error import YAMLError

    try:
        text = path.read_text("utf-8")
        recipe = YAML(typ="safe", pure=True).load(text)
    except (OSError, UnicodeDecodeError, YAMLError) as error:
        reason = str(error).splitlines()[0]
        raise ArtifactError(f"{path}: unreadable recipe ({reason}); run `bitdistill run` again") from error
    if not isinstance(recipe, dict):
        raise ArtifactError(f"{path}: not a recipe (a mapping is expected); run `bitdistill run` again")
    return text, recipe


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise ArtifactError(f"{path}: unreadable JSON ({error}); repeat the stage that writes it") from error
    if not isinstance(value, dict):
        raise ArtifactError(f"{path}: a JSON object is expected; repeat the stage that writes it")
    return value


def _read_rows(path: Path) -> list[ResultRow]:
    if not path.is_file():
        return []
    from bitdistill.eval.results import read_results

    return list(read_results(path))


def _read_manifests(path: Path) -> tuple[dict[str, dict[str, Any]], str | None]:
    manifests = {
        name: artifact.read_manifest(path / name) for name in ARTIFACTS if artifact.exists(path / name)
    }
    base_path = None
    if (path / "base.json").is_file() and "base" not in manifests:
        base_path = str(_read_json(path / "base.json").get("path", ""))
        if base_path and artifact.exists(Path(base_path)):
            manifests["base"] = artifact.read_manifest(Path(base_path))
    return manifests, base_path


def _lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Numbered JSON objects of a file; a last line cut short by a killed writer is left out."""
    try:
        raw = path.read_bytes().split(b"\n")
    except OSError as error:
        raise ArtifactError(f"{path}: {error.strerror or error}; check the file") from error
    for number, line in enumerate(raw, start=1):
        if not line.strip():
            continue
        try:
            if len(line) > _MAX_LINE:
                raise ValueError(f"{len(line)} bytes in one line")
            value = json.loads(line.decode("utf-8"))
            if not isinstance(value, dict):
                raise ValueError("a JSON object is expected")
        except (ValueError, RecursionError) as error:
            if number == len(raw):  # no newline after it: the writer was stopped in the middle
                return
            raise ArtifactError(f"{path}:{number}: unreadable line ({error}); repeat the stage") from error
        yield number, value


def read_log(path: Path, stage: str) -> StageLog | None:
    """Records by step; a step logged twice (a resumed run repeats some) counts once, the later one."""
    if not path.is_file():
        return None
    steps: dict[int, dict[str, Any]] = {}
    nonfinite = 0
    for number, record in _lines(path):
        if not isinstance(record.get("step"), int):
            raise ArtifactError(f"{path}:{number}: `step` is not an integer; repeat the stage")
        nonfinite += sum(isinstance(value, float) and not math.isfinite(value) for value in record.values())
        steps[record["step"]] = record
    records = [steps[step] for step in sorted(steps)]
    return StageLog(stage, records, nonfinite) if records else None


def read_answers(run: Path, row: str) -> list[Answer] | None:
    """Lines of predictions/<row>.jsonl; None when there is no such file.

    Raises:
        ArtifactError: a line that is not a prediction.
    """
    path = run / "predictions" / f"{row}.jsonl"
    if not path.is_file():
        return None
    answers = []
    for number, record in _lines(path):
        try:
            correct = record.get("correct")
            answers.append(
                Answer(
                    index=int(record["index"]),
                    where=str(record.get("where", "")),
                    prompt=str(record["prompt"]),
                    reference=_as_text(record["reference"]),
                    prediction=_as_text(record["prediction"]),
                    correct=None if correct is None else bool(correct),
                    scores=tuple(float(score) for score in record.get("scores") or ()),
                )
            )
        except (KeyError, TypeError, ValueError) as error:
            raise ArtifactError(f"{path}:{number}: not a prediction ({error!r}); evaluate again") from error
    return answers


def _as_text(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, list):
        return " | ".join(str(item) for item in value)
    return str(value)


def _finite(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
