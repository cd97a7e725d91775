"""A `quant_method: bitnet` checkpoint as a packed student: both linear classes, sub-norms, damaged files."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

import bitdistill as bd
from bitdistill import artifact
from bitdistill.errors import ArtifactError, BitDistillError, ModelError
from bitdistill.interop import foreign
from bitdistill.interop.foreign import foreign_kind, import_student
from bitdistill.interop.transformers_bitnet import export_transformers, pack_rows
from bitdistill.models.student import load_student
from bitdistill.quant.ternary import ternarize
from tests.cheap import refused_cheaply
from tests.interop.test_transformers_bitnet import packed_folder
from tests.models.conftest import make_tokenizer, tiny_model

IDS = torch.randint(3, 100, (2, 9), generator=torch.Generator().manual_seed(1))
SIZES = {"hidden_size": 48, "intermediate_size": 72}


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BITDISTILL_CACHE", str(tmp_path / "cache"))


def bitnet_checkpoint(folder: Path, linear_class: str = "autobitlinear", unpacked: bool = False) -> Any:
    """BitNet b1.58 2B's layout, made by hand from a random model, which is returned with its weights ternary."""
    model = tiny_model("bitnet", **SIZES)
    state: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        if "_proj." not in name:
            parameter.data = parameter.data.to(torch.bfloat16).float()
            state[name] = parameter.data.to(torch.bfloat16)
            continue
        codes, scale = ternarize(parameter.data)
        scale = scale.to(torch.bfloat16).float()  # as the published checkpoint stores it
        stored = scale if linear_class == "autobitlinear" else (1 / scale).to(torch.bfloat16)
        if linear_class == "bitlinear":
            scale = 1 / stored.float()
        state[name] = codes.to(torch.bfloat16) if unpacked else pack_rows(codes)
        state[f"{name}_scale"] = stored.to(torch.bfloat16).reshape(1)
        parameter.data = codes * scale
    model.config.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "bitnet",
        "linear_class": linear_class,
        "quantization_mode": "offline",
        "modules_to_not_convert": None,
    }
    config["auto_map"] = {"AutoConfig": "configuration_bitnet.BitNetConfig"}  # remote code, as published
    (folder / "config.json").write_text(json.dumps(config))
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    make_tokenizer().save_pretrained(folder)
    return model


def quantize_inputs(model: Any) -> None:
    """int8 activations, one scale a token, in plain floats: the slow twin of what BitNet's linears do."""

    def hook(_: Any, inputs: tuple[Tensor, ...]) -> tuple[Tensor]:
        (x,) = inputs
        scale = 127 / x.abs().amax(-1, keepdim=True).clamp_min(1e-5)
        return ((x * scale).round().clamp(-128, 127) / scale,)

    for name, module in model.named_modules():
        if name.endswith("_proj"):
            module.register_forward_pre_hook(hook)


@pytest.mark.parametrize(
    ("linear_class", "unpacked"), [("autobitlinear", False), ("autobitlinear", True), ("bitlinear", False)]
)
def test_a_bitnet_checkpoint_computes_as_its_definition(
    tmp_path: Path, linear_class: str, unpacked: bool
) -> None:
    reference = bitnet_checkpoint(tmp_path, linear_class, unpacked)
    assert foreign_kind(tmp_path) == "transformers"
    import_student(tmp_path, tmp_path / "out")
    model, _, manifest = load_student(tmp_path / "out")
    assert (manifest["family"], manifest["plan"]["subln"]) == ("bitnet", "none")
    assert model.config.hidden_act == "relu2"
    assert "auto_map" not in json.loads((tmp_path / "out" / "config.json").read_text())
    for name, layer in reference.named_modules():
        if name.endswith("_proj"):
            ours = model.get_submodule(name)
            assert torch.equal(ours.weight_codes() * ours.scale, layer.weight), name
    quantize_inputs(reference)
    with torch.no_grad():
        gap = (model(IDS).logits - reference(IDS).logits).abs()
    # x * (127 / max) there, (127 x) / max here: near a tie a code differs by one.
    assert gap.median() < 1e-4
    assert gap.max() < 0.02 * reference(IDS).logits.abs().max()
    assert torch.equal(bd.load(tmp_path)(IDS).logits, model(IDS).logits)


@pytest.mark.parametrize(
    ("name", "subln"),
    [("llama_tied", "paper"), ("qwen3", "every_linear"), ("qwen2", "none"), ("bitnet", "none")],
)
def test_what_we_export_comes_back(tmp_path: Path, name: str, subln: str) -> None:
    packed = packed_folder(tmp_path, name, subln)
    export_transformers(packed, tmp_path / "hf")
    import_student(tmp_path / "hf", tmp_path / "back")
    ours, back = (load_student(tmp_path / f)[0] for f in ("packed", "back"))
    state, state_back = ours.state_dict(), back.state_dict()
    assert state.keys() == state_back.keys()
    for key, tensor in state.items():
        if key.endswith(".scale"):  # stored as 1/scale: the last bit may change
            torch.testing.assert_close(tensor, state_back[key], rtol=2.0**-23, atol=0)
        else:
            assert torch.equal(tensor, state_back[key]), key
    with torch.no_grad():
        assert (ours(IDS).logits - back(IDS).logits).abs().median() < 1e-4


@pytest.mark.parametrize("kind", ["ours", "bitnet"])
def test_the_engine_takes_a_transformers_folder(tmp_path: Path, kind: str) -> None:
    pytest.importorskip("bitdistill.engine._native", reason="the native engine is not built")
    if kind == "ours":
        export_transformers(packed_folder(tmp_path, "llama_tied", "paper"), tmp_path / "hf")
    else:  # squared ReLU and sub-norms
        (tmp_path / "hf").mkdir()
        bitnet_checkpoint(tmp_path / "hf")
    engine = bd.Engine(tmp_path / "hf", threads=1)
    with torch.no_grad():
        theirs = bd.load(tmp_path / "hf")(IDS[:1]).logits[0]
    assert (torch.from_numpy(engine.logits(IDS[0].tolist())) - theirs).abs().median() < 1e-4


def edit_config(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        change(config)
        (folder / "config.json").write_text(json.dumps(config))

    return edit


def edit_tensors(change: Callable[[dict[str, Tensor]], Any]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        state = load_file(folder / "model.safetensors")
        change(state)
        save_file(state, folder / "model.safetensors")

    return edit


def edit_bytes(change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        path = folder / "model.safetensors"
        path.write_bytes(change(path.read_bytes()))

    return edit


Q = "model.layers.1.self_attn.q_proj.weight"
QUANT = "quantization_config"
DAMAGE: dict[str, tuple[Callable[[Path], None], str]] = {
    "linear class": (edit_config(lambda c: c[QUANT].update(linear_class="other")), "linear_class 'other'"),
    "online": (edit_config(lambda c: c[QUANT].update(quantization_mode="online")), "stores float latents"),
    "family": (edit_config(lambda c: c.update(model_type="falcon")), "model_type 'falcon' is not supported"),
    "layers": (edit_config(lambda c: c.update(num_hidden_layers=4)), r"layers\.3\..* is missing"),
    "layers -1": (edit_config(lambda c: c.update(num_hidden_layers=-1)), "num_hidden_layers is -1"),
    "layers 2^63": (edit_config(lambda c: c.update(num_hidden_layers=1 << 63)), "over 1024"),
    "hidden": (edit_config(lambda c: c.update(hidden_size=64)), "weight is torch.uint8"),
    "config not JSON": (lambda f: (f / "config.json").write_text("{"), "neither a .gguf file nor a folder"),
    "config nested": (lambda f: (f / "config.json").write_text("[" * 100_000), "neither a .gguf file nor"),
    "missing tensor": (edit_tensors(lambda s: s.pop(Q)), "q_proj.weight is missing"),
    "missing scale": (edit_tensors(lambda s: s.pop(Q + "_scale")), "q_proj.weight_scale is missing"),
    "missing sub-norm": (
        edit_tensors(lambda s: s.pop("model.layers.0.mlp.ffn_sub_norm.weight")),
        "ffn_sub_norm.weight is missing",
    ),
    "one tensor more": (edit_tensors(lambda s: s.update(extra=torch.ones(1))), "extra has no place"),
    "value 3": (edit_tensors(lambda s: s[Q].view(-1)[:1].fill_(0b11)), "q_proj: .*value 3"),
    "half the rows": (
        edit_tensors(lambda s: s.update({Q: s[Q][:6].clone()})),
        r"uint8 \[6, 48\], not packed",
    ),
    "int8 weights": (edit_tensors(lambda s: s.update({Q: s[Q].to(torch.int8)})), "weight is torch.int8"),
    "float weights": (
        edit_tensors(lambda s: s.update({Q: torch.randn(48, 48)})),
        "weights other than -1, 0 and 1",
    ),
    "scale 0": (edit_tensors(lambda s: s[Q + "_scale"].zero_()), "is not one positive finite number"),
    "scale nan": (edit_tensors(lambda s: s[Q + "_scale"].fill_(float("nan"))), "is not one positive finite"),
    "scale inf": (edit_tensors(lambda s: s[Q + "_scale"].fill_(float("inf"))), "is not one positive finite"),
    "scale negative": (edit_tensors(lambda s: s[Q + "_scale"].neg_()), "is not one positive finite"),
    "scale a row": (edit_tensors(lambda s: s.update({Q + "_scale": torch.ones(48)})), "is not one positive"),
    "norm nan": (
        edit_tensors(lambda s: s["model.norm.weight"].fill_(float("nan"))),
        "model.norm.weight holds values that are not finite",
    ),
    "norm shape": (
        edit_tensors(lambda s: s.update({"model.norm.weight": torch.ones(47)})),
        r"model.norm.weight is \[47\], config says \[48\]",
    ),
    "truncated": (edit_bytes(lambda d: d[:-100]), "not a valid safetensors file"),
    "header length 0": (edit_bytes(lambda d: bytes(8) + d[8:]), "not a valid safetensors file"),
    "header length 2^63": (edit_bytes(lambda d: b"\0" * 7 + b"\x80" + d[8:]), "not a valid safetensors file"),
    "empty file": (edit_bytes(lambda d: b""), "not a valid safetensors file"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "no model.safetensors"),
}


@pytest.mark.parametrize("case", sorted(DAMAGE))
def test_damaged_checkpoints_are_refused(case: str, tmp_path: Path) -> None:
    damage, words = DAMAGE[case]
    source = tmp_path / "source"
    bitnet_checkpoint(source)
    damage(source)
    message = refused_cheaply(lambda: import_student(source, tmp_path / "out"), BitDistillError)
    assert re.search(words, message)
    assert str(source) in message
    assert "\n" not in message
    assert not (tmp_path / "out").exists()


def test_an_import_that_another_process_made_meanwhile_is_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "in").mkdir()
    bitnet_checkpoint(tmp_path / "in")
    folder = foreign.packed_folder(tmp_path / "in")
    folder.rename(tmp_path / "made")
    real = artifact.locked

    def after_the_other(place: Path) -> Any:
        (tmp_path / "made").rename(place)
        return real(place)

    def imported(*_: object) -> None:
        raise AssertionError("imported again")

    monkeypatch.setattr(artifact, "locked", after_the_other)
    monkeypatch.setattr(foreign, "import_student", imported)
    assert foreign.packed_folder(tmp_path / "in") == folder
    assert artifact.exists(folder)


def test_an_import_replaces_nothing_but_an_import(tmp_path: Path) -> None:
    from bitdistill.stages.predict import Predictor

    packed = packed_folder(tmp_path, "llama_tied", "paper")
    export_transformers(packed, tmp_path / "hf")
    source, out = tmp_path / "hf", tmp_path / "out"
    before = {path.name: path.read_bytes() for path in source.iterdir()}
    for place in (source, tmp_path, tmp_path / "x/../hf"):
        with pytest.raises(ArtifactError, match=r"holds the source .*name another folder"):
            import_student(source, place)
    weights = (packed / "model.safetensors").read_bytes()
    with pytest.raises(ArtifactError, match="holds a packed student that no import made"):
        import_student(source, packed)
    assert (packed / "model.safetensors").read_bytes() == weights
    assert {path.name: path.read_bytes() for path in source.iterdir()} == before
    import_student(source, out)
    import_student(source, out)  # again, over the first
    # Neither knows a task, and says what to do instead
    with pytest.raises(
        ArtifactError, match="was imported, so no task is stored with it; use `bitdistill generate`"
    ):
        Predictor(out)
    with pytest.raises(ArtifactError, match="was imported, so no task"):
        bd.Engine(out).classify(["w4"])
    with pytest.raises(ArtifactError, match="an export for plain transformers; use the packed student"):
        Predictor(source)


def test_other_folders_are_not_taken_for_foreign_ones(tmp_path: Path) -> None:
    tiny_model("llama").save_pretrained(tmp_path / "plain")
    assert foreign_kind(tmp_path / "plain") is None
    assert foreign_kind(packed_folder(tmp_path, "llama_tied", "paper")) is None
    with pytest.raises(ModelError, match="full-precision models are a recipe's"):
        import_student(tmp_path / "plain", tmp_path / "out")


@pytest.mark.slow
def test_transformers_own_bitnet_gives_the_same_logits(tmp_path: Path) -> None:
    """BitNetForCausalLM with AutoBitLinear, as published; compiles at first use."""
    bitnet_checkpoint(tmp_path)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    for tensor in [*theirs.parameters(), *theirs.buffers()]:
        if (
            tensor.is_floating_point()
        ):  # transformers leaves stored bfloat16 beside float32 linears, and then fails
            tensor.data = tensor.data.float()
    with torch.no_grad():
        expected, ours = theirs(IDS).logits, bd.load(tmp_path)(IDS).logits
    assert (ours - expected).abs().max() < 0.02 * expected.abs().max()
    assert (ours.argmax(-1) == expected.argmax(-1)).float().mean() > 0.95
