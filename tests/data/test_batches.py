"""Batches: pure functions of (seed, step), every row once an epoch, weights and masks against slow twins."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from itertools import combinations
from typing import Any

import numpy as np
import pytest
import torch

from bitdistill.data import batches as batches_module
from bitdistill.data.batches import Batch, PackedBatches, SampledWords, TaskBatches, padded_lengths
from bitdistill.data.tasks import Example
from bitdistill.errors import DataError


def examples(count: int, seed: int = 0, longest: int = 60) -> list[Example]:
    rng = np.random.default_rng(seed)
    made = []
    for n in range(count):
        prompt = tuple(rng.integers(2, 99, size=rng.integers(1, longest)).tolist())
        answer = tuple(rng.integers(2, 99, size=rng.integers(1, 6)).tolist())
        made.append(Example(prompt, answer, int(rng.integers(3)), ("x",), "p", f"t.jsonl:{n + 1}"))
    return made


def equal(a: Batch, b: Batch) -> bool:
    tensors = ("input_ids_BT", "attention_mask_BT", "answer_mask_BT", "labels_B")
    same = all(torch.equal(getattr(a, name), getattr(b, name)) for name in tensors)
    return same and (a.indices, a.weight, a.tokens) == (b.indices, b.weight, b.tokens)


def test_batch_against_slow_twin() -> None:
    rows = examples(23)
    batches = TaskBatches(rows, batch_rows=8, micro_batch_rows=3, seed=1, pad_id=1, bucket_multiple=8)
    for step in range(2 * batches.steps_per_epoch):
        step_batches = batches.micro_batches(step)
        step_answers = sum(len(rows[i].answer_ids) for b in step_batches for i in b.indices)
        for batch in step_batches:
            width = batch.input_ids_BT.shape[1]
            longest = max(len(rows[i].prompt_ids + rows[i].answer_ids) for i in batch.indices)
            assert width % 8 == 0
            assert longest <= width < longest + 8
            for n, index in enumerate(batch.indices):
                row = rows[index]
                tokens = list(row.prompt_ids + row.answer_ids)
                pad = width - len(tokens)
                assert batch.input_ids_BT[n].tolist() == tokens + [1] * pad
                assert batch.attention_mask_BT[n].tolist() == [True] * len(tokens) + [False] * pad
                answer = [False] * len(row.prompt_ids) + [True] * len(row.answer_ids) + [False] * pad
                assert batch.answer_mask_BT[n].tolist() == answer
                assert batch.labels_B[n] == row.label
            answers = sum(len(rows[i].answer_ids) for i in batch.indices)
            assert batch.weight == answers / step_answers
            assert batch.tokens == int(batch.attention_mask_BT.sum())
        assert sum(b.weight for b in step_batches) == pytest.approx(1.0, abs=1e-12)
        assert batch.input_ids_BT.dtype == batch.labels_B.dtype == torch.int64
        assert batch.attention_mask_BT.dtype == batch.answer_mask_BT.dtype == torch.bool


@pytest.mark.parametrize(("count", "batch_rows"), [(1, 4), (7, 7), (100, 8), (1000, 16), (65, 64)])
def test_each_row_once_an_epoch(count: int, batch_rows: int) -> None:
    batches = TaskBatches(examples(count), batch_rows=batch_rows, seed=3, pad_id=0)
    steps = batches.steps_per_epoch
    assert steps == -(-count // batch_rows)
    for epoch in range(3):
        sizes = [len(batches.rows(step)) for step in range(epoch * steps, (epoch + 1) * steps)]
        seen = Counter(
            i for step in range(epoch * steps, (epoch + 1) * steps) for i in batches.rows(step).tolist()
        )
        assert seen == Counter(range(count))
        assert sizes[:-1] == [batch_rows] * (steps - 1)
        assert sizes[-1] == count - batch_rows * (steps - 1)


def test_order_is_a_function_of_seed_and_step() -> None:
    rows = examples(300)

    def make(seed: int = 5) -> TaskBatches:
        return TaskBatches(rows, batch_rows=16, micro_batch_rows=4, seed=seed, pad_id=0)

    forward = make()
    steps = list(range(3 * forward.steps_per_epoch))
    straight = {step: forward.micro_batches(step) for step in steps}
    for step in reversed(steps):  # another object, another order of asking
        assert all(equal(a, b) for a, b in zip(make().micro_batches(step), straight[step], strict=True))
    first = [make().rows(s).tolist() for s in steps[:19]]
    assert first != [make().rows(s + 19).tolist() for s in steps[:19]]  # epochs differ
    assert first != [make(seed=6).rows(s).tolist() for s in steps[:19]]


def test_rows_of_a_step_do_not_depend_on_the_micro_batch() -> None:
    rows = examples(50)
    sizes = (None, 1, 3, 16, 99)
    every = [TaskBatches(rows, batch_rows=16, micro_batch_rows=m, seed=0, pad_id=0) for m in sizes]
    for step in range(4):
        taken = [[i for b in batches.micro_batches(step) for i in b.indices] for batches in every]
        assert all(t == taken[0] for t in taken)


def test_token_limit_of_a_micro_batch() -> None:
    rows = examples(50)
    free = TaskBatches(rows, batch_rows=16, seed=0, pad_id=0)
    limited = TaskBatches(rows, batch_rows=16, micro_batch_tokens=300, seed=0, pad_id=0)
    widths = set()
    for step in range(free.steps_per_epoch):
        (whole,), parts = free.micro_batches(step), limited.micro_batches(step)
        assert [i for b in parts for i in b.indices] == whole.indices
        assert sum(b.weight for b in parts) == pytest.approx(1.0, abs=1e-12)
        assert all(b.input_ids_BT.numel() <= 300 for b in parts)
        rows_fit = 300 // whole.input_ids_BT.shape[1]
        size = next(2**n for n in (4, 3, 2, 1, 0) if 2**n <= rows_fit)
        assert [b.rows for b in parts[:-1]] == [size] * (len(parts) - 1)
        widths.add(size)
    assert len(widths) > 1  # short steps go through in larger parts than long ones
    # A row longer than the limit goes through alone
    alone = TaskBatches(rows, batch_rows=16, micro_batch_tokens=4, seed=0, pad_id=0).micro_batches(0)
    assert [b.rows for b in alone] == [1] * 16
    # The limit does not raise micro_batch_rows
    both = TaskBatches(rows, batch_rows=16, micro_batch_rows=3, micro_batch_tokens=10**6, seed=0, pad_id=0)
    assert [b.rows for b in both.micro_batches(0)] == [3, 3, 3, 3, 3, 1]


def test_mean_loss_does_not_depend_on_the_micro_batch() -> None:
    """The weighted sum of per-micro-batch means over answer tokens is the step's mean."""
    rows = examples(40)
    loss = torch.rand(100, dtype=torch.float64)
    means = []
    for size in (16, 5, 1):
        batches = TaskBatches(rows, batch_rows=16, micro_batch_rows=size, seed=0, pad_id=0)
        total = 0.0
        for batch in batches.micro_batches(1):
            total += batch.weight * float(loss[batch.input_ids_BT][batch.answer_mask_BT].mean())
        means.append(total)
    assert means == pytest.approx([means[0]] * 3, rel=1e-12)


def test_similar_lengths_meet() -> None:
    rows = examples(4096, longest=200)
    batches = TaskBatches(rows, batch_rows=32, seed=0, pad_id=0)
    real = padded = 0
    for step in range(batches.steps_per_epoch):
        for batch in batches.micro_batches(step):
            real, padded = real + batch.tokens, padded + batch.input_ids_BT.numel()
    assert real / padded > 0.9  # random batches: about 0.52
    # and batches are shuffled: lengths do not rise over the epoch
    widths = [batches.micro_batches(s)[0].input_ids_BT.shape[1] for s in range(batches.steps_per_epoch)]
    assert abs(np.corrcoef(np.arange(len(widths)), widths)[0, 1]) < 0.3


def test_buckets() -> None:
    rows = examples(64, longest=40)
    batches = TaskBatches(rows, batch_rows=8, seed=0, pad_id=0, buckets=[64, 16, 32])
    widths = {
        b.input_ids_BT.shape[1] for s in range(batches.steps_per_epoch) for b in batches.micro_batches(s)
    }
    assert widths <= {16, 32, 64}
    assert len(widths) > 1
    with pytest.raises(DataError, match=r"t\.jsonl:\d+: \d+ tokens, the largest bucket has 16; lower"):
        TaskBatches(rows, batch_rows=8, seed=0, pad_id=0, buckets=[16])


@pytest.mark.parametrize("count", [1, 2, 3, 4, 9])
@pytest.mark.parametrize("seed", range(4))
def test_padded_lengths_leave_the_least_padding(count: int, seed: int) -> None:
    """Against a slow twin that tries every choice of lengths."""
    rng = np.random.default_rng(seed)
    longest = np.concatenate([rng.integers(1, 25, 30), rng.integers(1, 60, 4)]).tolist()
    sizes = sorted({-(-n // 8) * 8 for n in longest})

    rows = rng.integers(1, 9, len(longest)).tolist()

    def tokens(lengths: Sequence[int]) -> int:
        return sum(k * min(m for m in lengths if m >= n) for n, k in zip(longest, rows, strict=True))

    choices = (c for k in range(1, count + 1) for c in combinations(sizes, k) if c[-1] == sizes[-1])
    chosen = padded_lengths(longest, rows, count, 8)
    assert chosen == sorted(set(chosen))
    assert len(chosen) <= count
    assert tokens(chosen) == min(map(tokens, choices))


def test_few_lengths_with_little_padding() -> None:
    short, long = examples(1200, longest=24), examples(80, seed=1, longest=200)
    rows = [*short, *long]

    def share(**options: Any) -> tuple[float, set[int]]:
        batches = TaskBatches(rows, batch_rows=16, micro_batch_tokens=1024, seed=0, pad_id=0, **options)
        found = [b for s in range(2 * batches.steps_per_epoch) for b in batches.micro_batches(s)]
        padded = sum(b.input_ids_BT.numel() for b in found)
        return sum(b.tokens for b in found) / padded, {b.input_ids_BT.shape[1] for b in found}

    few, widths = share(few_lengths=4)
    all_lengths, every = share()
    assert len(widths) <= 4 < len(every)
    assert all(width % 8 == 0 for width in widths)
    by_quantiles, _ = share(buckets=[16, 32, 48, 208])  # half, 80 %, 95 % and all of the rows, in steps of 16
    assert by_quantiles < few < all_lengths
    (one,) = share(few_lengths=1)[1]
    assert one == max(every)


def test_unusable_examples() -> None:
    with pytest.raises(DataError, match="training rows: none"):
        TaskBatches([], batch_rows=8, seed=0, pad_id=0)
    bare = Example((1, 2), (), None, (), "p", "t.jsonl:4")
    with pytest.raises(DataError, match=r"t\.jsonl:4: no answer to train on"):
        TaskBatches([*examples(2), bare], batch_rows=8, seed=0, pad_id=0)


def test_rows_without_label_and_move() -> None:
    batches = TaskBatches([Example((1,), (2,), None, ("y",), "p", "t:1")], batch_rows=1, seed=0, pad_id=0)
    (batch,) = batches.micro_batches(0)
    assert batch.labels_B.tolist() == [-1]
    moved = batch.to("meta")
    assert moved.input_ids_BT.device.type == moved.labels_B.device.type == "meta"
    assert (moved.indices, moved.weight) == (batch.indices, batch.weight)
    assert batch.input_ids_BT.device.type == "cpu"


class Stream:
    """0, 1, 2, ... as a token stream."""

    def __init__(self, n_tokens: int) -> None:
        self.n_tokens = n_tokens

    def read(self, start: int, count: int) -> np.ndarray:
        assert 0 <= start <= start + count <= self.n_tokens
        return np.arange(start, start + count)


def packed(n_tokens: int, seed: int = 0, batch_rows: int = 4, micro: int | None = None) -> PackedBatches:
    return PackedBatches(
        Stream(n_tokens), sequence_length=16, batch_rows=batch_rows, micro_batch_rows=micro, seed=seed
    )


def test_packed_windows_cover_the_stream_once_an_epoch() -> None:
    batches = packed(16 * 10 + 7)
    assert batches.n_windows == 10
    assert batches.steps_per_epoch == 3
    rows = [r for step in range(5) for b in batches.micro_batches(step) for r in b.input_ids_BT.tolist()]
    epochs = [sorted(rows[:10]), sorted(rows[10:])]
    for epoch in epochs:
        offset = epoch[0][0]
        assert 0 <= offset <= 7
        assert epoch == [list(range(offset + 16 * w, offset + 16 * w + 16)) for w in range(10)]
    assert rows[:10] != rows[10:]


def test_packed_batch_fields() -> None:
    batches = packed(16 * 9, micro=3)
    step = batches.micro_batches(2)
    assert [b.input_ids_BT.shape for b in step] == [(3, 16), (1, 16)]
    assert [b.weight for b in step] == [0.75, 0.25]
    for batch in step:
        assert batch.attention_mask_BT.all()
        assert not batch.answer_mask_BT[:, 0].any()
        assert batch.answer_mask_BT[:, 1:].all()
        assert batch.labels_B.tolist() == [-1] * len(batch.indices)
        assert batch.tokens == batch.input_ids_BT.numel()
        assert batch.input_ids_BT.dtype == torch.int64


def test_packed_order_is_a_function_of_seed_and_step() -> None:
    straight = packed(16 * 31 + 5, micro=2)
    kept = [straight.micro_batches(step) for step in range(20)]
    for step in reversed(range(20)):
        assert all(
            equal(a, b)
            for a, b in zip(packed(16 * 31 + 5, micro=2).micro_batches(step), kept[step], strict=True)
        )
        assert all(equal(a, b) for a, b in zip(straight.micro_batches(step), kept[step], strict=True))
    other = packed(16 * 31 + 5, micro=2, seed=1).micro_batches(0)
    assert not all(equal(a, b) for a, b in zip(other, kept[0], strict=True))


def test_packed_batches_larger_than_the_corpus() -> None:
    batches = packed(16 * 3, batch_rows=8)
    counts = Counter(i for step in range(3) for b in batches.micro_batches(step) for i in b.indices)
    assert counts == {0: 8, 1: 8, 2: 8}


class Rare:
    """Words 0 to 19 often, any of 20 to 899 now and then; 900 to 999 never."""

    n_tokens = 64 * 400

    def __init__(self) -> None:
        rng = np.random.default_rng(0)
        often, seldom = rng.integers(0, 20, self.n_tokens), rng.integers(20, 900, self.n_tokens)
        self.ids = np.where(rng.random(self.n_tokens) < 0.9, often, seldom)

    def read(self, start: int, count: int) -> np.ndarray:
        return self.ids[start : start + count]


def sampled(count: int = 200, micro: int | None = None, seed: int = 0) -> PackedBatches:
    words = SampledWords(count, 1000, Rare(), seed)
    return PackedBatches(
        Rare(), sequence_length=16, batch_rows=4, micro_batch_rows=micro, seed=seed, words=words
    )


def test_sampled_words_are_the_steps_own_the_frequent_and_others() -> None:
    batches = sampled()
    drawn: Counter[int] = Counter()
    for step in range(300):
        (batch,) = batches.micro_batches(step)
        assert batch.words_S is not None
        words = batch.words_S.tolist()
        assert len(words) == 200
        assert words == sorted(set(words))
        assert set(batch.input_ids_BT.flatten().tolist()) <= set(words)
        assert set(range(20)) <= set(words)
        drawn.update(word for word in words if word >= 900)
    assert set(drawn) == set(range(900, 1000)), "words that the corpus never has come up too"
    # 50 of some 850 others a step: 18 each in 300 steps
    assert min(drawn.values()) > 4
    assert max(drawn.values()) < 40


def test_places_are_those_of_the_next_tokens() -> None:
    for batch in sampled(micro=3).micro_batches(7):
        assert batch.words_S is not None
        assert batch.places_BT is not None
        assert torch.equal(batch.words_S[batch.places_BT[:, :-1]], batch.input_ids_BT[:, 1:])
        assert batch.places_BT[:, -1].tolist() == [-1] * len(batch.indices)
        moved = batch.to("cpu")
        assert moved.words_S is not None
        assert moved.places_BT is not None


def test_sampled_words_are_a_function_of_seed_and_step_alone() -> None:
    def words(batches: PackedBatches, step: int) -> list[list[int]]:
        return [b.words_S.tolist() for b in batches.micro_batches(step) if b.words_S is not None]

    whole = sampled()
    for step in (5, 0, 5):
        (chosen,) = words(whole, step)
        assert words(sampled(micro=1), step) == [chosen] * 4
        assert words(sampled(micro=3), step) == [chosen] * 2
    assert words(whole, 0) != words(whole, 1)
    assert words(whole, 0) != words(sampled(seed=1), 0)


@pytest.mark.parametrize("length", [5, 63, 64, 200, 1000])
def test_frequent_words_of_short_and_long_streams(length: int, monkeypatch: pytest.MonkeyPatch) -> None:
    class Falling:
        """Word w makes up a share of 1 / 2^(w + 1) of any long enough part; the rest is word 9."""

        n_tokens = length

        def read(self, start: int, count: int) -> np.ndarray:
            place = np.arange(start, start + count) + 1
            return np.where(place % 2, 0, np.where(place % 4, 1, np.where(place % 8, 2, 9)))

    monkeypatch.setattr(batches_module, "COUNTED_TOKENS", 320)
    words = SampledWords(4, 10, Falling(), 0)
    for step in range(5):
        assert set(words.of_step(step, np.array([[9]]))) > {9, 0, 1}


def test_more_sampled_words_than_there_are_are_refused() -> None:
    (batch,) = sampled(1000).micro_batches(0)
    assert batch.words_S is not None
    assert batch.words_S.tolist() == list(range(1000))
    with pytest.raises(DataError, match=r"pretrain.sampled_words: 1001 of a vocabulary of 1000"):
        sampled(1001)


def test_corpus_smaller_than_a_window() -> None:
    with pytest.raises(DataError, match="15 tokens do not fill a window of 16"):
        packed(15)


def test_assembly_is_fast() -> None:
    """64 rows of 1,024 tokens in well under 10 ms, so a GPU never waits."""
    rows = [Example(tuple(range(1000)), tuple(range(20)), 0, ("x",), "p", f"t:{n}") for n in range(256)]
    task = TaskBatches(rows, batch_rows=64, micro_batch_rows=16, seed=0, pad_id=0)
    stream = PackedBatches(Stream(2**20), sequence_length=1024, batch_rows=64, micro_batch_rows=16, seed=0)
    for batches in (task, stream):
        batches.micro_batches(0)
        times = []
        for step in range(1, 12):
            started = time.process_time()
            batches.micro_batches(step)
            times.append(time.process_time() - started)
        assert min(times) < 0.010
