"""Export to plain transformers: byte layout, names, refusals, and the same logits where transformers can run it."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from bitdistill.config import RefineConfig
from bitdistill.errors import ModelError
from bitdistill.interop.transformers_bitnet import export_transformers, pack_rows, unpack_rows
from bitdistill.models import surgery
from bitdistill.models.student import load_student, pack, save_student
from tests.models.conftest import make_tokenizer, tiny_model

SIZES: dict[str, Any] = {"hidden_size": 48, "intermediate_size": 72, "head_dim": 12, "rms_norm_eps": 1e-6}


def packed_folder(folder: Path, name: str, subln: str, **changes: Any) -> Path:
    source = tiny_model(name, **{**SIZES, **changes})
    plan = surgery.plan(source.config, RefineConfig(subln=subln))  # type: ignore[arg-type]
    student = surgery.apply(plan, source)
    if subln != "none":
        tokens = torch.randint(3, 100, (4, 16), generator=torch.Generator().manual_seed(0))
        surgery.calibrate_gains(student, source, tokens)
    out = folder / "packed"
    save_student(
        pack(student, "bfloat16"),
        make_tokenizer(),
        out,
        kind="packed",
        plan=plan,
        recipe={},
        extra={"key": "k"},
        float_dtype="bfloat16",
    )
    return out


def test_every_legal_byte_round_trips_and_every_other_is_refused() -> None:
    for byte in range(256):
        digits = [byte >> 2 * i & 3 for i in range(4)]
        packed = torch.tensor([[byte]], dtype=torch.uint8)
        if 3 in digits:
            with pytest.raises(ModelError, match="no ternary code"):
                unpack_rows(packed)
        else:
            codes = unpack_rows(packed)
            assert codes.flatten().tolist() == [d - 1 for d in digits]
            assert torch.equal(pack_rows(codes), packed)


def test_layout_golden() -> None:
    codes = (torch.arange(8 * 5).reshape(8, 5) * 7 % 3 - 1).to(torch.int8)
    packed = pack_rows(codes)
    # row i and rows i + 2, i + 4, i + 6 share a byte, low bits first
    want = sum((int(codes[2 * k + 1, 3]) + 1) << 2 * k for k in range(4))
    assert packed[1, 3].item() == want
    assert hashlib.sha256(packed.numpy().tobytes()).hexdigest()[:16] == "3248a12e66f90a64"
    with pytest.raises(ModelError, match="multiples of 4"):
        pack_rows(codes[:7])


@pytest.mark.parametrize(
    ("name", "subln", "model_type", "sub_norm"),
    [
        ("llama", "paper", "bitnet", "model.layers.1.self_attn.attn_sub_norm.weight"),
        ("llama_tied", "paper", "bitnet", "model.layers.2.mlp.ffn_sub_norm.weight"),
        ("qwen3", "every_linear", "qwen3", "model.layers.0.mlp.up_proj.rms_norm.weight"),
        ("qwen2", "none", "qwen2", None),
    ],
)
def test_names_codes_and_scales(
    tmp_path: Path, name: str, subln: str, model_type: str, sub_norm: str | None
) -> None:
    folder = packed_folder(tmp_path, name, subln)
    out = export_transformers(folder, tmp_path / "hf")
    config = json.loads((out / "config.json").read_text())
    assert config["model_type"] == model_type
    assert config["quantization_config"]["quant_method"] == "bitnet"
    tensors = load_file(out / "model.safetensors")
    assert sub_norm is None or sub_norm in tensors
    assert not any("subln" in key for key in tensors)
    assert ("lm_head.weight" in tensors) != config["tie_word_embeddings"]
    model, _, _ = load_student(folder)
    layer = model.model.layers[1].mlp.down_proj
    codes = unpack_rows(tensors["model.layers.1.mlp.down_proj.weight"])
    assert torch.equal(codes.float(), layer.weight_codes())
    assert tensors["model.layers.1.mlp.down_proj.weight_scale"].item() == pytest.approx(
        1 / layer.scale.item()
    )


@pytest.mark.parametrize(
    ("name", "why"), [("qwen3", "qwen3"), ("gemma3_text", "gemma3_text"), ("llama_biases", "biases")]
)
def test_what_transformers_cannot_compute_is_refused(tmp_path: Path, name: str, why: str) -> None:
    folder = packed_folder(tmp_path, name, "paper")
    with pytest.raises(ModelError, match=why):
        export_transformers(folder, tmp_path / "hf")
    assert not (tmp_path / "hf").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "subln"),
    [("llama_tied", "paper"), ("qwen3", "every_linear"), ("qwen2", "none"), ("bitnet", "none")],
)
def test_plain_transformers_gives_the_same_logits(tmp_path: Path, name: str, subln: str) -> None:
    """In a process that never imports bitdistill. transformers compiles its BitLinear at first use (minutes)."""
    folder = packed_folder(tmp_path, name, subln)
    out = export_transformers(folder, tmp_path / "hf")
    ids = torch.randint(3, 100, (2, 9), generator=torch.Generator().manual_seed(1))
    code = (
        "import sys, torch; from transformers import AutoModelForCausalLM as A\n"
        f"m = A.from_pretrained({str(out)!r}).eval()\n"
        f"torch.save(m(torch.tensor({ids.tolist()})).logits.detach(), {str(tmp_path / 'logits.pt')!r})\n"
        "assert 'bitdistill' not in sys.modules"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=280, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    theirs = torch.load(tmp_path / "logits.pt", weights_only=True).float()
    model, _, _ = load_student(folder)
    with torch.no_grad():
        ours = model(ids).logits
    # their activation codes come from x * (127 / max), ours from (127 x) / max: a code may differ at a tie
    assert (theirs - ours).abs().max() < 0.02 * ours.abs().max()
    assert (theirs.argmax(-1) == ours.argmax(-1)).float().mean() > 0.95
