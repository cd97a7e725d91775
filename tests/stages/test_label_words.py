"""Label words that scoring could not use are refused before anything is trained, and by `plan`."""

from __future__ import annotations

import pytest

from bitdistill import pipeline
from bitdistill.errors import DataError, RecipeError
from bitdistill.planning.plan import make_plan
from tests.stages.conftest import recipe

BEGINS = "task.labels.b=' w90 w91'"


def test_words_that_begin_one_another_are_refused_before_training(work):
    with pytest.raises(DataError, match="begin those of"):
        pipeline.run(recipe(work, BEGINS), until="sft", quiet=True)
    assert not (work / "runs/tiny/metrics.jsonl").exists()


def test_plan_reads_the_tokenizer_at_hand(work):
    make_plan(recipe(work), "cpu")
    with pytest.raises(DataError, match="begin those of"):
        make_plan(recipe(work, BEGINS), "cpu")
    make_plan(recipe(work, BEGINS, "task.append_eos=true"), "cpu")
    with pytest.raises(DataError, match="max_length: 1, but the template alone needs"):
        make_plan(recipe(work, "data.max_length=1"), "cpu")


def test_blank_words_are_no_words(work):
    with pytest.raises(RecipeError, match="the word of 'b' is blank"):
        recipe(work, "task.labels.b=''")
