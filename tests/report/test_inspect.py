from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from rich.console import Console
from torch import nn

from bitdistill import artifact
from bitdistill.errors import ArtifactError, ModelError, StorageError
from bitdistill.quant.linear import BitLinear
from bitdistill.report import inspect as under_test
from bitdistill.report.inspect import (
    as_json,
    by_kind,
    inspect_model,
    layer_stats,
    read_stats,
    stats_path,
    stats_table,
    write_stats,
)

from .conftest import TinyModel, pack_tiny


def one_layer(weight: list[list[float]], subln: bool = False) -> nn.Module:
    values = torch.tensor(weight)
    model = nn.Module()
    model.q_proj = BitLinear(values.shape[1], values.shape[0], bias=False, subln=subln)
    with torch.no_grad():
        model.q_proj.weight.copy_(values)
    return model


def test_hand_worked_layer() -> None:
    # mean|W| = 1, so x = W: codes -1, 0, 0, +1, +1 (0.5 is a tie and goes to 0)
    (stats,) = layer_stats(one_layer([[-2.0, 0.5, 0.0, 0.53, 1.97]]))
    assert (stats.name, stats.kind, stats.layer) == ("q_proj", "q", None)
    assert (stats.out_features, stats.in_features, stats.weights) == (1, 5, 5)
    assert (stats.negative, stats.zero, stats.positive) == (0.2, 0.4, 0.4)
    assert stats.scale == pytest.approx(1.0)
    assert stats.gain is None
    assert stats.latent is not None
    # distances: 1.5, 0, 0.5, 0.03, 1.47
    assert stats.latent.distance_mean == pytest.approx(3.5 / 5, abs=1e-6)
    assert stats.latent.near_share == pytest.approx(2 / 5)
    mean = 1.0 / 5
    second = sum((x - mean) ** 2 for x in (-2.0, 0.5, 0.0, 0.53, 1.97)) / 5
    fourth = sum((x - mean) ** 4 for x in (-2.0, 0.5, 0.0, 0.53, 1.97)) / 5
    assert stats.latent.std == pytest.approx(math.sqrt(second), rel=1e-6)
    assert stats.latent.kurtosis == pytest.approx(fourth / second**2, rel=1e-6)


def test_histogram_bins_and_overflow() -> None:
    # 118 zeros and two of +-60: mean|W| = 1, so x = W
    row = [0.0] * 118 + [60.0, -60.0]
    (stats,) = layer_stats(one_layer([row]))
    assert stats.latent is not None
    histogram = stats.latent.histogram
    assert len(histogram) == 63
    assert sum(histogram) == 120
    assert (histogram[0], histogram[-1]) == (1, 1)
    assert histogram[1 + 30] == 118  # the bin centred on 0


def test_histogram_matches_numpy() -> None:
    import numpy as np

    torch.manual_seed(0)
    weight = torch.randn(37, 41)
    (stats,) = layer_stats(one_layer(weight.tolist()))
    x = weight.double().numpy() / float(weight.abs().double().mean().float())
    counts, _ = np.histogram(x, bins=np.linspace(-3, 3, 62))
    assert stats.latent is not None
    assert list(stats.latent.histogram[1:-1]) == counts.tolist()
    assert stats.latent.histogram[0] == int((x < -3).sum())
    assert stats.latent.kurtosis == pytest.approx(3.0, abs=0.5)


def test_chunks_do_not_change_the_result(monkeypatch: pytest.MonkeyPatch) -> None:
    model = TinyModel(blocks=1)
    whole = layer_stats(model)
    monkeypatch.setattr(under_test, "_CHUNK", 7)
    for one, other in zip(layer_stats(model), whole, strict=True):
        assert one.latent is not None
        assert other.latent is not None
        assert one.latent.histogram == other.latent.histogram
        assert one.latent.near_share == other.latent.near_share
        assert one.latent.kurtosis == pytest.approx(other.latent.kurtosis, rel=1e-12)


def test_gaussian_latents_have_31_percent_zeros() -> None:
    torch.manual_seed(1)
    (stats,) = layer_stats(one_layer(torch.randn(400, 500).tolist()))
    assert stats.zero == pytest.approx(0.3101, abs=0.005)


def test_subln_gain() -> None:
    model = one_layer([[1.0, 2.0, -3.0]], subln=True)
    with torch.no_grad():
        model.q_proj.subln.weight.copy_(torch.tensor([0.5, 1.0, 3.0]))
    (stats,) = layer_stats(model)
    assert stats.gain is not None
    assert (stats.gain.min, stats.gain.mean, stats.gain.max) == (0.5, 1.5, 3.0)


def test_packed_layers_keep_shares_and_scale_and_have_no_latents() -> None:
    model = TinyModel(blocks=2)
    latent = layer_stats(model)
    packed = layer_stats(pack_tiny(model))
    assert len(packed) == len(latent) == 14
    for one, other in zip(packed, latent, strict=True):
        assert one.latent is None
        assert (one.name, one.negative, one.zero, one.positive) == (
            other.name,
            other.negative,
            other.zero,
            other.positive,
        )
        assert one.scale == other.scale
        assert (one.in_features, one.gain) == (other.in_features, other.gain)


def test_model_without_ternary_layers_is_refused() -> None:
    with pytest.raises(ModelError, match="no ternary layers"):
        layer_stats(nn.Sequential(nn.Linear(3, 3)))


def test_nan_latents_are_refused_by_name() -> None:
    model = one_layer([[1.0, float("nan")]])
    with pytest.raises(ModelError, match=r"q_proj\.weight: holds NaN"):
        layer_stats(model)


def test_write_and_read_round_trip(tmp_path: Path) -> None:
    model = TinyModel(blocks=1)
    path = write_stats(model, tmp_path, "base")
    assert path == stats_path(tmp_path, "base")
    assert read_stats(tmp_path, "base") == layer_stats(model)
    assert read_stats(tmp_path, "student") is None
    assert [p.name for p in path.parent.iterdir()] == ["base.json"]
    content = json.loads(path.read_text())
    assert len(content["bin_edges"]) == 62
    assert content["bin_edges"][0] == -3.0
    assert content["layers"][0]["kind"] == "q"


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[]",
        '{"stats_version": 99, "layers": []}',
        '{"stats_version": 1, "layers": [{"name": "x"}]}',
        "null",
    ],
)
def test_foreign_stats_file_is_one_clear_line(tmp_path: Path, content: str) -> None:
    stats_path(tmp_path, "base").parent.mkdir()
    stats_path(tmp_path, "base").write_text(content)
    with pytest.raises(ArtifactError, match=r"base\.json: unreadable layer statistics") as caught:
        read_stats(tmp_path, "base")
    assert "\n" not in str(caught.value)


def test_unwritable_stats_are_a_storage_error(tmp_path: Path) -> None:
    (tmp_path / "stats").write_text("a file where a folder should be")
    with pytest.raises(StorageError, match="stats"):
        write_stats(TinyModel(blocks=1), tmp_path, "base")


def test_folder_statistics_are_made_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Path] = []

    def fake_inspect(path: Path) -> list[under_test.LayerStats]:
        calls.append(Path(path))
        return layer_stats(TinyModel(blocks=1))

    monkeypatch.setattr(under_test, "inspect_model", fake_inspect)
    folder = tmp_path / "refined"
    for number, content in enumerate([b"a", b"a", b"b"]):
        with artifact.writing(folder, {"kind": "refined"}) as partial:
            (partial / "model.safetensors").write_bytes(content)
        write_stats(folder, tmp_path, "refined")
        assert len(calls) == (1, 1, 2)[number]


def test_inspecting_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="no artifact here"):
        inspect_model(tmp_path)


def test_summary_weighs_layers_by_their_weights() -> None:
    layers = layer_stats(TinyModel(blocks=3))
    *kinds, whole = by_kind(layers)
    assert [kind.kind for kind in kinds] == ["q", "k", "v", "o", "gate", "up", "down"]
    assert whole.kind == "all"
    assert whole.layers == 21
    assert whole.weights == sum(layer.weights for layer in layers)
    zeros = sum(round(layer.zero * layer.weights) for layer in layers)
    assert whole.zero == pytest.approx(zeros / whole.weights)
    assert whole.negative + whole.zero + whole.positive == pytest.approx(1.0)
    assert by_kind(layer_stats(pack_tiny(TinyModel(blocks=1))))[-1].near_share is None


@pytest.mark.parametrize("packed", [False, True])
def test_table_fits_80_columns(packed: bool) -> None:
    model = TinyModel(blocks=1)
    stats = layer_stats(pack_tiny(model) if packed else model)
    wide = [stats[0].model_copy(update={"name": "model.layers.27.self_attn.q_proj", "out_features": 15360})]
    console = Console(width=80, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(stats_table([*wide, *stats], title="student"))
    text = console.export_text()
    assert all(len(line.rstrip()) <= 80 for line in text.splitlines())
    assert "27.q " in text
    assert "15360x24" in text
    assert ("near%" in text) is not packed
    assert "…" not in text


def test_json_form_is_json() -> None:
    content = json.loads(json.dumps(as_json(layer_stats(TinyModel(blocks=1))), allow_nan=False))
    assert len(content["layers"]) == 7
    assert content["layers"][3]["gain"] == {"min": 1.0, "mean": 1.0, "max": 1.0}


@pytest.fixture(scope="module")
def student_folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """refined/, packed/ and teacher/ of a tiny random Llama, written as the stages write them."""
    import tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    from bitdistill.config import RefineConfig
    from bitdistill.models import surgery
    from bitdistill.models.student import pack, save_student

    root = tmp_path_factory.mktemp("students")
    torch.manual_seed(0)
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "<unk>": 1}, unk_token="<unk>"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>")
    config = LlamaConfig(
        vocab_size=16,
        hidden_size=24,
        intermediate_size=36,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        tie_word_embeddings=True,
    )
    teacher = LlamaForCausalLM(config).eval()
    plan = surgery.plan(teacher.config, RefineConfig())
    student = surgery.apply(plan, teacher)
    save_student(teacher, tokenizer, root / "teacher", kind="teacher", plan=None, recipe={}, extra={})
    save_student(student, tokenizer, root / "refined", kind="refined", plan=plan, recipe={}, extra={})
    packed = pack(student, "bfloat16")
    options = {"plan": plan, "recipe": {}, "extra": {}, "float_dtype": "bfloat16"}
    save_student(packed, tokenizer, root / "packed", kind="packed", **options)
    return root


def test_inspecting_real_folders(student_folders: Path) -> None:
    latent, packed = (inspect_model(student_folders / name) for name in ("refined", "packed"))
    assert len(latent) == len(packed) == 14
    assert [layer.name for layer in latent] == [layer.name for layer in packed]
    assert [(layer.zero, layer.scale) for layer in latent] == [(layer.zero, layer.scale) for layer in packed]
    assert latent[3].name == "model.layers.0.self_attn.o_proj"
    assert {layer.kind for layer in latent if layer.gain} == {"o", "down"}
    with pytest.raises(ModelError, match=r"teacher: LlamaForCausalLM: no ternary layers"):
        inspect_model(student_folders / "teacher")


def test_statistics_of_a_real_folder(student_folders: Path, tmp_path: Path) -> None:
    path = write_stats(student_folders / "refined", tmp_path, "refined")
    assert read_stats(tmp_path, "refined") == inspect_model(student_folders / "refined")
    first = path.stat().st_mtime_ns
    write_stats(student_folders / "refined", tmp_path, "refined")
    assert path.stat().st_mtime_ns == first
