"""A sweep's results: one JSON with every run's rows, costs and curves, enough for tables without the runs.

Written after every run, so a sweep that was stopped has the results so far. No torch import.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from bitdistill import artifact
from bitdistill.errors import ArtifactError
from bitdistill.eval.results import ResultRow
from bitdistill.report import text
from bitdistill.report.run_folder import ARTIFACT_OF, RunFolder, StageLog, read_log

FORMAT: Literal["bitdistill-sweep-1"] = "bitdistill-sweep-1"
ROW_ORDER = ("teacher", "bitnet_sft", "bitdistill")
CURVE_POINTS = 120
CURVE_KEYS = ("loss", "lm", "kl", "ce", "ld", "ad", "ad_ce_ratio", "grad_norm")


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class StageCost(_Record):
    """What a stage took; equal keys are the same artifact, paid for once."""

    key: str
    steps: int
    tokens: int
    elapsed_s: float
    saved_s: float = 0.0
    """Of elapsed_s, spent by another run whose checkpoint this one branched from."""


class RunResult(_Record):
    """One run of a sweep."""

    recipe: str
    cell: str
    label: str
    line: str = ""
    x: float | None = None
    seed: int
    model: str = ""
    task: str = ""
    split: str = "test"
    settings: dict[str, Any] = {}
    digest: str
    status: Literal["done", "failed"]
    error: str = ""
    rows: list[ResultRow] = []
    costs: dict[str, StageCost] = {}
    wall_s: float = 0.0
    layers: list[int] = []
    """Layers of the relation loss."""
    layer_metrics: dict[str, list[float]] = {}
    """Metrics of the layer probe at the start of stage 3, one value a layer."""
    densities: dict[str, list[float]] = {}
    """Model (refined, base, student) -> share of its latent weights in each bin of weight / scale."""
    near: dict[str, float] = {}
    """Model -> share (0..1) of its latent weights within 0.05 of a threshold, in units of the scale."""
    curves: dict[str, dict[str, list[float]]] = {}
    """Stage -> {"tokens": [...], metric: [...]}, thinned to CURVE_POINTS."""

    def row(self, name: str) -> ResultRow | None:
        return next((row for row in self.rows if row.name == name), None)


class SweepResults(_Record):
    """The whole file."""

    format: Literal["bitdistill-sweep-1"] = FORMAT
    name: str
    title: str = ""
    note: str = ""
    figure: str = "table"
    x_label: str = ""
    reference: str = ""
    command: str = ""
    runs: list[RunResult] = []

    def find(self, recipe: str, cell: str, seed: int) -> RunResult | None:
        return next((r for r in self.runs if (r.recipe, r.cell, r.seed) == (recipe, cell, seed)), None)

    @property
    def train_s(self) -> float:
        """Seconds of training, artifacts that several runs share counted once."""
        paid = {cost.key: cost.elapsed_s - cost.saved_s for run in self.runs for cost in run.costs.values()}
        return sum(paid.values())


def with_run(results: SweepResults, run: RunResult, order: Iterable[str]) -> SweepResults:
    """The results with a run put in place of an older one, in the sweep's order.

    Rows that only the older one has are kept if both are done and of the same recipe (`sweep --row`).
    """
    old = results.find(run.recipe, run.cell, run.seed)
    if old is not None and old.digest == run.digest and old.status == run.status == "done":
        rows = {row.name: row for row in (*old.rows, *run.rows)}
        ordered = sorted(rows.values(), key=lambda row: ROW_ORDER.index(row.name))
        run = run.model_copy(update={"rows": ordered, "costs": {**old.costs, **run.costs}})
    kept = [r for r in results.runs if (r.recipe, r.cell, r.seed) != (run.recipe, run.cell, run.seed)]
    places = {name: index for index, name in enumerate(order)}
    runs = sorted([*kept, run], key=lambda r: places.get(f"{r.recipe}/{r.cell}/{r.seed}", len(places)))
    return results.model_copy(update={"runs": runs})


def write(path: Path, results: SweepResults) -> None:
    """Write the results; a reader sees the old file or the new one.

    Raises:
        StorageError: the file system refused.
    """
    content = {"format": FORMAT, **results.model_dump(mode="json", exclude_defaults=True)}
    text.write(path, json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False) + "\n")


def read(path: Path) -> SweepResults:
    """Results of a sweep.

    Raises:
        ArtifactError: no such file, or not such results (the field is named).
    """
    try:
        content = json.loads(path.read_text("utf-8"))
        if not is_sweep(content):
            raise ArtifactError(f"{path}: not a sweep's results (format {FORMAT}); run `bitdistill sweep`")
        return SweepResults.model_validate(content)
    except FileNotFoundError:
        raise ArtifactError(f"{path}: no results here; run `bitdistill sweep`") from None
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(map(str, first["loc"]))
        raise ArtifactError(f"{path}: field {field}: {first['msg']}; run the sweep again") from None
    except (OSError, ValueError, RecursionError) as error:
        raise ArtifactError(f"{path}: unreadable results ({error}); run the sweep again") from error


def is_sweep(content: Any) -> bool:
    """Whether a JSON value is a sweep's results."""
    return isinstance(content, dict) and content.get("format") == FORMAT


def costs(run: RunFolder) -> dict[str, StageCost]:
    """Steps, tokens and seconds of every trained stage of a run, from the artifacts' manifests."""
    found = {}
    for stage, name in ARTIFACT_OF.items():
        manifest = run.manifests.get(name, {})
        cost = artifact.training_cost(manifest)
        if cost is None:
            continue
        saved = manifest.get("branched_from") or {}
        found[stage] = StageCost(
            key=str(manifest.get("key", "")),
            steps=cost["steps"],
            tokens=cost["tokens"],
            elapsed_s=round(cost["device_s"], 2),
            saved_s=round(float(saved.get("device_s") or saved.get("elapsed_s", 0.0)), 2),
        )
    return found


def densities(run: RunFolder) -> dict[str, list[float]]:
    """Weight histograms of a run that was measured (`stats: true`)."""
    from bitdistill.report.figures import density

    shares = {name: density(layers) for name, layers in run.stats.items()}
    return {name: [float(f"{v:.4g}") for v in values] for name, values in shares.items() if values}


def near(run: RunFolder) -> dict[str, float]:
    """Shares of weights close to a threshold in a run that was measured (`stats: true`)."""
    from bitdistill.report.figures import near_shares

    return {name: float(f"{share:.4g}") for name, share in near_shares(run.stats).items()}


def curve(run: RunFolder, stage: str) -> dict[str, list[float]] | None:
    """Tokens and metrics of a stage's log: means over CURVE_POINTS equal parts; None without a log."""
    log = run.logs.get(stage) or _log_of_owner(run, stage)
    if log is None:
        return None
    records = log.records
    parts = min(CURVE_POINTS, len(records))
    bounds = [len(records) * i // parts for i in range(parts + 1)]
    groups = [records[start:end] for start, end in pairwise(bounds)]
    found = {name: [float(group[-1].get(name, 0)) for group in groups] for name in ("tokens", "step")}
    for key in CURVE_KEYS:
        values = [_mean(group, key) for group in groups]
        if all(value is not None for value in values):
            found[key] = [float(f"{value:.5g}") for value in values if value is not None]
    return found


def _log_of_owner(run: RunFolder, stage: str) -> StageLog | None:
    """Log of a stage that was taken over: it lies in the run that trained it."""
    if stage == "pretrain":
        key = run.manifests.get("base", {}).get("key")
        owners = [path.parent for path in run.path.parent.glob("*/base.json") if _base_key(path) == key]
    else:
        owners = [(run.path / ARTIFACT_OF[stage]).resolve().parent]
    logs = (read_log(owner / "logs" / f"{stage}.jsonl", stage) for owner in owners)
    return next((log for log in logs if log is not None), None)


def _base_key(path: Path) -> Any:
    try:
        return json.loads(path.read_text("utf-8")).get("key")
    except (OSError, ValueError, AttributeError):
        return None


def _mean(records: list[dict[str, Any]], key: str) -> float | None:
    values = [r[key] for r in records if isinstance(r.get(key), int | float) and math.isfinite(r[key])]
    return sum(values) / len(values) if values else None


def layer_metrics(folder: Path) -> tuple[list[int], dict[str, list[float]]]:
    """Layers of the relation loss and the probe's metrics, from a student's manifest."""
    if not artifact.exists(folder):
        return [], {}
    manifest = artifact.read_manifest(folder)
    metrics = manifest.get("layer_metrics") or {}
    return [int(i) for i in manifest.get("distilled_layers") or []], {
        str(name): [float(v) for v in values] for name, values in metrics.items()
    }
