"""The text of a new recipe, commented, and checked to load before anyone gets it."""

from __future__ import annotations

import json
import re
import shlex
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from bitdistill.data import readers, tasks
from bitdistill.errors import DataError
from bitdistill.planning.guess import Field, Guess, fields_of, guess
from bitdistill.recipe import builtin_task, builtin_tasks, parse_yaml

LOOKED_AT_ROWS = 20_000
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
        RecipeError: an unknown built-in task.
    """
    rows = list(islice(readers.iter_rows(request.train), LOOKED_AT_ROWS))
    if not rows:
        raise DataError(f"{request.train}: no rows; give a file with at least one row")
    if request.task is not None:
        task = builtin_task(request.task)
        tasks.check_rows(task, rows)
        section, notes, prompt = f"task: {request.task}\n", [], tasks.template_fields(task)
        answer = task.label_field if task.kind == "classification" else task.target_field or ""
        new_tokens = task.max_new_tokens if task.kind == "generation" else 0
    else:
        fields = fields_of(rows)
        found = guess(
            fields,
            request.train,
            text=request.text_fields,
            label=request.label_field,
            target=request.target_field,
        )
        section, notes = _task_section(found, output), list(found.notes)
        prompt, answer = list(found.text_fields), found.answer_field
        new_tokens = NEW_TOKENS if found.kind == "generation" else 0
        if twin := _builtin_twin(rows):
            notes.append(f"these rows also fit the built-in task {twin}: `task: {twin}`")
    length = _max_length(fields_of(rows), prompt, answer, new_tokens)
    text = _recipe_text(request, output, section, length, len(rows), generation=new_tokens > 0)
    parse_yaml(text, "the new recipe")
    return text, notes


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


def _max_length(fields: dict[str, Field], prompt: list[str], answer: str, new_tokens: int) -> int:
    """95th percentile of the characters at 3 a token, rounded up to a power of two from 64 to 2048.

    Args:
        new_tokens: what no prompt may take, however short the answers are (generation).
    """
    of = {name: fields[name].p95_characters / 3 for name in (*prompt, answer) if name in fields}
    tokens = sum(of[name] for name in prompt if name in of) + max(of.get(answer, 0.0), new_tokens) + 16
    length = 64
    while length < min(tokens, 2048):
        length *= 2
    return length


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
