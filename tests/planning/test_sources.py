"""Where a model's config comes from, and the parameter counts of the configs that are shipped."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bitdistill.config import ModelSource
from bitdistill.errors import ModelError
from bitdistill.models.families import layout_of
from bitdistill.planning.sources import find_config, read_config

SHIPPED = {
    "Qwen/Qwen3-0.6B": 596_049_920,
    "Qwen/Qwen3-1.7B": 1_720_574_976,
    "Qwen/Qwen3-4B": 4_022_468_096,
    "Qwen/Qwen2.5-0.5B": 494_032_768,
    "google/gemma-3-270m": 268_098_176,
    "google/gemma-3-1b-pt": 999_885_952,
    "HuggingFaceTB/SmolLM2-135M-Instruct": 134_515_008,
    "HuggingFaceTB/SmolLM2-360M-Instruct": 361_821_120,
}


@pytest.fixture(autouse=True)
def empty_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.delenv("HF_HUB_CACHE", raising=False)
    return tmp_path / "hf" / "hub"


@pytest.mark.parametrize(("name", "parameters"), SHIPPED.items())
def test_shipped_configs_have_the_released_parameter_counts(name, parameters):
    config, where = find_config(ModelSource(path=name))
    assert "shipped with bitdistill" in where
    assert layout_of(config, where).parameters == parameters


def test_folder(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    assert find_config(ModelSource(path=str(tmp_path)))[0] == {"model_type": "llama"}


@pytest.mark.parametrize("revision", [None, "v2", "0123abcd"])
def test_local_cache_comes_before_the_shipped_copy(empty_cache, revision):
    folder = empty_cache / "models--Qwen--Qwen3-0.6B"
    commit = "0123abcd"
    (folder / "refs").mkdir(parents=True)
    for ref in ("main", "v2"):
        (folder / "refs" / ref).write_text(commit)
    snapshot = folder / "snapshots" / commit
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text(json.dumps({"model_type": "mine"}))
    config, where = find_config(ModelSource(path="Qwen/Qwen3-0.6B", revision=revision))
    assert config == {"model_type": "mine"}
    assert "cache" in where


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("someone/unknown", "not in the local Hugging Face cache"),
        ("missing-folder", "no such folder"),
        ("/missing/folder", "no such folder"),
        ("./a/b", "no such folder"),
        ("model.gguf", "no such file"),
    ],
)
def test_models_that_are_not_there(path, expected):
    with pytest.raises(ModelError, match=expected):
        find_config(ModelSource(path=path))


@pytest.mark.parametrize(
    ("content", "expected"),
    [("", "not JSON"), ("[1]", "not a JSON object"), ("[" * 100_000, "not JSON"), ("\xff", "not JSON")],
)
def test_damaged_configs(tmp_path: Path, content, expected):
    path = tmp_path / "config.json"
    path.write_bytes(content.encode("latin-1"))
    with pytest.raises(ModelError, match=expected):
        read_config(path)


def test_folder_without_config(tmp_path):
    with pytest.raises(ModelError, match=r"config\.json: missing"):
        find_config(ModelSource(path=str(tmp_path)))


def test_gguf_header(tmp_path):
    gguf = pytest.importorskip("gguf")
    numpy = pytest.importorskip("numpy")
    path = tmp_path / "model.gguf"
    writer = gguf.GGUFWriter(path, "qwen3")
    for add, value in (
        (writer.add_embedding_length, 64),
        (writer.add_feed_forward_length, 128),
        (writer.add_block_count, 2),
        (writer.add_head_count, 4),
        (writer.add_head_count_kv, 1),
        (writer.add_key_length, 16),
        (writer.add_context_length, 256),
        (writer.add_layer_norm_rms_eps, 1e-6),
        (writer.add_rope_freq_base, 1e6),
    ):
        add(value)
    writer.add_token_list(["a", "b", "c"])
    writer.add_tensor("token_embd.weight", numpy.zeros((96, 64), numpy.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    config, where = find_config(ModelSource(path=str(path)))
    layout = layout_of(config, where)
    assert where == f"GGUF header of {path}"
    assert (layout.family, layout.vocab, layout.head_dim, layout.kv_heads) == ("qwen3", 96, 16, 1)
    assert layout.tied
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(ModelError, match="damaged"):
        find_config(ModelSource(path=str(path)))
