"""Stage 3 on short rows: an unfused loop against ours. A section of train_speed.py."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from common import DEVICE, Report, Shape, profiled, task_batch, timed_steps
from torch.nn.functional import cross_entropy, kl_div, log_softmax
from transformers import AutoModelForCausalLM

from bitdistill.config import DistillConfig
from bitdistill.data.batches import Batch
from bitdistill.losses.relation import attention_distillation_sum
from bitdistill.models.attention import causal_only
from bitdistill.models.capture import capture_states
from bitdistill.models.fused import fused_layers
from bitdistill.models.surgery import refine
from bitdistill.stages.distill import DistillStep
from bitdistill.train.compile import compile_blocks
from bitdistill.train.gradients import EagerGradients, ReplayedGradients
from bitdistill.train.step import StepOutput

ROWS, LENGTH, TAU, GAMMA = 128, 48, 5.0, 60.0


@dataclass(frozen=True)
class Case:
    kernels: bool = True
    compiled: bool = True
    replayed: bool = True
    packed: bool = False
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Of DistillConfig."""


CASES = {
    "unfused": Case(kernels=False, compiled=False, replayed=False),
    "fused": Case(),
    "fused_packed": Case(packed=True),
    "fused_not_compiled": Case(compiled=False),
    "fused_prompt": Case(settings={"prompt_weight": 30.0}),
    "fused_prompt_packed": Case(packed=True, settings={"prompt_weight": 30.0}),
    "fused_no_blocks": Case(settings={"hidden_weight": 0.0}),
    "reference": Case(kernels=False),
    "reference_eager": Case(kernels=False, compiled=False, replayed=False),
}


def unfused_step(student: Any, teacher: Any, layer: int) -> Any:
    """The loop as one would write it down: mask tensors, float32 logits of all positions, whole relation matrices."""

    def step(batch: Batch, totals: Any) -> StepOutput:
        ids, mask = batch.input_ids_BT, batch.attention_mask_BT
        with torch.no_grad(), capture_states(teacher, [layer]) as wanted:
            teacher_logits = teacher(input_ids=ids, attention_mask=mask, use_cache=False).logits.float()
        with capture_states(student, [layer]) as states:
            logits = student(input_ids=ids, attention_mask=mask, use_cache=False).logits.float()
        labels = ids.masked_fill(~batch.answer_mask_BT, -100)[:, 1:]
        ce = cross_entropy(logits[:, :-1].flatten(0, 1), labels.flatten(), reduction="sum") / totals.answers
        kl = kl_div(
            log_softmax(logits / TAU, -1),
            log_softmax(teacher_logits / TAU, -1),
            reduction="none",
            log_target=True,
        ).sum(-1)
        ld = kl[:, :-1].masked_select(batch.answer_mask_BT[:, 1:]).sum() / totals.answers
        ad = attention_distillation_sum(states[layer], wanted[layer], mask) / totals.rows
        return StepOutput(ce + 10.0 * ld + GAMMA * ad)

    return step


@contextlib.contextmanager
def built(case: str, shape: Shape) -> Iterator[tuple[Any, Any, Callable[[], None]]]:
    """Student, what makes its gradients, and what runs before each step."""
    kind = CASES[case]
    torch._dynamo.reset()
    torch.manual_seed(0)

    def load(dtype: torch.dtype) -> Any:
        return AutoModelForCausalLM.from_config(shape.config(), dtype=dtype, attn_implementation="sdpa").to(
            DEVICE
        )

    teacher = load(torch.bfloat16).requires_grad_(False).eval()
    student = refine(load(torch.float32), gains="ones").train()
    layer = shape.config().num_hidden_layers - 2
    refresh: Callable[[], None] = lambda: None  # noqa: E731
    with contextlib.ExitStack() as stack:
        if case == "unfused":
            step: Any = unfused_step(student, teacher, layer)
        else:
            # gamma fixed: nothing is measured, so every step may be replayed
            config = DistillConfig(gamma=GAMMA, **kind.settings)
            step = DistillStep(student, teacher, config, [layer], fused=kind.kernels, compiling=kind.compiled)
            stack.enter_context(causal_only(student, teacher, packed=kind.packed))
        if kind.compiled:
            compile_blocks(student, skip=[layer])
            compile_blocks(teacher, skip=[layer])
        if kind.kernels:
            refresh = stack.enter_context(fused_layers(student)).refresh
        gradients: Any = EagerGradients(step, DEVICE, "bfloat16")
        if kind.replayed:
            parameters = {n: p for n, p in student.named_parameters() if p.requires_grad}
            gradients = ReplayedGradients(step, parameters, DEVICE, "bfloat16")
        yield student, gradients, refresh


def section_stage3(report: Report, shape: Shape, name: str, cases: list[str], limit_s: float) -> None:
    """Teacher and student on short rows: 128 x 48 tokens, three quarters of them real."""
    for case in cases:
        if not report.over("stage3", shape=name, case=case):
            with report.caught("stage3", shape=name, case=case):
                stage3_case(report, shape, name, case, limit_s)


def stage3_case(report: Report, shape: Shape, name: str, case: str, limit_s: float) -> None:
    """One case. In a function of its own, so that nothing of it is alive when the next one's memory is taken."""
    with built(case, shape) as (student, gradients, refresh):
        batches = [[task_batch(shape.config(), ROWS, LENGTH, 0, packing=CASES[case].packed)]]
        found = timed_steps(student, gradients, batches, refresh, limit_s)
        report.line(
            "stage3", shape=name, case=case, rows=ROWS, length=LENGTH,
            replayed=len(getattr(gradients, "graphs", ())) or len(getattr(gradients, "seen", ())),
            still_replaying=bool(getattr(gradients, "enabled", False)), **found,
        )  # fmt: skip


def section_stage3_profile(report: Report, shape: Shape, name: str, cases: list[str]) -> None:
    """Where the device time of such a step goes, launched kernel by kernel."""
    for case in cases:
        if report.over("stage3_profile", shape=name, case=case):
            continue
        with (
            report.caught("stage3_profile", shape=name, case=case),
            built(case, shape) as (student, gradients, refresh),
        ):
            batch = [task_batch(shape.config(), ROWS, LENGTH, 0, packing=CASES[case].packed)]
            eager = EagerGradients(gradients.step_function, DEVICE, "bfloat16")
            profiled(report, "stage3_profile", name, case, student, eager, batch, refresh)
