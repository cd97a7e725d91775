"""Stage 1: exact names, an untouched teacher, parity, gradients and calibrated gains."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import bitdistill as bd
from bitdistill.config import RefineConfig
from bitdistill.errors import ModelError
from bitdistill.models import surgery
from bitdistill.models.surgery import SurgeryPlan
from bitdistill.quant.linear import BitLinear

from .conftest import tiny_config, tiny_model

BLOCK = [f"self_attn.{kind}_proj" for kind in "qkvo"] + [
    f"mlp.{kind}_proj" for kind in ("gate", "up", "down")
]
UP = "model.layers.0.mlp.up_proj"
NO_SUBLN = RefineConfig(subln="none")


@pytest.mark.parametrize(
    ("subln", "with_norm"),
    [("paper", {"self_attn.o_proj", "mlp.down_proj"}), ("every_linear", set(BLOCK)), ("none", set())],
)
def test_plan_names_every_block_linear(tiny_name: str, subln: Any, with_norm: set[str]) -> None:
    plan = surgery.plan(tiny_config(tiny_name), RefineConfig(subln=subln))
    if tiny_name == "bitnet" and subln == "paper":
        with_norm = set()  # the model has norms of its own there
    assert list(plan.replace) == [f"model.layers.{layer}.{name}" for layer in range(3) for name in BLOCK]
    assert {n for n, s in plan.replace.items() if s.subln} == {
        f"model.layers.{layer}.{name}" for layer in range(3) for name in with_norm
    }
    assert plan.keep["lm_head"] == "head"
    assert plan.keep["model.embed_tokens"] == "embedding"
    assert plan.keep["model.layers.2.post_attention_layernorm"] == "norm"
    assert plan.replace.keys().isdisjoint(plan.keep)


def test_plan_from_config_json_equals_plan_from_the_model(model: Any, tmp_path: Path) -> None:
    model.config.save_pretrained(tmp_path)
    from_file = surgery.plan(json.loads((tmp_path / "config.json").read_text()), RefineConfig())
    assert from_file == surgery.plan(model.config, RefineConfig())
    for name, spec in from_file.replace.items():
        linear = model.get_submodule(name)
        assert (spec.in_features, spec.out_features) == (linear.in_features, linear.out_features)
        assert spec.bias == (linear.bias is not None)


def test_plan_survives_json(tiny_name: str) -> None:
    plan = surgery.plan(tiny_config(tiny_name), RefineConfig())
    assert SurgeryPlan.from_json(json.loads(json.dumps(plan.to_json()))) == plan


@pytest.mark.parametrize(
    "damage",
    [
        lambda p: None,
        lambda p: p | {"replace": []},
        lambda p: p | {"quantize_activations": "yes"},
        lambda p: p | {"replace": {"a": {"in_features": 4}}},
        lambda p: p | {"replace": {"a": p["replace"][next(iter(p["replace"]))] | {"in_features": -4}}},
        lambda p: p | {"replace": {"a": p["replace"][next(iter(p["replace"]))] | {"subln": 1}}},
        lambda p: p | {"replace": {"a": p["replace"][next(iter(p["replace"]))] | {"other": 1}}},
        lambda p: {k: v for k, v in p.items() if k != "keep"},
    ],
)
def test_malformed_plans_are_refused(damage: Any) -> None:
    plan = surgery.plan(tiny_config("llama"), RefineConfig()).to_json()
    with pytest.raises(ModelError, match=r"^here: not a surgery plan"):
        SurgeryPlan.from_json(damage(plan), "here")


def test_apply_leaves_the_teacher_alone(model: Any) -> None:
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    student = surgery.apply(surgery.plan(model.config, RefineConfig()), model)
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(1.0)
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert not any(isinstance(m, BitLinear) for m in model.modules())
    assert not hasattr(model.config, "quantization_config")


def test_student_is_plain_while_quantization_is_off_and_subln_absent(model: Any, ids: Tensor) -> None:
    student = surgery.apply(surgery.plan(model.config, NO_SUBLN), model)
    quantized = student(ids).logits
    surgery.set_quantization(student, False)
    assert torch.equal(student(ids).logits, model(ids).logits)
    surgery.set_quantization(student, True)
    assert torch.equal(student(ids).logits, quantized)
    assert not torch.equal(quantized, model(ids).logits)


def test_latents_are_float32_and_tying_is_kept(tiny_name: str) -> None:
    source = tiny_model(tiny_name).to(torch.bfloat16)
    student = surgery.apply(surgery.plan(source.config, RefineConfig()), source)
    assert {p.dtype for p in student.parameters()} == {torch.float32}
    name = "model.layers.1.mlp.up_proj"
    assert torch.equal(student.get_submodule(name).weight, source.get_submodule(name).weight.float())
    assert {p.dtype for p in source.parameters()} == {torch.bfloat16}
    tied = source.config.tie_word_embeddings
    assert (student.lm_head.weight is student.model.embed_tokens.weight) == tied


def test_gradient_reaches_every_parameter(model: Any, ids: Tensor) -> None:
    student = bd.refine(model, ids)
    student(ids, labels=ids).loss.backward()
    kinds = set()
    for name, parameter in student.named_parameters():
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all(), name
        # A key bias shifts all scores of a query alike, so its true gradient is zero up to rounding.
        if not name.endswith("k_proj.bias"):
            assert parameter.grad.abs().max() > 0, name
        kinds.add(name.split(".")[-2])
    normed = "attn_sub_norm" if model.config.model_type == "bitnet" else "subln"
    assert {normed, "embed_tokens", "q_proj", "down_proj", "norm"} <= kinds


def test_modes_and_hooks_follow_the_source() -> None:
    model = tiny_model("llama").train()
    student = surgery.apply(surgery.plan(model.config, RefineConfig()), model)
    assert all(m.training for m in student.modules())


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda r: r | {"model.layers.9.mlp.up_proj": r[UP]}, "no such module"),
        (lambda r: r | {"model.layers.0.mlp": r[UP]}, "is a LlamaMLP, not a Linear"),
        (lambda r: r | {UP: r["model.layers.0.mlp.down_proj"]}, r"\(44, 70, False\)"),
        (lambda r: {n: s for n, s in r.items() if n != "model.layers.1.mlp.up_proj"}, "does not name"),
    ],
)
def test_a_plan_that_does_not_fit_is_refused(change: Any, words: str) -> None:
    model = tiny_model("llama")
    good = surgery.plan(model.config, RefineConfig())
    bad = SurgeryPlan(good.family, good.subln, True, change(good.replace), good.keep)
    with pytest.raises(ModelError, match=words):
        surgery.apply(bad, model)


def test_foreign_and_repeated_surgery_is_refused() -> None:
    model = tiny_model("llama")
    plan = surgery.plan(model.config, RefineConfig())
    with pytest.raises(ModelError, match="the plan is for qwen3, the model is llama"):
        surgery.apply(surgery.plan(tiny_config("qwen3"), RefineConfig()), model)
    with pytest.raises(ModelError, match="surgery done already"):
        surgery.apply(plan, surgery.apply(plan, model))


def inputs_of(model: Any, name: str, ids: Tensor) -> Tensor:
    seen: list[Tensor] = []
    handle = model.get_submodule(name).register_forward_pre_hook(lambda _, x: seen.append(x[0].detach()))
    with torch.no_grad():
        model(ids)
    handle.remove()
    return seen[0]


@pytest.mark.parametrize("subln", ["paper", "every_linear"])
def test_calibrated_gain_is_the_rms_of_the_source_signal(model: Any, subln: Any) -> None:
    rows = torch.randint(0, 101, (7, 11), generator=torch.Generator().manual_seed(5))  # not a multiple of 4
    plan = surgery.plan(model.config, RefineConfig(subln=subln))
    student = surgery.apply(plan, model.train())
    gains = surgery.calibrate_gains(student, model, rows)
    assert model.training
    assert set(gains) == {n for n, s in plan.replace.items() if s.subln}
    for name, gain in gains.items():
        signal = inputs_of(model, name, rows).double()
        assert gain == pytest.approx(signal.square().mean().sqrt().item(), rel=1e-6)
        weight = student.get_submodule(name).subln.weight
        assert torch.equal(weight, torch.full_like(weight, gain))
        assert not model.get_submodule(name)._forward_pre_hooks
    # The first block sees the source's own signal, so its normalised signal has the source's magnitude.
    surgery.set_quantization(student, False)
    first = "model.layers.0.self_attn.o_proj"
    if subln == "paper" and plan.replace[first].subln:
        layer = student.get_submodule(first)
        normed = layer.subln(inputs_of(student, first, rows))
        assert normed.square().mean().sqrt().item() == pytest.approx(gains[first], rel=1e-4)


def test_padding_does_not_count_in_gains(ids: Tensor) -> None:
    model = tiny_model("qwen3")
    plan = surgery.plan(model.config, RefineConfig())
    padded = torch.cat([ids, torch.full((2, 6), 2)], dim=1)
    mask = torch.arange(19).expand(2, 19) < 13
    plain = surgery.calibrate_gains(surgery.apply(plan, model), model, ids)
    masked = surgery.calibrate_gains(surgery.apply(plan, model), model, padded, mask)
    assert masked == pytest.approx(plain, rel=1e-6)
    careless = surgery.calibrate_gains(surgery.apply(plan, model), model, padded)
    assert careless != pytest.approx(plain, rel=1e-3)


def test_dead_signals_are_refused(ids: Tensor) -> None:
    model = tiny_model("llama")
    nn.init.zeros_(model.model.layers[1].mlp.up_proj.weight)
    student = surgery.apply(surgery.plan(model.config, RefineConfig()), model)
    with pytest.raises(ModelError, match=r"model\.layers\.1\.mlp\.down_proj: RMS of its input is 0\.0"):
        surgery.calibrate_gains(student, model, ids)


def test_set_quantization_needs_a_student() -> None:
    with pytest.raises(ModelError, match="no BitLinear"):
        surgery.set_quantization(tiny_model("llama"), True)


def test_refine_in_one_call(ids: Tensor) -> None:
    model = tiny_model("gemma3_text")
    student = bd.refine(model, ids)
    plan = surgery.plan(model.config, RefineConfig())
    by_hand = surgery.apply(plan, model)
    surgery.calibrate_gains(by_hand, model, ids)
    assert torch.equal(student(ids).logits, by_hand(ids).logits)
    with pytest.raises(ModelError, match="need calibration_ids"):
        bd.refine(model)
    ones = bd.refine(model, gains="ones").get_submodule("model.layers.0.mlp.down_proj").subln.weight
    assert torch.equal(ones, torch.ones_like(ones))
    ablation = bd.refine(model, subln="none", quantize_activations=False)
    assert not ablation.get_submodule("model.layers.0.mlp.down_proj").quantize_activations


def test_subln_takes_the_models_epsilon_and_keeps_it_on_disk(tmp_path: Path) -> None:
    from bitdistill.models.student import load_student, pack, save_student

    from .conftest import make_tokenizer

    source = tiny_model("llama", rms_norm_eps=3e-3)
    plan = surgery.plan(source.config, RefineConfig())
    student = surgery.apply(plan, source)
    for kind, model in (("student", student), ("packed", pack(student, "float32"))):
        save_student(model, make_tokenizer(), tmp_path / kind, kind=kind, plan=plan, recipe={}, extra={})  # type: ignore[arg-type]
        loaded, _, _ = load_student(tmp_path / kind)
        norms = [m for n, m in loaded.named_modules() if n.endswith(".subln")]
        assert len(norms) == 6
        assert {m.eps for m in norms} == {3e-3}
