"""Metrics with 95% intervals. Values are percent (0..100), but for perplexity and KL (nats). No torch import.

Proportions (accuracy, exact match, agreement) have Wilson intervals. The others have percentile bootstrap
intervals over rows from a seed; F1 and BLEU are recomputed for every resample from their sufficient
statistics, not averaged over rows.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from decimal import Decimal
from functools import partial
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from bitdistill.config import Task
from bitdistill.data.tasks import Example
from bitdistill.errors import DataError, RecipeError
from bitdistill.eval.prediction import Prediction

RESAMPLES = 1000
_Z95 = 1.959963984540054


@dataclass(frozen=True, slots=True)
class Score:
    """A metric's value on n rows with its 95% interval [low, high]."""

    value: float
    n: int
    low: float
    high: float


class MetricFn(Protocol):
    """predictions and examples of the same rows, in the same order -> Score."""

    def __call__(
        self, predictions: Sequence[Prediction], examples: Sequence[Example], *, seed: int = 0
    ) -> Score: ...


def wilson(successes: int, n: int) -> Score:
    """Proportion in percent with its Wilson 95% interval.

    Raises:
        DataError: n is 0.
    """
    if n == 0:
        raise DataError("metrics: no rows to score; check data.test and data.limit_test")
    p, z2 = successes / n, _Z95**2
    centre = (p + z2 / (2 * n)) / (1 + z2 / n)
    half = _Z95 / (1 + z2 / n) * math.sqrt(p * (1 - p) / n + z2 / (4 * n * n))
    # At 0 and n successes one end is exactly the value; rounding must not put it on the wrong side.
    low = 0.0 if successes == 0 else centre - half
    high = 1.0 if successes == n else centre + half
    return Score(100 * p, n, 100 * low, 100 * high)


def correct(predictions: Sequence[Prediction], examples: Sequence[Example]) -> list[bool]:
    """Per row: the right label, or a text equal to a reference (white space at the ends aside)."""
    _check_pairs(predictions, examples)
    return [_is_correct(p, e) for p, e in zip(predictions, examples, strict=True)]


def _is_correct(prediction: Prediction, example: Example) -> bool:
    if example.label is not None:
        return prediction.label == example.label
    return prediction.text.strip() in {r.strip() for r in example.references}


def accuracy(predictions: Sequence[Prediction], examples: Sequence[Example], *, seed: int = 0) -> Score:
    """Share of rows with the right label, Wilson interval (`seed` is not used).

    Raises:
        DataError: a row without a label.
    """
    predicted, labels = _label_arrays(predictions, examples)
    return wilson(int((predicted == labels).sum()), len(labels))


def exact_match(predictions: Sequence[Prediction], examples: Sequence[Example], *, seed: int = 0) -> Score:
    """Share of texts equal to one of their references (stripped), Wilson interval (`seed` is not used)."""
    matches = correct(predictions, examples)
    return wilson(sum(matches), len(matches))


_FINAL_NUMBER = re.compile(r"####\s*\$?\s*(-?[0-9][0-9,]*(?:\.[0-9]+)?|-?\.[0-9]+)")


def number_after_marks(text: str) -> Decimal | None:
    """The number after the first `####` (GSM8K's form), thousands' commas and a dollar sign left out; or None."""
    found = _FINAL_NUMBER.search(text)
    return None if found is None else Decimal(found.group(1).replace(",", ""))


def final_number_rows(predictions: Sequence[Prediction], examples: Sequence[Example]) -> list[bool]:
    """Per row: the number after `####` equals that of a reference. An answer without one is wrong.

    Raises:
        DataError: a row whose references have no such number.
    """
    _check_pairs(predictions, examples)
    right = []
    for prediction, example in zip(predictions, examples, strict=True):
        wanted = {number_after_marks(reference) for reference in example.references} - {None}
        if not wanted:
            raise DataError(
                f"{example.where}: no `#### number` in the answer; use another metric, or mend it"
            )
        right.append(number_after_marks(prediction.text) in wanted)
    return right


def final_number(predictions: Sequence[Prediction], examples: Sequence[Example], *, seed: int = 0) -> Score:
    """Share of answers with the right number after `####`, Wilson interval (`seed` is not used)."""
    right = final_number_rows(predictions, examples)
    return wilson(sum(right), len(right))


def agreement(predictions: Sequence[Prediction], teacher: Sequence[Prediction]) -> Score:
    """Share of rows on which a model answers as its teacher, right or wrong, Wilson interval.

    Raises:
        DataError: other rows.
    """
    if [p.index for p in predictions] != [t.index for t in teacher]:
        raise DataError("agreement: the two models answered different rows; score both on the same data")
    same = [
        p.label == t.label if p.label is not None else p.text.strip() == t.text.strip()
        for p, t in zip(predictions, teacher, strict=True)
    ]
    return wilson(sum(same), len(same))


def kl_to_teacher(predictions: Sequence[Prediction], teacher: Sequence[Prediction]) -> Score | None:
    """Mean over rows of KL(teacher || model) over the task's labels, nats; bootstrap interval over rows. It tells two
    students apart that answer alike. None where there are no label scores (generation).

    Raises:
        DataError: other rows, or another number of labels.
    """
    if [p.index for p in predictions] != [t.index for t in teacher]:
        raise DataError("kl_to_teacher: the two models answered different rows; score both on the same data")
    if not all(p.scores and t.scores for p, t in zip(predictions, teacher, strict=True)):
        return None
    if any(len(p.scores) != len(t.scores) for p, t in zip(predictions, teacher, strict=True)):
        raise DataError("kl_to_teacher: the two models scored different labels; score both on the same task")
    divergences = []
    for prediction, wanted in zip(predictions, teacher, strict=True):
        own, other = _log_softmax(prediction.scores), _log_softmax(wanted.scores)
        divergences.append(sum(math.exp(b) * (b - a) for a, b in zip(own, other, strict=True)))
    return mean_score(np.array(divergences)) if divergences else None


def reference_nll(predictions: Sequence[Prediction], *, seed: int = 0) -> Score | None:
    """Nats a token of the references, bootstrap interval over rows; n counts tokens. None where it was not measured.

    Models of one tokenizer can be compared by it, and less is better.
    """
    sums = [p.reference_nll for p in predictions if p.reference_nll is not None]
    tokens = [p.reference_tokens for p in predictions]
    if len(sums) != len(predictions) or not sum(tokens):
        return None
    return ratio_score(sums, tokens, seed=seed)


def _log_softmax(scores: Sequence[float]) -> list[float]:
    most = max(scores)
    total = most + math.log(sum(math.exp(score - most) for score in scores))
    return [score - total for score in scores]


def f1(
    predictions: Sequence[Prediction],
    examples: Sequence[Example],
    *,
    seed: int = 0,
    average: str = "auto",
) -> Score:
    """F1 in percent. binary: of label 1; macro: mean over the labels that occur; auto: binary for two labels.

    A label that counts but is neither predicted nor present has F1 0 (scikit-learn's zero_division=0).
    """
    predicted, labels = _label_arrays(predictions, examples)
    n_labels = max(len(predictions[0].scores), int(predicted.max()) + 1, int(labels.max()) + 1)
    if average == "auto":
        average = "binary" if n_labels == 2 else "macro"
    confusion = np.bincount(labels * n_labels + predicted, minlength=n_labels**2).reshape(n_labels, n_labels)
    value = _f1_of_confusions(confusion[None], average)[0]
    # Resampling rows with replacement is a multinomial draw over the confusion matrix's cells.
    cells = np.flatnonzero(confusion)
    draws = np.random.default_rng(seed).multinomial(
        len(labels), confusion.flat[cells] / len(labels), RESAMPLES
    )
    resampled = np.zeros((RESAMPLES, n_labels**2), dtype=np.int64)
    resampled[:, cells] = draws
    low, high = _percentiles(_f1_of_confusions(resampled.reshape(-1, n_labels, n_labels), average))
    return Score(float(value), len(labels), low, high)


def _f1_of_confusions(confusion_RLL: NDArray[np.int64], average: str) -> NDArray[np.float64]:
    """F1 in percent of each of R confusion matrices [true label, predicted label]."""
    hits = np.diagonal(confusion_RLL, axis1=1, axis2=2)
    support = confusion_RLL.sum(2) + confusion_RLL.sum(1)
    per_label = 2 * hits / np.maximum(support, 1)
    if average == "binary":
        return 100 * per_label[:, 1]
    occurs = support > 0
    return 100 * per_label.sum(1) / np.maximum(occurs.sum(1), 1)


def rouge(
    predictions: Sequence[Prediction],
    examples: Sequence[Example],
    *,
    seed: int = 0,
    kind: str,
) -> Score:
    """Mean ROUGE F-measure, the best over a row's references, with Porter stemming.

    kind: rouge1, rouge2, rougeL or rougeLsum; rougeLsum takes each line as a sentence.
    """
    return mean_score(100 * np.array(rouge_rows(predictions, examples, kind)), seed)


def rouge_rows(predictions: Sequence[Prediction], examples: Sequence[Example], kind: str) -> list[float]:
    """ROUGE F-measure of each row (0..1), for paired tests."""
    from rouge_score.rouge_scorer import RougeScorer

    _check_pairs(predictions, examples)
    scorer = RougeScorer([kind], use_stemmer=True)
    return [
        float(scorer.score_multi(list(e.references), p.text)[kind].fmeasure)
        for p, e in zip(predictions, examples, strict=True)
    ]


def bleu(predictions: Sequence[Prediction], examples: Sequence[Example], *, seed: int = 0) -> Score:
    """Corpus BLEU-4 (sacrebleu: 13a tokens, exponential smoothing), several references a row allowed."""
    from sacrebleu.metrics.bleu import BLEU

    _check_pairs(predictions, examples)
    scorer = BLEU()
    rows = []
    for prediction, example in zip(predictions, examples, strict=True):
        row = scorer.corpus_score([prediction.text.strip()], [[r.strip()] for r in example.references])
        rows.append([*row.counts, *row.totals, row.sys_len, row.ref_len])
    statistics = np.array(rows, dtype=np.int64)
    order = scorer.max_ngram_order

    def value(total: NDArray[np.integer]) -> float:
        counts, totals = total[:order].tolist(), total[order : 2 * order].tolist()
        return float(
            BLEU.compute_bleu(counts, totals, int(total[-2]), int(total[-1]), smooth_method="exp").score
        )

    low, high = _percentiles(np.array([value(total) for total in _resampled_sums(statistics, seed)]))
    return Score(value(statistics.sum(0)), len(rows), low, high)


def perplexity_score(nll: Sequence[float], tokens: Sequence[int], *, seed: int = 0) -> Score:
    """exp(total negative log-likelihood / total tokens), interval by resampling sequences; n counts tokens.

    Args:
        nll: summed negative log-likelihood of each sequence, in nats.
        tokens: predicted tokens of each sequence.
    """
    mean = ratio_score(nll, tokens, seed=seed)
    return Score(math.exp(mean.value), mean.n, math.exp(mean.low), math.exp(mean.high))


def ratio_score(sums: Sequence[float], tokens: Sequence[int], *, seed: int = 0) -> Score:
    """Total of the sums / total tokens, interval by resampling sequences; n counts tokens.

    Args:
        sums: of a figure over the tokens of each sequence.
        tokens: counted tokens of each sequence.

    Raises:
        DataError: no tokens.
    """
    total = sum(tokens)
    if total == 0:
        raise DataError("metrics: no predicted tokens; give text of at least two tokens")
    resampled = _resampled_sums(np.array([sums, tokens], dtype=np.float64).T, seed)
    low, high = _percentiles(resampled[:, 0] / resampled[:, 1])
    return Score(math.fsum(sums) / total, total, low, high)


def mean_score(values: NDArray[np.float64], seed: int = 0) -> Score:
    """Mean over rows with its percentile bootstrap interval."""
    if len(values) == 0:
        raise DataError("metrics: no rows to score; check data.test and data.limit_test")
    low, high = _percentiles(_resampled_sums(values[:, None], seed)[:, 0] / len(values))
    return Score(float(values.mean()), len(values), low, high)


def mcnemar(a: Sequence[bool], b: Sequence[bool]) -> float:
    """p-value of the exact two-sided McNemar test of two models on the same rows.

    Args:
        a, b: whether each model answered each row correctly.

    Raises:
        DataError: different numbers of rows.
    """
    _check_same(a, b)
    only_a = sum(bool(x) and not y for x, y in zip(a, b, strict=True))
    only_b = sum(bool(y) and not x for x, y in zip(a, b, strict=True))
    if only_a + only_b == 0:
        return 1.0
    from scipy.stats import binomtest

    return float(binomtest(only_a, only_a + only_b, 0.5).pvalue)


def paired_bootstrap(
    a: Sequence[float], b: Sequence[float], *, seed: int = 0, resamples: int = 10_000
) -> Score:
    """Mean of a minus mean of b with the 95% interval over resampled rows, in the unit of the scores.

    Args:
        a, b: per-row scores (100 or 0 for right or wrong, ROUGE) of two models on the same rows.

    Raises:
        DataError: different numbers of rows, or none.
    """
    _check_same(a, b)
    difference = np.asarray(a, dtype=np.float64) - np.asarray(b, dtype=np.float64)
    if len(difference) == 0:
        raise DataError("paired_bootstrap: no rows; score both models on the same data")
    return Score(float(difference.mean()), len(difference), *_mean_interval(difference, seed, resamples))


def _mean_interval(values: NDArray[np.float64], seed: int, resamples: int) -> tuple[float, float]:
    """Percentile interval of the mean of `values` over resampled rows.

    Drawing n rows with replacement is a multinomial draw over the distinct values. Where these are few (right
    or wrong: three differences) that is the same distribution in a thousandth of the time.
    """
    distinct, counts = np.unique(values, return_counts=True)
    if len(distinct) > 64:
        return _percentiles(_resampled_sums(values[:, None], seed, resamples)[:, 0] / len(values))
    draws = np.random.default_rng(seed).multinomial(len(values), counts / len(values), resamples)
    return _percentiles(draws @ distinct / len(values))


def _resampled_sums(rows_NK: NDArray[Any], seed: int, resamples: int = RESAMPLES) -> NDArray[np.float64]:
    """Column sums [resamples, K] of rows drawn with replacement."""
    rng, n = np.random.default_rng(seed), len(rows_NK)
    sums = np.empty((resamples, rows_NK.shape[1]))
    for r in range(resamples):
        weights = np.bincount(rng.integers(n, size=n), minlength=n)
        sums[r] = weights @ rows_NK
    return sums


def _percentiles(values: NDArray[np.float64]) -> tuple[float, float]:
    low, high = np.percentile(values, [2.5, 97.5])
    return float(low), float(high)


def _label_arrays(
    predictions: Sequence[Prediction], examples: Sequence[Example]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """(predicted, true) label indices."""
    _check_pairs(predictions, examples)
    for prediction, example in zip(predictions, examples, strict=True):
        if example.label is None or prediction.label is None:
            raise DataError(
                f"{example.where}: no label to score; use rows with labels or a generation metric"
            )
    return np.array([p.label for p in predictions]), np.array([e.label for e in examples])


def _check_pairs(predictions: Sequence[Prediction], examples: Sequence[Example]) -> None:
    _check_same(predictions, examples)
    if not predictions:
        raise DataError("metrics: no rows to score; check data.test and data.limit_test")


def _check_same(a: Sequence[Any], b: Sequence[Any]) -> None:
    if len(a) != len(b):
        raise DataError(f"metrics: {len(a)} rows against {len(b)}; score both on the same data")


METRICS: dict[str, MetricFn] = {
    "accuracy": accuracy,
    "f1": f1,
    "f1_binary": partial(f1, average="binary"),
    "f1_macro": partial(f1, average="macro"),
    "exact_match": exact_match,
    "final_number": final_number,
    "rouge1": partial(rouge, kind="rouge1"),
    "rouge2": partial(rouge, kind="rouge2"),
    "rougeL": partial(rouge, kind="rougeL"),
    "rougeLsum": partial(rouge, kind="rougeLsum"),
    "bleu": bleu,
}
"""Metrics of a task, by the name used in `task.metrics`. What needs more than answers is measured beside them:
see `agreement`, `kl_to_teacher`, `reference_nll` and `eval.perplexity.score_text`."""

CLASSIFICATION_METRICS = frozenset({"accuracy", "f1", "f1_binary", "f1_macro"})


def task_metrics(task: Task) -> tuple[str, ...]:
    """Names of a task's metrics, the headline first (default: accuracy, f1 or rougeL, bleu, by kind).

    Raises:
        RecipeError: an unknown metric, or one that cannot score this kind of task.
    """
    classification = task.kind == "classification"
    fitting = [m for m in METRICS if (m in CLASSIFICATION_METRICS) == classification or m == "exact_match"]
    for name in task.metrics:
        if name not in fitting:
            raise RecipeError(
                f"task {task.name}: metric {name!r} does not score {task.kind}; "
                f"choose from {', '.join(fitting)}"
            )
    return task.metrics or (("accuracy", "f1") if classification else ("rougeL", "bleu"))


MEAN_OVER_ROWS = frozenset(
    {"accuracy", "exact_match", "final_number", "rouge1", "rouge2", "rougeL", "rougeLsum"}
)
"""Metrics that are means of `row_scores`, so that two models can be paired row by row."""


# Generation metrics by which an answer is right or wrong.
JUDGES: dict[str, Callable[[Sequence[Prediction], Sequence[Example]], list[bool]]] = {
    "exact_match": correct,
    "final_number": final_number_rows,
}


def row_scores(metric: str) -> Callable[[Sequence[Prediction], Sequence[Example]], list[float]]:
    """Per-row scores (0..1) behind a metric, for `paired_bootstrap`: ROUGE by row, else right or wrong."""
    if metric.startswith("rouge"):
        return partial(rouge_rows, kind=metric)
    judge = JUDGES.get(metric, correct)
    return lambda predictions, examples: [float(c) for c in judge(predictions, examples)]
