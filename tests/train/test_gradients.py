"""Gradients of a step: filling changes nothing, and a replayed CUDA graph equals the eager step."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from bitdistill.config import DistillConfig, Loop, Optim, PretrainConfig, RefineConfig
from bitdistill.data.batches import TaskBatches
from bitdistill.data.tasks import Example
from bitdistill.losses.logits import language_model_chunk
from bitdistill.models import surgery
from bitdistill.models.attention import causal_only
from bitdistill.stages.distill import DistillStep
from bitdistill.stages.pretrain import LanguageModelStep
from bitdistill.stages.sft import CrossEntropyStep
from bitdistill.train import loop as loop_module
from bitdistill.train.gradients import (
    EagerGradients,
    ReplayedGradients,
    differing,
    first_cause,
    replayed_below,
)
from bitdistill.train.optim import build_optimizer
from bitdistill.train.step import Totals
from tests.models.conftest import tiny_model
from tests.readback import NothingReadBack


class _FakeGraphs(ReplayedGradients):
    """Graphs of a machine without any: a replay is an eager run, and what `corrupt` does to its gradients."""

    corrupt = staticmethod(lambda grads: None)
    captured = 0

    def _capture(self, batch, totals):  # type: ignore[no-untyped-def]
        self.captured += 1

        class Graph:
            def replay(_, batch, totals):  # type: ignore[no-untyped-def]
                before = [p.grad.clone() for p in self.parameters]
                found = EagerGradients.add(self, batch, totals)
                own = [p.grad.sub_(b) for p, b in zip(self.parameters, before, strict=True)]
                self.corrupt(own)
                torch._foreach_add_(own, before)
                return found

        return Graph()


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: None)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: None)


def three_micro_batches(way, step) -> list[float]:  # type: ignore[no-untyped-def]
    """Three of one shape in one step, then the next step's first; norms of the gradients of both steps."""
    step.replayable = True
    batch = batches().micro_batches(0)[0]
    norms = []
    for rounds in (3, 1):
        for _ in range(rounds):
            found = way.add(batch, totals_of(batch))
            assert float(found["loss"]) > 0
        norms.append([float(p.grad.norm()) for p in way.parameters])
        way.clear(None)
    return norms


def way_of(kind):  # type: ignore[no-untyped-def]
    torch.manual_seed(0)
    student, _ = students()
    step = CrossEntropyStep(student)
    return kind(step, dict(student.named_parameters()), torch.device("cpu"), "float32"), step


def test_a_graph_with_the_eager_gradients_is_used_and_nothing_is_counted_twice(no_gpu: None) -> None:
    way, step = way_of(_FakeGraphs)
    norms = three_micro_batches(way, step)
    assert way.enabled
    assert len(way.graphs) == way.captured == 1
    for three, one in zip(*norms, strict=True):
        assert three == pytest.approx(3 * one, rel=1e-4, abs=1e-7)


@pytest.mark.parametrize("value", [float("nan"), 0.0])
def test_a_graph_with_other_gradients_is_not_used(
    no_gpu: None, value: float, caplog: pytest.LogCaptureFixture
) -> None:
    way, step = way_of(_FakeGraphs)
    way.corrupt = lambda grads: grads[1].fill_(value)
    norms = three_micro_batches(way, step)
    assert not way.enabled
    assert not way.graphs
    assert way.captured == 1
    for three, one in zip(*norms, strict=True):
        assert three == pytest.approx(3 * one, rel=1e-4, abs=1e-7)
    (message,) = [r.getMessage() for r in caplog.records]
    assert message.startswith(f"CUDA graphs: 1 of {len(way.parameters)} gradients differ")
    assert way.names[1] in message


def test_norms_differ_by_more_than_rounding() -> None:
    nan, inf = float("nan"), float("inf")
    assert differing([1.0, 10.0, 0.0], [1.01, 10.1, 1e-3]) == []
    assert differing([1.0, 10.0, 0.0], [1.2, 10.0, 0.1]) == [0, 2]
    assert differing([1.0, 10.0], [nan, inf]) == [0, 1]
    assert differing([nan, inf, 1.0], [nan, inf, 1.0]) == []
    assert differing([nan, 1.0], [2.0, 1.0]) == [0]


def batches(rows: int = 12, answers: int = 2) -> TaskBatches:
    rng = torch.Generator().manual_seed(0)
    examples = []
    for n in range(rows):
        ids = torch.randint(3, 100, (4 + n % 5 + answers,), generator=rng).tolist()
        examples.append(Example(tuple(ids[:-answers]), tuple(ids[-answers:]), 0, (), "", f"row {n}"))
    return TaskBatches(examples, batch_rows=4, seed=0, pad_id=2, buckets=[8, 16])


def students(device: str = "cpu"):  # type: ignore[no-untyped-def]
    source = tiny_model("qwen3").to(device)
    return surgery.apply(surgery.plan(source.config, RefineConfig()), source).to(device), source


def totals_of(batch) -> Totals:  # type: ignore[no-untyped-def]
    return Totals(batch.input_ids_BT.shape[0], batch.tokens, len(batch.answer_index_N))


@pytest.mark.parametrize(("tokens", "prompt_weight"), [("answer", 0.0), ("all", 0.0), ("answer", 2.0)])
def test_filling_the_index_changes_nothing(tokens: str, prompt_weight: float) -> None:
    student, teacher = students()
    config = DistillConfig(
        gamma=3.0,
        distilled_tokens=tokens,  # type: ignore[arg-type]
        prompt_weight=prompt_weight,
    )
    for step in (CrossEntropyStep(student), DistillStep(student, teacher, config, [1])):
        batch = batches().micro_batches(0)[0]
        filled = batch.with_filled_index(64)
        assert len(filled.answer_index_N) == 64
        assert int((filled.answer_index_N >= 0).sum()) == len(batch.answer_index_N)
        plain = gradients_with(step, student, batch, totals_of(batch))
        again = gradients_with(step, student, filled, totals_of(batch))
        assert plain.keys() == again.keys()
        for name, value in plain.items():
            torch.testing.assert_close(again[name], value, rtol=1e-5, atol=1e-6, msg=name)


def replayable_steps():  # type: ignore[no-untyped-def]
    """Steps that say they may be replayed, with their models; another teacher's is in tests/stages."""
    student, teacher = students()
    teacher.requires_grad_(False)
    yield "sft", CrossEntropyStep(student), student, teacher
    settings = [
        {},
        {"prompt_weight": 30.0},
        {"distilled_tokens": "all"},
        {"hidden_weight": 1.0, "hidden_error": "normed", "prompt_weight": 1.0},
    ]
    for fused in (False, True):
        for setting in settings:
            step = DistillStep(student, teacher, DistillConfig(gamma=3.0, **setting), [1], fused=False)
            step.chunk = language_model_chunk if fused else None
            yield f"distill {setting} {fused}", step, student, teacher
    for objective, words in (("lm", ""), ("kl", ""), ("mix", ""), ("kl", " sampled")):
        config = PretrainConfig(corpus="corpus", objective=objective, hidden_weight=1.0)
        yield (
            f"pretrain {objective}{words}",
            LanguageModelStep(student, teacher, config, compiling=False),
            student,
            teacher,
        )


def test_a_replayable_step_reads_nothing_back() -> None:
    names = []
    for name, step, student, teacher in replayable_steps():
        assert step.replayable, name
        batch = batches().micro_batches(0)[0].with_filled_index(64)
        if "sampled" in name:
            vocabulary = student.get_input_embeddings().weight.shape[0]
            places = torch.where(batch.attention_mask_BT, batch.input_ids_BT, -1)
            batch = replace(batch, words_S=torch.arange(vocabulary), places_BT=places)
        totals = Totals(*(torch.tensor(float(n)) for n in (4, batch.tokens, 8)))
        student.zero_grad()
        with causal_only(student, teacher), NothingReadBack():
            output = step(batch, totals)
            output.loss.backward()
        assert float(output.loss.detach()) > 0
        names.append(name)
    assert len(names) == 13


def test_counts_are_the_same_as_numbers_and_as_tensors() -> None:
    for counts in ((4, 30, 8), (4, 8, 8)):
        tensors = Totals(*(torch.tensor(float(n)) for n in counts))
        assert float(tensors.unanswered) == Totals(*counts).unanswered == max(1, counts[1] - counts[2])


def test_a_failed_capture_says_what_failed_first_and_where() -> None:
    def capture() -> None:
        try:
            DistillStep.before_step(None, 1)  # type: ignore[arg-type]
        finally:
            raise RuntimeError("operation failed due to a previous error during capture")

    with pytest.raises(RuntimeError) as caught:
        capture()
    said = first_cause(caught.value)
    assert "has no attribute 'config' (distill.py, line " in said

    def nothing_of_ours() -> None:
        raise ValueError("of a library")

    with pytest.raises(ValueError, match="of a library") as elsewhere:
        nothing_of_ours()
    assert first_cause(elsewhere.value) == "of a library"


def gradients_with(step, student, batch, totals: Totals) -> dict[str, torch.Tensor]:  # type: ignore[no-untyped-def]
    student.zero_grad()
    found = EagerGradients(step, torch.device("cpu"), "float32").add(batch, totals)
    grads = {n: p.grad.clone() for n, p in student.named_parameters() if p.grad is not None}
    return {**grads, **{k: torch.as_tensor(v) for k, v in found.items()}}


def test_the_index_names_the_answer_tokens() -> None:
    for step in range(3):
        for batch in batches().micro_batches(step):
            flat = batch.input_ids_BT.flatten()
            mask = batch.answer_mask_BT.clone()
            mask[:, 0] = False
            assert torch.equal(flat[batch.answer_index_N], batch.input_ids_BT[mask])
            assert torch.equal(flat[batch.real_index_N], batch.input_ids_BT[batch.attention_mask_BT])


def test_graphs_are_for_small_steps_on_a_gpu() -> None:
    cuda, plain = torch.device("cuda"), Loop(batch_rows=1)
    assert replayed_below(plain, torch.device("cpu"), 2**20) == 0
    assert replayed_below(Loop(batch_rows=1, cuda_graphs=True), torch.device("cpu"), 2**20) == 0
    assert replayed_below(plain, cuda, 2**20) > 2**10
    assert replayed_below(plain, cuda, 135_000_000) < 32 * 1024
    assert replayed_below(plain, cuda, 135_000_000, fused=True) > 32 * 1024
    assert replayed_below(plain, cuda, 600_000_000, fused=True) > 16 * 1024
    assert replayed_below(plain, cuda, 1_600_000_000, fused=True) < 8 * 1024
    # Gemma 3 270M on MNLI: 128 x 88 was above the other bound, and a seed whose first batch was that long had no graph
    assert replayed_below(plain, cuda, 268_000_000, fused=True) > 16_384
    assert replayed_below(Loop(batch_rows=1, cuda_graphs=True), cuda, 600_000_000) == math.inf
    assert replayed_below(Loop(batch_rows=1, gradient_checkpointing=True), cuda, 2**20) == 0
    assert replayed_below(Loop(batch_rows=1, cuda_graphs=False), cuda, 2**20) == 0


def test_each_micro_batch_is_judged_by_its_own_tokens(no_gpu: None) -> None:
    student, _ = students()
    step = CrossEntropyStep(student)
    found = sorted(
        (m for n in range(40) for m in batches().micro_batches(n)), key=lambda m: m.input_ids_BT.numel()
    )
    small, large = found[0], found[-1]
    assert small.input_ids_BT.numel() < large.input_ids_BT.numel()
    below = large.input_ids_BT.numel()
    way = _FakeGraphs(step, dict(student.named_parameters()), torch.device("cpu"), "float32", below=below)
    for _ in range(3):
        way.add(large, totals_of(large))
    assert way.captured == 0
    for _ in range(3):
        way.add(small, totals_of(small))
    assert way.captured == 1


@pytest.mark.parametrize(("bound", "replayed"), [(64, False), (65, True)])
def test_a_training_looks_at_several_steps_for_small_micro_batches(
    bound: int, replayed: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The first micro-batch is larger than the bound, the smallest decides whether graphs are prepared."""
    made = []

    class Made(Exception):
        pass

    def prepare(*arguments, **options):  # type: ignore[no-untyped-def]
        made.append(options["below"])
        raise Made

    sizes = [128, 128, 64, 128]

    class Sizes:
        def micro_batches(self, step: int) -> list[Any]:
            return [SimpleNamespace(input_ids_BT=torch.zeros(1, sizes[step]))]

    monkeypatch.setattr(loop_module, "ReplayedGradients", prepare)
    monkeypatch.setattr(loop_module, "replayed_below", lambda *a: bound)
    monkeypatch.setattr(loop_module, "EagerGradients", lambda *a: "eager")
    monkeypatch.setattr(loop_module, "Signals", lambda: (_ for _ in ()).throw(Made))
    with pytest.raises(Made):
        loop_module.fit(
            torch.nn.Linear(2, 2), Sizes(), lambda *a: None, optim=Optim(learning_rate=1e-3), loop=Loop(batch_rows=1),
            total_steps=4, device=torch.device("cpu"), tracker=SimpleNamespace(stage="distill", path=tmp_path / "log"),
            checkpoint_root=tmp_path, key="k",
        )  # fmt: skip
    assert bool(made) == replayed


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("precision", "prompt_weight", "teachers"),
    [("float32", 0.0, 1), ("bfloat16", 0.0, 1), ("bfloat16", 30.0, 1), ("bfloat16", 30.0, 3)],
)
def test_replayed_steps_equal_eager_ones(precision: str, prompt_weight: float, teachers: int) -> None:
    device = torch.device("cuda")
    curves = []
    for replayed in (False, True):
        student, teacher = students("cuda")
        teacher.requires_grad_(False)
        config = DistillConfig(
            gamma="auto", gamma_every_steps=4, prompt_weight=prompt_weight, teachers=teachers
        )
        step = DistillStep(student, teacher, config, [1], further=[teacher] * (teachers - 1))
        parameters = dict(student.named_parameters())
        way = (
            ReplayedGradients(step, parameters, device, precision)
            if replayed
            else EagerGradients(step, device, precision)
        )
        optimizer = build_optimizer(student, Optim(learning_rate=1e-3))
        source, losses = batches(), []
        with way.stream(), causal_only(student, teacher):
            for n in range(24):
                step.before_step(n)
                (batch,) = source.micro_batches(n)
                losses.append(float(way.add(batch, totals_of(batch))["loss"]))
                optimizer.step()
                way.clear(optimizer)
            if isinstance(way, ReplayedGradients):
                assert way.enabled
                assert len(way.graphs) >= 2
        curves.append(losses)
    torch.testing.assert_close(torch.tensor(curves[0]), torch.tensor(curves[1]), rtol=2e-2, atol=1e-3)
    assert curves[0][-1] < curves[0][0]


@pytest.mark.gpu
def test_a_graph_that_reads_what_was_never_written_is_not_used(caplog: pytest.LogCaptureFixture) -> None:
    device = torch.device("cuda")
    student, _ = students("cuda")
    plain = CrossEntropyStep(student)

    def step(batch, totals):  # type: ignore[no-untyped-def]
        output = plain(batch, totals)
        if torch.cuda.is_current_stream_capturing():
            output.loss = output.loss * float("nan")
        return output

    step.replayable = True  # type: ignore[attr-defined]
    way = ReplayedGradients(step, dict(student.named_parameters()), device, "bfloat16")
    batch = batches().micro_batches(0)[0]
    with way.stream(), causal_only(student):
        for _ in range(3):
            way.add(batch, totals_of(batch))
        assert not way.enabled
        assert all(bool(p.grad.isfinite().all()) for p in way.parameters)  # type: ignore[union-attr]
    assert "gradients differ from the eager step's" in caplog.text
