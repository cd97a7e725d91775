"""What the routes take, as strict pydantic models.

The names are those of OpenAI's API. Fields that would change an answer and that the engine cannot honour are refused
unless they hold their neutral value; fields that change no answer (`user`, `metadata`, ...) are accepted and ignored;
any other name is a mistake and is refused.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

MAX_INPUTS = 256
"""Texts of one classification request."""
MAX_CHOICES = 16

_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "logprobs": (None, False),
    "top_logprobs": (None, 0),
    "logit_bias": (None, {}),
    "presence_penalty": (None, 0),
    "frequency_penalty": (None, 0),
    "tools": (None, []),
    "tool_choice": (None, "none", "auto"),
    "functions": (None, []),
    "response_format": (None, {"type": "text"}),
    "suffix": (None, ""),
    "echo": (None, False),
    "best_of": (None, 1),
    "modalities": (None, ["text"]),
    "audio": (None,),
    "prediction": (None,),
}
_NEUTRAL_IN_MESSAGE: dict[str, tuple[Any, ...]] = dict.fromkeys(
    ("refusal", "annotations", "audio", "function_call", "tool_calls"), (None, "", [], {})
)
"""Of an answer that is sent back as a turn of the conversation."""
_IGNORED = (
    "user",
    "metadata",
    "store",
    "service_tier",
    "parallel_tool_calls",
    "prompt_cache_key",
    "safety_identifier",
)
TAKES = {
    "prompt": f"a text, a list of token ids, or a list of up to {MAX_CHOICES} texts or lists of token ids",
    "input": f"a text, an object of fields, or a list of up to {MAX_INPUTS} of them",
    "content": "a text or a list of text parts",
}
"""Fields of several types, for errors."""


def _without(data: dict[str, Any], neutral: dict[str, tuple[Any, ...]]) -> dict[str, Any]:
    """The fields that may say something.

    Raises:
        ValueError: one of the others does.
    """
    for name, values in neutral.items():
        if name in data and not any(_same(data[name], value) for value in values):
            raise ValueError(f"{name} is not supported; leave it out")
    return {name: value for name, value in data.items() if name not in neutral}


def _same(one: Any, other: Any) -> bool:
    """Equal, where false is not 0: `logprobs` 0 asks for something."""
    return isinstance(one, bool) == isinstance(other, bool) and bool(one == other)


def _as_list(value: Any) -> Any:
    return [] if value is None else [value] if isinstance(value, str) else value


class _Request(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    model: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _set_aside(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        return {name: value for name, value in _without(data, _NEUTRAL).items() if name not in _IGNORED}


class StreamOptions(BaseModel):
    """`include_usage`: a last piece with the numbers of tokens."""

    model_config = ConfigDict(extra="ignore", strict=True)

    include_usage: bool = False


Text = Annotated[str, Field(min_length=1)]


class Sampling(_Request):
    """What chat and completions have in common. `top_k` is ours; without a temperature the choice is greedy."""

    max_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=100)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=0, lt=2**32)] | None = None
    seed: Annotated[int, Field(ge=0, lt=2**63)] | None = None
    stop: Annotated[list[Text], BeforeValidator(_as_list), Field(max_length=16)] = []
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    @property
    def with_usage(self) -> bool:
        """Whether a stream ends with the numbers of tokens."""
        return self.stream_options is not None and self.stream_options.include_usage


class ContentPart(BaseModel):
    """A piece of a message; text alone."""

    model_config = ConfigDict(extra="forbid", strict=True)

    type: Literal["text"]
    text: str

    @model_validator(mode="before")
    @classmethod
    def _is_text(cls, data: Any) -> Any:
        if isinstance(data, dict) and data.get("type", "text") != "text":
            message = "the model reads text alone, send parts of type text"
            raise ValueError(f"a part of type {data['type']!r:.60}; {message}")
        return data


class Message(BaseModel):
    """One turn of a conversation."""

    model_config = ConfigDict(extra="forbid", strict=True)

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[ContentPart]
    name: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _set_aside(cls, data: Any) -> Any:
        return _without(data, _NEUTRAL_IN_MESSAGE) if isinstance(data, dict) else data

    def plain(self) -> dict[str, str]:
        """For the chat template, which knows `developer` as `system`."""
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return {"role": "system" if self.role == "developer" else self.role, "content": text}


class ChatRequest(Sampling):
    """POST /v1/chat/completions."""

    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None


Ids = Annotated[list[Annotated[int, Field(ge=0, lt=2**31)]], Field(min_length=1)]


class CompletionRequest(Sampling):
    """POST /v1/completions."""

    prompt: str | Ids | Annotated[list[str] | list[Ids], Field(min_length=1, max_length=MAX_CHOICES)]

    def prompts(self) -> list[str | list[int]]:
        """The prompts as a list."""
        if isinstance(self.prompt, str) or isinstance(self.prompt[0], int):
            return [self.prompt]  # type: ignore[list-item]
        return list(self.prompt)  # type: ignore[arg-type]


Fields = dict[str, Any]


class ClassifyRequest(_Request):
    """POST /v1/classify: a text or an object of fields, or a list of them."""

    input: str | Fields | Annotated[list[str | Fields], Field(min_length=1, max_length=MAX_INPUTS)]

    def inputs(self) -> list[str | Fields]:
        """The inputs as a list."""
        return self.input if isinstance(self.input, list) else [self.input]
