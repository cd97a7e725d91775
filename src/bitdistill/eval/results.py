"""results.json, predictions and the printed table. Torch is imported only where a device is asked for."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from bitdistill import artifact
from bitdistill.config import Task
from bitdistill.data.tasks import Example
from bitdistill.errors import ArtifactError
from bitdistill.eval.metrics import JUDGES, correct
from bitdistill.eval.prediction import Prediction

VERSIONED = ("bitdistill", "torch", "transformers", "tokenizers", "numpy", "safetensors")


class ResultRow(BaseModel):
    """One model on one task: a row of the results table, with what is needed to make it again."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    name: str
    """Short name: teacher, bitnet_sft, bitdistill, ..."""
    label: str
    """What the table shows."""
    task: str
    metric: str
    """Headline metric, a name of eval.metrics."""
    value: float
    """Percent (0..100), or perplexity."""
    n: int
    low: float
    high: float
    metrics: dict[str, float] = {}
    """Every metric by name, the headline included."""
    bits_per_weight: float | None = None
    size_bytes: int | None = None
    tokens_per_s: float | None = None
    seed: int | None = None
    command: str = ""
    commit: str | None = None
    versions: dict[str, str] = {}
    hardware: dict[str, Any] = {}
    predictions_sha256: str | None = None
    references_sha256: str | None = None
    """Hash of the rows' answers: equal where two rows were scored on the same data."""
    score_key: str | None = None
    """Hash of everything that determines the score: the model's files, rows, task, eval settings, device."""
    row_scores: str | None = None
    """Headline score of each test row (eval.row_scores); None where it is no mean over rows (F1, BLEU)."""
    train_tokens: int | None = None
    train_s: float | None = None


def write_results(path: Path, rows: Sequence[ResultRow]) -> None:
    """Write `{"rows": [...]}`; a reader sees the old file or the new one, never a part.

    Raises:
        StorageError: the file system refused.
    """
    text = (
        json.dumps({"rows": [r.model_dump(mode="json") for r in rows]}, indent=2, ensure_ascii=False) + "\n"
    )
    _write_atomically(Path(path), text)


def read_results(path: Path) -> list[ResultRow]:
    """Rows of a results.json.

    Raises:
        ArtifactError: missing or malformed file (field named).
    """
    try:
        content = json.loads(Path(path).read_text("utf-8"))
        return [ResultRow.model_validate(row) for row in content["rows"]]
    except FileNotFoundError:
        raise ArtifactError(f"{path}: no results here; run `bitdistill eval` first") from None
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(map(str, first["loc"]))
        raise ArtifactError(f"{path}: field {field}: {first['msg']}; run `bitdistill eval` again") from None
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise ArtifactError(f"{path}: unreadable results ({error!r}); run `bitdistill eval` again") from error


def predictions_hash(predictions: Sequence[Prediction]) -> str:
    """Hex SHA-256 of all answers in row order (labels, texts; scores differ in the last bits by device)."""
    rows = sorted((p.index, p.label if p.label is not None else -1, p.text) for p in predictions)
    return artifact.hash_json([list(r) for r in rows])


def references_hash(examples: Sequence[Example]) -> str:
    """Hex SHA-256 of the right answers in row order."""
    return artifact.hash_json([[e.label, list(e.references)] for e in examples])


def write_predictions(
    path: Path, predictions: Sequence[Prediction], examples: Sequence[Example], task: Task
) -> None:
    """Write predictions as JSON lines: index, where, prompt, reference, prediction, correct, scores.

    Classes are shown by the data's own label, or by their label word where the data only number them; `where`
    is file name and line. `correct` is null for generation, where no answer is simply right or wrong, unless
    the task's headline metric judges (metrics.JUDGES). `scores` holds log-likelihoods (nats) in the order of
    task.labels. Where they were measured, `reference_nll` (nats) and `reference_tokens` follow.

    Raises:
        StorageError: the file system refused.
    """
    judge = correct if task.kind == "classification" else JUDGES.get(task.metrics[0] if task.metrics else "")
    right: Sequence[bool | None] = judge(predictions, examples) if judge else [None] * len(predictions)
    names = task.shown_labels
    lines = []
    for prediction, example, is_right in zip(predictions, examples, right, strict=True):
        reference = example.references[0] if example.references else None
        record = {
            "index": prediction.index,
            "where": os.path.basename(example.where),
            "prompt": example.prompt,
            "reference": reference if example.label is None else names[example.label],
            "prediction": prediction.text if prediction.label is None else names[prediction.label],
            "correct": is_right,
            "scores": [round(score, 4) for score in prediction.scores],
        }
        if prediction.reference_nll is not None:
            record["reference_nll"] = round(prediction.reference_nll, 4)
            record["reference_tokens"] = prediction.reference_tokens
        lines.append(json.dumps(record, ensure_ascii=False))
    _write_atomically(Path(path), "".join(line + "\n" for line in lines))


def _write_atomically(path: Path, text: str) -> None:
    partial = path.with_name(f"{path.name}.partial-{os.getpid()}")
    with artifact.storage_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            partial.write_text(text, "utf-8")
            artifact.fsync_path(partial)
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)
        artifact.fsync_path(path.parent)


# -- table --------------------------------------------------------------------------------------------


def results_table(rows: Sequence[ResultRow]) -> Table:
    """The rows as a rich table that fits 80 columns."""
    tasks = list(dict.fromkeys(r.task for r in rows))
    metrics = list(dict.fromkeys(r.metric for r in rows))
    n = sorted({r.n for r in rows})
    rows_text = f"{n[0]:,} rows" if len(n) == 1 else "rows differ"
    title = escape(f"{', '.join(tasks)} ({rows_text})")
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    many = len(tasks) > 1 or len(metrics) > 1
    seeds = len({r.seed for r in rows}) > 1
    table.add_column("model", overflow="fold")
    if seeds:
        table.add_column("seed", justify="right", no_wrap=True)
    table.add_column(
        "score [95%]" if many else f"{metrics[0] if metrics else 'score'} [95%]", justify="right"
    )
    for heading in ("agree", "bits/w", "size", "tok/s"):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        score = f"{row.value:.2f} [{row.low:.1f}, {row.high:.1f}]"
        same = row.metrics.get("agreement_with_teacher")
        table.add_row(
            escape(f"{row.label} · {row.task} {row.metric}" if many else row.label),
            *([str(row.seed)] if seeds else []),
            escape(score),
            "-" if same is None else f"{same:.1f}",
            "-" if row.bits_per_weight is None else f"{row.bits_per_weight:.2f}",
            "-" if row.size_bytes is None else human_bytes(row.size_bytes),
            "-" if row.tokens_per_s is None else human_count(row.tokens_per_s),
        )
    return table


def print_table(rows: Sequence[ResultRow], console: Console | None = None) -> None:
    """Print the results table (stdout unless a console is given)."""
    (console or Console()).print(results_table(rows))


def human_bytes(size: float) -> str:
    """Decimal units: 13.4 MB."""
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000 or unit == "GB":
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    raise AssertionError


def human_count(count: float) -> str:
    """Three digits or so: 950, 12.3k, 1.2M."""
    for unit in ("", "k", "M"):
        if count < 1000 or unit == "M":
            return f"{count:.0f}" if unit == "" else f"{count:.1f}{unit}"
        count /= 1000
    raise AssertionError


# -- where and with what ------------------------------------------------------------------------------


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that decide numbers."""
    found = {"python": platform.python_version()}
    for name in VERSIONED:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def hardware(device: Any = None) -> dict[str, Any]:
    """CPU, cores, memory and, for a CUDA device, the GPU."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    found: dict[str, Any] = {
        "system": f"{platform.system()} {platform.machine()}",
        "cpu": _cpu_name(),
        "cores": cores,
        "memory_gb": _memory_gb(),
    }
    if device is not None:
        import torch

        device = torch.device(device)
        found["device"] = device.type
        found["threads"] = torch.get_num_threads()
        if device.type == "cuda":
            found["gpu"] = torch.cuda.get_device_name(device)
            found["cuda"] = torch.version.cuda
    return found


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text("utf-8", errors="replace").splitlines():
            key, _, value = line.partition(":")
            if key.strip() in {"model name", "Model"}:
                return value.strip()
    return platform.processor() or "unknown"


def _memory_gb() -> float | None:
    try:
        return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1)
    except (ValueError, OSError, AttributeError):
        return None
