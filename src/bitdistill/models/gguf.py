"""Model and tokenizer out of a GGUF file.

Tensors are dequantized by the `gguf` package, from places in the file that `read_gguf` has checked. Every
tensor of the layout must be there, and no other.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bitdistill.errors import MissingDependencyError, ModelError
from bitdistill.models.families import Layout, layout_of
from bitdistill.models.gguf_header import I2_S, GgufHeader, type_sizes
from bitdistill.models.tokenizer import quiet_on_length

if TYPE_CHECKING:
    import torch
    from torch import Tensor

# Names inside a block (and outside, without a layer) -> llama.cpp's.
_NAMES = {
    "embed_tokens": "token_embd",
    "norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "self_attn.attn_sub_norm": "attn_sub_norm",
    "mlp.ffn_sub_norm": "ffn_sub_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_GEMMA_NAMES = _NAMES | {
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}


def load_model(header: GgufHeader, config: dict[str, Any], dtype: torch.dtype) -> Any:
    """Dequantize a GGUF file to a plain model.

    Args:
        header: from `read_gguf` (which has checked the file).
        config: from `config_from_gguf`.
        dtype: of the model's parameters.

    Raises:
        ModelError: a tensor is missing, of another shape, unknown, or not finite.
        MissingDependencyError: the `gguf` package is not installed.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    values = {k: v for k, v in config.items() if k not in ("model_type", "architectures")}
    hf_config = AutoConfig.for_model(config["model_type"], **values)
    hf_config.architectures = config["architectures"]
    model = AutoModelForCausalLM.from_config(hf_config, attn_implementation="sdpa", dtype=torch.float32)
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, tensor in _tensors(header, layout_of(config, str(header.path))):
            if not bool(torch.isfinite(tensor).all()):
                raise ModelError(
                    f"{header.path}: {name} holds values that are not finite; fetch the file again"
                )
            # `parameter.data`, not `model.to(dtype)`: that would round the rotary frequencies too.
            parameters[name].data = tensor.to(dtype)
    model.tie_weights()
    model.config.dtype = dtype
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        setattr(model.generation_config, name, config[name])
    return model


def _tensors(header: GgufHeader, layout: Layout) -> Iterator[tuple[str, Tensor]]:
    """Every parameter of the layout by its Hugging Face name, float32, in Hugging Face's conventions."""
    shapes: dict[str, tuple[int, ...]] = {
        f"{lin.name}.weight": (lin.out_features, lin.in_features) for lin in layout.linears
    }
    shapes |= {kept.name: kept.shape for kept in layout.kept}
    names = {gguf_name(name, layout.family): name for name in shapes}
    if unknown := header.tensors.keys() - names.keys():
        raise ModelError(f"{header.path}: tensor {min(unknown)} has no place in a {layout.family} model")
    for theirs, ours in names.items():
        if theirs not in header.tensors:
            raise ModelError(f"{header.path}: tensor {theirs} is missing; the GGUF file is incomplete")
        tensor = dequantize(header, theirs)
        if tuple(tensor.shape) != shapes[ours]:
            raise ModelError(f"{header.path}: {theirs} is {list(tensor.shape)}, not {list(shapes[ours])}")
        if layout.family == "llama" and ".attn_q." in theirs:
            tensor = to_halves(tensor, layout.heads)
        elif layout.family == "llama" and ".attn_k." in theirs:
            tensor = to_halves(tensor, layout.kv_heads)
        elif layout.family == "gemma3_text" and theirs.endswith("norm.weight"):
            tensor = tensor - 1  # llama.cpp stores what the norm multiplies by, transformers adds the 1
        yield ours, tensor


def gguf_name(name: str, family: str) -> str:
    """llama.cpp's name of a parameter, for example `model.norm.weight` -> `output_norm.weight`."""
    table = _GEMMA_NAMES if family == "gemma3_text" else _NAMES
    module, kind = name.removeprefix("model.").rsplit(".", 1)
    if module.startswith("layers."):
        _, layer, inner = module.split(".", 2)
        return f"blk.{layer}.{table[inner]}.{kind}"
    return f"{table[module]}.{kind}"


def to_halves(tensor: Tensor, heads: int) -> Tensor:
    """Undo llama.cpp's interleaving of the two rotary halves of each head's rows (weights and biases)."""
    size = tensor.shape[0] // heads
    return tensor.reshape(heads, size // 2, 2, -1).transpose(1, 2).reshape(tensor.shape)


def from_halves(tensor: Tensor, heads: int) -> Tensor:
    """The inverse of `to_halves`: each head's rows as llama.cpp's `llama` wants them, halves interleaved."""
    size = tensor.shape[0] // heads
    return tensor.reshape(heads, 2, size // 2, -1).transpose(1, 2).reshape(tensor.shape).contiguous()


def dequantize(header: GgufHeader, name: str) -> Tensor:
    """One tensor as float32, in torch's order of dimensions.

    Raises:
        ModelError: a type that cannot be dequantized.
        MissingDependencyError: the `gguf` package is not installed.
    """
    try:
        from gguf.constants import GGMLQuantizationType
        from gguf.quants import dequantize as from_blocks
    except ImportError:
        raise MissingDependencyError(
            'reading GGUF files needs two more packages: pip install "bitdistill[gguf]"'
        ) from None
    import numpy as np
    import torch

    entry = header.tensors[name]
    if entry.ggml_type == I2_S:
        raise ModelError(
            f"{header.path}: {name} is ternary (I2_S); turn the file into a student with `bitdistill import`"
        )
    block, size = type_sizes()[entry.ggml_type]
    shape = tuple(reversed(entry.dims))
    row_bytes = shape[-1] // block * size
    raw = np.memmap(header.path, np.uint8, "r", header.data_start + entry.offset, (*shape[:-1], row_bytes))
    kind = GGMLQuantizationType(entry.ggml_type)
    try:
        values = from_blocks(np.array(raw), kind)
    except NotImplementedError:
        raise ModelError(
            f"{header.path}: {name} has type {kind.name}, which cannot be dequantized here; use another file"
        ) from None
    return torch.from_numpy(np.array(values, dtype=np.float32)).reshape(shape)


# How `tokenizer.ggml.pre` splits text before byte-level BPE; "" is byte-level's own regex (GPT-2).
_GPT2_SPLIT = ""
_QWEN2_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_LLAMA3_SPLIT = _QWEN2_SPLIT.replace(r"|\p{N}|", r"|\p{N}{1,3}|")
PRE_TOKENIZERS = {
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
SINGLE_DIGITS = ("smollm",)  # split every digit off before the byte-level regex
IGNORE_MERGES = ("llama-bpe", "llama3")  # a word that is a token is not split into mergeable parts


def _whole_pieces(path: Path) -> list[int]:
    """Ids of the pieces that no merge makes and none takes apart (Gemma's HTML tags)."""
    from gguf import GGUFReader, TokenType

    field = GGUFReader(path).fields.get("tokenizer.ggml.token_type")
    kinds = [] if field is None else field.contents()
    return [index for index, kind in enumerate(kinds) if kind == TokenType.USER_DEFINED]


def _as_bpe(backend: Any, whole: Sequence[int] = ()) -> None:
    """A SentencePiece BPE vocabulary that was loaded as a unigram model, as BPE, in place; `whole` as they are.

    transformers 5.17 loads Gemma's so: its scores are ranks, and the likeliest split by ranks is one into small pieces
    (" yes" as two, texts twice as long). It also spells the byte of a tab as a tab, which has a piece of its own.
    """
    from tokenizers import AddedToken, models
    from transformers.tokenization_utils_base import generate_merges

    model = json.loads(backend.to_str())["model"]
    pieces = [piece for piece, _ in model["vocab"]]
    last = {piece: index for index, piece in enumerate(pieces)}
    pieces = [
        piece if last[piece] == index else f"<0x{ord(piece):02X}>" if len(piece) == 1 else piece
        for index, piece in enumerate(pieces)
    ]
    vocabulary = {piece: index for index, piece in enumerate(pieces)}
    # By place, which is the order of training; Gemma's scores are not quite
    merges = generate_merges(vocabulary, {piece: float(-index) for piece, index in vocabulary.items()})
    backend.model = models.BPE(
        vocab=vocabulary,
        merges=merges,
        unk_token=pieces[model["unk_id"]],
        fuse_unk=True,
        byte_fallback=bool(model.get("byte_fallback")),
    )
    backend.add_tokens([AddedToken(pieces[index], normalized=False) for index in whole])


def load_tokenizer(header: GgufHeader) -> Any:
    """The tokenizer in a GGUF file, with its pre-tokenizer set by name.

    transformers' loader drops that step for some names (SmolLM2's digits), so it is always put back here.

    Raises:
        ModelError: a byte-level tokenizer whose pre-tokenizer is unknown.
    """
    from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    loaded = PreTrainedTokenizerFast.from_pretrained(
        str(header.path.parent), gguf_file=header.path.name, local_files_only=True
    )
    backend = loaded.backend_tokenizer
    kind = header.metadata.get("tokenizer.ggml.model")
    if kind == "llama" and isinstance(backend.model, models.Unigram):
        _as_bpe(backend, _whole_pieces(header.path))
    if kind == "gpt2":
        name = str(header.metadata.get("tokenizer.ggml.pre", "gpt-2"))
        if name not in PRE_TOKENIZERS:
            raise ModelError(
                f"{header.path}: pre-tokenizer {name!r} is not known; set model.tokenizer to "
                "the model's own folder"
            )
        split = PRE_TOKENIZERS[name]
        steps: list[Any] = [pre_tokenizers.Digits(individual_digits=True)] if name in SINGLE_DIGITS else []
        if split:
            steps.append(pre_tokenizers.Split(Regex(split), behavior="isolated"))
        steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=not split))
        backend.pre_tokenizer = pre_tokenizers.Sequence(steps)
        backend.model.ignore_merges = name in IGNORE_MERGES
    elif (prefix := header.metadata.get("tokenizer.ggml.add_space_prefix")) is not None:
        # transformers' loader treats a leading space by model class, whatever the file says.
        spaces = normalizers.Replace(" ", "\u2581")
        backend.normalizer = (
            normalizers.Sequence([normalizers.Prepend("\u2581"), spaces]) if prefix else spaces
        )
        backend.pre_tokenizer = None
        parts: list[Any] = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
        backend.decoder = decoders.Sequence([*parts, decoders.Strip(" ", 1, 0)] if prefix else parts)
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
    return quiet_on_length(tokenizer)
