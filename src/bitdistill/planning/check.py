"""First look at a recipe's data: files are there, first rows fit the task, about how many rows there are."""

from __future__ import annotations

import statistics
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from bitdistill import artifact
from bitdistill.config import Recipe, Task
from bitdistill.data import hub, readers, tasks
from bitdistill.data.tokenizer import plain_ids, special_prefix
from bitdistill.errors import ArtifactError, DataError
from bitdistill.eval.metrics import task_metrics
from bitdistill.planning.estimate import Work
from bitdistill.recipe import check_base

CHECKED_ROWS = 100
COUNTED_BYTES = 16 << 20
CHARACTERS_PER_TOKEN = 4.0

# Rows of hub data sets in their released form, so that a plan needs no network.
KNOWN_ROWS = {
    "stanfordnlp/sst2": {"train": 67_349, "validation": 872},
    "nyu-mll/glue:mnli": {"train": 392_702, "validation_matched": 9_815, "validation_mismatched": 9_832},
    "nyu-mll/glue:qnli": {"train": 104_743, "validation": 5_463},
    "nyu-mll/glue:sst2": {"train": 67_349, "validation": 872},
    "stanfordnlp/imdb": {"train": 25_000, "test": 25_000},
    "Yale-LILY/aeslc": {"train": 14_436, "validation": 1_960, "test": 1_906},
    "openai/gsm8k:main": {"train": 7_473, "test": 1_319},
    "abisee/cnn_dailymail:3.0.0": {"train": 287_113, "validation": 13_368, "test": 11_490},
}
# Tokens a row of well-known tasks, when the rows are on the hub and cannot be sampled offline.
KNOWN_TOKENS = {
    "sst2": 20,
    "mnli": 45,
    "qnli": 60,
    "imdb": 310,
    "aeslc": 190,
    "gsm8k": 160,
    "cnn_dailymail": 1000,
}


@dataclass(frozen=True)
class Source:
    """One data source of the recipe: what was checked and about how large it is. None: not known offline."""

    key: str
    source: str
    checked: int
    rows: int | None
    tokens_per_row: float | None
    note: str

    def work(self, max_length: int) -> Work | None:
        """For the estimates."""
        if self.rows is None:
            return None
        tokens = min(float(max_length), self.tokens_per_row or max_length / 2)
        return Work(self.rows, tokens, max_length)


def check_data(recipe: Recipe, *, scoring: bool = True, whole: bool = False) -> list[Source]:
    """Check every data source of the recipe; at most CHECKED_ROWS rows of each are read.

    Args:
        scoring: whether the run goes as far as scoring, which needs rows and known metrics.
        whole: read every row of files that no stage reads before a model is trained: the scored rows, if `scoring`,
            and the unlabelled ones. A bad row there would be found after all training.

    Raises:
        DataError: a file is missing, a row is broken or does not fit the task (file and line are named),
            or there are no rows to score or to train on.
        ArtifactError: the corpus or base is a folder of another kind, or of none.
        RecipeError: a metric that does not exist or does not fit the task's kind.
    """
    data = recipe.data
    task_metrics(recipe.task)
    on_validation = recipe.eval.split == "validation"  # which never takes test rows
    held_out = scoring and data.validation is None and (data.test is None or on_validation)
    if held_out and not data.validation_fraction:
        keys = "eval.split is validation and neither" if on_validation else "neither test,"
        raise DataError(
            f"data: {keys} validation nor validation_fraction is set, so nothing could be scored; "
            "set one, for example validation_fraction: 0.1"
        )
    named = {"data.train": data.train, "data.validation": data.validation, "data.test": data.test}
    limits = {"data.train": data.limit_train, "data.test": data.limit_test}
    late = None
    if whole and scoring:
        late = "data.test" if data.test is not None and not on_validation else "data.validation"
    found = [
        _source(key, s, recipe.task, limits.get(key), whole=key == late)
        for key, s in named.items()
        if s is not None
    ]
    train = found[0]
    if data.validation is None and data.validation_fraction:
        _check_split(train, data.validation_fraction, scored_from_train=held_out)
    found = [_few_labels(source, recipe) if source.key == "data.train" else source for source in found]
    found += [
        _source("data.unlabelled", s, recipe.task, None, answers=False, whole=whole) for s in data.unlabelled
    ]
    if recipe.augment is not None:
        tasks.check_first_field(recipe.task, recipe.augment.texts)
        if recipe.augment.whole_share:
            tasks.between_fields(recipe.task)
        for text in recipe.augment.texts:
            if not hub.is_hub(text) and not Path(text).exists():
                raise DataError(
                    f"augment.texts: {text}: no such file or folder; name texts, or leave the key out"
                )
        found.append(
            Source("augment", "written by the model", 0, recipe.augment.rows, train.tokens_per_row, "at most")
        )
    if recipe.pretrain is not None:
        if recipe.pretrain.start is not None:
            _check_base(recipe, Path(recipe.pretrain.start).expanduser(), "start")
        if recipe.pretrain.base is not None:
            _check_base(recipe, Path(recipe.pretrain.base).expanduser(), "base")
        else:
            _check_corpus(recipe.pretrain.corpus)
    return found


def check_tokens(recipe: Recipe, tokenizer: Any) -> None:
    """What the model's tokenizer makes of label words and template; a run would find it after loading the model.

    Raises:
        DataError: label words that cannot be told apart, or a template that leaves `data.max_length` no room.
    """
    task = recipe.task
    if task.append_eos and tokenizer.eos_token_id is None:
        return  # the full tokenizer may know its eos from its class
    labels = tasks.label_token_ids(task, tokenizer) if task.kind == "classification" else []
    empty = tasks.renderer(task)(dict.fromkeys(tasks.template_fields(task), ""))
    needed = len(special_prefix(tokenizer)) + len(plain_ids(tokenizer, [empty])[0])
    length = recipe.data.max_length
    answer = max((len(ids) for ids in labels), default=1)
    if needed > length - answer:
        raise DataError(
            f"data.max_length: {length}, but the template alone needs {needed} tokens and its answer {answer}; "
            "raise it"
        )


def scored(sources: list[Source], recipe: Recipe) -> Source | None:
    """The source whose rows are scored; a held-out share of train when none is named."""
    by_key = {source.key: source for source in sources}
    wanted = ["data.test", "data.validation"] if recipe.eval.split == "test" else ["data.validation"]
    for key in wanted:
        if key in by_key:
            return by_key[key]
    train, share = by_key["data.train"], recipe.data.validation_fraction
    if train.rows is None or not share:
        return None
    return Source("data.train", train.source, 0, int(train.rows * share), train.tokens_per_row, "held out")


def distilled(sources: list[Source], max_length: int) -> Work | None:
    """Rows of stage 3: the training, the unlabelled and the written ones; None where a count is not known."""
    works = [s.work(max_length) for s in sources if s.key in ("data.train", "data.unlabelled", "augment")]
    known = [work for work in works if work is not None]
    if len(known) < len(works):
        return None
    rows = sum(work.rows for work in known)
    tokens = sum(work.rows * work.tokens_per_row for work in known) / max(rows, 1)
    return Work(rows, tokens, max_length)


def _source(
    key: str, source: str, task: Task, limit: int | None, *, answers: bool = True, whole: bool = False
) -> Source:
    if hub.is_hub(source):
        spec = hub.parse(source)
        name = f"{spec.name}:{spec.config}" if spec.config else spec.name
        count = KNOWN_ROWS.get(name, {}).get(spec.split)
        rows = count if limit is None else min(limit, count or limit)
        return Source(key, source, 0, rows, KNOWN_TOKENS.get(task.name), "hub: read at run time")
    try:
        sample = readers.read_rows(source, limit=limit if whole else CHECKED_ROWS)
        tasks.check_rows(task, sample, require_answers=answers)
    except DataError as error:
        message = str(error)
        raise DataError(message if message.startswith(key) else f"{key}: {message}") from None
    tokens = statistics.fmean(_characters(task, row.fields) for row in sample) / CHARACTERS_PER_TOKEN
    rows, exact = (len(sample), True) if whole else count_rows(Path(source), sample)
    rows = rows if limit is None else min(limit, rows)
    return Source(key, source, len(sample), rows, tokens, "" if exact else "about")


def _check_split(train: Source, share: float, *, scored_from_train: bool) -> None:
    """Whether holding rows out of the training rows, as the run does, leaves rows on both sides."""
    rows = train.rows
    if rows is None or train.note:  # estimated, or on the hub
        return
    held_out = int(rows * share)
    if held_out == rows:
        raise DataError(
            f"data.validation_fraction: {share} of {rows} training rows leaves none to train on; lower it"
        )
    if scored_from_train and not held_out:
        raise DataError(
            f"data.validation_fraction: {share} of {rows} training rows is less than one, "
            "so nothing could be scored; raise it, or name rows"
        )


def _few_labels(train: Source, recipe: Recipe) -> Source:
    """The training rows that `rows_per_label` leaves, for the estimates; where rows are held out of them, all."""
    held_out = recipe.data.validation is None and recipe.data.validation_fraction > 0
    if recipe.data.rows_per_label is None or train.rows is None or held_out:
        return train
    return replace(train, rows=min(train.rows, recipe.data.rows_per_label * len(recipe.task.labels)))


def _characters(task: Task, fields: dict[str, Any]) -> int:
    answer = task.label_field if task.kind == "classification" else task.target_field or ""
    names = [*tasks.template_fields(task), answer]
    return len(task.template) + sum(len(str(fields.get(name, ""))) for name in names)


def count_rows(path: Path, sample: list[readers.Row]) -> tuple[int, bool]:
    """Rows of a file and whether that is exact: extrapolated from the sample when the file is large."""
    if len(sample) < CHECKED_ROWS:
        return len(sample), True
    if path.name.lower().endswith(".parquet"):
        import pyarrow.parquet as pq

        return int(pq.read_metadata(path).num_rows), True
    count, size, position = 0, path.stat().st_size, 0
    with path.open("rb") as raw:
        stream = _decoded(raw, path)
        while count >= 0 and position < COUNTED_BYTES:
            block = stream.read(1 << 20)
            if not block:
                return max(1, count - path.name.lower().endswith((".csv", ".tsv"))), True
            count += block.count(b"\n")
            position += len(block)
        consumed = raw.tell()
    return max(count, int(count * size / max(1, consumed))), False


def _decoded(raw: Any, path: Path) -> Any:
    name = path.name.lower()
    if name.endswith(".zst"):
        import zstandard

        return zstandard.ZstdDecompressor(max_window_size=2**27).stream_reader(raw, read_across_frames=True)
    if name.endswith(".gz"):
        import gzip

        return gzip.GzipFile(fileobj=raw)
    return raw


def _check_corpus(corpus: str | None) -> None:
    """What stage 2 reads: its first document, or what kind of artifact it is."""
    if corpus is None:
        raise DataError(
            "pretrain: neither corpus nor base is set; name one, or leave stage 2 out with `pretrain: null`"
        )
    if hub.is_hub(corpus):
        hub.parse(corpus)
        return
    path = Path(corpus).expanduser()
    if not path.exists():
        raise DataError(f"pretrain.corpus: {corpus}: no such file or folder; check the path")
    if path.is_dir() and artifact.exists(path):
        from bitdistill.data.corpus import TokenShards  # not for a plan without shards

        TokenShards(path)
        return
    try:
        readers.check_documents(corpus)
    except DataError as error:
        raise DataError(f"pretrain.corpus: {error}") from None


def _check_base(recipe: Recipe, folder: Path, key: str) -> None:
    if not folder.is_dir():
        raise DataError(f"pretrain.{key}: {folder}: no such folder; give a ternary base, or remove the key")
    manifest = artifact.read_manifest(folder)
    kind = manifest.get("kind")
    if kind != "base":
        raise ArtifactError(
            f"pretrain.{key}: {folder}: kind {kind!r}, a ternary base is needed; run `bitdistill pretrain`"
        )
    check_base(recipe, manifest, key, folder)
