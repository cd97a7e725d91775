"""`bitdistill init`: guesses from rows, and recipes that plan as they are."""

from __future__ import annotations

import json
import shlex
from importlib import resources
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers
from typer.testing import CliRunner

from bitdistill.cli.main import app
from bitdistill.errors import BitDistillError, DataError
from bitdistill.planning.plan import make_plan
from bitdistill.planning.scaffold import Request, write_recipe
from bitdistill.recipe import load_recipe

MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"


def rows_file(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), "utf-8")
    return path


def init(*arguments: object) -> str:
    """Runs `init`; a failing one raises its error."""
    done = CliRunner().invoke(app, ["init", *map(str, arguments)])
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    assert done.exit_code == 0, done.output
    return done.output


def test_text_labels_win_over_numbers_and_give_words(tmp_path):
    names = ["card_arrival", "Lost-or stolen", "exchange_rate"]
    rows = [
        {"id": i, "text": f"question {i} about money", "category": names[i % 3], "label": i % 3}
        for i in range(60)
    ]
    train = rows_file(tmp_path / "train.jsonl", rows)
    rows_file(tmp_path / "test.jsonl", rows[:9])
    said = init(MODEL, train, "-o", tmp_path / "mine.yaml")
    assert "guessed `category` as the label" in said
    recipe = load_recipe(tmp_path / "mine.yaml")
    assert recipe.name == recipe.task.name == "mine"
    assert (recipe.task.template, recipe.task.label_field) == ("{text}\nLabel:", "category")
    assert recipe.task.labels == {
        "Lost-or stolen": " lost or stolen",
        "card_arrival": " card arrival",
        "exchange_rate": " exchange rate",
    }
    assert recipe.data.test == str(tmp_path / "test.jsonl")
    assert recipe.data.max_length == 64
    make_plan(recipe, "cpu")


def test_pairs_and_numeric_labels(tmp_path):
    rows = [
        {"premise": f"it is {i}", "hypothesis": f"it is not {i}", "label": i % 3, "idx": i} for i in range(60)
    ]
    said = init(MODEL, rows_file(tmp_path / "rows.jsonl", rows), "-o", tmp_path / "r.yaml")
    assert "replace the label words" in said
    assert "`task: mnli`" in said
    recipe = load_recipe(tmp_path / "r.yaml")
    assert recipe.task.template == "Premise: {premise}\nHypothesis: {hypothesis}\nLabel:"
    assert recipe.task.labels == {"0": " 0", "1": " 1", "2": " 2"}
    assert recipe.data.validation_fraction == 0.1
    make_plan(recipe, "cpu")


def test_generation(tmp_path):
    rows = [{"document": f"long text {i} " * 80, "summary": f"short {i}"} for i in range(30)]
    init(MODEL, rows_file(tmp_path / "rows.jsonl", rows), "-o", tmp_path / "r.yaml")
    recipe = load_recipe(tmp_path / "r.yaml")
    assert (recipe.task.kind, recipe.task.target_field) == ("generation", "summary")
    assert recipe.distill.lambda_ == 1.0
    assert recipe.data.max_length == 512
    make_plan(recipe, "cpu")


def test_prompts_of_generation_are_not_cut_for_answers_that_are_short(tmp_path):
    """Prompts leave room for max_new_tokens: 64 tokens in all would cut these at 32."""
    rows = [{"question": f"{i} " + "word " * 26, "answer": f"fine {i}"} for i in range(30)]
    init(MODEL, rows_file(tmp_path / "rows.jsonl", rows), "-o", tmp_path / "r.yaml")
    recipe = load_recipe(tmp_path / "r.yaml")
    assert (recipe.task.kind, recipe.task.target_field) == ("generation", "answer")
    assert recipe.data.max_length == 128


def test_named_fields_and_built_in_task(tmp_path):
    rows = [{"a": f"words {i} here", "b": f"more {i} words", "c": "xy"[i % 2]} for i in range(40)]
    train = rows_file(tmp_path / "rows.jsonl", rows)
    init(MODEL, train, "-o", tmp_path / "r.yaml", "--text", "b", "--label", "c")
    assert load_recipe(tmp_path / "r.yaml").task.template == "{b}\nLabel:"
    init(MODEL, train, "-o", tmp_path / "s.yaml", "--text", "a", "--target", "b")
    assert load_recipe(tmp_path / "s.yaml").task.target_field == "b"
    sst2 = rows_file(tmp_path / "sst2.jsonl", [{"sentence": "fine", "label": 1}])
    init(MODEL, sst2, "-o", tmp_path / "t.yaml", "--task", "sst2")
    assert load_recipe(tmp_path / "t.yaml").task.name == "sst2"


def test_texts_that_repeat_serve_when_there_is_nothing_else(tmp_path):
    rows = [{"text": ["bad thing", "good thing"][i % 2], "label": ["no", "yes"][i % 2]} for i in range(40)]
    init(MODEL, rows_file(tmp_path / "rows.jsonl", rows), "-o", tmp_path / "r.yaml")
    assert load_recipe(tmp_path / "r.yaml").task.template == "{text}\nLabel:"


def test_paths_are_relative_to_the_recipe(tmp_path, monkeypatch):
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    rows = [{"text": f"text number {i}", "label": i % 2} for i in range(20)]
    rows_file(tmp_path / "work" / "rows.jsonl", rows)
    init(MODEL, "rows.jsonl", "-o", "r.yaml")
    assert 'train: "rows.jsonl"' in Path("r.yaml").read_text()
    init(MODEL, "rows.jsonl", "-o", "sub/r.yaml")
    assert load_recipe("sub/r.yaml").data.train == str(tmp_path / "work" / "rows.jsonl")


@pytest.mark.parametrize(
    ("rows", "arguments", "expected"),
    [
        ([{"text": f"t {i}", "n": i} for i in range(20)], [], "no field looks like a label or an answer"),
        ([{"label": i % 2, "n": i} for i in range(20)], [], "no text field besides `label`"),
        ([{"a": "x"}, {"b": "y"}], [], "rows.jsonl: the rows share no field"),
        ([{"text": f"t {i}", "label": "a"} for i in range(9)], ["--label", "label"], "a label repeats"),
        ([{"text": f"t {i}", "label": i % 2} for i in range(9)], ["--label", "lable"], "no field `lable`"),
        ([{"text": "x", "label": 1}], ["--task", "sst2"], "no field `sentence`"),
        ([{"text": "x", "label": 1}], ["--task", "sst"], 'did you mean "sst2"'),
        ([{"text": "x"}], ["--label", "a", "--target", "b"], "give one of them"),
    ],
)
def test_what_cannot_be_guessed_is_said(tmp_path, rows, arguments, expected):
    path = rows_file(tmp_path / "rows.jsonl", rows)
    with pytest.raises(BitDistillError) as caught:
        init(MODEL, path, "-o", tmp_path / "r.yaml", *arguments)
    assert expected in str(caught.value)
    assert not (tmp_path / "r.yaml").exists()


def test_an_existing_recipe_is_kept(tmp_path):
    rows = rows_file(tmp_path / "rows.jsonl", [{"text": f"text {i} is", "label": i % 2} for i in range(20)])
    (tmp_path / "r.yaml").write_text("mine")
    with pytest.raises(BitDistillError, match="exists already"):
        init(MODEL, rows, "-o", tmp_path / "r.yaml")
    assert (tmp_path / "r.yaml").read_text() == "mine"
    init(MODEL, rows, "-o", tmp_path / "r.yaml", "--force")


def test_rows_that_are_no_file_are_refused(tmp_path):
    with pytest.raises(DataError, match="no such file"):
        init(MODEL, tmp_path / "gone.jsonl", "-o", tmp_path / "r.yaml")
    (tmp_path / "fold").mkdir()
    with pytest.raises(DataError, match=r"fold: a folder; name one file of rows"):
        init(MODEL, tmp_path / "fold", "-o", tmp_path / "r.yaml")


def test_files_taken_by_their_names_are_said(tmp_path):
    rows = [{"text": f"text {i} is", "label": i % 2} for i in range(20)]
    train, test, validation = (
        rows_file(tmp_path / f"my{name}.jsonl", rows) for name in ("train", "test", "val")
    )
    said = init(MODEL, train, "-o", tmp_path / "r.yaml")
    assert f"- took {test} as test rows; wrong? --test FILE\n" in said
    assert f"- took {validation} as validation rows; wrong?" in said
    assert "took" not in init(MODEL, train, "-o", tmp_path / "s.yaml", "--test", test)


@pytest.mark.parametrize("arguments", [[], ["--text", "body", "--label", "queue"]])
@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"queue": None}, "`queue` is null; mend or drop the row"),
        ({"queue": ["a"]}, "`queue` is a list; mend or drop the row"),
        ({"queue": ...}, "no field `queue`; mend or drop the row"),
        ({"body": None}, "`body` is null; mend or drop the row"),
        ({"body": ..., "queue": ...}, "no fields; mend or drop the row"),
    ],
)
def test_an_odd_row_is_named(tmp_path, change, expected, arguments):
    """Where the other rows tell what it should hold; `...` takes the field out."""
    rows = [{"body": f"ticket {i} of mine", "queue": ["billing", "repair"][i % 2]} for i in range(40)]
    rows[20] = {name: value for name, value in (rows[20] | change).items() if value is not ...}
    train = rows_file(tmp_path / "rows.jsonl", rows)
    with pytest.raises(DataError) as caught:
        init(MODEL, train, "-o", tmp_path / "r.yaml", *arguments)
    assert str(caught.value) == f"{train}:21: {expected}"


def test_a_named_field_that_few_rows_have_names_a_row_without_it(tmp_path):
    rows = [{"text": f"text {i} is", "label": i % 2} | ({"more": "x"} if i < 5 else {}) for i in range(20)]
    train = rows_file(tmp_path / "rows.jsonl", rows)
    with pytest.raises(DataError, match=r"rows\.jsonl:6: no field `more`"):
        init(MODEL, train, "-o", tmp_path / "r.yaml", "--text", "more")


def test_texts_with_gaps_are_left_out_and_said(tmp_path):
    rows = [{"text": f"text {i} is", "title": f"title {i}", "label": i % 2} for i in range(20)]
    rows[4]["title"] = None
    train = rows_file(tmp_path / "rows.jsonl", rows)
    said = init(MODEL, train, "-o", tmp_path / "r.yaml")
    assert f"left out `title` ({train}:5: `title` is null)" in said
    assert load_recipe(tmp_path / "r.yaml").task.template == "{text}\nLabel:"


def test_a_number_among_texts_is_a_text(tmp_path):
    """As in a run, which writes it out."""
    rows = [{"text": f"text number {i}", "label": i % 2} for i in range(20)]
    rows[4]["text"] = 4
    init(MODEL, rows_file(tmp_path / "rows.jsonl", rows), "-o", tmp_path / "r.yaml")
    assert load_recipe(tmp_path / "r.yaml").task.template == "{text}\nLabel:"


def test_labels_may_be_floats(tmp_path):
    """Spelled as a run finds them: 1.0 is 1, as tables with gaps write integers."""
    rows = [{"text": f"text number {i}", "label": [0.0, 1.0, 2.5][i % 3]} for i in range(30)]
    init(MODEL, rows_file(tmp_path / "rows.jsonl", rows), "-o", tmp_path / "r.yaml")
    recipe = load_recipe(tmp_path / "r.yaml")
    assert recipe.task.labels == {"0": " 0", "1": " 1", "2.5": " 2.5"}
    make_plan(recipe, "cpu")


def model_folder(path: Path, positions: int) -> Path:
    """Config, and a tokenizer whose tokens are bytes: a Chinese character is three."""
    path.mkdir()
    shipped = resources.files("bitdistill.assets") / "configs" / f"{MODEL.replace('/', '--')}.json"
    config = json.loads(shipped.read_text("utf-8")) | {"max_position_embeddings": positions}
    (path / "config.json").write_text(json.dumps(config))
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({symbol: i for i, symbol in enumerate(alphabet)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.save(str(path / "tokenizer.json"))
    return path


@pytest.mark.parametrize("answer", [{"label": 0}, {"answer": "好"}])
def test_max_length_is_measured_where_the_tokenizer_is_here(tmp_path, answer):
    """90 characters are 270 tokens; the guess without a tokenizer is a ninth of that."""
    rows = [
        {"text": "我" * 90} | {k: i % 2 if v == 0 else f"{v}{i}" for k, v in answer.items()}
        for i in range(30)
    ]
    train = rows_file(tmp_path / "rows.jsonl", rows)
    init(model_folder(tmp_path / "model", 2048), train, "-o", tmp_path / "r.yaml")
    recipe = load_recipe(tmp_path / "r.yaml")
    assert recipe.data.max_length == 512
    init(MODEL, train, "-o", tmp_path / "s.yaml")
    assert load_recipe(tmp_path / "s.yaml").data.max_length in (64, 128)


def test_max_length_is_at_most_the_positions_of_the_model(tmp_path):
    rows = [{"text": f"{i} " + "long " * 1000, "label": i % 2} for i in range(20)]
    train = rows_file(tmp_path / "rows.jsonl", rows)
    said = init(model_folder(tmp_path / "model", 1000), train, "-o", tmp_path / "r.yaml")
    assert "max_length is 1000: 1 row in 20 has about 50" in said
    recipe = load_recipe(tmp_path / "r.yaml")
    assert recipe.data.max_length == 1000
    make_plan(recipe, "cpu")
    init(MODEL, train, "-o", tmp_path / "s.yaml")
    assert load_recipe(tmp_path / "s.yaml").data.max_length == 2048


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(
        st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1, max_size=12),
        min_size=2,
        max_size=4,
        unique=True,
    ),
    st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=6),
)
def test_any_label_values_and_names_are_quoted_right(tmp_path, values, odd):
    rows = [{"text": f"text number {i}", "label": values[i % len(values)], "odd": odd} for i in range(20)]
    path = rows_file(tmp_path / "rows.jsonl", rows)
    request = Request(
        MODEL, str(path), None, None, None, ("text",), "label", None, f"bitdistill init {odd!r}{odd}"
    )
    text, _ = write_recipe(request, tmp_path / "r.yaml")
    (tmp_path / "r.yaml").write_text(text, "utf-8")
    assert set(load_recipe(tmp_path / "r.yaml").task.labels) == set(values)


def test_label_words_that_begin_one_another_end_with_a_mark(tmp_path):
    rows = [{"text": f"text number {i}", "label": ["lost", "lost card", "other"][i % 3]} for i in range(30)]
    init(MODEL, rows_file(tmp_path / "rows.jsonl", rows), "-o", tmp_path / "r.yaml")
    assert load_recipe(tmp_path / "r.yaml").task.append_eos is True


def test_an_empty_label_value_gets_a_word(tmp_path):
    rows = [{"text": f"text number {i}", "label": ["", "empty", "b"][i % 3]} for i in range(30)]
    init(MODEL, rows_file(tmp_path / "rows.jsonl", rows), "-o", tmp_path / "r.yaml", "--label", "label")
    assert load_recipe(tmp_path / "r.yaml").task.labels == {"": " empty2", "b": " b", "empty": " empty"}


def test_a_few_rows_still_leave_one_to_score(tmp_path):
    rows = [{"text": f"text number {i}", "label": i % 2} for i in range(6)]
    init(MODEL, rows_file(tmp_path / "rows.jsonl", rows), "-o", tmp_path / "r.yaml")
    make_plan(load_recipe(tmp_path / "r.yaml"), "cpu")


def test_fields_that_no_template_takes_are_left_out_or_refused(tmp_path):
    rows = [{"a.b": f"odd {i}", "text {x}": f"odd {i}", "text": f"t {i}", "label": i % 2} for i in range(20)]
    train = rows_file(tmp_path / "rows.jsonl", rows)
    said = init(MODEL, train, "-o", tmp_path / "r.yaml")
    assert "left out `a.b`, `text {x}`: rename" in " ".join(said.split())
    assert load_recipe(tmp_path / "r.yaml").task.template == "{text}\nLabel:"
    with pytest.raises(DataError, match=r"field `a\.b` cannot stand in a template"):
        init(MODEL, train, "-o", tmp_path / "s.yaml", "--text", "a.b")
    only = rows_file(tmp_path / "only.jsonl", [{"a.b": row["a.b"], "label": row["label"]} for row in rows])
    with pytest.raises(DataError, match="rename the field"):
        init(MODEL, only, "-o", tmp_path / "s.yaml")


def test_printed_commands_paste(tmp_path):
    rows = rows_file(tmp_path / "rows.jsonl", [{"text": f"text {i} is", "label": i % 2} for i in range(20)])
    output = tmp_path / "dir with space" / "r c.yaml"
    said = init(MODEL, rows, "-o", output)
    assert f"bitdistill plan {shlex.quote(str(output))}\n" in said
    assert "# Check it:  bitdistill plan 'r c.yaml'\n" in output.read_text()
