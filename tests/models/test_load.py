"""Full-precision models in: folders, what is refused, and fingerprints. The hub is not asked."""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import bitdistill as bd
from bitdistill.config import ModelSource
from bitdistill.errors import ModelError
from bitdistill.models import hf
from bitdistill.models.load import config_dict, load_source, source_fingerprint
from bitdistill.models.student import save_student
from bitdistill.models.tokenizer import check_tokenizer

from .conftest import make_tokenizer, tiny_model


def write_folder(folder: Path, name: str = "llama", **options: Any) -> Any:
    model = tiny_model(name)
    model.save_pretrained(folder, **options)
    make_tokenizer().save_pretrained(folder)
    return model


def source(path: Path | str, **keys: Any) -> ModelSource:
    return ModelSource(path=str(path), **keys)


def test_a_folder_loads_as_it_is(tiny_name: str, tmp_path: Path, ids: Tensor) -> None:
    model = write_folder(tmp_path, tiny_name)
    loaded, tokenizer = load_source(source(tmp_path))
    assert torch.equal(loaded(ids).logits, model(ids).logits)
    assert loaded.config._attn_implementation == "sdpa"
    assert tokenizer("w5 w6").input_ids == [5, 6]
    assert config_dict(source(tmp_path)) == json.loads((tmp_path / "config.json").read_text())


@pytest.mark.parametrize("dtype", ["bfloat16", torch.bfloat16])
def test_dtype_rounds_weights_but_not_rotary_frequencies(dtype: Any, tmp_path: Path) -> None:
    model = write_folder(tmp_path, "llama", max_shard_size=20_000)
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    loaded, _ = load_source(source(tmp_path), dtype=dtype)
    assert {p.dtype for p in loaded.parameters()} == {torch.bfloat16}
    assert torch.equal(loaded.model.rotary_emb.inv_freq, model.model.rotary_emb.inv_freq)
    assert loaded.model.rotary_emb.inv_freq.dtype == torch.float32


def test_tokenizer_from_elsewhere(tmp_path: Path) -> None:
    write_folder(tmp_path / "model")
    make_tokenizer().save_pretrained(tmp_path / "tokenizer")
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "model" / file).unlink()
    with pytest.raises(ModelError, match=r"no tokenizer files; name a folder .* as model\.tokenizer"):
        load_source(source(tmp_path / "model"))
    _, tokenizer = load_source(source(tmp_path / "model", tokenizer=str(tmp_path / "tokenizer")))
    assert tokenizer("w9").input_ids == [9]


class Canary:
    """Unpickling it writes a file: proof that code ran."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return (Path.write_text, (self.path, "fired"))


def only_pickle(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Canary(folder.parent / "canary")))


def remote_code(folder: Path) -> None:
    (folder / "evil.py").write_text(
        f"open({str(folder.parent / 'canary')!r}, 'w').write('fired')\nclass Evil: pass\n"
    )
    edit(folder, model_type="evil", auto_map={"AutoConfig": "evil.Evil", "AutoModelForCausalLM": "evil.Evil"})


def edit(folder: Path, **keys: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **keys}))


def edit_tensors(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


NORM = "model.layers.1.input_layernorm.weight"
REFUSED: dict[str, tuple[Callable[[Path], object], str]] = {
    "pickle": (only_pickle, "weights are pickle only (pytorch_model.bin)"),
    "remote code": (remote_code, "model_type 'evil' is not supported"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "no model.safetensors"),
    "missing tensor": (lambda f: edit_tensors(f, lambda t: t.pop(NORM)), f"missing keys: {NORM}"),
    "wrong shape": (
        lambda f: edit_tensors(f, lambda t: t.update({NORM: torch.ones(9)})),
        "transformers cannot load",
    ),
    "gptq": (
        lambda f: edit(f, quantization_config={"quant_method": "gptq"}),
        "'gptq': this model is already",
    ),
    "no config": (lambda f: (f / "config.json").unlink(), "config.json: missing"),
    "bad config": (lambda f: (f / "config.json").write_text("{"), "unreadable"),
    "list config": (lambda f: (f / "config.json").write_text("[]"), "not a JSON object"),
    "multimodal": (lambda f: edit(f, model_type="gemma3"), "multimodal"),
    "truncated": (
        lambda f: (f / "model.safetensors").write_bytes(b"\x10" * 40),
        "not a valid safetensors file",
    ),
    "bad tokenizer": (lambda f: (f / "tokenizer.json").write_text("{}"), "transformers cannot load it"),
}


@pytest.mark.parametrize("case", sorted(REFUSED))
def test_refused_folders(case: str, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    write_folder(folder)
    damage, words = REFUSED[case]
    damage(folder)
    with pytest.raises(ModelError) as caught:
        load_source(source(folder))
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "canary").exists()


def test_a_student_is_no_source(tmp_path: Path, ids: Tensor) -> None:
    student = bd.refine(tiny_model("llama"), ids)
    save_student(
        student,
        make_tokenizer(),
        tmp_path / "s",
        kind="student",
        plan=hf.plan_of(student),
        recipe={},
        extra={},
    )
    with pytest.raises(ModelError, match="'bitdistill': this model is a student"):
        load_source(source(tmp_path / "s"))


def test_unused_tensors_are_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_folder(tmp_path)
    edit_tensors(tmp_path, lambda t: t.update({"model.extra": torch.ones(2)}))
    load_source(source(tmp_path))
    assert "1 tensors are not used, such as model.extra" in caplog.text


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("/no/such/folder", "no such file or folder"),
        ("./nothing", "no such file or folder"),
        ("a/b/c", "no such file or folder"),
        ("missing.gguf", "no such file or folder"),
    ],
)
def test_paths_that_are_not_there(path: str, words: str) -> None:
    with pytest.raises(ModelError, match=words):
        config_dict(source(path))


def test_a_plain_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "weights.bin").write_bytes(b"")
    with pytest.raises(ModelError, match="is a file; give a model folder"):
        config_dict(source(tmp_path / "weights.bin"))


def test_hub_names_go_to_the_hub_client(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ids: Tensor) -> None:
    """The hub is played by a cache folder: snapshots link into blobs, and pickles are never asked for."""
    model = write_folder(tmp_path / "plain")
    snapshot = tmp_path / "models--o--n" / "snapshots" / "abc"
    blobs = tmp_path / "models--o--n" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, file in enumerate(sorted((tmp_path / "plain").iterdir())):
        shutil.copy(file, blobs / str(number))
        (snapshot / file.name).symlink_to(blobs / str(number))
    asked: list[Any] = []

    def snapshot_download(name: str, *, revision: str | None, allow_patterns: list[str]) -> str:
        asked.append((name, revision, allow_patterns))
        return str(snapshot)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    loaded, _ = load_source(source("o/n", revision="v1"))
    assert torch.equal(loaded(ids).logits, model(ids).logits)
    assert {(name, revision) for name, revision, _ in asked} == {("o/n", "v1")}
    assert not any(p.endswith((".bin", ".pt", ".py", ".pth")) or p == "*" for _, _, ps in asked for p in ps)
    assert source_fingerprint(source("o/n", revision="v1")) == source_fingerprint(source(tmp_path / "plain"))

    def offline(*_: Any, **__: Any) -> str:
        raise ConnectionError("no network\nat all")

    monkeypatch.setattr("huggingface_hub.snapshot_download", offline)
    with pytest.raises(ModelError, match=r"^model o/n at revision v2: not a local folder.*no network at all"):
        config_dict(source("o/n", revision="v2"))


def test_tokenizers_that_belong_to_another_model() -> None:
    tokenizer = make_tokenizer()
    config = {"vocab_size": 101, "bos_token_id": None, "eos_token_id": 1, "pad_token_id": 2}
    check_tokenizer(config, tokenizer, "m")
    check_tokenizer({**config, "vocab_size": 128, "eos_token_id": [1, 7]}, tokenizer, "m")
    with pytest.raises(ModelError, match="the tokenizer has 101 tokens, the model 90"):
        check_tokenizer({**config, "vocab_size": 90}, tokenizer, "m")
    with pytest.raises(ModelError, match="model's eos_token_id 120 is not among the tokenizer's 101"):
        check_tokenizer({**config, "vocab_size": 128, "eos_token_id": [1, 120]}, tokenizer, "m")


def test_fingerprint_sees_every_part(tmp_path: Path) -> None:
    write_folder(tmp_path / "a")
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    first = source_fingerprint(source(tmp_path / "a"))
    assert source_fingerprint(source(tmp_path / "b")) == first
    (tmp_path / "b" / "README.md").write_text("words")
    assert source_fingerprint(source(tmp_path / "b")) == first
    seen = {first}
    edits: list[Callable[[Path], object]] = [
        lambda f: edit(f, rms_norm_eps=1e-3),
        lambda f: edit_tensors(f, lambda t: t[NORM].add_(1)),
        lambda f: (f / "tokenizer.json").write_text((f / "tokenizer.json").read_text() + " "),
    ]
    for change in edits:
        change(tmp_path / "b")
        seen.add(source_fingerprint(source(tmp_path / "b")))
    seen.add(source_fingerprint(source(tmp_path / "b", tokenizer=str(tmp_path / "a"))))
    assert len(seen) == 5
