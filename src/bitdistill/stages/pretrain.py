"""Stage 2 (paper, sec. 3.2): continued pre-training of the ternary model on a general corpus.

Knows nothing of the task. The result, a ternary base, is cached under the hash of everything that
determines it and serves every later task.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bitdistill import artifact
from bitdistill.config import PretrainConfig
from bitdistill.data.batches import Batch, PackedBatches, SampledWords
from bitdistill.data.corpus import TokenShards
from bitdistill.errors import ArtifactError, RecipeError
from bitdistill.losses.hidden import ERRORS, block_errors_sum
from bitdistill.losses.logits import chunked_language_model_loss, language_model_chunk
from bitdistill.models.attention import causal_only, fastest_attention
from bitdistill.models.forward import head_weight, hidden_states, next_tokens
from bitdistill.models.load import load_source, source_fingerprint
from bitdistill.models.norms import gains_after_blocks
from bitdistill.models.student import load_student
from bitdistill.quant.linear import BitLinear
from bitdistill.recipe import check_base
from bitdistill.stages import branch, kernels
from bitdistill.stages.common import Run, log
from bitdistill.stages.refine import open_corpus
from bitdistill.train import replicas
from bitdistill.train.compile import compile_blocks, compiled
from bitdistill.train.loop import FitResult, fit
from bitdistill.train.replicas import Replicas
from bitdistill.train.step import StepOutput, Totals


class LanguageModelStep:
    """Step function: LM loss, KL to the frozen full-precision model, or a mix; means over predicted tokens."""

    def __init__(
        self,
        student: Any,
        teacher: Any | None,
        config: PretrainConfig,
        compiling: bool,
        fused: bool = False,
    ) -> None:
        self.student, self.teacher = student, teacher
        self.lm_weight = {"lm": 1.0, "kl": 0.0, "mix": config.mix_lm}[config.objective]
        self.hidden_weight = 0.0 if teacher is None else config.hidden_weight
        self.gains = (
            gains_after_blocks(teacher) if config.hidden_error == "normed" and teacher is not None else None
        )
        self.hidden_error = compiled(ERRORS[config.hidden_error], compiling)
        self.chunk = kernels.fused_chunk() if fused else compiled(language_model_chunk, compiling)
        # The warm-up's blend is a number of the host, which a replayed CUDA graph would not see
        self.replayable = config.ternary_warmup_fraction == 0

    def __call__(self, batch: Batch, totals: Totals) -> StepOutput:
        every = self.hidden_weight > 0
        hidden, outputs = hidden_states(self.student, batch.input_ids_BT, every=every)
        teacher_hidden = teacher_head = None
        teacher_outputs: list[Any] = []
        if self.teacher is not None:
            with torch.no_grad():
                teacher_hidden, teacher_outputs = hidden_states(self.teacher, batch.input_ids_BT, every=every)
                teacher_hidden = teacher_hidden.flatten(0, 1)
            teacher_head = _head(self.teacher, batch.words_S)
        targets_BT = next_tokens(batch.input_ids_BT) if batch.places_BT is None else batch.places_BT
        loss, lm_sum, kl_sum = chunked_language_model_loss(
            hidden.flatten(0, 1),
            _head(self.student, batch.words_S),
            targets_BT.flatten(),
            teacher_hidden_NH=teacher_hidden,
            teacher_head_VH=teacher_head,
            lm_weight=self.lm_weight,
            kl_weight=1.0 - self.lm_weight,
            chunk_function=self.chunk,
        )
        metrics: dict[str, Any] = {"lm": lm_sum / totals.answers}
        if self.teacher is not None:
            metrics["kl"] = kl_sum / totals.answers
        loss = loss / totals.answers
        if every:
            error = block_errors_sum(outputs, teacher_outputs, error=self.hidden_error, gains=self.gains)
            error = error / totals.tokens
            metrics["hidden"] = error.detach()
            loss = loss + self.hidden_weight * error
        return StepOutput(loss, metrics)


def _head(model: Any, words_S: Tensor | None) -> Tensor:
    """Weight of the output head, [V, H], or its rows of these words."""
    weight: Tensor = head_weight(model)
    return weight if words_S is None else weight.index_select(0, words_S)


def ternary_warmup(model: Any, total_steps: int, fraction: float) -> Callable[[int], None]:
    """Callback that blends weights from full precision (lambda 0) to ternary (1) over a share of the steps."""
    layers = [m for m in model.modules() if isinstance(m, BitLinear)]
    warmup_steps = round(fraction * total_steps)

    def before_step(step: int) -> None:
        blend = 1.0 if step >= warmup_steps else step / warmup_steps
        for layer in layers:
            layer.ternary_blend = blend

    return before_step


def pretrain(run: Run, refined: Path) -> Path:
    """Stage 2; returns the folder of the ternary base (shared cache), and notes it in `base.json`."""
    config = run.recipe.pretrain
    assert config is not None
    if config.base is not None:
        folder = _given_base(run, Path(config.base).expanduser())
        _point_to(run, folder)
        return folder
    if config.corpus is None:
        raise ArtifactError(
            "pretrain: neither `corpus` nor `base` is set; "
            "name a corpus, or set `pretrain: null` to leave stage 2 out"
        )
    source, tokenizer, shards = _source_and_corpus(run)
    section = run.section("pretrain")
    section["corpus"] = shards.fingerprint
    section.pop("seed")  # the data order is a key of its own
    inputs = {
        "model": source_fingerprint(run.recipe.model),
        "refined": run.keys["refine"],
        "pretrain": section,
        "seed": _seed(run),
    }
    if config.start is not None:
        before = _verified_base(run, Path(config.start).expanduser(), "start")
        del section["start"], inputs["refined"]
        inputs["start"] = before["key"]
    key = artifact.hash_json(inputs)
    folder = Path(config.cache_dir).expanduser() / key[:16]
    if not run.finished("pretrain", folder, inputs):
        with artifact.locked(folder):
            if not run.finished(
                "pretrain", folder, inputs
            ):  # now; a run of another task may just have made it
                _make_base(run, refined, folder, inputs, source, tokenizer, shards)
    _point_to(run, folder)
    return folder


def _make_base(
    run: Run, refined: Path, folder: Path, inputs: dict[str, Any], source: Any, tokenizer: Any, shards: Any
) -> None:
    config = run.recipe.pretrain
    assert config is not None
    before = refined if config.start is None else Path(config.start).expanduser()
    student, _, manifest = load_student(before, device=run.device)
    teacher = None if config.objective == "lm" else source.requires_grad_(False).eval()
    trunk = branch.trunk(inputs, config, _total_steps(config))
    result = _train(run, student, teacher, shards, trunk, before)
    branched_from = branch.branched_from(run.checkpoints("pretrain"))
    run.save_artifact(
        "pretrain",
        student,
        tokenizer,
        folder,
        kind="base",
        plan=manifest["plan"],
        extra={
            **run.meta("pretrain", inputs, result),
            "branched_from": branched_from,
            **({} if config.start is None else {"started_from": _spent(manifest)}),
        },
    )


def _spent(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """Key and cost of the base that stage 2 went on from."""
    return {"key": manifest["key"], **(artifact.training_cost(manifest) or {})}


def _seed(run: Run) -> int:
    assert run.recipe.pretrain is not None
    return run.recipe.seed if run.recipe.pretrain.seed is None else run.recipe.pretrain.seed


def _order_seed(run: Run) -> int:
    """Seed of the data order: another one than that of the base it goes on from."""
    config = run.recipe.pretrain
    assert config is not None
    if config.start is None:
        return _seed(run)
    key = artifact.read_manifest(Path(config.start).expanduser())["key"]
    return int(artifact.hash_json([_seed(run), key])[:8], 16)


def _total_steps(config: PretrainConfig) -> int:
    return max(1, round(config.budget_tokens / (config.loop.batch_rows * config.sequence_length)))


def _processes(config: PretrainConfig, device: torch.device) -> int:
    """Resolve `pretrain.processes`.

    Raises:
        RecipeError: more than there are GPUs to see, or rows in a batch.
    """
    gpus = len(replicas.visible_gpus()) if device.type == "cuda" else 0
    if config.processes == "auto":
        return max(1, min(gpus, config.loop.batch_rows))
    if device.type == "cuda" and config.processes > gpus:
        raise RecipeError(f"pretrain.processes: {config.processes}, but {gpus} GPUs are visible; use auto")
    if config.processes > config.loop.batch_rows:
        raise RecipeError(
            f"pretrain.processes: {config.processes} for {config.loop.batch_rows} rows of a step "
            "(pretrain.loop.batch_rows); at most one a row"
        )
    return config.processes


def _train(run: Run, student: Any, teacher: Any | None, shards: Any, trunk: Path, before: Path) -> FitResult:
    """Train the student, alone or as the first of several processes."""
    config = run.recipe.pretrain
    assert config is not None
    total_steps = _total_steps(config)
    branch.check(config, total_steps)
    processes = _processes(config, run.device)
    checkpoints = run.checkpoints("pretrain")
    if config.optim.schedule == "wsd":
        branch.start(trunk, checkpoints, run.keys["pretrain"], branch.stable_end(config, total_steps))
    job = {
        "recipe": run.recipe.model_dump(mode="json", by_alias=True),
        "run_dir": str(run.run_dir),
        "before": str(before),
        "key": run.keys["pretrain"],
        "device": run.device.type,
        "processes": processes,
    }
    with replicas.led(processes, "bitdistill.stages.replica", job, run.device, run.run_dir / "logs") as group:
        return _fit(run, student, teacher, shards, group, trunk)


def follow(run: Run, before: Path, rank: int, processes: int, meeting: Path) -> None:
    """Stage 2 in a process beside the one that leads; writes nothing.

    Args:
        before: what stage 2 begins with.
        rank: 1 to processes - 1.
        meeting: see `replicas.join`.
    """
    config = run.recipe.pretrain
    assert config is not None
    group = replicas.join(rank, processes, meeting, run.device)
    source, _, shards = _source_and_corpus(run)
    student, _, _ = load_student(before, device=run.device)
    teacher = None if config.objective == "lm" else source.requires_grad_(False).eval()
    _fit(run, student, teacher, shards, group, None)


def _source_and_corpus(run: Run) -> tuple[Any, Any, TokenShards]:
    """Full-precision model, tokenizer and corpus."""
    # In the dtype it runs in: casting a float32 model later would round its rotary frequencies too.
    dtype = "bfloat16" if run.device.type == "cuda" else "float32"
    source, tokenizer = load_source(run.recipe.model, dtype=dtype, device=run.device)
    return source, tokenizer, open_corpus(run, tokenizer)


def _fit(
    run: Run, student: Any, teacher: Any | None, shards: TokenShards, group: Replicas, trunk: Path | None
) -> FitResult:
    config = run.recipe.pretrain
    assert config is not None
    loop, total_steps = config.loop, _total_steps(config)
    rows = replicas.rows_at_a_time(loop.batch_rows, loop.rows_at_a_time(config.sequence_length), group.size)
    words = None
    if config.sampled_words is not None:
        words = SampledWords(config.sampled_words, head_weight(student).shape[0], shards, _order_seed(run))
    batches = PackedBatches(
        shards,
        sequence_length=config.sequence_length,
        batch_rows=loop.batch_rows,
        micro_batch_rows=rows,
        seed=_order_seed(run),
        words=words,
    )
    compiling = run.compiling(loop)
    fused = kernels.usable(loop, run.device, student)
    if loop.gradient_checkpointing:
        student.gradient_checkpointing_enable()
    if compiling:
        compile_blocks(student)
        if teacher is not None:
            compile_blocks(teacher)
    before_step: Callable[[int], None] | None = None
    if config.ternary_warmup_fraction > 0:
        before_step = ternary_warmup(student, total_steps, config.ternary_warmup_fraction)
    with contextlib.ExitStack() as stack:
        stack.enter_context(causal_only(student, *([] if teacher is None else [teacher])))
        if fused:
            before_step = kernels.FusedAfterWarmup(student, stack, before_step, loop.int8_backward)
            stack.enter_context(fastest_attention(student.config, rows, config.sequence_length, run.device))
        if trunk is not None:
            before_step = branch.keeper(trunk, run.checkpoints("pretrain"), config.branch_steps, before_step)
        return fit(
            student,
            batches,
            LanguageModelStep(student, teacher, config, compiling, fused),
            optim=config.optim,
            loop=loop,
            total_steps=total_steps,
            device=run.device,
            tracker=run.tracker("pretrain", total_steps),
            checkpoint_root=run.checkpoints("pretrain"),
            key=run.keys["pretrain"],
            before_step=before_step,
            replicas=group,
            fused=fused,
        )


def _given_base(run: Run, folder: Path) -> Path:
    run.keys["pretrain"] = str(_verified_base(run, folder, "base")["key"])
    log.info("pretrain: using the ternary base %s", folder)
    return folder


def _verified_base(run: Run, folder: Path, key: str) -> dict[str, Any]:
    """Manifest of a base that the recipe names by `pretrain.<key>`.

    Raises:
        ArtifactError: it is no ternary base, or of another model, or made with other settings than the recipe's.
    """
    manifest = artifact.verify(folder)
    if manifest.get("kind") != "base":
        raise ArtifactError(
            f"pretrain.{key}: {folder}: kind {manifest.get('kind')!r}, a ternary base is needed; "
            "run `bitdistill pretrain`"
        )
    made_from, own = manifest.get("inputs", {}).get("model"), source_fingerprint(run.recipe.model)
    if made_from != own:
        raise ArtifactError(
            f"pretrain.{key}: {folder}: this ternary base was made from another model than {run.recipe.model.path} "
            f"(fingerprint {str(made_from)[:12]}, not {own[:12]}); make one with `bitdistill pretrain`"
        )
    check_base(run.recipe, manifest, key, folder)
    return manifest


def _point_to(run: Run, folder: Path) -> None:
    with artifact.storage_errors(run.run_dir):
        text = json.dumps({"path": str(folder.resolve()), "key": run.keys["pretrain"]}, indent=2)
        (run.run_dir / "base.json").write_text(text + "\n", "utf-8")
