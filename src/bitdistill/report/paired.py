"""Two models on the same test rows, over one seed or several: gap, intervals, tests. No torch import.

Two intervals answer two questions. Over rows: would other test rows give the same order, for these trained
models? Over seeds: would other seeds of the same two recipes? The second needs at least two seeds and, with
three, is wide (t = 4.3).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from bitdistill.errors import ArtifactError, DataError
from bitdistill.eval.metrics import mcnemar, paired_bootstrap
from bitdistill.eval.results import ResultRow, read_results
from bitdistill.eval.row_scores import decode

if TYPE_CHECKING:
    from bitdistill.report.run_folder import Answer

PERMUTATIONS = 9_999


@dataclass(frozen=True)
class Scored:
    """One model's (recipe's) scores on the same rows, by seed."""

    name: str
    task: str
    metric: str
    scores: Mapping[int, NDArray[np.float64]]
    """Seed -> score of each row in percent, float64 [n]."""
    references_sha256: str | None = None
    """Hash of the rows' answers; None in results from before it was recorded."""

    @property
    def n(self) -> int:
        return len(next(iter(self.scores.values())))


@dataclass(frozen=True)
class Comparison:
    """First minus second, in points (0..100), over the seeds that both have."""

    first: str
    second: str
    task: str
    metric: str
    n: int
    seeds: tuple[int, ...]
    first_mean: float
    second_mean: float
    points: float
    low: float
    high: float
    """95% interval over rows: paired bootstrap of the mean over seeds, a row's seeds kept together."""
    by_seed: tuple[float, ...]
    p_by_seed: tuple[float, ...]
    """Per seed: exact McNemar test where rows are right or wrong, else a paired permutation test."""
    test: str
    seeds_low: float | None = None
    seeds_high: float | None = None
    """95% t interval over the seeds' differences; None for one seed."""
    seeds_p: float | None = None

    @property
    def p_value(self) -> float:
        """One seed: the test over its rows. Several: the paired t test over seeds."""
        return self.p_by_seed[0] if self.seeds_p is None else self.seeds_p

    @property
    def clear(self) -> bool:
        """Whether the interval over rows leaves out zero."""
        return self.low > 0 or self.high < 0


def compare(first: Scored, second: Scored, *, bootstrap_seed: int = 0, tests: bool = True) -> Comparison:
    """Compare two models on the same rows.

    Args:
        tests: False leaves the per-seed tests out (p_by_seed is empty), for tables with many rows.

    Raises:
        DataError: other task, metric or rows, or no seed in common.
    """
    where = f"{first.name} against {second.name}"
    for what in ("task", "metric"):
        if getattr(first, what) != getattr(second, what):
            raise DataError(
                f"{where}: {what} {getattr(first, what)} against {getattr(second, what)}; compare like with like"
            )
    seeds = tuple(sorted(first.scores.keys() & second.scores.keys()))
    if not seeds:
        raise DataError(
            f"{where}: no seed in common ({sorted(first.scores)} and {sorted(second.scores)}); run the same seeds"
        )
    hashes = {first.references_sha256, second.references_sha256} - {None}
    if first.n != second.n or len(hashes) > 1:
        raise DataError(
            f"{where}: scored on different rows ({first.n} and {second.n}); score both on the same data"
        )
    a = np.stack([first.scores[seed] for seed in seeds])
    b = np.stack([second.scores[seed] for seed in seeds])
    over_rows = paired_bootstrap(a.mean(0), b.mean(0), seed=bootstrap_seed)  # type: ignore[arg-type]
    by_seed = (a - b).mean(1)
    judged = bool(np.isin(a, (0.0, 100.0)).all() and np.isin(b, (0.0, 100.0)).all())
    p_by_seed: tuple[float, ...] = ()
    if tests:
        p_by_seed = tuple(
            mcnemar((x > 0).tolist(), (y > 0).tolist()) if judged else permutation_p(x, y, bootstrap_seed)
            for x, y in zip(a, b, strict=True)
        )
    seeds_low, seeds_high, seeds_p = seed_interval(by_seed)
    return Comparison(
        first=first.name,
        second=second.name,
        task=first.task,
        metric=first.metric,
        n=first.n,
        seeds=seeds,
        first_mean=float(a.mean()),
        second_mean=float(b.mean()),
        points=float(by_seed.mean()),
        low=over_rows.low,
        high=over_rows.high,
        by_seed=tuple(map(float, by_seed)),
        p_by_seed=p_by_seed,
        test="McNemar, exact" if judged else f"paired permutation, {PERMUTATIONS} draws",
        seeds_low=seeds_low,
        seeds_high=seeds_high,
        seeds_p=seeds_p,
    )


def seed_interval(differences: NDArray[np.float64]) -> tuple[float | None, float | None, float | None]:
    """(low, high, p) of the mean of seed-paired differences: t interval and test; None for one seed.

    Equal differences have no variance to estimate: the interval is the point, p is None.
    """
    if len(differences) < 2:
        return None, None, None
    if np.ptp(differences) == 0:
        return float(differences[0]), float(differences[0]), None
    from scipy.stats import ttest_1samp

    result = ttest_1samp(differences, 0.0)
    interval = result.confidence_interval(0.95)
    return float(interval.low), float(interval.high), float(result.pvalue)


def permutation_p(a: NDArray[np.float64], b: NDArray[np.float64], seed: int = 0) -> float:
    """Two-sided p-value of mean(a) = mean(b), rows' scores exchanged at random."""
    from scipy.stats import permutation_test

    if np.array_equal(a, b):
        return 1.0
    result = permutation_test(
        (a, b),
        lambda x, y, axis: (x - y).mean(axis=axis),
        permutation_type="samples",
        vectorized=True,
        n_resamples=PERMUTATIONS,
        batch=200,
        rng=np.random.default_rng(seed),
    )
    return float(result.pvalue)


# --- reading ------------------------------------------------------------------------------------------


def scores_of(row: ResultRow, where: str, run: Path | None = None) -> NDArray[np.float64]:
    """Per-row scores of a results row in percent: recorded with it, else from the run's predictions.

    Raises:
        ArtifactError: neither is there, or the metric is no mean over rows (F1, BLEU).
    """
    if row.row_scores is not None:
        return decode(row.row_scores, row.n, f"{where}: {row.name}")
    answers = _answers(run, row.name) if run is not None else None
    if not answers or any(answer.correct is None for answer in answers) or row.metric not in _JUDGED:
        raise ArtifactError(
            f"{where}: row {row.name} has no scores of single test rows (metric {row.metric}); "
            "evaluate again with --redo eval, with a metric that is a mean over rows first"
        )
    return np.array([100.0 * bool(answer.correct) for answer in answers])


_JUDGED = frozenset({"accuracy", "exact_match", "final_number"})


def _answers(run: Path, name: str) -> list[Answer] | None:
    from bitdistill.report.run_folder import read_answers

    found = read_answers(run, name)
    return sorted(found, key=lambda answer: answer.index) if found else None


def gather(rows: Mapping[int, tuple[ResultRow, Path | None]], name: str, where: str) -> Scored:
    """One model from its results row of each seed.

    Raises:
        ArtifactError, DataError: no scores, or seeds scored on other rows.
    """
    first = next(iter(rows.values()))[0]
    scores = {seed: scores_of(row, where, run) for seed, (row, run) in rows.items()}
    hashes = {row.references_sha256 for row, _ in rows.values()} - {None}
    if len({len(values) for values in scores.values()}) > 1 or len(hashes) > 1:
        raise DataError(f"{where}: row {name}: its seeds were scored on different rows; score them alike")
    return Scored(name, first.task, first.metric, scores, next(iter(hashes), None))


def read_models(path: Path, *, seeds: bool = False) -> dict[str, Scored]:
    """Models of a run folder, results.json or sweep results by name, in the order of the file.

    Names are row names; of a sweep, cells (`CELL` for the student, else `CELL/ROW`), with the recipe before them
    (`RECIPE/CELL`) when the sweep has several.

    Args:
        path: a run's folder, or a results file (a sweep's holds all its seeds).
        seeds: take the same run's other seeds (`NAME-seedN` beside NAME) too.

    Raises:
        ArtifactError: no results there, or rows without scores.
    """
    if path.is_file() and _is_sweep_file(path):
        return _read_sweep(path)
    paths = _seed_folders(path) if seeds else [path]
    found: dict[str, dict[int, tuple[ResultRow, Path | None]]] = {}
    for one in paths:
        file = one / "results.json" if one.is_dir() else one
        run = file.parent if (file.parent / "predictions").is_dir() else None
        for row in read_results(file):
            found.setdefault(row.name, {})[row.seed or 0] = (row, run)
    return {name: gather(rows, name, str(path)) for name, rows in found.items()}


def _is_sweep_file(path: Path) -> bool:
    from bitdistill.report.sweep_results import FORMAT

    with path.open("rb") as handle:
        return FORMAT.encode() in handle.read(256)


def _read_sweep(path: Path) -> dict[str, Scored]:
    from bitdistill.report import sweep_results

    results = sweep_results.read(path)
    many = len({run.recipe for run in results.runs}) > 1
    found: dict[str, dict[int, tuple[ResultRow, Path | None]]] = {}
    for run in results.runs:
        for row in run.rows:
            cell = f"{run.recipe}/{run.cell}" if many else run.cell
            name = cell if row.name == "bitdistill" else f"{cell}/{row.name}"
            found.setdefault(name, {})[run.seed] = (row, None)
    return {name: gather(rows, name, str(path)) for name, rows in found.items()}


def _seed_folders(run: Path) -> list[Path]:
    """A run's folder and its sibling seeds that have results."""
    if not run.is_dir():
        raise ArtifactError(f"{run}: --seeds needs run folders; a results file holds one run")
    run = Path(str(run.resolve()))
    stem = run.name.rpartition("-seed")[0] if run.name.rpartition("-seed")[2].isdigit() else run.name
    stem = stem or run.name
    names = [run.parent / stem, *sorted(run.parent.glob(f"{stem}-seed*"))]
    return [p for p in names if (p / "results.json").is_file() and _is_seed(p.name, stem)] or [run]


def _is_seed(name: str, stem: str) -> bool:
    return name == stem or name.removeprefix(f"{stem}-seed").isdigit()


def as_json(comparison: Comparison) -> dict[str, Any]:
    """For `--json`."""
    from dataclasses import asdict

    return {**asdict(comparison), "p_value": comparison.p_value, "clear": comparison.clear}
