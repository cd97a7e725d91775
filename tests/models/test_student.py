"""Folders: bit-exact latents, packed students equal to the trained one, and refusal of damaged folders."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

import bitdistill as bd
from bitdistill import artifact
from bitdistill.errors import ArtifactError, ModelError
from bitdistill.models import hf
from bitdistill.models.student import load_student, pack, save_student
from bitdistill.quant.linear import BitLinear, PackedBitLinear
from bitdistill.quant.ternary import ternarize
from tests.cheap import refused_cheaply

from .conftest import make_tokenizer, tiny_model


def trained_student(name: str, subln: Any = "paper") -> Any:
    """A latent student that a few random steps moved away from its start."""
    model = tiny_model(name)
    ids = torch.randint(3, 101, (2, 13), generator=torch.Generator().manual_seed(1))
    student = bd.refine(model, ids, subln=subln)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return student


def save(model: Any, folder: Path, kind: Any, **options: Any) -> None:
    plan = None if kind == "teacher" else hf.plan_of(model)
    save_student(
        model,
        make_tokenizer(),
        folder,
        kind=kind,
        plan=plan,
        recipe={"name": "t"},
        extra={"key": "k"},
        **options,
    )


def assert_same(a: Any, b: Any) -> None:
    left, right = a.state_dict(), b.state_dict()
    assert left.keys() == right.keys()
    for name in left:
        assert left[name].dtype == right[name].dtype, name
        assert torch.equal(left[name], right[name]), name


@pytest.mark.parametrize("subln", ["paper", "every_linear", "none"])
def test_latent_folder_is_bit_exact(tiny_name: str, subln: Any, tmp_path: Path, ids: Tensor) -> None:
    student = trained_student(tiny_name, subln)
    save(student, tmp_path / "s", "student")
    loaded, tokenizer, manifest = load_student(tmp_path / "s")
    assert_same(student, loaded)
    assert torch.equal(student(ids).logits, loaded(ids).logits)
    assert [type(m) for m in loaded.modules()] == [type(m) for m in student.modules()]
    assert manifest["kind"] == "student"
    assert manifest["plan"] == hf.plan_of(student).to_json()
    assert (manifest["key"], manifest["recipe"]) == ("k", {"name": "t"})
    assert not loaded.training
    assert all(p.requires_grad for p in loaded.parameters())
    assert tokenizer("w5 w6").input_ids == [5, 6]
    assert tokenizer.chat_template == make_tokenizer().chat_template


def round_floats(student: Any, dtype: torch.dtype) -> Any:
    """The trained student with every float tensor but the latents rounded: what packing must equal."""
    rounded = copy.deepcopy(student)
    latents = {id(m.weight) for m in rounded.modules() if isinstance(m, BitLinear)}
    for parameter in rounded.parameters():
        if id(parameter) not in latents:
            parameter.data = parameter.data.to(dtype).to(torch.float32)
    return rounded


@pytest.mark.parametrize("float_dtype", ["bfloat16", "float16", "float32"])
def test_packed_equals_the_trained_student_bit_for_bit(
    tiny_name: str, float_dtype: str, tmp_path: Path, ids: Tensor
) -> None:
    student = trained_student(tiny_name)
    before = copy.deepcopy(student.state_dict())
    packed = pack(student, float_dtype)
    assert all(torch.equal(v, before[k]) for k, v in student.state_dict().items())
    expected = round_floats(student, getattr(torch, float_dtype))(ids).logits
    assert torch.equal(packed(ids).logits, expected)
    save(packed, tmp_path / "p", "packed", float_dtype=float_dtype)
    loaded, _, manifest = load_student(tmp_path / "p")
    assert_same(packed, loaded)
    assert torch.equal(loaded(ids).logits, expected)
    assert (manifest["packed"], manifest["float_dtype"]) == (True, float_dtype)
    stored = load_file(tmp_path / "p" / "model.safetensors")
    assert {str(t.dtype) for n, t in stored.items() if not n.endswith((".codes", ".scale"))} == {
        f"torch.{float_dtype}"
    }
    assert ("lm_head.weight" in stored) != student.config.tie_word_embeddings
    with pytest.raises(ModelError, match="only latent students can be packed"):
        pack(loaded, float_dtype)


def test_codes_and_scale_are_the_latents_own() -> None:
    """Never recomputed from w_hat, whose absmean is a smaller scale (method trap 1)."""
    student = trained_student("llama")
    packed = pack(student, "bfloat16")
    for name, layer in student.named_modules():
        if isinstance(layer, BitLinear):
            codes, scale = ternarize(layer.weight)
            twin = packed.get_submodule(name)
            assert torch.equal(twin.weight_codes().to(torch.int8), codes)
            assert torch.equal(twin.scale, scale)
            assert ternarize(codes * scale)[1] < 0.8 * scale


@pytest.mark.parametrize("kind", ["student", "packed"])
def test_auto_model_equals_bd_load(tiny_name: str, kind: str, tmp_path: Path, ids: Tensor) -> None:
    student = trained_student(tiny_name)
    model = student if kind == "student" else pack(student, "bfloat16")
    options = {} if kind == "student" else {"float_dtype": "bfloat16"}
    save(model, tmp_path / "s", kind, **options)
    auto = AutoModelForCausalLM.from_pretrained(tmp_path / "s")
    assert_same(auto, bd.load(tmp_path / "s"))
    assert torch.equal(auto(ids).logits, model(ids).logits)
    if tiny_name != "qwen2":  # transformers reads every qwen2 folder with its own Qwen2Tokenizer
        assert AutoTokenizer.from_pretrained(tmp_path / "s")("w7").input_ids == [7]
    # and what transformers saves again, transformers and we read again
    auto.save_pretrained(tmp_path / "again")
    assert_same(AutoModelForCausalLM.from_pretrained(tmp_path / "again"), auto)
    save(auto, tmp_path / "resaved", kind, **options)
    assert_same(bd.load(tmp_path / "resaved"), auto)


@pytest.mark.parametrize("kind", ["student", "packed"])
def test_codes_and_scale_survive_bfloat16(kind: str, tmp_path: Path, ids: Tensor) -> None:
    student = trained_student("qwen2")
    packed = pack(student, "bfloat16")
    save(packed if kind == "packed" else student, tmp_path / "s", kind)
    for loaded in (
        AutoModelForCausalLM.from_pretrained(tmp_path / "s", dtype=torch.bfloat16),
        bd.load(tmp_path / "s", dtype=torch.bfloat16),
    ):
        assert loaded.model.embed_tokens.weight.dtype == torch.bfloat16
        for name, layer in packed.named_modules():
            if isinstance(layer, PackedBitLinear):
                twin = loaded.get_submodule(name)
                if kind == "student":
                    twin = PackedBitLinear.from_bitlinear(twin)
                assert (twin.codes.dtype, twin.scale.dtype) == (torch.uint8, torch.float32)
                assert torch.equal(twin.codes, layer.codes)
                assert torch.equal(twin.scale, layer.scale)
        assert loaded(ids).logits.dtype == torch.bfloat16


@pytest.mark.parametrize("form", ["latent", "packed"])
def test_cached_generation_equals_uncached(tiny_name: str, form: str, ids: Tensor) -> None:
    student = trained_student(tiny_name)
    model = student if form == "latent" else pack(student, "bfloat16")
    options: dict[str, Any] = {
        "max_new_tokens": 12,
        "do_sample": False,
        "eos_token_id": None,
        "pad_token_id": 2,
    }
    cached = model.generate(ids, use_cache=True, **options)
    assert cached.shape == (2, 25)
    assert torch.equal(cached, model.generate(ids, use_cache=False, **options))


def test_teacher_folder_is_plain(model: Any, tmp_path: Path, ids: Tensor) -> None:
    save(model, tmp_path / "t", "teacher")
    assert "quantization_config" not in json.loads((tmp_path / "t" / "config.json").read_text())
    loaded, _, manifest = load_student(tmp_path / "t")
    assert_same(model, loaded)
    assert (manifest["kind"], manifest["plan"]) == ("teacher", None)
    assert torch.equal(bd.load(tmp_path / "t")(ids).logits, model(ids).logits)


def test_shards(tmp_path: Path, ids: Tensor) -> None:
    student = trained_student("gemma3_text")
    save(student, tmp_path / "s", "base", max_shard_bytes=20_000)
    assert len(list((tmp_path / "s").glob("*.safetensors"))) > 2
    assert_same(bd.load(tmp_path / "s"), student)


def test_what_cannot_be_saved(tmp_path: Path) -> None:
    student, teacher = trained_student("llama"), tiny_model("llama")
    plan = hf.plan_of(student)
    tokenizer = make_tokenizer()

    def attempt(model: Any, kind: Any, plan: Any, extra: Any = None, **options: Any) -> None:
        save_student(
            model, tokenizer, tmp_path / "x", kind=kind, plan=plan, recipe={}, extra=extra or {}, **options
        )

    with pytest.raises(ModelError, match="kind student does not go with"):
        attempt(student, "student", None)
    with pytest.raises(ModelError, match="kind teacher does not go with"):
        attempt(student, "teacher", plan)
    with pytest.raises(ModelError, match="not a bitdistill student"):
        attempt(teacher, "student", plan)
    with pytest.raises(ModelError, match="not as the plan says"):
        attempt(student, "packed", plan)
    with pytest.raises(ModelError, match="as bfloat16 would round it"):
        attempt(student, "student", plan, float_dtype="bfloat16")
    with pytest.raises(ModelError, match="float_dtype 'int8' is not one of"):
        attempt(student, "student", plan, float_dtype="int8")
    with pytest.raises(ValueError, match=r"\['kind'\]"):
        attempt(student, "student", plan, {"kind": "x"})
    with pytest.raises(ModelError, match="not a bitdistill student"):
        pack(teacher, "bfloat16")
    student.model.norm.weight.data[3] = 1e6
    with pytest.raises(ModelError, match=r"model\.norm\.weight: a value does not fit float16"):
        pack(student, "float16")
    assert list(tmp_path.iterdir()) == []


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Sound folders to damage copies of."""
    root = tmp_path_factory.mktemp("folders")
    student = trained_student("llama")
    save(student, root / "latent", "student")
    save(pack(student, "bfloat16"), root / "packed", "packed", float_dtype="bfloat16")
    save(student, root / "sharded", "student", max_shard_bytes=20_000)
    return {name: root / name for name in ("latent", "packed", "sharded")}


def reseal(folder: Path) -> None:
    """Make the manifest's hashes true again, as an attacker would."""
    path = folder / "bitdistill.json"
    manifest = json.loads(path.read_text())
    manifest["files"] = {
        file.name: {"sha256": artifact.sha256_file(file), "bytes": file.stat().st_size}
        for file in sorted(folder.iterdir())
        if file.is_file() and file != path
    }
    path.write_text(json.dumps(manifest))


DOWN = "model.layers.1.mlp.down_proj"


def edit_tensors(change: Callable[[dict[str, Tensor]], object]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        path = folder / "model.safetensors"
        tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
        change(tensors)
        save_file(tensors, path, metadata={"format": "pt"})

    return damage


def put(name: str, value: Tensor) -> Callable[[Path], None]:
    return edit_tensors(lambda tensors: tensors.__setitem__(name, value))


def set_item(name: str, index: Any, value: float) -> Callable[[Path], None]:
    return edit_tensors(lambda tensors: tensors[name].__setitem__(index, value))


def edit_json(file: str, change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        value = json.loads((folder / file).read_text())
        change(value)
        (folder / file).write_text(json.dumps(value))

    return damage


def edit_plan(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    """The same change in both places that hold the plan."""

    def damage(folder: Path) -> None:
        edit_json("config.json", lambda c: change(c["quantization_config"]["plan"]))(folder)
        edit_json("bitdistill.json", lambda m: change(m["plan"]))(folder)

    return damage


MALFORMED: dict[str, tuple[str, Callable[[Path], None], str]] = {
    "code 3": (
        "packed",
        set_item(f"{DOWN}.codes", (2, 5), 0b11),
        f"{DOWN}.codes: value 3 at row 2, column 20",
    ),
    "padding": ("packed", set_item(f"{DOWN}.codes", (4, 17), 0b10010101), "padding of row 4"),
    "NaN scale": ("packed", put(f"{DOWN}.scale", torch.tensor(float("nan"))), f"{DOWN}.scale: nan"),
    "Inf scale": ("packed", put(f"{DOWN}.scale", torch.tensor(float("inf"))), f"{DOWN}.scale: inf"),
    "zero scale": ("packed", put(f"{DOWN}.scale", torch.tensor(0.0)), f"{DOWN}.scale: 0.0"),
    "negative scale": ("packed", put(f"{DOWN}.scale", torch.tensor(-0.5)), f"{DOWN}.scale: -0.5"),
    "scale dtype": (
        "packed",
        put(f"{DOWN}.scale", torch.tensor(0.5).bfloat16()),
        f"{DOWN}.scale has dtype BF16",
    ),
    "scale count": ("packed", put(f"{DOWN}.scale", torch.ones(44)), f"{DOWN}.scale has shape [44], not []"),
    "short rows": (
        "packed",
        put(f"{DOWN}.codes", torch.full((44, 17), 85, dtype=torch.uint8)),
        "[44, 17], not [44, 18]",
    ),
    "code dtype": ("packed", put(f"{DOWN}.codes", torch.ones(44, 18, dtype=torch.int8)), "dtype I8, not U8"),
    "missing": ("packed", edit_tensors(lambda t: t.pop(f"{DOWN}.scale")), f"tensor {DOWN}.scale missing"),
    "missing gain": (
        "latent",
        edit_tensors(lambda t: t.pop(f"{DOWN}.subln.weight")),
        f"tensor {DOWN}.subln.weight missing",
    ),
    "unexpected": ("latent", put("model.extra", torch.ones(3)), "unexpected tensor model.extra"),
    "latents in a packed folder": ("packed", put(f"{DOWN}.weight", torch.ones(44, 70)), "unexpected tensor"),
    "NaN latent": (
        "latent",
        set_item(f"{DOWN}.weight", (0, 0), float("nan")),
        f"{DOWN}.weight: holds values",
    ),
    "Inf norm": ("packed", set_item("model.norm.weight", 1, float("inf")), "model.norm.weight: holds values"),
    "integer latents": ("latent", put(f"{DOWN}.weight", torch.ones(44, 70).int()), "dtype I32"),
    "truncated": (
        "latent",
        lambda f: (f / "model.safetensors").write_bytes((f / "model.safetensors").read_bytes()[:-9]),
        "not a valid safetensors file",
    ),
    "no weights": ("latent", lambda f: (f / "model.safetensors").unlink(), "no model.safetensors"),
    "newer format": (
        "packed",
        edit_json("config.json", lambda c: c["quantization_config"].update(format_version=2)),
        "format_version is 2",
    ),
    "unknown key": (
        "packed",
        edit_json("config.json", lambda c: c["quantization_config"].update(surprise=1)),
        "unknown keys ['surprise']",
    ),
    "no section": (
        "packed",
        edit_json("config.json", lambda c: c.pop("quantization_config")),
        "kind 'packed'",
    ),
    "claims latent": (
        "packed",
        edit_json("config.json", lambda c: c["quantization_config"].update(packed=False)),
        "disagree",
    ),
    "other plan": (
        "packed",
        edit_json(
            "config.json", lambda c: c["quantization_config"]["plan"].update(quantize_activations=False)
        ),
        "disagree",
    ),
    "plan of another shape": (
        "packed",
        edit_plan(lambda p: p["replace"][DOWN].update(in_features=72)),
        f"the plan's {DOWN} is not a linear",
    ),
    "plan of a norm": (
        "packed",
        edit_plan(lambda p: p["replace"].update({"model.norm": p["replace"][DOWN]})),
        "the plan's model.norm is not a linear",
    ),
    "plan without a layer": (
        "packed",
        edit_plan(lambda p: p["replace"].pop(DOWN)),
        f"unexpected tensor {DOWN}",
    ),
    "kind": ("latent", edit_json("bitdistill.json", lambda m: m.update(kind="teacher")), "kind 'teacher'"),
    "other family": (
        "latent",
        edit_json("config.json", lambda c: c.update(model_type="gpt2")),
        "'gpt2' is not",
    ),
    "other sizes": (
        "latent",
        edit_json("config.json", lambda c: c.update(num_hidden_layers=2)),
        "not a linear",
    ),
    "config gone": ("latent", lambda f: (f / "config.json").unlink(), "config.json: missing"),
    "shard outside": (
        "sharded",
        edit_json("model.safetensors.index.json", lambda i: i["weight_map"].update(x="../evil.safetensors")),
        "'../evil.safetensors', which is not",
    ),
    "absolute shard": (
        "sharded",
        edit_json(
            "model.safetensors.index.json", lambda i: i["weight_map"].update(x="/tmp/evil.safetensors")
        ),
        "'/tmp/evil.safetensors', which is not",
    ),
    "NUL in a shard": (
        "sharded",
        edit_json("model.safetensors.index.json", lambda i: i["weight_map"].update(x="a\0.safetensors")),
        "which is not",
    ),
    "pickle shard": (
        "sharded",
        edit_json("model.safetensors.index.json", lambda i: i["weight_map"].update(x="pytorch_model.bin")),
        "'pytorch_model.bin', which is not",
    ),
    "index lies": (
        "sharded",
        edit_json("model.safetensors.index.json", lambda i: i["weight_map"].pop("model.norm.weight")),
        "disagrees with the shards about model.norm.weight",
    ),
    "index is no map": (
        "sharded",
        edit_json("model.safetensors.index.json", lambda i: i.update(weight_map=[1])),
        "unreadable index",
    ),
    "both forms": (
        "sharded",
        lambda f: shutil.copy(next(f.glob("model-00001-*")), f / "model.safetensors"),  # type: ignore[arg-type,return-value]
        "holds both",
    ),
}


@pytest.mark.parametrize("case", sorted(MALFORMED))
def test_malformed_folders_are_refused(case: str, folders: dict[str, Path], tmp_path: Path) -> None:
    source, damage, words = MALFORMED[case]
    folder = tmp_path / "damaged"
    shutil.copytree(folders[source], folder)
    damage(folder)
    reseal(folder)
    message = refused_cheaply(lambda: load_student(folder), ArtifactError, ModelError)
    assert words in message
    assert "\n" not in message


def test_a_shard_that_links_out_is_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    folder = tmp_path / "linked"
    shutil.copytree(folders["latent"], folder)
    outside = tmp_path / "outside.safetensors"
    (folder / "model.safetensors").rename(outside)
    (folder / "model.safetensors").symlink_to(outside)
    with pytest.raises(ArtifactError, match="not a plain file"):
        load_student(folder)


def test_the_auto_model_path_checks_contents_too(folders: dict[str, Path], tmp_path: Path) -> None:
    for case in ("code 3", "NaN scale", "missing gain", "plan of another shape"):
        source, damage, words = MALFORMED[case]
        folder = tmp_path / case
        shutil.copytree(folders[source], folder)
        damage(folder)
        with pytest.raises(ArtifactError) as caught:
            AutoModelForCausalLM.from_pretrained(folder)
        assert words in str(caught.value)


@pytest.mark.parametrize(
    "file", ["model.safetensors", "config.json", "tokenizer.json", "tokenizer_config.json"]
)
def test_one_changed_byte_is_noticed(file: str, folders: dict[str, Path], tmp_path: Path) -> None:
    folder = tmp_path / "flipped"
    shutil.copytree(folders["packed"], folder)
    data = bytearray((folder / file).read_bytes())
    data[len(data) // 2] ^= 1
    (folder / file).write_bytes(data)
    with pytest.raises(ArtifactError, match=f"{file}: SHA-256 differs"):
        load_student(folder)
