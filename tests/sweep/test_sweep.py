"""Sweeps on a tiny model: what is shared, resumed, recorded; and the file format's refusals."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from bitdistill import artifact, pipeline
from bitdistill.cli.main import app
from bitdistill.errors import ArtifactError, Interrupted, RecipeError, StorageError, UsageError
from bitdistill.report import paired, sweep_results, sweep_tables
from bitdistill.report.inspect import read_stats
from bitdistill.sweep.run import failed_result, run_sweep, warn_of_others
from bitdistill.sweep.spec import expand, load_sweep, only_rows
from tests.stages.conftest import _one_thread, work  # noqa: F401

SWEEP = """
name: losses
title: Loss ablation
recipes: [recipe.yaml]
seeds: [0, 1]
set: {bitnet_sft: null}
reference: both
curves: [distill, pretrain]
cells:
  - {name: both}
  - {name: ce, label: "CE only", set: {distill.lambda: 0, distill.gamma: 0}, seeds: [0]}
"""


def spec(folder: Path, text: str = SWEEP) -> Path:
    path = folder / "sweep.yaml"
    path.write_text(text, "utf-8")
    return path


def go(path: Path, out: Path, **options: Any) -> sweep_results.SweepResults:
    sweep = load_sweep(path)
    units = expand(sweep, path.parent)
    return run_sweep(sweep, units, out, order=[u.id for u in units], quiet=True, **options)


def test_a_sweep_shares_teachers_bases_and_scores(work: Path) -> None:  # noqa: F811
    out = work / "out.json"
    found = go(spec(work), out)
    assert [(r.cell, r.seed, r.status) for r in found.runs] == [
        ("both", 0, "done"), ("both", 1, "done"), ("ce", 0, "done"),
    ]  # fmt: skip
    runs = sorted((work / "runs").iterdir())
    assert len(runs) == 3
    teachers = [run / "teacher" for run in runs]
    assert sum(folder.is_symlink() for folder in teachers) == 1  # seed 0's is trained once, seed 1's once
    assert all(artifact.verify(folder) for folder in teachers)
    assert len(list((work / "cache/bases").iterdir())) == 2  # by seed, for the base has its seed too
    keys = {cost.key for run in found.runs for cost in run.costs.values()}
    paid = sum({c.key: c.elapsed_s for r in found.runs for c in r.costs.values()}.values())
    assert len(keys) == 2 + 2 + 3  # teachers, bases, students
    assert found.train_s == pytest.approx(paid)
    both, ce = found.find("tiny", "both", 0), found.find("tiny", "ce", 0)
    assert both is not None
    assert ce is not None
    # The teacher was scored once: the same predictions, and a rate only where it was measured.
    assert both.rows[0].predictions_sha256 == ce.rows[0].predictions_sha256
    assert both.rows[0].tokens_per_s is not None
    assert ce.rows[0].tokens_per_s is None
    assert "agreement_with_teacher" in ce.rows[1].metrics
    for run in (both, ce):  # CE's teacher was read from the other run's predictions
        assert run.rows[1].metrics["kl_to_teacher"] > 0
        assert "kl_to_teacher" not in run.rows[0].metrics
    table = "\n".join(sweep_tables.markdown(found))
    assert " KL to its teacher |" in table
    assert f" {ce.rows[1].metrics['kl_to_teacher']:.3f} |" in table
    assert {"tokens", "loss", "ce"} <= both.curves["distill"].keys()
    assert ce.curves["pretrain"] == both.curves["pretrain"]  # the base's log lies in the other run
    assert sweep_results.read(out) == found

    made = sweep_tables.lines(found)
    assert [(x.label, len(x.values), x.against) for x in made] == [
        ("FP-SFT (teacher)", 2, ""), ("both", 2, "teacher"), ("CE only", 1, "both"),
    ]  # fmt: skip
    gap = made[1].gap
    assert gap is not None
    assert gap.points == pytest.approx(made[1].mean - made[0].mean)
    assert gap.seeds == (0, 1)
    assert any("CE only" in text for text in sweep_tables.markdown(found))

    models = paired.read_models(out)
    assert set(models) == {"both", "both/teacher", "ce", "ce/teacher"}
    for student in ("both", "both/bitdistill"):
        done = CliRunner().invoke(app, ["compare", f"{out}:{student}", f"{out}:both/teacher", "--json"])
        assert json.loads(done.output)["comparisons"][0]["seeds"] == [0, 1]
    for command in ("results", "report"):
        done = CliRunner().invoke(app, [command, str(out)])
        assert isinstance(done.exception, ArtifactError)
        assert "a file of results; give the run's folder" in str(done.exception)


def test_a_sweep_can_measure_the_weights(work: Path) -> None:  # noqa: F811
    text = "stats: true\n" + SWEEP.replace("[0, 1]", "[0]").partition("  - {name: ce")[0]
    out = work / "out.json"
    (run,) = go(spec(work, text), out).runs
    assert list(run.densities) == list(run.near) == ["refined", "base", "student"]
    for name, shares in run.densities.items():
        assert 0.9 < sum(shares) <= 1.0 + 1e-3  # a bin outside the limits is not drawn
        layers = read_stats(next((work / "runs").iterdir()), name)
        assert layers is not None
        near = sum(layer.latent.near_share * layer.weights for layer in layers if layer.latent)
        assert run.near[name] == pytest.approx(near / sum(layer.weights for layer in layers), rel=1e-3)
    assert run.near["base"] != run.near["refined"]
    assert sweep_results.read(out).runs == [run]


def test_a_sweep_goes_on_where_it_stopped(work: Path) -> None:  # noqa: F811
    out, calls = work / "out.json", []

    def stopping(recipe: Any, **options: Any) -> pipeline.RunResult:
        calls.append(recipe.name)
        if len(calls) == 2:
            raise Interrupted("stopped", 15)
        return pipeline.run(recipe, **options)

    path = spec(work)
    with pytest.raises(Interrupted):
        go(path, out, run=stopping)
    assert len(sweep_results.read(out).runs) == 1
    found = go(path, out, run=stopping)
    assert len(calls) == 4  # the first run was not started again
    assert [r.status for r in found.runs] == ["done"] * 3
    go(path, out, run=stopping)
    assert len(calls) == 4
    go(path, out, run=stopping, again=True)
    assert len(calls) == 7
    # Another setting is another run, beside the old one; the others stay.
    go(spec(work, SWEEP.replace("distill.gamma: 0", "distill.gamma: 2")), out, run=stopping)
    assert len(calls) == 8


def test_a_run_that_fails_does_not_stop_the_others(work: Path) -> None:  # noqa: F811
    text = SWEEP.replace("seeds: [0, 1]", "seeds: [0]").replace(
        "  - {name: both}", "  - {name: far, set: {distill.relation.layer: 9}}\n  - {name: both}"
    )
    out = work / "out.json"
    done = CliRunner().invoke(app, ["sweep", str(spec(work, text)), "--out", str(out), "-q"])
    assert isinstance(done.exception, ArtifactError)
    assert "1 of 3 runs failed, first tiny/far/0: " in str(done.exception)
    assert [r.status for r in sweep_results.read(out).runs] == ["failed", "done", "done"]
    assert "the model has 3 layers" in done.output


def test_rows_that_are_read_last_are_checked_before_the_first_run(work: Path) -> None:  # noqa: F811
    rows = (work / "test.jsonl").read_text("utf-8").splitlines()
    late = [*rows * 10, '{"text": "w40", "label": "c"}']  # behind what a plan looks at
    (work / "late.jsonl").write_text("\n".join(late) + "\n", "utf-8")
    text = SWEEP.replace("cells:", "cells:\n  - {name: late, set: {data.test: late.jsonl}}")
    trained, out = [], work / "out.json"

    def noted(made: Any, **options: Any) -> pipeline.RunResult:
        status = [r.status for r in sweep_results.read(out).runs]
        assert status == ["failed", "failed"] + ["done"] * len(trained)
        trained.append(Path(made.data.test).name)
        return pipeline.run(made, **options)

    found = go(spec(work, text), out, run=noted)
    assert trained == ["test.jsonl"] * 3
    assert [(r.cell, r.status) for r in found.runs] == [
        ("late", "failed"), ("late", "failed"), ("both", "done"), ("both", "done"), ("ce", "done"),
    ]  # fmt: skip
    assert "late.jsonl:121: " in found.runs[0].error
    # Mended, the same command makes what is left
    (work / "late.jsonl").write_text("\n".join(rows * 10) + "\n", "utf-8")
    again = go(spec(work, text), out)
    assert [r.status for r in again.runs] == ["done"] * 5


def test_rows_decide_the_stages(work: Path) -> None:  # noqa: F811
    text = SWEEP.replace("curves:", "rows: [teacher]\ncurves:").replace("reference: both\n", "")
    found = go(spec(work, text.replace("seeds: [0, 1]", "seeds: [0]")), work / "out.json")
    assert [[row.name for row in run.rows] for run in found.runs] == [["teacher"], ["teacher"]]
    assert all(set(run.costs) == {"sft"} for run in found.runs)
    assert pipeline.wanted_stages("eval", ["bitnet_sft"]) == {"bitnet_sft", "export", "eval"}
    assert pipeline.wanted_stages(None, pipeline.ROWS) == set(pipeline.STAGES)
    with pytest.raises(RecipeError, match="row 'stud': expected some of"):
        pipeline.wanted_stages(None, ["stud"])


def test_rows_can_be_made_one_after_the_other(work: Path) -> None:  # noqa: F811
    path = spec(work, SWEEP.replace("set: {bitnet_sft: null}", "rows: [teacher, bitnet_sft, bitdistill]"))
    sweep, units, out = load_sweep(path), expand(load_sweep(path), path.parent)[:1], work / "out.json"

    def rows_after(*names: str) -> list[str]:
        chosen = only_rows(units, names)
        found = run_sweep(sweep, chosen, out, order=[u.id for u in units], quiet=True)
        return [row.name for row in found.runs[0].rows]

    assert rows_after("bitdistill") == ["bitdistill"]
    assert rows_after("teacher") == ["teacher", "bitdistill"]
    assert set(sweep_results.read(out).runs[0].costs) == {"sft", "pretrain", "distill"}
    assert rows_after("teacher", "bitnet_sft", "bitdistill") == ["teacher", "bitnet_sft", "bitdistill"]
    # Rows of another recipe do not stay beside new ones
    others = expand(sweep, path.parent, overrides=["sft.epochs=2"])[:1]
    found = run_sweep(sweep, only_rows(others, ["teacher"]), out, order=[u.id for u in units], quiet=True)
    assert [row.name for row in found.runs[0].rows] == ["teacher"]
    with pytest.raises(UsageError, match="--row students: expected some of teacher"):
        only_rows(units, ["students"])
    teachers = expand(sweep.model_copy(update={"rows": ("teacher",)}), path.parent)
    with pytest.raises(UsageError, match="no run of this sweep has it"):
        only_rows(teachers, ["bitnet_sft"])


def test_a_link_to_a_run_that_is_gone_is_made_anew(work: Path) -> None:  # noqa: F811
    import shutil

    out = work / "out.json"
    found = go(spec(work), out)
    runs = {run.name: run for run in (work / "runs").iterdir()}
    linked = next(run for run in runs.values() if (run / "teacher").is_symlink())
    owner = (linked / "teacher").resolve().parent
    shutil.rmtree(owner)
    again = go(spec(work), out, again=True)
    assert [r.rows[0].predictions_sha256 for r in again.runs] == [
        r.rows[0].predictions_sha256 for r in found.runs
    ]
    redone = pipeline.run(
        expand(load_sweep(spec(work)), work)[2].recipe,
        until="sft",
        redo=frozenset({"sft"}),
        quiet=True,
    )
    assert not (redone.run_dir / "teacher").is_symlink()
    assert not list(redone.run_dir.glob("teacher.partial*"))


def test_grids_patterns_and_local_places(work: Path) -> None:  # noqa: F811
    text = """
name: layers
figure: layers
recipes: [recipe.yaml]
grid:
  - {key: distill.relation.layer, values: [0, 1, -1]}
  - {key: distill.gamma, values: [1.0, auto]}
"""
    path = spec(work, text)
    sweep = load_sweep(path)
    units = expand(sweep, work)
    assert [u.cell for u in units[:2]] == ["run-layer0-gamma1.0", "run-layer0-gammaauto"]
    assert [u.x for u in units] == [0, 0, 1, 1, -1, -1]
    assert units[3].recipe.distill.relation.layer == 1
    assert len({u.recipe.name for u in units}) == 6
    assert len(expand(sweep, work, only=["*layer1*"])) == 2
    assert len(expand(sweep, work, only=["tiny/run-layer0-gamma1.0/0"])) == 1
    with pytest.raises(UsageError, match="--only nothing: no run matches; runs: tiny/run-layer0"):
        expand(sweep, work, only=["nothing"])
    moved = expand(sweep, work, local={str(work / "train.jsonl"): "/data/other.jsonl"})
    assert moved[0].recipe.data.train == "/data/other.jsonl"
    assert moved[0].digest != units[0].digest
    listed = CliRunner().invoke(app, ["sweep", str(path), "--dry-run", "--json"])
    assert len(json.loads(listed.output)["runs"]) == 6


def test_a_cell_can_be_for_some_of_the_recipes(work: Path) -> None:  # noqa: F811
    other = (work / "recipe.yaml").read_text("utf-8").replace("name: tiny", "name: small", 1)
    (work / "other.yaml").write_text(other, "utf-8")
    cells = "cells: [{name: all}, {name: few, recipes: [sma*], set: {distill.lambda: 2.0}}]"
    units = expand(load_sweep(spec(work, f"name: a\nrecipes: [recipe.yaml, other.yaml]\n{cells}\n")), work)
    assert [u.id for u in units] == ["tiny/all/0", "small/all/0", "small/few/0"]


def test_the_papers_recipe_has_one_teacher(work: Path) -> None:  # noqa: F811
    cells = "cells: [{name: ours}, {name: paper, set: {method: paper}}]"
    text = (work / "recipe.yaml").read_text("utf-8")
    (work / "recipe.yaml").write_text(text.replace("distill: {", "distill: {teachers: 3, "), "utf-8")
    units = expand(load_sweep(spec(work, f"name: a\nrecipes: [recipe.yaml]\n{cells}\n")), work)
    assert [u.recipe.distill.teachers for u in units] == [3, 1]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name: a\nrecipes: []\n", "recipes"),
        ("name: a\nrecipes: [recipe.yaml]\ncels: []\n", "cells"),
        ("name: a\nrecipes: [recipe.yaml]\ncells: [{name: x}, {name: x}]\n", "the name 'x' is used twice"),
        ("name: a\nrecipes: [recipe.yaml]\nreference: z\n", "no cell 'z'"),
        ("name: a\nrecipes: [recipe.yaml]\ncells: [{name: x, set: {distill.gama: 1}}]\n", "gamma"),
        (
            "name: a\nrecipes: [recipe.yaml]\ncells: [{name: x, recipes: [z]}]\n",
            "cell x: recipes: z: .* has tiny",
        ),
        ("name: a\nrecipes: [gone.yaml]\n", "gone.yaml: no such file"),
        ("name: a\nrecipes: [recipe.yaml]\nseeds: []\n", "seeds"),
        ("name: a\nrecipes: [recipe.yaml]\nseeds: [1, 1]\n", "seeds: 1, 1: one is there twice"),
        (
            "name: a\nrecipes: [recipe.yaml]\ncells: []\n",
            r"cells: got \[\], expected a list of one entry at least",
        ),
        ("name: a\nrecipes: [recipe.yaml]\nset: {seed: 3}\n", "set: seed: not here; use seeds"),
        (
            "name: a\nrecipes: [recipe.yaml]\ncells: [{name: x, set: {seed: 3}}]\n",
            "cell x: set: seed: not here",
        ),
        ("name: a\nrecipes: [recipe.yaml]\ngrid: [{key: seed, values: [1]}]\n", "grid: seed: not here"),
        ("name: a\nrecipes: [recipe.yaml, ./recipe.yaml]\n", "two have the name tiny"),
        (
            "name: a\nrecipes: [recipe.yaml]\nset: {bitnet_sft: null}\nrows: [bitnet_sft]\n",
            "only bitnet_sft, but tiny has bitnet_sft: null",
        ),
        (
            "name: a\nrecipes: [recipe.yaml]\ncells: [{name: x, rows: [student]}]\n",
            'cells.0.rows.0: got "student", expected "teacher" or "bitnet_sft" or "bitdistill"$',
        ),
        ("name: a\nrecipes: [recipe.yaml]\ncells: [{name: x, rows: []}]\n", "cells.0.rows"),
    ],
)
def test_bad_sweeps_are_named(work: Path, text: str, message: str) -> None:  # noqa: F811
    with pytest.raises(RecipeError, match=message) as caught:
        expand(load_sweep(spec(work, text)), work)
    assert "\n" not in str(caught.value)


def test_paths_of_whole_sections_are_the_sweeps(
    work: Path,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    elsewhere = work / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "train.jsonl").write_text("", "utf-8")
    (work / "task.yaml").write_text(
        'name: other\nkind: classification\ntemplate: "{text} w8"\nlabels: {a: " w90", b: " w91"}\n', "utf-8"
    )
    text = "name: a\nrecipes: [recipe.yaml]\nset: {task: task.yaml, data: {train: train.jsonl, test: test.jsonl}}\n"
    monkeypatch.chdir(elsewhere)
    (unit,) = expand(load_sweep(spec(work, text)), work)
    assert unit.recipe.data.train == str(work / "train.jsonl")
    assert unit.recipe.task.template == "{text} w8"
    with pytest.raises(UsageError, match="--set seed=3: a sweep's runs have the seeds"):
        expand(load_sweep(spec(work, text)), work, overrides=["seed=3"])


def test_results_that_do_not_belong_together_are_named(
    work: Path,  # noqa: F811
    caplog: pytest.LogCaptureFixture,
) -> None:
    path, out = spec(work), work / "out.json"
    every = expand(load_sweep(path), work)
    found = sweep_results.SweepResults(name="losses")
    for unit in every:
        found = sweep_results.with_run(found, failed_result(unit, "x"), [])
    with caplog.at_level("WARNING", logger="bitdistill"):
        warn_of_others(found, every, every[:1], out)
        assert not caplog.messages
        other = expand(load_sweep(path), work, overrides=["sft.epochs=3"])
        warn_of_others(found, other, other[2:], out)
        renamed = expand(load_sweep(spec(work, SWEEP.replace("name: ce", "name: labels"))), work)
        warn_of_others(found, renamed, renamed, out)
    assert "tiny/both/0, tiny/both/1 were made with other settings" in caplog.messages[0]
    assert "tiny/ce/0 are no runs of this sweep any more" in caplog.messages[1]
    assert len(caplog.messages) == 2


def test_places_of_results_are_tried_before_the_first_run(work: Path) -> None:  # noqa: F811
    def never(*_: Any, **__: Any) -> pipeline.RunResult:
        raise AssertionError

    with pytest.raises(
        ArtifactError, match=r"a folder; --out takes the results file, for example .*losses.json"
    ):
        go(spec(work), work, run=never)
    with pytest.raises(StorageError, match=r"train\.jsonl"):
        go(spec(work), work / "train.jsonl" / "out.json", run=never)


def test_a_dry_run_refuses_what_the_model_cannot_have(work: Path) -> None:  # noqa: F811
    text = SWEEP.replace("distill.gamma: 0}", "distill.relation.layer: 9}")
    done = CliRunner().invoke(app, ["sweep", str(spec(work, text)), "--dry-run"])
    assert isinstance(done.exception, RecipeError)
    assert str(done.exception).startswith("tiny/ce/0: distill.relation.layer: 9, the model has 3 layers")


def test_results_of_another_sweep_are_kept(work: Path) -> None:  # noqa: F811
    out = work / "out.json"
    sweep_results.write(out, sweep_results.SweepResults(name="other"))
    with pytest.raises(ArtifactError, match="results of sweep other, not losses"):
        go(spec(work), out)
    out.write_text('{"rows": []}')
    with pytest.raises(ArtifactError, match="not a sweep's results"):
        go(spec(work), out)
