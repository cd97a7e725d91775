"""The declarative layout equals the real model, parameter by parameter."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
from torch import nn

from bitdistill.errors import ModelError
from bitdistill.models.families import FAMILIES, Layout, family_of, layout_of

from .conftest import COMMON, TINY, tiny_config


def test_every_family_has_a_tiny_model() -> None:
    assert {model_type for model_type, _ in TINY.values()} == set(FAMILIES)


def test_layout_equals_the_real_model(model: Any) -> None:
    layout = layout_of(model.config.to_dict(), "config")
    named = {f"{lin.name}.weight": (lin.out_features, lin.in_features) for lin in layout.linears}
    named |= {kept.name: kept.shape for kept in layout.kept}
    assert named == {name: tuple(p.shape) for name, p in model.named_parameters()}
    assert layout.parameters == sum(p.numel() for p in model.parameters())
    linears = {n for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    assert {lin.name for lin in layout.linears} == linears - {"lm_head"}
    assert {lin.name for lin in layout.linears if lin.bias} == {
        n for n in linears if model.get_submodule(n).bias is not None
    }
    assert layout.tied == (model.lm_head.weight is model.model.embed_tokens.weight)
    assert layout.layer_types == tuple(getattr(model.config, "layer_types", None) or ["full_attention"] * 3)


def test_kinds_and_reasons() -> None:
    layout = layout_of(tiny_config("gemma3_text").to_dict(), "config")
    assert [lin.kind for lin in layout.linears[:7]] == ["q", "k", "v", "o", "gate", "up", "down"]
    assert layout.linears[7].layer == 1
    reasons = {kept.name: kept.reason for kept in layout.kept}
    assert reasons["model.embed_tokens.weight"] == "embedding"
    assert reasons["model.layers.2.pre_feedforward_layernorm.weight"] == "norm"
    assert reasons["model.layers.0.self_attn.q_norm.weight"] == "q/k-norm"
    assert "lm_head.weight" not in reasons
    assert layout.activation == "gelu_pytorch_tanh"
    biased = layout_of(tiny_config("qwen2", tie_word_embeddings=False).to_dict(), "config")
    reasons = {kept.name: kept.reason for kept in biased.kept}
    assert reasons["model.layers.0.self_attn.v_proj.bias"] == "bias"
    assert reasons["lm_head.weight"] == "head"


# Published sizes and parameter counts, so that the table is checked against the outside world too.
SIZES = (
    "model_type",
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "tie_word_embeddings",
)
KNOWN: dict[str, tuple[tuple[Any, ...], int]] = {
    "SmolLM2-135M": (("llama", 49152, 576, 1536, 30, 9, 3, None, True), 134_515_008),
    "Qwen2.5-0.5B": (("qwen2", 151936, 896, 4864, 24, 14, 2, None, True), 494_032_768),
    "Qwen3-0.6B": (("qwen3", 151936, 1024, 3072, 28, 16, 8, 128, True), 596_049_920),
    "Qwen3-4B": (("qwen3", 151936, 2560, 9728, 36, 32, 8, 128, True), 4_022_468_096),
    "Gemma3-270M": (("gemma3_text", 262144, 640, 2048, 18, 4, 1, 256, None), 268_098_176),
    "Gemma3-1B": (("gemma3_text", 262144, 1152, 6912, 26, 4, 1, 256, None), 999_885_952),
}


@pytest.mark.parametrize("name", sorted(KNOWN))
def test_published_parameter_counts(name: str) -> None:
    values, parameters = KNOWN[name]
    assert layout_of(dict(zip(SIZES, values, strict=True)), name).parameters == parameters


@pytest.mark.parametrize(
    ("config", "theta"),
    [
        ({"model_type": "llama", "rope_theta": 5e5}, 5e5),
        ({"model_type": "llama", "rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}, 5e5),
        ({"model_type": "llama"}, 1e4),
        ({"model_type": "gemma3_text", "rope_parameters": {"full_attention": {"rope_theta": 2e6}}}, 2e6),
        ({"model_type": "gemma3_text"}, 1e6),
    ],
)
def test_rope_theta_of_old_and_new_configs(config: dict[str, Any], theta: float) -> None:
    assert layout_of({**COMMON, **config}, "config").rope_theta == theta


def test_layer_types_without_the_key() -> None:
    def layout(**keys: Any) -> Layout:
        return layout_of({**COMMON, "num_hidden_layers": 7, **keys}, "config")

    assert layout(model_type="gemma3_text").layer_types.index("full_attention") == 5
    assert set(layout(model_type="qwen3", sliding_window=64, use_sliding_window=False).layer_types) == {
        "full_attention"
    }
    windowed = layout(model_type="qwen3", sliding_window=64, use_sliding_window=True, max_window_layers=5)
    assert windowed.layer_types == ("full_attention",) * 5 + ("sliding_attention",) * 2


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model_type": "mixtral"}, ["mixtral", "llama, qwen2, qwen3, gemma3_text"]),
        ({"model_type": None}, ["None is not supported"]),
        ({"model_type": "gemma3"}, ["multimodal", "gemma3_text"]),
        ({"hidden_size": None}, ["hidden_size is missing"]),
        ({"hidden_size": "44"}, ["hidden_size is '44'"]),
        ({"num_hidden_layers": 0}, ["num_hidden_layers is 0"]),
        ({"num_key_value_heads": 3}, ["4 is not a multiple of num_key_value_heads 3"]),
        ({"model_type": "gemma3_text", "attn_logit_softcapping": 50.0}, ["attn_logit_softcapping is 50.0"]),
        ({"model_type": "gemma3_text", "use_bidirectional_attention": True}, ["embedding model"]),
        ({"model_type": "bitnet", "head_dim": 16}, ["4 heads of 16 are not as wide as hidden_size 44"]),
    ],
)
def test_refusals_name_place_and_value(changes: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(ModelError) as caught:
        layout_of({**COMMON, "model_type": "llama", **changes}, "some/config.json")
    message = str(caught.value)
    assert message.startswith("some/config.json: ")
    assert "\n" not in message
    for word in words:
        assert word in message


def test_family_of_gives_the_entry() -> None:
    assert family_of({"model_type": "qwen3"}, "config") is FAMILIES["qwen3"]


def test_planning_imports_no_torch() -> None:
    code = (
        "import sys, bitdistill, bitdistill.models.families, bitdistill.models.load\n"
        "sys.exit(any(m in sys.modules for m in ('torch', 'transformers')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
