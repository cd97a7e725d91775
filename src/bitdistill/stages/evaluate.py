"""Score teacher, baseline and packed student on the same rows, in one run, from what lies on disk."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bitdistill import artifact
from bitdistill.data import tasks
from bitdistill.data.readers import Row
from bitdistill.data.tasks import Example
from bitdistill.eval.metrics import (
    MEAN_OVER_ROWS,
    METRICS,
    Score,
    agreement,
    kl_to_teacher,
    reference_nll,
    row_scores,
)
from bitdistill.eval.prediction import Prediction
from bitdistill.eval.results import (
    ResultRow,
    predictions_hash,
    read_results,
    references_hash,
    versions,
    write_predictions,
    write_results,
)
from bitdistill.eval.row_scores import encode
from bitdistill.models.contents import count_weights
from bitdistill.report import text
from bitdistill.stages.common import Run, git_commit, log
from bitdistill.stages.reuse import read_predictions
from bitdistill.stages.scorers import Scorer, open_scorer
from bitdistill.train.tracking import WorkProgress

LABELS = {
    "teacher": "Teacher (full precision)",
    "bitnet_sft": "BitNet-SFT (direct ternary)",
    "bitdistill": "BitDistill student",
}
AGAINST_TEACHER = ("agreement_with_teacher", "kl_to_teacher")


@dataclass(frozen=True)
class Entry:
    """A row to be made: its name, the artifact that is scored, and the artifact that says what training cost."""

    name: str
    folder: Path
    trained: Path


def _label(run: Run, entry: Entry) -> str:
    if entry.name == "teacher" and run.recipe.teacher is not None:
        return f"Teacher ({text.model_name(run.recipe.teacher.path)}, full precision)"
    return LABELS.get(entry.name, entry.name)


def predict_rows(run: Run, scorer: Scorer, examples: Sequence[Example]) -> tuple[list[Prediction], float]:
    """Predictions on encoded rows and the tokens a second of scoring them."""
    # One untimed batch: the first call pays for unpacking codes and for warming caches.
    scorer.predict(examples[: run.recipe.eval.batch_rows])
    with WorkProgress("eval", quiet=run.quiet) as progress:
        started = time.perf_counter()
        predictions = scorer.predict(examples, progress)
        elapsed_s = time.perf_counter() - started
    made = 0
    if run.recipe.task.kind == "generation":
        texts = [p.text for p in predictions]
        made = sum(map(len, scorer.tokenizer(texts, add_special_tokens=False)["input_ids"])) if texts else 0
    tokens = made + sum(len(e.prompt_ids) for e in examples)
    return predictions, tokens / max(elapsed_s, 1e-9)


def with_references(
    run: Run, scorer: Scorer, predictions: Sequence[Prediction], examples: Sequence[Example]
) -> list[Prediction]:
    """The predictions with how likely the model finds the references; as they are where that is not wanted."""
    if not _wants_references(run):
        return list(predictions)
    with WorkProgress("references", quiet=run.quiet) as progress:
        found = scorer.reference_nll(examples, progress)
    return [
        dataclasses.replace(prediction, reference_nll=nats, reference_tokens=tokens)
        for prediction, (nats, tokens) in zip(predictions, found, strict=True)
    ]


def _wants_references(run: Run) -> bool:
    return run.recipe.task.kind == "generation" and run.recipe.eval.reference_nll


def score_predictions(
    run: Run, predictions: Sequence[Prediction], examples: Sequence[Example]
) -> dict[str, Score]:
    """Every metric of the task, the headline metric first; then `reference_nll` where it was measured."""
    task, seed = run.recipe.task, run.recipe.eval.bootstrap_seed
    names = task.metrics or (("accuracy", "f1") if task.kind == "classification" else ("rougeL", "bleu"))
    scores = {name: METRICS[name](list(predictions), list(examples), seed=seed) for name in names}
    nll = reference_nll(predictions, seed=seed)
    return scores if nll is None else scores | {"reference_nll": nll}


def evaluate(run: Run, entries: Sequence[Entry]) -> list[ResultRow]:
    """Score each entry; writes predictions/<name>.jsonl and results.json.

    Rows whose artifact did not change since results.json was written are scored again all the same when any
    row changed: rates are only comparable within one run. In a sweep (`run.reuse`) a row that was scored before
    is taken over without its rate.
    """
    path = run.run_dir / "results.json"
    inputs = _inputs(run, entries)
    key = run.keys["eval"] = artifact.hash_json(inputs)
    stamp = run.run_dir / "results.key"
    if "eval" not in run.redo.stale and path.exists() and stamp.exists() and stamp.read_text("utf-8") == key:
        log.info("eval: finished before, kept (%s)", path)
        return read_results(path)
    rows = run.eval_rows()
    results: list[ResultRow] = []
    teacher_predictions: list[Prediction] | None = None
    for entry in entries:
        taken = _scored_before(run, entry, teacher_predictions)
        if taken is None:
            log.info("eval: %s on %d rows", _label(run, entry), len(rows))
            taken = _evaluate_one(run, entry, rows, teacher_predictions)
        row, predictions = taken
        if entry.name == "teacher":
            teacher_predictions = predictions
        results.append(row)
    with artifact.storage_errors(run.run_dir):
        write_results(path, results)
        stamp.write_text(key, "utf-8")
    run.redo.done("eval")
    return results


def _inputs(run: Run, entries: Sequence[Entry]) -> dict[str, Any]:
    return {
        "entries": {e.name: artifact.read_manifest(e.folder)["files"] for e in entries},
        **_scoring(run),
    }


def _scoring(run: Run) -> dict[str, Any]:
    """What determines scores besides the model."""
    return {
        "eval": run.section("eval"),
        "data": run.data_fingerprints,
        "limit_test": run.recipe.data.limit_test,
        "max_length": run.recipe.data.max_length,
        "task": run.recipe.task.model_dump(mode="json", by_alias=True),
        "device": run.device.type,
        # Not for classification, and rows that were scored without it are scored again
        **({"reference_nll": True} if _wants_references(run) else {}),
    }


def _score_key(run: Run, entry: Entry) -> str:
    return artifact.hash_json({"files": artifact.read_manifest(entry.folder)["files"], **_scoring(run)})


def _against(predictions: list[Prediction], teacher: list[Prediction]) -> dict[str, Score]:
    """How close a model is to its teacher, right or wrong; names as in AGAINST_TEACHER."""
    found = (agreement(predictions, teacher), kl_to_teacher(predictions, teacher))
    return {name: score for name, score in zip(AGAINST_TEACHER, found, strict=True) if score is not None}


def _scored_before(
    run: Run, entry: Entry, teacher: list[Prediction] | None
) -> tuple[ResultRow, list[Prediction]] | None:
    """The row of a sibling run that scored the same model on the same rows; None without one."""
    if run.reuse is None or "eval" in run.redo.stale:
        return None
    row = run.reuse.row(_score_key(run, entry), entry.name, run.run_dir)
    if row is None:
        return None
    log.info("eval: %s was scored before", _label(run, entry))
    predictions = read_predictions(run.run_dir, entry.name, run.recipe.task) or []
    metrics = {name: value for name, value in row.metrics.items() if name not in AGAINST_TEACHER}
    if teacher is not None:
        metrics |= {name: score.value for name, score in _against(predictions, teacher).items()}
    label = _label(run, entry)
    return row.model_copy(update={"metrics": metrics, "label": label}), predictions


def _evaluate_one(
    run: Run, entry: Entry, rows: list[Row], teacher: list[Prediction] | None
) -> tuple[ResultRow, list[Prediction]]:
    scorer = open_scorer(run, entry.folder)
    examples = tasks.encode(run.recipe.task, rows, scorer.tokenizer, run.recipe.data.max_length)
    predictions, tokens_per_s = predict_rows(run, scorer, examples)
    predictions = with_references(run, scorer, predictions, examples)
    scores = score_predictions(run, predictions, examples)
    if teacher is not None:
        scores |= _against(predictions, teacher)
    write_predictions(
        run.run_dir / "predictions" / f"{entry.name}.jsonl", predictions, examples, run.recipe.task
    )
    headline, score = next(iter(scores.items()))
    files = artifact.read_manifest(entry.folder)["files"]
    size_bytes = sum(f["bytes"] for n, f in files.items() if n.endswith(".safetensors"))
    training = artifact.read_manifest(entry.trained).get("training") or {}
    row = ResultRow(
        name=entry.name,
        label=_label(run, entry),
        task=run.recipe.task.name,
        metric=headline,
        value=score.value,
        n=score.n,
        low=score.low,
        high=score.high,
        metrics={name: s.value for name, s in scores.items()},
        bits_per_weight=8.0 * size_bytes / count_weights(entry.folder),
        size_bytes=size_bytes,
        tokens_per_s=tokens_per_s,
        seed=run.recipe.seed,
        command=run.command,
        commit=git_commit(),
        versions=versions(),
        hardware=scorer.hardware,
        predictions_sha256=predictions_hash(predictions),
        references_sha256=references_hash(examples),
        score_key=_score_key(run, entry),
        row_scores=encode(row_scores(headline)(predictions, examples))
        if headline in MEAN_OVER_ROWS
        else None,
        train_tokens=training.get("tokens"),
        train_s=training.get("elapsed_s"),
    )
    return row, predictions
