"""What a model writes after a prompt: tokens to text, stop strings, streaming."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from bitdistill.engine.text import FolderTokenizer

FinishReason = Literal["stop", "length", "callback"]


@dataclass(frozen=True)
class Generation:
    """What a model wrote after one prompt."""

    text: str
    """New tokens as text, without special tokens; ends before a stop string."""
    ids: tuple[int, ...]
    """New token ids; an end-of-text id is not among them."""
    prompt_tokens: int
    reused_tokens: int
    """Prompt tokens whose keys and values were there already: from the last call, or from the batch's first prompt."""
    finish_reason: FinishReason


class NewText:
    """One sequence's new tokens on their way to text: stop ids, stop strings, streaming.

    Args:
        tokenizer: of the model.
        words: texts that end the generation and are cut off.
        ends: token ids that end it.
        room: new tokens at most; 0 or less: it is finished from the start.
        stream: called with new text; returning False ends the generation.
    """

    def __init__(
        self,
        tokenizer: FolderTokenizer,
        words: list[str],
        ends: frozenset[int],
        room: int,
        stream: Callable[[str], bool | None] | None,
    ) -> None:
        self.tokenizer, self.words, self.ends, self.room = tokenizer, words, ends, room
        self.stream = stream
        self.ids: list[int] = []
        self.finish_reason: FinishReason | None = None if room > 0 else "length"
        self._text, self._sent, self._cut = "", 0, -1
        self._start, self._read, self._seen = 0, 0, ""  # ids[_start:_read] are in the text, as _seen

    def add(self, token: int) -> None:
        """Take one new token."""
        if token in self.ends:
            self.finish_reason = "stop"
        else:
            self.ids.append(token)
            if len(self.ids) >= self.room:
                self.finish_reason = "length"
        self._decode()
        self._look_for_stop()
        self._send()

    def _decode(self) -> None:
        """Lengthen the text by the new tokens, which wait for the rest of a character unless none comes.

        They are decoded behind a few earlier ones, on which spaces depend, and not all anew: where a tokenizer falls
        back to bytes, a broken one changes the text of those before it, which may have been sent. (`DecodeStream` of
        tokenizers fails there, and keeps an unfinished character for itself.)
        """
        text = self.tokenizer.decode(self.ids[self._start :])
        waits = len(text) <= len(self._seen) or text.endswith("\ufffd")
        if waits and self.finish_reason is None:
            return
        self._text += text[len(self._seen) :]
        self._start, self._read = self._read, len(self.ids)
        self._seen = self.tokenizer.decode(self.ids[self._start :])

    def _look_for_stop(self) -> None:
        found = [at for at in (self._text.find(word) for word in self.words) if at >= 0]
        if found:
            self._cut, self.finish_reason = min(found), "stop"

    def _send(self) -> None:
        """Settle the text that can no longer be part of a stop string, and stream it."""
        end = self._cut if self._cut >= 0 else len(self._text)
        if self.finish_reason is None:
            end -= max((_overlap(self._text, word) for word in self.words), default=0)
        if end > self._sent:
            new, self._sent = self._text[self._sent : end], end
            refused = self.stream is not None and self.stream(new) is False
            if refused and self.finish_reason is None:
                self.finish_reason = "callback"

    def stop(self) -> None:
        """End it here, as a stream that returns False does."""
        if self.finish_reason is None:
            self.finish_reason = "callback"

    def result(self, prompt_tokens: int, reused_tokens: int) -> Generation:
        """The finished generation; its text is what was streamed, or would have been."""
        assert self.finish_reason is not None
        return Generation(
            self._text[: self._sent], tuple(self.ids), prompt_tokens, reused_tokens, self.finish_reason
        )


def _overlap(text: str, word: str) -> int:
    """Length of the longest end of `text` that begins `word`."""
    for n in range(min(len(text), len(word) - 1), 0, -1):
        if word.startswith(text[-n:]):
            return n
    return 0
