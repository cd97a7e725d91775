from __future__ import annotations

import pytest

from bitdistill.report import compare
from bitdistill.report.run_folder import Answer


def answer(index: int, prediction: str, reference: str = "a", judged: bool = True) -> Answer:
    correct = prediction == reference if judged else None
    return Answer(index, f"test.jsonl:{index + 1}", f"prompt {index}", reference, prediction, correct)


def test_pairs_go_by_index() -> None:
    teacher = [answer(2, "a"), answer(0, "b"), answer(5, "a")]
    student = [answer(0, "a"), answer(1, "a"), answer(2, "b")]
    assert [(a.index, a.prediction, b.prediction) for a, b in compare.pair(teacher, student)] == [
        (0, "b", "a"),
        (2, "a", "b"),
    ]


def test_gap_by_hand() -> None:
    # 100 rows: both right 80, only the teacher 12, only the student 2, both wrong 6
    teacher = ["a"] * 92 + ["b"] * 8
    student = ["a"] * 80 + ["b"] * 12 + ["a"] * 2 + ["b"] * 6
    pairs = [(answer(i, t), answer(i, s)) for i, (t, s) in enumerate(zip(teacher, student, strict=True))]
    gap = compare.gap(pairs)
    assert gap is not None
    assert (gap.n, gap.only_teacher, gap.only_row) == (100, 12, 2)
    assert gap.points == pytest.approx(-10.0)
    assert gap.low < -10.0 < gap.high < 0
    assert gap.clear
    # exact two-sided binomial test of 2 in 14: 2 * (1 + 14 + 91) / 2^14
    assert gap.p_value == pytest.approx(2 * 106 / 2**14)
    assert compare.agreement(pairs) == pytest.approx(86.0)
    assert gap == compare.gap(pairs)


def test_no_gap_without_judged_answers() -> None:
    assert compare.gap([]) is None
    assert compare.gap([(answer(0, "x", judged=False), answer(0, "y", judged=False))]) is None


def test_disagreements_are_split_by_who_is_right() -> None:
    kinds = {"lost": ("a", "b"), "won": ("b", "a"), "other": ("b", "c"), "same": ("b", "b")}
    pairs = []
    for teacher, student in kinds.values():
        start = len(pairs)
        pairs += [(answer(start + i, teacher), answer(start + i, student)) for i in range(40)]
    groups = compare.disagreements(pairs, 20)
    assert {key: len(group) for key, group in groups.items()} == {"lost": 10, "won": 5, "other": 5}
    assert [a.index for a, _ in groups["lost"]] == list(range(0, 40, 4))  # spread over the set


def test_places_that_one_group_leaves_go_to_the_others() -> None:
    pairs = [(answer(i, "b"), answer(i, "c")) for i in range(30)]
    groups = compare.disagreements(pairs, 20)
    assert {key: len(group) for key, group in groups.items()} == {"lost": 0, "won": 0, "other": 20}
    assert compare.disagreements(pairs, 0) == {"lost": [], "won": [], "other": []}


def test_white_space_is_no_disagreement() -> None:
    assert (
        compare.disagreements([(answer(0, " yes", judged=False), answer(0, "yes", judged=False))], 5)["other"]
        == []
    )


def test_confusions_count_student_and_teacher() -> None:
    pairs = [(answer(i, "b", "a"), answer(i, "b", "a")) for i in range(2)]
    pairs += [(answer(9, "a", "a"), answer(9, "b", "a")), (answer(10, "c", "c"), answer(10, "a", "c"))]
    first, second = compare.confusions(pairs)
    assert (first.reference, first.prediction, first.student, first.teacher) == ("a", "b", 3, 2)
    assert (second.reference, second.prediction, second.student, second.teacher) == ("c", "a", 1, 0)
    assert len(compare.confusions(pairs, limit=1)) == 1
