"""Rows to token ids: a declarative task's template, label words and answers. No torch import.

Prompt and answer are tokenized apart and their ids joined, so a prompt has the same ids with and without
its answer, and label words always are the same ids. Where a prompt is cut does not depend on the row's answer
either: its length would give away that of the answer.
"""

from __future__ import annotations

import logging
import string
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from bitdistill.config import Task
from bitdistill.data.readers import Row, check_strings
from bitdistill.data.tokenizer import answer_encoder, eos_id, plain_ids, special_prefix
from bitdistill.errors import DataError, ModelError, RecipeError

log = logging.getLogger("bitdistill")


@dataclass(frozen=True, slots=True)
class Example:
    """One encoded row. Model input is `prompt_ids + answer_ids`; only the answer is learnt."""

    prompt_ids: tuple[int, ...]
    answer_ids: tuple[int, ...]
    label: int | None
    """Classification: index into the task's labels; None for generation and for rows without a label."""
    references: tuple[str, ...]
    """Generation: every reference answer, the trained one first. Classification: the label word, stripped."""
    prompt: str
    """The prompt as text, after shortening."""
    where: str

    def answer_within(self, context: int | None) -> tuple[int, ...]:
        """Tokens of the answer that fit a model's context (None: no limit) after the prompt."""
        room = len(self.answer_ids) if context is None else max(0, context - len(self.prompt_ids))
        return self.answer_ids[:room]


@dataclass(slots=True)
class _Draft:
    """A row on its way to an Example."""

    texts: dict[str, str]
    answer: str
    label: int | None
    references: tuple[str, ...]
    where: str
    ended: bool = True
    """Whether the answer is whole, so that an end-of-text token may follow it."""


def encode(
    task: Task,
    rows: Sequence[Row],
    tokenizer: Any,
    max_length: int,
    *,
    require_answers: bool = True,
    ended: Sequence[bool] | None = None,
    vocab_size: int | None = None,
) -> list[Example]:
    """Fill the template for each row and tokenize.

    A prompt that leaves less of `max_length` than `answer_room` loses text at the end of the row's longest
    field, never in the template. An answer longer than half of `max_length`, or than what its prompt leaves, is
    cut there and then has no end-of-text token. Counts of both are logged as warnings.

    Args:
        task: template, label words, target field.
        rows: as from `readers.read_rows`.
        tokenizer: a Hugging Face tokenizer with a fast backend.
        max_length: tokens of prompt and answer together.
        require_answers: False for prediction: rows may lack label and target.
        ended: for each row, False where its answer was cut already (`Prediction.ended`), so that no end-of-text
            token is to follow; None: all are whole.
        vocab_size: rows of the model's embedding; ids beyond it are refused.

    Raises:
        DataError: missing or non-text field, unknown label, or a template longer than max_length;
            the message names file and line.
        ModelError: the tokenizer cannot do it (no end-of-text token, no fast backend).
    """
    fields, render = template_fields(task), renderer(task)
    drafts = [_draft(task, fields, row, require_answers) for row in rows]
    for draft, whole in zip(drafts, ended or (), strict=ended is not None):
        draft.ended = whole
    prefix = special_prefix(tokenizer)
    prompts = [render(d.texts) for d in drafts]
    ids = [prefix + tuple(i) for i in plain_ids(tokenizer, prompts)]
    room = max_length - answer_room(task, tokenizer, max_length)
    prompts_cut = _shorten(tokenizer, render, drafts, prefix, room, prompts, ids)
    rooms = [min(max_length // 2, max_length - len(i)) for i in ids]
    answers, answers_cut = _answer_ids(tokenizer, drafts, _end(task, tokenizer), rooms)
    if prompts_cut:
        log.warning(
            "%s: %d of %d prompts cut to max_length %d", task.name, prompts_cut, len(rows), max_length
        )
    if answers_cut:
        log.warning(
            "%s: %d of %d answers cut to what max_length %d leaves them",
            task.name,
            answers_cut,
            len(rows),
            max_length,
        )
    examples = [
        Example(i, a, d.label, d.references, p, d.where)
        for i, a, d, p in zip(ids, answers, drafts, prompts, strict=True)
    ]
    if vocab_size is not None:
        _check_ids(examples, vocab_size)
    return examples


def with_answers(
    task: Task,
    examples: Sequence[Example],
    answers: Sequence[str],
    tokenizer: Any,
    max_length: int,
    *,
    ended: Sequence[bool] | None = None,
) -> list[Example]:
    """Examples that were encoded without answers, with them: what `encode` gives for rows that hold both.

    Args:
        examples: from `encode(require_answers=False)` with the same `max_length`; where a prompt is cut does not depend
            on its answer.
        answers: a label as `task.labels` spells it, or the target text.
        ended: as for `encode`.
    """
    labels = list(task.labels)
    drafts = []
    for example, answer, whole in zip(examples, answers, ended or [True] * len(answers), strict=True):
        label = labels.index(answer) if task.kind == "classification" else None
        text = answer if label is None else task.labels[answer]
        learnt = task.answer_prefix + text if label is None else text
        references = (text if label is None else text.strip(),)
        drafts.append(_Draft({}, learnt, label, references, example.where, whole))
    rooms = [min(max_length // 2, max_length - len(e.prompt_ids)) for e in examples]
    ids, cut = _answer_ids(tokenizer, drafts, _end(task, tokenizer), rooms)
    if cut:
        log.warning(
            "%s: %d of %d answers cut to what max_length %d leaves them", task.name, cut, len(ids), max_length
        )
    return [
        Example(e.prompt_ids, i, d.label, d.references, e.prompt, e.where)
        for e, i, d in zip(examples, ids, drafts, strict=True)
    ]


def answer_room(task: Task, tokenizer: Any, max_length: int) -> int:
    """Tokens of `max_length` that no prompt may take, the same for all rows: at most half of it.

    Classification: the longest label word. Generation: as many as may be generated.
    """
    wanted = task.max_new_tokens
    if task.kind == "classification":
        wanted = max(map(len, _label_ids(task, tokenizer)))
    return min(wanted, max_length // 2)


def check_rows(task: Task, rows: Sequence[Row], *, require_answers: bool = True) -> None:
    """Check fields and labels of rows without a tokenizer (`bitdistill plan`).

    Raises:
        DataError: as `encode`, for what does not depend on the tokenizer.
    """
    fields = template_fields(task)
    for row in rows:
        _draft(task, fields, row, require_answers)


def label_token_ids(task: Task, tokenizer: Any) -> list[tuple[int, ...]]:
    """Token ids of each label word, in the order of `task.labels`.

    Raises:
        DataError: a label word without tokens, or one whose ids equal or begin another's: their
            likelihoods could not be told apart.
    """
    ids = _label_ids(task, tokenizer)
    end = _end(task, tokenizer)
    seen: dict[tuple[int, ...], str] = {}
    for word, word_ids in zip(task.labels.values(), ids, strict=True):
        if word_ids == end:
            raise DataError(f"task {task.name}: label word {word!r} has no tokens; choose another word")
        if word_ids in seen:
            raise DataError(
                f"task {task.name}: label words {seen[word_ids]!r} and {word!r} have the same token ids "
                f"{list(word_ids)}; choose another word for one"
            )
        seen[word_ids] = word
    for word_ids, word in seen.items():
        for length in range(1, len(word_ids)):
            if word_ids[:length] in seen:
                raise DataError(
                    f"task {task.name}: the token ids of label word {seen[word_ids[:length]]!r} begin those of "
                    f"{word!r}; choose another word for one, or set append_eos: true"
                )
    return ids


def _label_ids(task: Task, tokenizer: Any) -> list[tuple[int, ...]]:
    end = _end(task, tokenizer)
    return [tuple(i) + end for i in answer_encoder(tokenizer)(list(task.labels.values()))]


def _end(task: Task, tokenizer: Any) -> tuple[int, ...]:
    """What ends an answer that is not cut: the end-of-text token or nothing."""
    append_eos = task.append_eos if task.append_eos is not None else task.kind == "generation"
    return (eos_id(tokenizer),) if append_eos else ()


def check_tokenizer(tokenizer: Any, vocab_size: int) -> None:
    """Check that a model with `vocab_size` embedding rows can take what the tokenizer gives.

    Added special tokens beyond the embedding are let through when text does not need them (Gemma 3's image
    token lies just outside the text models' vocabulary); `encode(vocab_size=...)` guards the rows.

    Raises:
        ModelError: an ordinary token, or the bos, eos or pad token, is out of range.
    """
    added = set(tokenizer.get_added_vocab())
    worst = max(((i, t) for t, i in tokenizer.get_vocab().items() if t not in added), default=(0, ""))
    used = {name: getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    out = {f"{name}_token": i for name, i in used.items() if i is not None and i >= vocab_size}
    if worst[0] >= vocab_size:
        out[f"token {worst[1]!r}"] = worst[0]
    if out:
        what, index = next(iter(out.items()))
        raise ModelError(
            f"tokenizer: {what} has id {index}, the model has {vocab_size} embedding rows; "
            "use the tokenizer that belongs to the model (model.tokenizer)"
        )


def renderer(task: Task) -> Callable[[dict[str, str]], str]:
    """The template as a function: texts by field -> prompt.

    Raises:
        RecipeError: a placeholder with an index, attribute, conversion or format.
    """
    parts = template_parts(task)

    def render(texts: dict[str, str]) -> str:
        return "".join(literal + (texts[name] if name is not None else "") for literal, name in parts)

    return render


def as_rows(
    task: Task, inputs: Sequence[str | Mapping[str, Any] | Row], places: Sequence[str] | None = None
) -> list[Row]:
    """Inputs as rows of the task.

    Args:
        task: what the inputs are for.
        inputs: texts (for tasks with one field), mappings from field to value, or rows.
        places: where each comes from, for errors; default: input 1, input 2 and so on. Rows know.

    Raises:
        DataError: not a list of inputs, a bare text for a task whose template has several fields, or half a
            character, as an argument or line in another encoding gives it.
    """
    if isinstance(inputs, str | Mapping):  # whose items would be taken for inputs: letters, names of fields
        raise DataError(f"inputs: a {type(inputs).__name__} is one input; give a list of inputs, also of one")
    places = [f"input {n}" for n in range(1, len(inputs) + 1)] if places is None else places
    return [_as_row(task, value, place) for value, place in zip(inputs, places, strict=True)]


def _as_row(task: Task, value: str | Mapping[str, Any] | Row, where: str) -> Row:
    if isinstance(value, Row):
        return value
    fields = template_fields(task)
    if isinstance(value, str) and len(fields) != 1:
        named = " ".join(f"--field {name}=…" for name in fields)
        raise DataError(
            f"{where}: task {task.name} needs {len(fields)} fields, not one text; use {named} or --file, or give a "
            "mapping"
        )
    row = Row({fields[0]: value} if isinstance(value, str) else dict(value), where)
    check_strings(row.fields, where)
    return row


def template_fields(task: Task) -> list[str]:
    """The template's fields in the order of their first use."""
    return list(dict.fromkeys(name for _, name in template_parts(task) if name is not None))


def check_first_field(task: Task, texts: Sequence[str]) -> None:
    """Whether `augment.texts` can stand in for the task's only field or the first of two.

    Raises:
        RecipeError: `texts` for a task of more fields.
    """
    fields = template_fields(task)
    if texts and len(fields) > 2:
        raise RecipeError(
            f"augment.texts: stands in for the only field or the first of two, task {task.name} has {len(fields)}; "
            "leave it out"
        )


def between_fields(task: Task) -> tuple[str, ...]:
    """The template's text between one field and the next, for rows that `augment` writes whole.

    Raises:
        RecipeError: fields that come twice or stand side by side, so that such a row could not be taken apart.
    """
    literals = [(text, name) for text, name in template_parts(task) if name is not None]
    between = tuple(text for text, _ in literals[1:])
    if len(literals) != len(template_fields(task)) or not all(between):
        raise RecipeError(
            f"augment.whole_share: task {task.name}: fields come twice or side by side in the template "
            f"{task.template!r}, so rows written whole could not be taken apart; set it to 0"
        )
    return between


def template_parts(task: Task) -> list[tuple[str, str | None]]:
    """(literal text, field after it or None) pairs."""
    try:
        parsed = list(string.Formatter().parse(task.template))
    except ValueError as error:
        raise RecipeError(
            f"task {task.name}: template: {error}; write {{field}}, and {{{{ for a brace"
        ) from None
    parts: list[tuple[str, str | None]] = []
    for literal, name, spec, conversion in parsed:
        plain = name is None or (name and not spec and not conversion and not set(name) & set(".[]"))
        if not plain:
            raise RecipeError(
                f"task {task.name}: template: placeholder {name!r} is not a plain field; write {{field}}"
            )
        parts.append((literal, name))
    if all(name is None for _, name in parts):
        raise RecipeError(
            f"task {task.name}: template: no placeholder; name at least one {{field}} of the rows"
        )
    return parts


def _draft(task: Task, fields: Sequence[str], row: Row, require_answers: bool) -> _Draft:
    texts = {name: text_field(task, row, name) for name in fields}
    if task.kind == "classification":
        if not require_answers and row.fields.get(task.label_field) is None:
            return _Draft(texts, "", None, (), row.where)
        label = label_index(task, row)
        word = list(task.labels.values())[label]
        return _Draft(texts, word, label, (word.strip(),), row.where)
    target_field = task.target_field or ""
    if not require_answers and row.fields.get(target_field) is None:
        return _Draft(texts, "", None, (), row.where)
    target = text_field(task, row, target_field)
    if not target.strip():
        raise DataError(f"{row.where}: field `{target_field}` is empty; drop the row or give the answer")
    references = (target, *_more_references(task, row))
    return _Draft(texts, task.answer_prefix + target, None, tuple(dict.fromkeys(references)), row.where)


def _more_references(task: Task, row: Row) -> list[str]:
    if task.reference_field is None or row.fields.get(task.reference_field) is None:
        return []
    value = row.fields[task.reference_field]
    values = [value] if isinstance(value, str) else value
    if not isinstance(values, list) or not all(isinstance(v, str) for v in values):
        raise DataError(
            f"{row.where}: field `{task.reference_field}` is no text or list of texts; mend the row"
        )
    return values


def text_field(task: Task, row: Row, name: str) -> str:
    """A field as text; numbers and booleans are written out."""
    if name not in row.fields:
        have = ", ".join(f"`{f}`" for f in row.fields) or "none"
        raise DataError(f"{row.where}: no field `{name}`, which task {task.name} needs; fields here: {have}")
    value = row.fields[name]
    if isinstance(value, str):
        return value
    if isinstance(value, bool | int | float):
        return str(value)
    raise DataError(
        f"{row.where}: field `{name}` is {_kind(value)}, task {task.name} needs text; mend or drop the row"
    )


def _kind(value: object) -> str:
    return "null" if value is None else f"a {type(value).__name__}"


def label_index(task: Task, row: Row) -> int:
    """Index of the row's label among the task's.

    Raises:
        DataError: no label there, or one that the task does not have.
    """
    if task.label_field not in row.fields:
        have = ", ".join(f"`{f}`" for f in row.fields) or "none"
        raise DataError(
            f"{row.where}: no label field `{task.label_field}` (task {task.name}); fields here: {have}"
        )
    value = row.fields[task.label_field]
    keys = list(task.labels)
    # JSON's true and Python's True are one label; so are 1 and 1.0, as tables with gaps write integers.
    spellings = [str(value)]
    if isinstance(value, bool):
        spellings = [str(value), str(value).lower(), str(int(value))]
    elif isinstance(value, float) and value.is_integer():
        spellings = [str(int(value)), str(value)]
    for spelling in spellings:
        if spelling in task.labels:
            return keys.index(spelling)
    shown = ", ".join(map(repr, keys[:8])) + (f", ... ({len(keys)} in all)" if len(keys) > 8 else "")
    hint = (
        "; -1 marks hidden labels: use a labelled split"
        if str(value) == "-1"
        else "; mend the row or task.labels"
    )
    raise DataError(f"{row.where}: label {value!r} in `{task.label_field}` is not one of {shown}{hint}")


def _answer_ids(
    tokenizer: Any, drafts: Sequence[_Draft], end: tuple[int, ...], rooms: Sequence[int]
) -> tuple[list[tuple[int, ...]], int]:
    """Ids of each draft's answer in its room, and how many were cut. Equal answers (label words) are tokenized once."""
    texts = list(dict.fromkeys(d.answer for d in drafts))
    ids = {t: tuple(i) for t, i in zip(texts, answer_encoder(tokenizer)(texts), strict=True)}
    whole = [ids[d.answer] + (end if d.answer and d.ended else ()) for d in drafts]
    answers = [answer[:room] for answer, room in zip(whole, rooms, strict=True)]
    return answers, sum(len(a) < len(w) for a, w in zip(answers, whole, strict=True))


def _shorten(
    tokenizer: Any,
    render: Callable[[dict[str, str]], str],
    drafts: Sequence[_Draft],
    prefix: tuple[int, ...],
    room: int,
    prompts: list[str],
    ids: list[tuple[int, ...]],
) -> int:
    """Cut the end of each too long prompt's longest field until its `ids` fit `room`; returns how many it cut.

    Rounds of whole batches: tokenizing row by row takes several times as long.
    """
    pending = [n for n, prompt in enumerate(ids) if len(prompt) > room]
    count = len(pending)
    while pending:
        longest = {n: max(drafts[n].texts, key=lambda f: len(drafts[n].texts[f])) for n in pending}
        for n, name in longest.items():
            if not drafts[n].texts[name]:
                raise DataError(
                    f"{drafts[n].where}: the template alone needs {len(ids[n])} tokens, max_length leaves "
                    f"{room}; raise data.max_length"
                )
        fields = [drafts[n].texts[name] for n, name in longest.items()]
        spans = tokenizer(
            fields, add_special_tokens=False, return_attention_mask=False, return_offsets_mapping=True
        )["offset_mapping"]
        for (n, name), text, offsets in zip(longest.items(), fields, spans, strict=True):
            keep = max(0, len(offsets) - (len(ids[n]) - room))
            end = offsets[keep - 1][1] if keep else 0
            # Tokens that join template and field may not shrink with the field: drop a character at least.
            drafts[n].texts[name] = text[: min(end, len(text) - 1)]
            prompts[n] = render(drafts[n].texts)
        for n, new in zip(pending, plain_ids(tokenizer, [prompts[n] for n in pending]), strict=True):
            ids[n] = prefix + tuple(new)
        pending = [n for n in pending if len(ids[n]) > room]
    return count


def _check_ids(examples: Sequence[Example], vocab_size: int) -> None:
    for example in examples:
        worst = max((*example.prompt_ids, *example.answer_ids), default=0)
        if worst >= vocab_size:
            raise DataError(
                f"{example.where}: token id {worst}, the model has {vocab_size} embedding rows; "
                "remove the special token from the text"
            )
