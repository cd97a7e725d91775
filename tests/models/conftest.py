"""Tiny random models of every family, with sizes that fit no block of 4, and a tokenizer to go with them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

VOCAB = 101
COMMON: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 44,
    "intermediate_size": 70,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": None,
    "eos_token_id": 1,
    "pad_token_id": 2,
}
GEMMA_LAYERS = ["sliding_attention", "sliding_attention", "full_attention"]
# name -> (model_type, what differs); one line a family, and one for each variant that changes the layout
TINY: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {"head_dim": 10}),
    "llama_tied": ("llama", {"head_dim": 10, "tie_word_embeddings": True}),
    "llama_biases": ("llama", {"head_dim": 10, "attention_bias": True, "mlp_bias": True}),
    "qwen2": ("qwen2", {"hidden_size": 40, "tie_word_embeddings": True}),
    "qwen3": ("qwen3", {"head_dim": 18}),
    "gemma3_text": ("gemma3_text", {"head_dim": 18, "sliding_window": 8, "layer_types": GEMMA_LAYERS}),
    "bitnet": ("bitnet", {"hidden_size": 40, "tie_word_embeddings": True}),
}


def tiny_config(name: str, **changes: Any) -> Any:
    model_type, own = TINY[name]
    return AutoConfig.for_model(model_type, **{**COMMON, **own, **changes})


def tiny_model(name: str, seed: int = 0, **changes: Any) -> Any:
    """A random model in float32; norms, biases and weights are all of order one, so nothing hides."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(tiny_config(name, **changes), attn_implementation="sdpa").eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.3 * torch.randn_like(parameter))
            else:
                parameter.copy_(torch.randn_like(parameter) / parameter.shape[1] ** 0.5)
    return model


def make_tokenizer() -> Any:
    words = {f"w{i}": i for i in range(VOCAB)}
    backend = Tokenizer(models.WordLevel(words, unk_token="w0"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="w0", eos_token="w1", pad_token="w2"
    )
    tokenizer.chat_template = "{% for m in messages %}w3 {{ m['content'] }} {% endfor %}"
    return tokenizer


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(params=sorted(TINY))
def tiny_name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def model(tiny_name: str) -> Any:
    return tiny_model(tiny_name)


@pytest.fixture
def tokenizer() -> Any:
    return make_tokenizer()


@pytest.fixture
def ids() -> torch.Tensor:
    return torch.randint(3, VOCAB, (2, 13), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def make_model() -> Callable[..., Any]:
    return tiny_model
