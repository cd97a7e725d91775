"""A process that turns texts into token ids, fed through pipes by `corpus.tokenize_corpus`.

It is started as a script of its own, so it imports neither the caller's main module (which a spawned
multiprocessing worker would run again) nor transformers or torch. Only the standard library, numpy and
tokenizers may be imported here.

Protocol, little-endian: the first request is the settings, every later one a list of texts (both JSON); each
text request is answered by the ids' bytes. Messages are preceded by their length in 8 bytes.
"""

from __future__ import annotations

import json
import struct
import sys
from collections.abc import Sequence
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

DTYPES: dict[str, np.dtype[Any]] = {"uint16": np.dtype("<u2"), "uint32": np.dtype("<u4")}


class Coder:
    """Texts to the ids of a token stream: [prefix] text eos for each.

    Args:
        state: the tokenizer's JSON (`tokenizer.json`).
        prefix: ids before each text (bos, or nothing).
        eos: id after each text.
    """

    def __init__(self, state: str, prefix: Sequence[int], eos: int) -> None:
        self.state, self.prefix, self.eos = state, list(prefix), eos
        self._tokenizer = Tokenizer.from_str(state)
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        # Marks such as <|endoftext|> inside a document are text, not its end.
        self._tokenizer.encode_special_tokens = True
        self.vocab_size = max(self._tokenizer.get_vocab(with_added_tokens=True).values()) + 1
        self.dtype = "uint16" if self.vocab_size <= 2**16 else "uint32"

    def encode(self, texts: list[str]) -> NDArray[np.integer]:
        """Ids of all texts, joined, in the smallest dtype that holds the vocabulary."""
        encoded = self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        rows = [np.array([*self.prefix, *e.ids, self.eos], dtype=DTYPES[self.dtype]) for e in encoded]
        return np.concatenate(rows)


def send(stream: IO[bytes], message: bytes) -> None:
    """Write one message and flush."""
    stream.write(struct.pack("<Q", len(message)))
    stream.write(message)
    stream.flush()


def receive(stream: IO[bytes]) -> bytes | None:
    """Read one message; None at the end of the stream, also within a message."""
    header = stream.read(8)
    if len(header) < 8:
        return None
    length = struct.unpack("<Q", header)[0]
    message = stream.read(length)
    return message if len(message) == length else None


def main() -> None:
    """Serve requests until the pipe is closed."""
    requests, answers = sys.stdin.buffer, sys.stdout.buffer
    settings = receive(requests)
    if settings is None:
        return
    coder = Coder(**json.loads(settings))
    while (message := receive(requests)) is not None:
        send(answers, coder.encode(json.loads(message)).tobytes())


if __name__ == "__main__":
    main()
