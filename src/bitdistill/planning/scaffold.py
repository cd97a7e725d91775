"""The text of a new recipe, commented, and checked to load before anyone gets it."""

from __future__ import annotations

import json
import re
import shlex
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from bitdistill.config import ModelSource, Task
from bitdistill.data import readers, tasks
from bitdistill.data.tokenizer import answer_encoder, plain_ids, special_prefix
from bitdistill.errors import DataError
from bitdistill.models.families import layout_of
from bitdistill.planning import sources
from bitdistill.planning.guess import Guess, fields_of, guess
from bitdistill.recipe import builtin_task, builtin_tasks, parse_recipe, parse_yaml

LOOKED_AT_ROWS = 20_000
MEASURED_ROWS = 1_000
"""Of those, evenly spaced, for the guess of `max_length`."""
MAX_LENGTH = 2048
"""The longest `max_length` that is guessed."""
NEW_TOKENS = 64
"""`max_new_tokens` of a guessed generation task."""


@dataclass(frozen=True)
class Request:
    """What the user gave to `bitdistill init`."""

    model: str
    train: str
    test: str | None
    validation: str | None
    task: str | None
    text_fields: tuple[str, ...]
    label_field: str | None
    target_field: str | None
    command: str


def write_recipe(request: Request, output: Path) -> tuple[str, list[str]]:
    """The recipe's text and what was guessed.

    Raises:
        DataError: unreadable or empty rows, or nothing to guess a task from.
        ModelError: config or tokenizer of a local model are unreadable or of an unsupported kind.
        RecipeError: an unknown built-in task.
    """
    rows = list(islice(readers.iter_rows(request.train), LOOKED_AT_ROWS))
    if not rows:
        raise DataError(f"{request.train}: no rows; give a file with at least one row")
    if request.task is not None:
        task = builtin_task(request.task)
        tasks.check_rows(task, rows)
        section, notes = f"task: {request.task}\n", []
    else:
        text, label, target = request.text_fields, request.label_field, request.target_field
        named = {name for name in (*text, label, target) if name is not None}
        fields = fields_of(rows, request.train, named)
        found = guess(fields, request.train, text=text, label=label, target=target)
        section, notes = _task_section(found, output), list(found.notes)
        tree, _ = parse_yaml(section, "the new task")
        task = parse_recipe(
            {"name": "new", "model": {"path": request.model}, "data": {"train": request.train}, **tree},
            "the new recipe",
        ).task
        if twin := _builtin_twin(rows):
            notes.append(f"these rows also fit the built-in task {twin}: `task: {twin}`")
    needed = _tokens(task, rows, ModelSource(path=request.model))
    length = _max_length(needed, _positions(request.model))
    if needed > length:
        notes.append(f"max_length is {length}: 1 row in 20 has about {needed:.0f} tokens or more and is cut")
    written = _recipe_text(request, output, section, length, len(rows), generation=task.kind == "generation")
    parse_yaml(written, "the new recipe")
    return written, notes


def _task_section(found: Guess, output: Path) -> str:
    template = "\n".join(f"{{{name}}}" for name in found.text_fields)
    if len(found.text_fields) > 1:
        template = "\n".join(
            f"{name.replace('_', ' ').capitalize()}: {{{name}}}" for name in found.text_fields
        )
    lines = ["task:", f"  name: {_name(output.stem)}", f"  kind: {found.kind}"]
    if found.kind == "classification":
        lines += [
            "  # What the model reads; {field} is the row's field. It ends where the label word follows.",
            f"  template: {_quoted(template + chr(10) + 'Label:')}",
            f"  label_field: {_quoted(found.answer_field)}",
            "  # Label value: label word. Words begin with a space, differ, and are best one token each.",
            "  labels:",
            *(f"    {_quoted(value)}: {_quoted(word)}" for value, word in found.labels.items()),
            *_end_mark(list(found.labels.values())),
            "  metrics: [accuracy, f1]",
        ]
    else:
        lines += [
            "  # What the model reads; {field} is the row's field. The answer follows after a space.",
            f"  template: {_quoted(template + chr(10) + 'Answer:')}",
            f"  target_field: {_quoted(found.answer_field)}",
            "  metrics: [rougeL, rouge1, rouge2, bleu]",
            f"  max_new_tokens: {NEW_TOKENS}",
        ]
    return "\n".join(lines) + "\n"


def _end_mark(words: list[str]) -> list[str]:
    """`append_eos` where a word begins another: scores could not tell " lost" from the start of " lost card"."""
    begins = any(word != other and other.startswith(word) for word in words for other in words)
    return (
        ["  append_eos: true        # a word begins another: the end of text tells them apart"]
        if begins
        else []
    )


def _recipe_text(
    request: Request, output: Path, task: str, length: int, rows: int, *, generation: bool
) -> str:
    here, name = output.resolve().parent, _comment(shlex.quote(output.name))
    data = [f"  train: {_quoted(_relative(request.train, here))}"]
    if request.validation:
        data.append(f"  validation: {_quoted(_relative(request.validation, here))}")
    if request.test:
        data.append(f"  test: {_quoted(_relative(request.test, here))}")
    if not request.validation and not request.test:
        share = 0.1 if rows >= 10 else 0.5  # at least one row, where there are two
        data.append(
            f"  validation_fraction: {share}        # held out by seed, since no test rows were given"
        )
    distill = "{lambda: 1.0, gamma: auto}" if generation else "{gamma: auto}"
    model = _relative(request.model, here) if Path(request.model).expanduser().exists() else request.model
    return f"""\
# Written by: {_comment(request.command)}
# Check it:  bitdistill plan {name}
# Run it:    bitdistill run {name}
# Paths are relative to this file. Every key: docs/recipes.md. Override one: --set distill.gamma=auto

name: {_name(output.stem)}

model:
  path: {_quoted(model)}

{task}
data:
{chr(10).join(data)}
  max_length: {length}        # tokens of prompt and answer; longer prompts are cut

# The full-precision teacher. Try a few learning rates (1e-5 to 1e-4): a weak teacher makes a weak student.
sft:
  epochs: 2
  optim: {{learning_rate: 5.0e-5}}
  loop: {{batch_rows: 32, micro_batch_tokens: 16_384}}

# Stage 2: the ternary model learns to write again, on any text. It is cached and reused by later tasks.
# null leaves it out (quick, but costs accuracy). With a corpus, for example:
#   pretrain:
#     corpus: corpus/                # text, jsonl, parquet; a folder; token shards; or hub:owner/name
#     budget_tokens: 50_000_000      # more is better
#     optim: {{learning_rate: 0.015, matrix_rate: share, schedule: linear}}   # 1.5 % of each matrix's mean |W| a step
pretrain: null

# Stage 3: the student learns the task from the teacher.
distill:
  epochs: 2
  optim: {{learning_rate: 2.0e-4}}
  loop: {{batch_rows: 32, micro_batch_tokens: 16_384}}
  # lambda weighs the logits, gamma the attention relations (auto: balanced by gradient norms).
  {distill[1:-1].replace(", ", chr(10) + "  ")}
  # The teacher's words for the prompt too: closer to the teacher, but every token goes through the output head.
  # prompt_weight: 3.0
  # The mean of three teachers, each fine-tuned as the first is; worth trying with many rows without answers.
  # teachers: 3

# The baseline row of the table: ternary at once, then fine-tuned. null leaves it out.
bitnet_sft:
  epochs: 2
  optim: {{learning_rate: 2.0e-4}}
  loop: {{batch_rows: 32, micro_batch_tokens: 16_384}}
"""


def _max_length(tokens: float, positions: int | None) -> int:
    """`tokens` rounded up to a power of two from 64 to MAX_LENGTH, and at most the model's positions."""
    length = 64
    while length < min(tokens, MAX_LENGTH):
        length *= 2
    return length if positions is None else min(length, positions)


def _tokens(task: Task, rows: list[readers.Row], model: ModelSource) -> float:
    """95th percentile of a row's tokens: counted where the model's tokenizer is here, else 3 characters each.

    Counting matters: a tokenizer may take three tokens for a character of a language it was not made for.
    """
    fields, render = tasks.template_fields(task), tasks.renderer(task)
    rows = rows[:: -(-len(rows) // MEASURED_ROWS)]
    prompts = [render({name: tasks.text_field(task, row, name) for name in fields}) for row in rows]
    if task.kind == "classification":
        answers = list(task.labels.values())
    else:
        answers = [task.answer_prefix + tasks.text_field(task, row, task.target_field or "") for row in rows]
    # Books as rows: what is beyond the longest guess anyway only takes time.
    prompts, answers = ([text[: 16 * MAX_LENGTH] for text in texts] for texts in (prompts, answers))
    tokenizer = sources.find_tokenizer(model)
    if tokenizer is None:
        prompt, answer = [len(text) / 3 for text in prompts], [len(text) / 3 for text in answers]
    else:
        start = len(special_prefix(tokenizer))
        prompt = [float(start + len(ids)) for ids in plain_ids(tokenizer, prompts)]
        answer = [float(len(ids)) for ids in answer_encoder(tokenizer)(answers)]
    if task.kind == "classification":
        room = max(answer)
    else:  # what no prompt may take, however short the answers are
        room = max(_p95(answer), task.max_new_tokens)
    return _p95(prompt) + room + 1  # the end of text


def _p95(values: list[float]) -> float:
    return sorted(values)[int(0.95 * (len(values) - 1))]


def _positions(model: str) -> int | None:
    """How many the model has; None for a hub model that is not on this machine."""
    if not Path(model).expanduser().exists() and sources.cached_config(model, None) is None:
        return None
    return layout_of(*sources.find_config(ModelSource(path=model))).max_positions


def _builtin_twin(rows: list[readers.Row]) -> str | None:
    """A built-in task whose fields and label values all these rows have."""
    for name, task in builtin_tasks().items():
        try:
            tasks.check_rows(task, rows)
        except DataError:
            continue
        return name
    return None


def _name(stem: str) -> str:
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", stem).strip("-._")
    return name or "run"


def _relative(path: str, folder: Path) -> str:
    """A path below the recipe's folder relative to it, any other absolute; hub names as they are."""
    if path.startswith("hub:"):
        return path
    absolute = Path(path).expanduser().absolute()
    try:
        text = absolute.resolve().relative_to(folder).as_posix()
    except ValueError:
        return str(absolute)
    return (
        text
        if "/" in text or text.endswith((".jsonl", ".zst", ".gz", ".csv", ".tsv", ".parquet"))
        else f"./{text}"
    )


def _quoted(text: str) -> str:
    """A YAML 1.2 double-quoted scalar; what JSON leaves but YAML refuses is escaped too."""
    quoted = json.dumps(text, ensure_ascii=False)
    return re.sub("[\x7f-\x9f\u2028\u2029\ufeff\ufffe\uffff]", lambda m: f"\\u{ord(m.group()):04x}", quoted)


def _comment(text: str) -> str:
    return "".join(c if c.isprintable() else " " for c in text)
