from __future__ import annotations

import pytest

from bitdistill.eval.results import ResultRow
from bitdistill.report import text
from bitdistill.report.compare import Gap
from bitdistill.report.headline import sentences


def row(name: str, value: float, size: int | None = 1_000_000, metric: str = "accuracy") -> ResultRow:
    return ResultRow(
        name=name,
        label={"bitnet_sft": "BitNet-SFT (direct)"}.get(name, name),
        task="t",
        metric=metric,
        value=value,
        n=3080,
        low=value - 1,
        high=value + 1,
        size_bytes=size,
    )


def gap(points: float, low: float, high: float) -> Gap:
    return Gap(3080, points, low, high, 0.01, 10, 20)


def say(rows: list[ResultRow], student_gap: Gap | None = None, split: str = "test") -> list[str]:
    return sentences({r.name: r for r in rows}, {"bitdistill": student_gap} if student_gap else {}, split)


def test_student_below_teacher() -> None:
    rows = [row("teacher", 88.2, 14_400_000), row("bitnet_sft", 80.0), row("bitdistill", 86.4, 1_900_000)]
    assert say(rows, gap(-1.8, -2.8, -0.9)) == [
        "The ternary student answers 86.4% of 3,080 test rows correctly, 1.8 points below its full-precision "
        "teacher (88.2%); 95% interval of the difference −2.8 to −0.9.",
        "It is 7.6× smaller on disk (1.9 MB instead of 14.4 MB).",
        "BitNet-SFT, made ternary without distillation, is 6.4 points worse (80.0%).",
    ]


def test_interval_over_zero_is_said() -> None:
    (score, *_) = say([row("teacher", 88.2), row("bitdistill", 87.9)], gap(-0.3, -1.2, 0.6))
    assert score.endswith("−1.2 to +0.6, so these rows do not tell the two apart.")


def test_student_above_teacher_and_validation_rows() -> None:
    (score, *_) = say([row("teacher", 88.2), row("bitdistill", 89.0)], split="validation")
    assert "3,080 validation rows correctly, 0.8 points above its full-precision teacher (88.2%)." in score


def test_worse_than_the_baseline_is_said() -> None:
    found = say([row("teacher", 88.2), row("bitnet_sft", 84.0), row("bitdistill", 82.5)])
    assert found[-1] == (
        "Distillation did not pay here: BitNet-SFT, made ternary without it, is 1.5 points better (84.0%)."
    )


def test_not_smaller_is_said() -> None:
    found = say([row("teacher", 88.2, 1_000_000), row("bitdistill", 82.5, 1_000_000)])
    assert found[1] == "It is not smaller on disk (1 MB instead of 1 MB)."


def test_generation_is_scored_and_not_right_or_wrong() -> None:
    rows = [row("teacher", 31.5, None, "rougeL"), row("bitnet_sft", 20.0, None, "rougeL")]
    assert say([*rows, row("bitdistill", 30.0, None, "rougeL")]) == [
        "The ternary student reaches ROUGE-L 30.00 on 3,080 test rows, 1.5 below its full-precision "
        "teacher (31.50).",
        "BitNet-SFT, made ternary without distillation, is 10.00 worse (20.00).",
    ]


def test_no_student_and_no_teacher() -> None:
    assert say([row("teacher", 88.2)]) == ["No student has been evaluated in this run yet."]
    assert say([row("bitdistill", 88.2)])[0].endswith("correctly; its teacher was not evaluated.")


@pytest.mark.parametrize(
    ("shown", "expected"),
    [
        (text.si(12345), "12.3k"),
        (text.si(999_600), "1M"),
        (text.si(999.9), "1k"),
        (text.si(2.5e12), "2,500B"),
        (text.si(None), "–"),
        (text.si(0.0123), "0.0123"),
        (text.size(1_910_000), "1.91 MB"),
        (text.size(12), "12 bytes"),
        (text.duration(75), "1 min 15 s"),
        (text.duration(3661), "1 h 1 min"),
        (text.duration(0.5), "0.5 s"),
        (text.signed(-0.04), "0.0"),
        (text.signed(-1.25, 2), "−1.25"),
        (text.signed(2.0), "+2.0"),
        (text.p_value(0.0004), "p < 0.001"),
        (text.p_value(0.0321), "p = 0.032"),
        (text.exact_p(7.26e-190), "7.3e-190"),
        (text.exact_p(0.0321, 3), "0.0321"),
        (text.exact_p(2.2e-320), "< 1e-300"),
        (text.exact_p(0.0), "< 1e-300"),
        (text.number(float("nan")), "–"),
        (text.clean("a\x00b\ud800c\u202ed\te"), "a\ufffdb\ufffdc\u202ed\te"),
        (text.clean("abcdef", 3), "abc…"),
    ],
)
def test_numbers_as_people_read_them(shown: str, expected: str) -> None:
    assert shown == expected
