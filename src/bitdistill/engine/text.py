"""The tokenizer of a model folder through the `tokenizers` package; chat templates through jinja2.

`FolderTokenizer` answers the questions that `bitdistill.data` asks of a Hugging Face tokenizer, so that tasks
are encoded by the same code with either. No torch, no transformers, no code of the folder.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bitdistill.errors import ModelError

if TYPE_CHECKING:
    from jinja2.ext import Extension


SPECIAL_TOKENS = tuple(f"{name}_token" for name in ("bos", "eos", "unk", "sep", "pad", "cls", "mask"))
"""What chat templates know by name."""


class FolderTokenizer:
    """A folder's tokenizer.json with the special tokens of its tokenizer_config.json.

    Raises:
        ModelError: no tokenizer.json, or one that cannot be read.
    """

    def __init__(self, folder: Path) -> None:
        from tokenizers import Tokenizer

        path = folder / "tokenizer.json"
        if not path.is_file():
            raise ModelError(f"{path}: missing; save a fast tokenizer (tokenizer.json) beside the model")
        try:
            self.backend = Tokenizer.from_file(str(path))
        except Exception as error:  # the package raises bare Exception
            raise ModelError(f"{path}: not a tokenizer ({str(error)[:200]}); save it again") from error
        self.backend.no_padding()
        self.backend.no_truncation()
        self.config = _json_object(folder / "tokenizer_config.json")
        more = _json_object(folder / "special_tokens_map.json")
        self.eos_token_id = self._special("eos_token", more)
        self.bos_token_id = self._special("bos_token", more)
        self.chat_template = _chat_template(folder, self.config)

    def _special(self, name: str, more: Mapping[str, Any]) -> int | None:
        value = self.config.get(name, more.get(name))
        text = value.get("content") if isinstance(value, Mapping) else value
        return self.backend.token_to_id(text) if isinstance(text, str) else None

    def __call__(
        self,
        text: str | Sequence[str],
        add_special_tokens: bool = True,
        return_attention_mask: bool = False,
        return_offsets_mapping: bool = False,
    ) -> dict[str, Any]:
        """Ids (and offsets) of a text, or lists of them for several texts."""
        if isinstance(text, str):
            one = self.backend.encode(text, add_special_tokens=add_special_tokens)
            return {"input_ids": one.ids, "offset_mapping": one.offsets}
        many = self.backend.encode_batch(list(text), add_special_tokens=add_special_tokens)
        result: dict[str, Any] = {"input_ids": [encoding.ids for encoding in many]}
        if return_offsets_mapping:
            result["offset_mapping"] = [encoding.offsets for encoding in many]
        return result

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Text of token ids."""
        text: str = self.backend.decode(list(ids), skip_special_tokens=skip_special_tokens)
        return text

    def render_chat(self, messages: Sequence[Mapping[str, str]], **variables: Any) -> str:
        """The chat template applied to messages, with the assistant's turn opened.

        Raises:
            ModelError: the folder has no chat template, it fails, or it refuses the messages.
        """
        if self.chat_template is None:
            raise ModelError("the model has no chat template; use generate with a plain prompt")
        import jinja2
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        class Refused(jinja2.TemplateError):
            """What the template itself raises."""

        def refuse(message: str) -> None:
            raise Refused(message)

        # As transformers renders templates, whose authors test them there
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", _generation_tag()]
        )
        environment.globals["raise_exception"] = refuse
        environment.globals["strftime_now"] = lambda format: datetime.now().strftime(format)
        environment.filters["tojson"] = _to_json
        special = {
            name: value.get("content") if isinstance(value, Mapping) else value
            for name, value in self.config.items()
            if name in SPECIAL_TOKENS and value is not None
        }
        try:
            return environment.from_string(self.chat_template).render(
                {
                    **special,
                    "messages": list(messages),
                    "tools": None,
                    "documents": None,
                    "add_generation_prompt": True,
                    **variables,
                }
            )
        except Refused as error:
            raise ModelError(f"chat template: {str(error)[:200]}; change the messages") from error
        except Exception as error:  # a template is a program, which may fail in any way
            raise ModelError(f"chat template: {str(error)[:200]}; mend chat_template.jinja") from error


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: Any = None,
    separators: Any = None,
    sort_keys: bool = False,
) -> str:
    """transformers' filter: jinja's own escapes HTML."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


@functools.cache
def _generation_tag() -> type[Extension]:
    """transformers' `{% generation %}`, which marks the assistant's text for training: here its body and no more."""
    from jinja2 import nodes
    from jinja2.ext import Extension

    class GenerationTag(Extension):
        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser: Any) -> nodes.Node:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.CallBlock(self.call_method("body"), [], [], body).set_lineno(line)

        def body(self, caller: Callable[[], str]) -> str:
            return caller()

    return GenerationTag


def stop_ids(folder: Path, tokenizer: FolderTokenizer, config_eos: Sequence[int]) -> frozenset[int]:
    """End-of-text ids: the tokenizer's, and those of generation_config.json (else of config.json)."""
    own = _json_object(folder / "generation_config.json").get("eos_token_id")
    if own is None:
        own = list(config_eos)
    ids = [own] if isinstance(own, int) else [i for i in own if isinstance(i, int)]
    return frozenset(ids if tokenizer.eos_token_id is None else [*ids, tokenizer.eos_token_id])


def _chat_template(folder: Path, config: Mapping[str, Any]) -> str | None:
    path = folder / "chat_template.jinja"
    if path.is_file():
        return path.read_text("utf-8")
    template = config.get("chat_template")
    if isinstance(template, list):  # named ones
        named = {entry.get("name"): entry.get("template") for entry in template if isinstance(entry, Mapping)}
        template = named.get("default")
    return template if isinstance(template, str) else None


def _json_object(path: Path) -> dict[str, Any]:
    """A JSON object, empty if there is no such file.

    Raises:
        ModelError: the file is there and is no JSON object.
    """
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{path}: unreadable ({str(error)[:100]}); save the model again") from error
    if not isinstance(value, dict):
        raise ModelError(f"{path}: not a JSON object; save the model again")
    return value
