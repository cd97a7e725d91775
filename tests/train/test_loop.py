"""The training loop: resuming, interrupting, accumulation, non-finite steps, corrupt checkpoints."""

from __future__ import annotations

import itertools
import json
import math
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
import torch
from torch import nn

from bitdistill.config import Loop, Optim
from bitdistill.data.batches import Batch, index_of
from bitdistill.errors import ArtifactError, DivergenceError, Interrupted, StorageError
from bitdistill.train import checkpoint
from bitdistill.train.loop import FitResult, fit
from bitdistill.train.optim import build_optimizer, learning_rate_at
from bitdistill.train.step import StepOutput, Totals
from bitdistill.train.tracking import Tracker, truncate_log

VOCABULARY, LENGTH = 17, 6


class RandomBatches:
    """Rows as a pure function of the step, split into micro-batches."""

    def __init__(self, rows: int = 8, micro_rows: int = 8) -> None:
        self.rows, self.micro_rows = rows, micro_rows

    def micro_batches(self, step: int) -> list[Batch]:
        ids = torch.randint(0, VOCABULARY, (self.rows, LENGTH), generator=torch.Generator().manual_seed(step))
        mask = torch.ones_like(ids, dtype=torch.bool)
        answers = mask.clone()
        answers[:, 0] = False
        starts = range(0, self.rows, self.micro_rows)
        return [
            Batch(
                input_ids_BT=ids[i : i + self.micro_rows],
                attention_mask_BT=mask[i : i + self.micro_rows],
                answer_mask_BT=answers[i : i + self.micro_rows],
                labels_B=torch.full((len(ids[i : i + self.micro_rows]),), -1),
                indices=list(range(i, i + self.micro_rows)),
                weight=self.micro_rows / self.rows,
                tokens=self.micro_rows * LENGTH,
                answer_index_N=index_of(answers[i : i + self.micro_rows]),
                real_index_N=index_of(mask[i : i + self.micro_rows]),
            )
            for i in starts
        ]


def make_model(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Embedding(VOCABULARY, 12), nn.Linear(12, 12), nn.GELU(), nn.Linear(12, VOCABULARY)
    )


def train(model: nn.Module, folder: Path, steps: int = 12, **options: object) -> FitResult:
    def step(batch: Batch, totals: Totals) -> StepOutput:
        logits = model(batch.input_ids_BT[:, :-1])
        loss = nn.functional.cross_entropy(
            logits.flatten(0, 1), batch.input_ids_BT[:, 1:].flatten(), reduction="sum"
        )
        return StepOutput(loss / totals.answers)

    settings: dict[str, object] = {
        "optim": Optim(learning_rate=1e-2),
        "loop": Loop(batch_rows=8, log_every_steps=1, checkpoint_every_steps=4),
        "key": "k",
        "batches": RandomBatches(),
        "step_function": step,
    }
    settings.update(options)
    return fit(
        model,
        total_steps=steps,
        device=torch.device("cpu"),
        tracker=Tracker("toy", folder, steps, quiet=True),
        checkpoint_root=folder / "checkpoints",
        **settings,  # type: ignore[arg-type]
    )


def losses(folder: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (folder / "logs/toy.jsonl").read_text().splitlines()]


def weights(model: nn.Module) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def test_gradients_do_not_depend_on_micro_batches(tmp_path: Path) -> None:
    results = []
    for micro_rows in (8, 3, 1):
        model = make_model()
        train(model, tmp_path / str(micro_rows), steps=5, batches=RandomBatches(8, micro_rows))
        results.append(weights(model))
    torch.testing.assert_close(results[0], results[1], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(results[0], results[2], rtol=1e-4, atol=1e-5)


def test_same_seed_twice_is_bit_identical(tmp_path: Path) -> None:
    first, second = make_model(), make_model()
    train(first, tmp_path / "a")
    train(second, tmp_path / "b")
    assert torch.equal(weights(first), weights(second))
    assert losses(tmp_path / "a") == losses(tmp_path / "b")


@pytest.mark.parametrize("name", ["adamw", "muon"])
@pytest.mark.parametrize("stop_at", [1, 5, 6, 11])
def test_signal_saves_and_resuming_is_bit_identical(tmp_path: Path, stop_at: int, name: str) -> None:
    optim = Optim(learning_rate=1e-2, name=name)  # type: ignore[arg-type]
    whole = make_model()
    done = train(whole, tmp_path / "whole", optim=optim)

    def interrupt(step: int) -> None:
        if step == stop_at:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(Interrupted) as caught:
        train(make_model(), tmp_path / "cut", before_step=interrupt, optim=optim)
    assert caught.value.exit_code == 143
    resumed = make_model(seed=99)  # its weights must come from the checkpoint
    again = train(resumed, tmp_path / "cut", optim=optim)
    assert torch.equal(weights(whole), weights(resumed))
    assert losses(tmp_path / "whole") == losses(tmp_path / "cut")
    assert (again.steps, again.tokens) == (done.steps, done.tokens)


def test_sigkill_at_any_moment_resumes_bit_identically(tmp_path: Path) -> None:
    """A real process, killed at random times until it finishes, equals an unbroken run."""
    script = tmp_path / "job.py"
    script.write_text(
        textwrap.dedent(
            f"""
            import sys, torch
            from pathlib import Path
            sys.path.insert(0, {str(Path(__file__).parents[2])!r})
            torch.set_num_threads(1)
            from tests.train.test_loop import make_model, train, weights
            from bitdistill.config import Loop
            model = make_model()
            train(model, Path(sys.argv[1]), steps=400,
                  loop=Loop(batch_rows=8, log_every_steps=1, checkpoint_every_steps=3))
            torch.save(weights(model), Path(sys.argv[1]) / "weights.pt")
            """
        )
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    log = tmp_path / "killed/logs/toy.jsonl"
    generator = torch.Generator().manual_seed(0)
    kills = 0
    # By logged steps, not by the clock: how long imports and steps take differs from machine to machine.
    for quarter in range(4):
        process = subprocess.Popen([sys.executable, str(script), str(tmp_path / "killed")], env=environment)
        target = 80 * quarter + 1 + int(torch.randint(0, 80, (), generator=generator))
        while process.poll() is None and (not log.exists() or log.read_bytes().count(b"\n") < target):
            time.sleep(0.001)
        process.kill()  # a random moment of a step: the log is written at its end, the poll is not in phase
        kills += process.wait() == -signal.SIGKILL
    process = subprocess.run(
        [sys.executable, str(script), str(tmp_path / "killed")], env=environment, timeout=120
    )
    assert process.returncode == 0
    assert kills >= 1
    torch.set_num_threads(1)
    whole = make_model()
    train(whole, tmp_path / "whole", steps=400)
    assert torch.equal(weights(whole), torch.load(tmp_path / "killed/weights.pt", weights_only=True))
    assert losses(tmp_path / "whole") == losses(tmp_path / "killed")


def test_corrupt_newest_checkpoint_falls_back_to_the_older(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    whole = make_model()
    train(whole, tmp_path)
    newest = sorted((tmp_path / "checkpoints").iterdir())[-1]
    data = bytearray((newest / "model.safetensors").read_bytes())
    data[len(data) // 2] ^= 1
    (newest / "model.safetensors").write_bytes(data)
    resumed = make_model(seed=5)
    train(resumed, tmp_path)
    assert "SHA-256" in caplog.text
    assert torch.equal(weights(whole), weights(resumed))


def test_only_two_checkpoints_are_kept(tmp_path: Path) -> None:
    train(make_model(), tmp_path, steps=30)
    names = sorted(p.name for p in (tmp_path / "checkpoints").iterdir())
    assert names == ["step-00000024", "step-00000028"]


def test_checkpoint_of_another_recipe_is_refused(tmp_path: Path) -> None:
    train(make_model(), tmp_path)
    with pytest.raises(ArtifactError, match="another recipe"):
        train(make_model(), tmp_path, key="other")


def test_failed_write_keeps_the_older_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, calls = os.fsync, []

    def failing(descriptor: int) -> None:
        calls.append(descriptor)
        if len(calls) > 8:
            raise OSError(28, "No space left on device")
        real(descriptor)

    monkeypatch.setattr(os, "fsync", failing)
    with pytest.raises(StorageError, match="no space left"):
        train(make_model(), tmp_path)
    monkeypatch.undo()
    names = [p.name for p in (tmp_path / "checkpoints").iterdir()]
    assert names == ["step-00000004"]
    whole, resumed = make_model(), make_model(seed=4)
    train(whole, tmp_path / "whole")
    train(resumed, tmp_path)
    assert torch.equal(weights(whole), weights(resumed))


def test_too_small_a_disk_is_refused_at_the_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = checkpoint.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda _: usage._replace(free=100))
    with pytest.raises(StorageError, match="checkpoints need"):
        train(make_model(), tmp_path)


def nonfinite_step(model: nn.Module, bad_steps: set[int]):  # type: ignore[no-untyped-def]
    count = iter(range(10_000))

    def step(batch: Batch, totals: Totals) -> StepOutput:
        loss = model(batch.input_ids_BT).float().square().mean()
        return StepOutput(loss * (math.nan if next(count) in bad_steps else 1.0))

    return step


def test_nonfinite_step_is_skipped_and_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = make_model()
    result = train(model, tmp_path, step_function=nonfinite_step(model, {3}))
    assert result.skipped_steps == 1
    assert torch.isfinite(weights(model)).all()
    assert "step 3" in caplog.text
    assert "rows [0, 1" in caplog.text


def test_nonfinite_step_stops_when_asked_or_after_ten(tmp_path: Path) -> None:
    model = make_model()
    loop = Loop(batch_rows=8, on_nonfinite="stop")
    with pytest.raises(DivergenceError, match="learning rate"):
        train(model, tmp_path / "a", step_function=nonfinite_step(model, {2}), loop=loop)
    with pytest.raises(DivergenceError, match="step 9"):
        train(model, tmp_path / "b", step_function=nonfinite_step(model, set(range(100))))


def test_truncate_log_drops_later_and_broken_lines(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"ste')
    truncate_log(path, 2)
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n'


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine", "wsd"])
def test_schedules_warm_up_and_reach_their_floor(schedule: str) -> None:
    optim = Optim(learning_rate=2.0, schedule=schedule, warmup_fraction=0.1, min_lr_ratio=0.1)  # type: ignore[arg-type]
    rates = [learning_rate_at(s, 100, optim) for s in range(100)]
    assert rates[0] == pytest.approx(0.2)
    assert rates[9] == pytest.approx(2.0)
    assert max(rates) == pytest.approx(2.0)
    if schedule == "constant":
        assert rates[-1] == 2.0
    else:
        assert 0.2 <= rates[-1] < 0.35
        assert all(a >= b - 1e-12 for a, b in itertools.pairwise(rates[10:]))
    if schedule == "wsd":
        assert rates[79] == 2.0


def test_muon_takes_the_matrices_and_adamw_the_rest() -> None:
    model = make_model()
    optimizer = build_optimizer(model, Optim(learning_rate=0.1, name="muon", weight_decay=0.3))
    muon, adamw = optimizer.optimizers
    assert [tuple(p.shape) for p in muon.param_groups[0]["params"]] == [(12, 12), (VOCABULARY, 12)]
    rest, tables = adamw.param_groups
    assert [tuple(p.shape) for p in rest["params"]] == [(12,), (VOCABULARY,)]
    assert [tuple(p.shape) for p in tables["params"]] == [(VOCABULARY, 12)]
    assert (muon.param_groups[0]["weight_decay"], adamw.param_groups[0]["weight_decay"]) == (0.3, 0.0)
    # a single update is orthogonal and of AdamW's size: 0.2 sqrt(max(out, in)) singular values times the rate
    before = model[1].weight.detach().clone()
    model(torch.arange(VOCABULARY)[None]).square().sum().backward()
    optimizer.step()
    change = before * (1 - 0.1 * 0.3) - model[1].weight.detach()
    singular = torch.linalg.svdvals(change) / (0.1 * 0.2 * 12**0.5)
    assert singular.max() < 1.3
    assert (singular > 0.6).sum() >= 10  # the iteration leaves tiny singular values behind


def test_the_embedding_learns_at_its_own_rate() -> None:
    model = make_model()
    table = next(m.weight for m in model.modules() if isinstance(m, torch.nn.Embedding))
    optimizer = build_optimizer(model, Optim(learning_rate=0.1, embedding_rate=0.0))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.set_learning_rate(0.05)
    optimizer.step()
    for name, parameter in model.named_parameters():
        moved = (parameter - before[name]).abs().max().item()
        assert moved == (0.0 if parameter is table else pytest.approx(0.05, rel=1e-4)), name
    optimizer = build_optimizer(model, Optim(learning_rate=0.1, embedding_rate=0.2))
    optimizer.set_learning_rate(0.05)
    assert sorted({round(group["lr"], 6) for group in optimizer.param_groups}) == [0.01, 0.05]
