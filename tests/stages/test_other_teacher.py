"""A teacher that is another model: of another size, family and tokenizer, distilled by its labels alone."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from bitdistill import artifact, pipeline
from bitdistill.config import DistillConfig
from bitdistill.data import tasks
from bitdistill.data.batches import TaskBatches
from bitdistill.data.readers import read_rows
from bitdistill.errors import ArtifactError, DataError, Interrupted, ModelError, RecipeError
from bitdistill.eval import classify
from bitdistill.models.attention import causal_only
from bitdistill.models.forward import final_hidden
from bitdistill.models.load import load_source
from bitdistill.models.student import load_student
from bitdistill.models.surgery import refine
from bitdistill.planning.plan import make_plan
from bitdistill.recipe import dump_recipe, load_recipe, recipe_hash
from bitdistill.report.card import data_fingerprints
from bitdistill.report.run_folder import read_run
from bitdistill.stages import distill, other_teacher, pseudo_labels, sft
from bitdistill.stages.common import Run, pad_token_id
from bitdistill.stages.other_teacher import LabelDistillStep
from bitdistill.stages.reuse import Reuse
from bitdistill.sweep import parallel
from bitdistill.sweep.spec import expand, load_sweep
from bitdistill.train import loop
from bitdistill.train.step import Totals
from tests.models.conftest import make_tokenizer, tiny_model
from tests.readback import NothingReadBack
from tests.stages.conftest import recipe, write_rows

LABELS_ALONE = ("distill.gamma=0", "distill.hidden_weight=0")
TEACHER_VOCAB = 140


def other_tokenizer() -> Any:
    """Words in pieces, `w91` as `w`, `91`, under other ids: label words are of several tokens and share the first."""
    words = [
        "<unk>",
        "<end>",
        "<pad>",
        "w",
        "x",
        "y",
        *(str(n) for n in range(101, -1, -1) if n not in (40, 41)),
    ]
    backend = Tokenizer(models.WordLevel({word: n for n, word in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Whitespace(), pre_tokenizers.Digits(individual_digits=False)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", eos_token="<end>", pad_token="<pad>"
    )


@pytest.fixture
def larger(work: Path) -> Path:
    folder = work / "larger"
    changes = {"vocab_size": TEACHER_VOCAB, "hidden_size": 60, "num_hidden_layers": 4}
    tiny_model("qwen3", seed=7, **changes).save_pretrained(folder)
    other_tokenizer().save_pretrained(folder)
    return folder


def taught(work: Path, *overrides: str) -> Any:
    return recipe(work, f"teacher.path={work}/larger", *LABELS_ALONE, "bitnet_sft=null", *overrides)


def opened(work: Path, *overrides: str) -> Run:
    return Run.open(taught(work, *overrides), command="test", quiet=True)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_student(folder)[0].state_dict()


def test_a_whole_run(work: Path, larger: Path) -> None:
    result = pipeline.run(taught(work), command="test", quiet=True)
    run_dir = result.run_dir
    configs = [json.loads((run_dir / name / "config.json").read_text()) for name in ("teacher", "student")]
    assert [(c["model_type"], c["hidden_size"], c["vocab_size"]) for c in configs] == [
        ("qwen3", 60, TEACHER_VOCAB),
        ("llama", 44, 101),
    ]
    assert [(r.name, r.label, r.n) for r in result.rows] == [
        ("teacher", "Teacher (larger, full precision)", 12),
        ("bitdistill", "BitDistill student", 12),
    ]
    assert "agreement_with_teacher" in result.rows[1].metrics
    student, scores = (artifact.read_manifest(run_dir / name) for name in ("student", "label_scores"))
    assert student["inputs"]["distilled"] == "labels"
    assert (student["distilled_layers"], student["final_gamma"]) == ([], 0.0)
    assert scores["rows"] == 32
    last = json.loads((run_dir / "logs/distill.jsonl").read_text().splitlines()[-1])
    assert last["loss"] == pytest.approx(last["ce"] + 10 * last["ld"], rel=1e-4)
    assert "ad" not in last
    assert last["ld"] > 0
    # Reports name the teacher, and do not take its source for the student's.
    assert "distilled from larger to 1.58-bit" in (run_dir / "report.html").read_text("utf-8")
    assert f"taught by `{larger}`" in (run_dir / "packed/README.md").read_text("utf-8")
    found = data_fingerprints(read_run(run_dir))
    assert found["teacher's source model"] == artifact.read_manifest(run_dir / "teacher")["inputs"]["model"]
    assert found["source model"] == artifact.read_manifest(run_dir / "refined")["inputs"]["model"]
    assert found["source model"] != found["teacher's source model"]


def test_scores_are_those_of_prediction(work: Path, larger: Path) -> None:
    write_rows(work / "extra.jsonl", 9, 5)
    run = opened(work, f"data.unlabelled={work}/extra.jsonl")
    folder = sft.sft(run)
    train, others = other_teacher.label_scores(run, folder, None)
    teacher, tokenizer = load_source(
        run.recipe.teacher_source.model_copy(update={"path": str(folder)}), dtype="float32"
    )
    task = run.recipe.task
    assert [len(ids) for ids in tasks.label_token_ids(task, tokenizer)] == [2, 2]
    for scores, name in ((train, "train"), (others, "extra")):
        examples = tasks.encode(task, read_rows(f"{work}/{name}.jsonl"), tokenizer, 32)
        predictions = classify.classify(
            teacher, tokenizer, task, examples, batch_rows=8, device="cpu", pad_id=pad_token_id(tokenizer)
        )
        torch.testing.assert_close(scores, torch.tensor([p.scores for p in predictions]))
    # The student's rows without answers get the labels of the highest scores, in its own tokens.
    own = make_tokenizer()
    answered = other_teacher.answered_examples(run, own, None, others)
    assert [e.label for e in answered] == others.argmax(1).tolist()
    assert {e.answer_ids for e in answered} <= {(90,), (91,)}
    rows = pseudo_labels.unlabelled_rows(run, None)
    assert [e.where for e in answered] == [row.where for row in rows]
    assert not any("label" in row.fields for row in rows)


LABEL_IDS = {
    "one token": [(90,), (91,)],
    "shared first token": [(90, 91), (90, 92, 93), (94,)],
    "with an end": [(90, 1), (91, 1)],
}


def lesson(label_ids: list[tuple[int, ...]], packing: bool) -> tuple[Any, Any, Any, torch.Tensor]:
    """Student, examples, batch and the teacher's scores of its rows."""
    student = refine(tiny_model("llama_tied"), gains="ones")
    rng = torch.Generator().manual_seed(0)
    examples = []
    for n in range(5):
        prompt = tuple(torch.randint(3, 90, (3 + 4 * n,), generator=rng).tolist())
        label = n % len(label_ids)
        examples.append(tasks.Example(prompt, label_ids[label], label, (), "", f"row {n}"))
    scores = torch.randn(5, len(label_ids), generator=rng)
    batches = TaskBatches(
        examples, batch_rows=5, seed=0, pad_id=2, packing=packing, label_scores_NC=scores
    )  # fmt: skip
    batch = batches.micro_batches(0)[0]
    assert batch.label_scores_BC is not None
    assert torch.equal(batch.label_scores_BC, scores[batch.indices])
    return student, examples, batch, scores


@pytest.mark.parametrize("layout", ["padded", "filled", "packed"])
@pytest.mark.parametrize("words", LABEL_IDS)
def test_the_step_distils_the_distribution_that_prediction_uses(words: str, layout: str) -> None:
    """Scores as eval.classify gives them; loss and gradients as from one plain forward pass a row and label."""
    label_ids = LABEL_IDS[words]
    student, examples, batch, scores = lesson(label_ids, layout == "packed")
    if layout == "filled":
        batch = batch.with_filled_index(16)
    config = DistillConfig.model_validate({"gamma": 0, "hidden_weight": 0, "lambda": 3.0, "temperature": 2.0})
    step = LabelDistillStep(student, label_ids, config)
    with causal_only(student, packed=layout == "packed"):
        hidden = final_hidden(student, batch.input_ids_BT, **batch.packing)
        found = step.label_scores(batch, hidden).detach()
        output = step(batch, Totals(5, batch.tokens, sum(len(e.answer_ids) for e in examples)))
    output.loss.backward()
    grads = {name: p.grad.clone() for name, p in student.named_parameters() if p.grad is not None}
    student.eval()
    want = classify.label_scores(student, label_ids, examples, batch_rows=3, device="cpu", pad_id=2)
    torch.testing.assert_close(found, want[batch.indices], rtol=1e-4, atol=1e-4)

    student.zero_grad()
    ce = kl = torch.zeros(())
    for example, targets in zip(examples, scores, strict=True):
        own = []
        for ids in label_ids:
            tokens = torch.tensor([[*example.prompt_ids, *ids]])
            log_p = student(tokens).logits[0].log_softmax(-1)
            start = len(example.prompt_ids) - 1
            own.append(sum((log_p[start + k, t] for k, t in enumerate(ids)), torch.zeros(())))
        assert example.label is not None
        ce = ce - own[example.label]
        p, q = (x / 2.0 for x in (targets, torch.stack(own)))
        p, q = (x.exp() / x.exp().sum() for x in (p, q))
        kl = kl + (p * (p / q).log()).sum()
    plain = ce / sum(len(e.answer_ids) for e in examples) + 3.0 * kl / 5
    plain.backward()
    torch.testing.assert_close(output.loss.detach(), plain.detach(), rtol=1e-4, atol=1e-5)
    for name, p in student.named_parameters():
        torch.testing.assert_close(grads[name], p.grad, rtol=2e-3, atol=2e-4)


@pytest.mark.parametrize("words", LABEL_IDS)
def test_a_step_that_may_be_replayed_reads_nothing_back(words: str) -> None:
    student, _, batch, _ = lesson(LABEL_IDS[words], False)
    config = DistillConfig.model_validate({"gamma": 0, "hidden_weight": 0})
    step = LabelDistillStep(student, LABEL_IDS[words], config)
    assert step.replayable
    totals = Totals(*(torch.tensor(float(n)) for n in (5, batch.tokens, 5)))
    with causal_only(student), NothingReadBack():
        step(batch.with_filled_index(16), totals).loss.backward()


def test_lambda_0_is_cross_entropy_alone() -> None:
    student, _, batch, _ = lesson(LABEL_IDS["one token"], False)
    totals = Totals(5, batch.tokens, 5)
    config = DistillConfig.model_validate({"gamma": 0, "hidden_weight": 0, "lambda": 0})
    output = LabelDistillStep(student, LABEL_IDS["one token"], config)(batch, totals)
    torch.testing.assert_close(output.loss, sft.CrossEntropyStep(student)(batch, totals).loss)
    assert "ld" not in output.metrics


@pytest.mark.parametrize("best", [0, 1])
def test_the_student_learns_what_the_teacher_says(
    work: Path, larger: Path, monkeypatch: pytest.MonkeyPatch, best: int
) -> None:
    """Without cross-entropy a student answers as its teacher, whatever the rows' own labels are."""

    def says(run: Run, teacher: Any, tokenizer: Any, rows: Any) -> torch.Tensor:
        return torch.tensor([[0.0, -6.0] if best == 0 else [-6.0, 0.0]]).repeat(len(rows), 1)

    monkeypatch.setattr(other_teacher, "_scores", says)
    options = ("distill.ce_weight=0", "distill.epochs=6", "distill.optim.learning_rate=3e-3", "pretrain=null")
    result = pipeline.run(taught(work, *options), until="eval", quiet=True)
    lines = (result.run_dir / "predictions/bitdistill.jsonl").read_text().splitlines()
    assert {json.loads(line)["prediction"] for line in lines} == {"ab"[best]}


def test_scores_are_kept_and_shared(work: Path, larger: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = pipeline.run(taught(work), until="distill", quiet=True)
    before = weights(first.run_dir / "student")
    key = artifact.read_manifest(first.run_dir / "label_scores")["key"]
    scored = other_teacher._scores

    def not_again(*_: object) -> torch.Tensor:
        raise AssertionError("scored again")

    monkeypatch.setattr(other_teacher, "_scores", not_again)
    # Stage 3 alone again, and a sibling run with another loss, take the scores that are there.
    pipeline.run(taught(work), until="distill", redo=frozenset({"distill"}), quiet=True)
    after = weights(first.run_dir / "student")
    assert all(torch.equal(before[name], after[name]) for name in before)
    reuse = Reuse.of_runs(first.run_dir.parent)
    other = pipeline.run(
        taught(work, "name=other", "distill.lambda=2"), until="distill", quiet=True, reuse=reuse
    )
    assert (other.run_dir / "label_scores").is_symlink()
    changed = weights(other.run_dir / "student")
    assert not all(torch.equal(before[name], changed[name]) for name in before)
    # Damaged scores are not learnt.
    file = first.run_dir / "label_scores" / other_teacher.SCORES
    content = file.read_bytes()
    file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(ArtifactError, match=r"scores\.safetensors: SHA-256 differs"):
        pipeline.run(taught(work), until="distill", redo=frozenset({"distill"}), quiet=True)
    file.write_bytes(content)
    # A teacher that is made again scores again.
    monkeypatch.setattr(other_teacher, "_scores", scored)
    again = taught(work, "sft.epochs=2")
    pipeline.run(again, until="distill", redo=frozenset({"sft"}), quiet=True)
    assert artifact.read_manifest(first.run_dir / "label_scores")["key"] != key


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("distill.gamma=auto", r"distill\.gamma: auto, .*larger\): attention .*; set distill\.gamma: 0, or"),
        ("distill.gamma=1e5", r"distill\.gamma: 100000\.0, .*; set distill\.gamma: 0, or teacher: null"),
        ("distill.hidden_weight=1", r"distill\.hidden_weight: 1\.0, .*; set distill\.hidden_weight: 0, or"),
        ("distill.distilled_tokens=all", r"distilled_tokens: all, .*; set distill\.distilled_tokens: answer"),
        ("method=paper", r"method: paper, .*; set method: bitdistill, or teacher: null"),
        (
            "task={name: g, kind: generation, template: '{text} w9', target_field: label}",
            r"task\.kind: generation, .*labels, not answers; set task\.kind: classification, or teacher: null",
        ),
    ],
)
def test_what_another_teacher_cannot_give_is_refused(work: Path, override: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        taught(work, override)


def test_layers_are_not_probed(work: Path, larger: Path) -> None:
    with pytest.raises(RecipeError, match=r"^teacher: .*larger: layers of another model .*teacher: null"):
        pipeline.probe_layers(taught(work), quiet=True)


def test_the_students_label_words_are_looked_at_before_any_training(work: Path, larger: Path) -> None:
    """The teacher's tokenizer knows both words, the student's none."""
    words = ("task.labels.a=' x'", "task.labels.b=' y'")
    with pytest.raises(DataError, match="same token ids"):
        sft.sft(opened(work, *words))
    assert not (work / "runs/tiny/logs").exists()


def test_without_another_teacher_nothing_is_new(work: Path, larger: Path) -> None:
    plain, null = recipe(work), recipe(work, "teacher=null")
    assert plain == null
    assert "teacher" not in plain.model_dump(mode="json")
    assert recipe_hash(plain) == recipe_hash(null) != recipe_hash(taught(work))
    path = work / "again.yaml"
    for wanted in (plain, taught(work)):
        path.write_text(dump_recipe(wanted))
        assert load_recipe(path) == wanted
    result = pipeline.run(recipe(work, "bitnet_sft=null", "pretrain=null"), until="distill", quiet=True)
    assert not (result.run_dir / "label_scores").exists()
    inputs = {
        name: artifact.read_manifest(result.run_dir / name)["inputs"] for name in ("teacher", "student")
    }
    rows = {"task", "train", "limit_train", "validation_fraction", "max_length"}
    assert inputs["teacher"].keys() == {"model", "sft", "seed"} | rows
    assert inputs["student"].keys() == {"start", "teacher", "distill", "seed"} | rows


def test_the_students_own_model_as_teacher_is_another_loss(work: Path) -> None:
    own = pipeline.run(recipe(work, *LABELS_ALONE, "pretrain=null"), until="distill", quiet=True)
    named = recipe(work, f"teacher.path={work}/model", *LABELS_ALONE, "pretrain=null", "name=named")
    reuse = Reuse.of_runs(own.run_dir.parent)
    labels = pipeline.run(named, until="distill", quiet=True, reuse=reuse)
    assert (labels.run_dir / "teacher").is_symlink()  # the same work
    assert not (labels.run_dir / "student").is_symlink()


def test_plan_reads_the_teacher(work: Path, larger: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = make_plan(recipe(work, *LABELS_ALONE, "bitnet_sft=null"), "cpu")
    plan = make_plan(taught(work), "cpu")
    assert plan.teacher is not None
    assert plan.as_json()["teacher"] == {
        "path": str(larger),
        "family": "qwen3",
        "layers": 4,
        "parameters": plan.teacher.parameters,
    }
    assert "teacher" not in plain.as_json()
    assert (plan.layout, plan.packed) == (plain.layout, plain.packed)
    before, after = ({s.name: s for s in p.stages} for p in (plain, plan))
    assert after["sft"].memory["weights"] == 4 * plan.teacher.parameters > before["sft"].memory["weights"]
    assert "teacher" in before["distill"].memory
    assert "teacher" not in after["distill"].memory  # not beside the student
    assert after["distill"].tokens > before["distill"].tokens  # but once over all rows
    assert after["eval"].seconds > before["eval"].seconds
    assert after["pretrain"] == before["pretrain"]
    with pytest.raises(ModelError, match=r"^teacher\.path: .*none: no such folder"):
        make_plan(recipe(work, f"teacher.path={work}/none", *LABELS_ALONE), "cpu")
    with pytest.raises(RecipeError, match=r"^data\.max_length: 200, the model has 128 positions"):
        make_plan(taught(work, "data.max_length=200"), "cpu")
    config = larger / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "max_position_embeddings": 31}))
    with pytest.raises(RecipeError, match=r"^data\.max_length: 32, the teacher has 31 positions"):
        make_plan(taught(work), "cpu")
    with pytest.raises(DataError, match=r"^teacher's tokenizer: .*same token ids"):
        make_plan(taught(work, "data.max_length=31", "task.labels.a=' w40'", "task.labels.b=' w41'"), "cpu")


def test_sweeps_localise_the_teacher_and_make_it_apart(work: Path, larger: Path) -> None:
    (work / "sweep.yaml").write_text(
        "name: size\nrecipes: [recipe.yaml]\nset: {bitnet_sft: null, distill.gamma: 0, distill.hidden_weight: 0}\n"
        "cells:\n  - {name: own}\n  - {name: larger, set: {teacher.path: owner/large}}\n"
        "  - {name: beside, set: {teacher.path: ./larger}}\n"
    )
    sweep = load_sweep(work / "sweep.yaml")
    own, far, beside = expand(sweep, work, local={"owner/large": str(larger)})
    assert own.recipe.teacher is None
    assert far.recipe.teacher is not None
    assert beside.recipe.teacher is not None
    assert far.recipe.teacher.path == beside.recipe.teacher.path == str(larger)
    assert far.digest == beside.digest != own.digest
    names = [job.name for job in parallel.plan_jobs([own, far, beside], on_gpu=False)]
    assert sum("--sft-" in name for name in names) == 2
    assert sum(name.startswith("base-") for name in names) == 1


def test_an_interrupted_stage_goes_on_with_the_scores_that_are_there(
    work: Path, larger: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = pipeline.run(taught(work, "name=whole", "pretrain=null"), until="distill", quiet=True)
    pipeline.run(taught(work, "pretrain=null"), until="sft", quiet=True)
    calls, rate = 0, loop.learning_rate_at

    def interrupting(*arguments: Any) -> float:
        nonlocal calls
        calls += 1
        if calls == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return rate(*arguments)

    monkeypatch.setattr(loop, "learning_rate_at", interrupting)
    with pytest.raises(Interrupted, match="distill: stopped by signal"):
        pipeline.run(taught(work, "pretrain=null"), until="distill", quiet=True)
    monkeypatch.setattr(other_teacher, "_scores", None)
    resumed = pipeline.run(taught(work, "pretrain=null"), until="distill", quiet=True)
    first, second = weights(whole.run_dir / "student"), weights(resumed.run_dir / "student")
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_scores_of_another_teacher_of_equal_settings_are_not_taken(work: Path, larger: Path) -> None:
    """A teacher made again with the same settings need not be the same: its contents are in the key."""
    run = opened(work)
    folder = sft.sft(run)
    train, others = other_teacher.label_scores(run, folder, None)
    assert (train.shape, train.dtype, others.shape) == ((32, 2), torch.float32, (0, 2))
    manifest = artifact.read_manifest(folder)
    manifest["files"]["model.safetensors"]["sha256"] = "0" * 64
    (folder / artifact.MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(ArtifactError, match=r"label_scores: made with other settings .*use --redo distill"):
        other_teacher.label_scores(run, folder, None)


def test_every_row_of_stage_3_has_its_own_scores(
    work: Path, larger: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_rows(work / "extra.jsonl", 9, 5)
    seen: list[dict[str, Any]] = []

    def learn(*arguments: Any, **options: Any) -> Any:
        seen.append(options)
        return sft.train_on_task(*arguments, **options)

    monkeypatch.setattr(distill, "train_on_task", learn)
    options = (f"data.unlabelled={work}/extra.jsonl", "augment={rows: 12, temperature: 2.0}", "pretrain=null")
    result = pipeline.run(taught(work, *options), until="distill", quiet=True)
    written = read_rows(str(result.run_dir / "written" / "rows.jsonl.zst"))
    sources = [read_rows(f"{work}/train.jsonl"), read_rows(f"{work}/extra.jsonl"), written]
    rows = [row for source in sources for row in source]
    assert [e.where for e in seen[0]["examples"]] == [row.where for row in rows]
    teacher, tokenizer = distill.load_teacher(opened(work, *options), result.run_dir / "teacher")
    examples = tasks.encode(taught(work).task, rows, tokenizer, 32, require_answers=False)
    ids = tasks.label_token_ids(taught(work).task, tokenizer)
    want = classify.label_scores(teacher, ids, examples, batch_rows=8, device="cpu", pad_id=2)
    torch.testing.assert_close(seen[0]["label_scores_NC"], want)
    assert [e.label for e in seen[0]["examples"][32:]] == want[32:].argmax(1).tolist()
    manifest = artifact.read_manifest(result.run_dir / "student")
    assert manifest["teacher_answered_rows"] == len(rows) - 32
    # The writer is the student's model, fine-tuned.
    writer = json.loads((result.run_dir / "writer/config.json").read_text())
    assert writer["model_type"] == "llama"
