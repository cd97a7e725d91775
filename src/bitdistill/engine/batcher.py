"""Continuous batching: requests come and go at any time, all unfinished ones are decoded together.

One thread runs the model. Each turn it admits waiting requests, runs a bounded number of prompt tokens, and one token
of every sequence whose prompt is done. A long prompt is run in pieces, so that it never holds up the others for long.
Finished sequences are kept for a while: a prompt that begins like one of them (the next turn of a conversation) runs
only what is new.

A request gets the tokens that it would get alone (`Engine.generate`), whatever runs beside it.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

from bitdistill.engine import _native
from bitdistill.engine.engine import SHARED_PREFIX_TOKENS, Engine, Prompt, reusable
from bitdistill.engine.generation import Generation, NewText
from bitdistill.errors import BitDistillError

PROMPT_TOKENS_A_TURN = 256
"""As many rows as the engine runs in one pass; bounds how long the other sequences wait for a token."""

T = TypeVar("T")


class Overloaded(BitDistillError):
    """The queue is full; try again later."""


class Closed(BitDistillError):
    """The batcher was closed before the request was finished."""


@dataclass
class Counters:
    """Since the start; `active` and `waiting` now."""

    requests: int = 0
    failed: int = 0
    cancelled: int = 0
    prompt_tokens: int = 0
    reused_tokens: int = 0
    new_tokens: int = 0
    steps: int = 0
    active: int = 0
    waiting: int = 0


class Ticket:
    """One request on its way. `future` holds its `Generation`, or the error that ended it."""

    def __init__(self, prompt: NDArray[np.int32], text: NewText, sampler: Any, stream: int) -> None:
        self.prompt, self.text, self.sampler, self.stream = prompt, text, sampler, stream
        self.future: Future[Generation] = Future()
        self.cancelled = False
        self.sequence: Any = None
        self.next = prompt  # tokens that the sequence has not seen
        self.reused = 0
        self.step = 0

    def cancel(self) -> None:
        """End it at the next token; `future` then holds what was written. Safe from any thread, and twice."""
        self.cancelled = True

    def finish(self) -> None:
        """Hand over what was written."""
        with suppress(InvalidStateError):  # cancelled through the future itself
            self.future.set_result(self.text.result(len(self.prompt), self.reused))

    def fail(self, error: BaseException) -> None:
        """Hand over an error."""
        with suppress(InvalidStateError):
            self.future.set_exception(error)


@dataclass
class _Call(Generic[T]):
    function: Callable[[], T]
    future: Future[T] = field(default_factory=Future)


class Batcher:
    """Runs an engine for many callers.

    Args:
        engine: its model is run by this batcher's thread; other calls of the engine still work, in turn with it.
        max_sequences: decoded together.
        max_waiting: requests that may wait for a place; more are refused (`Overloaded`).
        kept_sequences: finished sequences whose keys and values stay for prompts that begin alike.
    """

    def __init__(
        self, engine: Engine, *, max_sequences: int = 8, max_waiting: int = 64, kept_sequences: int = 8
    ) -> None:
        self.engine = engine
        self.max_sequences, self.max_waiting, self.kept_sequences = max_sequences, max_waiting, kept_sequences
        self._counters = Counters()
        self._waiting: deque[Ticket] = deque()
        self._calls: deque[_Call[Any]] = deque()
        self._active: list[Ticket] = []
        self._kept: deque[Any] = deque()  # sequences, the last used one at the end
        self._changed = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="bitdistill-batcher", daemon=True)
        self._thread.start()

    def submit(
        self,
        prompt: Prompt | NDArray[np.int32],
        *,
        max_new_tokens: int = 128,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        seed: int = 0,
        draw: int = 0,
        stop: str | Sequence[str | int] = (),
        on_text: Callable[[str], bool | None] | None = None,
    ) -> Ticket:
        """Queue a prompt. Arguments are those of `Engine.generate`.

        Args:
            draw: tells apart draws of one seed: the place in the batch of `Engine.generate`.
            on_text: called by the batcher's thread with new text; it must not block. False ends the request.

        Raises:
            ModelError: a prompt or an option that the model cannot take.
            Overloaded: as many requests as may wait are waiting.
            Closed: after `close`.
        """
        ids = self.engine.prompt_ids(prompt)
        sampler = _native.Sampler(temperature, top_k, top_p, seed)
        text = self.engine.new_text(ids, max_new_tokens, stop, on_text)
        ticket = Ticket(ids, text, sampler, draw)
        with self._changed:
            self._check_open()
            if len(self._waiting) >= self.max_waiting:
                raise Overloaded(f"{len(self._waiting)} requests are waiting already; try again later")
            self._waiting.append(ticket)
            self._counters.requests += 1
            self._changed.notify()
        return ticket

    def call(self, function: Callable[[], T]) -> Future[T]:
        """Run something else with the engine between two steps.

        Raises:
            Overloaded, Closed: as `submit`.
        """
        call = _Call(function)
        with self._changed:
            self._check_open()
            if len(self._calls) >= self.max_waiting:
                raise Overloaded(f"{len(self._calls)} requests are waiting already; try again later")
            self._calls.append(call)
            self._changed.notify()
        return call.future

    def counters(self) -> Counters:
        """A copy of the counters."""
        with self._changed:
            now = Counters(**vars(self._counters))
            now.active, now.waiting = len(self._active), len(self._waiting) + len(self._calls)
        return now

    def close(self) -> None:
        """Stop after the step in progress. Unfinished requests fail with `Closed`."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join()

    def _check_open(self) -> None:
        if self._closed:
            raise Closed("the server is shutting down")

    # ------------------------------------------------------------------------------------ the thread's side

    def _run(self) -> None:
        while True:
            with self._changed:
                while not (self._closed or self._waiting or self._calls or self._active):
                    self._changed.wait()
                if self._closed:
                    break
                call = self._calls.popleft() if self._calls else None
                while self._waiting and len(self._active) < self.max_sequences:
                    self._active.append(self._waiting.popleft())
            if call is not None:
                self._answer(call)
            self._turn()
        error = Closed("the server is shutting down")
        for ticket in [*self._active, *self._waiting]:
            ticket.fail(error)
        for left in self._calls:
            left.future.set_exception(error)

    @staticmethod
    def _answer(call: _Call[Any]) -> None:
        if not call.future.set_running_or_notify_cancel():
            return
        try:
            result = call.function()
        except BaseException as error:  # the caller's
            call.future.set_exception(error)
        else:
            call.future.set_result(result)

    def _turn(self) -> None:
        """A piece of the prompts, then one token of every sequence whose prompt is done."""
        for ticket in list(self._active):
            if ticket.cancelled:
                ticket.text.stop()
            if ticket.text.finish_reason is not None:  # also one without room for a single token
                self._end(ticket)
        if not self._active:
            return
        try:
            with self.engine._lock:
                self._step()
        except Exception as error:
            # Nobody's tokens can be told to be right after a failed pass, so all of this turn end here.
            for ticket in list(self._active):
                self._drop(ticket, error)

    def _step(self) -> None:
        left = PROMPT_TOKENS_A_TURN
        pieces, ready = [], []
        for ticket in self._active:
            if ticket.sequence is None:
                self._place(ticket)
            if ticket.step == 0:
                if left == 0:
                    continue
                count = min(len(ticket.next), left)
                left -= count
                if count < len(ticket.next):
                    pieces.append((ticket.sequence, np.ascontiguousarray(ticket.next[:count])))
                    ticket.next = ticket.next[count:]
                    continue
            ready.append(ticket)
        model = self.engine.model
        if pieces:
            model.forward(pieces, "none")
        if not ready:
            return
        chosen = model.step(
            [(ticket.sequence, np.ascontiguousarray(ticket.next)) for ticket in ready],
            [ticket.sampler for ticket in ready],
            [ticket.stream for ticket in ready],
            [ticket.step for ticket in ready],
        )
        with self._changed:
            self._counters.steps += 1
            self._counters.new_tokens += len(ready)
        for ticket, token in zip(ready, chosen, strict=True):
            ticket.step += 1
            ticket.next = np.array([token], dtype=np.int32)
            try:
                ticket.text.add(token)
            except Exception as error:  # of its callback: nobody else's matter
                self._drop(ticket, error)
                continue
            if ticket.text.finish_reason is not None:
                self._end(ticket)

    def _place(self, ticket: Ticket) -> None:
        """A sequence for a request: the kept one that agrees with its prompt furthest, or a new one."""
        prompt = ticket.prompt
        best, best_common = None, SHARED_PREFIX_TOKENS - 1
        for sequence in self._kept:
            common = reusable(sequence, prompt)
            if common > best_common:
                best, best_common = sequence, common
        if best is None:
            ticket.sequence = _native.Sequence(self.engine.model)
        else:
            self._kept.remove(best)
            best.truncate(best_common)
            ticket.sequence, ticket.reused = best, best_common
        ticket.next = prompt[ticket.reused :]
        with self._changed:
            self._counters.prompt_tokens += len(prompt)
            self._counters.reused_tokens += ticket.reused

    def _end(self, ticket: Ticket) -> None:
        with self._changed:
            self._active.remove(ticket)
            self._counters.cancelled += ticket.cancelled
        if ticket.sequence is not None and self.kept_sequences:
            self._kept.append(ticket.sequence)
            while len(self._kept) > self.kept_sequences:
                self._kept.popleft()
        ticket.finish()

    def _drop(self, ticket: Ticket, error: Exception) -> None:
        with self._changed:
            self._active.remove(ticket)
            self._counters.failed += 1
        ticket.fail(error)
