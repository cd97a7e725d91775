"""Figures of the layer probe against slow twins, the rules of `layer: auto`, and the command."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from bitdistill import artifact, pipeline
from bitdistill.cli.main import app
from bitdistill.config import DistillConfig, RefineConfig, RelationConfig
from bitdistill.data.batches import TaskBatches
from bitdistill.data.tasks import Example
from bitdistill.errors import DataError, RecipeError
from bitdistill.losses.relation import attention_distillation_sum
from bitdistill.models import surgery
from bitdistill.models.capture import capture_states
from bitdistill.report import layer_choice, sweep_results
from bitdistill.report.sweep_results import RunResult, SweepResults
from bitdistill.stages import layer_probe
from tests.models.conftest import TINY, tiny_model
from tests.report.test_sweep_tables import row
from tests.stages.conftest import recipe


def batches(count: int = 2) -> list[Any]:
    generator = torch.Generator().manual_seed(0)
    examples = []
    for n in range(8 * count):
        ids = torch.randint(3, 100, (4 + n % 9,), generator=generator).tolist()
        examples.append(Example(tuple(ids), (90 + n % 2,), n % 2, (), "", ""))
    made = TaskBatches(examples, batch_rows=8, seed=0, pad_id=2)
    return [made.micro_batches(step)[0] for step in range(count)]


def student_of(teacher: Any) -> Any:
    return surgery.apply(surgery.plan(teacher.config, RefineConfig()), teacher)


@pytest.mark.parametrize("name", sorted(TINY))
def test_entropy_equals_that_of_eager_attention(name: str) -> None:
    model = tiny_model(name)
    (batch,) = batches(1)
    with torch.no_grad(), capture_states(model, [0, 1, 2]) as states:
        model(batch.input_ids_BT)
    eager = tiny_model(name)
    eager.set_attn_implementation("eager")
    with torch.no_grad():
        attentions = eager(batch.input_ids_BT, output_attentions=True).attentions
    for layer, p_BHTT in enumerate(attentions):
        values = []
        for b, tokens in enumerate(batch.attention_mask_BT.sum(1).tolist()):
            for t in range(1, tokens):
                seen = int((p_BHTT[b, 0, t] > 0).sum())
                for p in p_BHTT[b, :, t]:
                    values.append(float(-(p * p.clamp_min(1e-30).log()).sum()) / math.log(seen))
        options = layer_probe._attention_options(model, layer)
        own = layer_probe.attention_entropy(*states[layer][:2], batch.attention_mask_BT, **options)
        assert own == pytest.approx(sum(values) / len(values), rel=1e-4)
        assert 0 < own < 1


@pytest.mark.parametrize("name", ["llama_tied", "gemma3_text"])
def test_gradient_figures_equal_two_backward_passes(name: str) -> None:
    teacher = tiny_model(name)
    student = student_of(tiny_model(name, seed=4))
    config = DistillConfig(relation=RelationConfig(alpha_k=0.5))
    (batch,) = batches(1)
    metrics = layer_probe.measure(student, teacher, [batch], config, full=True)
    assert all(p.grad is None for p in student.parameters())

    def gradients(layer: int | None) -> dict[str, torch.Tensor]:
        student.zero_grad()
        with capture_states(student, [0, 1, 2]) as states:
            logits = student(batch.input_ids_BT).logits
        if layer is None:
            at = batch.answer_mask_BT.nonzero()
            picked = torch.log_softmax(logits[at[:, 0], at[:, 1] - 1].float(), -1)
            loss = -picked.gather(1, batch.input_ids_BT[at[:, 0], at[:, 1]][:, None]).mean()
        else:
            with torch.no_grad(), capture_states(teacher, [layer]) as wanted:
                teacher(batch.input_ids_BT)
            loss = attention_distillation_sum(
                states[layer], wanted[layer], batch.attention_mask_BT, alphas=(1.0, 0.5, 1.0)
            ) / len(batch.input_ids_BT)
            assert metrics["divergence"][layer] == pytest.approx(float(loss.detach()), rel=1e-5)
        loss.backward()
        return {n: p.grad.clone() for n, p in student.named_parameters() if p.grad is not None}

    ce = gradients(None)
    for layer in range(3):
        ad = gradients(layer)
        names = [
            n
            for n in ce
            if n.endswith("_proj.weight")
            and (
                int(n.split(".")[2]) < layer
                or (int(n.split(".")[2]) == layer and n.split(".")[-2] in ("q_proj", "k_proj", "v_proj"))
            )
        ]
        a = torch.cat([ad[n].flatten() for n in names]).double()
        b = torch.cat([ce[n].flatten() for n in names]).double()
        assert metrics["alignment"][layer] == pytest.approx(float(a @ b / (a.norm() * b.norm())), abs=1e-4)
        assert metrics["gradient_ratio"][layer] == pytest.approx(float(a.norm() / b.norm()), rel=1e-3)
        outside = [n for n in ad if n.endswith("_proj.weight") and n not in names]
        assert all(not ad[n].any() for n in outside)  # the others are not reached at all


def test_figures_are_means_over_batches_and_the_cheap_one_is_the_same() -> None:
    teacher, two = tiny_model("llama"), batches(2)
    student = student_of(tiny_model("llama", seed=3)).train()
    config = DistillConfig()
    whole = layer_probe.measure(student, teacher, two, config, full=True)
    assert student.training
    parts = [layer_probe.measure(student, teacher, [one], config, full=True) for one in two]
    for name, values in whole.items():
        for layer in range(3):
            assert values[layer] == pytest.approx((parts[0][name][layer] + parts[1][name][layer]) / 2)
    cheap = layer_probe.measure(student, teacher, two, config, full=False)
    assert cheap.keys() == {"divergence"}
    assert cheap["divergence"] == pytest.approx(whole["divergence"])


def test_rules_choose_in_the_later_half() -> None:
    metrics = {
        "divergence": [9.0, 1.0, 3.0, 2.0],
        "alignment": [0.9, 0.9, -0.1, 0.2],
        "teacher_entropy": [0.1, 0.1, 0.4, 0.5],
    }
    for layer, chosen in (("auto", 2), ("auto:divergence", 2), ("auto:alignment", 3), ("auto:entropy", 2)):
        config = DistillConfig(relation=RelationConfig(layer=layer))  # type: ignore[arg-type]
        assert layer_probe.resolve_layers(config, metrics) == [chosen]
    config = DistillConfig(relation=RelationConfig(layer=(-1, 0, 3)))
    assert layer_probe.resolve_layers(config, metrics) == [0, 3]
    with pytest.raises(RecipeError, match="4 is outside the model's 4 layers"):
        layer_probe.resolve_layers(DistillConfig(relation=RelationConfig(layer=4)), metrics)


def test_auto_by_alignment_in_a_run_and_the_command(work: Path) -> None:
    loaded = recipe(work, "distill.relation.layer=auto:alignment", "bitnet_sft=null")
    result = pipeline.run(loaded, until="distill", stats=False, quiet=True)
    manifest = artifact.read_manifest(result.run_dir / "student")
    metrics = manifest["layer_metrics"]
    assert set(metrics) == {
        "divergence", "alignment", "gradient_ratio", "teacher_entropy", "student_entropy",
    }  # fmt: skip
    assert manifest["distilled_layers"] == [layer_probe.choose(metrics, "alignment")]
    runs = [
        RunResult(
            recipe="tiny", cell=f"l{n}", label="", seed=0, digest="", status="done", layers=[n],
            rows=[row("bitdistill", 0.5 + 0.1 * n, 0, "x")], settings={"distill.relation.layer": n},
        )
        for n in range(3)
    ]  # fmt: skip
    sweep_results.write(work / "sweep.json", SweepResults(name="layers", runs=runs))
    command = ["probe-layers", str(work / "recipe.yaml"), "--json"]
    done = CliRunner().invoke(app, [*command, "--sweep", str(work / "sweep.json")])
    assert isinstance(done.exception, DataError)
    assert "3 layers with a score; a rank correlation needs 4" in str(done.exception)
    printed = json.loads(CliRunner().invoke(app, command).output)
    assert printed["metrics"]["alignment"] == pytest.approx(
        metrics["alignment"]
    )  # the same start: no training
    assert printed["auto"] == "divergence"
    assert set(printed["choices"]) == set(layer_probe.RULES)


def test_correlations() -> None:
    scores = {0: 70.0, 2: 72.0, 3: 71.0, 5: 75.0}
    metrics = {"good": [1, 0, 3, 2, 0, 4], "bad": [4, 0, 2, 3, 0, 1], "flat": [1.0] * 6}
    good, bad, flat = layer_choice.correlate(metrics, scores)
    assert (good.spearman, good.kendall, good.n) == (pytest.approx(1.0), pytest.approx(1.0), 4)
    assert (good.best_by_metric, good.regret_points) == (5, 0.0)
    assert (bad.spearman, bad.best_by_metric, bad.regret_points) == (pytest.approx(-1.0), 0, 5.0)
    assert (flat.spearman, flat.kendall_p) == (None, None)
    with pytest.raises(DataError, match="layer 5, the probe has 3 layers"):
        layer_choice.correlate({"short": [1.0] * 3}, scores)


def test_correlations_on_the_results_page() -> None:
    runs = [
        RunResult(
            recipe="r", cell=f"l{n}", label="", seed=seed, digest="", status="done", layers=[n],
            rows=[row("bitdistill", 0.5 + 0.05 * n, seed, f"l{n}")], settings={"distill.relation.layer": n},
            layer_metrics={"divergence": [float(i) for i in range(6)]},
        )
        for n in range(6)
        for seed in range(2)
    ]  # fmt: skip
    lines = layer_choice.markdown(SweepResults(name="layers", runs=runs))
    assert any(line.startswith("| divergence | 6 | +1.00 (") for line in lines)
    assert layer_choice.markdown(SweepResults(name="layers", runs=runs[:6])) == []
