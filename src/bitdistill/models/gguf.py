"""Model and tokenizer out of a GGUF file: transformers dequantizes, we restore what its loader leaves out."""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING, Any

from bitdistill.errors import MissingDependencyError, ModelError
from bitdistill.models.gguf_header import GgufHeader

if TYPE_CHECKING:
    import torch


def load_model(header: GgufHeader, config: dict[str, Any], dtype: torch.dtype) -> Any:
    """Dequantize a GGUF file to a plain model.

    Args:
        header: from `read_gguf` (which has checked the file).
        config: from `config_from_gguf`.
        dtype: of the model's parameters.

    Raises:
        ModelError: tensors are missing or not finite.
        MissingDependencyError: accelerate is not installed.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from bitdistill.models.student import quiet

    if importlib.util.find_spec("accelerate") is None:
        raise MissingDependencyError(
            'reading GGUF files needs two more packages: pip install "bitdistill[gguf]"'
        )
    values = {k: v for k, v in config.items() if k not in ("model_type", "architectures")}
    hf_config = AutoConfig.for_model(config["model_type"], **values)
    hf_config.architectures = config["architectures"]
    with quiet():
        loaded, info = AutoModelForCausalLM.from_pretrained(
            str(header.path.parent),
            gguf_file=header.path.name,
            config=hf_config,
            dtype=torch.float32,
            local_files_only=True,
            output_loading_info=True,
        )
    if info["missing_keys"] or info["mismatched_keys"]:
        first = sorted(str(k) for k in [*info["missing_keys"], *info["mismatched_keys"]])[0]
        raise ModelError(
            f"{header.path}: no usable tensor for {first}; the GGUF file does not fit its metadata"
        )
    # The loaded model calls itself quantized and refuses to be saved; a fresh one takes its weights.
    plain = AutoModelForCausalLM.from_config(hf_config, attn_implementation="sdpa", dtype=torch.float32)
    plain.load_state_dict(loaded.state_dict(), strict=True)
    plain.tie_weights()
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        setattr(plain.generation_config, name, config[name])
    for name, parameter in plain.named_parameters():
        if not bool(torch.isfinite(parameter).all()):
            raise ModelError(f"{header.path}: {name} holds values that are not finite; fetch the file again")
        # Parameters only: `plain.to(dtype)` would round the rotary frequencies too.
        parameter.data = parameter.data.to(dtype)
    plain.config.dtype = dtype
    return plain


# How `tokenizer.ggml.pre` splits text before byte-level BPE; "" is byte-level's own regex (GPT-2).
_GPT2_SPLIT = ""
_QWEN2_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_LLAMA3_SPLIT = _QWEN2_SPLIT.replace(r"|\p{N}|", r"|\p{N}{1,3}|")
_PRE_TOKENIZERS = {
    "gpt-2": _GPT2_SPLIT,
    "smollm": _GPT2_SPLIT,
    "qwen2": _QWEN2_SPLIT,
    "deepseek-r1-qwen": _QWEN2_SPLIT,
    "llama-bpe": _LLAMA3_SPLIT,
    "llama3": _LLAMA3_SPLIT,
}
_SPECIAL_TOKENS = {
    "bos_token": "bos_token_id",
    "eos_token": "eos_token_id",
    "unk_token": "unknown_token_id",
    "pad_token": "padding_token_id",
}
_SINGLE_DIGITS = ("smollm",)  # split every digit off before the byte-level regex


def load_tokenizer(header: GgufHeader) -> Any:
    """The tokenizer in a GGUF file, with its pre-tokenizer set by name.

    transformers' loader drops that step for some names (SmolLM2's digits), so it is always put back here.

    Raises:
        ModelError: a byte-level tokenizer whose pre-tokenizer is unknown.
    """
    from tokenizers import Regex, pre_tokenizers
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    loaded = AutoTokenizer.from_pretrained(
        str(header.path.parent), gguf_file=header.path.name, local_files_only=True, trust_remote_code=False
    )
    backend = loaded.backend_tokenizer
    if header.metadata.get("tokenizer.ggml.model") == "gpt2":
        name = str(header.metadata.get("tokenizer.ggml.pre", "gpt-2"))
        if name not in _PRE_TOKENIZERS:
            raise ModelError(
                f"{header.path}: pre-tokenizer {name!r} is not known; set model.tokenizer to "
                "the model's own folder"
            )
        split = _PRE_TOKENIZERS[name]
        steps: list[Any] = [pre_tokenizers.Digits(individual_digits=True)] if name in _SINGLE_DIGITS else []
        if split:
            steps.append(pre_tokenizers.Split(Regex(split), behavior="isolated"))
        steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=not split))
        backend.pre_tokenizer = pre_tokenizers.Sequence(steps)
    # By id from the metadata: some transformers releases guess the special tokens by name, and wrong.
    special = {
        name: backend.id_to_token(header.metadata[f"tokenizer.ggml.{key}"])
        for name, key in _SPECIAL_TOKENS.items()
        if f"tokenizer.ggml.{key}" in header.metadata
    }
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        clean_up_tokenization_spaces=False,
        model_max_length=header.metadata[f"{header.metadata['general.architecture']}.context_length"],
        **special,
    )
    template = header.metadata.get("tokenizer.chat_template")
    if isinstance(template, str):
        tokenizer.chat_template = template
    return tokenizer
