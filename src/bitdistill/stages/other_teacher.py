"""Stage 3 from a teacher that is another model, of any size, family and tokenizer (paper, Fig. 3c: a larger teacher).

The two models share nothing but the task's labels, so these alone are distilled: L = ce_weight * L_CE + lambda * L_LD,
with L_LD the mean over rows of KL( softmax(t / tau) || softmax(s / tau) ), where t and s are log-likelihoods of the
label words, each in the tokens of its own model (losses/labels.py). The teacher's are computed once for all rows and
kept in the run's folder (`label_scores/`); it takes no part in the steps.

Shape legend: N rows of the stage, B rows of a micro-batch, T tokens, C labels, Q paths (see eval.classify.label_paths),
L tokens of the longest prefix, P positions whose next token is scored, S scored tokens, H hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from bitdistill import artifact
from bitdistill.config import DistillConfig
from bitdistill.data import tasks
from bitdistill.data.batches import Batch
from bitdistill.data.readers import Row
from bitdistill.data.tasks import Example
from bitdistill.eval import classify
from bitdistill.losses.labels import label_log_likelihoods
from bitdistill.losses.logits import logits_distillation_sum
from bitdistill.models.forward import final_hidden, logits_at, rows_at
from bitdistill.models.load import load_source
from bitdistill.stages import pseudo_labels
from bitdistill.stages.common import Run, log, pad_token_id
from bitdistill.stages.sft import CrossEntropyStep
from bitdistill.train.step import StepOutput, Totals
from bitdistill.train.tracking import WorkProgress

SCORES = "scores.safetensors"
"""File of the artifact: float32 [rows, labels] of the training rows, then of the others, under their names."""


def label_scores(run: Run, teacher_folder: Path, written: Path | None) -> tuple[Tensor, Tensor]:
    """The teacher's log-likelihood in nats of each label word after each row's prompt; writes `label_scores/`.

    In float32, as scoring does it. Its key holds the contents of teacher and written rows, so a teacher that is made
    again scores again.

    Args:
        teacher_folder: the artifact of `sft`.
        written: the artifact of `augment`.

    Returns:
        float32 [rows, C] on the CPU: of the training rows, and of the rows of `pseudo_labels.unlabelled_rows`.

    Raises:
        DataError: rows or label words that the teacher's tokenizer or template cannot take.
        ArtifactError: teacher or scores are damaged, or were made with other settings.
    """
    folder = run.run_dir / "label_scores"
    inputs: dict[str, Any] = {
        "teacher": artifact.read_manifest(teacher_folder)["files"],
        **run.train_inputs(),
        "unlabelled": pseudo_labels.fingerprints(run),
        "written": None if written is None else artifact.read_manifest(written)["files"],
    }
    if not run.finished("label_scores", folder, inputs):
        artifact.verify(teacher_folder)
        source = run.recipe.teacher_source.model_copy(
            update={"path": str(teacher_folder), "tokenizer": None, "revision": None}
        )
        teacher, tokenizer = load_source(source, dtype="float32", device=run.device)
        train, others = run.train_rows(), pseudo_labels.unlabelled_rows(run, written)
        log.info("distill: the teacher scores the labels of %d rows", len(train) + len(others))
        scores = _scores(run, teacher, tokenizer, [*train, *others])
        parts = {"train": scores[: len(train)].clone(), "unlabelled": scores[len(train) :].clone()}
        about = {"kind": "label scores", "rows": len(scores), **run.meta("label_scores", inputs)}
        with artifact.writing(folder, about) as partial:
            save_file(parts, partial / SCORES)
        run.redo.done("label_scores")
    artifact.verify(folder)
    found = load_file(folder / SCORES)
    return found["train"], found["unlabelled"]


def _scores(run: Run, teacher: Any, tokenizer: Any, rows: Sequence[Row]) -> Tensor:
    task = run.recipe.task
    examples = tasks.encode(task, rows, tokenizer, run.recipe.data.max_length, require_answers=False)
    with WorkProgress("scores", quiet=run.quiet) as progress:
        return classify.label_scores(
            teacher,
            tasks.label_token_ids(task, tokenizer),
            examples,
            **pseudo_labels.batches(run),
            device=run.device,
            pad_id=pad_token_id(tokenizer),
            progress=progress,
        )


def answered_examples(run: Run, tokenizer: Any, written: Path | None, scores_NC: Tensor) -> list[Example]:
    """`pseudo_labels.unlabelled_rows`, encoded for the student, with the labels that the teacher scores highest."""
    task, length, labels = run.recipe.task, run.recipe.data.max_length, list(run.recipe.task.labels)
    rows = pseudo_labels.unlabelled_rows(run, written)
    if not rows:
        return []
    examples = tasks.encode(task, rows, tokenizer, length, require_answers=False)
    answers = [labels[best] for best in scores_NC.argmax(dim=1).tolist()]
    return tasks.with_answers(task, examples, answers, tokenizer, length)


class LabelDistillStep:
    """Step function of stage 3 with another model's teacher.

    Label words of one token each are scored by the forward pass that cross-entropy needs. Longer ones cost a further
    pass, in which every prompt comes once for each path.

    Args:
        student: the model that is trained.
        label_ids: token ids of each label word in the student's tokenizer.
        config: recipe section `distill`.
    """

    replayable = True

    def __init__(self, student: Any, label_ids: Sequence[tuple[int, ...]], config: DistillConfig) -> None:
        self.student, self.config = student, config
        self.cross_entropy = CrossEntropyStep(student)
        paths = classify.label_paths(label_ids)
        steps = [(q, *step) for q, path in enumerate(paths) for step in path.steps]
        places = sorted({(q, end) for q, end, _, _ in steps})
        longest = max(len(path.prefix) for path in paths)
        # On the device from the start: a CUDA graph cannot be captured over copies from the host
        device = next(student.parameters()).device
        # What follows a shorter prefix is not seen by the positions that count
        padded = [[*path.prefix, *[0] * (longest - len(path.prefix))] for path in paths]
        self.prefix_QL = torch.tensor(padded, dtype=torch.int64, device=device).reshape(len(paths), longest)
        self.path_P = torch.tensor([q for q, _ in places], device=device)
        self.end_P = torch.tensor([end for _, end in places], device=device)
        self.position_S = torch.tensor([places.index((q, end)) for q, end, _, _ in steps], device=device)
        self.token_S = torch.tensor([token for *_, token in steps], device=device)
        members = [[c in labels for c in range(len(label_ids))] for _, _, labels, _ in steps]
        self.member_SC = torch.tensor(members, device=device)

    def __call__(self, batch: Batch, totals: Totals) -> StepOutput:
        config = self.config
        hidden_BTH = final_hidden(self.student, batch.input_ids_BT, **batch.packing)
        ce = self.cross_entropy.answers_sum(hidden_BTH, batch) / totals.answers
        loss = config.ce_weight * ce
        metrics: dict[str, Tensor | float] = {"ce": ce.detach()}
        if config.lambda_:
            assert batch.label_scores_BC is not None, "stage 3 gives its batches the teacher's scores"
            ld = logits_distillation_sum(
                self.label_scores(batch, hidden_BTH),
                batch.label_scores_BC,
                temperature=config.temperature,
                tau_squared=config.tau_squared,
            )
            ld = ld / totals.rows
            loss = loss + config.lambda_ * ld
            metrics["ld"] = ld.detach()
        return StepOutput(loss, metrics)

    def label_scores(self, batch: Batch, hidden_BTH: Tensor) -> Tensor:
        """The student's log-likelihood of each label word: float32 [B, C], with gradient.

        Args:
            batch: with `answer_start_B`.
            hidden_BTH: its final hidden states.
        """
        assert batch.answer_start_B is not None
        start_B = batch.answer_start_B
        if self.prefix_QL.numel():
            hidden_BTH, start_B = self._after_prefixes(batch, start_B)
        rows, width = batch.rows, hidden_BTH.shape[1]
        index_BP = start_B[:, None] - 1 + self.path_P * (rows * width) + self.end_P
        logits_NV = logits_at(self.student, rows_at(hidden_BTH, index_BP.flatten()))
        logits_BPV = logits_NV.unflatten(0, (rows, len(self.path_P)))
        return label_log_likelihoods(logits_BPV, self.position_S, self.token_S, self.member_SC)

    def _after_prefixes(self, batch: Batch, start_B: Tensor) -> tuple[Tensor, Tensor]:
        """Final hidden states [Q * B, T + L, H] of every prompt with every prefix after it, and where in the flat
        positions of the first B rows the prompts end."""
        ids_BT, rows, (paths, longest) = batch.input_ids_BT, batch.rows, self.prefix_QL.shape
        device = ids_BT.device
        width, begin_B = ids_BT.shape[1], torch.arange(rows, device=device) * ids_BT.shape[1]
        if batch.starts_R is not None:
            width, begin_B = batch.longest, batch.starts_R[:-2].long()
        width += longest
        # A row's window may reach into the next row, behind all positions that count
        window_BT = (begin_B[:, None] + torch.arange(width, device=device)).clamp_max(ids_BT.numel() - 1)
        ids_QBT = ids_BT.flatten()[window_BT].repeat(paths, 1, 1)
        prompt_B = start_B - begin_B
        at_BL = prompt_B[:, None] + torch.arange(longest, device=device)
        ids_QBT.scatter_(2, at_BL.expand(paths, -1, -1), self.prefix_QL[:, None].expand(-1, rows, -1))
        hidden = final_hidden(self.student, ids_QBT.flatten(0, 1))
        return hidden, torch.arange(rows, device=device) * width + prompt_B
