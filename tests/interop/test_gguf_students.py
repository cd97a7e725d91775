"""Students as GGUF and back: codes, scales and tokenizer survive; what no architecture computes is refused."""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import bitdistill as bd
from bitdistill.config import ExportConfig, GgufConfig
from bitdistill.errors import ModelError
from bitdistill.interop.foreign import foreign_kind, import_student
from bitdistill.interop.gguf_codec import NAMES
from bitdistill.interop.gguf_export import export_gguf
from bitdistill.models.gguf_header import read_gguf
from bitdistill.models.student import load_student
from tests.cheap import refused_cheaply
from tests.interop.test_transformers_bitnet import packed_folder
from tests.interop.trained import packed_student, texts

SMALL: dict[str, Any] = {"num_hidden_layers": 2, "vocab_size": 4096}
# family, SubLN, further config -> architecture
STUDENTS: dict[str, tuple[str, str, dict[str, Any], str]] = {
    "llama-subln": ("llama", "paper", {}, "bitnet"),
    "llama": (
        "llama",
        "none",
        {"tie_word_embeddings": False, "attention_bias": True, "mlp_bias": True},
        "llama",
    ),
    "qwen2": ("qwen2", "none", {}, "qwen2"),
    "qwen3": ("qwen3", "none", {"head_dim": 128}, "qwen3"),
    "gemma3": ("gemma3_text", "none", {}, "gemma3"),
}


def options(weights: str = "tq2_0", table: str = "f16") -> ExportConfig:
    return ExportConfig(gguf=GgufConfig(weights=weights, table=table))  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Untrained packed students by name, made once."""
    root, made = tmp_path_factory.mktemp("students"), {}

    def folder(name: str) -> Path:
        if name not in made:
            family, subln, changes, _ = STUDENTS[name]
            made[name] = packed_student(root / name, family, subln, steps=0, **{**SMALL, **changes})
        return made[name]

    return folder


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BITDISTILL_CACHE", str(tmp_path / "cache"))


@pytest.mark.parametrize("name", sorted(STUDENTS))
@pytest.mark.parametrize("weights", ["tq1_0", "tq2_0", "i2_s"])
def test_a_student_survives_gguf(
    folders: Callable[[str], Path], name: str, weights: str, tmp_path: Path
) -> None:
    packed = folders(name)
    out = export_gguf(packed, tmp_path / "gguf", options(weights))
    header = read_gguf(out / "model.gguf")
    assert header.metadata["general.architecture"] == STUDENTS[name][3]
    types = [NAMES.get(t.ggml_type) for t in header.tensors.values()]
    assert types.count(weights) == 14  # every linear of two blocks
    import_student(out / "model.gguf", tmp_path / "back")
    ours, tokenizer, _ = load_student(packed)
    back, tokenizer_back, manifest = load_student(tmp_path / "back")
    assert manifest["imported"]["format"] == "gguf"
    state, state_back = ours.state_dict(), back.state_dict()
    assert state.keys() == state_back.keys()
    for key, tensor in state.items():
        if key.endswith((".codes", ".scale")):
            assert torch.equal(tensor, state_back[key]), key  # the scale too: bit for bit
        else:  # bfloat16 values are float16 values, but for the smallest; Gemma's norms go through w + 1
            torch.testing.assert_close(tensor, state_back[key], rtol=0, atol=2e-7, msg=key)
    rows = texts("test")[:20]
    assert [tokenizer_back(r).input_ids for r in rows] == [tokenizer(r).input_ids for r in rows]
    ids = torch.tensor([tokenizer(rows[0]).input_ids])
    with torch.no_grad():
        gap = (ours(ids).logits - back(ids).logits).abs().max()
    # The same integers up to activations at a rounding border, which an embedding changed by 1e-8 may cross.
    assert gap < 0.02 * ours(ids).logits.abs().max()


def test_engine_and_load_take_a_gguf_file(folders: Callable[[str], Path], tmp_path: Path) -> None:
    pytest.importorskip("bitdistill.engine._native", reason="the native engine is not built")
    path = export_gguf(folders("llama-subln"), tmp_path / "gguf", options("i2_s")) / "model.gguf"
    assert foreign_kind(path) == "gguf"
    engine = bd.Engine(path, threads=1)
    ids = engine.encode(texts("test")[0])
    with torch.no_grad():
        theirs = bd.load(path)(torch.tensor([ids])).logits[0]
    gap = (torch.from_numpy(engine.logits(ids)) - theirs).abs()
    assert gap.median() < 1e-4
    assert gap.max() < 0.02 * theirs.abs().max()
    assert len(list((tmp_path / "cache").iterdir())) == 1  # imported once, for both


def test_rows_that_fill_no_block_keep_their_codes(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    packed = packed_student(
        tmp_path,
        "llama",
        "none",
        steps=0,
        **SMALL,
        hidden_size=192,
        num_attention_heads=3,
        num_key_value_heads=1,
    )
    out = export_gguf(packed, tmp_path / "gguf", options("tq1_0"))
    assert "12 of 14 linears have rows that fill no block of tq1_0: written as q4_0" in caplog.text
    import_student(out / "model.gguf", tmp_path / "back")
    state, back = (load_student(f)[0].state_dict() for f in (packed, tmp_path / "back"))
    assert all(torch.equal(state[k], back[k]) for k in state if k.endswith((".codes", ".scale")))
    with pytest.raises(ModelError, match="rows of 192 do not fill q6_k's blocks"):
        export_gguf(packed, tmp_path / "other", options(table="q6_k"))


def test_squared_relu_goes_to_bitnet_cpp_only(tmp_path: Path) -> None:
    packed = packed_student(tmp_path, "bitnet", "none", steps=0, **SMALL)
    with pytest.raises(ModelError, match=r"squared ReLU is computed by bitnet\.cpp only"):
        export_gguf(packed, tmp_path / "gguf", options())
    out = export_gguf(packed, tmp_path / "gguf", options("i2_s"))
    assert read_gguf(out / "model.gguf").metadata["general.architecture"] == "bitnet-b1.58"
    import_student(out / "model.gguf", tmp_path / "back")
    ours, back = (load_student(f)[0] for f in (packed, tmp_path / "back"))
    assert back.config.model_type == "bitnet"
    assert back.config.hidden_act == "relu2"
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        assert (ours(ids).logits - back(ids).logits).abs().median() < 1e-4


@pytest.mark.parametrize(
    ("family", "subln", "changes", "words"),
    [
        ("qwen3", "paper", {}, "qwen3 with SubLN"),
        ("gemma3_text", "paper", {}, "gemma3_text with SubLN"),
        ("qwen2", "paper", {}, "qwen2 with SubLN"),
        ("llama", "every_linear", {}, "SubLN before every linear"),
        ("llama", "paper", {"attention_bias": True}, "llama with SubLN and biases"),
        ("llama", "paper", {"tie_word_embeddings": False}, "an output head of its own"),
        ("llama", "paper", {"head_dim": 32}, "SubLN with heads 128 wide on hidden size 256"),
        ("llama", "none", {"hidden_act": "gelu"}, "llama with activation gelu"),
        ("qwen3", "none", {"attention_bias": True}, "qwen3 with biases on k, o, q, v"),
        (
            "qwen2",
            "none",
            {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1},
            "sliding windows",
        ),
        ("gemma3_text", "none", {"query_pre_attn_scalar": 99}, "query_pre_attn_scalar 99 instead of 64"),
        (
            "llama",
            "none",
            {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0}},
            "rope_type 'yarn'",
        ),
    ],
)
def test_what_llama_cpp_cannot_compute_is_refused(
    tmp_path: Path, family: str, subln: str, changes: dict[str, Any], words: str
) -> None:
    packed = packed_student(tmp_path, family, subln, steps=0, **{**SMALL, **changes})
    with pytest.raises(ModelError, match=words) as caught:
        export_gguf(packed, tmp_path / "gguf", options())
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "gguf").exists()


def test_a_tokenizer_that_gguf_cannot_hold_is_refused(tmp_path: Path) -> None:
    folder = packed_folder(tmp_path, "llama_tied", "none", hidden_size=64, intermediate_size=64, head_dim=16)
    with pytest.raises(ModelError, match="the tokenizer's model is WordLevel"):
        export_gguf(folder, tmp_path / "gguf", options())


@pytest.fixture(scope="module")
def sound(folders: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> bytes:
    out = tmp_path_factory.mktemp("gguf") / "gguf"
    return (export_gguf(folders("llama-subln"), out, options("i2_s")) / "model.gguf").read_bytes()


def after(text: bytes, skip: int, value: bytes) -> Callable[[bytes], bytes]:
    def change(data: bytes) -> bytes:
        at = data.index(text) + len(text) + skip
        return data[:at] + value + data[at + len(value) :]

    return change


Q = b"blk.1.attn_q.weight"  # then rank u32, dims 2 x u64, type u32, offset u64


def in_data(name: bytes, skip: int, value: bytes, rank: int = 2) -> Callable[[bytes], bytes]:
    """Overwrite bytes of a tensor's data."""

    def change(data: bytes) -> bytes:
        at = data.index(name) + len(name) + 8 + 8 * rank
        (offset,) = struct.unpack_from("<Q", data, at)
        start = read_start(data) + offset + skip
        return data[:start] + value + data[start + len(value) :]

    return change


def read_start(data: bytes) -> int:
    import tempfile

    with tempfile.NamedTemporaryFile(suffix=".gguf") as file:
        file.write(data)
        file.flush()
        return read_gguf(Path(file.name)).data_start


SCALE_AT = 256 * 256 // 4
DAMAGE: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "truncated by one tensor": (lambda d: d[:-4096], "ends at byte"),
    "truncated in the scale": (lambda d: d[: len(d) - 60], "ends at byte"),
    "missing tensor": (lambda d: d.replace(Q, b"blk.1.attn_x.weight"), "blk.1.attn_q.weight is missing"),
    "missing sub-norm": (
        lambda d: d.replace(b"blk.0.ffn_sub_norm.weight", b"blk.0.ffn_xxx_norm.weight"),
        "blk.0.ffn_sub_norm.weight is missing",
    ),
    "one tensor more": (lambda d: d.replace(b"blk.1.attn_sub_norm", b"blk.7.attn_sub_norm"), "is missing"),
    "other shape": (after(Q, 4, struct.pack("<QQ", 128, 512)), r"is \[512, 128\], not \[256, 256\]"),
    "rows that fill no block": (
        after(Q, 4, struct.pack("<QQ", 64, 1024)),
        "rows of 64 do not fill blocks of 128",
    ),
    "huge rows": (after(Q, 4, struct.pack("<QQ", 1 << 40, 1)), "ends at byte|dimensions|overlaps"),
    "product overflow": (after(Q, 4, struct.pack("<QQ", 1 << 33, 1 << 33)), "dimensions"),
    "zero rows": (after(Q, 4, struct.pack("<QQ", 256, 0)), "dimensions"),
    "five dimensions": (after(Q, 0, struct.pack("<I", 5)), "5 dimensions"),
    "float type": (after(Q, 20, struct.pack("<I", 1)), "overlaps|ends at byte"),
    "type tq2_0": (
        after(Q, 20, struct.pack("<I", 35)),
        "scale .* is not positive|block scales differ|value 3|overlaps",
    ),
    "type q8_0": (after(Q, 20, struct.pack("<I", 8)), "overlaps|not ternary"),
    "type tl1": (after(Q, 20, struct.pack("<I", 38)), "unknown tensor type 38"),
    "unaligned": (after(Q, 24, struct.pack("<Q", 8)), "unaligned|overlaps"),
    "offset past the end": (after(Q, 24, struct.pack("<Q", 1 << 40)), "ends at byte"),
    "value 3": (in_data(Q, 100, b"\xc0"), "value 3, which is no ternary code"),
    "scale nan": (in_data(Q, SCALE_AT, struct.pack("<f", float("nan"))), "scale nan"),
    "scale inf": (in_data(Q, SCALE_AT, struct.pack("<f", float("inf"))), "scale inf"),
    "scale 0": (in_data(Q, SCALE_AT, struct.pack("<f", 0.0)), "scale 0.0"),
    "scale negative": (in_data(Q, SCALE_AT, struct.pack("<f", -1.0)), "scale -1.0"),
    "norm nan": (
        in_data(b"blk.0.attn_norm.weight", 8, struct.pack("<f", float("nan")), rank=1),
        "not finite",
    ),
    "layers": (after(b"bitnet.block_count", 4, struct.pack("<I", 3)), "blk.2.attn_q.weight is missing"),
    "layers 2^31": (after(b"bitnet.block_count", 4, struct.pack("<I", 1 << 31)), "over 1024"),
    "heads": (
        after(b"bitnet.attention.head_count", 4, struct.pack("<I", 3)),
        "not a multiple|not as wide|not \\[",
    ),
    "architecture": (
        lambda d: d.replace(b"bitnet\x17", b"bitnex\x17") if b"bitnet\x17" in d else d[:24],
        "bitnex|left|header",
    ),
    "tokens 2^40": (
        after(b"tokenizer.ggml.tokens", 8, struct.pack("<Q", 1 << 40)),
        "tokenizer.ggml.tokens needs",
    ),
    "nested tokens": (after(b"tokenizer.ggml.tokens", 4, struct.pack("<I", 9)), "array of type 9"),
}


@pytest.mark.parametrize("case", sorted(DAMAGE))
def test_damaged_files_are_refused(case: str, sound: bytes, tmp_path: Path) -> None:
    damage, words = DAMAGE[case]
    data = damage(sound)
    assert data != sound
    (tmp_path / "m.gguf").write_bytes(data)
    message = refused_cheaply(lambda: import_student(tmp_path / "m.gguf", tmp_path / "out"), ModelError)
    assert re.search(words, message)
    assert message.startswith(str(tmp_path / "m.gguf"))
    assert "\n" not in message
    assert not (tmp_path / "out").exists()


def test_every_truncation_of_the_header_is_refused(sound: bytes, tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    header = read_start(sound)
    cuts = [*range(64), *range(64, header, 997), header - 33, header]
    for cut in cuts:
        path.write_bytes(sound[:cut])
        with pytest.raises(ModelError):
            import_student(path, tmp_path / "out")


def test_a_scale_that_contradicts_its_block_is_refused(
    folders: Callable[[str], Path], tmp_path: Path
) -> None:
    path = export_gguf(folders("qwen2"), tmp_path / "gguf", options("tq2_0")) / "model.gguf"
    data = after(b"bitdistill.scale.blk.0.attn_k", 4, struct.pack("<f", 0.5))(path.read_bytes())
    (tmp_path / "m.gguf").write_bytes(data)
    with pytest.raises(ModelError, match=r"bitdistill\.scale\.blk\.0\.attn_k is 0\.5"):
        import_student(tmp_path / "m.gguf", tmp_path / "out")


def test_manifest_says_what_it_was_made_from(folders: Callable[[str], Path], tmp_path: Path) -> None:
    packed = folders("qwen2")
    out = export_gguf(packed, tmp_path / "gguf", options("tq1_0", "q8_0"))
    manifest = json.loads((out / "bitdistill.json").read_text())
    assert manifest["options"] == {"weights": "tq1_0", "table": "q8_0"}
    assert manifest["from"] == json.loads((packed / "bitdistill.json").read_text())["files"]
