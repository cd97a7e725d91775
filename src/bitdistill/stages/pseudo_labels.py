"""Rows without answers for stage 3: the teacher answers them, and they join the training rows.

Distillation needs no labels, only inputs on which the student should be like its teacher. With few training rows a
teacher fits them perfectly and says little on them that the labels do not; further rows show what it does elsewhere.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from bitdistill import artifact
from bitdistill.data import readers, tasks
from bitdistill.data.readers import Row
from bitdistill.data.tasks import Example
from bitdistill.errors import DataError
from bitdistill.eval.classify import classify
from bitdistill.eval.generate import generate
from bitdistill.models.attention import causal_only
from bitdistill.stages.augment import WRITTEN_ROWS
from bitdistill.stages.common import Run, log, pad_token_id
from bitdistill.train.tracking import WorkProgress

BATCH_ROWS = 512
"""Rows of one forward pass of the teacher: short rows keep a GPU busy only in large batches."""
GENERATED = {"batch_rows": 4096, "batch_tokens": 1 << 19}
"""Rows and tokens that are answered with text at a time on a GPU, at most: a token takes it as long for 500 rows as for
some thousands, and several runs may be answering beside each other, so not all that one GPU's memory would hold."""


def fingerprints(run: Run) -> list[str]:
    """What names the content of each unlabelled source, for stage 3's key."""
    return [readers.source_fingerprint(source) for source in run.recipe.data.unlabelled]


def unlabelled_rows(run: Run, written: Path | None) -> list[Row]:
    """Rows of `data.unlabelled` and of `augment`, in this order, without answers.

    Raises:
        DataError: a source that cannot be read.
        ArtifactError: the written rows are damaged.
    """
    sources = list(run.recipe.data.unlabelled)
    if written is not None:
        artifact.verify(written)
        sources.append(str(written / WRITTEN_ROWS))
    rows = [row for source in sources for row in readers.read_rows(source)]
    task = run.recipe.task
    answer_field = task.label_field if task.kind == "classification" else str(task.target_field)
    # Whatever answers the rows bring are hidden: they must not reach the student by this way.
    return [Row({k: v for k, v in row.fields.items() if k != answer_field}, row.where) for row in rows]


def answered_examples(run: Run, teacher: Any, tokenizer: Any, written: Path | None = None) -> list[Example]:
    """Encoded rows of `data.unlabelled` and of `augment` with the teacher's answers; empty without either.

    Rows to which a generating teacher has no answer (the empty text) are left out, and counted in the log.

    Args:
        written: the artifact of `augment`.

    Raises:
        DataError: a source that cannot be read, or a row that lacks a field of the template.
        ArtifactError: the written rows are damaged.
    """
    bare, task = unlabelled_rows(run, written), run.recipe.task
    if not bare:
        return []
    length = run.recipe.data.max_length
    log.info("distill: the teacher answers %d unlabelled rows", len(bare))
    examples = tasks.encode(task, bare, tokenizer, length, require_answers=False)
    answers = _answers(run, teacher, tokenizer, examples)
    kept = [n for n, (text, _) in enumerate(answers) if text.strip()]
    log.info("distill: the teacher answered %d of %d unlabelled rows", len(kept), len(bare))
    if not kept:
        raise DataError(
            "data.unlabelled: the teacher answered no row; check the teacher, or leave the key (or augment) out"
        )
    return tasks.with_answers(
        task,
        [examples[n] for n in kept],
        [answers[n][0] for n in kept],
        tokenizer,
        length,
        # An end-of-text token after an answer that max_new_tokens cut would teach to stop in mid-sentence.
        ended=[answers[n][1] for n in kept],
    )


def batches(run: Run) -> dict[str, int]:
    """How many rows are answered at a time, as arguments of what answers them."""
    if run.device.type != "cuda":
        return {"batch_rows": run.recipe.eval.batch_rows}
    return GENERATED if run.recipe.task.kind == "generation" else {"batch_rows": BATCH_ROWS}


@torch.inference_mode()
def _answers(run: Run, teacher: Any, tokenizer: Any, examples: list[Example]) -> list[tuple[str, bool]]:
    """The teacher's answer to each row, the label as the data spell it or the generated text, and whether it ended."""
    task = run.recipe.task
    options: dict[str, Any] = {"device": run.device, "pad_id": pad_token_id(tokenizer)}
    options |= batches(run)
    with WorkProgress("answers", quiet=run.quiet) as options["progress"]:
        if task.kind == "generation":
            return [(p.text, p.ended) for p in generate(teacher, tokenizer, task, examples, **options)]
        labels = list(task.labels)
        with causal_only(teacher):
            predictions = classify(teacher, tokenizer, task, examples, **options)
    return [(labels[int(p.label)], True) for p in predictions if p.label is not None]
