"""The speed benchmark's models and tables (its timings are not tested)."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("bitdistill.engine._native", reason="the native extension is not built")
pytest.importorskip("gguf", reason="gguf writes the benchmark's models")
sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import cpu_render
import cpu_worker
import shapes

import bitdistill as bd
from bitdistill.engine import Engine


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> str:
    """A shape of the same family as 0.6B, small."""
    config = shapes.config_of("0.6B")
    sizes = {"hidden_size": 64, "intermediate_size": 90, "num_hidden_layers": 2, "vocab_size": 300}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
    monkeypatch.setattr(shapes, "config_of", lambda shape: {**config, **sizes, "layer_types": None})
    return "small"


def test_student_is_one_that_everyone_reads(small: str, tmp_path: Path) -> None:
    folder = shapes.write_student(small, tmp_path / "student")
    engine = Engine(folder, threads=1)  # hashes, shapes, codes and padding (90 columns) are checked here
    ids = np.arange(12)
    model = bd.load(folder)
    import torch

    with torch.no_grad():
        expected = model(torch.from_numpy(ids)[None]).logits[0].numpy()
    close = np.abs(engine.logits(ids.tolist()) - expected).max(axis=1)
    assert np.median(close) < 1e-2 * expected.std()


def test_gguf_holds_the_shape(small: str, tmp_path: Path) -> None:
    import gguf

    path = shapes.write_f16(small, tmp_path / "F16.gguf")
    tensors = {tensor.name: tuple(int(n) for n in tensor.shape) for tensor in gguf.GGUFReader(path).tensors}
    assert tensors["token_embd.weight"] == (64, 300)
    assert tensors["blk.1.ffn_down.weight"] == (90, 64)
    assert tensors["blk.0.attn_k.weight"] == (64, 32)
    assert len(tensors) == 2 + 2 * 11


def _engine(decode: list[float], prefill: list[float], **facts: Any) -> dict[str, Any]:
    return {"seconds": {"decode": decode, "prefill": prefill, "decode8": [0.5, 0.5, 0.5]}, **facts}


def test_page_is_computed_from_the_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = {
        "shape": "0.6B",
        "threads": 2,
        "prefill_tokens": 512,
        "decode_tokens": 128,
        "read_bandwidth_bytes_per_s": [2e10, 1e10, 2e10],
        "engines": {
            "bitdistill a": _engine(
                [1, 2, 1],
                [2, 2, 2],
                ternary_bytes=10**8,
                dense_bytes=0,
                head_bytes=0,
                peak_rss_bytes=10**8,
                load_s=0.2,
            ),
            "llama.cpp F16": _engine(
                [8, 8, 8], [4, 4, 4], weight_bytes=10**9, peak_rss_bytes=7 * 10**8, load_s=1.0
            ),
            "llama.cpp Q4_0": _engine(
                [3, 4, 3], [6, 6, 6], weight_bytes=4 * 10**8, peak_rss_bytes=1, load_s=1.0
            ),
        },
    }
    for name in ("llama.cpp F16", "llama.cpp Q4_0"):
        run["engines"][name]["seconds"]["decode8"] = []
    assert cpu_render.rate(run, "bitdistill a", "decode") == 128.0
    assert cpu_render.ratio(run, "bitdistill a", "llama.cpp Q4_0", "decode") == 3.0  # median of 3, 2, 3
    summary = cpu_render.summary([run])
    assert (
        "best | 3.00× (llama.cpp Q4_0) | 8.00× | 2.00× (llama.cpp F16) | 2.00× | 4.00× (a) | 7.00×" in summary
    )
    assert "| bitdistill a |  | 128.0 | 256 | 512.0 | 100 | 64 % | 100 | 0.20 |" in cpu_render.table(run)
    result = {
        "runs": [run],
        "machine": {"cpus": 2, "load_average": 0.0},
        "command": "c",
        "date": "2026-11-23",
        "tests": {"outcome": "ok"},
        "versions": {"x": "1"},
        "gemv": {"2": "text"},
    }
    source = tmp_path / "r.json"
    source.write_text(json.dumps(result), "utf-8")
    monkeypatch.setattr(cpu_render, "PAGE", tmp_path / "page.md")
    monkeypatch.setattr(cpu_render, "CHART", tmp_path / "page.svg")
    cpu_render.write(source)
    first = (tmp_path / "page.svg").read_bytes()
    cpu_render.write(source)
    assert (tmp_path / "page.svg").read_bytes() == first
    assert summary in (tmp_path / "page.md").read_text("utf-8")


def test_avx2_rows_meet_builds_for_avx2_and_int8_caches_are_named() -> None:
    def peer(decode: float, isa: str, rss: int, kv: str = "float16") -> dict[str, Any]:
        return {**_engine([decode], [decode]), "isa": isa, "peak_rss_bytes": rss, "kv": kv}

    run = {
        "shape": "4B",
        "threads": 1,
        "prefill_tokens": 8,
        "decode_tokens": 8,
        "machine": {"model name": "Intel(R) Xeon(R) Processor", "cpu family": "6", "model": "173"},
        "engines": {
            "bitdistill 2bit+screened4, avx2": peer(1.0, "avx2", 200),
            "bitdistill 2bit+screened4+kv8, avx2": peer(2.0, "avx2", 100, "int8"),
            "bitdistill 2bit+screened4, avx512vnni": peer(0.5, "avx512vnni", 200),
            "llama.cpp F16": peer(6.0, "avx2 avx512", 1900),
            "llama.cpp F16, avx2": peer(8.0, "avx2", 1000),
            "llama.cpp F16+kv8, avx2": peer(9.0, "avx2", 800, "int8"),
            "other B": peer(2.0, "avx2 avx512", 1),
            "other B, avx2": peer(3.0, "avx2", 1),
        },
    }
    held, whole = cpu_render.summary([run]).splitlines()[2:]
    assert held.startswith("| Intel Xeon 6/173 | 4B | 1 | avx2 | 3.00× (other B, avx2) | 8.00× |")
    assert held.endswith("| 5.00×, 10.00× with int8 keys and values (8.00× against F16 with q8_0 ones) |")
    assert "(2bit), 8.00× (2bit+kv8)" in held
    assert "| avx512vnni | 4.00× (other B) | 12.00× |" in whole
    assert whole.endswith("| 5.00× |")


def test_instruction_sets_are_read_from_what_a_library_says() -> None:
    llama_cpp = (
        "CPU : SSE3 = 1 | AVX2 = 1 | FMA = 1 | AVX512 = 1 | AVX512_VNNI = 1 | AMX_INT8 = 1 | REPACK = 1 | "
    )
    assert cpu_worker.instruction_sets(llama_cpp) == "avx2 avx512 avx512_vnni amx_int8"
    ik = "AVX = 1 | AVX_VNNI = 0 | AVX2 = 1 | AVX512 = 0 | AVX512_VNNI = 0 | FMA = 1 | "
    assert cpu_worker.instruction_sets(ik) == "avx2"
