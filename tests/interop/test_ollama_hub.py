"""Ollama's Modelfile, uploads (planned, dry, and through a stand-in for the hub's client), and the commands."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from bitdistill.cli.main import app
from bitdistill.config import ExportConfig, GgufConfig
from bitdistill.errors import ArtifactError, ModelError, RecipeError, UsageError
from bitdistill.interop.hub import plan_push, push
from bitdistill.interop.ollama import CHAT_FORMATS, chat_format, export_ollama, modelfile
from tests.interop.trained import packed_student, tokenizer

JINJA = {
    "ChatML": "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
    "Llama 3": "{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n{{ m.content }}<|eot_id|>"
    "{% endfor %}{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}",
    "Gemma": "<bos>{% for m in messages %}<start_of_turn>{{ m.role }}\n{{ m.content }}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}",
}


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return packed_student(
        tmp_path_factory.mktemp("student"), "llama", "paper", steps=0, num_hidden_layers=1, vocab_size=4096
    )


class Chatty:
    """The demo's tokenizer with a chat template."""

    def __init__(self, template: str | None) -> None:
        self.inner, self.chat_template = tokenizer(), template

    def apply_chat_template(self, messages: Any, **options: Any) -> str:
        return str(self.inner.apply_chat_template(messages, chat_template=self.chat_template, **options))

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)


@pytest.mark.parametrize("name", sorted(JINJA))
def test_known_chat_formats_become_templates(name: str) -> None:
    found = chat_format(Chatty(JINJA[name]))
    assert found is not None
    assert found.name == name
    text = modelfile(Chatty(JINJA[name]), {})
    assert f'PARAMETER stop "{found.stop}"' in text
    assert 'PARAMETER stop "<|endoftext|>"' in text
    assert text.count('"""') == 2
    assert ("system" in text) == found.system_role


def test_chatml_template_golden() -> None:
    assert CHAT_FORMATS[0].template() == (
        "{{- if .System }}<|im_start|>system\n{{ .System }}<|im_end|>\n{{ end }}\n"
        "{{- if .Prompt }}<|im_start|>user\n{{ .Prompt }}<|im_end|>\n{{ end }}\n"
        "{{- /* answer */ -}}\n"
        "<|im_start|>assistant\n{{ .Response }}<|im_end|>"
    )


def test_other_templates_are_left_to_ollama() -> None:
    text = modelfile(Chatty("{{ messages[0].content }}"), {"do_sample": True, "temperature": 0.7})
    assert "TEMPLATE" not in text
    assert "# The chat format is none that bitdistill can write" in text
    assert "PARAMETER temperature 0.7" in text
    assert 'TEMPLATE """{{ .Prompt }}"""' in modelfile(Chatty(None), {})


def test_ollama_folder(packed: Path, tmp_path: Path) -> None:
    out = export_ollama(packed, tmp_path / "ollama", ExportConfig())
    assert {p.name for p in out.iterdir()} == {"Modelfile", "model.gguf", "bitdistill.json"}
    assert (out / "Modelfile").read_text().startswith("FROM ./model.gguf\n")
    with pytest.raises(ModelError, match=r"i2_s is read by bitnet\.cpp only"):
        export_ollama(packed, tmp_path / "other", ExportConfig(gguf=GgufConfig(weights="i2_s")))


def test_a_plan_lists_the_manifest_and_a_card_and_nothing_else(packed: Path) -> None:
    (packed / "private-notes.txt").write_text("not for the public")
    try:
        plan = plan_push(packed, packed, "somebody/student")
    finally:
        (packed / "private-notes.txt").unlink()
    names = [f.name for f in plan.files]
    assert names == sorted(names)
    assert set(names) == {p.name for p in packed.iterdir()} | {"README.md"}
    sizes = {f.name: f.size for f in plan.files}
    assert sizes["model.safetensors"] == (packed / "model.safetensors").stat().st_size
    assert plan.size == sum(sizes.values())
    assert plan.card.startswith("---\nlibrary_name: bitdistill\n")
    assert "ternary weights in 7 linear layers, family llama" in plan.card


def test_a_students_own_card_is_used(packed: Path, tmp_path: Path) -> None:
    out = export_ollama(packed, tmp_path / "ollama", ExportConfig())
    (packed / "README.md").write_text("---\nlicense: mit\n---\n# The card\n")
    try:
        plan = plan_push(out, packed, "somebody/student")
    finally:
        (packed / "README.md").unlink()
    assert plan.card.startswith("---\nlicense: mit\n---\n# The card\n\n## Use with Ollama\n")
    assert "ollama create student -f Modelfile" in plan.card


def test_what_may_not_go_out(packed: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="named OWNER/NAME"):
        plan_push(packed, packed, "../student")
    with pytest.raises(ArtifactError, match="no artifact here"):
        plan_push(tmp_path, packed, "somebody/student")
    out = export_ollama(packed, tmp_path / "ollama", ExportConfig())
    (out / "Modelfile").write_text("FROM elsewhere")
    with pytest.raises(ArtifactError, match="Modelfile"):
        plan_push(out, packed, "somebody/student")


def test_push_is_one_commit_of_the_plan(packed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    calls: list[tuple[str, Any]] = []

    class Api:
        def create_repo(self, repo: str, **options: Any) -> str:
            calls.append(("create", (repo, options)))
            return f"https://hub.example/{repo}"

        def create_commit(self, repo: str, operations: Any, commit_message: str) -> None:
            calls.append(("commit", {o.path_in_repo: o.path_or_fileobj for o in operations}))

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    plan = plan_push(packed, packed, "somebody/student")
    assert push(plan, private=True) == "https://hub.example/somebody/student"
    assert calls[0] == (
        "create",
        ("somebody/student", {"private": True, "exist_ok": True, "repo_type": "model"}),
    )
    sent = calls[1][1]
    assert set(sent) == {f.name for f in plan.files}
    assert sent["README.md"] == plan.card.encode()
    assert sent["model.safetensors"] == str(packed / "model.safetensors")

    def refuse(*_: Any, **__: Any) -> str:
        raise RuntimeError("401\nUnauthorized")

    monkeypatch.setattr(Api, "create_repo", refuse)
    with pytest.raises(ModelError, match=r"the hub did not take it \(401 Unauthorized\)"):
        push(plan)


def test_commands(packed: Path, tmp_path: Path) -> None:
    run = CliRunner().invoke
    args = ["export", str(packed), "--format", "gguf", "--gguf-weights", "tq1_0", "--gguf-table", "q8_0"]
    done = run(app, [*args, "--json"])
    assert done.exit_code == 0, done.output
    folder = Path(json.loads(done.stdout)["formats"]["gguf"])
    assert json.loads((folder / "bitdistill.json").read_text())["options"] == {
        "weights": "tq1_0",
        "table": "q8_0",
    }
    stamp = (folder / "model.gguf").stat().st_mtime_ns
    done = run(app, [*args, "--push", "somebody/student", "--dry-run", "--json", "--quiet"])
    assert done.exit_code == 0, done.output
    listed = json.loads(done.stdout)
    assert {f["name"] for f in listed["files"]} == {"README.md", "bitdistill.json", "model.gguf"}
    assert listed["url"] is None
    assert (folder / "model.gguf").stat().st_mtime_ns == stamp  # made from this student already
    done = run(app, ["export", str(packed), "--push", "somebody/student", "--dry-run", "--quiet"])
    assert "model.safetensors" in done.stdout
    assert "dry run: nothing was uploaded" in done.stdout
    done = run(app, ["import", str(folder / "model.gguf"), str(tmp_path / "back"), "--json"])
    assert done.exit_code == 0, done.output
    assert (tmp_path / "back" / "bitdistill.json").is_file()


@pytest.mark.parametrize(
    ("args", "kind", "words"),
    [
        (["--dry-run"], UsageError, "go with --push"),
        (["--push", "a/b", "--format", "gguf", "--format", "hf"], UsageError, "one --format, or none"),
        (["--format", "onnx"], UsageError, "--format onnx: expected packed, hf, gguf, ollama"),
        (["--format", "gguf", "--gguf-weights", "q4_0"], UsageError, "--gguf-weights q4_0: expected tq1_0, "),
        (["--format", "gguf", "--gguf-table", "q2_k"], UsageError, "--gguf-table q2_k: expected f16, q8_0, "),
        (["--set", "seed=3"], RecipeError, "only export.* applies"),
        (["--set", "export.gguf.weights=q2_k"], RecipeError, "export"),
    ],
)
def test_commands_that_cannot_be(packed: Path, args: list[str], kind: type[Exception], words: str) -> None:
    done = CliRunner().invoke(app, ["export", str(packed), *args])
    assert isinstance(done.exception, kind)
    assert words in str(done.exception)
