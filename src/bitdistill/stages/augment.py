"""More rows of a classification task, written by a model: inputs without answers, for stage 3.

The full-precision model is fine-tuned on the training rows the other way round, label and leading fields in, last field
out, and sampled. The label only steers it (all labels come up equally often); what a row's answer is, the teacher says
later. For a task of two fields (premise and hypothesis) the first may come from other texts: new premises, with
hypotheses written for them.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import random
import re
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from bitdistill import artifact
from bitdistill.config import AugmentConfig, Task
from bitdistill.data import readers, tasks
from bitdistill.data.readers import Row
from bitdistill.errors import DataError, RecipeError
from bitdistill.eval.generate import sample
from bitdistill.models.load import load_source, source_fingerprint
from bitdistill.stages.common import Run, log, pad_token_id
from bitdistill.stages.sft import train_on_task
from bitdistill.train.compile import compile_blocks

LABEL_FIELD = "_label"
WRITTEN_ROWS = "rows.jsonl.zst"
"""File of the artifact."""
LENGTH_SHARE = 0.99
"""Rows may be written as long as this share of the training rows is."""
ROUNDS = (0.5, 0.8, 0.95)
"""Rows that are not finished when this share of the training rows would be go on in new batches."""
WORDS = (5, 40)
"""Sentences of other texts that are taken have so many words."""
_SENTENCE_END = re.compile(r"(?<=[.!?])[\"')\]]*\s+")


def writer_task(task: Task) -> Task:
    """The task turned round: label and all fields but the last in, the last field out.

    Raises:
        RecipeError: a generation task, which has no labels to write for.
    """
    if task.kind != "classification":
        raise RecipeError(
            f"augment: task {task.name} is a {task.kind} task; rows are written for classification tasks only"
        )
    fields = tasks.template_fields(task)
    before, _, _ = task.template.rpartition("{" + fields[-1] + "}")
    template = f"Label: {{{LABEL_FIELD}}}\n{before.rstrip()}"
    prefix = before[len(before.rstrip()) :]
    return Task(
        name=f"{task.name}-writer",
        kind="generation",
        template=template,
        target_field=fields[-1],
        # Words after a space tokenize as in running text
        answer_prefix=prefix or " ",
    )


def augment(run: Run) -> Path:
    """Write the rows of the recipe's `augment` section, without answers; writes `written/`.

    The artifact's training record is the writer's, with the time of sampling in it.

    Raises:
        RecipeError: `texts` for a task that has not two fields.
        DataError: no usable sentence in `texts`.
    """
    config, folder = run.recipe.augment, run.run_dir / "written"
    assert config is not None, "the pipeline leaves the stage out"
    section = run.section("augment")
    section.pop("texts")
    inputs = {
        "writer": _writer_inputs(run, _seed(run, config)),
        **section,
        "seed": _seed(run, config),
        "texts": [readers.source_fingerprint(source) for source in config.texts],
    }
    if run.finished("augment", folder, inputs):
        return folder
    writer = train_writer(run, _seed(run, config))
    training = artifact.read_manifest(writer)["training"]
    started = time.monotonic()
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in written_rows(run, config, writer)]
    elapsed = training["elapsed_s"] + time.monotonic() - started
    about = {"kind": "written rows", "rows": len(lines), **run.meta("augment", inputs)}
    with artifact.writing(folder, {**about, "training": {**training, "elapsed_s": elapsed}}) as partial:
        (partial / WRITTEN_ROWS).write_bytes(_packed(lines))
    run.redo.done("augment")
    log.info("augment: %d rows of %d are new and not empty", len(lines), config.rows)
    return folder


def _seed(run: Run, config: AugmentConfig) -> int:
    return run.recipe.seed if config.seed is None else config.seed


def _writer_inputs(run: Run, seed: int) -> dict[str, Any]:
    return {
        "model": source_fingerprint(run.recipe.model),
        **run.train_inputs(),
        "writer": writer_task(run.recipe.task).model_dump(mode="json", by_alias=True),
        "sft": run.section("sft"),
        "seed": seed,
    }


def train_writer(run: Run, seed: int) -> Path:
    """Fine-tune the full-precision model as a writer, with the teacher's settings; writes `writer/`."""
    config, folder = run.recipe.sft, run.run_dir / "writer"
    task = writer_task(run.recipe.task)
    inputs = _writer_inputs(run, seed)
    if run.finished("writer", folder, inputs):
        return folder
    model, tokenizer = load_source(run.recipe.model, dtype="float32", device=run.device)
    rows = [_turned(run.recipe.task, row) for row in run.train_rows()]
    examples = tasks.encode(task, rows, tokenizer, run.recipe.data.max_length)
    if run.compiling(config.loop):
        compile_blocks(model)
    seeded = dataclasses.replace(run, recipe=run.recipe.model_copy(update={"seed": seed}))
    result = train_on_task(
        seeded, "writer", model, tokenizer, optim=config.optim, loop=config.loop, epochs=config.epochs,
        examples=examples,
    )  # fmt: skip
    run.save_artifact(
        "writer", model.to(torch.bfloat16), tokenizer, folder, kind="teacher", plan=None,
        extra=run.meta("writer", inputs, result),
    )  # fmt: skip
    return folder


def written_rows(run: Run, config: AugmentConfig, writer: Path | None = None) -> Iterator[dict[str, str]]:
    """`config.rows` rows of the task's fields, without answers; empty and repeated ones are left out after that.

    Args:
        writer: from `train_writer`; None: it is made where it is missing.

    Raises:
        RecipeError: `texts` for a task that has not two fields.
        DataError: no usable sentence in `texts`.
    """
    task = run.recipe.task
    tasks.check_first_field(task, config.texts)
    seed = _seed(run, config)
    train = run.train_rows()
    folder = train_writer(run, seed) if writer is None else writer
    source = run.recipe.model.model_copy(update={"path": str(folder), "tokenizer": None, "revision": None})
    dtype = "bfloat16" if run.device.type == "cuda" else "float32"
    model, tokenizer = load_source(source, dtype=dtype, device=run.device)
    rows = list(itertools.islice(_openings(run.recipe.task, train, config, seed), config.rows))
    written = writer_task(task)
    known = tasks.encode(written, [_turned(task, r) for r in train], tokenizer, run.recipe.data.max_length)
    lengths = sorted(len(e.answer_ids) for e in known)
    *rounds, longest = (
        lengths[min(len(lengths) - 1, int(m * len(lengths)))] for m in (*ROUNDS, LENGTH_SHARE)
    )
    fields = tasks.template_fields(task)
    # Encoded as the writer's training rows were: the longest answer, set below, would leave prompts another room.
    examples = tasks.encode(written, rows, tokenizer, run.recipe.data.max_length, require_answers=False)
    written = written.model_copy(update={"max_new_tokens": longest})
    predictions = sample(
        model.eval(), tokenizer, written, examples, temperature=config.temperature, seed=seed,
        batch_rows=4096 if run.device.type == "cuda" else 64, device=run.device, pad_id=pad_token_id(tokenizer),
        rounds=sorted(set(rounds)),
    )  # fmt: skip
    seen = {tuple(str(row.fields[f]).strip() for f in fields) for row in train}
    for row, prediction in zip(rows, predictions, strict=True):
        made = {f: str(row.fields[f]) for f in fields[:-1]} | {fields[-1]: prediction.text}
        key = tuple(value.strip() for value in made.values())
        if prediction.text and key not in seen:
            seen.add(key)
            yield made


def write_rows(rows: Iterator[dict[str, str]], out: Path) -> int:
    """Write rows as .jsonl, or .jsonl.zst by the name; returns how many. The file appears when it is whole."""
    with artifact.storage_errors(out):
        out.parent.mkdir(parents=True, exist_ok=True)
        partial = out.with_name(out.name + ".partial")
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
        partial.write_bytes(_packed(lines) if out.name.endswith(".zst") else "".join(lines).encode("utf-8"))
        partial.rename(out)
    return len(lines)


def _packed(lines: Sequence[str]) -> bytes:
    import zstandard

    return zstandard.ZstdCompressor(level=10).compress("".join(lines).encode("utf-8"))


def _turned(task: Task, row: Row) -> Row:
    word = list(task.labels.values())[tasks.label_index(task, row)]
    return Row({**row.fields, LABEL_FIELD: word.strip()}, row.where)


def _openings(task: Task, train: list[Row], config: AugmentConfig, seed: int) -> Iterator[Row]:
    """Without end: what the writer continues, training rows and sentences mixed, labels in turn."""
    rng = random.Random(seed)
    fields = tasks.template_fields(task)
    words = [word.strip() for word in task.labels.values()]
    sentences: list[str] = []
    if config.texts:
        sentences = _sentences(config.texts, rng)
        log.info("augment: %d sentences of %s", len(sentences), ", ".join(config.texts))
    for number in itertools.count():
        given: dict[str, Any]
        if sentences and rng.random() < config.texts_share:
            given = {fields[0]: rng.choice(sentences)}
        else:
            row = rng.choice(train)
            given = {f: row.fields[f] for f in fields[:-1]}
        yield Row({**given, LABEL_FIELD: words[number % len(words)]}, f"written row {number + 1}")


def _sentences(texts: Sequence[str], rng: random.Random, limit: int = 200_000) -> list[str]:
    """At most `limit` sentences, a fair sample of all of usable length."""
    kept: list[str] = []
    seen = 0
    for source in texts:
        for document in readers.read_documents(source):
            for sentence in _SENTENCE_END.split(" ".join(document.split())):
                if not WORDS[0] <= sentence.count(" ") + 1 <= WORDS[1] or sentence[-1:] not in ".!?\"')":
                    continue
                seen += 1
                if len(kept) < limit:
                    kept.append(sentence)
                elif (place := rng.randrange(seen)) < limit:
                    kept[place] = sentence
    if not kept:
        raise DataError(
            f"augment: no sentence of {WORDS[0]} to {WORDS[1]} words in {', '.join(texts)}; give other texts"
        )
    return kept
