"""`make_plan` on every shipped recipe and on recipes that do not fit their model or data."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner

import bitdistill
from bitdistill import artifact
from bitdistill.cli.main import app
from bitdistill.errors import ArtifactError, BitDistillError, DataError, ModelError, RecipeError, UsageError
from bitdistill.planning import check
from bitdistill.planning.plan import check_model, make_plan
from bitdistill.recipe import load_recipe
from bitdistill.stages import branch
from bitdistill.sweep.spec import expand, load_sweep

RECIPES = sorted((Path(__file__).parents[2] / "recipes").glob("*.yaml"))
SWEEPS = Path(__file__).parents[2] / "recipes" / "sweeps"
HUB = [path for path in RECIPES if "model:\n  path: ../" not in path.read_text("utf-8")]


# Recipes of ours by the model they end with; the others are the paper's.
OURS = ("smollm2-135m", "gemma3-270m")


@pytest.fixture(autouse=True)
def no_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))


def test_the_papers_grid_is_there():
    models = ("qwen3-0.6b", "qwen3-1.7b", "qwen3-4b", "qwen2.5-0.5b", "gemma3-1b")
    grid = {f"{model}-{task}" for model in models for task in ("mnli", "qnli", "sst2", "cnn_dailymail")}
    assert grid <= {path.stem for path in HUB}


def test_the_parity_grid_is_there():
    grid = {
        f"{task}-{model}" for model in OURS for task in ("sst2", "imdb", "mnli", "qnli", "aeslc", "gsm8k")
    }
    assert grid == {path.stem for path in HUB if path.stem.endswith(OURS)}


def test_tasks_of_a_model_share_its_base():
    """Stage 2 must not differ between the tasks, or each would train a base of its own."""
    for model in OURS:
        found = [load_recipe(path) for path in HUB if path.stem.endswith(model)]
        assert len({(r.model, r.refine, r.pretrain).__repr__() for r in found}) == 1


@pytest.mark.parametrize("path", HUB, ids=lambda p: p.stem)
def test_every_recipe_plans(path):
    recipe = load_recipe(path)
    plan = make_plan(recipe, "h100")
    assert recipe.name == path.stem
    writing = [] if recipe.augment is None else ["augment"]
    names = ["sft", "pretrain", *writing, "distill", "bitnet_sft", "eval"]
    assert [s.name for s in plan.stages] == names
    # 63 % of Gemma 3 270M is its embedding.
    share = 0.37 if "gemma3-270m" in path.stem else 0.5
    assert plan.layout.ternary_parameters > share * plan.layout.parameters
    # The paper's 4B stage 2 does not fit 80 GB with float32 latents, nor by a hair do chunks of 8,192 tokens
    # times Gemma's 262,144 words beside 16 rows; the others do.
    limit = 140e9 if "4b" in path.stem or "gemma3-270m" in path.stem else 80e9
    assert all(stage.peak_bytes < limit for stage in plan.stages)
    json.dumps(plan.as_json(), allow_nan=False)


@pytest.mark.parametrize(
    ("pretrain", "line", "named"),
    [
        ("null", "Stage 2   none: the student goes from surgery to the task", None),
        ("{base: BASE}", "Stage 2   the ternary base BASE", {"base": "BASE"}),
        (
            "{corpus: CORPUS, budget_tokens: 2000000}",
            "Stage 2   KL over 2.0M tokens of CORPUS",
            {"objective": "kl", "budget_tokens": 2_000_000, "corpus": "CORPUS", "start": None},
        ),
        (
            "{corpus: CORPUS, objective: lm, budget_tokens: 500, start: BASE}",
            "Stage 2   LM over 500 tokens of CORPUS, from the ternary base BASE",
            {"objective": "lm", "budget_tokens": 500, "corpus": "CORPUS", "start": "BASE"},
        ),
    ],
)
def test_the_plan_says_where_the_ternary_base_comes_from(pretrain, line, named, tmp_path):
    assets = Path(bitdistill.__file__).parent / "assets" / "demo"
    (tmp_path / "corpus.txt").write_text("Some text.", "utf-8")

    def placed(text):
        return text.replace("BASE", str(assets / "base")).replace("CORPUS", str(tmp_path / "corpus.txt"))

    command = ["plan", str(assets / "recipe.yaml"), "--set", f"pretrain={placed(pretrain)}"]
    assert placed(line) in CliRunner().invoke(app, command).output.splitlines()
    found = json.loads(CliRunner().invoke(app, [*command, "--json"]).output)
    assert found["pretrain"] == json.loads(placed(json.dumps(named)))


@pytest.mark.parametrize("path", [p for p in HUB if not p.stem.endswith(OURS)], ids=lambda p: p.stem)
def test_paper_recipes_are_literal(path):
    recipe = load_recipe(path)
    weights = (1.0, 1e3) if recipe.task.kind == "generation" else (10.0, 1e5)
    assert recipe.method == "paper"
    assert (recipe.distill.lambda_, recipe.distill.gamma) == weights
    assert (recipe.pretrain.budget_tokens, recipe.pretrain.objective) == (10**10, "lm")
    assert recipe.pretrain.corpus == "hub:tiiuae/falcon-refinedweb"
    assert (recipe.refine.subln, recipe.refine.gains, recipe.distill.temperature) == ("paper", "ones", 5.0)


@pytest.mark.parametrize("path", sorted(SWEEPS.glob("*.yaml")), ids=lambda p: p.stem)
def test_every_sweep_plans(path):
    sweep = load_sweep(path)
    assert sweep.name == path.stem
    # Files that a script makes stand for rows of the hub.
    made = {"train": "train", "held-out": "validation"}
    local = {
        str(SWEEPS.parents[1] / f"sst2-sentences/{name}.jsonl"): f"hub:stanfordnlp/sst2:{part}"
        for name, part in made.items()
    }
    units = expand(sweep, path.parent, local=local)
    assert len({unit.id for unit in units}) == len({unit.recipe.name for unit in units}) == len(units)
    for unit in {unit.digest: unit for unit in units if unit.seed == units[0].seed}.values():
        make_plan(unit.recipe, "h200", until="eval")
        if unit.recipe.pretrain is not None:
            config = unit.recipe.pretrain
            steps = round(config.budget_tokens / (config.loop.batch_rows * config.sequence_length))
            branch.check(config, steps)


def test_token_budgets_branch_from_one_run():
    """Each shorter budget must find the stable-phase checkpoint that the longest run of its objective keeps."""
    sweep = load_sweep(SWEEPS / "tokens.yaml")
    units = expand(sweep, SWEEPS)
    for line in ("KL", "LM loss"):
        longest, *others = [unit.recipe.pretrain for unit in units if unit.line == line]
        assert len(others) >= 3
        found = []
        for config in (longest, *others):
            steps = round(config.budget_tokens / (config.loop.batch_rows * config.sequence_length))
            inputs = {"pretrain": config.model_dump(mode="json", exclude={"branch_steps"})}
            found.append((branch.trunk(inputs, config, steps), branch.stable_end(config, steps)))
        assert len({folder for folder, _ in found}) == 1
        assert sorted(end for _, end in found[1:]) == list(longest.branch_steps)


@pytest.fixture
def write(tmp_path):
    rows = [{"sentence": f"film {i} was fine, said one", "label": i % 2} for i in range(150)]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))

    def _write(extra: str = "", **replaced: str) -> Path:
        keys = {
            "name": "t",
            "model": "{path: HuggingFaceTB/SmolLM2-135M-Instruct}",
            "task": "sst2",
            "data": "{train: train.jsonl, validation_fraction: 0.2}",
            "pretrain": "null",
            **replaced,
        }
        path = tmp_path / "recipe.yaml"
        path.write_text("".join(f"{k}: {v}\n" for k, v in keys.items()) + extra)
        return path

    return _write


def test_a_local_plan_is_quick_and_counts_rows(write):
    started = time.process_time()  # neighbours do not count
    plan = make_plan(load_recipe(write()), "cpu")
    assert time.process_time() - started < 1.0
    assert [(s.key, s.checked, s.rows) for s in plan.data] == [("data.train", 100, 150)]
    by_name = {s.name: s for s in plan.stages}
    assert list(by_name) == ["sft", "distill", "bitnet_sft", "eval"]
    tokens = sum(len("{sentence}\nSentiment:" + f"film {i} was fine, said one0") for i in range(100)) / 400
    assert by_name["sft"].tokens == pytest.approx(150 * tokens * 2, rel=0.01)


def test_until_leaves_later_stages_and_their_needs_out(write):
    path = write(data="{train: train.jsonl}")
    with pytest.raises(DataError, match="nothing could be scored"):
        make_plan(load_recipe(path))
    assert [s.name for s in make_plan(load_recipe(path), until="distill").stages] == ["sft", "distill"]


def test_rows_of_the_split_that_is_scored_must_be_there(write):
    """What would otherwise be found after all training."""
    (Path(write()).parent / "test.jsonl").write_text('{"sentence": "fine", "label": 1}\n')
    path = write("eval: {split: validation}\n", data="{train: train.jsonl, test: test.jsonl}")
    with pytest.raises(DataError, match=r"eval\.split is validation and neither validation nor") as caught:
        make_plan(load_recipe(path))
    assert "test" not in str(caught.value)  # no remedy for it
    make_plan(load_recipe(path), until="distill")
    make_plan(load_recipe(path, ["eval.split=test"]))
    make_plan(load_recipe(path, ["data.validation_fraction=0.1"]))
    make_plan(load_recipe(path, [f"data.validation={path.parent}/test.jsonl"]))


def test_a_held_out_share_must_be_a_row(write):
    lines = [{"sentence": f"film {i}", "label": i % 2} for i in range(30)]
    path = write(data="{train: few.jsonl, validation_fraction: 0.03}")
    (path.parent / "few.jsonl").write_text("".join(json.dumps(r) + "\n" for r in lines))
    with pytest.raises(
        DataError, match=r"data\.validation_fraction: 0\.03 of 30 training rows is less than one"
    ):
        make_plan(load_recipe(path))
    make_plan(load_recipe(path, ["data.validation_fraction=0.04"]))
    make_plan(load_recipe(path), until="distill")


@pytest.mark.parametrize(
    ("replaced", "kind", "expected"),
    [
        ({"model": "{path: none/such}"}, ModelError, "not in the local Hugging Face cache"),
        ({"data": "{train: gone.jsonl, validation_fraction: 0.1}"}, DataError, "data.train: .*no such file"),
        ({"data": "{train: train.jsonl, test: gone.jsonl}"}, DataError, "data.test: .*no such file"),
        ({"task": "imdb"}, DataError, r"train.jsonl:1: no field `text`"),
        ({"pretrain": "{}"}, DataError, "neither corpus nor base"),
        ({"pretrain": "{corpus: gone}"}, DataError, "pretrain.corpus: .*no such file or folder"),
        ({"pretrain": "{base: gone}"}, DataError, "pretrain.base: .*no such folder"),
        ({"pretrain": "{corpus: ., start: gone}"}, DataError, "pretrain.start: .*no such folder"),
        ({"pretrain": "{corpus: ., sequence_length: 9000}"}, RecipeError, "the model has 8192 positions"),
        ({"distill": "{relation: {layer: 30}}"}, RecipeError, "the model has 30 layers"),
        ({"distill": "{relation: {layer: [0, -31]}}"}, RecipeError, "the model has 30 layers"),
        ({"distill": "{relation: {heads: 5}}"}, RecipeError, "heads: 5 does not divide Q's 576 features"),
        (
            {"distill": "{relation: {heads: 9}}"},
            RecipeError,
            "heads: 9 does not divide K and V's 192 features",
        ),
    ],
)
def test_what_does_not_fit_is_said(write, replaced, kind, expected):
    with pytest.raises(kind, match=expected):
        make_plan(load_recipe(write(**replaced)))


def test_a_student_is_no_model_to_distil(write):
    student = Path(bitdistill.__file__).parent / "assets/demo/base"
    for refuse in (make_plan, check_model):
        with pytest.raises(ModelError, match="this model is a student; give the full-precision model"):
            refuse(load_recipe(write(), [f"model.path={student}"]))


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("empty.jsonl", "", "no text"),
        ("blank.txt", "\n \n", "no text"),
        ("fields.jsonl", '{"body": "x"}\n', "fields.jsonl:1: no field `text` or `content`"),
        ("junk.parquet", "junk", "unreadable parquet"),
        ("folder/notes.md", "x", "no documents here"),
    ],
)
def test_the_corpus_is_looked_into(write, tmp_path, name, content, expected):
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(content)
    corpus = path if path.parent == tmp_path else path.parent
    with pytest.raises(DataError, match=f"pretrain.corpus: .*{expected}"):
        make_plan(load_recipe(write(pretrain=f"{{corpus: {corpus.name}}}")))
    path.rename(tmp_path / "gone")
    path.with_suffix(".txt").write_text("\nwords\n")
    make_plan(load_recipe(write(pretrain=f"{{corpus: {path.with_suffix('.txt')}}}")))


def test_a_base_must_be_one(write, tmp_path):
    with artifact.writing(tmp_path / "other", {"kind": "packed"}) as folder:
        (folder / "x").write_text("x")
    for key, expected in (("base", "kind 'packed', a ternary base"), ("corpus", "not token shards")):
        with pytest.raises(ArtifactError, match=expected):
            make_plan(load_recipe(write(pretrain=f"{{{key}: other}}")))


@pytest.mark.parametrize("metric", ["acuracy", "bleu"])
def test_metrics_are_checked(write, metric):
    with pytest.raises(RecipeError, match=f"metric '{metric}' does not score classification"):
        make_plan(load_recipe(write(), [f"task.metrics=[{metric}]"]))


def test_a_bad_label_names_file_and_line(write, tmp_path):
    with (tmp_path / "train.jsonl").open("r+") as handle:
        lines = handle.readlines()
        lines[16] = '{"sentence": "x", "label": 2}\n'
        handle.seek(0)
        handle.writelines(lines)
    with pytest.raises(DataError, match=r"train\.jsonl:17: label 2"):
        make_plan(load_recipe(write()))


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        ("validation_fraction: 0.001", "0.001 of 150 training rows is less than one"),
        ("validation_fraction: 0.1, limit_train: 6", "0.1 of 6 training rows is less than one"),
        ("validation_fraction: 1, test: train.jsonl", "1.0 of 150 training rows leaves none to train on"),
    ],
)
def test_splits_without_rows_are_refused(write, data, expected):
    recipe = load_recipe(write(data=f"{{train: train.jsonl, {data}}}"))
    with pytest.raises(DataError, match=expected):
        make_plan(recipe)


def test_unknown_device(write):
    with pytest.raises(UsageError, match="--on tpu: unknown; choose from cpu"):
        make_plan(load_recipe(write()), "tpu")


def test_large_files_are_extrapolated(tmp_path, monkeypatch):
    path = tmp_path / "rows.csv"
    path.write_text("text,label\n" + "".join(f"row {i:06},1\n" for i in range(200_000)))
    sample = check.readers.read_rows(str(path), limit=check.CHECKED_ROWS)
    assert check.count_rows(path, sample) == (200_000, True)
    monkeypatch.setattr(check, "COUNTED_BYTES", 1 << 20)
    rows, exact = check.count_rows(path, sample)
    assert not exact
    assert rows == pytest.approx(200_000, rel=0.02)


@pytest.mark.parametrize("suffix", ["jsonl.zst", "jsonl.gz", "parquet"])
def test_compressed_rows_are_counted(tmp_path, suffix):
    rows = [{"text": f"row {i}", "label": 1} for i in range(1234)]
    path = tmp_path / f"rows.{suffix}"
    raw = "".join(json.dumps(r) + "\n" for r in rows).encode()
    if suffix == "parquet":
        import pyarrow as pa
        import pyarrow.parquet as pq

        pq.write_table(pa.Table.from_pylist(rows), path)
    elif suffix.endswith("zst"):
        import zstandard

        path.write_bytes(zstandard.ZstdCompressor().compress(raw))
    else:
        import gzip

        path.write_bytes(gzip.compress(raw))
    sample = check.readers.read_rows(str(path), limit=check.CHECKED_ROWS)
    assert check.count_rows(path, sample) == (1234, True)


def test_errors_are_one_line(write):
    for replaced in ({"data": "{train: gone.jsonl}"}, {"model": "{path: x/y}"}):
        with pytest.raises(BitDistillError) as caught:
            make_plan(load_recipe(write(**replaced)))
        assert "\n" not in str(caught.value)
