"""Parameters, sizes, peak memory and time of a run, from shapes alone. Every figure is an estimate.

Memory of a training stage, in bytes, for P parameters, C compute bytes (2 bfloat16, 4 float32):

    latents 4P + gradients 4P + AdamW moments 8P + bfloat16 weight copies + teacher C P
    + activations: (bytes a token and block) x blocks x tokens of a micro-batch
    + head: logits of the rows that count (stage 2: chunks of 8,192 tokens)

Time: floating-point operations over a sustained rate. A trained token costs 6 N (forward 2 N, backward 4 N),
a teacher's or scored token 2 N, N being the weights that multiply; attention adds 12 (4) T x width a block.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from bitdistill.config import Loop, Recipe
from bitdistill.models.families import Kind, Layout

SUBLN_KINDS: dict[str, frozenset[Kind]] = {
    "paper": frozenset(("o", "down")),
    "every_linear": frozenset(("q", "k", "v", "o", "gate", "up", "down")),
    "none": frozenset(),
}
FLOAT_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}
HEAD_CHUNK_TOKENS = 8192


@dataclass(frozen=True)
class Device:
    """A class of devices: sustained FLOP/s of training (not peak), memory. CPU figures are for one core."""

    name: str
    flops: float
    memory_bytes: int | None
    basis: str


# "measured": with this method's training loop; the others are 30% of the data sheet's dense bfloat16 peak.
DEVICES: dict[str, Device] = {
    "cpu": Device(
        "CPU core", 60e9, None, "measured: 70 GFLOP/s float32 on one AVX-512 server core, less 15%"
    ),
    "h200": Device(
        "NVIDIA H200", 270e12, 141 * 10**9, "measured: 336k tokens/s at 135M parameters, compiled"
    ),
    "h100": Device("NVIDIA H100", 270e12, 80 * 10**9, "taken from the H200, same cores"),
    "a100": Device("NVIDIA A100", 94e12, 80 * 10**9, "30% of 312 TFLOP/s"),
    "l40s": Device("NVIDIA L40S", 109e12, 48 * 10**9, "30% of 362 TFLOP/s"),
    "rtx4090": Device("NVIDIA RTX 4090", 50e12, 24 * 10**9, "30% of 165 TFLOP/s"),
    "rtx3090": Device("NVIDIA RTX 3090", 21e12, 24 * 10**9, "30% of 71 TFLOP/s"),
}
_MODEL_NAMES = {
    "H200": "h200",
    "H100": "h100",
    "A100": "a100",
    "L40S": "l40s",
    "4090": "rtx4090",
    "3090": "rtx3090",
}
TERNARY_SLOWDOWN = {"cpu": 1.3, "gpu": 1.3}
"""Time of a ternary training token over a plain one (measured on a CPU core: 1.25 to 1.32)."""
FURTHER_PROCESS = 0.55
"""Of one GPU's speed that a further one adds to stage 2 (measured: three H200 are 2.1 times one at 135M parameters)."""
STEP_S_PER_BLOCK = {"plain": 0.8e-3, "ternary": 2.3e-3, "teacher": 0.3e-3}
"""Least seconds of a GPU step a block, however few tokens: kernels are launched one by one (measured: 70 ms a
step of stage 3 at 30 blocks). Short rows are bound by this, not by FLOP/s."""


@dataclass(frozen=True)
class Work:
    """Rows that a stage sees: count and mean tokens a row (prompt and answer)."""

    rows: int
    tokens_per_row: float
    max_length: int


@dataclass(frozen=True)
class Stage:
    """Estimate of one stage. `memory` maps parts to bytes; they add up to `peak_bytes`."""

    name: str
    tokens: int
    seconds: float
    memory: dict[str, int]

    @property
    def peak_bytes(self) -> int:
        return sum(self.memory.values())

    def after(self, other: Stage, times: int) -> Stage:
        """This stage with `times` others' work before it, whose memory is free again when it begins."""
        larger = max(self.memory, other.memory, key=lambda parts: sum(parts.values()))
        return Stage(
            self.name, self.tokens + times * other.tokens, self.seconds + times * other.seconds, larger
        )


def detect_device() -> str:
    """Key into DEVICES for this machine, from the NVIDIA driver's files: no CUDA library is loaded."""
    for path in sorted(Path("/proc/driver/nvidia/gpus").glob("*/information")):
        text = path.read_text("utf-8", "replace")
        for mark, key in _MODEL_NAMES.items():
            if mark in text:
                return key
        return (
            "rtx3090"  # an unknown GPU: the slowest known class, so that the time is not promised too short
        )
    return "cpu"


def subln_gains(layout: Layout, subln: str) -> int:
    """Elements of all SubLN gains that stage 1 adds."""
    kinds = SUBLN_KINDS[subln]
    return sum(linear.in_features for linear in layout.linears if linear.kind in kinds)


def packed_bytes(layout: Layout, subln: str, float_dtype: str) -> dict[str, int]:
    """Size of the packed student's tensors: 2-bit codes padded to a byte a row, float32 scales, the rest."""
    width = FLOAT_BYTES[float_dtype]
    codes = sum(linear.out_features * -(-linear.in_features // 4) for linear in layout.linears)
    embedding = sum(kept.size for kept in layout.kept if kept.reason in ("embedding", "head"))
    small = layout.kept_parameters - embedding + subln_gains(layout, subln)
    return {
        "codes": codes,
        "scales": 4 * len(layout.linears),
        "embedding": embedding * width,
        "other": small * width,
    }


def stages(
    recipe: Recipe,
    layout: Layout,
    train: Work | None,
    test: Work | None,
    device: str,
    distilled: Work | None = None,
    teacher: Layout | None = None,
) -> list[Stage]:
    """One estimate a training stage and one for scoring; task stages are left out when rows are unknown.

    Args:
        distilled: rows of stage 3, where they are more than the training rows.
        teacher: of a teacher that is another model.
    """
    rate = DEVICES[device].flops * (_threads(recipe) if device == "cpu" else 1)
    kind = "cpu" if device == "cpu" else "gpu"
    context = _Context(recipe, layout, rate, kind)
    other = None if teacher is None else _Context(recipe, teacher, rate, kind)
    found = []
    if train is not None:
        found.append((other or context).task("sft", recipe.sft.loop, recipe.sft.epochs, train))
    if recipe.pretrain is not None and recipe.pretrain.base is None:
        found.append(context.pretrain())
    if train is not None and recipe.augment is not None:
        found.append(context.augment(train, recipe.augment.rows))
    if train is not None:
        stage = context.task("distill", recipe.distill.loop, recipe.distill.epochs, distilled or train)
        if further := recipe.distill.teachers - 1:
            stage = stage.after(found[0], further)
        found.append(stage if other is None else other.labelled(stage, distilled or train))
        if recipe.bitnet_sft is not None:
            found.append(context.task("bitnet_sft", recipe.bitnet_sft.loop, recipe.bitnet_sft.epochs, train))
    if test is not None:
        found.append(context.scoring(test, other))
    return found


@dataclass(frozen=True)
class _Context:
    recipe: Recipe
    layout: Layout
    rate: float
    kind: str

    def task(self, name: str, loop: Loop, epochs: float, work: Work) -> Stage:
        """sft, distill, bitnet_sft: logits for the answer tokens only, unless stage 3 distils all of them."""
        teacher = name == "distill" and self.recipe.teacher is None  # beside the student in every step
        ternary = name not in ("sft", "augment")
        tokens = int(work.rows * work.tokens_per_row * epochs)
        rows = loop.micro_batch_rows or loop.batch_rows
        largest = rows * work.max_length
        if loop.micro_batch_tokens is not None:  # shorter rows fill it
            largest = min(largest, max(loop.micro_batch_tokens, work.max_length))
        flops = self.flops_per_token(work.tokens_per_row, train=True) * self.slowdown(ternary)
        teachers = self.recipe.distill.teachers if teacher else 0
        flops += self.flops_per_token(work.tokens_per_row, train=False) * teachers
        answers = rows * (8 if self.recipe.task.kind == "classification" else self.recipe.task.max_new_tokens)
        logits = answers * self.layout.vocab * 4 * (3 + 2 * teachers)
        subln = {"sft": "none", "augment": "none", "distill": self.recipe.refine.subln}.get(name, "none")
        if name == "bitnet_sft" and self.recipe.bitnet_sft is not None:
            subln = self.recipe.bitnet_sft.subln
        memory = self.memory(loop, largest, ternary=ternary, teacher=teacher, subln=subln)
        if teacher and self.recipe.distill.hidden_weight:
            memory["block outputs"] = self.teacher_outputs(largest)
        if teachers > 1:
            memory["teacher"] *= teachers
        if teacher and self.recipe.distill.prompt_weight:
            head = self.layout.hidden * self.layout.vocab
            flops += 6 * head * self.slowdown(True) + 2 * head
            logits += min(largest, HEAD_CHUNK_TOKENS) * self.layout.vocab * 4 * 6 + head * 4
        micro_steps = work.rows * epochs / rows
        seconds = max(tokens * flops / self.rate, micro_steps * self.step_seconds(ternary, teachers))
        return Stage(name, tokens, seconds, {**memory, "logits": logits})

    def labelled(self, distill: Stage, work: Work) -> Stage:
        """Stage 3 with this teacher's pass over all its rows before it, whose memory is free again when it begins."""
        tokens = int(work.rows * work.tokens_per_row)
        seconds = tokens * self.flops_per_token(work.tokens_per_row, train=False) / self.rate
        return distill.after(Stage("scores", tokens, seconds, self.scoring_memory(work, 4)), 1)

    def augment(self, train: Work, rows: int) -> Stage:
        """The writer's fine-tuning, and one pass over the tokens of the rows that it writes."""
        writer = self.task("augment", self.recipe.sft.loop, self.recipe.sft.epochs, train)
        tokens = int(rows * train.tokens_per_row)
        head = 2 * self.layout.hidden * self.layout.vocab
        flops = self.flops_per_token(train.tokens_per_row, train=False) + head
        return Stage(
            "augment", writer.tokens + tokens, writer.seconds + tokens * flops / self.rate, writer.memory
        )

    def step_seconds(self, ternary: bool, teachers: int) -> float:
        """Launch-bound floor of one micro-batch; none on a CPU."""
        if self.kind == "cpu":
            return 0.0
        block = STEP_S_PER_BLOCK["ternary" if ternary else "plain"]
        return self.layout.layers * (block + STEP_S_PER_BLOCK["teacher"] * teachers)

    def pretrain(self) -> Stage:
        """Stage 2: logits of every token, a chunk at a time, with the head's gradient in float32."""
        config = self.recipe.pretrain
        assert config is not None
        teacher = config.objective != "lm"
        tokens = config.loop.rows_at_a_time(config.sequence_length) * config.sequence_length
        words = config.sampled_words or self.layout.vocab
        head = 6 * self.layout.hidden * words
        flops = (self.flops_per_token(config.sequence_length, train=True) + head) * self.slowdown(True)
        flops += self.flops_per_token(config.sequence_length, train=False) + head / 3 if teacher else 0.0
        chunk = min(tokens, HEAD_CHUNK_TOKENS)
        logits = chunk * words * 4 * (6 if teacher else 4) + self.layout.hidden * self.layout.vocab * 4
        memory = self.memory(
            config.loop, tokens, ternary=True, teacher=teacher, subln=self.recipe.refine.subln
        )
        if teacher and config.hidden_weight:
            memory["block outputs"] = self.teacher_outputs(tokens)
        processes = 1 if config.processes == "auto" else config.processes  # what is visible is not asked here
        seconds = config.budget_tokens * flops / self.rate / (1 + FURTHER_PROCESS * (processes - 1))
        return Stage("pretrain", config.budget_tokens, seconds, {**memory, "logits": logits})

    def teacher_outputs(self, tokens: int) -> int:
        """Bytes of every block's output of the teacher; the student's are among its activations."""
        return tokens * self.layout.layers * self.layout.hidden * (2 if self.kind == "gpu" else 4)

    def scoring_memory(self, work: Work, width: int) -> dict[str, int]:
        """Weights and activations of `width` bytes for a batch of scoring."""
        layout, tokens = self.layout, self.recipe.eval.batch_rows * work.max_length
        activations = tokens * (4 * layout.hidden + 3 * layout.intermediate) * width
        return {"weights": layout.parameters * width, "activations": activations}

    def scoring(self, work: Work, teacher: _Context | None = None) -> Stage:
        """Teacher, student and, if wanted, the baseline, one after the other.

        Args:
            teacher: of another model.
        """
        models = 2 if self.recipe.bitnet_sft is None else 3
        generated = self.recipe.task.max_new_tokens if self.recipe.task.kind == "generation" else 0
        again = work.tokens_per_row if generated and self.recipe.eval.reference_nll else 0
        tokens = int(work.rows * (work.tokens_per_row + generated + again)) * models
        flops = self.flops_per_token(work.tokens_per_row, train=False)
        width = self.compute_bytes(self.recipe.sft.loop)
        memory = self.scoring_memory(work, width)
        if teacher is not None:
            flops += (teacher.flops_per_token(work.tokens_per_row, train=False) - flops) / models
            memory = max(memory, teacher.scoring_memory(work, width), key=lambda parts: sum(parts.values()))
        return Stage("eval", tokens, tokens * flops / self.rate, memory)

    def flops_per_token(self, length: float, *, train: bool) -> float:
        """Block weights and causal attention; the head is added where every token has logits."""
        layout = self.layout
        attention = 2 * layout.layers * length * layout.heads * layout.head_dim
        return (6 if train else 2) * layout.ternary_parameters + (3 if train else 1) * attention

    def slowdown(self, ternary: bool) -> float:
        return TERNARY_SLOWDOWN[self.kind] if ternary else 1.0

    def compute_bytes(self, loop: Loop) -> int:
        if loop.precision == "auto":
            return 2 if self.kind == "gpu" else 4
        return FLOAT_BYTES[loop.precision]

    def memory(self, loop: Loop, tokens: int, *, ternary: bool, teacher: bool, subln: str) -> dict[str, int]:
        """Weights, optimizer, teacher and activations of a training stage, in bytes."""
        layout, width = self.layout, self.compute_bytes(loop)
        parameters = layout.parameters + (subln_gains(layout, subln) if ternary else 0)
        block = activation_bytes(layout, width, ternary=ternary, subln=subln)
        # One block more: its gradients while backward is inside it. Checkpointing keeps block inputs only.
        kept = (
            4 * layout.hidden * layout.layers + block
            if loop.gradient_checkpointing
            else block * layout.layers
        )
        activations = tokens * (kept + block)
        parts = {"weights": 4 * parameters, "gradients": 4 * parameters, "adamw": 8 * parameters}
        if ternary:
            parts["codes"] = layout.ternary_parameters
        elif width == 2:
            parts["weight copies"] = 2 * layout.parameters
        if teacher:
            parts["teacher"] = (2 if self.kind == "gpu" else 4) * layout.parameters
        parts["activations"] = activations
        return parts


def activation_bytes(layout: Layout, width: int, *, ternary: bool, subln: str) -> int:
    """Bytes that one block keeps for backward, a token; `width` is 2 (autocast) or 4.

    Counted tensor by tensor (norms and SubLN compute in float32; a ternary linear keeps int8 codes in place
    of its input); tests/planning compares it with what autograd saves.
    """
    hidden, inner = layout.hidden, layout.intermediate
    queries, keys = layout.heads * layout.head_dim, layout.kv_heads * layout.head_dim
    norms = sum(kept.reason == "norm" and ".layers.0." in kept.name for kept in layout.kept)
    total = 8 * hidden * norms + 4 * norms
    total += (2 * queries + 2 * keys) * width + 4 * layout.heads
    if any(kept.reason == "q/k-norm" for kept in layout.kept):
        total += (queries + keys) * (4 + width) + 4 * (layout.heads + layout.kv_heads)
    if not ternary:
        # The two pre-norms' outputs (a bfloat16 copy each under autocast), and gate, silu(gate), up, product.
        return total + 2 * hidden * (4 if width == 4 else 5) + 4 * inner * width
    total += 3 * inner * width + 5 * hidden + queries + inner + 4 * 7
    # A SubLN keeps its float32 input and the normalised one; inputs that are float32 anyway are shared.
    shared = {"q": 0, "k": 0, "v": 0, "gate": 0, "up": 0, "o": 0 if width == 4 else 4, "down": 4}
    for linear in layout.linears:
        if linear.layer == 0 and linear.kind in SUBLN_KINDS[subln]:
            total += (4 + shared[linear.kind]) * linear.in_features + 4
    return total + (8 * hidden if subln == "every_linear" else 0)


def _threads(recipe: Recipe) -> int:
    available = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(recipe.threads or available, available)
