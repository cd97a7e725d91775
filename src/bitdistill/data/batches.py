"""Batches as pure functions of (seed, step): there is no loader state to save or to lose (R1, R9).

Shape legend: B rows of a micro-batch, T tokens (padded on the right).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bitdistill.config import Loop
from bitdistill.data.tasks import Example
from bitdistill.errors import DataError

WINDOW_BATCHES = 32
"""Rows are sorted by length among this many batches: little padding, and still nearly random batches."""
COUNTED_TOKENS = 1 << 24
"""So many tokens of a corpus say which words are frequent (`SampledWords`)."""
PACKED_MULTIPLE = 256
"""Packed batches are filled up to a multiple of this many tokens, so that few shapes occur."""


@dataclass
class Batch:
    """One forward/backward: some rows of an optimizer step."""

    input_ids_BT: Tensor
    """int64; padding on the right."""
    attention_mask_BT: Tensor
    """bool: True at real tokens. Causal models need no mask for right padding; losses over all tokens do."""
    answer_mask_BT: Tensor
    """bool: True at t where input_ids[:, t] is an answer token, so it is predicted by the logits at t - 1."""
    labels_B: Tensor
    """int64: index of the label, -1 where there is none."""
    indices: list[int]
    """Which examples (or windows of the corpus) these are."""
    weight: float
    """This micro-batch's share of the step's answer tokens: losses are means over answer tokens, so the sum
    of weight * loss over a step does not depend on micro_batch_rows."""
    tokens: int
    """Real tokens, padding left out."""
    answer_index_N: Tensor
    """int64: b * T + t of the answer tokens at t >= 1, in order. Fixed-size gathers by index instead of by mask need
    no read-back from the device. Entries of -1 (at the end) are filling, and count for nothing."""
    real_index_N: Tensor
    """int64: b * T + t of the real tokens, likewise."""
    positions_BT: Tensor | None = None
    """int64, packed batches only: rows lie one after the other in [1, T], and each starts at position 0 again."""
    starts_R: Tensor | None = None
    """int32, packed batches only: where each row starts, where the filling behind them starts, and T."""
    longest: int = 0
    """Packed batches only: no row, nor the filling, is longer."""
    label_scores_BC: Tensor | None = None
    """float32, with another model's teacher only: its log-likelihood of each label word."""
    answer_start_B: Tensor | None = None
    """int64, likewise: b * T + t of each row's first answer token."""
    words_S: Tensor | None = None
    """int64, sampled softmax only: the words of the vocabulary that the step's loss is over, the same for all of its
    micro-batches."""
    places_BT: Tensor | None = None
    """int64, likewise: where among them the next token is; -1 at a row's last."""

    @property
    def rows(self) -> int:
        """Rows of the task, however they are laid out."""
        return len(self.labels_B)

    @property
    def packing(self) -> dict[str, Any]:
        """What a model's forward pass needs to keep packed rows apart; nothing for padded rows."""
        if self.starts_R is None:
            return {}
        return {"position_ids": self.positions_BT, "row_starts": self.starts_R, "longest_row": self.longest}

    @property
    def documents(self) -> dict[str, Any]:
        """What losses over whole rows need, likewise."""
        return {} if self.starts_R is None else {"starts_R": self.starts_R, "longest": self.longest}

    def to(self, device: torch.device | str, non_blocking: bool = True) -> Batch:
        """The same batch on another device."""
        return replace(
            self,
            input_ids_BT=self.input_ids_BT.to(device, non_blocking=non_blocking),
            attention_mask_BT=self.attention_mask_BT.to(device, non_blocking=non_blocking),
            answer_mask_BT=self.answer_mask_BT.to(device, non_blocking=non_blocking),
            labels_B=self.labels_B.to(device, non_blocking=non_blocking),
            answer_index_N=self.answer_index_N.to(device, non_blocking=non_blocking),
            real_index_N=self.real_index_N.to(device, non_blocking=non_blocking),
            positions_BT=_moved(self.positions_BT, device, non_blocking),
            starts_R=_moved(self.starts_R, device, non_blocking),
            label_scores_BC=_moved(self.label_scores_BC, device, non_blocking),
            answer_start_B=_moved(self.answer_start_B, device, non_blocking),
            words_S=_moved(self.words_S, device, non_blocking),
            places_BT=_moved(self.places_BT, device, non_blocking),
        )

    def with_filled_index(self, multiple: int) -> Batch:
        """The same batch (on the host) with its indices filled up with -1, so that few shapes occur: answers to a
        multiple, real tokens to the size of the batch."""
        return replace(
            self,
            answer_index_N=_filled(self.answer_index_N, multiple),
            real_index_N=_filled(self.real_index_N, self.input_ids_BT.numel()),
        )


def _moved(tensor: Tensor | None, device: torch.device | str, non_blocking: bool) -> Tensor | None:
    return None if tensor is None else tensor.to(device, non_blocking=non_blocking)


def index_of(mask_BT: Tensor) -> Tensor:
    """int64 positions b * T + t of the True entries, in order."""
    return torch.from_numpy(np.flatnonzero(mask_BT.numpy()))


def _filled(index_N: Tensor, multiple: int) -> Tensor:
    return torch.nn.functional.pad(index_N, (0, -len(index_N) % multiple), value=-1)


class TokenStream(Protocol):
    """What PackedBatches reads: `corpus.TokenShards`, or anything like it."""

    n_tokens: int

    def read(self, start: int, count: int) -> NDArray[np.integer]: ...


def _generator(seed: int, epoch: int) -> np.random.Generator:
    return np.random.default_rng([seed & 0xFFFFFFFF, seed >> 32 & 0xFFFFFFFF, epoch])


def padded_lengths(longest: Sequence[int], rows: Sequence[int], count: int, multiple: int) -> list[int]:
    """The lengths to which batches are padded with the fewest tokens in all.

    Args:
        longest: the longest row of each batch, in tokens.
        rows: of each batch.
        count: of different lengths, at most.
        multiple: lengths are multiples of this.

    Returns:
        Rising lengths; the last takes the longest batch.
    """
    sizes, of_size = np.unique(-(-np.asarray(longest) // multiple) * multiple, return_inverse=True)
    before = np.concatenate([[0.0], np.cumsum(np.bincount(of_size, weights=np.asarray(rows)))])
    # fewest[j]: tokens of all batches of the j smallest sizes, padded to as many lengths as there were rounds
    fewest = np.full(len(sizes) + 1, np.inf)
    fewest[0] = 0.0
    froms: list[NDArray[np.int64]] = []
    for _ in range(min(count, len(sizes))):
        # [i, j]: batches of sizes i to j - 1 are padded to the last of these sizes
        total = fewest[:, None] + (before[None, :] - before[:, None]) * np.concatenate([[0], sizes])[None, :]
        total[np.tri(len(sizes) + 1, dtype=bool)] = np.inf
        froms.append(total.argmin(axis=0))
        fewest = total.min(axis=0)
    chosen, end = [], len(sizes)
    for start in reversed(froms):
        chosen.append(int(sizes[end - 1]))
        end = int(start[end])
    return chosen[::-1]


class TaskBatches:
    """Rows of a task in padded batches.

    Each epoch is a permutation of the rows by (seed, epoch). Rows of similar length meet in a batch (sorted
    within windows of 32 batches), batches are then shuffled; each row comes exactly once an epoch, and the
    last batch of an epoch holds what is left over.

    Args:
        examples: encoded rows.
        batch_rows: rows of one optimizer step.
        micro_batch_rows: rows of one forward/backward; None: batch_rows.
        micro_batch_tokens: tokens of one forward/backward (see `Loop.rows_at_a_time`; with packing those of the rows,
            without padding).
        seed: of the order.
        pad_id: token id of the padding; its value reaches no loss.
        bucket_multiple: micro-batches are padded to a multiple of this.
        buckets: lengths to pad to instead.
        few_lengths: pad to at most so many lengths instead, for compiled runs with few shapes: those that leave the
            least padding in the first epoch.
        packing: lay the rows of a micro-batch one after the other, without padding between them. Batches are then
            not sorted by length, which keeps their sizes alike.
        label_scores_NC: float32, a teacher's score of each label for each example; batches bring those of their rows.

    Raises:
        DataError: no examples, or one longer than the largest bucket.
        ValueError: not as many scores as examples.
    """

    def __init__(
        self,
        examples: Sequence[Example],
        *,
        batch_rows: int,
        micro_batch_rows: int | None = None,
        micro_batch_tokens: int | None = None,
        seed: int,
        pad_id: int,
        bucket_multiple: int = 8,
        buckets: Sequence[int] | None = None,
        few_lengths: int | None = None,
        packing: bool = False,
        label_scores_NC: Tensor | None = None,
    ) -> None:
        if not examples:
            raise DataError("training rows: none; check data.train and data.limit_train")
        if label_scores_NC is not None and len(label_scores_NC) != len(examples):
            raise ValueError(f"{len(label_scores_NC)} rows of label scores, {len(examples)} examples")
        self._label_scores_NC = label_scores_NC
        self.batch_rows = batch_rows
        self._loop = Loop(
            batch_rows=batch_rows, micro_batch_rows=micro_batch_rows, micro_batch_tokens=micro_batch_tokens
        )
        self.seed, self.pad_id, self.bucket_multiple = seed, pad_id, bucket_multiple
        self.buckets = sorted(buckets) if buckets is not None else None
        self.packing = packing
        self._prompts = np.array([len(e.prompt_ids) for e in examples], dtype=np.int64)
        self._answers = np.array([len(e.answer_ids) for e in examples], dtype=np.int64)
        self._lengths = self._prompts + self._answers
        self._starts = np.concatenate([[0], np.cumsum(self._lengths)])
        self._ids = np.fromiter(
            (i for e in examples for i in (*e.prompt_ids, *e.answer_ids)),
            np.int64,
            count=int(self._starts[-1]),
        )
        self._labels = np.array([-1 if e.label is None else e.label for e in examples], dtype=np.int64)
        self._epoch: tuple[int, list[NDArray[np.int64]]] | None = None
        longest = int(self._lengths.argmax())
        if self.buckets is not None and self._lengths[longest] > self.buckets[-1]:
            raise DataError(
                f"{examples[longest].where}: {self._lengths[longest]} tokens, the largest bucket has "
                f"{self.buckets[-1]}; lower data.max_length"
            )
        if few_lengths is not None:
            parts = [self._lengths[part] for step in self._order(0) for part in self._parts(step)]
            longest_of, rows_of = [int(part.max()) for part in parts], [len(part) for part in parts]
            self.buckets = padded_lengths(longest_of, rows_of, few_lengths, bucket_multiple)
        if not self._answers.all():
            empty = int(np.flatnonzero(self._answers == 0)[0])
            raise DataError(f"{examples[empty].where}: no answer to train on; give the row a label or target")

    def __len__(self) -> int:
        return len(self._lengths)

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps in which every row comes once."""
        return -(-len(self) // self.batch_rows)

    def rows(self, step: int) -> NDArray[np.int64]:
        """Indices of the examples of an optimizer step, longest last."""
        epoch, position = divmod(step, self.steps_per_epoch)
        if self._epoch is None or self._epoch[0] != epoch:
            self._epoch = (epoch, self._order(epoch))
        return self._epoch[1][position]

    def micro_batches(self, step: int) -> list[Batch]:
        """The micro-batches of an optimizer step; their weights sum to 1."""
        rows = self.rows(step)
        total = int(self._answers[rows].sum())
        return [self._assemble(part, total) for part in self._parts(rows)]

    def _parts(self, rows: NDArray[np.int64]) -> list[NDArray[np.int64]]:
        """A step's rows by micro-batch."""
        if self.packing:
            size = self._packed_rows_at_a_time(rows)
        else:
            size = self._loop.rows_at_a_time(self._padded_length(int(self._lengths[rows].max())))
        return [rows[start : start + size] for start in range(0, len(rows), size)]

    def _packed_rows_at_a_time(self, rows: NDArray[np.int64]) -> int:
        """As many as fit `micro_batch_tokens` without padding, or what halving them gives: equal numbers of rows, so
        that few shapes occur."""
        size, limit = min(self._loop.micro_batch_rows or len(rows), len(rows)), self._loop.micro_batch_tokens
        lengths = self._lengths[rows]
        while limit is not None and size > 1:
            fullest = max(int(lengths[n : n + size].sum()) for n in range(0, len(rows), size))
            if fullest <= limit:
                break
            size = -(-size // 2)
        return size

    def _order(self, epoch: int) -> list[NDArray[np.int64]]:
        rng = _generator(self.seed, epoch)
        rows = rng.permutation(len(self))
        whole = len(self) // self.batch_rows * self.batch_rows
        batches: list[NDArray[np.int64]] = []
        for start in range(0, whole, self.batch_rows * WINDOW_BATCHES):
            window = rows[start : min(start + self.batch_rows * WINDOW_BATCHES, whole)]
            if not self.packing:
                window = window[np.argsort(self._lengths[window], kind="stable")]
            batches += np.split(window, len(window) // self.batch_rows)
        order = [batches[i] for i in rng.permutation(len(batches))]
        if whole < len(self):
            rest = rows[whole:]
            order.append(rest[np.argsort(self._lengths[rest], kind="stable")])
        return order

    def _padded_length(self, length: int) -> int:
        if self.buckets is not None:
            return next(b for b in self.buckets if b >= length)
        return -(-length // self.bucket_multiple) * self.bucket_multiple

    def _assemble(self, rows: NDArray[np.int64], step_answers: int) -> Batch:
        if self.packing:
            return self._pack(rows, step_answers)
        lengths, prompts = self._lengths[rows], self._prompts[rows]
        width = self._padded_length(int(lengths.max()))
        ids = np.full((len(rows), width), self.pad_id, dtype=np.int64)
        for n, row in enumerate(rows):
            ids[n, : lengths[n]] = self._ids[self._starts[row] : self._starts[row + 1]]
        positions = np.arange(width)
        real = positions < lengths[:, None]
        answers = real & (positions >= prompts[:, None])
        predicted = answers & (positions > 0)
        return Batch(
            input_ids_BT=torch.from_numpy(ids),
            attention_mask_BT=torch.from_numpy(real),
            answer_mask_BT=torch.from_numpy(answers),
            labels_B=torch.from_numpy(self._labels[rows]),
            indices=rows.tolist(),
            weight=int(self._answers[rows].sum()) / step_answers,
            tokens=int(lengths.sum()),
            answer_index_N=torch.from_numpy(np.flatnonzero(predicted)),
            real_index_N=torch.from_numpy(np.flatnonzero(real)),
            **self._taught(rows, np.arange(len(rows)) * width + prompts),
        )

    def _taught(self, rows: NDArray[np.int64], answer_starts: NDArray[np.int64]) -> dict[str, Any]:
        if self._label_scores_NC is None:
            return {}
        return {
            "label_scores_BC": self._label_scores_NC[torch.from_numpy(rows)],
            "answer_start_B": torch.from_numpy(answer_starts),
        }

    def _pack(self, rows: NDArray[np.int64], step_answers: int) -> Batch:
        lengths = self._lengths[rows]
        real = int(lengths.sum())
        width = -(-real // PACKED_MULTIPLE) * PACKED_MULTIPLE
        starts = np.concatenate([[0], np.cumsum(lengths), [width]]).astype(np.int32)
        ids = np.full(width, self.pad_id, dtype=np.int64)
        ids[:real] = np.concatenate([self._ids[self._starts[r] : self._starts[r + 1]] for r in rows])
        positions = np.arange(width) - np.repeat(starts[:-1], np.diff(starts))
        prompts = np.zeros(width, dtype=np.int64)
        prompts[:real] = np.repeat(self._prompts[rows], lengths)
        inside = np.arange(width) < real
        answers = inside & (positions >= prompts)
        return Batch(
            input_ids_BT=torch.from_numpy(ids)[None],
            attention_mask_BT=torch.from_numpy(inside)[None],
            answer_mask_BT=torch.from_numpy(answers)[None],
            labels_B=torch.from_numpy(self._labels[rows]),
            indices=rows.tolist(),
            weight=int(self._answers[rows].sum()) / step_answers,
            tokens=real,
            answer_index_N=torch.from_numpy(np.flatnonzero(answers & (positions > 0))),
            real_index_N=torch.from_numpy(np.flatnonzero(inside)),
            positions_BT=torch.from_numpy(positions)[None],
            starts_R=torch.from_numpy(starts),
            longest=max(int(self._lengths.max()), PACKED_MULTIPLE - 1),
            **self._taught(rows, starts[:-2] + self._prompts[rows]),
        )


class SampledWords:
    """The words of the vocabulary that a step of stage 2 compares: sampled softmax (Jean et al. 2015), without their
    correction of the sum.

    First the step's own words, then the corpus's most frequent up to three quarters, then others, drawn anew for each
    step: these hold down what hardly ever occurs. A function of (seed, step) and the step's tokens, however its rows
    are split among micro-batches and processes.

    Args:
        count: words of a step.
        vocabulary: rows of the output head.
        tokens: the corpus; at most COUNTED_TOKENS of it, evenly spread, say what is frequent.

    Raises:
        DataError: count is more than the vocabulary.
    """

    def __init__(self, count: int, vocabulary: int, tokens: TokenStream, seed: int) -> None:
        if count > vocabulary:
            raise DataError(
                f"pretrain.sampled_words: {count} of a vocabulary of {vocabulary}; fewer, or null for all of them"
            )
        self.count, self.vocabulary, self.seed = count, vocabulary, seed
        self._by_frequency = np.argsort(-_frequencies(tokens, vocabulary), kind="stable")

    def of_step(self, step: int, ids: NDArray[np.int64]) -> NDArray[np.int64]:
        """int64 [count], ascending; all of ids are among them if these are no more than `count` different words."""
        taken = np.zeros(self.vocabulary, dtype=bool)
        taken[ids.ravel()] = True
        frequent = max(0, self.count * 3 // 4 - int(taken.sum()))
        taken[self._by_frequency[~taken[self._by_frequency]][:frequent]] = True
        rest = np.flatnonzero(~taken)
        drawn = _generator(self.seed, step).choice(rest, self.count - int(taken.sum()), replace=False)
        taken[drawn] = True
        return np.flatnonzero(taken)


def _frequencies(tokens: TokenStream, vocabulary: int) -> NDArray[np.int64]:
    """How often each word occurs in a part of the corpus."""
    parts = min(64, tokens.n_tokens)
    length = min(tokens.n_tokens, COUNTED_TOKENS) // parts
    found = np.zeros(vocabulary, dtype=np.int64)
    for n in range(parts):
        read = tokens.read(tokens.n_tokens // parts * n, length)
        found += np.bincount(read.astype(np.int64), minlength=vocabulary)
    return found


class PackedBatches:
    """Fixed windows of a token stream; their order is a permutation by (seed, epoch).

    Window w of an epoch holds tokens [offset + w * sequence_length, ...), where offset (also by seed and
    epoch) spreads the tokens that do not fill a window. A step may reach into the next epoch, so all have
    batch_rows rows.

    Args:
        words: draws the words of each step's loss; None: all.

    Raises:
        DataError: the corpus does not fill one window.
    """

    def __init__(
        self,
        tokens: TokenStream,
        *,
        sequence_length: int,
        batch_rows: int,
        micro_batch_rows: int | None = None,
        seed: int,
        words: SampledWords | None = None,
    ) -> None:
        self.words = words
        self.n_windows = tokens.n_tokens // sequence_length
        if self.n_windows == 0 or sequence_length < 2:
            raise DataError(
                f"corpus: {tokens.n_tokens} tokens do not fill a window of {sequence_length}; "
                "give more text or a smaller pretrain.sequence_length (at least 2)"
            )
        self.tokens, self.sequence_length, self.batch_rows, self.seed = (
            tokens,
            sequence_length,
            batch_rows,
            seed,
        )
        self.micro_batch_rows = min(micro_batch_rows or batch_rows, batch_rows)
        self._epochs: dict[int, tuple[int, NDArray[np.int64]]] = {}

    @property
    def steps_per_epoch(self) -> int:
        """Steps after which each window came at least once."""
        return -(-self.n_windows // self.batch_rows)

    def micro_batches(self, step: int) -> list[Batch]:
        """The micro-batches of an optimizer step; their weights sum to 1."""
        size = self.micro_batch_rows
        first, last = step * self.batch_rows, (step + 1) * self.batch_rows
        found = [self._assemble(range(start, min(start + size, last))) for start in range(first, last, size)]
        return found if self.words is None else self._sampled(found, step, self.words)

    def _sampled(self, batches: list[Batch], step: int, words: SampledWords) -> list[Batch]:
        ids = np.concatenate([batch.input_ids_BT.numpy() for batch in batches])
        chosen = words.of_step(step, ids)
        place = np.full(words.vocabulary, -1, dtype=np.int64)
        place[chosen] = np.arange(len(chosen))
        found = []
        for batch in batches:
            places = np.full(batch.input_ids_BT.shape, -1, dtype=np.int64)
            places[:, :-1] = place[batch.input_ids_BT.numpy()[:, 1:]]
            found.append(replace(batch, words_S=torch.from_numpy(chosen), places_BT=torch.from_numpy(places)))
        return found

    def _order(self, epoch: int) -> tuple[int, NDArray[np.int64]]:
        """(offset, permutation of windows) of an epoch."""
        if epoch not in self._epochs:
            rng = _generator(self.seed, epoch)
            offset = int(rng.integers(self.tokens.n_tokens % self.sequence_length + 1))
            # A step touches two epochs at most (more only for a corpus of less than a batch).
            self._epochs = {e: o for e, o in self._epochs.items() if e >= epoch - 1}
            self._epochs[epoch] = (offset, rng.permutation(self.n_windows))
        return self._epochs[epoch]

    def _assemble(self, samples: range) -> Batch:
        ids = np.empty((len(samples), self.sequence_length), dtype=np.int64)
        indices: list[int] = []
        for n, sample in enumerate(samples):
            epoch, position = divmod(sample, self.n_windows)
            offset, order = self._order(epoch)
            window = int(order[position])
            ids[n] = self.tokens.read(offset + window * self.sequence_length, self.sequence_length)
            indices.append(window)
        answers = torch.ones(ids.shape, dtype=torch.bool)
        answers[:, 0] = False
        return Batch(
            input_ids_BT=torch.from_numpy(ids),
            attention_mask_BT=torch.ones(ids.shape, dtype=torch.bool),
            answer_mask_BT=answers,
            labels_B=torch.full((len(samples),), -1, dtype=torch.int64),
            indices=indices,
            weight=len(samples) / self.batch_rows,
            tokens=ids.size,
            answer_index_N=index_of(answers),
            real_index_N=torch.arange(ids.size),
        )
