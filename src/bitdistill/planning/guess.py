"""What task do these rows hold? Guesses for `bitdistill init`; every guess is said, none is silent."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from bitdistill.data.readers import Row
from bitdistill.errors import DataError

LABEL_NAMES = ("label", "labels", "category", "class", "intent", "sentiment", "topic", "label_text", "target")
TARGET_NAMES = (
    "summary",
    "highlights",
    "output",
    "response",
    "answer",
    "completion",
    "target",
    "target_text",
    "subject_line",
    "headline",
    "title",
)
IGNORED_NAMES = ("id", "idx", "index", "guid", "uid", "source", "url", "split", "genre")
MAX_LABELS = 300
MAX_TEXT_FIELDS = 3


@dataclass(frozen=True)
class Field:
    """What the rows hold in one field."""

    name: str
    values: int
    distinct: int
    is_text: bool
    mean_characters: float
    counts: Counter[str] | None
    """Rows by value, for fields that could be a label."""
    odd: str | None
    """Place and fault of the first row without a value here, None where all rows have one; see `mended`."""

    @property
    def fits_template(self) -> bool:
        """Whether `{name}` is a plain placeholder: what a template reads as index, format or brace is not."""
        return bool(self.name) and not set(self.name) & set("{}[].:!")

    def mended(self) -> Field:
        """The field itself, where every row has a value in it.

        Raises:
            DataError: a row has none; it is named.
        """
        if self.odd is not None:
            raise DataError(f"{self.odd}; mend or drop the row")
        return self


@dataclass(frozen=True)
class Guess:
    """A task and why. `labels` maps label values to label words; empty for generation."""

    kind: str
    text_fields: tuple[str, ...]
    answer_field: str
    labels: dict[str, str]
    notes: tuple[str, ...]


def fields_of(rows: Sequence[Row], where: str, named: Collection[str] = ()) -> dict[str, Field]:
    """Every field that most rows have, in the rows' order; those in `named` where any row has them.

    Raises:
        DataError: a row without fields, or the rows share no field.
    """
    for row in rows:
        if not row.fields:
            raise DataError(f"{row.where}: no fields; mend or drop the row")
    having = Counter(name for row in rows for name in row.fields)
    names = [name for name, count in having.items() if 2 * count > len(rows) or name in named]
    if not names:
        raise DataError(f"{where}: the rows share no field; give every row the same fields")
    return {name: _field(name, rows) for name in names}


def _field(name: str, rows: Sequence[Row]) -> Field:
    odd = next((f"{row.where}: {fault}" for row in rows if (fault := _fault(name, row))), None)
    values = [row.fields[name] for row in rows if not _fault(name, row)]
    texts = list(map(_spelled, values))
    counts = Counter(texts)
    lengths = list(map(len, texts)) or [0]
    label_like = max(lengths) <= 80 and 2 <= len(counts) <= MAX_LABELS and 2 * len(counts) <= len(values)
    return Field(
        name,
        len(values),
        len(counts),
        2 * sum(isinstance(v, str) for v in values) > len(values),  # runs write a number among texts out
        statistics.fmean(lengths),
        counts if label_like else None,
        odd,
    )


def _fault(name: str, row: Row) -> str | None:
    """Why the row's field is neither prompt nor answer in a run, or None."""
    if name not in row.fields:
        return f"no field `{name}`"
    value = row.fields[name]
    if isinstance(value, str | int | float):
        return None
    return f"`{name}` is {'null' if value is None else f'a {type(value).__name__}'}"


def _spelled(value: str | float) -> str:
    """A label as `tasks.label_index` finds it."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return str(value)


def guess(
    fields: dict[str, Field], where: str, *, text: Sequence[str] = (), label: str | None, target: str | None
) -> Guess:
    """Kind, prompt fields and answer field; names that the user gave are not guessed.

    Raises:
        DataError: a named field is not there, or nothing looks like a label or an answer.
    """
    for name in (*text, label, target):
        if name is not None and name not in fields:
            raise DataError(f"{where}: no field `{name}`; fields here: {', '.join(fields)}")
        if name is not None:
            fields[name].mended()
    for name in text:
        if not fields[name].fits_template:
            raise DataError(
                f"{where}: field `{name}` cannot stand in a template because of its . : ! or brackets; "
                "rename the field"
            )
    notes: list[str] = []
    if label is None and target is None:
        label, target = _answer(fields, set(text), where)
        kind = "label" if label else "answer"
        notes.append(f"guessed `{label or target}` as the {kind}; wrong? --label FIELD or --target FIELD")
    answer = label or target
    assert answer is not None
    fields[answer].mended()
    prompt = tuple(text) or _prompt(fields, answer, where)
    if not text:
        notes.append(f"guessed {', '.join(f'`{p}`' for p in prompt)} as the prompt; wrong? --text FIELD")
        odd = [
            f"`{f.name}`" for f in fields.values() if f.is_text and f.name != answer and not f.fits_template
        ]
        if odd:
            notes.append(f"left out {', '.join(odd)}: rename such a field to use it (no . : ! or brackets)")
        notes += [
            f"left out `{f.name}` ({f.odd}): mend or drop such rows to use it"
            for f in fields.values()
            if f.odd is not None and f.is_text and f.name.lower() not in IGNORED_NAMES
        ]
    if label is None:
        return Guess("generation", prompt, answer, {}, tuple(notes))
    labels, label_notes = _label_words(fields[label], where)
    return Guess("classification", prompt, answer, labels, (*notes, *label_notes))


def _answer(fields: dict[str, Field], text: set[str], where: str) -> tuple[str | None, str | None]:
    """(label field, None) or (None, target field)."""
    usable = {n: f for n, f in fields.items() if n not in text and n.lower() not in IGNORED_NAMES}
    labels = [f for f in usable.values() if f.counts is not None]
    named = [f for f in labels if f.name.lower() in LABEL_NAMES]
    # A text label (`category: card_arrival`) gives words, a number does not; gaps leave only a complaint.
    named.sort(key=lambda f: (f.odd is not None, not f.is_text))
    if named:
        return named[0].name, None
    targets = [n for wanted in TARGET_NAMES for n in usable if n.lower() == wanted and usable[n].is_text]
    if targets:
        return None, targets[0]
    if labels:
        return min(labels, key=lambda f: (f.odd is not None, f.distinct)).name, None
    raise DataError(
        f"{where}: no field looks like a label or an answer (fields: {', '.join(fields)}); "
        "name it with --label FIELD or --target FIELD"
    )


def _prompt(fields: dict[str, Field], answer: str, where: str) -> tuple[str, ...]:
    texts = [
        f for f in fields.values() if f.name != answer and f.is_text and f.name.lower() not in IGNORED_NAMES
    ]
    # Fields whose values repeat (a genre) serve only when there is nothing else.
    texts = [f for f in texts if f.counts is None] or texts
    if not texts:
        raise DataError(
            f"{where}: no text field besides `{answer}`; name the prompt's field with --text FIELD"
        )
    texts = [f for f in texts if f.odd is None] or [texts[0].mended()]
    odd = [f.name for f in texts if not f.fits_template]
    texts = [f for f in texts if f.fits_template]
    if not texts:
        raise DataError(
            f"{where}: field `{odd[0]}` cannot stand in a template because of its . : ! or brackets; "
            "rename the field"
        )
    if len(texts) > MAX_TEXT_FIELDS:
        texts = sorted(texts, key=lambda f: -f.mean_characters)[:1]
    return tuple(f.name for f in texts)


def _label_words(field: Field, where: str) -> tuple[dict[str, str], list[str]]:
    if field.counts is None:
        raise DataError(
            f"{where}: field `{field.name}` has {field.distinct} values in {field.values} rows; a label "
            f"repeats and has 2 to {MAX_LABELS} values; for free answers use --target {field.name}"
        )
    values = sorted(field.counts, key=lambda v: (len(v), v) if v.lstrip("-").isdigit() else (0, v))
    if field.is_text and not all(v.lstrip("-").isdigit() for v in values):
        words = {v: " " + " ".join(v.replace("_", " ").replace("-", " ").lower().split()) for v in values}
        if len(set(words.values())) == len(words) and all(w.strip() for w in words.values()):
            return words, ["label words are made from the label values; short common words score faster"]
    note = f"labels of `{field.name}` are numbers or symbols: replace the label words by words with a meaning"
    words = {v: f" {v}" for v in values}
    for blank in [v for v in values if not v.strip()]:  # a blank word has nothing to score
        free = (f" empty{n}" for n in ("", *range(2, len(values) + 2)))
        words[blank] = next(word for word in free if word not in words.values())
    return words, [note]
