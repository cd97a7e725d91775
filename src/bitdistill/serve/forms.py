"""How generations are written down for OpenAI's clients: whole, or piece by piece."""

from __future__ import annotations

import secrets
import time
from collections.abc import Sequence
from typing import Any

from bitdistill.engine.generation import FinishReason, Generation

_REASONS: dict[FinishReason, str] = {"stop": "stop", "length": "length", "callback": "stop"}


class Form:
    """What both kinds of answers share: one id, time and model name for all pieces of an answer."""

    prefix: str
    whole_object: str
    piece_object: str

    def __init__(self, model: str) -> None:
        self.model = model
        self.id = f"{self.prefix}-{secrets.token_hex(12)}"
        self.created = int(time.time())

    def content(self, text: str) -> dict[str, Any]:
        """A finished text."""
        raise NotImplementedError

    def delta(self, text: str) -> dict[str, Any]:
        """A piece of text; empty at the end."""
        raise NotImplementedError

    def opening(self, choice: int) -> list[dict[str, Any]]:
        """What comes before the first text of a choice."""
        return []

    def whole(self, generations: Sequence[Generation]) -> dict[str, Any]:
        """A finished answer."""
        choices = [
            self._choice(index, self.content(one.text), _REASONS[one.finish_reason])
            for index, one in enumerate(generations)
        ]
        return {**self._frame(self.whole_object, choices), "usage": usage(generations)}

    def piece(self, choice: int, text: str) -> dict[str, Any]:
        """New text."""
        return self._frame(self.piece_object, [self._choice(choice, self.delta(text), None)])

    def closing(self, choice: int, generation: Generation) -> dict[str, Any]:
        """Why it ended."""
        reason = _REASONS[generation.finish_reason]
        return self._frame(self.piece_object, [self._choice(choice, self.delta(""), reason)])

    def usage_piece(self, generations: Sequence[Generation]) -> dict[str, Any]:
        """Numbers of tokens, after everything else."""
        return {**self._frame(self.piece_object, []), "usage": usage(generations)}

    @staticmethod
    def _choice(index: int, content: dict[str, Any], reason: str | None) -> dict[str, Any]:
        return {"index": index, **content, "logprobs": None, "finish_reason": reason}

    def _frame(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "id": self.id,
            "object": kind,
            "created": self.created,
            "model": self.model,
            "choices": choices,
        }


class Completion(Form):
    """Of /v1/completions."""

    prefix, whole_object, piece_object = "cmpl", "text_completion", "text_completion"

    def content(self, text: str) -> dict[str, Any]:
        return {"text": text}

    def delta(self, text: str) -> dict[str, Any]:
        return {"text": text}


class Chat(Form):
    """Of /v1/chat/completions."""

    prefix, whole_object, piece_object = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def opening(self, choice: int) -> list[dict[str, Any]]:
        start = {"delta": {"role": "assistant", "content": ""}}
        return [self._frame(self.piece_object, [self._choice(choice, start, None)])]

    def content(self, text: str) -> dict[str, Any]:
        return {"message": {"role": "assistant", "content": text}}

    def delta(self, text: str) -> dict[str, Any]:
        return {"delta": {"content": text} if text else {}}


def usage(generations: Sequence[Generation]) -> dict[str, Any]:
    """Numbers of tokens; `cached_tokens` are prompt tokens whose keys and values were there already."""
    prompt = sum(one.prompt_tokens for one in generations)
    new = sum(len(one.ids) for one in generations)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": new,
        "total_tokens": prompt + new,
        "prompt_tokens_details": {"cached_tokens": sum(one.reused_tokens for one in generations)},
    }
