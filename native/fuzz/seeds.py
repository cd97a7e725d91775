"""Writes the fuzz targets' seeds: small good inputs and small damaged ones. No packages beyond Python's own.

python native/fuzz/seeds.py FOLDER      FOLDER/<target>/<name>
"""

from __future__ import annotations

import json
import struct
import sys
from pathlib import Path
from typing import Any

HIDDEN, INNER, HEADS, KV_HEADS, HEAD_DIM, VOCAB = 8, 12, 2, 1, 4, 5
KINDS = {
    "self_attn.q_proj": (HIDDEN, HEADS * HEAD_DIM),
    "self_attn.k_proj": (HIDDEN, KV_HEADS * HEAD_DIM),
    "self_attn.v_proj": (HIDDEN, KV_HEADS * HEAD_DIM),
    "self_attn.o_proj": (HEADS * HEAD_DIM, HIDDEN),
    "mlp.gate_proj": (HIDDEN, INNER),
    "mlp.up_proj": (HIDDEN, INNER),
    "mlp.down_proj": (INNER, HIDDEN),
}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {
        "rope_parameters": {"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 32}
    },
    "qwen2": {
        "tie_word_embeddings": True,
        "use_sliding_window": True,
        "sliding_window": 2,
        "max_window_layers": 0,
    },
    "qwen3": {"layer_types": ["full_attention"]},
    "gemma3_text": {
        "hidden_activation": "gelu_pytorch_tanh",
        "sliding_window": 2,
        "layer_types": ["sliding_attention"],
        "final_logit_softcapping": 30.0,
    },
    "bitnet": {"hidden_act": "relu2"},
}


def config(family: str, packed: bool) -> dict[str, Any]:
    values: dict[str, Any] = {
        "model_type": family,
        "vocab_size": VOCAB,
        "hidden_size": HIDDEN,
        "intermediate_size": INNER,
        "num_hidden_layers": 1,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": HEAD_DIM,
        "max_position_embeddings": 16,
        "eos_token_id": [1, 2],
        **FAMILIES[family],
    }
    if packed:
        values["quantization_config"] = {
            "quant_method": "bitdistill",
            "format_version": 1,
            "packed": True,
            "plan": plan(family),
        }
    return values


def has_bias(family: str, kind: str) -> bool:
    return family == "qwen2" and kind[-6] in "qkv" and "attn" in kind


def plan(family: str) -> dict[str, Any]:
    return {
        "family": family,
        "subln": "paper",
        "quantize_activations": True,
        "replace": {
            f"model.layers.0.{kind}": {
                "in_features": i,
                "out_features": o,
                "bias": has_bias(family, kind),
                "kind": kind.split(".")[1].removesuffix("_proj"),
                "subln": kind in ("self_attn.o_proj", "mlp.down_proj"),
            }
            for kind, (i, o) in KINDS.items()
        },
        "keep": {},
    }


def safetensors(family: str, packed: bool) -> bytes:
    tensors: dict[str, tuple[str, list[int], bytes]] = {}

    def floats(name: str, *shape: int) -> None:
        count = 1
        for extent in shape:
            count *= extent
        values = [((n * 37 + len(name)) % 17 - 8) / 8 for n in range(count)]
        tensors[name] = ("BF16", list(shape), b"".join(struct.pack("<f", v)[2:] for v in values))

    floats("model.embed_tokens.weight", VOCAB, HIDDEN)
    block = "model.layers.0."
    norms = ["input_layernorm", "post_attention_layernorm"]
    if family == "gemma3_text":
        norms += ["pre_feedforward_layernorm", "post_feedforward_layernorm"]
    for norm in norms:
        floats(f"{block}{norm}.weight", HIDDEN)
    if family in ("qwen3", "gemma3_text"):
        floats(f"{block}self_attn.q_norm.weight", HEAD_DIM)
        floats(f"{block}self_attn.k_norm.weight", HEAD_DIM)
    for kind, (i, o) in KINDS.items():
        if has_bias(family, kind):
            floats(f"{block}{kind}.bias", o)
        if not packed:
            floats(f"{block}{kind}.weight", o, i)
            continue
        codes = bytes((0x12, 0x46, 0x91, 0x88, 0x55)[(n + len(kind)) % 5] for n in range(o * i // 4))
        tensors[f"{block}{kind}.codes"] = ("U8", [o, i // 4], codes)
        tensors[f"{block}{kind}.scale"] = ("F32", [], struct.pack("<f", 0.25))
        if kind in ("self_attn.o_proj", "mlp.down_proj"):
            floats(f"{block}{kind}.subln.weight", i)
    if family == "bitnet":
        floats(f"{block}self_attn.attn_sub_norm.weight", HIDDEN)
        floats(f"{block}mlp.ffn_sub_norm.weight", INNER)
    floats("model.norm.weight", HIDDEN)
    if not (family == "gemma3_text" or FAMILIES[family].get("tie_word_embeddings")):
        floats("lm_head.weight", VOCAB, HIDDEN)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    data = b""
    for name, (dtype, shape, content) in tensors.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [len(data), len(data) + len(content)]}
        data += content
    text = json.dumps(header, separators=(",", ":")).encode()
    return struct.pack("<Q", len(text)) + text + data


def manifest(family: str, files: dict[str, bytes]) -> bytes:
    entries = {name: {"sha256": "0" * 64, "bytes": len(content)} for name, content in files.items()}
    values = {
        "format_version": 1,
        "kind": "packed",
        "packed": True,
        "family": family,
        "plan": plan(family),
        "files": entries,
    }
    return json.dumps(values, separators=(",", ":")).encode()


def join(options: int, *files: bytes | None) -> bytes:
    """The folder target's input (native/fuzz/folder.cpp)."""
    parts = [bytes([options])]
    for content in files:
        length = 0xFFFFFF if content is None else len(content)
        parts.append(struct.pack("<I", length)[:3] + (content or b""))
    return b"".join(parts)


def seeds() -> dict[str, dict[str, bytes]]:
    """target -> name -> input."""
    made: dict[str, dict[str, bytes]] = {t: {} for t in ("json", "safetensors", "config", "codes", "folder")}
    for number, family in enumerate(FAMILIES):
        for packed in (True, False):
            name = f"{family}-{'packed' if packed else 'float'}"
            text = json.dumps(config(family, packed), separators=(",", ":")).encode()
            weights = safetensors(family, packed)
            made["config"][name] = text
            made["safetensors"][name] = weights
            own = manifest(family, {"config.json": text, "model.safetensors": weights}) if packed else None
            made["folder"][name] = join(number * 5 + packed + 16 * (number % 2), text, own, weights, None)
    text = json.dumps(config("llama", True)).encode()
    made["folder"]["no-weights"] = join(0, text, None, None, None)
    index = json.dumps({"weight_map": {"model.norm.weight": "../model.safetensors"}}).encode()
    made["folder"]["index-leaves"] = join(0, text, None, None, index)
    made["folder"]["truncated"] = made["folder"]["llama-packed"][:700]
    good = made["safetensors"]["llama-packed"]
    for size in (0, 1, 2**31, 2**63, 2**64 - 1):
        made["safetensors"][f"length-{size}"] = struct.pack("<Q", size) + good[8:200]
    for name, header in {
        "hole": {"a": {"dtype": "U8", "shape": [1], "data_offsets": [1, 2]}},
        "overlap": {n: {"dtype": "U8", "shape": [2], "data_offsets": [0, 2]} for n in "ab"},
        "overflow": {"a": {"dtype": "F32", "shape": [2**40, 2**40], "data_offsets": [0, 4]}},
        "nan": {"a": {"dtype": "BF16", "shape": [1], "data_offsets": [0, 2]}},
        "empty": {"a": {"dtype": "I64", "shape": [0], "data_offsets": [0, 0]}},
    }.items():
        encoded = json.dumps(header).encode()
        made["safetensors"][name] = struct.pack("<Q", len(encoded)) + encoded + b"\xff\xff"
    for n, document in enumerate(
        [
            b'{"a":[1,-2.5e3,null,true,false,"\\ud83d\\ude00\\n"],"b":{}}',
            b"[" * 40,
            b'{"a":1,"a":2}',
            b'"\xff"',
            b'"\\ud800"',
            b"1e999",
            b"9223372036854775808",
            b" [ ] x",
            b"-",
            b"[01]",
        ]
    ):
        made["json"][f"document-{n}"] = document
    made["json"]["config"] = text
    for rows, cols in ((0, 0), (15, 15), (16, 18), (32, 130), (66, 255)):
        made["codes"][f"{rows + 1}x{cols + 1}"] = bytes([rows, cols, 4, rows & 1]) + bytes(
            (0x12, 0x46, 0x91, 0x88)[n % 4] for n in range((rows + 1) * (cols // 4 + 1))
        )
    made["codes"]["value-3"] = bytes([3, 7, 0, 0]) + b"\x55\xff" * 4
    return made


def main(folder: Path) -> None:
    for target, inputs in seeds().items():
        (folder / target).mkdir(parents=True, exist_ok=True)
        for name, content in inputs.items():
            (folder / target / name).write_bytes(content)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    main(Path(sys.argv[1]))
