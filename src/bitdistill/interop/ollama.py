"""A packed student for Ollama: the GGUF file and a Modelfile beside it (`ollama create NAME -f Modelfile`).

Ollama's templates are not Jinja, so one is written for the chat formats known here, recognised by what the student's
own template renders. For any other, Ollama falls back on the template in the GGUF file, and the Modelfile says so.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bitdistill import artifact
from bitdistill.config import ExportConfig
from bitdistill.errors import ModelError
from bitdistill.interop.gguf_export import write_gguf
from bitdistill.models.contents import read_json
from bitdistill.models.tokenizer import read_tokenizer


@dataclass(frozen=True)
class ChatFormat:
    """A chat format: the text around a message, for Jinja's rendering and for Ollama's template."""

    name: str
    role: str
    """`{role}` and `{text}` are replaced."""
    answer: str
    """What opens the assistant's turn."""
    stop: str
    system_role: bool = True
    """False: a system message begins the user's."""

    def rendered(self, messages: list[dict[str, str]]) -> str:
        """The text of a conversation, the assistant's turn opened."""
        turns = (self.role.replace("{role}", m["role"]).replace("{text}", m["content"]) for m in messages)
        return "".join(turns) + self.answer

    def template(self) -> str:
        """Go template for Ollama."""

        def turn(role: str, text: str) -> str:
            return self.role.replace("{role}", role).replace("{text}", text)

        # `{{-` takes away the white space before it, here the line breaks between the parts.
        ask = (
            "{{ .Prompt }}" if self.system_role else "{{ if .System }}{{ .System }}\n\n{{ end }}{{ .Prompt }}"
        )
        parts = [f"{{{{- if .Prompt }}}}{turn('user', ask)}{{{{ end }}}}", "{{- /* answer */ -}}"]
        if self.system_role:
            parts.insert(0, f"{{{{- if .System }}}}{turn('system', '{{ .System }}')}{{{{ end }}}}")
        return "\n".join([*parts, f"{self.answer}{{{{ .Response }}}}{self.stop}"])


CHAT_FORMATS = (
    ChatFormat("ChatML", "<|im_start|>{role}\n{text}<|im_end|>\n", "<|im_start|>assistant\n", "<|im_end|>"),
    ChatFormat(
        "Llama 3",
        "<|start_header_id|>{role}<|end_header_id|>\n\n{text}<|eot_id|>",
        "<|start_header_id|>assistant<|end_header_id|>\n\n",
        "<|eot_id|>",
    ),
    ChatFormat(
        "Gemma",
        "<start_of_turn>{role}\n{text}<end_of_turn>\n",
        "<start_of_turn>model\n",
        "<end_of_turn>",
        system_role=False,
    ),
)


def export_ollama(packed_folder: Path, out: Path, options: ExportConfig) -> Path:
    """Write `out/model.gguf` and `out/Modelfile`.

    Returns:
        `out`.

    Raises:
        ModelError: llama.cpp has no architecture for this student, or i2_s was asked for, which Ollama cannot read.
        ArtifactError: the packed folder is damaged.
        MissingDependencyError: the `gguf` package is not installed.
    """
    if options.gguf.weights == "i2_s":
        raise ModelError(
            "export.gguf.weights i2_s is read by bitnet.cpp only; for ollama choose tq2_0 or tq1_0"
        )
    about = {"kind": "ollama", "from": artifact.read_manifest(packed_folder)["files"]}
    with artifact.writing(out, {**about, "options": options.gguf.model_dump(mode="json")}) as folder:
        write_gguf(packed_folder, folder / "model.gguf", options)
        tokenizer = read_tokenizer(packed_folder)
        generation = packed_folder / "generation_config.json"
        settings = read_json(generation) if generation.is_file() else {}
        (folder / "Modelfile").write_text(modelfile(tokenizer, settings), "utf-8")
    return out


def modelfile(tokenizer: Any, generation: dict[str, Any]) -> str:
    """The Modelfile of a model with this tokenizer, greedy unless `generation` (generation_config.json) samples.

    Raises:
        ModelError: the chat template holds the quotes that would end the Modelfile's text.
    """
    lines = ["FROM ./model.gguf"]
    chat = chat_format(tokenizer)
    stops = [] if chat is None else [chat.stop]
    if chat is not None:
        lines.append(f'TEMPLATE """{chat.template()}"""')
    elif tokenizer.chat_template:
        lines.append(
            "# The chat format is none that bitdistill can write as an Ollama template (ChatML, Llama 3,"
        )
        lines.append("# Gemma): Ollama uses what it makes of the template in the GGUF file.")
    else:
        lines.append('TEMPLATE """{{ .Prompt }}"""')
    ids = generation.get("eos_token_id")
    ids = ids if isinstance(ids, list) else [ids]
    for number in [*ids, tokenizer.eos_token_id]:
        if number is not None:
            stops.append(str(tokenizer.convert_ids_to_tokens(int(number))))
    for stop in dict.fromkeys(stops):
        if '"' in stop or "\n" in stop:
            raise ModelError(f"stop token {stop!r} cannot be written in a Modelfile")
        lines.append(f'PARAMETER stop "{stop}"')
    temperature = generation.get("temperature", 1.0) if generation.get("do_sample") else 0
    lines.append(f"PARAMETER temperature {temperature}")
    return "\n".join(lines) + "\n"


def chat_format(tokenizer: Any) -> ChatFormat | None:
    """The format that the tokenizer's template renders, if it is one known here."""
    if not tokenizer.chat_template:
        return None
    import jinja2

    messages = [{"role": "user", "content": "What is 2 + 2?"}]
    try:
        text = str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
    except (jinja2.TemplateError, TypeError, ValueError):
        return None
    # A template may begin with bos, or put a default system message first.
    return next((chat for chat in CHAT_FORMATS if text.endswith(chat.rendered(messages))), None)
