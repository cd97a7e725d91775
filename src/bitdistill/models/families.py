"""Model families as data: one `Family` entry says which linears of a block become ternary and what stays.

No torch here: `bitdistill plan` describes a model from its config.json alone. A new family is one entry in
`FAMILIES` plus one tiny-model line in tests/models/conftest.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from bitdistill.errors import ModelError

Kind = Literal["q", "k", "v", "o", "gate", "up", "down"]
Reason = Literal["embedding", "norm", "q/k-norm", "bias", "head"]

MAX_LAYERS = 1024
"""A damaged config must not make the plan list millions of blocks."""

# Where each kind of linear sits in a block. Every supported family uses these names.
_LINEAR_NAMES: dict[Kind, str] = {
    "q": "self_attn.q_proj",
    "k": "self_attn.k_proj",
    "v": "self_attn.v_proj",
    "o": "self_attn.o_proj",
    "gate": "mlp.gate_proj",
    "up": "mlp.up_proj",
    "down": "mlp.down_proj",
}


@dataclass(frozen=True)
class Linear:
    """A linear layer of a transformer block: exact module name and shape (weight is [out, in])."""

    name: str
    in_features: int
    out_features: int
    bias: bool
    kind: Kind
    layer: int


@dataclass(frozen=True)
class Kept:
    """A parameter that stays in high precision, and why."""

    name: str
    shape: tuple[int, ...]
    reason: Reason

    @property
    def size(self) -> int:
        """Number of elements."""
        total = 1
        for extent in self.shape:
            total *= extent
        return total


@dataclass(frozen=True)
class Layout:
    """A concrete model: every parameter by exact name. Sizes count elements; a tied head counts once."""

    family: str
    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    tied: bool
    activation: str
    rope_theta: float
    max_positions: int | None
    layer_types: tuple[str, ...]
    """`full_attention` or `sliding_attention`, one a layer."""
    linears: tuple[Linear, ...]
    kept: tuple[Kept, ...]

    @property
    def ternary_parameters(self) -> int:
        """Weights of all block linears, biases not counted."""
        return sum(linear.in_features * linear.out_features for linear in self.linears)

    @property
    def kept_parameters(self) -> int:
        """Everything that stays in high precision."""
        return sum(kept.size for kept in self.kept)

    @property
    def parameters(self) -> int:
        """The model's parameter count before SubLN is added."""
        return self.ternary_parameters + self.kept_parameters


@dataclass(frozen=True)
class Family:
    """What differs between families. `bias` maps a kind to True or to the config key that decides."""

    model_type: str
    architecture: str
    examples: str
    block_norms: tuple[str, ...]
    gguf_architecture: str
    qk_norm: bool = False
    sub_norms: bool = False
    """Norms of its own before the attention output and FFN down projections, where the paper puts SubLN."""
    bias: Mapping[Kind, bool | str] = field(default_factory=dict)
    activation_key: str = "hidden_act"
    defaults: Mapping[str, Any] = field(default_factory=dict)
    refused: Mapping[str, str] = field(default_factory=dict)
    """Config keys that must be unset, each with the reason."""

    def layout(self, config: Mapping[str, Any], where: str = "config") -> Layout:
        """Every parameter of the model that `config` (the dict of config.json) describes.

        Raises:
            ModelError: a key is missing, has a value that cannot be, or switches on an unsupported variant.
        """
        for key, why in self.refused.items():
            if config.get(key):
                raise ModelError(f"{where}: {key} is {config[key]!r}, {why}; choose another model")
        sizes = _sizes(self, config, where)
        linears = tuple(
            linear
            for layer in range(sizes["num_hidden_layers"])
            for linear in _block(self, config, sizes, layer)
        )
        return Layout(
            family=self.model_type,
            layers=sizes["num_hidden_layers"],
            hidden=sizes["hidden_size"],
            intermediate=sizes["intermediate_size"],
            heads=sizes["num_attention_heads"],
            kv_heads=sizes["num_key_value_heads"],
            head_dim=sizes["head_dim"],
            vocab=sizes["vocab_size"],
            tied=_tied(self, config),
            activation=str(config.get(self.activation_key) or self.defaults[self.activation_key]),
            rope_theta=_rope_theta(self, config),
            max_positions=config.get("max_position_embeddings"),
            layer_types=_layer_types(config, sizes["num_hidden_layers"]),
            linears=linears,
            kept=_kept(self, sizes, linears, _tied(self, config)),
        )


_LLAMA_NORMS = ("input_layernorm", "post_attention_layernorm")
_GEMMA_NORMS = (*_LLAMA_NORMS, "pre_feedforward_layernorm", "post_feedforward_layernorm")
_BY_ATTENTION_BIAS: dict[Kind, bool | str] = dict.fromkeys(("q", "k", "v", "o"), "attention_bias")

FAMILIES: dict[str, Family] = {
    "llama": Family(
        model_type="llama",
        architecture="LlamaForCausalLM",
        examples="Llama 2 and 3, SmolLM2, TinyLlama",
        block_norms=_LLAMA_NORMS,
        gguf_architecture="llama",
        bias=_BY_ATTENTION_BIAS | {"gate": "mlp_bias", "up": "mlp_bias", "down": "mlp_bias"},
        defaults={"hidden_act": "silu", "tie_word_embeddings": False, "rope_theta": 10_000.0},
    ),
    "qwen2": Family(
        model_type="qwen2",
        architecture="Qwen2ForCausalLM",
        examples="Qwen2, Qwen2.5",
        block_norms=_LLAMA_NORMS,
        gguf_architecture="qwen2",
        bias={"q": True, "k": True, "v": True},
        defaults={"hidden_act": "silu", "tie_word_embeddings": False, "rope_theta": 10_000.0},
    ),
    "qwen3": Family(
        model_type="qwen3",
        architecture="Qwen3ForCausalLM",
        examples="Qwen3 (dense)",
        block_norms=_LLAMA_NORMS,
        gguf_architecture="qwen3",
        qk_norm=True,
        bias=_BY_ATTENTION_BIAS,
        defaults={
            "hidden_act": "silu",
            "head_dim": 128,
            "tie_word_embeddings": False,
            "rope_theta": 10_000.0,
        },
    ),
    "gemma3_text": Family(
        model_type="gemma3_text",
        architecture="Gemma3ForCausalLM",
        examples="Gemma 3 270M and 1B (text)",
        block_norms=_GEMMA_NORMS,
        gguf_architecture="gemma3",
        qk_norm=True,
        bias=_BY_ATTENTION_BIAS,
        activation_key="hidden_activation",
        defaults={
            "hidden_activation": "gelu_pytorch_tanh",
            "head_dim": 256,
            "tie_word_embeddings": True,
            "rope_theta": 1_000_000.0,
            "num_key_value_heads": 4,
        },
        refused={
            "attn_logit_softcapping": "which scaled-dot-product attention cannot do",
            "use_bidirectional_attention": "so this is an embedding model, not a causal one",
        },
    ),
    "bitnet": Family(
        model_type="bitnet",
        architecture="BitNetForCausalLM",
        examples="BitNet b1.58 2B",
        block_norms=_LLAMA_NORMS,
        gguf_architecture="bitnet-b1.58",
        sub_norms=True,
        bias=_BY_ATTENTION_BIAS,
        defaults={"hidden_act": "relu2", "tie_word_embeddings": False, "rope_theta": 500_000.0},
    ),
}


def family_of(config: Mapping[str, Any], where: str) -> Family:
    """The family of a config.json dict.

    Args:
        config: the parsed config.json.
        where: file or name for the message.

    Raises:
        ModelError: an unsupported `model_type`; the message lists the supported ones.
    """
    model_type = config.get("model_type")
    if isinstance(model_type, str) and model_type in FAMILIES:
        return FAMILIES[model_type]
    if model_type == "gemma3":
        raise ModelError(
            f"{where}: model_type 'gemma3' is the multimodal model; save its text part (Gemma3ForCausalLM, "
            "model_type 'gemma3_text') to a folder of its own, or use Gemma 3 270M or 1B"
        )
    raise ModelError(
        f"{where}: model_type {model_type!r} is not supported; supported are {', '.join(FAMILIES)}"
    )


def layout_of(config: Mapping[str, Any], where: str) -> Layout:
    """`family_of(config).layout(config)`."""
    return family_of(config, where).layout(config, where)


def _sizes(family: Family, config: Mapping[str, Any], where: str) -> dict[str, int]:
    """The integers that fix every shape, checked."""
    sizes: dict[str, int] = {}
    for key in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"):
        sizes[key] = _positive(config.get(key), key, where)
    if sizes["num_hidden_layers"] > MAX_LAYERS:
        layers = sizes["num_hidden_layers"]
        raise ModelError(f"{where}: num_hidden_layers is {layers}, over {MAX_LAYERS}; the config is damaged")
    heads = sizes["num_attention_heads"]
    kv_heads = config.get("num_key_value_heads")
    sizes["num_key_value_heads"] = _positive(
        family.defaults.get("num_key_value_heads", heads) if kv_heads is None else kv_heads,
        "num_key_value_heads",
        where,
    )
    if heads % sizes["num_key_value_heads"]:
        raise ModelError(
            f"{where}: num_attention_heads {heads} is not a multiple of num_key_value_heads "
            f"{sizes['num_key_value_heads']}; the config is damaged"
        )
    head_dim = config.get("head_dim") or family.defaults.get("head_dim") or sizes["hidden_size"] // heads
    sizes["head_dim"] = _positive(head_dim, "head_dim", where)
    if family.sub_norms and heads * head_dim != sizes["hidden_size"]:
        raise ModelError(
            f"{where}: {heads} heads of {head_dim} are not as wide as hidden_size {sizes['hidden_size']}, which "
            f"{family.model_type}'s attention norm needs; the config is damaged"
        )
    return sizes


def _positive(value: Any, key: str, where: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        shown = "missing" if value is None else f"{value!r}, not a positive integer"
        raise ModelError(f"{where}: {key} is {shown}; the config is damaged or not a causal language model's")
    return value


def _block(family: Family, config: Mapping[str, Any], sizes: Mapping[str, int], layer: int) -> list[Linear]:
    """The seven linears of one block, in the order of the forward pass."""
    hidden, inner = sizes["hidden_size"], sizes["intermediate_size"]
    queries = sizes["num_attention_heads"] * sizes["head_dim"]
    keys = sizes["num_key_value_heads"] * sizes["head_dim"]
    shapes: dict[Kind, tuple[int, int]] = {
        "q": (hidden, queries),
        "k": (hidden, keys),
        "v": (hidden, keys),
        "o": (queries, hidden),
        "gate": (hidden, inner),
        "up": (hidden, inner),
        "down": (inner, hidden),
    }
    block = []
    for kind, (i, o) in shapes.items():
        rule = family.bias.get(kind, False)
        bias = bool(config.get(rule, False)) if isinstance(rule, str) else rule
        block.append(Linear(f"model.layers.{layer}.{_LINEAR_NAMES[kind]}", i, o, bias, kind, layer))
    return block


def _kept(
    family: Family, sizes: Mapping[str, int], linears: tuple[Linear, ...], tied: bool
) -> tuple[Kept, ...]:
    """Embedding, norms, biases and head with shapes. A tied head is the embedding and has no entry."""
    hidden, vocab, head_dim = sizes["hidden_size"], sizes["vocab_size"], sizes["head_dim"]
    kept = [Kept("model.embed_tokens.weight", (vocab, hidden), "embedding")]
    for layer in range(sizes["num_hidden_layers"]):
        block = f"model.layers.{layer}"
        kept += [Kept(f"{block}.{norm}.weight", (hidden,), "norm") for norm in family.block_norms]
        if family.qk_norm:
            kept += [
                Kept(f"{block}.self_attn.{n}.weight", (head_dim,), "q/k-norm") for n in ("q_norm", "k_norm")
            ]
        if family.sub_norms:
            kept += [
                Kept(f"{block}.self_attn.attn_sub_norm.weight", (hidden,), "norm"),
                Kept(f"{block}.mlp.ffn_sub_norm.weight", (sizes["intermediate_size"],), "norm"),
            ]
    kept += [Kept(f"{lin.name}.bias", (lin.out_features,), "bias") for lin in linears if lin.bias]
    kept.append(Kept("model.norm.weight", (hidden,), "norm"))
    if not tied:
        kept.append(Kept("lm_head.weight", (vocab, hidden), "head"))
    return tuple(kept)


def _tied(family: Family, config: Mapping[str, Any]) -> bool:
    tied = config.get("tie_word_embeddings")
    return bool(family.defaults["tie_word_embeddings"] if tied is None else tied)


def _rope_theta(family: Family, config: Mapping[str, Any]) -> float:
    """`rope_parameters` (transformers 5; nested by layer type for Gemma 3) or `rope_theta` (older)."""
    parameters = config.get("rope_parameters") or {}
    full = parameters.get("full_attention")
    theta = (full if isinstance(full, Mapping) else parameters).get("rope_theta")
    if theta is None:
        theta = config.get("rope_theta")
    return float(family.defaults["rope_theta"] if theta is None else theta)


def _layer_types(config: Mapping[str, Any], layers: int) -> tuple[str, ...]:
    types = config.get("layer_types")
    if types:
        return tuple(str(t) for t in types)
    if config.get("model_type") == "gemma3_text":
        pattern = config.get("sliding_window_pattern") or config.get("_sliding_window_pattern") or 6
        return tuple(
            "full_attention" if (i + 1) % pattern == 0 else "sliding_attention" for i in range(layers)
        )
    if config.get("use_sliding_window") and config.get("sliding_window"):
        first = config.get("max_window_layers", 28)
        return tuple("sliding_attention" if i >= first else "full_attention" for i in range(layers))
    return ("full_attention",) * layers
