"""The training loop: resuming, interrupting, accumulation, non-finite steps, corrupt checkpoints."""

from __future__ import annotations

import itertools
import json
import math
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from bitdistill.config import Loop, Optim
from bitdistill.data.batches import Batch, index_of
from bitdistill.errors import ArtifactError, DivergenceError, Interrupted, RecipeError, StorageError
from bitdistill.train import checkpoint
from bitdistill.train import loop as loop_module
from bitdistill.train.loop import FitResult, fit
from bitdistill.train.optim import build_optimizer, describe_rate, learning_rate_at
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


def make_model(seed: int = 0, dropout: float = 0.0) -> nn.Sequential:
    torch.manual_seed(seed)
    layers = [nn.Embedding(VOCABULARY, 12), nn.Linear(12, 12), nn.GELU(), nn.Linear(12, VOCABULARY)]
    return nn.Sequential(*layers, nn.Dropout(dropout)) if dropout else nn.Sequential(*layers)


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


def steps_saved(root: Path) -> list[int]:
    return sorted(int(p.name.removeprefix("step-")) for p in root.glob("step-????????"))


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


def test_relative_rates_are_those_of_the_stage_s_start_after_a_resume(tmp_path: Path) -> None:
    optim = Optim(learning_rate=0.3, matrix_rate="relative", schedule="constant", warmup_fraction=0.0)

    def uneven() -> torch.nn.Sequential:
        model = make_model()
        with torch.no_grad():
            model[1].weight.mul_(5)
        return model

    whole, start = uneven(), uneven()
    train(whole, tmp_path / "whole", optim=optim)
    rates = [[group["rate"] for group in build_optimizer(m, optim).param_groups] for m in (start, whole)]
    assert rates[0] != rates[1]  # what a resume from the weights it finds would go on with

    def interrupt(step: int) -> None:
        if step == 5:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(Interrupted):
        train(uneven(), tmp_path / "cut", before_step=interrupt, optim=optim)
    train(start, tmp_path / "cut", optim=optim)
    assert torch.equal(weights(whole), weights(start))


def test_random_numbers_go_on_where_they_were(tmp_path: Path) -> None:
    """Dropout draws from PyTorch's generator, so its state belongs to a checkpoint."""
    whole = make_model(dropout=0.5)
    train(whole, tmp_path / "whole")

    def interrupt(step: int) -> None:
        if step == 6:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(Interrupted):
        train(make_model(dropout=0.5), tmp_path / "cut", before_step=interrupt)
    resumed = make_model(seed=99, dropout=0.5)
    train(resumed, tmp_path / "cut")
    assert torch.equal(weights(whole), weights(resumed))
    assert losses(tmp_path / "whole") == losses(tmp_path / "cut")


def test_a_second_ctrl_c_stops_at_once(tmp_path: Path) -> None:
    before = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]

    def interrupt(times: int) -> Callable[[int], None]:
        def send(step: int) -> None:
            for _ in range(times if step == 5 else 0):
                os.kill(os.getpid(), signal.SIGINT)

        return send

    with pytest.raises(Interrupted) as caught:
        train(make_model(), tmp_path / "once", before_step=interrupt(1))
    assert caught.value.exit_code == 130
    with pytest.raises(KeyboardInterrupt):
        train(make_model(), tmp_path / "twice", before_step=interrupt(2))
    for name, saved in (("once", [4, 6]), ("twice", [4])):  # the first lets the step end and saves it
        assert steps_saved(tmp_path / name / "checkpoints") == saved
    assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)] == before


KILLED_STEPS, HELD_AT = 120, 110
JOB = f"""
import os, sys, time, torch
from pathlib import Path
sys.path.insert(0, {str(Path(__file__).parents[2])!r})
torch.set_num_threads(1)
from tests.train.test_loop import HELD_AT, KILLED_STEPS, make_model, train, weights
from bitdistill.config import Loop
folder, parent = Path(sys.argv[1]), os.getppid()

def before_step(step):
    print(step, flush=True)
    while step >= HELD_AT and not (folder / "may end").exists():
        if os.getppid() != parent:
            sys.exit("the test is gone")
        time.sleep(0.01)

model = make_model()
train(model, folder, steps=KILLED_STEPS, before_step=before_step,
      loop=Loop(batch_rows=8, log_every_steps=1, checkpoint_every_steps=3))
torch.save(weights(model), folder / "weights.pt")
"""


def kill_after(process: subprocess.Popen[str], step: int, share: float) -> None:
    """SIGKILL a job that has said `step`, `share` of the time between two checkpoints later.

    That time is the job's own, so a save is hit as likely on a slow machine as on a fast one.
    """
    assert process.stdout is not None
    said = 0.0
    between = 0.02
    for line in process.stdout:
        if int(line) % 3 == 0:  # a checkpoint was just written
            now = time.monotonic()
            between, said = (min(now - said, 1.0) if said else between), now
        if int(line) >= step:
            break
    time.sleep(share * between)
    process.kill()


@pytest.mark.timeout(1200)
def test_sigkill_at_any_moment_resumes_bit_identically(tmp_path: Path) -> None:
    """A real process, killed in steps and in saves until it may finish, equals an unbroken run."""
    (tmp_path / "job.py").write_text(JOB)
    folder = tmp_path / "killed"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    generator = random.Random(0)
    # After 3n - 1 steps: a step and its save come next. All lie before HELD_AT, so each job still runs then.
    for step in (3 * generator.randrange(5, 10) - 1, generator.randrange(40, 60), 3 * 25 - 1):
        process = subprocess.Popen(
            [sys.executable, str(tmp_path / "job.py"), str(folder)],
            env=environment,
            stdout=subprocess.PIPE,
            text=True,
        )
        try:
            kill_after(process, step, generator.uniform(0, 2))
            assert process.wait() == -signal.SIGKILL
        finally:
            process.kill()
            process.communicate()
    (folder / "may end").touch()
    done = subprocess.run(
        [sys.executable, str(tmp_path / "job.py"), str(folder)], env=environment, stdout=subprocess.PIPE
    )
    assert done.returncode == 0
    first = int(done.stdout.split()[0])
    assert 0 < first <= HELD_AT  # it went on, from a checkpoint
    torch.set_num_threads(1)
    whole = make_model()
    train(
        whole,
        tmp_path / "whole",
        steps=KILLED_STEPS,
        loop=Loop(batch_rows=8, log_every_steps=1, checkpoint_every_steps=50),
    )
    assert torch.equal(weights(whole), torch.load(folder / "weights.pt", weights_only=True))
    assert losses(tmp_path / "whole") == losses(folder)
    assert not list(folder.rglob("*.partial-*"))


def test_what_a_killed_save_left_is_cleared(tmp_path: Path) -> None:
    """Also where no later save is of the same step, as with checkpoints by time."""
    train(make_model(), tmp_path)
    root = tmp_path / "checkpoints"
    for name in ("step-00000007.partial-0badcafe", "step-00000008.partial-old-0badcafe"):
        (root / name).mkdir()
        (root / name / "model.safetensors").write_bytes(b"x" * 100)
    train(make_model(seed=3), tmp_path, steps=14)
    assert steps_saved(root) == [8, 12]
    assert not list(root.glob("*.partial-*"))


def test_checkpoints_by_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The default rule: 300 s after the last one. The clock read here goes on by 200 s at each look."""
    clock = SimpleNamespace(monotonic=itertools.count(0, 200).__next__, perf_counter=time.perf_counter)
    monkeypatch.setattr(loop_module, "time", clock)
    monkeypatch.setattr(checkpoint, "KEEP", 99)
    train(make_model(), tmp_path, loop=Loop(batch_rows=8, log_every_steps=1))
    # looks: at the start, after steps 1 and 2 (400 s: save), after that save, after steps 3 and 4, ...
    assert steps_saved(tmp_path / "checkpoints") == [2, 4, 6, 8, 10]


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


def test_gradients_that_are_not_finite_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Only those: clipping by a NaN norm would make all of them NaN first."""
    model = make_model()
    names = [name for name, _ in model.named_parameters()]
    middle = names[len(names) // 2]
    seen = iter(range(10_000))
    hook = lambda grad: grad * (math.nan if next(seen) == 2 else 1.0)  # noqa: E731
    model.get_parameter(middle).register_hook(hook)
    result = train(model, tmp_path)
    assert result.skipped_steps == 1
    assert f"1 gradients are not finite, {middle} to {middle}" in caplog.text


def test_nonfinite_step_stops_when_asked_or_after_ten(tmp_path: Path) -> None:
    model = make_model()
    loop = Loop(batch_rows=8, on_nonfinite="stop")
    with pytest.raises(DivergenceError, match="learning rate"):
        train(model, tmp_path / "a", step_function=nonfinite_step(model, {2}), loop=loop)
    with pytest.raises(DivergenceError, match=r"step 9.*no step was finite.*loop\.kernels: reference"):
        train(model, tmp_path / "b", step_function=nonfinite_step(model, set(range(100))))
    with pytest.raises(DivergenceError, match=r"step 10.*lower the learning rate"):
        train(model, tmp_path / "c", step_function=nonfinite_step(model, set(range(1, 100))))


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


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_matrices_move_by_the_same_share_of_themselves(name: str) -> None:
    torch.manual_seed(0)
    small, middle, large = (torch.nn.Linear(16, 16, bias=False) for _ in range(3))
    model = torch.nn.Sequential(
        torch.nn.Embedding(VOCABULARY, 16), small, middle, large, torch.nn.LayerNorm(16)
    )
    with torch.no_grad():
        small.weight.copy_(middle.weight / 4)
        large.weight.copy_(-middle.weight * 4)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    optim = Optim(learning_rate=0.1, name=name, matrix_rate="relative")  # type: ignore[arg-type]
    optimizer = build_optimizer(model, optim)
    sign = torch.where(torch.rand(16, 16) < 0.5, -1.0, 1.0)
    for parameter in model.parameters():
        parameter.grad = sign if parameter.shape == sign.shape else torch.ones_like(parameter)
    optimizer.set_learning_rate(0.05)
    optimizer.step()
    moved = {n: (p.detach() - before[n]).square().mean().sqrt().item() for n, p in model.named_parameters()}
    assert moved["1.weight"] * 4 == pytest.approx(moved["2.weight"], rel=1e-3)
    assert moved["3.weight"] / 4 == pytest.approx(moved["2.weight"], rel=1e-3)
    # the usual matrix, embedding and norms move at the stage's rate
    if name == "adamw":
        assert moved["2.weight"] == pytest.approx(0.05, rel=1e-3)
    for other in ("0.weight", "4.weight", "4.bias"):
        assert moved[other] == pytest.approx(0.05, rel=1e-3)
    equal = build_optimizer(model, Optim(learning_rate=0.1, name=name))  # type: ignore[arg-type]
    assert {group["rate"] for group in equal.param_groups} == {1.0}


def test_what_a_step_moves_is_said_in_shares_of_the_weights() -> None:
    small, large = (torch.nn.Linear(4, 4, bias=False) for _ in range(2))
    torch.nn.init.constant_(small.weight, -0.01)
    torch.nn.init.constant_(large.weight, 0.04)
    model = torch.nn.Sequential(small, large)
    equal = describe_rate(model, Optim(learning_rate=1e-3))
    assert equal == "learning rate 0.001, 10 % of mean |W| (2.5 to 10 %)"
    relative = describe_rate(model, Optim(learning_rate=1e-3, matrix_rate="relative"))
    assert relative == "learning rate 0.001, 5 % of mean |W| (5 to 5 %)"
    share = describe_rate(model, Optim(learning_rate=0.05, matrix_rate="share"))
    assert share == "learning rate 0.001, 5 % of mean |W| (5 to 5 %)"
    assert describe_rate(torch.nn.LayerNorm(4), Optim(learning_rate=1e-3)) == "learning rate 0.001"


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_a_share_is_the_relative_rate_that_fits_the_weights(name: str) -> None:
    def matrices() -> torch.nn.Sequential:
        torch.manual_seed(0)
        small, large = (torch.nn.Linear(8, 8, bias=False) for _ in range(2))
        torch.nn.init.normal_(small.weight, std=0.01)
        torch.nn.init.normal_(large.weight, std=0.04)
        return torch.nn.Sequential(torch.nn.Embedding(VOCABULARY, 8), small, large, torch.nn.LayerNorm(8))

    sizes = [float(m.weight.detach().abs().mean()) for m in matrices()[1:3]]
    usual = math.sqrt(sizes[0] * sizes[1])
    ends = []
    for optim in (
        Optim(learning_rate=0.02, matrix_rate="share", name=name, embedding_rate=0.5),  # type: ignore[arg-type]
        Optim(learning_rate=0.02 * usual, matrix_rate="relative", name=name, embedding_rate=0.5),  # type: ignore[arg-type]
    ):
        model = matrices()
        optimizer = build_optimizer(model, optim)
        for step in range(3):
            generator = torch.Generator().manual_seed(step)
            for parameter in model.parameters():
                parameter.grad = torch.randn(parameter.shape, generator=generator)
            optimizer.set_learning_rate(learning_rate_at(step, 3, optim))
            optimizer.step()
        ends.append(weights(model))
    torch.testing.assert_close(ends[0], ends[1], rtol=1e-5, atol=1e-7)
    assert not torch.equal(ends[0], weights(matrices()))


def test_a_share_of_nothing_is_an_error() -> None:
    with pytest.raises(RecipeError, match="matrix_rate: share: no matrix of the blocks is trained"):
        build_optimizer(torch.nn.LayerNorm(4), Optim(learning_rate=0.01, matrix_rate="share"))
    with pytest.raises(ValueError, match=r"0\.015 is 1\.5 %"):
        Optim(learning_rate=1.5, matrix_rate="share")
    assert Optim(learning_rate=1.5).learning_rate == 1.5


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
