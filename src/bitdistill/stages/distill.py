"""Stage 3 (paper, sec. 3.3): L = L_CE + lambda * L_LD + gamma * L_AD, from the fine-tuned teacher.

A teacher that is another model gives its labels alone: see other_teacher.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bitdistill import artifact
from bitdistill.config import DistillConfig
from bitdistill.data.batches import Batch
from bitdistill.data.corpus import tokenizer_fingerprint
from bitdistill.data.tasks import Example, label_token_ids
from bitdistill.errors import ModelError
from bitdistill.losses.balance import GammaBalancer, gradient_norm
from bitdistill.losses.hidden import ERRORS, block_errors_sum
from bitdistill.losses.logits import (
    chunked_language_model_loss,
    cross_entropy_sum,
    language_model_chunk,
    logits_distillation_sum,
    mean_distribution,
)
from bitdistill.losses.relation import attention_distillation_sum, fused_attention_distillation_sum
from bitdistill.models.capture import capture_states
from bitdistill.models.forward import (
    IGNORED,
    head_weight,
    hidden_states,
    logits_at,
    predicting,
    rows_at,
    tokens_at,
)
from bitdistill.models.load import load_source
from bitdistill.models.norms import gains_after_blocks
from bitdistill.models.student import load_student
from bitdistill.stages import kernels, layer_probe, pseudo_labels
from bitdistill.stages.common import Run, pad_token_id
from bitdistill.stages.layer_probe import relation_options
from bitdistill.stages.other_teacher import LabelDistillStep, answered_examples, label_scores
from bitdistill.stages.sft import further_teachers, train_on_task
from bitdistill.train.compile import compile_blocks, compiled
from bitdistill.train.step import StepOutput, Totals, autocast


class DistillStep:
    """Step function of stage 3; keeps the gamma balance, which is part of the checkpoint.

    Args:
        fused: take head losses and relation losses from their Triton kernels. Steps that measure gradient norms
            need the losses one by one and take the plain head, as do those of several teachers.
        further: other models whose distributions over the answer's tokens count as the teacher's does.
    """

    def __init__(
        self,
        student: Any,
        teacher: Any,
        config: DistillConfig,
        layers: Sequence[int],
        fused: bool = False,
        compiling: bool = False,
        further: Sequence[Any] = (),
    ) -> None:
        self.gains = gains_after_blocks(teacher) if config.hidden_error == "normed" else None
        self.hidden_error = compiled(ERRORS[config.hidden_error], compiling)
        self.student, self.teacher, self.config = student, teacher, config
        self.further = list(further)
        self.relations = fused_attention_distillation_sum if fused else attention_distillation_sum
        self.capped = getattr(student.config, "final_logit_softcapping", None) is not None
        self.chunk = kernels.fused_chunk() if fused and not self.capped else None
        self.layers = list(layers)
        fixed = None if config.gamma == "auto" else float(config.gamma)
        self.balancer = GammaBalancer(target_ratio=config.gamma_ratio, fixed=fixed)
        self.measure = False
        # On the device, so that a replayed CUDA graph sees the value of its step
        self.gamma = torch.tensor(self.balancer.gamma, device=next(student.parameters()).device)
        self.ratio = torch.zeros_like(self.gamma)
        attention = [student.get_submodule(f"model.layers.{i}.self_attn") for i in self.layers]
        self.probes = [getattr(a, name).weight for a in attention for name in ("q_proj", "k_proj", "v_proj")]

    @property
    def replayable(self) -> bool:
        """Whether the next call may be a CUDA graph's replay: a measurement reads gradient norms back."""
        return not self.measure

    def before_step(self, step: int) -> None:
        """Gradient norms are measured every `gamma_every_steps` steps, on the step's first micro-batch; at the start,
        where they change fastest, every ten."""
        every = self.config.gamma_every_steps
        due = step % every == 0 or (step < every and step % 10 == 0)
        self.measure = bool(self.layers) and due

    def __call__(self, batch: Batch, totals: Totals) -> StepOutput:
        every = self.config.hidden_weight > 0
        with torch.no_grad():
            teacher_hidden, teacher_states, teacher_outputs = _forward(
                self.teacher, batch, self.layers, every
            )
        hidden, states, outputs = _forward(self.student, batch, self.layers, every)

        if self.chunk is None or self.measure or self.further:
            loss, ce, metrics = self._head_losses(batch, totals, hidden, teacher_hidden)
        else:
            loss, metrics = self._fused_head_losses(batch, totals, hidden, teacher_hidden)
        if self.config.prompt_weight:
            prompt, value = self._prompt_loss(batch, totals, hidden, teacher_hidden)
            loss = loss + prompt
            metrics["prompt"] = value
        if self.layers:
            ad = self._relation_loss(batch, totals, states, teacher_states)
            if self.measure:
                self.balancer.update(gradient_norm(ce, self.probes), gradient_norm(ad, self.probes))
                self.measure = False
                self._publish()
            loss = loss + self.gamma * ad
            # gamma and ratio are per step, not per micro-batch: spread so that the loop's sum gives them once
            share = batch.rows / totals.rows
            metrics |= {"ad": ad.detach(), "gamma": self.gamma * share, "ad_ce_ratio": self.ratio * share}
        if every:
            mask = batch.attention_mask_BT
            error = block_errors_sum(
                outputs, teacher_outputs, mask, error=self.hidden_error, gains=self.gains
            )
            error = error / totals.tokens
            loss = loss + self.config.hidden_weight * error
            metrics["hidden"] = error.detach()
        return StepOutput(loss, metrics)

    def _head_losses(
        self, batch: Batch, totals: Totals, hidden: Tensor, teacher_hidden: Tensor
    ) -> tuple[Tensor, Tensor, dict[str, Any]]:
        """Weighted CE and LD, CE alone (both with gradient), and their values."""
        config = self.config
        logits_NV = logits_at(self.student, predicting(hidden, batch.answer_index_N))
        targets_N = tokens_at(batch.input_ids_BT, batch.answer_index_N)
        ce = cross_entropy_sum(logits_NV, targets_N) / totals.answers
        metrics: dict[str, Any] = {"ce": ce.detach()}
        loss = config.ce_weight * ce
        if config.lambda_:
            ld = self._logits_loss(batch, totals, hidden, teacher_hidden, logits_NV)
            loss = loss + config.lambda_ * ld
            metrics["ld"] = ld.detach()
        return loss, ce, metrics

    def _fused_head_losses(
        self, batch: Batch, totals: Totals, hidden: Tensor, teacher_hidden: Tensor
    ) -> tuple[Tensor, dict[str, Any]]:
        """The same loss and values; logits never exist in float32, nor as a whole."""
        config, index_N = self.config, batch.answer_index_N
        tau_squared = config.temperature**2 if config.tau_squared else 1.0
        kl_weight = config.lambda_ * tau_squared
        shared = bool(kl_weight) and config.distilled_tokens == "answer"
        targets_N = tokens_at(batch.input_ids_BT, index_N)
        rows, teacher_rows = predicting(hidden, index_N), predicting(teacher_hidden, index_N)
        loss, ce, kl = self._chunked(
            rows,
            targets_N,
            teacher_rows if shared else None,
            config.ce_weight,
            kl_weight if shared else 0.0,
            config.temperature,
        )
        loss, metrics = loss / totals.answers, {"ce": ce / totals.answers}
        if shared:
            metrics["ld"] = kl * tau_squared / totals.answers
        elif kl_weight:
            counted_N = batch.real_index_N >= 0
            ld, kl = self._chunked_kl(batch, hidden, teacher_hidden, counted_N, kl_weight, config.temperature)
            loss = loss + ld / totals.tokens
            metrics["ld"] = kl * tau_squared / totals.tokens
        return loss, metrics

    def _prompt_loss(
        self, batch: Batch, totals: Totals, hidden: Tensor, teacher_hidden: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Weighted KL over the real tokens that predict no answer, a mean over the step's, and its value."""
        index_N = batch.real_index_N
        counted_N = unanswered(batch.answer_index_N, index_N, batch.input_ids_BT.numel())
        count, weight = totals.unanswered, self.config.prompt_weight
        if self.capped:  # chunks know no cap
            with torch.no_grad():
                teacher_NV = logits_at(self.teacher, rows_at(teacher_hidden, index_N))
            logits_NV = logits_at(self.student, rows_at(hidden, index_N))
            kl = logits_distillation_sum(logits_NV, teacher_NV, temperature=1.0, counted_N=counted_N) / count
            return weight * kl, kl.detach()
        loss, kl = self._chunked_kl(batch, hidden, teacher_hidden, counted_N, weight, temperature=1.0)
        return loss / count, kl / count

    def _chunked_kl(
        self,
        batch: Batch,
        hidden: Tensor,
        teacher_hidden: Tensor,
        counted_N: Tensor,
        weight: float,
        temperature: float,
    ) -> tuple[Tensor, Tensor]:
        """KL summed over those of the batch's real tokens that count: weighted, and its value."""
        rows, teacher_rows = (rows_at(h, batch.real_index_N) for h in (hidden, teacher_hidden))
        targets_N = torch.where(counted_N, 0, IGNORED)
        loss, _, kl = self._chunked(rows, targets_N, teacher_rows, 0.0, weight, temperature)
        return loss, kl

    def _chunked(
        self,
        rows_NH: Tensor,
        targets_N: Tensor,
        teacher_NH: Tensor | None,
        ce_weight: float,
        kl_weight: float,
        temperature: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        return chunked_language_model_loss(
            rows_NH,
            head_weight(self.student),
            targets_N,
            teacher_hidden_NH=teacher_NH,
            teacher_head_VH=None if teacher_NH is None else head_weight(self.teacher),
            lm_weight=ce_weight,
            kl_weight=kl_weight,
            temperature=temperature,
            chunk_function=self.chunk or language_model_chunk,
        )

    def _publish(self) -> None:
        """Copy the balance to the device."""
        self.gamma.fill_(self.balancer.gamma)
        self.ratio.fill_(self.balancer.ratio)

    def _logits_loss(
        self, batch: Batch, totals: Totals, hidden: Tensor, teacher_hidden: Tensor, logits_NV: Tensor
    ) -> Tensor:
        config = self.config
        options: dict[str, Any] = {"temperature": config.temperature, "tau_squared": config.tau_squared}
        if config.distilled_tokens == "answer":
            index_N = batch.answer_index_N
            with torch.no_grad():
                teacher_NV = logits_at(self.teacher, predicting(teacher_hidden, index_N))
                if self.further:
                    hidden_of = [_forward(model, batch, [], False)[0] for model in self.further]
                    others = zip(self.further, hidden_of, strict=True)
                    of_each = [teacher_NV, *(logits_at(m, predicting(h, index_N)) for m, h in others)]
                    teacher_NV = mean_distribution(of_each, config.temperature)
            kl = logits_distillation_sum(logits_NV, teacher_NV, counted_N=index_N >= 0, **options)
            return kl / totals.answers
        index_N = batch.real_index_N
        with torch.no_grad():
            teacher_NV = logits_at(self.teacher, rows_at(teacher_hidden, index_N))
        all_NV = logits_at(self.student, rows_at(hidden, index_N))
        kl = logits_distillation_sum(all_NV, teacher_NV, counted_N=index_N >= 0, **options)
        return kl / totals.tokens

    def _relation_loss(self, batch: Batch, totals: Totals, states: Any, teacher_states: Any) -> Tensor:
        mask_BT, options = batch.attention_mask_BT, relation_options(self.config.relation)
        total = torch.zeros((), device=mask_BT.device)
        for layer in self.layers:
            total = total + self.relations(
                states[layer], teacher_states[layer], mask_BT, **options, **batch.documents
            )
        return total / (totals.rows * len(self.layers))

    def state_dict(self) -> dict[str, Any]:
        return self.balancer.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.balancer.load_state_dict(state)
        self._publish()


def unanswered(answer_index_N: Tensor, real_index_M: Tensor, positions: int) -> Tensor:
    """Which real tokens [M] predict no answer: bool, False where the index is filling (negative).

    Args:
        answer_index_N: flat positions of answer tokens; each is predicted by the position before.
        real_index_M: flat positions of real tokens.
        positions: of the batch, filling included.
    """
    # No shape here depends on values, so a CUDA graph can hold it; the place past the end takes the filling.
    marked = torch.zeros(positions + 1, dtype=torch.bool, device=answer_index_N.device)
    marked.scatter_(0, torch.where(answer_index_N < 0, positions, answer_index_N - 1), True)
    return (real_index_M >= 0) & ~marked.index_select(0, real_index_M.clamp_min(0))


def _forward(
    model: Any, batch: Batch, layers: list[int], every: bool
) -> tuple[Tensor, dict[int, Any], list[Tensor]]:
    """Final hidden states, Q, K, V states of `layers`, and with `every` the output of each block."""
    if not layers:
        hidden, outputs = hidden_states(model, batch.input_ids_BT, every=every, **batch.packing)
        return hidden, {}, outputs
    with capture_states(model, layers) as states:
        hidden, outputs = hidden_states(model, batch.input_ids_BT, every=every, **batch.packing)
    return hidden, dict(states), outputs


def wants_relations(config: DistillConfig) -> bool:
    """Whether L_AD takes part at all."""
    relation = config.relation
    return config.gamma != 0 and any((relation.alpha_q, relation.alpha_k, relation.alpha_v))


def _check_pair(student: Any, teacher: Any, student_tokenizer: Any, teacher_tokenizer: Any) -> None:
    """Teacher and student must speak the same tokens.

    Raises:
        ModelError: vocabularies differ.
    """
    own, other = tokenizer_fingerprint(student_tokenizer), tokenizer_fingerprint(teacher_tokenizer)
    sizes = [m.get_input_embeddings().weight.shape[0] for m in (student, teacher)]
    if own != other or sizes[0] != sizes[1]:
        raise ModelError(
            f"distill: teacher and student differ in tokenizer or vocabulary ({sizes[1]} and {sizes[0]} entries); "
            "use a teacher of the same family"
        )


def distill(run: Run, start: Path, start_key: str, teacher_folder: Path, written: Path | None = None) -> Path:
    """Stage 3; writes `student/`, the trained latent student.

    Args:
        start: the ternary base, or the refined model when stage 2 is left out.
        start_key: its key.
        teacher_folder: the fine-tuned full-precision model.
        written: the artifact of `augment`, rows that join `data.unlabelled`.
    """
    config = run.recipe.distill
    folder = run.run_dir / "student"
    inputs = {
        "start": start_key,
        "teacher": run.keys["sft"],
        **run.train_inputs(),
        "distill": run.section("distill"),
        "seed": run.recipe.seed,
    }
    if run.recipe.data.unlabelled:  # only then: keys of runs without such rows stay what they were
        inputs["unlabelled"] = pseudo_labels.fingerprints(run)
    if written is not None:
        inputs["written"] = run.keys["augment"]
    if run.recipe.teacher is not None:  # another loss, also where the teacher is equal
        inputs["distilled"] = "labels"
    if run.finished("distill", folder, inputs):
        return folder
    others = further_teachers(run)
    student, tokenizer, manifest = load_student(start, device=run.device)
    prepare = _same_model if run.recipe.teacher is None else _other_model
    lesson = prepare(run, student, tokenizer, [teacher_folder, *others], written)
    result = train_on_task(
        run,
        "distill",
        student,
        tokenizer,
        optim=config.optim,
        loop=config.loop,
        epochs=config.epochs,
        make_step=lambda _: lesson.step,
        examples=[*run.train_examples(tokenizer), *lesson.answered],
        fused=lesson.fused,
        **lesson.options,
    )
    run.save_artifact(
        "distill",
        student,
        tokenizer,
        folder,
        kind="student",
        plan=manifest["plan"],
        extra={
            **_with_teachers(run.meta("distill", inputs, result), others),
            "distilled_layers": lesson.layers,
            "teacher_answered_rows": len(lesson.answered),
            "layer_metrics": lesson.layer_metrics,
            "final_gamma": lesson.step.balancer.gamma if isinstance(lesson.step, DistillStep) else 0.0,
        },
    )
    return folder


@dataclass(frozen=True)
class _Lesson:
    """What a student is trained by, besides the training rows."""

    step: DistillStep | LabelDistillStep
    fused: bool
    answered: list[Example]
    """Rows of `data.unlabelled` and `augment` with the teacher's answers."""
    options: dict[str, Any]
    """Further arguments of `train_on_task`."""
    layers: list[int] = field(default_factory=list)
    layer_metrics: layer_probe.Metrics = field(default_factory=dict)


def _with_teachers(meta: dict[str, Any], others: Sequence[Path]) -> dict[str, Any]:
    """Manifest entries of stage 3 with the training of further teachers in its time."""
    training = dict(meta["training"])
    for folder in others:
        paid = artifact.read_manifest(folder)["training"]
        training |= {
            name: training[name] + paid.get(name, paid["elapsed_s"]) for name in ("elapsed_s", "device_s")
        }
    return {**meta, "training": training}


def _same_model(
    run: Run, student: Any, tokenizer: Any, teachers: Sequence[Path], written: Path | None
) -> _Lesson:
    """The teacher is the student's own model: all losses, with the teacher beside the student in every step."""
    config = run.recipe.distill
    teacher, teacher_tokenizer = load_teacher(run, teachers[0])
    further = [load_teacher(run, folder)[0] for folder in teachers[1:]]
    _check_pair(student, teacher, tokenizer, teacher_tokenizer)
    layers, layer_metrics = _layers(run, student, teacher, tokenizer)
    answered = pseudo_labels.answered_examples(run, teacher, tokenizer, written)
    if run.compiling(config.loop):
        compile_blocks(student, skip=layers)
        compile_blocks(teacher, skip=layers)
        for model in further:
            compile_blocks(model)
    fused = kernels.usable(config.loop, run.device, student)
    step = DistillStep(student, teacher, config, layers, fused, run.compiling(config.loop), further)
    options = {"frozen": [teacher, *further], "state": step, "before_step": step.before_step}
    return _Lesson(step, fused, answered, options, layers, layer_metrics)


def _other_model(
    run: Run, student: Any, tokenizer: Any, teachers: Sequence[Path], written: Path | None
) -> _Lesson:
    """The teacher is another model: its distributions over the labels, computed before the first step."""
    config = run.recipe.distill
    train_NC, others_NC = label_scores(run, teachers[0], written)
    answered = answered_examples(run, tokenizer, written, others_NC)
    if run.compiling(config.loop):
        compile_blocks(student)
    fused = kernels.usable(config.loop, run.device, student)
    step = LabelDistillStep(student, label_token_ids(run.recipe.task, tokenizer), config)
    return _Lesson(step, fused, answered, {"label_scores_NC": torch.cat([train_NC, others_NC])})


def load_teacher(run: Run, folder: Path) -> tuple[Any, Any]:
    """The frozen teacher in the dtype it runs in: bfloat16 on a GPU, float32 on a CPU."""
    artifact.verify(folder)
    source = run.recipe.model.model_copy(update={"path": str(folder), "tokenizer": None, "revision": None})
    dtype = "bfloat16" if run.device.type == "cuda" else "float32"
    model, tokenizer = load_source(source, dtype=dtype, device=run.device)
    return model.requires_grad_(False).eval(), tokenizer


def probe(run: Run, student: Any, teacher: Any, tokenizer: Any, *, full: bool) -> layer_probe.Metrics:
    """Figures of every layer on the first training batches (see layer_probe.measure)."""
    config = run.recipe.distill
    loop = config.loop.model_copy(
        update={
            "batch_rows": layer_probe.BATCH_ROWS,
            "micro_batch_rows": None,
            "micro_batch_tokens": None,
            "packing": False,
        }
    )
    batches = run.task_batches(run.train_examples(tokenizer), loop, pad_token_id(tokenizer), compiling=False)
    count = min(layer_probe.BATCHES, batches.steps_per_epoch)
    first = [batches.micro_batches(step)[0].to(run.device) for step in range(count)]
    with autocast(run.device, config.loop.precision):
        return layer_probe.measure(student, teacher, first, config, full=full)


def probe_only(run: Run, start: Path, teacher_folder: Path) -> layer_probe.Metrics:
    """All figures of every layer, from what stage 3 would start with; nothing is written.

    Raises:
        ModelError: teacher and student differ in vocabulary.
    """
    student, tokenizer, _ = load_student(start, device=run.device)
    teacher, teacher_tokenizer = load_teacher(run, teacher_folder)
    _check_pair(student, teacher, tokenizer, teacher_tokenizer)
    return probe(run, student, teacher, tokenizer, full=True)


def _layers(run: Run, student: Any, teacher: Any, tokenizer: Any) -> tuple[list[int], layer_probe.Metrics]:
    """Layers of L_AD and every layer's figures: the divergence, and all of them where the rule needs others."""
    config = run.recipe.distill
    if not wants_relations(config):
        return [], {}
    full = layer_probe.rule_of(config.relation.layer) not in (None, "divergence")
    metrics = probe(run, student, teacher, tokenizer, full=full)
    return layer_probe.resolve_layers(config, metrics), metrics
