"""More rows of a task, written by a model: inputs without answers, for stage 3.

The full-precision model is fine-tuned on the training rows the other way round, answer and leading fields in, last
field out, and sampled. The answer only steers it (all labels come up equally often, or answers of training rows by
chance); what the new row's answer is, the teacher says later. For a task of two fields (premise and hypothesis) the
first may come from other texts: new premises, with hypotheses written for them. For a task of one field a share of the
rows may be sentences of other texts as they are. Or the writer learns to write rows whole (`whole_share`).
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import random
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bitdistill import artifact
from bitdistill.config import AugmentConfig, Task
from bitdistill.data import readers, tasks
from bitdistill.data.readers import Row
from bitdistill.errors import DataError
from bitdistill.eval.generate import sample
from bitdistill.models.load import load_source, source_fingerprint
from bitdistill.stages.common import Run, log, pad_token_id
from bitdistill.stages.sft import train_on_task
from bitdistill.train.compile import compile_blocks
from bitdistill.train.tracking import WorkProgress

LABEL_FIELD = "_label"
WHOLE_FIELD = "_row"
"""Of a row that is written whole: its fields with the template's text between them."""
WRITTEN_ROWS = "rows.jsonl.zst"
"""File of the artifact."""
LENGTH_SHARE = 0.99
"""Rows may be written as long as this share of the training rows is."""
ROUNDS = (0.5, 0.8, 0.95)
"""Rows that are not finished when this share of the training rows would be go on in new batches."""
WORDS = (5, 40)
"""Sentences of other texts that are taken have so many words."""
SENTENCES = 200_000
"""At most so many are kept to stand in for a first field."""
_SENTENCE_END = re.compile(r"(?<=[.!?])[\"')\]]*\s+")
_MARKUP = re.compile(r"(?:<[a-zA-Z/!][^<>]{0,80}>|\n\s*\n)")


@dataclass(frozen=True)
class Form:
    """A way to write a row: what the writer is given, and how fields are read out of what it writes."""

    task: Task
    """Generation task: the label and the given fields in, the others out."""
    given: tuple[str, ...]
    written: tuple[str, ...]
    between: tuple[str, ...] = ()
    """Text of the template between the written fields."""

    def turned(self, task: Task, row: Row) -> Row:
        """A row of `task` with its answer as one of the writer's."""
        turned = {**row.fields, LABEL_FIELD: _answer(task, row)}
        if self.between:
            parts = zip(self.written, (*self.between, ""), strict=True)
            turned[WHOLE_FIELD] = "".join(tasks.text_field(task, row, name) + end for name, end in parts)
        return Row(turned, row.where)

    def read(self, given: Row, text: str) -> dict[str, str] | None:
        """The fields of a written row; None where a field is empty or it is not clear where one ends."""
        values, rest = [], text
        for separator in self.between:
            value, found, rest = rest.partition(separator)
            if not found:
                return None
            values.append(value)
        if any(separator in rest for separator in self.between):
            return None
        made = {name: str(given.fields[name]) for name in self.given}
        made |= {f: v.strip() for f, v in zip(self.written, (*values, rest), strict=True)}
        return made if all(made[name] for name in self.written) else None


def _answer(task: Task, row: Row) -> str:
    if task.kind == "generation":
        return tasks.text_field(task, row, str(task.target_field)).strip()
    return list(task.labels.values())[tasks.label_index(task, row)].strip()


def _steers(task: Task, train: Sequence[Row], seed: int) -> Iterator[str]:
    """Without end: the answers that rows are written for."""
    if task.kind == "classification":
        yield from itertools.cycle(word.strip() for word in task.labels.values())
    rng = random.Random(f"answers {seed}")
    while True:
        yield _answer(task, rng.choice(train))


def forms(task: Task, whole: bool) -> tuple[Form, Form]:
    """How one writer is trained, and how it writes a row's last field alone.

    Args:
        whole: train it to write all fields; given the first ones, it goes on from there. A task of one field has one
            form.

    Raises:
        RecipeError: fields that come twice or stand side by side in the template, which could not be told apart in a
            row written whole.
    """
    fields = tasks.template_fields(task)
    before, _, _ = task.template.rpartition("{" + fields[-1] + "}")
    start = f"{'Label' if task.kind == 'classification' else 'Answer'}: {{{LABEL_FIELD}}}\n"
    if not whole or len(fields) == 1:
        last = _last_field(task, fields, start, before)
        return last, last
    between = tasks.between_fields(task)
    head, _, _ = before.partition("{" + fields[0] + "}")
    opening, space = start + head.rstrip(), head[len(head.rstrip()) :] or " "
    trained = Form(_turned_task(task, opening, WHOLE_FIELD, space), (), tuple(fields), between)
    return trained, _last_field(task, fields, opening + space, before[len(head) :])


def _last_field(task: Task, fields: Sequence[str], opening: str, before: str) -> Form:
    """The form for the last field; `before` is the template up to it, `opening` what precedes that."""
    prefix = before[len(before.rstrip()) :] or " "  # words after a space tokenize as in running text
    turned = _turned_task(task, opening + before.rstrip(), fields[-1], prefix)
    return Form(turned, tuple(fields[:-1]), (fields[-1],))


def _turned_task(task: Task, template: str, target_field: str, prefix: str) -> Task:
    return Task(
        name=f"{task.name}-writer",
        kind="generation",
        template=template,
        target_field=target_field,
        answer_prefix=prefix,
    )


def augment(run: Run) -> Path:
    """Write the rows of the recipe's `augment` section, without answers; writes `written/`.

    The artifact's training record is the writer's, with the time of sampling in it.

    Raises:
        RecipeError: `texts` for a task of more than two fields; and see `forms`.
        DataError: no usable sentence in `texts`, or no training row of `min_words`.
    """
    config, folder = run.recipe.augment, run.run_dir / "written"
    assert config is not None, "the pipeline leaves the stage out"
    section = run.section("augment")
    section.pop("texts")
    inputs = {
        "writer": _writer_inputs(run, config),
        **section,
        "seed": _seed(run, config),
        "texts": [readers.source_fingerprint(source) for source in config.texts],
    }
    if run.finished("augment", folder, inputs):
        return folder
    # Where all rows are sentences of other texts there is nothing to write.
    writer = train_writer(run, config) if _taken(run, config) < config.rows else None
    training = {"steps": 0, "tokens": 0, "elapsed_s": 0.0, "device_s": 0.0}
    if writer is not None:
        training = artifact.read_manifest(writer)["training"]
    started = time.monotonic()
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in written_rows(run, config, writer)]
    took = time.monotonic() - started
    times = {name: training[name] + took for name in ("elapsed_s", "device_s") if name in training}
    about = {"kind": "written rows", "rows": len(lines), **run.meta("augment", inputs)}
    with artifact.writing(folder, {**about, "training": {**training, **times}}) as partial:
        (partial / WRITTEN_ROWS).write_bytes(_packed(lines))
    run.redo.done("augment")
    log.info("augment: %d rows of %d are new and not empty", len(lines), config.rows)
    return folder


def _seed(run: Run, config: AugmentConfig) -> int:
    return run.recipe.seed if config.seed is None else config.seed


def _forms(run: Run, config: AugmentConfig) -> tuple[Form, Form]:
    return forms(run.recipe.task, whole=config.whole_share > 0)


def _taken(run: Run, config: AugmentConfig) -> int:
    """How many rows are sentences of other texts as they are."""
    one = len(tasks.template_fields(run.recipe.task)) == 1
    return round(config.rows * config.texts_share) if config.texts and one else 0


def _imitated(run: Run, config: AugmentConfig) -> list[Row]:
    """The training rows that the writer learns from.

    Raises:
        DataError: none has `min_words`.
    """
    rows = [row for row in run.train_rows() if _words(run.recipe.task, row) >= config.min_words]
    if not rows:
        raise DataError(
            f"augment.min_words: {run.recipe.data.train}: no training row has {config.min_words} words; lower it"
        )
    return rows


def _words(task: Task, row: Row) -> int:
    return sum(len(tasks.text_field(task, row, name).split()) for name in tasks.template_fields(task))


def _length(run: Run, form: Form) -> int:
    """Tokens of a row's prompt and answer for the writer. An answer may take half of them, which a row that is written
    whole needs for itself."""
    whole = form.between or (run.recipe.task.kind == "generation" and not form.given)
    return run.recipe.data.max_length * (2 if whole else 1)


def _writer_inputs(run: Run, config: AugmentConfig) -> dict[str, Any]:
    return {
        "model": source_fingerprint(run.recipe.model),
        **run.train_inputs(),
        "writer": _forms(run, config)[0].task.model_dump(mode="json", by_alias=True),
        "sft": run.section("sft"),
        "seed": _seed(run, config),
        **({"min_words": config.min_words} if config.min_words else {}),
    }


def train_writer(run: Run, wanted: AugmentConfig) -> Path:
    """Fine-tune the full-precision model as a writer, with the teacher's settings; writes `writer/`.

    Raises:
        RecipeError: see `forms`.
        DataError: no training row of `min_words`.
    """
    config, folder = run.recipe.sft, run.run_dir / "writer"
    form, _ = _forms(run, wanted)
    inputs = _writer_inputs(run, wanted)
    if run.finished("writer", folder, inputs):
        return folder
    model, tokenizer = load_source(run.recipe.model, dtype="float32", device=run.device)
    rows = [form.turned(run.recipe.task, row) for row in _imitated(run, wanted)]
    examples = tasks.encode(form.task, rows, tokenizer, _length(run, form))
    if run.compiling(config.loop):
        compile_blocks(model)
    seeded = dataclasses.replace(run, recipe=run.recipe.model_copy(update={"seed": _seed(run, wanted)}))
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
        RecipeError: `texts` for a task of more than two fields.
        DataError: no usable sentence in `texts`, or no training row of `min_words`.
    """
    task = run.recipe.task
    tasks.check_first_field(task, config.texts)
    trained, last = _forms(run, config)
    seed = _seed(run, config)
    seen = {_key(task, row.fields) for row in run.train_rows()}
    if taken := _taken(run, config):
        (name,) = tasks.template_fields(task)
        shortest = min(max(WORDS[0], config.min_words), WORDS[1])
        for sentence in _sentences(config.texts, random.Random(seed), taken, shortest):
            if (key := _key(task, {name: sentence})) not in seen:
                seen.add(key)
                yield {name: sentence}
        if taken == config.rows:
            return
    train = _imitated(run, config)
    folder = train_writer(run, config) if writer is None else writer
    source = run.recipe.model.model_copy(update={"path": str(folder), "tokenizer": None, "revision": None})
    dtype = "bfloat16" if run.device.type == "cuda" else "float32"
    model, tokenizer = load_source(source, dtype=dtype, device=run.device)
    model.eval()
    whole = round(config.rows * config.whole_share) if trained.between else 0
    steers = itertools.islice(_steers(task, train, seed + 1), whole)
    labels = [Row({LABEL_FIELD: steer}, f"written row {n + 1}") for n, steer in enumerate(steers)]
    given = list(itertools.islice(_openings(task, train, config, seed), config.rows - whole - taken))
    for form, rows in ((trained, labels), (last, given)):
        written = _sampled(run, config, model, tokenizer, form, _length(run, trained), train, rows)
        for row, text in zip(rows, written, strict=True):
            made = None if text is None else form.read(row, text)
            if made is None or _words(task, Row(made, row.where)) < config.min_words:
                continue
            if _key(task, made) not in seen:
                seen.add(_key(task, made))
                yield {name: made[name] for name in tasks.template_fields(task)}


def _key(task: Task, fields: Mapping[str, Any]) -> tuple[str, ...]:
    """What makes two rows the same."""
    return tuple(str(fields[name]).strip() for name in tasks.template_fields(task))


def _sampled(
    run: Run,
    config: AugmentConfig,
    model: Any,
    tokenizer: Any,
    form: Form,
    length: int,
    train: list[Row],
    rows: list[Row],
) -> list[str | None]:
    """What the writer writes for each row; None where a row to be written whole did not come to its end."""
    if not rows:
        return []
    turned = [form.turned(run.recipe.task, row) for row in train]
    known = tasks.encode(form.task, turned, tokenizer, length)
    lengths = sorted(len(e.answer_ids) for e in known)
    *rounds, longest = (
        lengths[min(len(lengths) - 1, int(m * len(lengths)))] for m in (*ROUNDS, LENGTH_SHARE)
    )
    # Encoded as the writer's training rows were: the longest answer, set below, would leave prompts another room.
    examples = tasks.encode(form.task, rows, tokenizer, length, require_answers=False)
    with WorkProgress("augment", quiet=run.quiet) as progress:
        predictions = sample(
            model, tokenizer, form.task.model_copy(update={"max_new_tokens": longest}), examples,
            temperature=config.temperature, seed=_seed(run, config),
            batch_rows=4096 if run.device.type == "cuda" else 64, device=run.device,
            pad_id=pad_token_id(tokenizer), rounds=sorted(set(rounds)), progress=progress,
        )  # fmt: skip
    return [None if form.between and not p.ended else p.text for p in predictions]


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


def _openings(task: Task, train: list[Row], config: AugmentConfig, seed: int) -> Iterator[Row]:
    """Without end: what the writer continues, training rows and sentences mixed."""
    rng = random.Random(seed)
    fields = tasks.template_fields(task)
    sentences: list[str] = []
    if config.texts and len(fields) > 1:
        sentences = _sentences(config.texts, rng, SENTENCES)
    for number, steer in enumerate(_steers(task, train, seed)):
        given: dict[str, Any]
        if sentences and rng.random() < config.texts_share:
            given = {fields[0]: rng.choice(sentences)}
        else:
            row = rng.choice(train)
            given = {f: row.fields[f] for f in fields[:-1]}
        yield Row({**given, LABEL_FIELD: steer}, f"written row {number + 1}")


def _sentences(texts: Sequence[str], rng: random.Random, limit: int, shortest: int = WORDS[0]) -> list[str]:
    """At most `limit` sentences, a fair sample of all of usable length, in no order. Markup ends a sentence.

    Raises:
        DataError: there is none.
    """
    kept: list[str] = []
    seen = 0
    for source in texts:
        for document in readers.read_documents(source):
            paragraphs = (" ".join(part.split()) for part in _MARKUP.split(document))
            for sentence in itertools.chain.from_iterable(map(_SENTENCE_END.split, paragraphs)):
                if not shortest <= sentence.count(" ") + 1 <= WORDS[1] or sentence[-1:] not in ".!?\"')":
                    continue
                seen += 1
                if len(kept) < limit:
                    kept.append(sentence)
                elif (place := rng.randrange(seen)) < limit:
                    kept[place] = sentence
    if not kept:
        raise DataError(
            f"augment: no sentence of {shortest} to {WORDS[1]} words in {', '.join(texts)}; give other texts"
        )
    log.info("augment: %d sentences of %s", len(kept), ", ".join(texts))
    return kept
