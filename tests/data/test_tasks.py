"""Template to token ids: fields, labels, answers, shortening, and what a tokenizer must be."""

from __future__ import annotations

import logging
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from bitdistill.config import Task
from bitdistill.data import tasks
from bitdistill.data.readers import Row
from bitdistill.errors import DataError, ModelError, RecipeError

SENTIMENT = Task(
    name="sentiment",
    kind="classification",
    template="{sentence}\nSentiment:",
    labels={"0": " negative", "1": " positive"},
)
PAIR = Task(
    name="pair",
    kind="classification",
    template="{premise} | {hypothesis} {{so}}:",
    labels={"a": " yes", "b": " no"},
    label_field="gold",
)
SUMMARY = Task(name="summary", kind="generation", template="{text}\nTL;DR:", target_field="summary")


def rows(*fields: dict[str, Any]) -> list[Row]:
    return [Row(f, f"train.jsonl:{n}") for n, f in enumerate(fields, start=1)]


def ids(tokenizer: Any, text: str) -> tuple[int, ...]:
    return tuple(tokenizer(text, add_special_tokens=False)["input_ids"])


def test_classification_row(tokenizer: Any) -> None:
    (example,) = tasks.encode(SENTIMENT, rows({"sentence": "a witty film", "label": 1}), tokenizer, 64)
    assert example.prompt == "a witty film\nSentiment:"
    assert example.prompt_ids == ids(tokenizer, example.prompt)
    assert example.answer_ids == ids(tokenizer, " positive")
    assert (example.label, example.references, example.where) == (1, ("positive",), "train.jsonl:1")
    whole = tokenizer.decode(example.prompt_ids + example.answer_ids)
    assert whole == "a witty film\nSentiment: positive"


def test_pair_template_with_literal_braces(tokenizer: Any) -> None:
    (example,) = tasks.encode(PAIR, rows({"premise": "p", "hypothesis": "h {x}", "gold": "b"}), tokenizer, 64)
    assert example.prompt == "p | h {x} {so}:"
    assert example.label == 1


def test_generation_row_ends_with_eos_and_keeps_all_references(tokenizer: Any) -> None:
    task = SUMMARY.model_copy(update={"reference_field": "more"})
    row = {"text": "the card", "summary": "card", "more": ["my card", "card"]}
    (example,) = tasks.encode(task, rows(row), tokenizer, 64)
    assert example.answer_ids == (*ids(tokenizer, " card"), tokenizer.eos_token_id)
    assert example.references == ("card", "my card")
    assert example.label is None


@pytest.mark.parametrize(
    ("append_eos", "kind", "ends"), [(None, "c", False), (True, "c", True), (False, "g", False)]
)
def test_eos_rule(tokenizer: Any, append_eos: bool | None, kind: str, ends: bool) -> None:
    task = (SENTIMENT if kind == "c" else SUMMARY).model_copy(update={"append_eos": append_eos})
    row = {"sentence": "x", "label": 0, "text": "x", "summary": "y"}
    (example,) = tasks.encode(task, rows(row), tokenizer, 64)
    assert (example.answer_ids[-1] == tokenizer.eos_token_id) is ends


def test_prompt_ids_do_not_depend_on_the_answer(tokenizer: Any, blank_tokenizer: Any) -> None:
    for tok in (tokenizer, blank_tokenizer):
        both = tasks.encode(
            SENTIMENT, rows({"sentence": "a film", "label": 0}, {"sentence": "a film", "label": 1}), tok, 64
        )
        (bare,) = tasks.encode(SENTIMENT, rows({"sentence": "a film"}), tok, 64, require_answers=False)
        assert both[0].prompt_ids == both[1].prompt_ids == bare.prompt_ids
        assert (bare.answer_ids, bare.label) == ((), None)


def test_bos_comes_where_the_tokenizer_adds_one(blank_tokenizer: Any) -> None:
    (example,) = tasks.encode(SENTIMENT, rows({"sentence": "a film", "label": 1}), blank_tokenizer, 64)
    assert example.prompt_ids == tuple(blank_tokenizer(example.prompt)["input_ids"])
    assert example.prompt_ids[0] == blank_tokenizer.bos_token_id
    assert blank_tokenizer.bos_token_id not in example.answer_ids


def test_blank_adding_tokenizers_give_the_answer_as_within_a_sentence(blank_tokenizer: Any) -> None:
    alone = ids(blank_tokenizer, " positive")
    (example,) = tasks.encode(SENTIMENT, rows({"sentence": "a film", "label": 1}), blank_tokenizer, 64)
    within = ids(blank_tokenizer, "a film\nSentiment: positive")
    assert within[-len(example.answer_ids) :] == example.answer_ids
    # What this guards against: a text of its own gets a second blank.
    assert alone != example.answer_ids
    assert (
        blank_tokenizer.decode(example.prompt_ids[1:] + example.answer_ids) == "a film\nSentiment: positive"
    )


@pytest.mark.parametrize(
    ("labels", "value", "index"),
    [
        ({"0": " no", "1": " yes"}, 1, 1),
        ({"0": " no", "1": " yes"}, "1", 1),
        ({"0": " no", "1": " yes"}, 1.0, 1),
        ({"0": " no", "1": " yes"}, True, 1),
        ({"false": " no", "true": " yes"}, True, 1),
        ({"False": " no", "True": " yes"}, False, 0),
        ({"entailment": " no", "other": " yes"}, "other", 1),
    ],
)
def test_label_spellings(tokenizer: Any, labels: dict[str, str], value: Any, index: int) -> None:
    task = SENTIMENT.model_copy(update={"labels": labels})
    (example,) = tasks.encode(task, rows({"sentence": "x", "label": value}), tokenizer, 64)
    assert example.label == index


BAD_ROWS = [
    (
        SENTIMENT,
        {"text": "x", "label": 1},
        r"^train\.jsonl:2: no field `sentence`.*fields here: `text`, `label`",
    ),
    (SENTIMENT, {"sentence": None, "label": 1}, r"^train\.jsonl:2: field `sentence` is null"),
    (SENTIMENT, {"sentence": ["x"], "label": 1}, r"^train\.jsonl:2: field `sentence` is a list"),
    (SENTIMENT, {"sentence": "x"}, r"^train\.jsonl:2: no label field `label`.*fields here: `sentence`"),
    (
        SENTIMENT,
        {"sentence": "x", "label": 2},
        r"^train\.jsonl:2: label 2 in `label` is not one of '0', '1'; mend",
    ),
    (SENTIMENT, {"sentence": "x", "label": 0.5}, r"^train\.jsonl:2: label 0\.5 in"),
    (SENTIMENT, {"sentence": "x", "label": None}, r"^train\.jsonl:2: label None in"),
    (SENTIMENT, {"sentence": "x", "label": [1]}, r"^train\.jsonl:2: label \[1\] in"),
    (
        SENTIMENT,
        {"sentence": "x", "label": -1},
        r"^train\.jsonl:2: label -1 in .*hidden labels: use a labelled",
    ),
    (SUMMARY, {"text": "x"}, r"^train\.jsonl:2: no field `summary`"),
    (SUMMARY, {"text": "x", "summary": " \n"}, r"^train\.jsonl:2: field `summary` is empty"),
]


@pytest.mark.parametrize(("task", "bad", "message"), BAD_ROWS)
def test_bad_rows_are_named_by_file_and_line(tokenizer: Any, task: Task, bad: dict, message: str) -> None:
    good = {"sentence": "x", "label": 1, "text": "x", "summary": "y"}
    with pytest.raises(DataError, match=message):
        tasks.encode(task, rows(good, bad, good), tokenizer, 64)
    with pytest.raises(DataError, match=message):  # `plan` finds the same without a tokenizer
        tasks.check_rows(task, rows(good, bad, good))


def test_wrong_references(tokenizer: Any) -> None:
    task = SUMMARY.model_copy(update={"reference_field": "more"})
    with pytest.raises(DataError, match=r"train\.jsonl:1: field `more` is no text or list of texts"):
        tasks.encode(task, rows({"text": "x", "summary": "y", "more": [1]}), tokenizer, 64)


@pytest.mark.parametrize(
    "template", ["{}", "{0.__class__}", "{a.b}", "{a[0]}", "{a!r}", "{a:>9}", "plain", "{a"]
)
def test_templates_are_plain(template: str) -> None:
    task = SENTIMENT.model_copy(update={"template": template})
    with pytest.raises(RecipeError, match=r"task sentiment: template: "):
        tasks.renderer(task)


def test_long_prompts_lose_text_at_the_end_of_the_longest_field(tokenizer: Any, caplog: Any) -> None:
    caplog.set_level(logging.WARNING, "bitdistill")
    long_premise = {"premise": "the film is a charming journey " * 9, "hypothesis": "it is good", "gold": "a"}
    short = {"premise": "x", "hypothesis": "y", "gold": "a"}
    cut, whole = tasks.encode(PAIR, rows(long_premise, short), tokenizer, 40)
    assert len(cut.prompt_ids) + len(cut.answer_ids) <= 40
    assert cut.prompt.startswith("the film is a charming journey")
    assert cut.prompt.endswith(" | it is good {so}:")
    assert len(cut.prompt_ids) + len(cut.answer_ids) >= 38  # no more than needed
    assert whole.prompt == "x | y {so}:"
    assert caplog.messages == ["pair: 1 of 2 prompts cut to max_length 40"]


def test_shortened_prompts_keep_bos(blank_tokenizer: Any) -> None:
    row = {"sentence": "a charming film " * 20, "label": 1}
    (example,) = tasks.encode(SENTIMENT, rows(row), blank_tokenizer, 32)
    assert len(example.prompt_ids) + len(example.answer_ids) <= 32
    assert example.prompt_ids == tuple(blank_tokenizer(example.prompt)["input_ids"])
    assert example.prompt_ids[0] == blank_tokenizer.bos_token_id


@settings(max_examples=60, deadline=None)
@given(
    premise=st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=90),
    hypothesis=st.text(st.sampled_from("ab 😀é\n"), max_size=60),
    max_length=st.integers(22, 60),
)
def test_shortened_prompts_always_fit(tokenizer: Any, premise: str, hypothesis: str, max_length: int) -> None:
    row = {"premise": premise, "hypothesis": hypothesis, "gold": "a"}
    (example,) = tasks.encode(PAIR, rows(row), tokenizer, max_length)
    assert len(example.prompt_ids) + len(example.answer_ids) <= max_length
    assert example.prompt_ids == ids(tokenizer, example.prompt)
    assert example.prompt.endswith(" {so}:")
    left, _, right = example.prompt.removesuffix(" {so}:").partition(" | ")
    assert premise.startswith(left) or " | " in premise
    assert hypothesis.startswith(right) or " | " in premise


def test_template_that_never_fits(tokenizer: Any) -> None:
    with pytest.raises(
        DataError, match=r"train\.jsonl:1: the template alone needs \d+ tokens, max_length leaves"
    ):
        tasks.encode(SENTIMENT, rows({"sentence": "a film", "label": 1}), tokenizer, 3)


def test_long_answers_are_cut_without_eos(tokenizer: Any, caplog: Any) -> None:
    caplog.set_level(logging.WARNING, "bitdistill")
    row = {"text": "short", "summary": "the film is a charming journey " * 5}
    (example,) = tasks.encode(SUMMARY, rows(row), tokenizer, 30)
    assert len(example.answer_ids) == 15
    assert tokenizer.eos_token_id not in example.answer_ids
    assert example.references == (row["summary"],)  # scoring sees the whole reference
    assert "summary: 1 of 1 answers cut to what max_length 30 leaves them" in caplog.messages


def test_where_a_prompt_is_cut_says_nothing_about_its_answer(tokenizer: Any) -> None:
    """Else scores would be of prompts that tell how long the reference is, and prediction would see others."""
    text = "the film is a charming journey " * 9
    task = SUMMARY.model_copy(update={"max_new_tokens": 12})
    bare, short, long = (
        {"text": text, **more} for more in ({}, {"summary": "a film"}, {"summary": "the card is lost " * 5})
    )
    answered = tasks.encode(task, rows(short, long), tokenizer, 40)
    (alone,) = tasks.encode(task, rows(bare), tokenizer, 40, require_answers=False)
    assert {e.prompt_ids for e in answered} == {alone.prompt_ids}
    assert 26 <= len(alone.prompt_ids) <= 28  # 40 without the 12 new tokens
    assert [e.answer_ids[-1] == tokenizer.eos_token_id for e in answered] == [True, False]
    assert all(len(e.prompt_ids) + len(e.answer_ids) <= 40 for e in answered)
    # More new tokens than half of max_length leave the other half to the prompt.
    (half,) = tasks.encode(task.model_copy(update={"max_new_tokens": 99}), rows(short), tokenizer, 40)
    assert 18 <= len(half.prompt_ids) <= 20


def test_answers_that_did_not_end_have_no_end_of_text(tokenizer: Any) -> None:
    given = rows(*({"text": "x", "summary": "a film"} for _ in range(2)))
    whole, cut = tasks.encode(SUMMARY, given, tokenizer, 64, ended=[True, False])
    assert whole.answer_ids == (*cut.answer_ids, tokenizer.eos_token_id)
    assert cut.answer_ids == ids(tokenizer, " a film")


def test_an_answer_longer_than_new_tokens_stays_whole_beside_a_short_prompt(tokenizer: Any) -> None:
    task = SUMMARY.model_copy(update={"max_new_tokens": 2})
    row = {"text": "x", "summary": "the film is a charming journey"}
    (example,) = tasks.encode(task, rows(row), tokenizer, 64)
    assert example.answer_ids == (*ids(tokenizer, " " + row["summary"]), tokenizer.eos_token_id)
    assert len(example.answer_ids) > 2


@pytest.mark.parametrize("append_eos", [None, True])
def test_prompts_leave_room_for_the_longest_label_word(tokenizer: Any, append_eos: bool | None) -> None:
    labels = {"0": " no", "1": " the film is a charming journey"}
    task = SENTIMENT.model_copy(update={"labels": labels, "append_eos": append_eos})
    text = "Where is my card? " * 9
    answered = tasks.encode(
        task, rows({"sentence": text, "label": 0}, {"sentence": text, "label": 1}), tokenizer, 40
    )
    (alone,) = tasks.encode(task, rows({"sentence": text}), tokenizer, 40, require_answers=False)
    assert {e.prompt_ids for e in answered} == {alone.prompt_ids}
    longest = max(len(i) for i in tasks.label_token_ids(task, tokenizer))
    assert 38 - longest <= len(alone.prompt_ids) <= 40 - longest
    assert [e.answer_ids for e in answered] == tasks.label_token_ids(task, tokenizer)


def test_label_token_ids(tokenizer: Any) -> None:
    expected = [ids(tokenizer, " negative"), ids(tokenizer, " positive")]
    assert tasks.label_token_ids(SENTIMENT, tokenizer) == expected
    with_eos = SENTIMENT.model_copy(update={"append_eos": True})
    assert tasks.label_token_ids(with_eos, tokenizer) == [(*i, tokenizer.eos_token_id) for i in expected]


def test_label_words_that_cannot_be_told_apart(tokenizer: Any) -> None:
    prefix = SENTIMENT.model_copy(update={"labels": {"0": " no", "1": " no x"}})
    with pytest.raises(DataError, match=r"label word ' no' begin those of ' no x'"):
        tasks.label_token_ids(prefix, tokenizer)
    # An end-of-text token after each word tells them apart.
    assert len(tasks.label_token_ids(prefix.model_copy(update={"append_eos": True}), tokenizer)) == 2
    backend = Tokenizer(models.WordLevel({"[UNK]": 0, "a": 1, "</s>": 2}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    words = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]", eos_token="</s>")
    with pytest.raises(DataError, match=r"' negative' and ' positive' have the same token ids \[0\]"):
        tasks.label_token_ids(SENTIMENT, words)


def test_check_tokenizer(tokenizer: Any) -> None:
    tasks.check_tokenizer(tokenizer, len(tokenizer))
    with pytest.raises(
        ModelError, match=rf"has id {len(tokenizer) - 1}, the model has {len(tokenizer) - 1} embed"
    ):
        tasks.check_tokenizer(tokenizer, len(tokenizer) - 1)


def test_added_tokens_beyond_the_embedding_are_refused_only_in_rows(tokenizer: Any) -> None:
    """Gemma 3 text models have 262,144 rows and a tokenizer whose <image_soft_token> has id 262,144."""
    import copy

    extended = copy.deepcopy(tokenizer)
    size = len(extended)
    extended.add_special_tokens({"additional_special_tokens": ["<image>"]})
    tasks.check_tokenizer(extended, size)
    good, bad = {"sentence": "x", "label": 1}, {"sentence": "x <image>", "label": 1}
    tasks.encode(SENTIMENT, rows(good), extended, 64, vocab_size=size)
    with pytest.raises(
        DataError, match=rf"train\.jsonl:2: token id {size}, the model has {size} embedding rows"
    ):
        tasks.encode(SENTIMENT, rows(good, bad), extended, 64, vocab_size=size)


def test_missing_eos(tokenizer: Any) -> None:
    bare = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer)
    with pytest.raises(ModelError, match="no eos token"):
        tasks.encode(SUMMARY, rows({"text": "x", "summary": "y"}), bare, 64)
    assert tasks.encode(SENTIMENT, rows({"sentence": "x", "label": 1}), bare, 64)
