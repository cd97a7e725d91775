#!/usr/bin/env python3
"""Training speed on one GPU: kernels, then whole steps side by side. One JSON object a line.

    python benchmarks/train_speed.py --quick --out speed.jsonl              100 s: is it right, is it faster (135m)
    python benchmarks/train_speed.py --headline --out speed.jsonl           the published table, what matters first
    python benchmarks/train_speed.py --section check --section gemm
    python benchmarks/train_speed.py --section train --shape 0.6b --case fused --case bf16_compiled

Sections run one by one; a failure is a line with `error`, and the next one runs. Weights are random, tokens too: speed
does not depend on them. Steps are timed by the loop's own update (gradient clipping, AdamW, one read of the loss).
`check` (and the short `selfcheck`) compares the kernels with their slow twins on this GPU first; figures of a run in
which it failed mean nothing. `train_render.py` makes docs/train-speed.md from the lines.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from common import (
    DEVICE,
    NOMINAL_BF16,
    SHAPES,
    Report,
    Shape,
    block_matrices,
    corpus_batch,
    flops_a_token,
    profiled,
    timed_steps,
)
from kernel_sections import KERNEL_SECTIONS
from train_stage3 import CASES as STAGE3_CASES
from train_stage3 import section_stage3, section_stage3_profile
from transformers import AutoModelForCausalLM

from bitdistill.config import Loop, PretrainConfig
from bitdistill.data.batches import Batch
from bitdistill.losses.logits import chunked_language_model_loss
from bitdistill.models.attention import causal_only, fastest_attention
from bitdistill.models.forward import final_hidden, head_weight, next_tokens
from bitdistill.models.fused import fused_layers
from bitdistill.models.surgery import refine
from bitdistill.stages.pretrain import LanguageModelStep
from bitdistill.train.compile import compile_blocks
from bitdistill.train.gradients import (
    EagerGradients,
    ReplayedGradients,
    replayed_below,
)
from bitdistill.train.step import StepOutput


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

    step.replayable = True  # type: ignore[attr-defined]
    return step


CASES = {
    # name: (student, objective, compiled, replayed where the loop would, what it stands for)
    "fused_lm": ("fused", "lm", True, True, "ours"),
    "bf16_compiled": ("plain", "lm", True, True, "bf16, blocks compiled, fused cross-entropy"),
    "hf_bf16": ("plain", "lm", False, False, "Hugging Face Trainer's step, bf16 autocast"),
    "onebitllms": ("onebitllms", "lm", False, False, "onebitllms' layers in a Trainer's step"),
    "torchao": ("torchao", "lm", True, False, "torchao's bitnet training, compiled, fused cross-entropy"),
    "fused": ("fused", "kl", True, True, "ours, with teacher"),
    "reference": ("ternary", "kl", True, True, "ours without kernels, with teacher"),
    "reference_lm": ("ternary", "lm", True, True, "ours without kernels"),
    "hf_bf16_kl": ("plain", "kl", False, False, "Trainer's step with a naive KL to a teacher"),
    "fused_no_graph": ("fused", "kl", True, False, "ours, with teacher, not replayed"),
    "fused_lm_no_graph": ("fused", "lm", True, False, "ours, not replayed"),
    "fused_lm_int8": ("fused_int8", "lm", True, True, "ours, int8 products for gradients of inputs"),
    "fused_eager": ("fused", "kl", False, False, "ours, with teacher, blocks not compiled"),
}
TERNARY_KINDS = ("ternary", "fused", "fused_int8")


@contextlib.contextmanager
def built(case: str, shape: Shape) -> Iterator[tuple[Any, Any, Callable[[], None]]]:
    """Model, step function and what runs before each step."""
    kind, objective, compiling, _, _ = CASES[case]
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
    if kind in TERNARY_KINDS:
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
        if kind in TERNARY_KINDS:
            config = PretrainConfig.model_validate(
                {"objective": objective, "loop": {"batch_rows": shape.rows}}
            )
            if kind != "ternary":
                refresh = stack.enter_context(fused_layers(model, kind == "fused_int8")).refresh
            step = LanguageModelStep(model, teacher, config, compiling, fused=kind != "ternary")
        elif compiling:
            step = fused_loss_step(model)
        else:
            step = plain_step(model, teacher)
        if not case.startswith("hf") and kind != "onebitllms":
            stack.enter_context(causal_only(model, *([] if teacher is None else [teacher])))
            # Whoever is compiled gets the faster attention: it is no merit of ternary layers
            stack.enter_context(fastest_attention(shape.config(), shape.rows, shape.length, DEVICE))
        yield model, step, refresh


def naive_rows(shape: Shape, fake_quantized: bool) -> int:
    """Rows of a micro-batch that a step without fused losses has memory for, as a Trainer's user would have to find.

    Several float32 copies of all logits, and the blocks' activations; constants from the 51 GB of hf_bf16 at 135m.
    """
    config = shape.config()
    memory = 0.85 * torch.cuda.get_device_properties(DEVICE).total_memory
    matrices = sum(o * i for o, i in block_matrices(config).values())
    weights = 18 * (matrices * config.num_hidden_layers + config.vocab_size * config.hidden_size)
    block = 33 * config.hidden_size + 11 * config.intermediate_size
    token = 9 * config.vocab_size + config.num_hidden_layers * block * (1.6 if fake_quantized else 1.0)
    return int((memory - weights) / (token * shape.length))


def section_train(report: Report, shape: Shape, name: str, cases: list[str], limit_s: float) -> None:
    """Whole stage-2 steps, case by case."""
    for case in cases:
        if not report.over("train", shape=name, case=case):
            with report.caught("train", shape=name, case=case):
                train_case(report, shape, name, case, limit_s)


def train_case(report: Report, shape: Shape, name: str, case: str, limit_s: float) -> None:
    """One case. In a function of its own, so that nothing of it is alive when the next one's memory is taken."""
    config = shape.config()
    with built(case, shape) as (model, step, refresh):
        _, objective, _, replay, about = CASES[case]
        naive = CASES[case][0] in ("plain", "onebitllms") and not CASES[case][2]
        fit_rows = naive_rows(shape, CASES[case][0] == "onebitllms") if naive else shape.rows
        micro = shape.rows
        while micro > max(1, fit_rows):
            micro //= 2
        batches = [
            [corpus_batch(config, micro, shape.length, 100 * k + m) for m in range(shape.rows // micro)]
            for k in range(4)
        ]
        gradients: Any = EagerGradients(step, DEVICE, "bfloat16")
        trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
        below = replayed_below(
            Loop(batch_rows=micro),
            DEVICE,
            sum(p.numel() for p in trained.values()),
            # Compiled bfloat16 has the wider bound too: it is no merit of ternary layers
            fused=CASES[case][0] != "ternary",
        )
        replay = replay and micro * shape.length < below
        if replay:
            gradients = ReplayedGradients(step, trained, DEVICE, "bfloat16")
        found = timed_steps(model, gradients, batches, refresh, limit_s)
        rate = flops_a_token(config, shape.length, objective == "kl") * found["tokens_s"]
        report.line(
            "train", shape=name, case=case, about=about, rows=shape.rows, micro_rows=micro,
            length=shape.length, objective=objective, replayed=replay and gradients.enabled,
            model_tflops=rate / 1e12, mfu=rate / NOMINAL_BF16, **found,
        )  # fmt: skip


def section_profile(report: Report, shape: Shape, name: str, cases: list[str]) -> None:
    """Where the device time of a step goes: kernels by total time."""
    for case in cases:
        if report.over("profile", shape=name, case=case):
            continue
        with report.caught("profile", shape=name, case=case), built(case, shape) as (model, step, refresh):
            gradients = EagerGradients(step, DEVICE, "bfloat16")
            batch = [corpus_batch(shape.config(), shape.rows, shape.length, 0)]
            profiled(report, "profile", name, case, model, gradients, batch, refresh)


def section_selfcheck(report: Report, shape: Shape, name: str) -> None:
    """What a training run does before it relies on the kernels."""
    from bitdistill.kernels.selfcheck import Sizes, why_wrong

    config = shape.config()
    at = time.perf_counter()
    sizes = Sizes(config.hidden_size, config.intermediate_size, config.vocab_size, "silu", config.head_dim)
    fault = why_wrong(DEVICE, sizes)
    report.failed += fault is not None
    report.line("selfcheck", shape=name, fault=fault, seconds=time.perf_counter() - at)


SECTIONS = [*KERNEL_SECTIONS, "selfcheck", "train", "profile", "stage3", "stage3_profile"]
Part = tuple[str, str, list[str]]
"""Section, shape, cases."""
HEADLINE: list[Part] = [
    ("selfcheck", "135m", []),
    ("train", "135m", ["fused_lm", "bf16_compiled", "hf_bf16", "fused", "reference"]),
    ("stage3", "135m", ["fused", "unfused", "fused_packed", "reference"]),
    ("train", "0.6b", ["fused_lm", "bf16_compiled", "hf_bf16"]),
    ("train", "4b_12l", ["fused_lm", "bf16_compiled", "hf_bf16"]),
    ("train", "135m", ["onebitllms", "torchao", "hf_bf16_kl", "fused_no_graph", "fused_lm_int8"]),
    ("train", "0.6b", ["onebitllms", "torchao", "fused"]),
    ("train", "4b_12l", ["fused_lm_int8", "onebitllms", "torchao"]),
    ("ceilings", "135m", []),
]
QUICK: list[Part] = [
    ("selfcheck", "135m", []),
    ("train", "135m", ["fused", "fused_no_graph", "reference", "fused_lm", "bf16_compiled"]),
    ("stage3", "135m", ["fused", "unfused", "fused_packed"]),
]


def parts_of(arguments: argparse.Namespace) -> list[Part]:
    """What is to be run, in order."""
    if arguments.quick or arguments.headline:
        return QUICK if arguments.quick else HEADLINE
    cases = {
        "train": list(CASES), "profile": ["fused"], "stage3": list(STAGE3_CASES), "stage3_profile": ["fused"]
    }  # fmt: skip
    return [
        (section, shape, arguments.case or cases.get(section, []))
        for section in arguments.section or SECTIONS
        for shape in arguments.shape or ["135m"]
    ]


def run_part(report: Report, part: Part, limit_s: float) -> None:
    section, name, cases = part
    shape = SHAPES[name]
    if section == "train":
        section_train(report, shape, name, cases, limit_s)
    elif section == "stage3":
        section_stage3(report, shape, name, cases, limit_s)
    elif section == "stage3_profile":
        section_stage3_profile(report, shape, name, cases)
    elif section == "profile":
        section_profile(report, shape, name, cases)
    else:
        function = section_selfcheck if section == "selfcheck" else KERNEL_SECTIONS[section]
        with report.caught(section, shape=name):
            function(report, shape, name)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="the few lines that decide, 135m")
    parser.add_argument("--headline", action="store_true", help="all published lines, most important first")
    parser.add_argument("--section", action="append", choices=SECTIONS, help="default: all, in this order")
    parser.add_argument("--shape", action="append", choices=list(SHAPES), help="default: 135m")
    parser.add_argument(
        "--case", action="append", choices=sorted({*CASES, *STAGE3_CASES}), help="of train, profile or stage3"
    )
    parser.add_argument("--limit-s", type=float, help="seconds of timed steps a case (4; with --quick 1.5)")
    parser.add_argument(
        "--total-s", type=float, help="no new section or case starts after this many seconds (230; 100; 600)"
    )
    parser.add_argument("--attention", choices=["default", "cudnn", "flash"], default="default")
    parser.add_argument("--out", type=Path, help="JSON lines are appended here")
    arguments = parser.parse_args()
    report = Report(arguments.out)
    logging.basicConfig(level=logging.INFO, stream=sys.stderr)
    logging.getLogger("bitdistill").setLevel(logging.DEBUG)
    if not torch.cuda.is_available():
        print("no CUDA device is visible; this benchmark needs one", file=sys.stderr)
        return 2
    import transformers
    import triton

    report.line(
        "machine", gpu=torch.cuda.get_device_name(), torch=torch.__version__, triton=triton.__version__,
        transformers=transformers.__version__, attention=arguments.attention, command=" ".join(sys.argv),
    )  # fmt: skip
    total_s = arguments.total_s or (100.0 if arguments.quick else 600.0 if arguments.headline else 230.0)
    report.deadline = time.monotonic() + total_s
    with attention_backend(arguments.attention):
        for part in parts_of(arguments):
            if not report.over(part[0], shape=part[1]):
                run_part(report, part, arguments.limit_s or (1.5 if arguments.quick else 4.0))
    return 1 if report.failed else 0


def attention_backend(choice: str) -> contextlib.AbstractContextManager[Any]:
    """sdpa restricted to one backend, for the whole run."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    if choice == "default":
        return contextlib.nullcontext()
    return sdpa_kernel([SDPBackend.CUDNN_ATTENTION if choice == "cudnn" else SDPBackend.FLASH_ATTENTION])


if __name__ == "__main__":
    sys.exit(main())
