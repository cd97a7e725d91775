"""Recipes: precedence, paths, one-line errors with the nearest key, hostile YAML, round trip."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bitdistill import recipe as recipes
from bitdistill.config import Loop, Recipe
from bitdistill.errors import RecipeError
from bitdistill.recipe import builtin_task, dump_recipe, load_recipe, parse_yaml, recipe_hash, run_dir

MINIMAL = """\
name: trial
model: {path: Qwen/Qwen3-0.6B}
task: sst2
data: {train: train.jsonl, validation_fraction: 0.1}
"""


@pytest.fixture
def write(tmp_path: Path):
    def _write(text: str, name: str = "recipe.yaml") -> Path:
        path = tmp_path / name
        path.write_text(text, "utf-8")
        return path

    return _write


def error_of(path: Path, *overrides: str) -> str:
    with pytest.raises(RecipeError) as caught:
        load_recipe(path, overrides)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_minimal_recipe_has_the_documented_defaults(write):
    recipe = load_recipe(write(MINIMAL))
    assert recipe.task == builtin_task("sst2")
    assert recipe.distill.gamma == "auto"
    assert recipe.pretrain is not None
    assert recipe.pretrain.objective == "kl"


def test_paper_method_lies_under_the_users_keys(write):
    recipe = load_recipe(write(MINIMAL + "method: paper\ndistill: {gamma: 60}\n"))
    assert recipe.refine.gains == "ones"
    assert recipe.pretrain.objective == "lm"
    assert (recipe.distill.gamma, recipe.distill.lambda_) == (60, 10)


def test_method_as_a_flag_goes_over_the_file_and_under_other_flags(write):
    path = write(
        MINIMAL
        + "refine: {gains: calibrated, subln: every_linear}\ndistill: {gamma: 60, lambda: 3, epochs: 7}\n"
    )
    recipe = load_recipe(path, ["distill.lambda=2", "method=paper"])
    assert (recipe.method, recipe.refine.gains, recipe.refine.subln) == ("paper", "ones", "paper")
    assert (recipe.distill.gamma, recipe.distill.lambda_, recipe.distill.hidden_weight) == (1e5, 2, 0)
    assert recipe.distill.epochs == 7
    assert recipe.distill.relation.form == "scaled_dot"
    assert load_recipe(write(MINIMAL + "pretrain: null\n"), ["method=paper"]).pretrain is None
    with pytest.raises(RecipeError, match="papr"):
        load_recipe(path, ["method=papr"])


def test_the_paper_method_covers_every_choice_of_its_losses(write):
    departed = (
        "distill: {tau_squared: true, distilled_tokens: all, ce_weight: 0.3, relation: {alpha_v: 0}}\n"
        "refine: {quantize_activations: false}\n"
        "pretrain: {sampled_words: 100000}\n"
    )
    recipe = load_recipe(write(MINIMAL + departed), ["method=paper"])
    literal = load_recipe(write(MINIMAL), ["method=paper"])
    assert (recipe.distill, recipe.refine, recipe.pretrain) == (
        literal.distill,
        literal.refine,
        literal.pretrain,
    )
    # Keys of a file that names the method itself lie over it
    own = load_recipe(write(MINIMAL + departed + "method: paper\n"))
    assert own.distill.tau_squared


def test_the_shipped_recipes_become_the_papers_by_one_flag():
    for path in sorted((Path(__file__).parents[1] / "recipes").glob("*-smollm2-135m.yaml")):
        recipe = load_recipe(path, ["method=paper"])
        assert recipe.pretrain.objective == "lm", path
        assert (recipe.refine.gains, recipe.distill.hidden_weight, recipe.distill.gamma) == (
            "ones",
            0,
            1e5,
        ), path


def test_null_section_hides_the_methods_defaults(write):
    assert load_recipe(write(MINIMAL + "method: paper\npretrain: null\n")).pretrain is None


def test_partial_section_keeps_the_other_defaults_of_that_stage(write):
    recipe = load_recipe(
        write(MINIMAL + "pretrain: {optim: {learning_rate: 2e-3}}\n"), ["sft.loop.log_every_steps=5"]
    )
    assert recipe.pretrain.optim.learning_rate == 2e-3
    assert recipe.pretrain.optim.schedule == "linear"
    assert recipe.sft.loop.batch_rows == 32
    assert recipe.sft.loop.log_every_steps == 5


def test_lambda_is_read_by_either_name(write):
    path = write(MINIMAL + "method: paper\ndistill: {lambda_: 3}\n")
    assert load_recipe(path).distill.lambda_ == 3
    assert load_recipe(path, ["distill.lambda=4"]).distill.lambda_ == 4


@pytest.mark.parametrize(
    ("override", "get", "value"),
    [
        ("distill.gamma=auto", lambda r: r.distill.gamma, "auto"),
        ("distill.gamma=1e5", lambda r: r.distill.gamma, 1e5),
        ("distill.relation.layer=[-1, 3]", lambda r: r.distill.relation.layer, (-1, 3)),
        ("pretrain=null", lambda r: r.pretrain, None),
        ("seed=7", lambda r: r.seed, 7),
        ("task=mnli", lambda r: r.task.name, "mnli"),
        ("task.template={sentence}", lambda r: r.task.template, {"sentence": None}),
        ("pretrain.budget_tokens=10_000_000_000", lambda r: r.pretrain.budget_tokens, 10**10),
        ("sft.loop.compile=false", lambda r: r.sft.loop.compile, False),
    ],
)
def test_overrides_are_yaml_values(write, override, get, value):
    if isinstance(value, dict):  # unquoted braces are a YAML mapping: refused with the value's type
        assert "--set task.template: got a section, expected a text" in error_of(write(MINIMAL), override)
        return
    assert get(load_recipe(write(MINIMAL), [override])) == value


def test_override_within_a_builtin_task(write):
    recipe = load_recipe(write(MINIMAL), ['task.labels.1=" good"'])
    assert recipe.task.labels == {"0": " negative", "1": " good"}


def test_paths_of_the_file_and_of_set(write, tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    (tmp_path / "models" / "tiny").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "here")
    path = write(MINIMAL.replace("Qwen/Qwen3-0.6B", "models/tiny"))
    recipe = load_recipe(path, ["data.test=test.jsonl", "data.validation=hub:a/b"])
    assert recipe.model.path == str(tmp_path / "models" / "tiny")
    assert recipe.data.train == str(tmp_path / "train.jsonl")
    assert recipe.data.test == str(tmp_path / "here" / "test.jsonl")
    assert recipe.data.validation == "hub:a/b"
    assert recipe.output_dir == "runs"
    assert load_recipe(write(MINIMAL, "hub.yaml")).model.path == "Qwen/Qwen3-0.6B"


def test_task_from_a_file_beside_the_recipe(write):
    write("kind: generation\ntemplate: '{text}'\ntarget_field: title\n", "titles.yaml")
    task = load_recipe(write(MINIMAL.replace("sst2", "titles.yaml"))).task
    assert (task.name, task.target_field) == ("titles", "title")


def test_task_file_errors_name_the_task_file(write):
    write("kind: generation\ntemplate: '{text}'\ntarget: title\n", "titles.yaml")
    assert "titles.yaml: target: unknown key" in error_of(write(MINIMAL.replace("sst2", "titles.yaml")))


@pytest.mark.parametrize(
    ("extra", "expected"),
    [
        ("distill: {gama: 3}", 'recipe.yaml:5: distill.gama: unknown key; did you mean "gamma"?'),
        ("gamma: 3", 'recipe.yaml:5: gamma: unknown key; "distill.gamma" takes it'),
        ("sft: {epochs: many}", 'recipe.yaml:5: sft.epochs: got "many", expected a number > 0'),
        ("sft:\n  epochs: -1", "recipe.yaml:6: sft.epochs: got -1, expected a number > 0"),
        (
            "distill: {gamma: fast}",
            'recipe.yaml:5: distill.gamma: got "fast", expected a number >= 0 or "auto"',
        ),
        (
            "sft: {optim: {schedule: cosin}}",
            'sft.optim.schedule: got "cosin", expected "constant" or "linear" or "cosine" or "wsd"; '
            'did you mean "cosine"?',
        ),
        ("sft: {loop: {batch_rows: 0}}", "sft.loop.batch_rows: got 0, expected a whole number >= 1"),
        ("sft: {loop: {batch_rows: 1.5}}", "sft.loop.batch_rows: got 1.5, expected a whole number >= 1"),
        ("distill: {gamma: .inf}", "distill.gamma: got inf, expected a finite number"),
        ("sft: {epochs: 1e400}", "sft.epochs: got inf, expected a finite number"),
        ("seed: 99999999999999999999", "seed: got 99999999999999999999, expected less than 9e+18"),
        ("seed: -1", "seed: got -1, expected a whole number >= 0"),
        ("sft: {loop: {batch_rows: 9999999999999999}}", "expected less than 1e+15"),
        ("refine: paper", 'recipe.yaml:5: refine: got "paper", expected a section with keys subln, gains'),
        ("device: gpu", 'got "gpu", expected "auto" or "cpu" or "cuda"; did you mean "cuda"?'),
        ("method: papr", 'got "papr", expected "bitdistill" or "paper"; did you mean "paper"?'),
        ("distill: {relation: {layer: [1, x]}}", "distill.relation.layer"),
        ("distill: {relation: {layer: []}}", "distill.relation.layer"),
        ("distill: {gamma: true}", "distill.gamma: got true, expected a number"),
        ("distill: {lambda: true}", "distill.lambda: got true, expected a number"),
        ("sft: {epochs: true}", "sft.epochs: got true, expected a number"),
        ("seed: true", "seed: got true, expected a number"),
        ("pretrain: {sequence_length: 1}", "pretrain.sequence_length: got 1, expected a whole number >= 2"),
        (
            "distill: {ce_weight: 0, lambda: 0, gamma: 0, hidden_weight: 0}",
            "ce_weight, lambda, gamma, hidden_weight and prompt_weight are all 0",
        ),
        ("track: {wandb: true}", "track.wandb: unknown key; valid keys: tensorboard, trackio"),
    ],
)
def test_one_line_errors(write, extra, expected):
    assert expected in error_of(write(MINIMAL + extra + "\n"))


def test_several_errors_give_the_misspelt_key_and_a_count(write):
    message = error_of(write(MINIMAL + "sft: {epochs: x}\ndistill: {gama: 3, temperature: hot}\n"))
    assert message.endswith('distill.gama: unknown key; did you mean "gamma"? (and 2 more)')


def test_missing_keys(write):
    assert "data.train: missing; add it (a text)" in error_of(
        write(MINIMAL.replace("train: train.jsonl, ", ""))
    )
    assert "name: missing" in error_of(write(MINIMAL.replace("name: trial\n", "")))


def test_contradictions_come_from_the_models(write):
    twice = 'task: {name: t, kind: classification, template: "{x}", labels: {0: " a", 1: " a"}}\n'
    assert "label words must differ; used more than once: [' a']" in error_of(
        write(MINIMAL.replace("task: sst2\n", twice))
    )


def test_unknown_task_names_the_nearest(write):
    assert 'no built-in task "bankin77"; did you mean "banking77"?' in error_of(
        write(MINIMAL.replace("sst2", "bankin77"))
    )


@pytest.mark.parametrize("override", ["distill.gamma", "=3", "distill..gamma=3", ".=1"])
def test_malformed_overrides(write, override):
    assert "expected KEY=VALUE" in error_of(write(MINIMAL), override)


def test_override_below_a_value(write):
    message = error_of(write(MINIMAL), "name.first=x")
    assert message == '--set name.first: name is "trial", which has no keys'


def test_override_errors_name_the_option(write):
    assert error_of(write(MINIMAL), "distill.gama=3").startswith("--set distill.gama: unknown key")


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("distil.gamma=1", '--set distil.gamma: distil: unknown key; did you mean "distill"?'),
        ("seed.x=1", "--set seed.x: seed: got a section, expected a whole number"),
        ("task=nosuch", '--set task: no built-in task "nosuch"'),
        ("task=./absent.yaml", "absent.yaml: no such file; check the path, or name a built-in task"),
        ("model.path=", '--set model.path: got "", expected a text that is not empty'),
        ("export.formats=gguf", '"ollama" each); write [gguf]'),
    ],
)
def test_overrides_are_blamed_for_what_they_do(write, override, expected):
    assert expected in error_of(write(MINIMAL), override)


BOMB = "a: &a [x,x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{b}: &{b} [{','.join([f'*{a}'] * 10)}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True)
)
MERGE_BOMB = "a: &a {k: v}\n" + "".join(
    f"{b}: &{b} {{<<: [{','.join([f'*{a}'] * 10)}]}}\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (MINIMAL + "name: again\n", "recipe.yaml:5: not valid YAML: found duplicate key"),
        (MINIMAL + "sft:\n\tepochs: 3\n", "indent with spaces, not tabs"),
        (MINIMAL + "# \0\n", "not valid YAML"),
        (BOMB, "once aliases are expanded"),
        (MERGE_BOMB, "once aliases are expanded"),
        ("a: &a [*a]\n", "an alias refers to a section that contains it"),
        ("a: " + "[" * 900 + "]" * 900, "nested too deeply"),
        ("[" * 60 + "]" * 60, "nested too deeply"),
        ("- a\n- b\n", "expected `key: value` lines"),
        ("", "expected `key: value` lines, found null"),
        ("a: !!python/object/apply:os.system ['true']\n", "not valid YAML"),
        ("a: {b: [}\n", "not valid YAML"),
        ("a: 1\n---\nb: 2\n", "not valid YAML"),
        ("? [a, b]\n: 1\n", "name: missing; add it"),
        ("x" * (recipes.MAX_BYTES + 1), "larger than"),
    ],
)
def test_hostile_yaml_is_a_typed_error(write, text, expected):
    assert expected in error_of(write(text))


def test_file_problems(tmp_path):
    assert "no such file; `bitdistill init` writes a recipe" in error_of(tmp_path / "absent.yaml")
    assert "cannot be read" in error_of(tmp_path)
    latin = tmp_path / "latin.yaml"
    latin.write_bytes(MINIMAL.encode() + b"# caf\xe9\n")
    assert "is not UTF-8" in error_of(latin)


def test_byte_order_mark_is_fine(tmp_path):
    path = tmp_path / "bom.yaml"
    path.write_bytes(b"\xef\xbb\xbf" + MINIMAL.encode())
    assert load_recipe(path).name == "trial"


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.one_of(st.text(max_size=200), st.text(alphabet="&*[]{}:,-<!|>?#%@`'\"\n\t ab01~", max_size=120)))
def test_any_text_gives_a_mapping_or_a_typed_error(text):
    outcome: object
    try:
        outcome, _ = parse_yaml(text, "fuzz")
    except RecipeError as error:
        outcome = str(error)
    assert isinstance(outcome, dict) or "\n" not in outcome


@settings(max_examples=200, deadline=None)
@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.dictionaries(
                st.sampled_from([*Recipe.model_fields, "optim", "loop", "x"]), inner, max_size=4
            )
        ),
        max_leaves=12,
    )
)
def test_any_tree_gives_a_recipe_or_one_line(tree):
    tree = tree if isinstance(tree, dict) else {"name": tree}
    with pytest.raises(RecipeError) as caught:
        recipes.parse_recipe(tree)  # none of these can be whole: `task` needs more than four keys' luck
    assert "\n" not in str(caught.value)


def test_dump_round_trip(write, tmp_path):
    awkward = "task: {name: t, kind: generation, template: \"a: #{x}\\n'\\t\", target_field: 'no'}\n"
    path = write(
        MINIMAL.replace("task: sst2\n", awkward) + "method: paper\ndistill: {relation: {layer: [1, -2]}}\n"
    )
    first = load_recipe(path)
    copy = tmp_path / "elsewhere" / "copy.yaml"
    copy.parent.mkdir()
    copy.write_text(dump_recipe(first), "utf-8")
    assert load_recipe(copy) == first


def test_hash_follows_content_not_form(write):
    first = load_recipe(write(MINIMAL))
    same = load_recipe(write(MINIMAL + "sft: {epochs: 2}\n", "same.yaml"))
    other = load_recipe(write(MINIMAL + "sft: {epochs: 3}\n", "other.yaml"))
    assert recipe_hash(first) == recipe_hash(same) != recipe_hash(other)
    assert recipe_hash(first.refine, first.pretrain) == recipe_hash(other.refine, other.pretrain)
    assert recipe_hash(first.refine, None) != recipe_hash(first.refine)


def test_run_dir_names_the_seed(write):
    path = write(MINIMAL)
    assert run_dir(load_recipe(path)) == Path("runs/trial")
    assert run_dir(load_recipe(path, ["seed=2", "output_dir=/x"])) == Path("/x/trial-seed2")


def test_builtin_tasks_are_whole():
    tasks = recipes.builtin_tasks()
    assert set(tasks) >= {
        "sst2", "mnli", "qnli", "imdb", "boolq", "banking77", "ag_news",
        "aeslc", "cnn_dailymail", "xsum", "dialogsum", "gsm8k", "instruction", "needle",
    }  # fmt: skip
    for name, task in tasks.items():
        assert task.name == name
        assert not task.template.endswith((" ", "\n"))
        if task.kind == "classification":
            words = list(task.labels.values())
            assert all(word[0] == " " and word[1:].isalpha() and word.islower() for word in words)
    assert len(tasks["banking77"].labels) == 77
    assert tasks["banking77"].labels["lost_or_stolen_card"] == " lost"
    assert tasks["mnli"].labels == {"0": " yes", "1": " maybe", "2": " no"}


def test_no_torch_is_imported():
    modules = "bitdistill.recipe, bitdistill.cli.main, bitdistill.planning.plan, bitdistill.planning.scaffold"
    code = f"import sys, {modules}; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_rows_at_a_time():
    loop = Loop(batch_rows=48, micro_batch_tokens=1000)
    assert [loop.rows_at_a_time(n) for n in (1, 20, 21, 62, 63, 500, 501, 2000)] == [
        48,
        48,
        32,
        16,
        8,
        2,
        1,
        1,
    ]
    assert Loop(batch_rows=48, micro_batch_rows=12, micro_batch_tokens=1000).rows_at_a_time(20) == 12
    assert Loop(batch_rows=8, micro_batch_rows=12).rows_at_a_time(10**6) == 8


def test_sampled_words_hold_all_words_of_a_step(write):
    settings = ["pretrain.loop.batch_rows=4", "pretrain.sequence_length=64"]
    assert (
        load_recipe(write(MINIMAL), [*settings, "pretrain.sampled_words=256"]).pretrain.sampled_words == 256
    )
    with pytest.raises(RecipeError, match=r"sampled_words: 255, but a step has 256 tokens"):
        load_recipe(write(MINIMAL), [*settings, "pretrain.sampled_words=255"])
