"""What an export says about the tools that can read a student agrees with what the exporters do."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from bitdistill.cli.main import app
from bitdistill.config import ExportConfig, GgufConfig
from bitdistill.errors import ModelError
from bitdistill.interop.gguf_export import export_gguf
from bitdistill.interop.readers import readers
from bitdistill.interop.transformers_bitnet import export_transformers
from tests.interop.trained import packed_student

SMALL: dict[str, Any] = {"num_hidden_layers": 2, "vocab_size": 4096}


@pytest.mark.parametrize(
    ("family", "subln", "changes", "wanted"),
    [
        ("llama", "paper", {}, {"hf", "gguf", "gguf with i2_s"}),
        ("llama", "every_linear", {}, {"hf"}),
        ("qwen3", "none", {}, {"hf", "gguf", "gguf with i2_s"}),
        ("qwen3", "paper", {}, set()),
        ("gemma3_text", "paper", {}, set()),
        ("bitnet", "none", {}, {"hf", "gguf with i2_s"}),
    ],
)
def test_readers_agree_with_the_exporters(
    tmp_path: Path, family: str, subln: str, changes: dict[str, Any], wanted: set[str]
) -> None:
    packed = packed_student(tmp_path, family, subln, steps=0, **{**SMALL, **changes})
    found = readers(packed)
    assert [r.why_not for r in found if r.format == "packed"] == [None, None]
    others = [r for r in found if r.format != "packed"]
    assert {r.format for r in others if r.why_not is None} == wanted
    assert all(r.why_not and "\n" not in r.why_not for r in others if r.format not in wanted)
    for number, reader in enumerate(others):
        weights: Any = "i2_s" if "i2_s" in reader.format else "tq2_0"
        options, out = ExportConfig(gguf=GgufConfig(weights=weights)), tmp_path / str(number)
        exporter = export_transformers if reader.format == "hf" else export_gguf
        if reader.why_not is None:
            assert exporter(packed, out, options) == out
        else:
            with pytest.raises(ModelError):
                exporter(packed, out, options)


def test_export_names_the_tools(tmp_path: Path) -> None:
    packed = packed_student(tmp_path, "qwen3", "paper", steps=0, **SMALL)
    done = CliRunner().invoke(app, ["export", str(packed)])
    assert done.exit_code == 0, done.output
    assert "transformers after import bitdistill (format packed): yes" in done.stderr
    assert "llama.cpp and Ollama (format gguf): no: qwen3 with SubLN" in done.stderr
    assert (
        "plain transformers (format hf): no: transformers' BitNet class holds Llama students" in done.stderr
    )
    listed = json.loads(CliRunner().invoke(app, ["export", str(packed), "--json"]).stdout)
    assert len(listed["readers"]) == 5
