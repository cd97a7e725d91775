"""`data.rows_per_label`: few labels, drawn by seed, the same for every stage; other recipes keep their keys."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from bitdistill.data.readers import Row
from bitdistill.errors import RecipeError
from bitdistill.planning.check import check_data
from bitdistill.stages.common import Run, draw_per_label
from bitdistill.stages.demo import demo_folder, demo_recipe
from tests.stages.conftest import recipe


def rows(labels: str) -> list[Row]:
    return [Row({"text": str(n), "label": label}, f"f:{n:02}") for n, label in enumerate(labels)]


def test_the_draw_is_per_label_in_order_and_by_seed() -> None:
    given = rows("aaaaaaaabbbbbbbbc")  # sorted by label, as some files are
    drawn = [draw_per_label(given, "label", 3, seed) for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]
    for some in drawn:
        assert Counter(r.fields["label"] for r in some) == {"a": 3, "b": 3, "c": 1}
        assert [r.where for r in some] == sorted(r.where for r in some)
    assert draw_per_label(given, "label", 99, 0) == given


def test_a_run_trains_on_them_and_its_keys_say_so(work: Path) -> None:
    plain = Run.open(recipe(work), command="t", quiet=True)
    few = [
        Run.open(recipe(work, "data.rows_per_label=2", f"seed={seed}"), command="t", quiet=True)
        for seed in (0, 1)
    ]
    assert len(plain.train_rows()) == 32
    assert [Counter(r.fields["label"] for r in run.train_rows()) for run in few] == [{"a": 2, "b": 2}] * 2
    assert few[0].train_rows() != few[1].train_rows()
    assert "rows_per_label" not in plain.train_inputs()
    assert few[0].train_inputs() != few[1].train_inputs()
    # Rows that are held out for scoring are taken away first and stay whole.
    held = Run.open(
        recipe(work, "data.rows_per_label=2", "data.validation_fraction=0.5", "eval.split=validation"),
        command="t",
        quiet=True,
    )
    assert len(held.eval_rows()) == 16
    assert not {r.where for r in held.eval_rows()} & {r.where for r in held.train_rows()}


def test_generation_has_no_labels_to_draw_by(work: Path) -> None:
    with pytest.raises(RecipeError, match=r"data\.rows_per_label: a generation task has no labels"):
        recipe(work, "task=aeslc", "data.rows_per_label=2")


def test_the_demo_has_twenty_labels_a_class_and_fits_the_repository() -> None:
    counted = {source.key: source.rows for source in check_data(demo_recipe())}
    assert counted["data.train"] == 1540
    assert counted["data.test"] == 3080
    assert sum(f.stat().st_size for f in demo_folder().rglob("*") if f.is_file()) <= 10_000_000
