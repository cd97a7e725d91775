#!/usr/bin/env python3
"""Training speed on one GPU: kernels, then whole steps side by side. One JSON object a line.

    python benchmarks/train_speed.py --out speed.jsonl                      all sections
    python benchmarks/train_speed.py --section check --section gemm
    python benchmarks/train_speed.py --section train --shape 0.6b --case fused --case bf16_compiled

Sections run one by one; a failure is a line with `error`, and the next one runs. Weights are random, tokens too: speed
does not depend on them. Steps are timed by the loop's own update (gradient clipping, AdamW, one read of the loss).
`check` compares the kernels with their slow twins on this GPU first; figures of a run in which it failed mean nothing.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from common import DEVICE, NOMINAL_BF16, SHAPES, Report, Shape, flops_a_token
from kernel_sections import KERNEL_SECTIONS
from transformers import AutoModelForCausalLM

from bitdistill.config import DistillConfig, Loop, Optim, PretrainConfig
from bitdistill.data.batches import Batch, index_of
from bitdistill.losses.logits import chunked_language_model_loss
from bitdistill.models.attention import causal_only
from bitdistill.models.forward import final_hidden, head_weight, next_tokens
from bitdistill.models.fused import fused_layers
from bitdistill.models.surgery import refine
from bitdistill.stages.distill import DistillStep
from bitdistill.stages.pretrain import LanguageModelStep
from bitdistill.train.compile import compile_blocks
from bitdistill.train.gradients import EagerGradients, ReplayedGradients
from bitdistill.train.loop import _update
from bitdistill.train.optim import build_optimizer
from bitdistill.train.step import StepOutput

OPTIM = Optim(learning_rate=1e-4, schedule="constant", warmup_fraction=0.0)


def corpus_batch(config: Any, rows: int, length: int, seed: int) -> Batch:
    """Random full rows, as stage 2 sees them."""
    ids = torch.randint(0, config.vocab_size, (rows, length), generator=torch.Generator().manual_seed(seed))
    mask = torch.ones(rows, length, dtype=torch.bool)
    answers = mask.clone()
    answers[:, 0] = False
    return Batch(
        ids, mask, answers, torch.full((rows,), -1), list(range(rows)), 1.0, rows * length,
        answer_index_N=index_of(answers), real_index_N=index_of(mask),
    )  # fmt: skip


def task_batch(config: Any, rows: int, length: int, seed: int) -> Batch:
    """Random right-padded rows with one answer token each, as stage 3 sees them."""
    batch = corpus_batch(config, rows, length, seed)
    real = torch.randint(length // 2, length + 1, (rows, 1), generator=torch.Generator().manual_seed(seed))
    mask = torch.arange(length)[None, :] < real
    answers = torch.arange(length)[None, :] == real - 1
    return Batch(
        batch.input_ids_BT, mask, answers, batch.labels_B, batch.indices, 1.0, int(mask.sum()),
        answer_index_N=index_of(answers), real_index_N=index_of(mask),
    )  # fmt: skip


def plain_step(model: Any, teacher: Any | None) -> Any:
    """What a Trainer computes: the model's own float32 loss, and a KL over whole logits with a teacher."""

    def step(batch: Batch, totals: Any) -> StepOutput:
        ids = batch.input_ids_BT
        if teacher is None:
            return StepOutput(model(input_ids=ids, labels=ids, use_cache=False).loss)
        with torch.no_grad():
            wanted = torch.log_softmax(teacher(input_ids=ids, use_cache=False).logits.float(), -1)
        logits = torch.log_softmax(model(input_ids=ids, use_cache=False).logits.float(), -1)
        loss = torch.nn.functional.kl_div(logits, wanted, reduction="sum", log_target=True)
        return StepOutput(loss / totals.tokens)

    return step


def fused_loss_step(model: Any) -> Any:
    """Well-made bfloat16 training: blocks compiled, cross-entropy fused with the head."""
    from bitdistill.kernels.head import fused_language_model_chunk

    def step(batch: Batch, totals: Any) -> StepOutput:
        hidden = final_hidden(model, batch.input_ids_BT).flatten(0, 1)
        loss, _, _ = chunked_language_model_loss(
            hidden, head_weight(model), next_tokens(batch.input_ids_BT).flatten(),
            lm_weight=1.0, kl_weight=0.0, chunk_function=fused_language_model_chunk,
        )  # fmt: skip
        return StepOutput(loss / totals.answers)

    return step


CASES = {
    # name: (student, objective, compiled, what it stands for)
    "hf_bf16": ("plain", "lm", False, "Hugging Face Trainer's step, bf16 autocast"),
    "hf_bf16_kl": ("plain", "kl", False, "the same with a naive KL to a teacher"),
    "bf16_compiled": ("plain", "lm", True, "blocks compiled, fused cross-entropy"),
    "onebitllms": ("onebitllms", "lm", False, "onebitllms' layers in a Trainer's step"),
    "torchao": ("torchao", "lm", True, "torchao's bitnet training, blocks compiled, fused cross-entropy"),
    "reference_lm": ("ternary", "lm", True, "ours without kernels"),
    "reference": ("ternary", "kl", True, "ours without kernels"),
    "fused_lm": ("fused", "lm", True, "ours"),
    "fused": ("fused", "kl", True, "ours"),
    "fused_eager": ("fused", "kl", False, "ours, blocks not compiled"),
}


@contextlib.contextmanager
def built(case: str, shape: Shape) -> Iterator[tuple[Any, Any, Callable[[], None]]]:
    """Model, step function and what runs before each step."""
    kind, objective, compiling, _ = CASES[case]
    torch._dynamo.reset()
    torch.manual_seed(0)
    source = AutoModelForCausalLM.from_config(shape.config(), dtype=torch.float32, attn_implementation="sdpa")
    source = source.to(DEVICE)
    teacher = None
    if objective == "kl":
        # Parameters only: a cast of the whole model would round its rotary frequencies
        teacher = AutoModelForCausalLM.from_config(
            shape.config(), dtype=torch.bfloat16, attn_implementation="sdpa"
        )
        teacher = teacher.to(DEVICE).requires_grad_(False).eval()
    model = source
    if kind in ("ternary", "fused"):
        model = refine(source, gains="ones")
        del source
    elif kind == "onebitllms":
        from onebitllms import replace_linear_with_bitnet_linear

        replaced = replace_linear_with_bitnet_linear(model.model)
        model.model = model.model if replaced is None else replaced
        model = model.to(DEVICE)
    elif kind == "torchao":
        from torchao.prototype.quantized_training import bitnet_training
        from torchao.quantization import quantize_

        # Its product takes no autocast: parameters and moments in bfloat16, which also makes its optimizer cheaper.
        model = model.to(torch.bfloat16)
        quantize_(model.model.layers, bitnet_training())
    model.train()
    if compiling:
        compile_blocks(model)
        if teacher is not None:
            compile_blocks(teacher)
    with contextlib.ExitStack() as stack:
        refresh: Callable[[], None] = lambda: None  # noqa: E731
        if kind in ("ternary", "fused"):
            config = PretrainConfig(objective=objective, loop=Loop(batch_rows=shape.rows))
            if kind == "fused":
                refresh = stack.enter_context(fused_layers(model)).refresh
            step = LanguageModelStep(model, teacher, config, compiling, kernels=kind == "fused")
        elif compiling:
            step = fused_loss_step(model)
        else:
            step = plain_step(model, teacher)
        if not case.startswith("hf") and kind != "onebitllms":
            stack.enter_context(causal_only(model, *([] if teacher is None else [teacher])))
        yield model, step, refresh


def timed_steps(
    model: Any, gradients: Any, batches: list[list[Batch]], refresh: Callable[[], None], limit_s: float
) -> dict[str, Any]:
    """Steps a second after three steps of warming up: at most 20, or as many as fit the limit."""
    optimizer = build_optimizer(model, OPTIM)
    parameters = [p for p in model.parameters() if p.requires_grad]
    times: list[float] = []
    losses: list[float] = []
    with gradients.stream():
        warm_from = time.perf_counter()
        started = warm_from
        for k in range(23):
            if k == 3:
                torch.cuda.synchronize()
                torch.cuda.reset_peak_memory_stats()
                started = time.perf_counter()
                warm_s = started - warm_from
            if k > 5 and time.perf_counter() - started > limit_s:
                break
            at = time.perf_counter()
            refresh()
            losses.append(
                _update(parameters, optimizer, batches[k % len(batches)], gradients, 1e-4, 1.0)["loss"]
            )
            times.append(time.perf_counter() - at)
        torch.cuda.synchronize()
    tokens = sum(b.tokens for b in batches[0])
    step_s = statistics.median(times[3:])
    return {
        "step_ms": step_s * 1e3, "tokens_s": tokens / step_s, "steps": len(times) - 3, "warm_up_s": warm_s,
        "peak_gb": torch.cuda.max_memory_allocated() / 1e9, "first_loss": losses[0], "last_loss": losses[-1],
    }  # fmt: skip


def section_train(report: Report, shape: Shape, name: str, cases: list[str], limit_s: float) -> None:
    """Whole stage-2 steps, case by case."""
    config = shape.config()
    for case in cases:
        if report.over("train", shape=name, case=case):
            continue
        with report.caught("train", shape=name, case=case), built(case, shape) as (model, step, refresh):
            _, objective, _, about = CASES[case]
            # Naive losses keep several float32 copies of all logits: smaller micro-batches, as a Trainer would need.
            naive = CASES[case][0] in ("plain", "onebitllms") and not CASES[case][2]
            fit_rows = int(6e10 // (16 * config.vocab_size * shape.length)) if naive else shape.rows
            micro = shape.rows
            while micro > max(1, fit_rows):
                micro //= 2
            batches = [
                [corpus_batch(config, micro, shape.length, 100 * k + m) for m in range(shape.rows // micro)]
                for k in range(4)
            ]
            found = timed_steps(model, EagerGradients(step, DEVICE, "bfloat16"), batches, refresh, limit_s)
            rate = flops_a_token(config, shape.length, objective == "kl") * found["tokens_s"]
            report.line(
                "train", shape=name, case=case, about=about, rows=shape.rows, micro_rows=micro,
                length=shape.length, objective=objective, model_tflops=rate / 1e12, mfu=rate / NOMINAL_BF16, **found,
            )  # fmt: skip


def section_stage3(report: Report, shape: Shape, name: str, limit_s: float) -> None:
    """Fine-tuning on short rows with a teacher: eager, replayed from CUDA graphs, each with and without kernels."""
    config, rows, length = shape.config(), 128, 48
    for kernels in (False, True):
        for replay in (False, True):
            if report.over("stage3", shape=name, kernels=kernels, replay=replay):
                continue
            with (
                report.caught("stage3", shape=name, kernels=kernels, replay=replay),
                contextlib.ExitStack() as stack,
            ):
                torch._dynamo.reset()
                torch.manual_seed(0)
                build = lambda dtype: AutoModelForCausalLM.from_config(  # noqa: E731
                    shape.config(), dtype=dtype, attn_implementation="sdpa"
                ).to(DEVICE)
                teacher = build(torch.bfloat16).requires_grad_(False).eval()
                student = refine(build(torch.float32), gains="ones").train()
                layer = config.num_hidden_layers - 2
                # gamma fixed: nothing is measured, so every step may be replayed
                step = DistillStep(student, teacher, DistillConfig(gamma=60.0), [layer])
                step.before_step(1)
                stack.enter_context(causal_only(student, teacher))
                refresh: Callable[[], None] = lambda: None  # noqa: E731
                if kernels:
                    refresh = stack.enter_context(fused_layers(student)).refresh
                if replay:
                    parameters = [p for p in student.parameters() if p.requires_grad]
                    gradients: Any = ReplayedGradients(step, parameters, DEVICE, "bfloat16")
                else:
                    gradients = EagerGradients(step, DEVICE, "bfloat16")
                batches = [[task_batch(config, rows, length, k)] for k in range(1)]
                found = timed_steps(student, gradients, batches, refresh, limit_s)
                captured = len(gradients.seen) if replay else 0
                report.line(
                    "stage3", shape=name, kernels=kernels, replay=replay, rows=rows, length=length,
                    captured_shapes=captured, still_replaying=bool(getattr(gradients, "enabled", False)), **found,
                )  # fmt: skip


def section_profile(report: Report, shape: Shape, name: str, cases: list[str]) -> None:
    """Where the device time of a step goes: kernels by total time."""
    from torch.profiler import ProfilerActivity, profile

    for case in cases:
        if report.over("profile", shape=name, case=case):
            continue
        with report.caught("profile", shape=name, case=case), built(case, shape) as (model, step, refresh):
            gradients = EagerGradients(step, DEVICE, "bfloat16")
            optimizer = build_optimizer(model, OPTIM)
            parameters = [p for p in model.parameters() if p.requires_grad]
            batch = [corpus_batch(shape.config(), shape.rows, shape.length, 0)]

            def one(
                parameters: Any = parameters, optimizer: Any = optimizer, batch: Any = batch,
                gradients: Any = gradients, refresh: Any = refresh,
            ) -> None:  # fmt: skip
                refresh()
                _update(parameters, optimizer, batch, gradients, 1e-4, 1.0)

            for _ in range(3):
                one()
            torch.cuda.synchronize()
            with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as found:
                at = time.perf_counter()
                for _ in range(2):
                    one()
                torch.cuda.synchronize()
                wall_ms = (time.perf_counter() - at) * 500
            kernels: dict[str, list[float]] = {}
            for event in found.events():
                if event.device_type == torch.autograd.DeviceType.CUDA:
                    entry = kernels.setdefault(event.name, [0.0, 0])
                    entry[0] += event.device_time_total / 2e3
                    entry[1] += 1
            top = sorted(kernels.items(), key=lambda item: -item[1][0])
            report.line(
                "profile", shape=name, case=case, wall_ms=wall_ms,
                device_ms=sum(v[0] for v in kernels.values()), launches=sum(int(v[1]) for v in kernels.values()) // 2,
            )  # fmt: skip
            for kernel, (ms, count) in top[:45]:
                report.line("profile", case=case, kernel=kernel[:110], ms=ms, launches=count / 2)


SECTIONS = [*KERNEL_SECTIONS, "train", "profile", "stage3"]


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--section", action="append", choices=SECTIONS, help="default: all, in this order")
    parser.add_argument("--shape", action="append", choices=list(SHAPES), help="default: 135m")
    parser.add_argument("--case", action="append", choices=list(CASES), help="of train and profile")
    parser.add_argument("--limit-s", type=float, default=4.0, help="seconds of timed steps a case")
    parser.add_argument(
        "--total-s", type=float, default=230.0, help="no new section or case starts after this many seconds"
    )
    parser.add_argument("--attention", choices=["default", "cudnn", "flash"], default="default")
    parser.add_argument("--out", type=Path, help="JSON lines are appended here")
    arguments = parser.parse_args()
    report = Report(arguments.out)
    logging.basicConfig(level=logging.INFO, stream=sys.stderr)
    if not torch.cuda.is_available():
        print("no CUDA device is visible; this benchmark needs one", file=sys.stderr)
        return 2
    import transformers
    import triton

    report.line(
        "machine", gpu=torch.cuda.get_device_name(), torch=torch.__version__, triton=triton.__version__,
        transformers=transformers.__version__, attention=arguments.attention, command=" ".join(sys.argv),
    )  # fmt: skip
    report.deadline = time.monotonic() + arguments.total_s
    with attention_backend(arguments.attention):
        for section in arguments.section or SECTIONS:
            for name in arguments.shape or ["135m"]:
                if report.over(section, shape=name):
                    continue
                shape = SHAPES[name]
                if section in KERNEL_SECTIONS:
                    with report.caught(section, shape=name):
                        KERNEL_SECTIONS[section](report, shape, name)
                elif section == "train":
                    section_train(report, shape, name, arguments.case or list(CASES), arguments.limit_s)
                elif section == "profile":
                    section_profile(report, shape, name, arguments.case or ["fused"])
                else:
                    section_stage3(report, shape, name, arguments.limit_s)
    return 1 if report.failed else 0


def attention_backend(choice: str) -> contextlib.AbstractContextManager[Any]:
    """sdpa restricted to one backend, for the whole run."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    if choice == "default":
        return contextlib.nullcontext()
    return sdpa_kernel([SDPBackend.CUDNN_ATTENTION if choice == "cudnn" else SDPBackend.FLASH_ATTENTION])


if __name__ == "__main__":
    sys.exit(main())
