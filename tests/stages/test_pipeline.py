"""The whole pipeline on a tiny model: artifacts, skipping, resuming, caching, refusals."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

import bitdistill as bd
from bitdistill import artifact, pipeline
from bitdistill.data.corpus import tokenize_corpus
from bitdistill.errors import (
    ArtifactError,
    DataError,
    Interrupted,
    MissingDependencyError,
    ModelError,
    RecipeError,
    StorageError,
)
from bitdistill.losses.logits import language_model_chunk
from bitdistill.models.load import load_tokenizer
from bitdistill.models.student import load_student, pack
from bitdistill.planning.check import check_data
from bitdistill.quant.linear import BitLinear, PackedBitLinear
from bitdistill.report.run_folder import read_run
from bitdistill.report.sweep_results import costs
from bitdistill.stages import common, kernels, pretrain, refine, sft
from bitdistill.stages.common import Run
from bitdistill.stages.export import export_base
from bitdistill.train import loop
from tests.models.conftest import tiny_model
from tests.stages.conftest import recipe, write_rows


def ids(seed: int = 0) -> torch.Tensor:
    return torch.randint(3, 100, (3, 11), generator=torch.Generator().manual_seed(seed))


def latents(folder: Path) -> dict[str, torch.Tensor]:
    model, _, _ = load_student(folder)
    return {k: v.clone() for k, v in model.state_dict().items()}


def test_a_whole_run_and_what_it_leaves(work: Path) -> None:
    result = pipeline.run(recipe(work), command="test", quiet=True)
    run_dir = work / "runs/tiny"
    assert [r.name for r in result.rows] == ["teacher", "bitnet_sft", "bitdistill"]
    for row in result.rows:
        assert row.n == 12
        assert row.low <= row.value <= row.high
        assert row.size_bytes == (run_dir / _folder(row.name) / "model.safetensors").stat().st_size
        lines = (run_dir / f"predictions/{row.name}.jsonl").read_text().splitlines()
        assert sum(json.loads(line)["correct"] for line in lines) / 12 * 100 == pytest.approx(row.value)
    assert result.rows[2].size_bytes < result.rows[0].size_bytes  # type: ignore[operator]
    assert result.report is not None
    assert "parity" in result.report.read_text("utf-8")
    assert (run_dir / "packed/README.md").exists()
    for name in ("teacher", "refined", "student", "bitnet_sft", "packed", "bitnet_sft_packed"):
        artifact.verify(run_dir / name)
    assert not any((run_dir / "checkpoints").glob("*/step-*"))  # nothing is left of finished stages
    for stage in ("sft", "pretrain", "distill", "bitnet_sft"):
        last = json.loads((run_dir / f"logs/{stage}.jsonl").read_text().splitlines()[-1])
        assert last["step"] == last["steps"]

    # packed student = trained student, bit for bit, once the floats are rounded alike
    student, _, _ = load_student(run_dir / "student")
    packed, _, manifest = load_student(run_dir / "packed")
    with torch.no_grad():
        assert torch.equal(pack(student, "bfloat16")(ids()).logits, packed(ids()).logits)
    assert manifest["kind"] == "packed"
    assert sum(isinstance(m, PackedBitLinear) for m in packed.modules()) == 3 * 7

    # transformers reads it once bitdistill is imported, without remote code
    from transformers import AutoModelForCausalLM

    again = AutoModelForCausalLM.from_pretrained(run_dir / "packed")
    with torch.no_grad():
        assert torch.equal(again(ids()).logits, packed(ids()).logits)
    assert type(bd.load(run_dir / "packed")) is type(again)


def _folder(name: str) -> str:
    return {"teacher": "teacher", "bitnet_sft": "bitnet_sft_packed", "bitdistill": "packed"}[name]


def test_a_second_process_at_the_same_run_waits(work: Path, caplog: pytest.LogCaptureFixture) -> None:
    chosen = recipe(work, "sft.loop.log_every_steps=1", "sft.loop.checkpoint_every_steps=1")
    start = threading.Barrier(2)

    def go(_: int) -> pipeline.RunResult:
        start.wait()
        return pipeline.run(chosen, until="sft", quiet=True)

    with ThreadPoolExecutor(2) as pool:  # locks are by thread
        list(pool.map(go, range(2)))
    lines = (work / "runs/tiny/logs/sft.jsonl").read_text("utf-8").splitlines()
    steps = [json.loads(line)["step"] for line in lines]
    assert steps == sorted(set(steps)), "both trained the stage"
    assert any("another process is at it; waiting" in record.message for record in caplog.records)
    assert not list((work / "runs").glob("*.lock"))


def test_finished_stages_are_not_run_again(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = pipeline.run(recipe(work), quiet=True)
    before = latents(work / "runs/tiny/student")

    def no_training(*_: object, **__: object) -> None:
        raise AssertionError("trained again")

    for stage in ("sft", "pretrain"):  # all modules that call it
        monkeypatch.setattr(f"bitdistill.stages.{stage}.fit", no_training)
    second = pipeline.run(recipe(work), quiet=True)
    assert [r.predictions_sha256 for r in first.rows] == [r.predictions_sha256 for r in second.rows]
    after = latents(work / "runs/tiny/student")
    assert all(torch.equal(before[k], after[k]) for k in before)


def test_same_seed_gives_the_same_student_and_another_seed_another(work: Path) -> None:
    weights = []
    for name, seed in (("one", 0), ("two", 0), ("three", 1)):
        options = (
            f"name={name}",
            f"seed={seed}",
            f"pretrain.cache_dir={work}/cache-{name}",
            "bitnet_sft=null",
        )
        result = pipeline.run(recipe(work, *options), until="distill", quiet=True)
        weights.append(latents(result.run_dir / "student"))
    assert all(torch.equal(weights[0][k], weights[1][k]) for k in weights[0])
    assert not all(torch.equal(weights[0][k], weights[2][k]) for k in weights[0])


def test_changed_settings_never_overwrite_unasked(work: Path) -> None:
    pipeline.run(recipe(work), until="sft", quiet=True)
    before = (work / "runs/tiny/teacher/model.safetensors").read_bytes()
    with pytest.raises(ArtifactError, match=r"sft\.epochs 1\.0 -> 2\.0.*--redo sft"):
        pipeline.run(recipe(work, "sft.epochs=2"), until="sft", quiet=True)
    assert (work / "runs/tiny/teacher/model.safetensors").read_bytes() == before
    pipeline.run(recipe(work, "sft.epochs=2"), until="sft", redo=frozenset({"sft"}), quiet=True)
    assert (work / "runs/tiny/teacher/model.safetensors").read_bytes() != before


def test_generation_artifacts_of_the_old_cut_are_not_taken_for_new_ones(work: Path) -> None:
    task = "task={name: g, kind: generation, template: '{text} w9', target_field: label, max_new_tokens: 4}"
    generation, classification = (
        common.Run.open(recipe(work, *options), command="test", quiet=True).train_inputs()
        for options in ((task,), ())
    )
    assert generation["prompts"] == "cut for max_new_tokens"
    assert "prompts" not in classification  # where the rows are what they were, so are the keys


def test_redo_makes_what_depends_on_it_again(work: Path) -> None:
    assert pipeline.dependent_stages(frozenset({"distill"})) == {"distill", "export", "eval", "report"}
    assert "bitnet_sft" not in pipeline.dependent_stages(frozenset({"sft"}))
    pipeline.run(recipe(work, "bitnet_sft=null"), until="export", quiet=True)
    teacher = (work / "runs/tiny/teacher/model.safetensors").stat().st_mtime_ns
    changed = recipe(work, "bitnet_sft=null", "distill.lambda=1")
    result = pipeline.run(changed, until="export", redo=frozenset({"distill"}), quiet=True)
    manifest = artifact.read_manifest(result.run_dir / "packed")
    assert manifest["recipe"]["distill"]["lambda"] == 1.0
    assert (work / "runs/tiny/teacher/model.safetensors").stat().st_mtime_ns == teacher


def test_the_base_is_shared_by_tasks_and_knows_nothing_of_them(work: Path) -> None:
    pipeline.run(recipe(work), until="pretrain", quiet=True)
    bases = list((work / "cache/bases").iterdir())
    assert len(bases) == 1
    stamp = (bases[0] / "model.safetensors").stat().st_mtime_ns
    write_rows(work / "train.jsonl", 20, 7)  # another task
    pipeline.run(recipe(work, "name=other", 'task.template="{text} w8"'), until="distill", quiet=True)
    assert list((work / "cache/bases").iterdir()) == bases
    assert (bases[0] / "model.safetensors").stat().st_mtime_ns == stamp
    assert json.loads((work / "runs/other/base.json").read_text())["path"] == str(bases[0].resolve())


def test_tokens_and_base_of_a_run_at_the_same_time_are_taken(
    work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another process that makes them holds the lock; what it made by then is used, not made and written again."""
    pipeline.run(recipe(work), until="pretrain", quiet=True)
    (work / "cache").rename(work / "made")
    real, taken = artifact.locked, []

    def after_the_other(folder: Path) -> Any:
        if Path(folder).is_relative_to(work / "runs"):  # the run's own
            return real(folder)
        made = work / "made" / Path(folder).relative_to(work / "cache")
        shutil.copytree(made, folder)
        taken.append(made.parent.name)
        return real(folder)

    def no_work(*_: object, **__: object) -> None:
        raise AssertionError("made again")

    pipeline.run(recipe(work, "name=other"), until="refine", quiet=True)  # tokenizes, for its calibration
    shutil.rmtree(work / "cache")
    monkeypatch.setattr(artifact, "locked", after_the_other)
    monkeypatch.setattr(refine, "tokenize_corpus", no_work)
    monkeypatch.setattr(pretrain, "fit", no_work)
    result = pipeline.run(recipe(work, "name=other"), until="pretrain", stats=False, quiet=True)
    assert taken == ["tokens", "bases"]
    assert result.base is not None
    artifact.verify(result.base)


def test_stage_3_starts_bit_identical_to_the_end_of_stage_2(
    work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Trap 2 of docs/method.md: SubLN gains (here calibrated, so not 1) survive between the stages."""
    pipeline.run(recipe(work), until="pretrain", quiet=True)
    (base,) = (work / "cache/bases").iterdir()
    want = latents(base)
    started: dict[str, torch.Tensor] = {}

    def capture(model: torch.nn.Module, *_: object, **__: object) -> loop.FitResult:
        started.update({k: v.detach().clone() for k, v in model.state_dict().items()})
        return loop.FitResult(1, 1, 0.1, 0, 0.0)

    pipeline.run(recipe(work), until="sft", quiet=True)
    monkeypatch.setattr(sft, "fit", capture)
    pipeline.run(recipe(work), until="distill", quiet=True)
    assert started.keys() == want.keys()
    assert all(torch.equal(started[k], want[k]) for k in want)
    assert any("subln" in k and not torch.equal(v, torch.ones_like(v)) for k, v in started.items())


@pytest.mark.parametrize(
    "overrides",
    [
        ("method=paper",),
        ("pretrain.objective=lm", "refine.gains=ones"),
        ("pretrain.objective=mix", "pretrain.ternary_warmup_fraction=0.5"),
        ("refine.subln=every_linear",),
        ("refine.subln=none", "distill.distilled_tokens=all", "distill.tau_squared=true"),
        (
            "distill.relation.form=cosine",
            "distill.relation.heads=2",
            "distill.relation.layer=-1",
            "distill.gamma=3",
        ),
        ("distill.relation.layer=[0, 2]",),
        ("distill.gamma=0", "distill.lambda=0"),
        ("pretrain=null",),
        ("pretrain.loop.gradient_checkpointing=true", "distill.loop.gradient_checkpointing=true"),
        ("sft.loop.packing=true", "distill.loop.packing=true", "bitnet_sft.loop.packing=true"),
        ("refine.quantize_activations=false",),
    ],
)
def test_every_ablation_is_a_flag(work: Path, overrides: tuple[str, ...]) -> None:
    result = pipeline.run(recipe(work, *overrides, "bitnet_sft=null"), until="distill", quiet=True)
    log = [json.loads(line) for line in (result.run_dir / "logs/distill.jsonl").read_text().splitlines()]
    assert all(torch.isfinite(torch.tensor(entry["loss"])) for entry in log)
    assert ("ad" in log[-1]) == ("distill.gamma=0" not in overrides)
    assert ("ld" in log[-1]) == ("distill.lambda=0" not in overrides)


def test_interrupted_run_goes_on_and_ends_the_same(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = pipeline.run(recipe(work, "name=whole"), until="distill", quiet=True)
    real, calls = loop.learning_rate_at, []

    def interrupting(step: int, total: int, optim: object) -> float:
        calls.append(step)
        if len(calls) in (2, 7):
            os.kill(os.getpid(), signal.SIGINT)
        return real(step, total, optim)  # type: ignore[arg-type]

    monkeypatch.setattr(loop, "learning_rate_at", interrupting)
    for _ in range(2):
        with pytest.raises(Interrupted) as caught:
            pipeline.run(recipe(work), until="distill", quiet=True)
        assert caught.value.exit_code == 130
    pipeline.run(recipe(work), until="distill", quiet=True)
    first, second = latents(whole.run_dir / "student"), latents(work / "runs/tiny/student")
    assert all(torch.equal(first[k], second[k]) for k in first)


def test_given_base_of_another_model_is_refused(work: Path) -> None:
    pipeline.run(recipe(work), until="pretrain", quiet=True)
    (base,) = (work / "cache/bases").iterdir()
    tiny_model("llama_tied", seed=5).save_pretrained(work / "model")
    with pytest.raises(ArtifactError, match="another model"):
        pipeline.run(recipe(work, "name=b", f"pretrain.base={base}"), until="pretrain", quiet=True)
    with pytest.raises(ArtifactError, match="no artifact here"):
        pipeline.run(recipe(work, "name=c", f"pretrain.base={work}/model"), until="pretrain", quiet=True)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("refine.subln=none", 'refine.subln: "paper" (the recipe: "none")'),
        (
            "refine.quantize_activations=false",
            "refine.quantize_activations: true (the recipe: false)",
        ),
        ("refine.gains=ones", 'refine.gains: "calibrated" (the recipe: "ones")'),
        ("pretrain.objective=lm", 'pretrain.objective: "kl" (the recipe: "lm")'),
        ("pretrain.hidden_weight=0", "pretrain.hidden_weight: 1.0 (the recipe: 0.0)"),
        (
            "method=paper",
            'refine.gains: "calibrated" (the recipe: "ones"), pretrain.objective: "kl" (the recipe: "lm"), '
            "pretrain.hidden_weight: 1.0 (the recipe: 0.0); take the base's values",
        ),
    ],
)
def test_a_base_that_is_not_the_recipes_is_refused(work: Path, override: str, message: str) -> None:
    result = pipeline.run(recipe(work), until="pretrain", quiet=True)
    other = recipe(work, "name=b", f"pretrain.base={result.base}", override)
    for check in (lambda: check_data(other), lambda: pipeline.run(other, until="pretrain", quiet=True)):
        with pytest.raises(ArtifactError, match=re.escape(f"made with {message}")):
            check()
    if override.startswith("refine"):  # which a start brings as well
        with pytest.raises(ArtifactError, match=f"pretrain.start: .*made with {re.escape(message)}"):
            check_data(recipe(work, "name=c", f"pretrain.start={result.base}", override))


def test_the_losses_of_stage_3_add_up(work: Path) -> None:
    weights = ("distill.ce_weight=0.5", "distill.lambda=7", "distill.gamma=3", "distill.hidden_weight=0.25")
    result = pipeline.run(
        recipe(work, *weights, "distill.prompt_weight=2", "bitnet_sft=null"), until="distill", quiet=True
    )
    log = [json.loads(line) for line in (result.run_dir / "logs/distill.jsonl").read_text().splitlines()]
    assert log
    for entry in log:
        assert min(entry[name] for name in ("ce", "ld", "ad", "hidden", "prompt")) > 0
        terms = (0.5, "ce"), (7, "ld"), (3, "ad"), (0.25, "hidden"), (2, "prompt")
        assert entry["loss"] == pytest.approx(sum(w * entry[name] for w, name in terms), rel=1e-4)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_a_copied_base_serves_elsewhere(work: Path, dtype: str) -> None:
    result = pipeline.run(recipe(work), until="pretrain", quiet=True)
    assert result.base is not None
    copy = export_base(result.base, work / "copy", dtype)
    assert export_base(result.base, copy, dtype) == copy  # there already, and the same
    exact, rounded = latents(result.base), latents(copy)
    same_key = artifact.read_manifest(copy)["key"] == artifact.read_manifest(result.base)["key"]
    assert same_key == (dtype == "float32")
    for name, tensor in exact.items():
        assert rounded[name].dtype == tensor.dtype == torch.float32
        want = tensor if dtype == "float32" else tensor.half().float()
        assert torch.equal(rounded[name], want)
    sizes = [(folder / "model.safetensors").stat().st_size for folder in (result.base, copy)]
    assert sizes[1] < (1.01 if dtype == "float32" else 0.6) * sizes[0]
    shutil.rmtree(work / "cache")
    (work / "corpus.txt").unlink()  # nothing reads it then
    other = pipeline.run(recipe(work, "name=other", f"pretrain.base={copy}"), until="distill", quiet=True)
    assert other.base == copy
    started = artifact.read_manifest(other.run_dir / "student")["inputs"]["start"]
    assert started == artifact.read_manifest(copy)["key"]


def test_stage_2_goes_on_from_a_base(work: Path) -> None:
    first = pipeline.run(recipe(work), until="pretrain", quiet=True)
    assert first.base is not None
    copy = export_base(first.base, work / "copy", "float32")
    before = artifact.read_manifest(copy)
    more = ("name=more", f"pretrain.start={copy}", "pretrain.optim.learning_rate=1e-9")
    second = pipeline.run(recipe(work, *more), until="pretrain", quiet=True)
    assert second.base is not None
    manifest = artifact.read_manifest(second.base)
    assert manifest["inputs"]["start"] == before["key"]
    assert "refined" not in manifest["inputs"]
    assert manifest["key"] != before["key"]
    assert costs(read_run(second.run_dir))["pretrain"].tokens == 2 * before["training"]["tokens"]
    began, ended, refined = latents(copy), latents(second.base), latents(first.run_dir / "refined")
    assert all(torch.allclose(began[k], ended[k], atol=1e-6) for k in began)
    assert not all(torch.allclose(refined[k], ended[k], atol=1e-6) for k in began)
    # Where the base lies is no part of the key; which base it is, is
    moved = shutil.move(copy, work / "moved")
    again = pipeline.run(recipe(work, *more, f"pretrain.start={moved}"), until="pretrain", quiet=True)
    assert again.base == second.base
    third = pipeline.run(
        recipe(work, *more, "name=third", f"pretrain.start={second.base}"), until="pretrain", quiet=True
    )
    assert third.base is not None
    spent = artifact.read_manifest(third.base)["started_from"]
    assert spent["tokens"] == 2 * before["training"]["tokens"]
    assert spent["key"] == manifest["key"]


def test_the_data_come_in_another_order_after_a_start(work: Path) -> None:
    base = pipeline.run(recipe(work), until="pretrain", quiet=True).base
    fresh = Run.open(recipe(work), command="test", quiet=True)
    going_on = Run.open(recipe(work, "name=on", f"pretrain.start={base}"), command="test", quiet=True)
    assert pretrain._order_seed(fresh) == fresh.recipe.seed != pretrain._order_seed(going_on)


def test_a_start_of_another_model_is_refused(work: Path) -> None:
    base = pipeline.run(recipe(work), until="pretrain", quiet=True).base
    with pytest.raises(RecipeError, match="base and start are both set"):
        recipe(work, f"pretrain.start={base}", f"pretrain.base={base}")
    tiny_model("llama_tied", seed=5).save_pretrained(work / "model")
    with pytest.raises(ArtifactError, match=r"pretrain\.start: .* another model"):
        pipeline.run(recipe(work, "name=b", f"pretrain.start={base}"), until="pretrain", quiet=True)


def test_keys_without_a_start_are_what_they_were(work: Path) -> None:
    plain = recipe(work)
    assert plain.pretrain is not None
    assert "start" not in plain.pretrain.model_dump()
    assert "start" in recipe(work, "pretrain.start=x").pretrain.model_dump()  # type: ignore[union-attr]


def test_a_copy_replaces_nothing(work: Path) -> None:
    result = pipeline.run(recipe(work), until="pretrain", quiet=True)
    assert result.base is not None
    kept = work / "mine"
    kept.mkdir()
    (kept / "thesis.txt").write_text("years of work")
    with pytest.raises(ArtifactError, match="holds something else"):
        export_base(result.base, kept, "float16")
    export_base(result.base, work / "copy", "float16")
    with pytest.raises(ArtifactError, match="holds something else"):
        export_base(result.base, work / "copy", "float32")
    with pytest.raises(ArtifactError, match="a ternary base is needed"):
        export_base(result.run_dir / "refined", work / "new", "float16")
    assert (kept / "thesis.txt").read_text() == "years of work"


def test_corrupt_teacher_is_noticed_before_it_teaches(work: Path) -> None:
    pipeline.run(recipe(work), until="pretrain", quiet=True)
    pipeline.run(recipe(work), until="sft", quiet=True)
    path = work / "runs/tiny/teacher/model.safetensors"
    data = bytearray(path.read_bytes())
    data[-7] ^= 4
    path.write_bytes(data)
    with pytest.raises(ArtifactError, match=r"model\.safetensors: SHA-256"):
        pipeline.run(recipe(work), until="distill", quiet=True)


def test_teacher_of_another_tokenizer_is_refused(work: Path) -> None:
    result = pipeline.run(recipe(work), until="pretrain", quiet=True)
    pipeline.run(recipe(work), until="sft", quiet=True)
    teacher = result.run_dir / "teacher"
    manifest = artifact.read_manifest(teacher)
    data = json.loads((teacher / "tokenizer.json").read_text())
    vocab = data["model"]["vocab"]
    vocab["w50"], vocab["w51"] = vocab["w51"], vocab["w50"]
    (teacher / "tokenizer.json").write_text(json.dumps(data))
    entry = manifest["files"]["tokenizer.json"]
    entry["sha256"] = artifact.sha256_file(teacher / "tokenizer.json")
    entry["bytes"] = (teacher / "tokenizer.json").stat().st_size
    (teacher / artifact.MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(ModelError, match="tokenizer"):
        pipeline.run(recipe(work), until="distill", quiet=True)


def test_bad_rows_are_named_and_nothing_finished_is_lost(work: Path) -> None:
    pipeline.run(recipe(work), until="sft", quiet=True)
    lines = (work / "test.jsonl").read_text().splitlines()
    lines[3] = json.dumps({"text": "w40", "label": "zebra"})
    (work / "test.jsonl").write_text("\n".join(lines))
    with pytest.raises(DataError, match=r"test\.jsonl:4.*zebra"):
        pipeline.run(recipe(work), quiet=True)
    write_rows(work / "test.jsonl", 12, 1)
    result = pipeline.run(recipe(work), quiet=True)
    assert len(result.rows) == 3


def test_layer_outside_the_model_and_wrong_stage_names(work: Path) -> None:
    with pytest.raises(RecipeError, match="outside the model's 3 layers"):
        pipeline.run(recipe(work, "distill.relation.layer=3"), until="distill", quiet=True)
    with pytest.raises(RecipeError, match="expected one of"):
        pipeline.run(recipe(work), until="pack", quiet=True)


def test_full_disk_is_refused_before_training(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(work)
    monkeypatch.setattr(common.shutil, "disk_usage", lambda _: usage._replace(free=1000))
    with pytest.raises(StorageError, match="free some"):
        pipeline.run(recipe(work), until="sft", quiet=True)


def test_latent_codes_of_the_student_are_those_exported(work: Path) -> None:
    """Trap 1: codes and scale are exported once, from the latents."""
    from bitdistill.quant.packing import unpack_2bit
    from bitdistill.quant.ternary import ternarize

    result = pipeline.run(recipe(work, "bitnet_sft=null"), until="export", quiet=True)
    student, _, _ = load_student(result.run_dir / "student")
    packed, _, _ = load_student(result.run_dir / "packed")
    modules = dict(packed.named_modules())
    for name, layer in student.named_modules():
        if isinstance(layer, BitLinear):
            codes, scale = ternarize(layer.weight)
            other = modules[name]
            assert torch.equal(unpack_2bit(other.codes, layer.in_features), codes)
            assert other.scale.item() == scale.item()


def test_a_generation_task_runs_through(work: Path) -> None:
    task = "{name: echo, kind: generation, template: '{text} w9', target_field: text, max_new_tokens: 4}"
    result = pipeline.run(recipe(work, f"task={task}", "export.float_dtype=float32"), quiet=True)
    for row in result.rows:
        assert row.metric == "rougeL"
        assert set(row.metrics) >= {"rougeL", "bleu", "reference_nll"}
    assert result.report is not None
    report = result.report.read_text("utf-8")
    assert "ROUGE-L" in report
    for row in result.rows:
        assert f"{row.metrics['reference_nll']:.3f}" in report
    stamp = (result.run_dir / "results.key").read_text("utf-8")
    options = (f"task={task}", "export.float_dtype=float32", "eval.reference_nll=false")
    without = pipeline.run(recipe(work, *options), quiet=True)
    assert (result.run_dir / "results.key").read_text("utf-8") != stamp, "nothing was scored again"
    assert all("reference_nll" not in row.metrics for row in without.rows)
    assert [row.value for row in without.rows] == [row.value for row in result.rows]
    assert "nats a token" not in without.report.read_text("utf-8")  # type: ignore[union-attr]


def test_gradient_checkpointing_changes_no_weight(work: Path) -> None:
    plain = pipeline.run(recipe(work, "name=plain"), until="distill", quiet=True)
    options = ("name=saving", "distill.loop.gradient_checkpointing=true")
    saving = pipeline.run(recipe(work, *options), until="distill", quiet=True)
    first, second = latents(plain.run_dir / "student"), latents(saving.run_dir / "student")
    assert all(torch.equal(first[k], second[k]) for k in first)


def test_missing_trackers_are_said_before_training(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(MissingDependencyError, match=r"bitdistill\[track\]"):
        pipeline.run(recipe(work, "track.tensorboard=true"), quiet=True)


def test_further_formats_are_made_from_the_packed_student(work: Path) -> None:
    plain = pipeline.run(recipe(work, "bitnet_sft=null"), until="export", quiet=True)
    assert plain.packed is not None
    stamp = (plain.packed / "model.safetensors").stat().st_mtime_ns
    with pytest.raises(ModelError, match="packed"):  # 4 heads of 10 are not as wide as the tiny model
        pipeline.run(
            recipe(work, "bitnet_sft=null", "export.formats=[packed, hf]"), until="export", quiet=True
        )
    options = ("name=wide", "bitnet_sft=null", "refine.subln=none", "export.formats=[packed, hf]")
    with pytest.raises(ModelError, match="multiples of 4"):
        pipeline.run(recipe(work, *options), until="export", quiet=True)
    assert (plain.packed / "model.safetensors").stat().st_mtime_ns == stamp
    tiny_model("llama_tied", hidden_size=48, head_dim=12, intermediate_size=72).save_pretrained(
        work / "model"
    )
    options = ("name=fits", "bitnet_sft=null", "export.formats=[packed, hf]")
    result = pipeline.run(recipe(work, *options), until="export", quiet=True)
    assert json.loads((result.formats["hf"] / "config.json").read_text())["model_type"] == "bitnet"
    stamp = (result.formats["hf"] / "model.safetensors").stat().st_mtime_ns
    pipeline.run(recipe(work, *options), until="export", quiet=True)
    assert (result.formats["hf"] / "model.safetensors").stat().st_mtime_ns == stamp


def test_later_loop_keys_at_their_defaults_change_no_key(work: Path) -> None:
    """Artifacts made before `packing` and `int8_backward` existed stay valid."""
    run_dir = pipeline.run(recipe(work), until="sft", quiet=True).run_dir
    inputs = json.loads((run_dir / "teacher/bitdistill.json").read_text())["inputs"]
    assert not {"packing", "int8_backward"} & set(inputs["sft"]["loop"])
    with pytest.raises(ArtifactError, match="packing"):
        pipeline.run(recipe(work, "sft.loop.packing=true"), until="sft", quiet=True)


def test_stage_2_with_fused_layers_is_stage_2(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU the fused layers run their plain twins: the same forward, gradients to the last float bits."""
    bases = []
    for name, wanted in (("plain", False), ("fused", True)):
        monkeypatch.setattr(kernels, "wants_kernels", lambda *_, wanted=wanted: wanted)
        monkeypatch.setattr(kernels, "fused_chunk", lambda: language_model_chunk)
        options = (f"name={name}", f"pretrain.cache_dir={work}/cache-{name}", "bitnet_sft=null")
        options += ("pretrain.ternary_warmup_fraction=0.3", "pretrain.budget_tokens=1024")
        run_dir = pipeline.run(recipe(work, *options), until="pretrain", quiet=True).run_dir
        bases.append(latents(Path(json.loads((run_dir / "base.json").read_text())["path"])))
    assert bases[0].keys() == bases[1].keys()
    for key, value in bases[0].items():
        torch.testing.assert_close(bases[1][key], value, rtol=1e-2, atol=2e-3)


def test_a_run_of_the_baseline_alone_ends_with_its_report(work: Path) -> None:
    """There is no packed student then, so no model card; it failed on that after its last stage."""
    result = pipeline.run(recipe(work), rows=["bitnet_sft"], command="test", quiet=True)
    assert [r.name for r in result.rows] == ["bitnet_sft"]
    assert result.packed is None
    assert result.report is not None
    assert result.report.exists()


def test_a_hub_corpus_that_cannot_be_read_is_said_before_any_training(
    work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)  # not installed
    plan = recipe(work, "pretrain.corpus=hub:owner/name")
    with pytest.raises(MissingDependencyError, match=r"hub:owner/name: .*bitdistill\[hub\]"):
        pipeline.run(plan, until="distill", quiet=True)
    run = Run.open(plan, command="", quiet=True)
    assert not artifact.exists(run.run_dir / "teacher")
    pipeline.run(plan, until="distill", rows=["teacher"], quiet=True)  # no stage 2 in it
    assert artifact.exists(run.run_dir / "teacher")
    # One that was tokenized here before is read from the cache
    tokenizer = load_tokenizer(plan.model)
    assert plan.pretrain is not None
    folder = refine._cached_tokens(plan.pretrain, tokenizer)
    tokenize_corpus([str(work / "corpus.txt")], tokenizer, folder, workers=1)
    pipeline.run(plan, until="pretrain", quiet=True)
    assert artifact.exists(run.run_dir / "refined")
