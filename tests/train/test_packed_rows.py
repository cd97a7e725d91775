"""Packed rows train as padded ones do: same loss, same gradients, nothing seen across rows."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from bitdistill.config import DistillConfig
from bitdistill.data.batches import PACKED_MULTIPLE, Batch, TaskBatches
from bitdistill.data.tasks import Example
from bitdistill.models.attention import causal_only
from bitdistill.models.forward import final_hidden
from bitdistill.models.surgery import refine
from bitdistill.stages.distill import DistillStep
from bitdistill.stages.sft import CrossEntropyStep
from bitdistill.train.gradients import EagerGradients
from bitdistill.train.step import Totals
from tests.models.conftest import TINY, tiny_model


def batches(packing: bool, rows: int = 7) -> TaskBatches:
    rng = torch.Generator().manual_seed(0)
    examples = []
    for n in range(rows):
        ids = torch.randint(3, 100, (4 + 3 * (n % 4),), generator=rng).tolist()
        examples.append(Example(tuple(ids[:-2]), tuple(ids[-2:]), n % 2, (), "", f"row {n}"))
    return TaskBatches(examples, batch_rows=rows, seed=0, pad_id=2, packing=packing)


def pair() -> tuple[Batch, Batch]:
    """The same rows, padded and packed (a batch of all rows: in whatever order)."""
    return batches(False).micro_batches(0)[0], batches(True).micro_batches(0)[0]


def gradients_of(step: Any, student: Any, batch: Batch) -> dict[str, torch.Tensor]:
    student.zero_grad()
    totals = Totals(batch.rows, batch.tokens, len(batch.answer_index_N))
    with causal_only(student, *([step.teacher] if hasattr(step, "teacher") else [])):
        found = EagerGradients(step, torch.device("cpu"), "float32").add(batch, totals)
    grads = {n: p.grad.clone() for n, p in student.named_parameters() if p.grad is not None}
    return {**grads, **{k: torch.as_tensor(v) for k, v in found.items()}}


def test_a_packed_batch_holds_each_row_once_with_its_own_positions() -> None:
    padded, packed = pair()
    assert packed.input_ids_BT.shape == (1, PACKED_MULTIPLE)
    assert (packed.tokens, packed.rows, packed.weight) == (padded.tokens, padded.rows, padded.weight)
    assert packed.starts_R is not None
    assert packed.positions_BT is not None
    starts = packed.starts_R.tolist()
    assert (starts[0], starts[-2], starts[-1]) == (0, packed.tokens, PACKED_MULTIPLE)
    rows = {
        index: row[mask].tolist()
        for index, row, mask in zip(
            padded.indices, padded.input_ids_BT, padded.attention_mask_BT, strict=True
        )
    }
    for index, first, end in zip(packed.indices, starts, starts[1:-1], strict=False):
        assert packed.input_ids_BT[0, first:end].tolist() == rows[index]
        assert packed.positions_BT[0, first:end].tolist() == list(range(end - first))
    assert sorted(packed.input_ids_BT.flatten()[packed.answer_index_N].tolist()) == sorted(
        padded.input_ids_BT.flatten()[padded.answer_index_N].tolist()
    )
    assert packed.longest >= max(len(row) for row in rows.values())


def test_every_row_comes_once_an_epoch() -> None:
    packed = TaskBatches(
        [Example((5,) * (n + 1), (6,), 0, (), "", "") for n in range(10)],
        batch_rows=4, micro_batch_rows=2, seed=1, pad_id=2, packing=True,
    )  # fmt: skip
    seen = [
        i for step in range(packed.steps_per_epoch) for b in packed.micro_batches(step) for i in b.indices
    ]
    assert sorted(seen) == list(range(10))


@pytest.mark.parametrize(
    ("tokens", "rows_at_a_time", "sizes"),
    [
        (None, None, [8]),
        (80, None, [8]),
        (79, None, [4, 4]),
        (40, None, [2, 2, 2, 2]),
        (80, 3, [3, 3, 2]),
        (1, None, [1] * 8),
    ],
)
def test_micro_batches_are_full_of_rows_not_of_padding(
    tokens: int | None, rows_at_a_time: int | None, sizes: list[int]
) -> None:
    lengths = [30, 2, 5, 9, 11, 3, 12, 8]
    packed = TaskBatches(
        [Example((5,) * (n - 1), (6,), 0, (), "", "") for n in lengths],
        batch_rows=8, micro_batch_rows=rows_at_a_time, micro_batch_tokens=tokens, seed=1, pad_id=2, packing=True,
    )  # fmt: skip
    batches = packed.micro_batches(0)
    assert [len(batch.indices) for batch in batches] == sizes
    assert sum(batch.weight for batch in batches) == pytest.approx(1.0)
    if tokens is not None:
        assert all(batch.tokens <= tokens or len(batch.indices) == 1 for batch in batches)


@pytest.mark.parametrize("name", sorted(TINY))
def test_rows_do_not_see_one_another(name: str) -> None:
    model = tiny_model(name).eval()
    padded, packed = pair()
    with causal_only(model), torch.no_grad():
        want = final_hidden(model, padded.input_ids_BT)
        got = final_hidden(model, packed.input_ids_BT, **packed.packing)
    assert packed.starts_R is not None
    for index, first, end in zip(packed.indices, packed.starts_R, packed.starts_R[1:-1], strict=False):
        row = padded.indices.index(index)
        torch.testing.assert_close(got[0, first:end], want[row, : end - first], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("tokens", "prompt_weight"), [("answer", 0.0), ("all", 0.0), ("answer", 2.0)])
def test_losses_and_gradients_are_those_of_padded_rows(tokens: str, prompt_weight: float) -> None:
    teacher = tiny_model("qwen3").requires_grad_(False).eval()
    student = refine(tiny_model("qwen3"), gains="ones").train()
    config = DistillConfig(
        gamma=3.0,
        distilled_tokens=tokens,  # type: ignore[arg-type]
        prompt_weight=prompt_weight,
    )
    padded, packed = pair()
    for step in (CrossEntropyStep(student), DistillStep(student, teacher, config, [1])):
        want, got = (gradients_of(step, student, batch) for batch in (padded, packed))
        assert want.keys() == got.keys()
        for name, value in want.items():
            scale = float(value.abs().max())
            torch.testing.assert_close(got[name], value, rtol=1e-3, atol=1e-4 * scale + 1e-8, msg=name)
