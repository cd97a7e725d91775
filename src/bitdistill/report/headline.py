"""The first sentences of the report, from the numbers alone. They say so when the student is worse."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from bitdistill.report import text

if TYPE_CHECKING:
    from bitdistill.eval.results import ResultRow
    from bitdistill.report.compare import Gap

TEACHER, BASELINE, STUDENT = "teacher", "bitnet_sft", "bitdistill"
SHARES = frozenset({"accuracy", "exact_match", "final_number"})  # percent of rows answered correctly


def sentences(rows: Mapping[str, ResultRow], gaps: Mapping[str, Gap], split: str) -> list[str]:
    """Score and size against the teacher, score against the baseline: one sentence each, where known."""
    student = rows.get(STUDENT)
    if student is None:
        return ["No student has been evaluated in this run yet."]
    found = [_score(student, rows.get(TEACHER), gaps.get(STUDENT), split), _size(student, rows.get(TEACHER))]
    found.append(_baseline(student, rows.get(BASELINE)))
    return [sentence for sentence in found if sentence]


def _value(row: ResultRow) -> str:
    return f"{row.value:.1f}%" if row.metric in SHARES else f"{row.value:.2f}"


def _score(student: ResultRow, teacher: ResultRow | None, gap: Gap | None, split: str) -> str:
    rows = f"{student.n:,} {split} rows"
    if student.metric in SHARES:
        start = f"The ternary student answers {_value(student)} of {rows} correctly"
    else:
        name = text.metric_name(student.metric)
        start = f"The ternary student reaches {name} {_value(student)} on {rows}"
    if teacher is None or teacher.metric != student.metric:
        return f"{start}; its teacher was not evaluated."
    difference = student.value - teacher.value
    unit = "points " if student.metric in SHARES else ""
    if f"{difference:.1f}" in ("0.0", "-0.0"):
        as_much = "as many as" if student.metric in SHARES else "the same as"
        compared = f"{as_much} its full-precision teacher ({_value(teacher)})"
    else:
        side = "above" if difference > 0 else "below"
        compared = f"{abs(difference):.1f} {unit}{side} its full-precision teacher ({_value(teacher)})"
    if gap is None:
        return f"{start}, {compared}."
    interval = f"95% interval of the difference {text.signed(gap.low)} to {text.signed(gap.high)}"
    verdict = interval if gap.clear else f"{interval}, so these rows do not tell the two apart"
    return f"{start}, {compared}; {verdict}."


def _size(student: ResultRow, teacher: ResultRow | None) -> str | None:
    if not student.size_bytes:
        return None
    if teacher is None or not teacher.size_bytes:
        return f"It takes {text.size(student.size_bytes)} on disk."
    ratio = teacher.size_bytes / student.size_bytes
    sizes = f"{text.size(student.size_bytes)} instead of {text.size(teacher.size_bytes)}"
    if ratio >= 1.05:
        return f"It is {ratio:.1f}× smaller on disk ({sizes})."
    return f"It is not smaller on disk ({sizes})."


def _baseline(student: ResultRow, baseline: ResultRow | None) -> str | None:
    if baseline is None or baseline.metric != student.metric:
        return None
    gain = student.value - baseline.value
    amount = f"{abs(gain):.1f} points" if student.metric in SHARES else f"{abs(gain):.2f}"
    label = (baseline.label or baseline.name).partition(" (")[0]
    if f"{gain:.1f}" in ("0.0", "-0.0"):
        return f"{label}, made ternary without distillation, does as well ({_value(baseline)})."
    if gain > 0:
        return f"{label}, made ternary without distillation, is {amount} worse ({_value(baseline)})."
    better = f"{label}, made ternary without it, is {amount} better ({_value(baseline)})"
    return f"Distillation did not pay here: {better}."


def likelihoods(rows: Iterable[ResultRow]) -> str:
    """How likely the models that were scored for it find the reference answers; empty without any."""
    found = [
        f"{text.clean(row.label or row.name, 60)} {row.metrics['reference_nll']:.3f}"
        for row in rows
        if "reference_nll" in row.metrics
    ]
    if not found:
        return ""
    what = "How likely each model finds the reference answers, in nats a token (less is likelier)"
    return f"{what}: {', '.join(found)}."
