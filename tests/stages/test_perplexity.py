"""`bitdistill perplexity` on a tiny base, its full-precision model, text and shards; and what it refuses."""

from __future__ import annotations

import json
import math
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from bitdistill import artifact, pipeline
from bitdistill.cli.main import app
from bitdistill.data.corpus import tokenize_corpus
from bitdistill.errors import ArtifactError, BitDistillError, DataError, ModelError, UsageError
from bitdistill.eval.text_results import Trained, read_text_result
from bitdistill.report.inspect import by_kind, read_stats
from tests.models.conftest import make_tokenizer
from tests.stages.conftest import recipe


@pytest.fixture
def base(work: Path) -> Path:
    """A ternary base of the tiny model."""
    pipeline.run(recipe(work), until="pretrain", quiet=True)
    return Path(json.loads((work / "runs/tiny/base.json").read_text("utf-8"))["path"])


def scores(*arguments: Any) -> dict[str, Any]:
    result = CliRunner().invoke(
        app, ["perplexity", *map(str, arguments), "--sequence-length", "16", "--json"], catch_exceptions=False
    )
    found: dict[str, Any] = json.loads(result.stdout)
    return found


def refused(*arguments: Any) -> BitDistillError:
    with pytest.raises(BitDistillError) as info:
        CliRunner().invoke(app, ["perplexity", *map(str, arguments)], catch_exceptions=False)
    return info.value


def test_a_base_beside_its_full_precision_model(work: Path, base: Path) -> None:
    found = scores(base, work / "corpus.txt", "--reference", work / "model")
    assert found["windows"] == math.ceil(found["perplexity"]["n"] / 15)
    assert found["kl"]["value"] > 0
    assert 0 < found["same_token"]["value"] < 100
    alone = scores(work / "model", work / "corpus.txt")
    assert alone["perplexity"]["value"] == pytest.approx(found["reference_perplexity"]["value"], rel=1e-6)
    assert alone["kl"] is None
    # Shards of the same text, and no more of them than asked for
    tokenize_corpus([str(work / "corpus.txt")], make_tokenizer(), work / "shards", workers=1)
    shards = scores(base, work / "shards", "--reference", work / "model")
    told = ("text", "command", "elapsed_s")
    assert {k: v for k, v in shards.items() if k not in told} == {
        k: v for k, v in found.items() if k not in told
    }
    assert scores(base, work / "shards", "--tokens", 160)["perplexity"]["n"] == 150


def test_the_result_says_where_it_comes_from(work: Path, base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["/somewhere/bitdistill", "perplexity", "a b"])
    found = scores(base, work / "corpus.txt", "--reference", work / "model")
    (work / "found.json").write_text(json.dumps(found), "utf-8")
    read = read_text_result(work / "found.json")
    assert read.model_dump(mode="json") == found
    manifest = artifact.read_manifest(base)
    made = read.trained
    assert made is not None
    assert (made.stage, made.key, made.seed) == ("pretrain", manifest["key"], manifest["inputs"]["seed"])
    assert (made.steps, made.tokens) == (manifest["training"]["steps"], manifest["training"]["tokens"])
    assert made.settings == manifest["inputs"]["pretrain"]
    assert read.command == "bitdistill perplexity 'a b'"
    assert read.versions["torch"]
    assert read.hardware["device"] == "cpu"
    # All sittings of a base that went on from another
    more = {**manifest, "started_from": {"key": "x", "steps": 10, "tokens": 640, "device_s": 1.5}}
    all_ = Trained.of(more)
    assert all_ is not None
    assert (all_.steps, all_.tokens) == (made.steps + 10, made.tokens + 640)
    assert all_.device_s == pytest.approx(made.device_s + 1.5, abs=0.01)
    # A full-precision model, and an imported student, were not trained by us
    alone = scores(work / "model", work / "corpus.txt")
    assert (alone["trained"], alone["best_sha256"] == found["best_sha256"]) == (None, False)
    assert alone["tokens_sha256"] == found["tokens_sha256"]
    assert Trained.of({"kind": "student", "origin": {}}) is None


def test_the_page_of_results_has_a_line_a_base(work: Path, base: Path) -> None:
    def page() -> subprocess.CompletedProcess[str]:
        script = Path(__file__).parents[2] / "scripts/make_results.py"
        call = [sys.executable, str(script), "--results", str(work / "r"), "--docs", str(work / "docs")]
        return subprocess.run(call, check=False, capture_output=True, text=True)

    (work / "docs").mkdir()
    (work / "r/bases").mkdir(parents=True)
    found = scores(base, work / "corpus.txt", "--reference", work / "model")
    (work / "r/bases/tiny-1k.json").write_text(json.dumps(found), "utf-8")
    done = page()
    assert done.returncode == 0, done.stderr
    text = (work / "docs/results.md").read_text("utf-8")
    (line,) = [line for line in text.splitlines() if f"| {found['kl']['value']:.3f} [" in line]
    assert f"| {found['perplexity']['value']:.1f} [" in line
    assert f"| {found['same_token']['value']:.1f} [" in line
    assert f"predictions {found['best_sha256'][:12]}" in text
    # Weights before and after stage 2, as the run measured them
    kept = work / "r/weights/tiny/1k"
    (kept / "stats").mkdir(parents=True)
    for name in ("run.json", "stats/refined.json", "stats/base.json"):
        (kept / name).write_bytes((work / "runs/tiny" / name).read_bytes())
    assert page().returncode == 0
    text = (work / "docs/results.md").read_text("utf-8")
    shares = {
        name: 100 * (by_kind(layers)[-1].near_share or 0.0)
        for name in ("refined", "base")
        if (layers := read_stats(kept, name))
    }
    assert re.search(rf"^\| refined \|.* {shares['refined']:.1f} \|$", text, re.M)
    assert re.search(rf"^\| base at 1k tokens \|.* {shares['base']:.1f} \|$", text, re.M)
    assert (work / "docs/figures/weights-tiny.svg").is_file()
    (kept / "stats/base.json").unlink()
    done = page()
    assert done.returncode == 1
    assert "no stats/base.json" in done.stderr
    shutil.rmtree(work / "r/weights")
    # A full-precision model is no base
    alone = scores(work / "model", work / "corpus.txt")
    (work / "r/bases/model.json").write_text(json.dumps(alone), "utf-8")
    done = page()
    assert done.returncode == 1
    assert "model.json: no ternary base" in done.stderr


def test_what_is_no_result(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="no such file"):
        read_text_result(tmp_path / "none.json")
    path = tmp_path / "bad.json"
    path.write_text('{"model": "m", "text": [], "windows": "many"}', "utf-8")
    with pytest.raises(ArtifactError, match=r"bad\.json: windows: .*perplexity --json"):
        read_text_result(path)
    path.write_bytes(b"\xff{")
    with pytest.raises(ArtifactError, match=r"bad\.json: "):
        read_text_result(path)


def test_windows_are_as_long_as_both_models_read(work: Path) -> None:
    from bitdistill.stages.perplexity import perplexity

    found = perplexity(str(work / "model"), [str(work / "corpus.txt")])
    assert found.sequence_length == 128


def test_the_table(work: Path) -> None:
    model = str(work / "model")
    result = CliRunner().invoke(
        app,
        ["perplexity", model, str(work / "corpus.txt"), "--reference", model, "--sequence-length", "16"],
        catch_exceptions=False,
    )
    lines = {line.split("  ")[0].strip(): line.split() for line in result.stdout.splitlines() if line.strip()}
    assert lines["KL, nats a token"][4:] == ["0.0000", "[0.0000,", "0.0000]"]
    assert lines["same next token, %"][4:] == ["100.00", "[100.00,", "100.00]"]
    assert "of the reference" in lines


def test_what_is_refused(work: Path, base: Path) -> None:
    corpus = work / "corpus.txt"
    error = refused(base, work / "nothing.txt")
    assert isinstance(error, DataError)
    assert "no such file or folder" in str(error)
    error = refused(work / "nothing", corpus)
    assert isinstance(error, ModelError)
    error = refused(base, corpus, "--sequence-length", 100_000)
    assert isinstance(error, UsageError)
    assert "reads at most" in str(error)

    other = make_tokenizer()
    other.add_tokens(["w1000"])
    other.save_pretrained(work / "other")
    for name in ("config.json", "model.safetensors"):
        (work / "other" / name).write_bytes((work / "model" / name).read_bytes())
    tokenize_corpus([str(corpus)], other, work / "shards", workers=1)
    error = refused(base, work / "shards")
    assert isinstance(error, ArtifactError)
    assert "tokenized with another tokenizer" in str(error)

    error = refused(base, base)  # a folder of ours, but of no tokens
    assert isinstance(error, ArtifactError)
    assert "not token shards" in str(error)


def test_a_reference_with_another_tokenizer(work: Path, base: Path) -> None:
    from tests.models.conftest import tiny_model

    tiny_model("llama_tied").save_pretrained(work / "other")
    tokenizer = make_tokenizer()
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    vocabulary = backend["model"]["vocab"]
    vocabulary["w30"], vocabulary["w31"] = vocabulary["w31"], vocabulary["w30"]
    tokenizer.save_pretrained(work / "other")
    saved = json.loads((work / "other/tokenizer.json").read_text("utf-8"))
    saved["model"] = backend["model"]
    (work / "other/tokenizer.json").write_text(json.dumps(saved), "utf-8")
    error = refused(base, work / "corpus.txt", "--reference", work / "other")
    assert isinstance(error, ModelError)
    assert "another tokenizer" in str(error)
