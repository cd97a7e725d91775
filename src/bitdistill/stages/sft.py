"""Task fine-tuning with cross-entropy: the full-precision teacher, and the BitNet-SFT baseline."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bitdistill.config import BitNetSftConfig, Loop, Optim, RefineConfig, SftConfig
from bitdistill.data.batches import Batch
from bitdistill.data.tasks import Example, check_tokenizer, label_token_ids
from bitdistill.losses.logits import chunked_language_model_loss, cross_entropy_sum
from bitdistill.models import surgery
from bitdistill.models.attention import causal_only
from bitdistill.models.forward import final_hidden, head_weight, logits_at, predicting, tokens_at
from bitdistill.models.load import load_source, load_tokenizer, source_fingerprint
from bitdistill.report.run_folder import FURTHER_TEACHERS
from bitdistill.stages import kernels
from bitdistill.stages.common import Run, pad_token_id
from bitdistill.stages.refine import calibration_from_task
from bitdistill.train.compile import compile_blocks
from bitdistill.train.loop import FitResult, fit
from bitdistill.train.step import StepFunction, StepOutput, Totals

LOGITS_AT_ONCE = 1 << 28
"""Elements of a micro-batch's logits (1 GiB in float32) above which they are made a chunk of tokens at a time: long
answers, such as rows that `augment` writes, would take many times the memory of the model."""


class CrossEntropyStep:
    """Step function: mean cross-entropy over the answer tokens (paper, Eq. 9)."""

    replayable = True

    def __init__(self, model: Any) -> None:
        self.model = model
        self.capped = getattr(model.config, "final_logit_softcapping", None) is not None

    def __call__(self, batch: Batch, totals: Totals) -> StepOutput:
        hidden = final_hidden(self.model, batch.input_ids_BT, **batch.packing)
        return StepOutput(self.answers_sum(hidden, batch) / totals.answers)

    def answers_sum(self, hidden: Tensor, batch: Batch) -> Tensor:
        """Cross-entropy summed over the answer tokens, from final hidden states [B, T, H]."""
        rows_NH = predicting(hidden, batch.answer_index_N)
        targets_N = tokens_at(batch.input_ids_BT, batch.answer_index_N)
        head = head_weight(self.model)
        if len(targets_N) * head.shape[0] > LOGITS_AT_ONCE and not self.capped:
            loss, _, _ = chunked_language_model_loss(rows_NH, head, targets_N, lm_weight=1.0, kl_weight=0.0)
        else:
            loss = cross_entropy_sum(logits_at(self.model, rows_NH), targets_N)
        return loss


def train_on_task(
    run: Run,
    stage: str,
    model: Any,
    tokenizer: Any,
    *,
    optim: Optim,
    loop: Loop,
    epochs: float,
    make_step: Callable[[Any], StepFunction] = CrossEntropyStep,
    frozen: Sequence[Any] = (),
    fused: bool = False,
    before_step: Callable[[int], None] | None = None,
    examples: Sequence[Example] | None = None,
    label_scores_NC: Tensor | None = None,
    **fit_options: Any,
) -> FitResult:
    """Run `fit` over task rows for `epochs`.

    Args:
        frozen: other models that the step runs.
        fused: train `model`, a ternary student, with fused layers.
        examples: encoded rows; None: the task's training rows.
        label_scores_NC: for each example, what batches bring as `label_scores_BC`.

    Raises:
        DataError, ModelError: rows, label words or tokenizer are not usable.
    """
    check_tokenizer(tokenizer, model.get_input_embeddings().weight.shape[0])
    if examples is None and run.recipe.task.kind == "classification":
        label_token_ids(run.recipe.task, tokenizer)  # or scoring would refuse them, after all training
    rows = run.train_examples(tokenizer) if examples is None else list(examples)
    batches = run.task_batches(rows, loop, pad_token_id(tokenizer), run.compiling(loop), label_scores_NC)
    total_steps = max(1, round(epochs * batches.steps_per_epoch))
    if loop.gradient_checkpointing:
        model.gradient_checkpointing_enable()
    with contextlib.ExitStack() as stack:
        stack.enter_context(causal_only(model, *frozen, packed=loop.packing))
        if fused:
            before_step = kernels.FusedAfterWarmup(model, stack, before_step, loop.int8_backward)
        return fit(
            model,
            batches,
            make_step(model),
            optim=optim,
            loop=loop,
            total_steps=total_steps,
            device=run.device,
            tracker=run.tracker(stage, total_steps),
            checkpoint_root=run.checkpoints(stage),
            key=run.keys[stage],
            before_step=before_step,
            fused=fused,
            **fit_options,
        )


def sft(run: Run) -> Path:
    """Fine-tune the full-precision model, or the recipe's `teacher`, on the task; writes `teacher/`, a plain bfloat16
    model folder.

    Raises:
        DataError, ModelError: rows, tokenizer or model are not usable.
    """
    return _fine_tuned(run, "sft", run.run_dir / "teacher", run.recipe.seed)


def further_teachers(run: Run) -> list[Path]:
    """The other models of `distill.teachers`: `teacher_1/` and so on, each with the seed after the one before.

    They are fitted to the run's own training rows: where `data.rows_per_label` draws these by seed, those of another
    seed would bring labels that the run does not have. Elsewhere a sibling run of that seed has the same teacher, which
    is taken.
    """
    folders = []
    for n, name in enumerate(FURTHER_TEACHERS[: run.recipe.distill.teachers - 1], start=1):
        folders.append(_fine_tuned(run, name, run.run_dir / name, run.recipe.seed + n))
    return folders


def _fine_tuned(run: Run, stage: str, folder: Path, seed: int) -> Path:
    config: SftConfig = run.recipe.sft
    source = run.recipe.teacher_source
    inputs = {
        "model": source_fingerprint(source),
        **run.train_inputs(),
        "sft": run.section("sft"),
        "seed": seed,
    }
    if run.finished(stage, folder, inputs):
        return folder
    if run.recipe.teacher is not None:
        # The student's label words would be refused after two stages of training
        label_token_ids(run.recipe.task, load_tokenizer(run.recipe.model))
    model, tokenizer = load_source(source, dtype="float32", device=run.device)
    if run.compiling(config.loop):
        compile_blocks(model)
    seeded = dataclasses.replace(run, recipe=run.recipe.model_copy(update={"seed": seed}))
    result = train_on_task(
        seeded, stage, model, tokenizer, optim=config.optim, loop=config.loop, epochs=config.epochs,
        examples=None if seed == run.recipe.seed else run.train_examples(tokenizer),
    )  # fmt: skip
    run.save_artifact(
        stage,
        model.to(torch.bfloat16),
        tokenizer,
        folder,
        kind="teacher",
        plan=None,
        extra=run.meta(stage, inputs, result),
    )
    return folder


def bitnet_sft(run: Run) -> Path:
    """Baseline: the full-precision model made ternary at once, then fine-tuned; writes `bitnet_sft/`."""
    config = run.recipe.bitnet_sft
    assert config is not None
    folder = run.run_dir / "bitnet_sft"
    inputs = {
        "model": source_fingerprint(run.recipe.model),
        **run.train_inputs(),
        "bitnet_sft": run.section("bitnet_sft"),
        "seed": run.recipe.seed,
    }
    if config.calibrated:  # only then: without SubLN the baseline depends on nothing of `refine`
        inputs["calibration"] = [run.recipe.refine.calibration_rows, run.recipe.refine.calibration_length]
    if run.finished("bitnet_sft", folder, inputs):
        return folder
    source, tokenizer = load_source(run.recipe.model, dtype="float32", device=run.device)
    plan = surgery.plan(source.config, _baseline_refine(config))
    student = surgery.apply(plan, source)
    if config.calibrated:
        tokens, mask = calibration_from_task(run, tokenizer)
        surgery.calibrate_gains(student, source, tokens.to(run.device), mask.to(run.device))
    del source
    if run.compiling(config.loop):
        compile_blocks(student)
    result = train_on_task(
        run,
        "bitnet_sft",
        student,
        tokenizer,
        optim=config.optim,
        loop=config.loop,
        epochs=config.epochs,
        fused=kernels.usable(config.loop, run.device, student),
    )
    run.save_artifact(
        "bitnet_sft",
        student,
        tokenizer,
        folder,
        kind="bitnet_sft",
        plan=plan,
        extra=run.meta("bitnet_sft", inputs, result),
    )
    return folder


def _baseline_refine(config: BitNetSftConfig) -> RefineConfig:
    return RefineConfig(subln=config.subln, gains=config.gains)
