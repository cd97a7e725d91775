"""Metrics against scikit-learn, sacrebleu, scipy and values worked out by hand."""

from __future__ import annotations

import math
from decimal import Decimal
from fractions import Fraction

import numpy as np
import pytest
from sacrebleu.metrics.bleu import BLEU
from scipy.stats import binomtest, bootstrap
from sklearn.metrics import accuracy_score, f1_score

from bitdistill.config import Task
from bitdistill.data.tasks import Example
from bitdistill.errors import DataError, RecipeError
from bitdistill.eval import metrics
from bitdistill.eval.metrics import METRICS, Score, mcnemar, paired_bootstrap, perplexity_score, wilson
from bitdistill.eval.prediction import Prediction


def labelled(predicted: list[int], true: list[int], labels: int) -> tuple[list[Prediction], list[Example]]:
    predictions = [Prediction(n, p, (0.0,) * labels, str(p)) for n, p in enumerate(predicted)]
    return predictions, [Example((1,), (2,), t, (str(t),), "p", f"t:{n}") for n, t in enumerate(true)]


def texts(*rows: tuple[str, list[str]]) -> tuple[list[Prediction], list[Example]]:
    predictions = [Prediction(n, None, (), text) for n, (text, _) in enumerate(rows)]
    return predictions, [Example((1,), (2,), None, tuple(r), "p", f"t:{n}") for n, (_, r) in enumerate(rows)]


@pytest.mark.parametrize(
    ("successes", "n", "low", "high"),
    [
        (8, 10, 49.01625, 94.33178),
        (0, 10, 0.0, 27.75328),
        (10, 10, 72.24672, 100.0),
        (1, 2, 9.45312, 90.54688),
    ],
)
def test_wilson(successes: int, n: int, low: float, high: float) -> None:
    """scipy's binomtest(...).proportion_ci(method="wilson") gives the same."""
    score = wilson(successes, n)
    assert score.value == 100 * successes / n
    assert (score.low, score.high) == pytest.approx((low, high), abs=1e-5)
    reference = binomtest(successes, n).proportion_ci(0.95, "wilson")
    assert (score.low, score.high) == pytest.approx((100 * reference.low, 100 * reference.high), abs=1e-9)


@pytest.mark.parametrize("labels", [2, 3, 7])
@pytest.mark.parametrize("seed", range(4))
def test_accuracy_and_f1_equal_scikit_learn(labels: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    true = rng.integers(labels, size=60)
    predicted = np.where(rng.random(60) < 0.6, true, rng.integers(labels, size=60))
    if seed == 3:  # a label that occurs nowhere, one that is never predicted, one never true
        true[true == 0], predicted[predicted == 1] = 1, 0
    pairs = labelled(predicted.tolist(), true.tolist(), labels)
    assert METRICS["accuracy"](*pairs).value == pytest.approx(100 * accuracy_score(true, predicted))
    macro = 100 * f1_score(true, predicted, average="macro", zero_division=0)
    assert METRICS["f1_macro"](*pairs).value == pytest.approx(macro)
    binary = 100 * f1_score(true == 1, predicted == 1, zero_division=0)
    assert METRICS["f1_binary"](*pairs).value == pytest.approx(binary)
    assert METRICS["f1"](*pairs).value == pytest.approx(binary if labels == 2 else macro)


def test_macro_f1_leaves_out_labels_that_occur_nowhere() -> None:
    pairs = labelled([0, 1, 1, 2], [0, 1, 2, 2], 5)  # labels 3 and 4 are neither true nor predicted
    assert METRICS["f1_macro"](*pairs).value == pytest.approx(100 * (1 + 2 / 3 + 2 / 3) / 3)


def test_f1_interval_equals_resampled_rows() -> None:
    rng = np.random.default_rng(0)
    true = rng.integers(3, size=200)
    predicted = np.where(rng.random(200) < 0.7, true, rng.integers(3, size=200))
    score = METRICS["f1_macro"](*labelled(predicted.tolist(), true.tolist(), 3), seed=1)
    draws = rng.integers(200, size=(1000, 200))
    slow = [100 * f1_score(true[d], predicted[d], average="macro") for d in draws[:400]]
    assert (score.low, score.high) == pytest.approx(tuple(np.percentile(slow, [2.5, 97.5])), abs=1.5)
    assert score.low < score.value < score.high
    again = METRICS["f1_macro"](*labelled(predicted.tolist(), true.tolist(), 3), seed=1)
    other = METRICS["f1_macro"](*labelled(predicted.tolist(), true.tolist(), 3), seed=2)
    assert again == score
    assert other != score


def test_rouge_by_hand() -> None:
    # "the cat sat" against "the cat lay down": 1-grams 2 of 3 and 2 of 4; 2-grams 1 of 2 and 1 of 3; LCS 2.
    pairs = texts(("the cat sat", ["the cat lay down"]))
    assert METRICS["rouge1"](*pairs).value == pytest.approx(100 * 4 / 7)
    assert METRICS["rouge2"](*pairs).value == pytest.approx(100 * 2 / 5)
    assert METRICS["rougeL"](*pairs).value == pytest.approx(100 * 4 / 7)
    stemmed = texts(("cats sitting", ["cat sit"]))
    assert METRICS["rouge1"](*stemmed).value == pytest.approx(100)


def test_rouge_lsum_splits_at_newlines() -> None:
    # In swapped order a sentence-level LCS finds both sentences; one over the whole text only one of them.
    pairs = texts(("dogs bark\ncats sleep", ["cats sleep\ndogs bark"]))
    assert METRICS["rougeLsum"](*pairs).value == pytest.approx(100)
    assert METRICS["rougeL"](*pairs).value == pytest.approx(50)


def test_best_of_several_references() -> None:
    pairs = texts(("the cat", ["a dog", "the cat"]), ("x", ["x y"]))
    assert METRICS["rouge1"](*pairs).value == pytest.approx(100 * (1 + 2 / 3) / 2)
    assert METRICS["exact_match"](*pairs).value == 50
    assert metrics.rouge_rows(*pairs, "rouge1") == pytest.approx([1, 2 / 3])


def test_bleu_equals_sacrebleu() -> None:
    rows = [
        ("the cat sat on the mat today", ["the cat sat on the mat", "a cat sat on a mat today"]),
        ("there is a dog in the garden .", ["a dog is in the garden ."]),
        ("hello, world!", ["Hello , world !", "hello world", "hi"]),
    ] * 3
    score = METRICS["bleu"](*texts(*rows))
    # sacrebleu wants the n-th references together; None where a row has fewer.
    width = max(len(r) for _, r in rows)
    streams = [[r[k] if k < len(r) else None for _, r in rows] for k in range(width)]
    assert score.value == pytest.approx(BLEU().corpus_score([t for t, _ in rows], streams).score)
    assert score.n == 9
    assert score.low <= score.value <= score.high


def test_exact_match_ignores_outer_white_space() -> None:
    assert METRICS["exact_match"](*texts((" 42\n", ["42"]), ("4 2", ["42"]))).value == 50


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("so 3 + 4 = 7\n#### 7", "7"),
        ("####-1,234.50", "-1234.5"),
        ("#### $18\n#### 19", "18"),
        ("#### 18.", "18"),
        ("#### .5", "0.5"),
        ("The answer is 18", None),
        ("#### eighteen", None),
        ("## 18", None),
    ],
)
def test_number_after_marks(text: str, number: str | None) -> None:
    assert metrics.number_after_marks(text) == (None if number is None else Decimal(number))


def test_final_number_scores_the_number_alone() -> None:
    pairs = texts(
        ("2 + 2 = 5 #### 1,000.0", ["twice 500 #### 1000"]), ("#### 3", ["#### 4"]), ("4", ["#### 4"])
    )
    score = METRICS["final_number"](*pairs)
    assert (score.value, score.n) == (pytest.approx(100 / 3), 3)
    assert metrics.row_scores("final_number")(*pairs) == [1.0, 0.0, 0.0]
    with pytest.raises(DataError, match=r"t:0: no `#### number` in the answer"):
        METRICS["final_number"](*texts(("#### 1", ["1"])))


def test_agreement() -> None:
    a, _ = labelled([0, 1, 2, 1], [0, 0, 0, 0], 3)
    b, _ = labelled([0, 1, 1, 2], [0, 0, 0, 0], 3)
    assert metrics.agreement(a, b).value == 50
    c, _ = texts(("x", [""]), (" y ", [""]))
    d, _ = texts(("x", [""]), ("y", [""]))
    assert metrics.agreement(c, d).value == 100
    with pytest.raises(DataError, match="different rows"):
        metrics.agreement(a, b[:3])


def test_kl_to_the_teacher_by_hand() -> None:
    def scored(*rows: tuple[float, ...]) -> list[Prediction]:
        return [Prediction(n, 0, row, "a") for n, row in enumerate(rows)]

    def logs(*shares: float) -> tuple[float, ...]:
        return tuple(math.log(share) - 3 for share in shares)  # what the labels share does not add up to 1

    teacher = scored(logs(0.5, 0.5), logs(0.9, 0.1))
    own = scored(logs(0.25, 0.75), logs(0.9, 0.1))
    first = 0.5 * math.log(0.5 / 0.25) + 0.5 * math.log(0.5 / 0.75)
    score = metrics.kl_to_teacher(own, teacher)
    assert score is not None
    assert score.value == pytest.approx(first / 2)
    assert (score.n, score.low, score.high) == (2, pytest.approx(0), pytest.approx(first))
    a, _ = texts(("x", [""]), ("y", [""]))
    assert metrics.kl_to_teacher(a, a) is None
    assert metrics.kl_to_teacher([], []) is None
    with pytest.raises(DataError, match="different rows"):
        metrics.kl_to_teacher(own, teacher[:1])
    with pytest.raises(DataError, match="different labels"):
        metrics.kl_to_teacher(own, scored((0.0,), (0.0,)))


def test_nats_of_references_by_hand() -> None:
    def measured(*rows: tuple[float | None, int]) -> list[Prediction]:
        return [
            Prediction(n, None, (), "a", reference_nll=nats, reference_tokens=tokens)
            for n, (nats, tokens) in enumerate(rows)
        ]

    score = metrics.reference_nll(measured((2.0, 1), (3.0, 4)))
    assert score is not None
    assert (score.value, score.n) == (pytest.approx(1.0), 5), "over tokens, not a mean of rows"
    assert (score.low, score.high) == (pytest.approx(0.75), pytest.approx(2.0))
    assert metrics.reference_nll(measured((2.0, 1), (None, 0))) is None
    assert metrics.reference_nll(measured((0.0, 0))) is None
    assert metrics.reference_nll([]) is None


def test_perplexity_by_hand() -> None:
    score = perplexity_score([2.0, 6.0], [2, 2])
    assert score.value == pytest.approx(math.exp(2.0))
    assert (score.n, score.low, score.high) == (4, pytest.approx(math.exp(1.0)), pytest.approx(math.exp(3.0)))
    with pytest.raises(DataError):
        perplexity_score([], [])


@pytest.mark.parametrize(
    ("only_a", "only_b"), [(0, 0), (5, 0), (3, 9), (7, 7), (40, 60), (900, 1000), (2100, 1900)]
)
def test_mcnemar_equals_the_binomial_test(only_a: int, only_b: int) -> None:
    a = [True] * only_a + [False] * only_b + [True, False]
    b = [False] * only_a + [True] * only_b + [True, False]
    n, few = only_a + only_b, min(only_a, only_b)
    # P(X <= few) for X ~ Binomial(n, 1/2), twice, in exact integers
    expected = min(Fraction(1), Fraction(2 * sum(math.comb(n, k) for k in range(few + 1)), 2**n))
    assert mcnemar(a, b) == pytest.approx(float(expected), rel=1e-9)
    assert mcnemar(b, a) == mcnemar(a, b)


def test_paired_bootstrap() -> None:
    rng = np.random.default_rng(0)
    a = (rng.random(500) < 0.9).astype(float)
    b = np.where(rng.random(500) < 0.9, a, 1 - a)
    score = paired_bootstrap((100 * a).tolist(), (100 * b).tolist(), seed=0)
    assert score.value == pytest.approx(100 * (a - b).mean())
    half = 1.96 * (100 * (a - b)).std() / math.sqrt(500)
    assert (score.low, score.high) == pytest.approx((score.value - half, score.value + half), abs=0.3)
    assert score == paired_bootstrap(100 * a, 100 * b, seed=0)
    assert paired_bootstrap([1.0] * 5, [1.0] * 5) == Score(0.0, 5, 0.0, 0.0)


@pytest.mark.parametrize("graded", [False, True])
def test_paired_bootstrap_agrees_with_scipy(graded: bool) -> None:
    """Both paths, few distinct differences and many, against scipy's row-by-row resampling."""
    rng = np.random.default_rng(1)
    a = rng.beta(2, 1, 400) if graded else (rng.random(400) < 0.85).astype(float)
    b = np.clip(a + rng.normal(0.02, 0.1, 400), 0, 1) if graded else np.where(rng.random(400) < 0.9, a, 1 - a)
    ours = paired_bootstrap(100 * a, 100 * b, seed=3)
    theirs = bootstrap(
        (100 * a, 100 * b),
        lambda x, y, axis: (x - y).mean(axis),
        paired=True,
        n_resamples=10_000,
        method="percentile",
        rng=np.random.default_rng(4),
    ).confidence_interval
    width = ours.high - ours.low
    assert abs(ours.low - theirs.low) < 0.04 * width
    assert abs(ours.high - theirs.high) < 0.04 * width


def test_metrics_refuse_what_they_cannot_score() -> None:
    predictions, rows = labelled([0, 1], [0, 1], 2)
    for name, metric in METRICS.items():
        with pytest.raises(DataError, match="no rows to score"):
            metric([], [])
        with pytest.raises(DataError, match="2 rows against 1"):
            metric(predictions, rows[:1])
        if name in metrics.CLASSIFICATION_METRICS:
            with pytest.raises(DataError, match=r"t:0: no label to score"):
                metric(*texts(("x", ["y"])))


def test_task_metrics() -> None:
    kind = {"name": "t", "template": "{x}"}
    labels = Task(**kind, kind="classification", labels={"0": " a", "1": " b"})
    written = Task(**kind, kind="generation", target_field="y")
    assert metrics.task_metrics(labels) == ("accuracy", "f1")
    assert metrics.task_metrics(written) == ("rougeL", "bleu")
    chosen = written.model_copy(update={"metrics": ("exact_match", "rouge1")})
    assert metrics.task_metrics(chosen) == ("exact_match", "rouge1")
    for task, name in ((labels, "rougeL"), (written, "accuracy"), (labels, "acuracy")):
        with pytest.raises(
            RecipeError, match=rf"task t: metric '{name}' does not score .*; choose from .*exact_match"
        ):
            metrics.task_metrics(task.model_copy(update={"metrics": (name,)}))


def test_correct_and_row_scores() -> None:
    assert metrics.correct(*labelled([0, 1, 1], [0, 0, 1], 2)) == [True, False, True]
    assert metrics.row_scores("accuracy")(*labelled([0, 1], [0, 0], 2)) == [1.0, 0.0]
    assert metrics.row_scores("rougeL")(*texts(("a b", ["a c"]))) == pytest.approx([0.5])
