"""Rows without answers: the teacher answers them for stage 3; `augment` writes such rows."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from bitdistill import artifact, pipeline
from bitdistill.cli.augment import augment as augment_command
from bitdistill.cli.main import app
from bitdistill.config import AugmentConfig, Task
from bitdistill.data import tasks
from bitdistill.data.readers import Row, read_rows
from bitdistill.errors import ArtifactError, DataError, RecipeError
from bitdistill.eval.classify import classify
from bitdistill.eval.prediction import Prediction
from bitdistill.losses.logits import cross_entropy_sum
from bitdistill.planning import check
from bitdistill.planning.check import check_data, distilled
from bitdistill.recipe import dump_recipe, load_recipe
from bitdistill.report import sweep_results
from bitdistill.report.run_folder import read_run
from bitdistill.stages import augment, common, pseudo_labels, sft
from bitdistill.stages.common import Run, pad_token_id
from bitdistill.stages.distill import load_teacher
from bitdistill.stages.reuse import Reuse
from bitdistill.train.step import Totals
from tests.stages.conftest import recipe, write_rows


@pytest.fixture
def extra(work: Path) -> Path:
    write_rows(work / "extra.jsonl", 21, 5)
    return work / "extra.jsonl"


def opened(work: Path, *overrides: str) -> Run:
    return Run.open(recipe(work, *overrides), command="test", quiet=True)


def test_the_teacher_answers_and_the_rows_own_labels_are_not_read(work: Path, extra: Path) -> None:
    run = opened(work, f"data.unlabelled={extra}")
    teacher, tokenizer = load_teacher(run, sft.sft(run))
    answered = pseudo_labels.answered_examples(run, teacher, tokenizer)
    rows = read_rows(str(extra))
    task = run.recipe.task
    expected = classify(
        teacher, tokenizer, task, tasks.encode(task, rows, tokenizer, 32),
        batch_rows=8, device="cpu", pad_id=pad_token_id(tokenizer),
    )  # fmt: skip
    assert [e.label for e in answered] == [p.label for p in expected]
    assert [e.where for e in answered] == [r.where for r in rows]
    # Wrong and missing labels change nothing.
    lines = [json.loads(line) for line in extra.read_text().splitlines()]
    lines = [{"text": r["text"], **({"label": "nonsense"} if n % 2 else {})} for n, r in enumerate(lines)]
    extra.write_text("".join(json.dumps(r) + "\n" for r in lines))
    assert [e.answer_ids for e in pseudo_labels.answered_examples(run, teacher, tokenizer)] == [
        e.answer_ids for e in answered
    ]


def test_stage_3_trains_on_both_and_other_stages_do_not(work: Path, extra: Path) -> None:
    plain = pipeline.run(recipe(work), command="test", quiet=True)
    more = pipeline.run(recipe(work, f"data.unlabelled={extra}", "name=more"), command="test", quiet=True)
    manifests = [artifact.read_manifest(r.run_dir / "student") for r in (plain, more)]
    assert [m["teacher_answered_rows"] for m in manifests] == [0, 21]
    assert [m["training"]["steps"] for m in manifests] == [4, 7]  # 32 and 53 rows in batches of 8
    assert "unlabelled" not in manifests[0]["inputs"]  # keys of earlier runs stay what they were
    for stage in ("teacher", "bitnet_sft"):
        keys = {artifact.read_manifest(r.run_dir / stage)["key"] for r in (plain, more)}
        assert len(keys) == 1
    # other rows, another key
    write_rows(extra, 21, 6)
    changed = recipe(work, f"data.unlabelled={extra}", "name=more")
    with pytest.raises(ArtifactError, match="unlabelled"):
        pipeline.run(changed, command="test", quiet=True)


def test_a_row_without_the_templates_field_is_named(work: Path, extra: Path) -> None:
    extra.write_text(extra.read_text() + '{"words": "w31"}\n')
    with pytest.raises(DataError, match=r"data\.unlabelled: .*extra\.jsonl:22: no field `text`"):
        check_data(recipe(work, f"data.unlabelled={extra}"))


def test_a_run_checks_the_rows_of_late_stages_to_the_last(work: Path, extra: Path) -> None:
    rows = (work / "test.jsonl").read_text("utf-8").splitlines()
    late = [*rows * (1 + 2 * check.CHECKED_ROWS // len(rows)), json.dumps({"text": "w31", "label": "other"})]
    (work / "late.jsonl").write_text("\n".join(late) + "\n", "utf-8")
    named = f"data.test={work / 'late.jsonl'}"
    wrong = recipe(work, named)
    check_data(wrong)  # a plan reads the first rows
    check_data(wrong, scoring=False, whole=True)  # not scored
    check_data(recipe(work, named, f"data.limit_test={len(late) - 1}"), whole=True)
    with pytest.raises(DataError, match=rf"data\.test: .*late\.jsonl:{len(late)}: label 'other'"):
        check_data(wrong, whole=True)
    result = CliRunner().invoke(app, ["run", str(work / "recipe.yaml"), "--set", named])
    assert isinstance(result.exception, DataError)
    assert not (work / "runs/tiny/teacher").exists()
    lines = [*extra.read_text("utf-8").splitlines()] * (1 + 2 * check.CHECKED_ROWS // 21)
    extra.write_text("\n".join([*lines, '{"words": "w31"}']) + "\n", "utf-8")
    check_data(recipe(work, f"data.unlabelled={extra}"))
    with pytest.raises(DataError, match=rf"extra\.jsonl:{len(lines) + 1}: no field `text`"):
        check_data(recipe(work, f"data.unlabelled={extra}"), whole=True)


def test_the_plan_counts_them_in_stage_3(work: Path, extra: Path) -> None:
    found = check_data(recipe(work, f"data.unlabelled={extra}"))
    work_3 = distilled(found, 32)
    assert work_3 is not None
    assert work_3.rows == 32 + 21


def test_generating_teachers_answer_with_text(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    task = {"name": "copy", "kind": "generation", "template": "{text} w9", "target_field": "label"}
    rows = [{"text": f"w{n + 30} " * 40, "label": "w40"} for n in range(4)]
    for name in ("train", "extra"):
        (work / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    run = opened(work, f"task={json.dumps(task)}", f"data.unlabelled=[{work}/extra.jsonl]")
    teacher, tokenizer = load_teacher(run, sft.sft(run))
    texts = ["w41 w42", "", "w43", "w44"]

    def said(*arguments: Any, **options: Any) -> list[Any]:
        asked.extend(arguments[3])
        return [Prediction(n, None, (), text, ended=text != "w43") for n, text in enumerate(texts)]

    asked: list[tasks.Example] = []
    monkeypatch.setattr(pseudo_labels, "generate", said)
    answered = pseudo_labels.answered_examples(run, teacher, tokenizer)
    assert [e.references[0] for e in answered] == ["w41 w42", "w43", "w44"]
    # One that max_new_tokens cut is not taught to end there; prompts that are cut are those of the question.
    assert [e.answer_ids[-1] == tokenizer.eos_token_id for e in answered] == [True, False, True]
    assert [e.prompt_ids for e in answered] == [asked[n].prompt_ids for n in (0, 2, 3)]
    assert len(asked[0].prompt_ids) < 32
    monkeypatch.setattr(pseudo_labels, "generate", lambda *a, **k: said(*a)[1:2] * 4)
    with pytest.raises(DataError, match="answered no row"):
        pseudo_labels.answered_examples(run, teacher, tokenizer)


def test_texts_are_generated_for_more_rows_at_a_time_than_labels_are_chosen(work: Path) -> None:
    task = {"name": "copy", "kind": "generation", "template": "{text} w9", "target_field": "label"}
    labels, texts = opened(work), opened(work, f"task={json.dumps(task)}")
    own = {"batch_rows": labels.recipe.eval.batch_rows}
    assert [pseudo_labels.batches(run) for run in (labels, texts)] == [own, own]
    gpu = [dataclasses.replace(run, device=torch.device("cuda")) for run in (labels, texts)]
    assert [pseudo_labels.batches(run)["batch_rows"] for run in gpu] == [512, 4096]


PAIRS = Task(
    name="nli", kind="classification", template="{premise}\nClaim: {hypothesis}\nTrue:",
    labels={"0": " yes", "1": " no"},
)  # fmt: skip


TITLES = Task(name="titles", kind="generation", template="{article}\nTitle:", target_field="title")


def test_the_turned_task() -> None:
    trained, last = augment.forms(PAIRS, whole=False)
    assert trained == last
    assert last.task.template == "Label: {_label}\n{premise}\nClaim:"
    assert (last.task.target_field, last.task.answer_prefix) == ("hypothesis", " ")
    one, _ = augment.forms(PAIRS.model_copy(update={"template": "{sentence}\nSentiment:"}), whole=False)
    turned = one.task
    assert (turned.template, turned.target_field, turned.answer_prefix) == (
        "Label: {_label}\n",
        "sentence",
        " ",
    )
    titles, _ = augment.forms(TITLES, whole=False)
    assert (titles.task.template, titles.task.target_field) == ("Answer: {_label}\n", "article")
    turned_row = titles.turned(TITLES, Row({"article": "It rained.", "title": "Rain "}, "here"))
    assert turned_row.fields == {"article": "It rained.", "title": "Rain ", "_label": "Rain"}


@pytest.mark.parametrize(
    "template", ["{premise}\nClaim: {hypothesis}\nTrue:", "Text: {premise} / {hypothesis}?"]
)
def test_rows_written_whole(template: str) -> None:
    """What the trained form writes after its prompt is what the other form is given, and fields are read back."""
    task = PAIRS.model_copy(update={"template": template})
    whole, last = augment.forms(task, whole=True)
    row = Row({"premise": "It rains.", "hypothesis": "It is wet", "label": 1}, "here")
    turned, given = whole.turned(task, row), last.turned(task, row)
    prompt = tasks.renderer(whole.task)({"_label": "no"})
    text = str(turned.fields[augment.WHOLE_FIELD])
    short = tasks.renderer(last.task)({"_label": "no", "premise": "It rains."})
    assert prompt + whole.task.answer_prefix + text == short + last.task.answer_prefix + str(
        given.fields["hypothesis"]
    )
    assert prompt.startswith("Label: no\n")
    pair = {"premise": "It rains.", "hypothesis": "It is wet"}
    assert whole.read(turned, text) == pair
    assert last.read(given, "It is wet") == pair
    separator = whole.between[0]
    for odd in ("It rains.", f"{separator}It is wet", f"It rains.{separator}", f"a{separator}b{separator}c"):
        assert whole.read(turned, odd) is None, odd


def test_rows_that_cannot_be_taken_apart_are_not_written_whole(work: Path) -> None:
    for template in ("{premise}{hypothesis}?", "{premise} {hypothesis} {premise}?"):
        with pytest.raises(RecipeError, match=r"augment\.whole_share: task nli: .* set it to 0"):
            augment.forms(PAIRS.model_copy(update={"template": template}), whole=True)
    with pytest.raises(RecipeError, match="set it to 0"):
        check_data(recipe(work, 'task.template="{text}{text}"', "augment={rows: 10, whole_share: 0.5}"))
    one = PAIRS.model_copy(update={"template": "{sentence}?"})
    assert augment.forms(one, whole=True) == augment.forms(one, whole=False)


def test_a_share_of_the_rows_is_written_whole(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = pair_run(work)
    texts = iter(
        ["w30 w77\nClaim: w40", "w30 w31", "w78\nClaim: w41 w42", "w79\nClaim: w43", "w50", "w51", "", "w53"]
    )
    asked: list[tuple[str, int]] = []

    def record(model: Any, tokenizer: Any, task: Task, examples: Any, **options: Any) -> list[Any]:
        asked.append((str(task.target_field), len(examples)))
        found = [Prediction(n, None, (), next(texts), ended=True) for n in range(len(examples))]
        return [dataclasses.replace(p, ended=p.text != "w79\nClaim: w43") for p in found]

    monkeypatch.setattr(augment, "sample", record)
    rows = list(augment.written_rows(run, AugmentConfig(rows=8, whole_share=0.5)))
    assert asked == [(augment.WHOLE_FIELD, 4), ("hypothesis", 4)]
    assert rows[:2] == [
        {"premise": "w30 w77", "hypothesis": "w40"},
        {"premise": "w78", "hypothesis": "w41 w42"},
    ]
    assert [r["hypothesis"] for r in rows[2:]] == ["w50", "w51", "w53"]
    first = artifact.read_manifest(run.run_dir / "writer")["key"]
    monkeypatch.undo()
    with pytest.raises(ArtifactError, match="made with other settings"):  # another writer
        list(augment.written_rows(pair_run(work), AugmentConfig(rows=4)))
    assert artifact.read_manifest(run.run_dir / "writer")["key"] == first


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_rows_without_text_are_named(work: Path, share: float) -> None:
    run = pair_run(work)
    line = json.dumps({"premise": None, "hypothesis": "w1", "label": 0}) + "\n"
    with (work / "train.jsonl").open("a") as file:
        file.write(line)
    with pytest.raises(DataError, match=r"train\.jsonl:25: field `premise` is null"):
        list(augment.written_rows(run, AugmentConfig(rows=4, whole_share=share)))


def test_whole_rows_are_sampled_by_a_writer_that_learnt_them(work: Path) -> None:
    """Text between the fields is of words that the test's tokenizer knows."""
    template = json.dumps("{premise} w8 {hypothesis} w9")
    run = pair_run(work, f"task.template={template}", "sft.epochs=20", "sft.optim.learning_rate=0.003")
    rows = list(augment.written_rows(run, AugmentConfig(rows=48, whole_share=1.0)))
    assert len(rows) > 10  # most of the others are training rows by heart
    for row in rows:
        assert list(row) == ["premise", "hypothesis"]
        assert all(row.values())
        assert "w8" not in row["hypothesis"].split()


def test_rows_of_a_generation_task_are_written_for_answers_of_training_rows(
    work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = [{"article": f"w{30 + n} w31 w32", "title": f"w{60 + n}"} for n in range(20)]
    (work / "train.jsonl").write_text("".join(json.dumps(r) + "\n" for r in lines))
    task = json.dumps({**TITLES.model_dump(mode="json"), "max_new_tokens": 4})
    run = opened(work, f"task={task}", "augment={rows: 30, seed: 3}")
    assert run.recipe.augment is not None
    prompts: list[str] = []
    real = augment.sample

    def record(model: Any, tokenizer: Any, task: Task, examples: Any, **options: Any) -> list[Any]:
        prompts.extend(e.prompt for e in examples)
        return real(model, tokenizer, task, examples, **options)

    monkeypatch.setattr(augment, "sample", record)
    rows = list(augment.written_rows(run, run.recipe.augment))
    steers = [prompt.splitlines()[0].removeprefix("Answer: ") for prompt in prompts]
    assert len(steers) == 30
    assert set(steers) <= {r["title"] for r in lines}
    assert len(set(steers)) > 5
    assert rows
    assert all(list(row) == ["article"] for row in rows)


def test_the_teacher_answers_written_rows_of_a_generation_task(work: Path) -> None:
    lines = [{"article": f"w{30 + n} w31 w32", "title": f"w{60 + n % 9}"} for n in range(24)]
    for name in ("train", "test"):
        (work / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in lines))
    task = json.dumps({**TITLES.model_dump(mode="json"), "max_new_tokens": 4})
    wanted = recipe(work, f"task={task}", "augment={rows: 12, temperature: 2.0}", "bitnet_sft=null")
    made = pipeline.run(wanted, command="test", quiet=True)
    student = artifact.read_manifest(made.run_dir / "student")
    assert 0 < student["teacher_answered_rows"] <= 12


def test_answers_put_to_encoded_prompts_are_as_if_encoded_with_them(work: Path) -> None:
    """Classification and generation, prompts and answers that are cut among them, and answers without an end."""
    _, tokenizer = sft.load_source(opened(work).recipe.model, dtype="float32", device="cpu")
    texts = [f"w{30 + n} " * (3 + 20 * (n % 3)) for n in range(12)]
    pairs = [Row({"premise": text, "hypothesis": "w40"}, f"r{n}") for n, text in enumerate(texts)]
    answers = [list(PAIRS.labels)[n % 2] for n in range(12)]
    bare = tasks.encode(PAIRS, pairs, tokenizer, 40, require_answers=False)
    whole = [Row({**row.fields, "label": a}, row.where) for row, a in zip(pairs, answers, strict=True)]
    assert tasks.with_answers(PAIRS, bare, answers, tokenizer, 40) == tasks.encode(
        PAIRS, whole, tokenizer, 40
    )
    titles = TITLES.model_copy(update={"max_new_tokens": 6})
    articles = [Row({"article": text}, f"r{n}") for n, text in enumerate(texts)]
    said = [f"w{50 + n} " * (1 + 15 * (n % 2)) for n in range(12)]
    ended = [n % 3 > 0 for n in range(12)]
    bare = tasks.encode(titles, articles, tokenizer, 40, require_answers=False)
    whole = [Row({**row.fields, "title": a}, row.where) for row, a in zip(articles, said, strict=True)]
    expected = tasks.encode(titles, whole, tokenizer, 40, ended=ended)
    assert tasks.with_answers(titles, bare, said, tokenizer, 40, ended=ended) == expected


def pair_run(work: Path, *overrides: str) -> Run:
    lines = [
        {"premise": f"w{30 + n} w31", "hypothesis": f"w{40 + n}", "label": n % 2, "other": 1}
        for n in range(24)
    ]
    (work / "train.jsonl").write_text("".join(json.dumps(r) + "\n" for r in lines))
    return opened(work, f"task={json.dumps(PAIRS.model_dump(mode='json'))}", *overrides)


def test_written_rows_fit_the_task_and_repeat_by_seed(work: Path) -> None:
    run = pair_run(work)
    out = work / "more.jsonl.zst"
    count = augment.write_rows(augment.written_rows(run, AugmentConfig(rows=40, temperature=0.7)), out)
    made = read_rows(str(out))
    assert 0 < count == len(made) <= 40
    train = {(r.fields["premise"], r.fields["hypothesis"]) for r in read_rows(str(work / "train.jsonl"))}
    pairs = [(r.fields["premise"], r.fields["hypothesis"]) for r in made]
    assert len(set(pairs)) == len(pairs)
    assert not train & set(pairs)
    assert {p for p, _ in pairs} <= {p for p, _ in train}
    assert all(set(r.fields) == {"premise", "hypothesis"} for r in made)  # no answers
    again = work / "again.jsonl"
    augment.write_rows(augment.written_rows(pair_run(work), AugmentConfig(rows=40, temperature=0.7)), again)
    assert [r.fields for r in read_rows(str(again))] == [r.fields for r in made]
    assert not list(work.glob("*.partial"))


def test_sentences_of_other_texts_come_first(work: Path) -> None:
    (work / "texts.txt").write_text("w50 w51 w52 w53 w54. Too short. w60 w61 w62 w63 w64 w65! " + "w70 " * 60)
    texts = str(work / "texts.txt")
    run = pair_run(work)
    rows = list(augment.written_rows(run, AugmentConfig(rows=30, texts=(texts,), texts_share=1.0)))
    assert {r["premise"] for r in rows} == {"w50 w51 w52 w53 w54.", "w60 w61 w62 w63 w64 w65!"}
    (work / "texts.txt").write_text("Too short.")
    with pytest.raises(DataError, match="no sentence of 5 to 40 words"):
        list(augment.written_rows(run, AugmentConfig(rows=3, texts=(texts,))))
    template = "{premise} {hypothesis} {other}"
    three = opened(work, f"task={json.dumps(PAIRS.model_copy(update={'template': template}).model_dump())}")
    with pytest.raises(
        RecipeError, match=r"the only field or the first of two, task nli has 3; leave it out"
    ):
        list(augment.written_rows(three, AugmentConfig(rows=3, texts=(texts,))))


def test_sentences_of_other_texts_are_rows_of_a_task_of_one_field(
    work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    known = "w33 w34 w35 w36 w37 w38"
    with (work / "train.jsonl").open("a") as file:
        label = read_rows(str(work / "train.jsonl"))[0].fields["label"]
        file.write(json.dumps({"text": f"{known}.", "label": label}) + "\n")
    sentences = [f"w5{n} w51<br />w52 w53 w54 w55 w6{n}." for n in range(9)]
    (work / "texts.txt").write_text(f"{known}.\n\n" + " ".join(sentences) + " w1 w2 w3. " + sentences[0])
    section = f"augment={{rows: 24, texts: {work}/texts.txt, texts_share: 0.5, seed: 0}}"
    run = opened(work, section)
    config = run.recipe.augment
    assert config is not None
    asked: list[Any] = []

    def record(model: Any, tokenizer: Any, task: Task, examples: Any, **options: Any) -> list[Any]:
        asked.extend(examples)
        return [Prediction(n, None, (), f"w7 w{n}", ended=True) for n in range(len(examples))]

    monkeypatch.setattr(augment, "sample", record)
    rows = [row["text"] for row in augment.written_rows(run, config)]
    # Markup and empty lines end a sentence, short ones are left out, and so are known and repeated ones.
    taken = [row for row in rows if row.endswith(".")]
    assert sorted(taken) == [f"w52 w53 w54 w55 w6{n}." for n in range(9)]
    assert len(asked) == 12
    assert rows[9:] == [f"w7 w{n}" for n in range(12)]
    # Nothing but sentences: no writer is trained.
    only = opened(work, section.replace("0.5", "1.0"), "name=only")
    written = augment.augment(only)
    assert len(read_rows(str(written / augment.WRITTEN_ROWS))) == 9
    assert not (only.run_dir / "writer").exists()
    assert len(asked) == 12
    cost = sweep_results.costs(read_run(only.run_dir))["augment"]
    assert (cost.steps, cost.tokens) == (0, 0)


def test_short_rows_are_neither_imitated_nor_written(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = [{"text": " ".join(f"w{40 + n}" for n in range(2 + k % 6)), "label": k % 2} for k in range(24)]
    train = work / "train.jsonl"
    labels = [json.loads(line)["label"] for line in train.read_text().splitlines()]
    for line, label in zip(lines, labels, strict=False):
        line["label"] = label
    train.write_text("".join(json.dumps(line) + "\n" for line in lines))
    run = opened(work, "augment={rows: 4, min_words: 5, seed: 0}")
    seen: list[Any] = []

    def learn(*arguments: Any, **options: Any) -> Any:
        seen.extend(options["examples"])
        return trained(*arguments, **options)

    trained = augment.train_on_task
    monkeypatch.setattr(augment, "train_on_task", learn)
    texts = iter(["w1 w2 w3 w4", "w1 w2 w3 w4 w5", "w1 w2 w3 w4 w5 w6", ""])
    monkeypatch.setattr(
        augment, "sample",
        lambda *a, **k: [Prediction(n, None, (), next(texts), ended=True) for n in range(len(a[3]))],
    )  # fmt: skip
    assert run.recipe.augment is not None
    rows = list(augment.written_rows(run, run.recipe.augment))
    assert [row["text"] for row in rows] == ["w1 w2 w3 w4 w5", "w1 w2 w3 w4 w5 w6"]
    assert len(seen) == sum(len(str(line["text"]).split()) >= 5 for line in lines) < len(lines)
    with pytest.raises(ArtifactError, match="made with other settings"):  # the writer of all rows is another
        list(augment.written_rows(run, AugmentConfig(rows=4, seed=0)))
    with pytest.raises(DataError, match=r"min_words: .*train\.jsonl: no training row has 8 words; lower it"):
        list(augment.written_rows(opened(work, "name=none"), AugmentConfig(rows=4, min_words=8)))


def test_labels_steer_in_turn(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = pair_run(work)
    seen: list[str] = []

    def record(model: Any, tokenizer: Any, task: Task, examples: Any, **options: Any) -> list[Any]:
        seen.extend(e.prompt.splitlines()[0] for e in examples)
        return [type("P", (), {"text": f"w{n}"}) for n in range(len(examples))]

    monkeypatch.setattr(augment, "sample", record)
    list(augment.written_rows(run, AugmentConfig(rows=10)))
    assert seen == ["Label: yes", "Label: no"] * 5
    assert torch.is_inference_mode_enabled() is False
    assert common.artifact.exists(run.run_dir / "writer")


def test_the_writer_sees_prompts_as_it_was_trained_on_them(
    work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are cut, and the writer's answers are shorter than its task would allow."""
    lines = [
        {"premise": f"w{30 + n // 2} " * 90, "hypothesis": f"w{40 + n}", "label": n % 2} for n in range(12)
    ]
    (work / "train.jsonl").write_text("".join(json.dumps(r) + "\n" for r in lines))
    run = opened(work, f"task={json.dumps(PAIRS.model_dump(mode='json'))}", "data.max_length=100")
    encoded: list[list[Any]] = []
    real = tasks.encode

    def record(*arguments: Any, **options: Any) -> list[Any]:
        encoded.append(real(*arguments, **options))
        return encoded[-1]

    monkeypatch.setattr(augment.tasks, "encode", record)
    list(augment.written_rows(run, AugmentConfig(rows=12, temperature=0.7)))
    trained, _, sampled = ({e.prompt_ids for e in examples} for examples in encoded)
    assert max(map(len, trained)) < 60
    assert sampled <= trained


def test_the_recipe_writes_rows_and_stage_3_learns_them(work: Path) -> None:
    plain = pipeline.run(recipe(work), command="test", quiet=True)
    section = '{"rows": 24, "temperature": 2.0, "seed": 0}'
    wanted = recipe(work, f"augment={section}", "name=more")
    made = pipeline.run(wanted, command="test", quiet=True)
    written, student = (artifact.read_manifest(made.run_dir / n) for n in ("written", "student"))
    rows = read_rows(str(made.run_dir / "written" / augment.WRITTEN_ROWS))
    assert 0 < written["rows"] == len(rows) <= 24
    assert student["inputs"]["written"] == written["key"]
    assert 0 < student["teacher_answered_rows"] <= len(rows)
    assert written["training"]["steps"] > 0
    before = artifact.read_manifest(plain.run_dir / "student")
    assert "written" not in before["inputs"]  # keys of runs without the section stay what they were
    # Finished work is kept, and taken over by a run of another seed, whose rows they are too.
    stamp = (made.run_dir / "written" / "bitdistill.json").stat().st_mtime_ns
    pipeline.run(wanted, command="test", quiet=True)
    assert (made.run_dir / "written" / "bitdistill.json").stat().st_mtime_ns == stamp
    other = recipe(work, f"augment={section}", "name=more", "seed=1")
    later = pipeline.run(other, command="test", quiet=True, reuse=Reuse.of_runs(made.run_dir.parent))
    assert (later.run_dir / "written").is_symlink()
    assert read_run(later.run_dir).manifests["written"]["key"] == written["key"]
    costs = sweep_results.costs(read_run(made.run_dir))
    assert costs["augment"].elapsed_s >= round(written["training"]["elapsed_s"], 2) > 0
    # Damaged rows are not trained on.
    (made.run_dir / "written" / augment.WRITTEN_ROWS).write_bytes(b"")
    with pytest.raises(ArtifactError, match="written"):
        pipeline.run(wanted, command="test", quiet=True, redo=frozenset({"distill"}))


def test_the_plan_counts_written_rows(work: Path) -> None:
    found = check_data(recipe(work, "augment={rows: 100}"))
    work_3 = distilled(found, 32)
    assert work_3 is not None
    assert work_3.rows == 32 + 100
    pairs = pair_run(work).recipe
    data = pairs.data.model_copy(update={"test": pairs.data.train, "validation": None})
    pairs = pairs.model_copy(update={"data": data, "augment": AugmentConfig(texts=(f"{work}/none.txt",))})
    with pytest.raises(DataError, match=r"augment\.texts: .*none\.txt: no such file"):
        check_data(pairs)
    three = PAIRS.model_copy(update={"template": "{premise} {hypothesis} {other}"})
    with pytest.raises(RecipeError, match="the only field or the first of two"):
        check_data(pairs.model_copy(update={"task": three}))


def test_the_papers_method_has_no_written_rows(work: Path) -> None:
    assert recipe(work, "method=paper", "augment={rows: 10}").augment is not None  # a flag wins over a method
    path = work / "with.yaml"
    path.write_text(dump_recipe(recipe(work, "augment={rows: 10}")))
    assert load_recipe(path).augment == AugmentConfig(rows=10)
    assert load_recipe(path, ["method=paper"]).augment is None


def test_the_command_without_a_file_wants_the_recipes_section(work: Path) -> None:
    path = work / "alone.yaml"
    path.write_text(dump_recipe(recipe(work)))
    with pytest.raises(RecipeError, match=r"without --out .* augment section"):
        augment_command(path)
    with pytest.raises(RecipeError, match="without --out"):
        augment_command(path, set_=["augment={rows: 6}"], rows=7)
    augment_command(path, set_=["augment={rows: 6}"], quiet=True)
    assert artifact.exists(work / "runs" / "tiny" / "written")


@pytest.mark.parametrize("filled", [False, True])
def test_long_answers_are_learnt_a_chunk_at_a_time(
    work: Path, monkeypatch: pytest.MonkeyPatch, filled: bool
) -> None:
    """The same loss and gradients as with all logits at once, also where the index is filled up."""
    run = opened(work)
    model, tokenizer = sft.load_source(run.recipe.model, dtype="float32", device="cpu")
    batch = run.task_batches(run.train_examples(tokenizer), run.recipe.sft.loop, 0, False).micro_batches(0)[0]
    if filled:
        batch = batch.with_filled_index(16)
    totals = Totals(batch.rows, batch.tokens, 7)
    found = []
    for limit in (1 << 28, 0):
        monkeypatch.setattr(sft, "LOGITS_AT_ONCE", limit)
        monkeypatch.setattr(sft, "cross_entropy_sum", cross_entropy_sum if limit else None)
        model.zero_grad()
        loss = sft.CrossEntropyStep(model)(batch, totals).loss
        loss.backward()
        found.append((loss.detach(), [p.grad.clone() for p in model.parameters()]))
    torch.testing.assert_close(found[0][0], found[1][0])
    for plain, chunked in zip(found[0][1], found[1][1], strict=True):
        torch.testing.assert_close(plain, chunked, rtol=1e-4, atol=1e-6)
