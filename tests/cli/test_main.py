"""The command line as a user meets it: help, exit codes, one-line errors, JSON on stdout."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from bitdistill.cli import main as cli
from bitdistill.cli import runs
from bitdistill.cli.options import StageName
from bitdistill.config import Recipe
from bitdistill.errors import (
    ArtifactError,
    BitDistillError,
    DataError,
    DivergenceError,
    Interrupted,
    MissingDependencyError,
    ModelError,
    RecipeError,
    StorageError,
    UsageError,
)
from tests.environment import plain

ROOT = Path(__file__).parents[2]
MAIN = "from bitdistill.cli.main import main; main()"
# What makes a command slow to start (numpy comes with the names of the metrics, 50 ms).
HEAVY = {"torch", "transformers", "tokenizers", "datasets", "scipy", "matplotlib", "triton", "pyarrow"}


def command(
    *arguments: str, cwd: Path | None = None, stdin: str = "", code: str = MAIN, **variables: str
) -> subprocess.CompletedProcess[str]:
    environment = plain(os.environ) | {"PYTHONPATH": str(ROOT / "src"), "COLUMNS": "100"}
    environment |= {"HF_HOME": "/nonexistent", **variables}
    return subprocess.run(
        [sys.executable, "-c", code, *arguments],
        capture_output=True, text=True, cwd=cwd, input=stdin, env=environment, timeout=280,
    )  # fmt: skip


def imported_by(*arguments: str, cwd: Path) -> tuple[set[str], str]:
    """Packages that a command has imported when it ends, and its standard output.

    The cause of a slow start, where seconds would measure the machine.
    """
    listing = cwd / "imported.json"
    code = (
        "import atexit, json, sys\n"
        f"atexit.register(lambda: open({str(listing)!r}, 'w').write(json.dumps(sorted(sys.modules))))\n"
        + MAIN
    )
    done = command(*arguments, cwd=cwd, code=code)
    assert (done.returncode, done.stderr) == (0, "")
    return {name.split(".")[0] for name in json.loads(listing.read_text())}, done.stdout


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A recipe with local rows that plans."""
    rows = [{"sentence": f"film {i} was fine", "label": i % 2} for i in range(40)]
    for name in ("train", "test"):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    (tmp_path / "recipe.yaml").write_text(
        "name: t\nmodel: {path: HuggingFaceTB/SmolLM2-135M-Instruct}\ntask: sst2\n"
        "data: {train: train.jsonl, test: test.jsonl}\npretrain: null\n"
    )
    return tmp_path


def test_help_is_light_and_complete(tmp_path):
    imported, shown = imported_by("--help", cwd=tmp_path)
    assert "typer" in imported
    assert not imported & (HEAVY | {"numpy", "pydantic", "ruamel", "jinja2", "starlette", "uvicorn"})
    for name in ("demo", "init", "plan", "run", "sft", "refine", "pretrain", "distill", "eval", "export"):
        assert f" {name} " in shown
    for name in ("inspect", "report", "results", "tokenize", "predict", "tasks", "version"):
        assert f" {name} " in shown
    assert "Exit codes: 0 success" in shown


def test_every_command_has_help():
    runner = CliRunner()
    for entries in cli.COMMANDS.values():
        for name, _ in entries:
            done = runner.invoke(cli.app, [name, "--help"])
            assert done.exit_code == 0, name
            assert "Usage:" in done.stdout


def test_stages_are_the_pipelines():
    from bitdistill import pipeline
    from bitdistill.planning.plan import ORDER

    assert tuple(stage.value for stage in StageName) == pipeline.STAGES == ORDER


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["pln"], "Did you mean 'plan'"),
        (["run"], "Missing argument"),
        (["run", "x.yaml", "--redo", "stf"], "'stf' is not one of"),
        (["plan", "x.yaml", "--nonsense"], "No such option"),
    ],
)
def test_usage_errors_exit_with_2(arguments, expected):
    done = command(*arguments)
    assert done.returncode == 2
    assert expected in " ".join(done.stderr.replace("│", " ").split())
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    "arguments",
    [
        ["predict", "packed", "hello", "--field", "text=a"],
        ["predict", "packed", "--field", "foo"],
        ["init", "x/y", "train.jsonl", "--label", "x", "--target", "y", "-o", "new.yaml"],
        ["init", "x/y", "train.jsonl"],
        ["plan", "recipe.yaml", "--on", "foo"],
        ["export", "recipe.yaml", "--dry-run"],
        ["export", "recipe.yaml", "--push", "x"],
        ["augment", "recipe.yaml", "--out", "x.txt"],
        ["sweep", "sweep.yaml", "--only", "nothing"],
        ["sweep", "sweep.yaml", "--row", "foo"],
    ],
    ids=" ".join,
)
def test_wrong_options_are_usage_errors_of_one_line(arguments, folder, monkeypatch, capsys):
    (folder / "sweep.yaml").write_text(
        "name: s\ntitle: S\nrecipes: [recipe.yaml]\nseeds: [0]\ncells: [{name: one}]\n"
    )
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "argv", ["bitdistill", *arguments])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    said = capsys.readouterr().err
    assert (caught.value.code, said.count("\n"), said[:7]) == (2, 1, "error: ")


def test_errors_are_one_line_with_their_exit_code(folder):
    done = command("plan", "recipe.yaml", "--set", "distill.gama=3", cwd=folder)
    assert done.returncode == 3
    assert done.stderr == 'error: --set distill.gama: unknown key; did you mean "gamma"?\n'
    assert done.stdout == ""
    (folder / "train.jsonl").unlink()
    for name in ("plan", "run"):
        done = command(name, "recipe.yaml", cwd=folder)
        assert done.returncode == 4
        assert done.stderr.startswith("error: data.train: ")
        assert done.stderr.count("\n") == 1
    assert not (folder / "runs").exists()


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (UsageError("x"), 2),
        (RecipeError("x"), 3),
        (DataError("x"), 4),
        (ModelError("x"), 5),
        (ArtifactError("x"), 6),
        (StorageError("x"), 7),
        (DivergenceError("x"), 8),
        (MissingDependencyError("x"), 9),
        (Interrupted("x", 2), 130),
        (Interrupted("x", 15), 143),
        (KeyboardInterrupt(), 130),
        (OSError(28, "No space left on device", "/full"), 7),
        (PermissionError(13, "Permission denied", "/root"), 7),
        (FileNotFoundError(2, "No such file or directory", "/bug"), 1),
        (ZeroDivisionError("x"), 1),
    ],
    ids=repr,
)
def test_exit_codes(error, code, monkeypatch, capsys, folder):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(runs, "_go", fail)
    monkeypatch.setattr(sys, "argv", ["bitdistill", "run", str(folder / "recipe.yaml")])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    assert caught.value.code == code
    stderr = capsys.readouterr().err
    assert ("this is a bug" in stderr) == ("Traceback" in stderr) == (code == 1)
    if isinstance(error, BitDistillError):
        assert stderr == "error: x\n"


def test_exit_codes_are_documented():
    import re

    import bitdistill.errors as errors

    codes = {
        c.exit_code for c in vars(errors).values() if isinstance(c, type) and issubclass(c, BitDistillError)
    }
    documented = {
        int(n) for n in re.findall(r"^\| (\d+) \|", (ROOT / "docs/cli.md").read_text("utf-8"), re.M)
    }
    assert documented == codes | {0, 2, 130, 143}
    assert all(str(code) in cli.EPILOG for code in documented)


def test_plan_json_is_json_alone(folder):
    imported, shown = imported_by("plan", "recipe.yaml", "--json", "--on", "a100", cwd=folder)
    assert "pydantic" in imported
    assert not imported & HEAVY
    plan = json.loads(shown)
    assert plan["model"]["parameters"] == 134_515_008
    assert plan["surgery"]["subln_before"] == ["o", "down"]
    assert [s["name"] for s in plan["stages"]] == ["sft", "distill", "bitnet_sft", "eval"]
    assert plan["data"][0]["rows"] == 40


def test_plan_for_people(folder):
    done = command("plan", "recipe.yaml", cwd=folder)
    assert done.returncode == 0
    for expected in ("210 linears become ternary", "106,168,320", "Estimates on", "config from"):
        assert expected in done.stdout


def test_run_hands_the_recipe_to_the_pipeline(folder, monkeypatch, capsys):
    from bitdistill import pipeline

    seen = {}

    def fake(recipe: Recipe, **options):
        seen.update(options, recipe=recipe)
        return pipeline.RunResult(Path("runs/t"), packed=Path("runs/t/packed"))

    monkeypatch.setattr(pipeline, "run", fake)
    arguments = [
        "distill",
        str(folder / "recipe.yaml"),
        "--set",
        "seed=3",
        "--redo",
        "sft",
        "--redo",
        "eval",
        "--json",
    ]
    monkeypatch.setattr(sys, "argv", ["bitdistill", *arguments])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    assert caught.value.code == 0
    assert (seen["until"], seen["redo"], seen["recipe"].seed) == ("distill", frozenset({"sft", "eval"}), 3)
    assert seen["command"].startswith("bitdistill distill ")
    printed = json.loads(capsys.readouterr().out)
    assert printed == {
        "run_dir": "runs/t",
        "rows": [],
        "base": None,
        "packed": "runs/t/packed",
        "formats": {},
        "report": None,
    }


@pytest.mark.parametrize("name", ["run", "refine"])
def test_quiet_leaves_stderr_to_errors(name, folder, monkeypatch, capsys):
    from bitdistill import pipeline

    result = pipeline.RunResult(Path("runs/t"), packed=Path("runs/t/packed"))
    monkeypatch.setattr(pipeline, "run", lambda *_, **__: result)
    for options, silent in ((["--quiet"], True), ([], False)):
        monkeypatch.setattr(sys, "argv", ["bitdistill", name, str(folder / "recipe.yaml"), *options])
        with pytest.raises(SystemExit):
            cli.main()
        assert (capsys.readouterr().err == "") == silent


def test_a_quiet_sweep_lists_on_stdout_alone(folder):
    (folder / "sweep.yaml").write_text(
        "name: s\ntitle: S\nrecipes: [recipe.yaml]\nseeds: [0]\ncells: [{name: one}]\n"
    )
    done = command("sweep", "sweep.yaml", "--dry-run", "--quiet", cwd=folder)
    assert (done.returncode, done.stderr) == (0, "")
    assert "one" in done.stdout


def test_results_and_report_of_a_run_that_is_not_there(folder):
    assert command("results", "recipe.yaml", cwd=folder).returncode == 6
    done = command("report", "recipe.yaml", cwd=folder)
    assert done.returncode == 6
    assert "no run there yet" in done.stderr
    assert command("inspect", "nothing", cwd=folder).returncode == 6


@pytest.mark.parametrize(
    ("arguments", "code", "expected"),
    [
        (["results", "gone"], 6, "error: gone: no such folder; give a run's folder or its recipe\n"),
        (["export", "gone"], 6, "error: gone: no such folder; give a packed student's folder or a recipe\n"),
        (["sweep", "gone.yaml"], 3, "error: gone.yaml: no such file; check the path\n"),
        (["inspect", "recipe.yaml"], 2, "'recipe.yaml' is a file"),
        (["predict", "recipe.yaml", "x"], 2, "'recipe.yaml' is a file"),
    ],
)
def test_what_is_not_there_is_named_with_what_is_expected(folder, arguments, code, expected):
    done = command(*arguments, cwd=folder)
    assert (done.returncode, expected in done.stderr) == (code, True), done.stderr


def test_results_of_a_run(folder):
    from bitdistill.eval.results import ResultRow, write_results

    row = ResultRow(
        name="teacher", label="Teacher", task="t", metric="accuracy", value=91.5, n=40, low=80, high=97
    )
    write_results(folder / "runs" / "t" / "results.json", [row])
    for target in ("recipe.yaml", "runs/t"):
        done = command("results", target, "--json", cwd=folder)
        assert json.loads(done.stdout)["rows"][0]["value"] == 91.5
    assert "91.50" in command("results", "runs/t", cwd=folder).stdout


def test_tasks_and_version():
    listed = json.loads(command("tasks", "--json").stdout)
    assert len(listed["banking77"]["labels"]) == 77
    assert "banking77" in command("tasks").stdout
    assert "label_field: 'label'" in command("tasks", "sst2").stdout
    assert command("tasks", "sst").returncode == 3
    assert json.loads(command("version", "--json").stdout)["python"] == ".".join(
        map(str, sys.version_info[:3])
    )
    assert command("--version").returncode == 0


def test_tokenize_checks_before_it_loads(folder):
    done = command("tokenize", "gone.txt", "--tokenizer", "x/y", "--out", "shards", cwd=folder)
    assert (done.returncode, done.stderr.count("\n")) == (4, 1)
    done = command(
        "tokenize", "train.jsonl", "--tokenizer", "x/y", "--out", "o", "--include", "source", cwd=folder
    )
    assert done.returncode == 2
    assert "expected FIELD=VALUE" in done.stderr


def test_tokenize_writes_shards(folder, monkeypatch):
    from bitdistill.data.corpus import TokenShards, load_tokenizer
    from bitdistill.stages.demo import demo_folder

    texts = {"a": "a film", "b": "another", "c": "a third one"}
    rows = [{"text": text, "source": source} for source, text in texts.items()]
    (folder / "corpus.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.chdir(folder)
    base = str(demo_folder() / "base")
    arguments = ["tokenize", "corpus.jsonl", "--tokenizer", base, "--workers", "1"]
    tokenizer = load_tokenizer(base)

    def written(out: str, *flags: str) -> list[int]:
        done = CliRunner().invoke(cli.app, [*arguments, "--out", out, *flags, "--json"])
        assert (done.exit_code, done.stderr) == (0, "")
        shards = TokenShards(folder / out)
        printed = {"folder": out, "tokens": shards.n_tokens, "fingerprint": shards.fingerprint}
        assert json.loads(done.stdout) == printed
        return shards.read(0, shards.n_tokens).tolist()

    ids = {
        source: [*tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
        for source, text in texts.items()
    }
    assert written("all") == ids["a"] + ids["b"] + ids["c"]
    some = ["--include", "source=a", "--include", "source=c", "--exclude", "source=a", "--limit-tokens", "3"]
    assert written("some", *some) == ids["c"][:3]


def test_completion_script():
    done = command(_BITDISTILL_COMPLETE="complete_bash", COMP_WORDS="bitdistill pl", COMP_CWORD="1")
    assert done.stdout.split() == ["plan"]


def test_a_base_is_copied_only_where_it_can_be(folder):
    done = command("pretrain", "recipe.yaml", "--out", "copy", cwd=folder)
    assert done.returncode == 3
    assert "pretrain is null" in done.stderr
    assert not (folder / "runs").exists()
