"""`bitdistill perplexity` on a tiny base, its full-precision model, text and shards; and what it refuses."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from bitdistill import pipeline
from bitdistill.cli.main import app
from bitdistill.data.corpus import tokenize_corpus
from bitdistill.errors import ArtifactError, BitDistillError, DataError, ModelError, UsageError
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
    assert {**shards, "text": found["text"]} == found
    assert scores(base, work / "shards", "--tokens", 160)["perplexity"]["n"] == 150


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
