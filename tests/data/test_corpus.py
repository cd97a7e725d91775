"""Token shards: bytes independent of workers, exact reads across shards, filters, fingerprints, damage."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from bitdistill import artifact
from bitdistill.data import corpus
from bitdistill.data.corpus import TokenShards, tokenize_corpus, tokenizer_fingerprint
from bitdistill.errors import ArtifactError, BitDistillError, DataError, ModelError

DOCUMENTS = [f"document {n}: the film is a charming journey , {'witty ' * (n % 7)}" for n in range(300)]


@pytest.fixture
def source(tmp_path: Path) -> str:
    path = tmp_path / "corpus.jsonl"
    kinds = ("book", "web", "news")
    lines = [json.dumps({"text": t, "source": kinds[n % 3], "id": n}) for n, t in enumerate(DOCUMENTS)]
    path.write_text("\n".join(lines), "utf-8")
    return str(path)


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many chunks from little text."""
    monkeypatch.setattr(corpus, "CHUNK_CHARACTERS", 1000)


def stream(tokenizer: Any, documents: list[str]) -> list[int]:
    """The slow twin: every document and its eos, one after the other."""
    return [i for d in documents for i in (*tokenizer(d)["input_ids"], tokenizer.eos_token_id)]


def test_tokens_equal_the_slow_twin_for_any_worker_count(tokenizer: Any, source: str, tmp_path: Path) -> None:
    folders = [tokenize_corpus([source], tokenizer, tmp_path / f"w{n}", workers=n) for n in (1, 3)]
    shards = [TokenShards(folder) for folder in folders]
    expected = stream(tokenizer, DOCUMENTS)
    for one in shards:
        assert one.read(0, one.n_tokens).tolist() == expected
        assert (one.documents, one.vocab_size, one.dtype) == (300, len(tokenizer), np.dtype("<u2"))
    assert shards[0].fingerprint == shards[1].fingerprint
    manifests = [artifact.verify(folder) for folder in folders]
    assert manifests[0] == manifests[1]
    assert manifests[0]["kind"] == "tokens"
    assert manifests[0]["tokenizer_sha256"] == tokenizer_fingerprint(tokenizer)
    assert manifests[0]["sources"][0]["fingerprint"] == artifact.sha256_file(Path(source))


def test_reads_across_shards(tokenizer: Any, source: str, tmp_path: Path) -> None:
    shards = TokenShards(tokenize_corpus([source], tokenizer, tmp_path / "t", workers=1, tokens_per_shard=97))
    expected = np.array(stream(tokenizer, DOCUMENTS))
    assert len(list((tmp_path / "t").glob("*.bin"))) == -(-len(expected) // 97) > 30
    rng = np.random.default_rng(0)
    starts = [0, 96, 97, 193, 194, *rng.integers(0, len(expected) - 400, 50).tolist()]
    for start in starts:
        for count in (0, 1, 97, 98, 400):
            assert shards.read(start, count).tolist() == expected[start : start + count].tolist()
    assert shards.read(len(expected) - 1, 1).tolist() == [tokenizer.eos_token_id]
    for start, count in ((-1, 2), (len(expected), 1), (0, len(expected) + 1), (5, -1)):
        with pytest.raises(IndexError):
            shards.read(start, count)


def test_bos_before_each_document(blank_tokenizer: Any, source: str, tmp_path: Path) -> None:
    shards = TokenShards(tokenize_corpus([source], blank_tokenizer, tmp_path / "t", workers=1))
    tokens = shards.read(0, shards.n_tokens)
    assert tokens.tolist() == stream(blank_tokenizer, DOCUMENTS)
    assert int((tokens == blank_tokenizer.bos_token_id).sum()) == 300


def test_special_marks_in_a_document_are_text(tokenizer: Any, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one <|endoftext|> two", "utf-8")
    shards = TokenShards(tokenize_corpus([str(tmp_path / "a.txt")], tokenizer, tmp_path / "t", workers=1))
    tokens = shards.read(0, shards.n_tokens).tolist()
    assert tokens.count(tokenizer.eos_token_id) == 1
    assert tokenizer.decode(tokens[:-1]) == "one <|endoftext|> two"


@pytest.mark.parametrize("limit", [1, 1234])
def test_limit_tokens(tokenizer: Any, source: str, tmp_path: Path, limit: int) -> None:
    shards = TokenShards(tokenize_corpus([source], tokenizer, tmp_path / "t", workers=2, limit_tokens=limit))
    expected = stream(tokenizer, DOCUMENTS)[:limit]
    assert shards.read(0, shards.n_tokens).tolist() == expected
    assert shards.documents == expected.count(tokenizer.eos_token_id) + 1  # the last one is cut


@pytest.mark.parametrize(
    ("filters", "kept"),
    [
        ({"include": {"source": {"web", "news"}}}, {1, 2}),
        ({"exclude": {"source": ["web"]}}, {0, 2}),
        ({"include": {"source": ["web", "book"]}, "exclude": {"source": ["book"]}}, {1}),
    ],
)
def test_filters(tokenizer: Any, source: str, tmp_path: Path, filters: dict, kept: set[int]) -> None:
    shards = TokenShards(tokenize_corpus([source], tokenizer, tmp_path / "t", workers=1, **filters))
    expected = [d for n, d in enumerate(DOCUMENTS) if n % 3 in kept]
    assert shards.read(0, shards.n_tokens).tolist() == stream(tokenizer, expected)


def test_filters_that_fit_nothing(tokenizer: Any, source: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"corpus\.jsonl:1: no field `genre` to include or exclude by"):
        tokenize_corpus([source], tokenizer, tmp_path / "t", workers=1, exclude={"genre": {"x"}})
    with pytest.raises(DataError, match="no documents left"):
        tokenize_corpus([source], tokenizer, tmp_path / "t", workers=1, include={"source": {"radio"}})
    with pytest.raises(DataError, match="no sources"):
        tokenize_corpus([], tokenizer, tmp_path / "t", workers=1)
    assert list(tmp_path.glob("t*")) == []


def test_large_vocabularies_take_four_bytes(tmp_path: Path) -> None:
    vocabulary = {f"w{n}": n for n in range(2**16)} | {"</s>": 2**16}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="w0"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", unk_token="w0")
    (tmp_path / "a.txt").write_text("w65535 w1", "utf-8")
    shards = TokenShards(tokenize_corpus([str(tmp_path / "a.txt")], tokenizer, tmp_path / "t", workers=1))
    assert shards.read(0, 3).tolist() == [65535, 1, 65536]
    assert shards.dtype == np.dtype("<u4")


def test_progress_and_replacement(tokenizer: Any, source: str, tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    out = tokenize_corpus(
        [source], tokenizer, tmp_path / "t", workers=1, progress=lambda d, t: seen.append((d, t))
    )
    assert len(seen) > 5
    assert seen == sorted(seen)
    assert seen[-1] == (300, TokenShards(out).n_tokens)
    tokenize_corpus([source], tokenizer, tmp_path / "t", workers=1, limit_tokens=9)
    assert TokenShards(out).n_tokens == 9


def test_bad_document_leaves_the_older_artifact(tokenizer: Any, source: str, tmp_path: Path) -> None:
    out = tokenize_corpus([source], tokenizer, tmp_path / "t", workers=1)
    before = TokenShards(out).fingerprint
    with Path(source).open("a", encoding="utf-8") as handle:
        handle.write('\n{"text": 5}\n')
    with pytest.raises(DataError, match=r"corpus\.jsonl:301: field `text` is int"):
        tokenize_corpus([source], tokenizer, out, workers=2)
    assert TokenShards(out).fingerprint == before
    assert [p.name for p in tmp_path.glob("t*")] == ["t"]


def test_killed_worker_is_one_clear_error(
    tokenizer: Any, source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[subprocess.Popen] = []
    popen = subprocess.Popen

    def record(*args: Any, **kwargs: Any) -> subprocess.Popen:
        started.append(popen(*args, **kwargs))
        return started[-1]

    monkeypatch.setattr(subprocess, "Popen", record)

    def kill(documents: int, tokens: int) -> None:
        started[0].kill()  # again and again: a no-op once it was waited for

    with pytest.raises(BitDistillError, match=r"a tokenizing process ended early \(exit code -9\)"):
        tokenize_corpus([source], tokenizer, tmp_path / "t", workers=2, progress=kill)
    assert all(process.returncode is not None for process in started)  # none is left behind
    assert not (tmp_path / "t").exists()


def test_fingerprint_of_a_tokenizer(tokenizer: Any, blank_tokenizer: Any, tmp_path: Path) -> None:
    prints = {tokenizer_fingerprint(tokenizer)}
    for name in ("a", "b"):
        tokenizer.save_pretrained(tmp_path / name)
    again = AutoTokenizer.from_pretrained(tmp_path / "a")
    again.save_pretrained(tmp_path / "c")
    twice = AutoTokenizer.from_pretrained(tmp_path / "c")
    twice.padding_side = "left"
    twice(["a", "b c"], padding=True, truncation=True, max_length=4)  # leaves state in the backend
    prints |= {tokenizer_fingerprint(again), tokenizer_fingerprint(twice)}
    assert len(prints) == 1
    assert tokenizer_fingerprint(blank_tokenizer) not in prints
    again.add_tokens(["<new>"])
    assert tokenizer_fingerprint(again) not in prints


def test_tokenizer_by_folder(tokenizer: Any, source: str, tmp_path: Path) -> None:
    tokenizer.save_pretrained(tmp_path / "tok")
    by_path = TokenShards(tokenize_corpus([source], str(tmp_path / "tok"), tmp_path / "a", workers=1))
    by_object = TokenShards(tokenize_corpus([source], tokenizer, tmp_path / "b", workers=1))
    assert by_path.fingerprint == by_object.fingerprint
    (tmp_path / "void").mkdir()
    with pytest.raises(ModelError, match="no usable tokenizer"):
        tokenize_corpus([source], str(tmp_path / "void"), tmp_path / "c", workers=1)
    with pytest.raises(ModelError, match="no fast backend"):
        tokenizer_fingerprint(object())


def damage(folder: Path, kind: str) -> None:
    path = folder / "bitdistill.json"
    manifest = json.loads(path.read_text("utf-8"))
    if kind == "short":
        shard = folder / "tokens-00001.bin"
        shard.write_bytes(shard.read_bytes()[:-1])
    elif kind == "missing":
        (folder / "tokens-00000.bin").unlink()
    elif kind == "kind":
        manifest["kind"] = "teacher"
    elif kind == "count":
        manifest["tokens"] += 1
    elif kind == "key":
        del manifest["eos_id"]
    elif kind == "dtype":
        manifest["dtype"] = "object"
    elif kind == "empty":
        manifest.update(tokens=0, shard_tokens=[0])
        (folder / "tokens-00000.bin").write_bytes(b"")
    elif kind == "list":
        manifest["shard_tokens"] = "many"
    path.write_text(json.dumps(manifest), "utf-8")


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("short", r"tokens-00001\.bin: \d+ bytes, the manifest says \d+"),
        ("missing", r"tokens-00000\.bin: missing"),
        ("kind", r"an artifact of kind 'teacher', not token shards"),
        ("count", r"shards hold \d+ tokens, the manifest says \d+"),
        ("key", r"manifest lacks or garbles 'eos_id'"),
        ("dtype", r"manifest lacks or garbles 'object'"),
        ("list", r"manifest lacks or garbles"),
        ("empty", r"tokens-00000\.bin: 0 bytes"),
    ],
)
def test_damaged_folders(tokenizer: Any, source: str, tmp_path: Path, kind: str, message: str) -> None:
    folder = tokenize_corpus([source], tokenizer, tmp_path / "t", workers=1, tokens_per_shard=2000)
    damage(folder, kind)
    with pytest.raises(ArtifactError, match=message):
        TokenShards(folder)


def test_no_artifact(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="no artifact here"):
        TokenShards(tmp_path)
