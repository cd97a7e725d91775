"""Teacher against student on the same rows: paired gap, disagreements, confused labels."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from bitdistill.errors import DataError
from bitdistill.eval.results import ResultRow
from bitdistill.report import headline
from bitdistill.report.run_folder import Answer

Pair = tuple[Answer, Answer]


@dataclass(frozen=True)
class Gap:
    """Score of a row minus the teacher's on the rows both answered, in points (0..100)."""

    n: int
    points: float
    low: float
    high: float
    """95% paired bootstrap interval of `points`."""
    p_value: float
    """Two-sided `test`."""
    only_row: int | None
    """Rows that only this model answers correctly; None where answers are scored."""
    only_teacher: int | None
    test: str = "McNemar"
    """McNemar (exact), or paired permutation where answers are scored and not right or wrong."""

    @property
    def clear(self) -> bool:
        """Whether the interval leaves out zero."""
        return self.low > 0 or self.high < 0


@dataclass(frozen=True)
class Confusion:
    """One wrong answer, counted."""

    reference: str
    prediction: str
    student: int
    teacher: int


def pair(teacher: Sequence[Answer], other: Sequence[Answer]) -> list[Pair]:
    """(teacher, other) answers to the same row, by index; rows that one of them lacks are left out."""
    known = {answer.index: answer for answer in teacher}
    return [(known[answer.index], answer) for answer in other if answer.index in known]


def gap(pairs: Sequence[Pair], seed: int = 0) -> Gap | None:
    """Paired comparison; None without pairs or where answers are scored and not right or wrong."""
    if not pairs or any(answer.correct is None for both in pairs for answer in both):
        return None
    from bitdistill.eval.metrics import mcnemar, paired_bootstrap

    teacher = [bool(a.correct) for a, _ in pairs]
    other = [bool(b.correct) for _, b in pairs]
    interval = paired_bootstrap([100.0 * x for x in other], [100.0 * x for x in teacher], seed=seed)
    return Gap(
        n=len(pairs),
        points=interval.value,
        low=interval.low,
        high=interval.high,
        p_value=mcnemar(other, teacher),
        only_row=sum(b and not a for a, b in zip(teacher, other, strict=True)),
        only_teacher=sum(a and not b for a, b in zip(teacher, other, strict=True)),
    )


def row_gap(rows: Mapping[str, ResultRow], name: str, pairs: Sequence[Pair], seed: int = 0) -> Gap | None:
    """The gap of row `name` to the teacher: of answers that are right or wrong, else of the scores that are recorded
    with the rows (ROUGE); None where there are neither."""
    found = gap(pairs, seed)
    row, teacher = rows.get(name), rows.get(headline.TEACHER)
    if found is not None or row is None or teacher is None:
        return found
    if row.row_scores is None or teacher.row_scores is None or row.metric != teacher.metric:
        return None
    from bitdistill.report import paired

    both = [paired.gather({0: (one, None)}, one.name, one.label) for one in (row, teacher)]
    try:
        scored = paired.compare(*both, bootstrap_seed=seed)
    except DataError:  # scored on other rows: nothing to pair
        return None
    (p_value,) = scored.p_by_seed
    test = scored.test.partition(",")[0]
    return Gap(scored.n, scored.points, scored.low, scored.high, p_value, None, None, test)


def agreement(pairs: Sequence[Pair]) -> float:
    """Percent (0..100) of pairs with the same answer, right or wrong."""
    return 100.0 * sum(same(both) for both in pairs) / len(pairs)


def same(both: Pair) -> bool:
    """Whether two answers are equal, white space at the ends aside (as in eval.metrics.agreement)."""
    return both[0].prediction.strip() == both[1].prediction.strip()


def disagreements(pairs: Sequence[Pair], limit: int) -> dict[str, list[Pair]]:
    """At most `limit` pairs that differ, spread evenly over the set, by who is right.

    Keys: `lost` (only the teacher is right), `won` (only the student is), `other` (both wrong in different
    ways, or not judged). Half of the places go to `lost`; places that one group leaves go to the others.
    """
    groups: dict[str, list[Pair]] = {"lost": [], "won": [], "other": []}
    for teacher, student in pairs:
        if same((teacher, student)):
            continue
        key = "lost" if teacher.correct and not student.correct else "won" if student.correct else "other"
        if teacher.correct and student.correct:
            key = "other"  # two accepted answers that differ
        groups[key].append((teacher, student))
    wanted = {"lost": limit - limit // 2, "won": limit // 4, "other": limit // 2 - limit // 4}
    taken = {key: min(wanted[key], len(group)) for key, group in groups.items()}
    for key, group in groups.items():
        taken[key] = min(len(group), taken[key] + limit - sum(taken.values()))
    return {key: _spread(group, taken[key]) for key, group in groups.items()}


def _spread(group: Sequence[Pair], places: int) -> list[Pair]:
    return [group[index * len(group) // places] for index in range(places)]


def confusions(pairs: Sequence[Pair], limit: int = 10) -> list[Confusion]:
    """The student's most frequent wrong (reference, prediction) pairs, with the teacher's count of each."""
    teacher = Counter((a.reference, a.prediction) for a, _ in pairs if a.correct is False)
    student = Counter((b.reference, b.prediction) for _, b in pairs if b.correct is False)
    worst = sorted(student.items(), key=lambda item: (-item[1], item[0]))[:limit]
    return [Confusion(*key, student=times, teacher=teacher[key]) for key, times in worst]
