"""Sections of train_speed.py about single kernels: are they right on this GPU, and how fast."""

# ruff: noqa: B023 (closures are timed at once, within their round of the loop)
from __future__ import annotations

import math
from typing import Any

import torch
from common import DEVICE, Report, Shape, block_matrices, milliseconds
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from bitdistill.kernels import twins
from bitdistill.losses.logits import chunked_language_model_loss, language_model_chunk, tokens_of_a_chunk
from bitdistill.models.forward import final_hidden
from bitdistill.models.fused import fused_layers
from bitdistill.models.surgery import refine


def rand_codes(n: int, i: int, low: int, high: int) -> Tensor:
    return torch.randint(low, high, (n, i), device=DEVICE, dtype=torch.int8)


def section_check(report: Report, shape: Shape, name: str) -> None:
    """Kernels against their twins on this GPU, at the model's own sizes; fused against plain student."""
    from bitdistill.kernels import head, matmul, norm_quantize, weights
    from bitdistill.quant.ternary import quantize_activations, ternarize

    config = shape.config()
    d, inner = config.hidden_size, config.intermediate_size
    generator = torch.Generator(DEVICE).manual_seed(0)

    def randn(*size: int) -> Tensor:
        return torch.randn(*size, device=DEVICE, generator=generator)

    with report.caught("check", shape=name, what="quantize"):
        x = torch.cat([randn(1000, d) * 8, randn(1001, d).round() / 2, torch.zeros(3, d, device=DEVICE)])
        codes, scale, _ = norm_quantize.norm_quantize(x, None, 0.0, 0.0, "none")
        want_codes, want_scale = quantize_activations(x)
        report.line(
            "check", shape=name, what="quantize",
            codes_differ=int((codes != want_codes).sum()), scales_differ=int((scale != want_scale[:, 0]).sum()),
        )  # fmt: skip
        compiled_codes, compiled_scale = torch.compile(quantize_activations)(x)
        report.line(
            "check", shape=name, what="quantize by torch.compile (for comparison, not a kernel of ours)",
            codes_differ=int((compiled_codes != want_codes).sum()),
            scales_differ=int((compiled_scale != want_scale).sum()), of=x.numel(),
        )  # fmt: skip
    for kind, activation, columns in (
        ("norm", "none", d),
        ("gate", "silu", inner),
        ("gelu", "gelu_tanh", inner),
    ):
        with report.caught("check", shape=name, what=kind):
            x = randn(777, columns if activation == "none" else 2 * columns)
            x = x if activation == "none" else x.bfloat16()
            gain = randn(columns).abs() + 0.3
            got = norm_quantize.norm_quantize(x, gain, 1e-5, 0.0, activation)
            want = twins.norm_quantize(x, gain, 1e-5, 0.0, activation)
            grad, grad_scale, out_scale = randn(777, columns).bfloat16(), randn(1), randn(2 * columns).abs()
            given = (grad, grad_scale, x, gain, got[2], got[0], got[1], out_scale, 0.0, activation)
            back = list(norm_quantize.norm_quantize_backward(*given))
            want_back = list(twins.norm_quantize_backward(*given))
            back[1], want_back[1] = norm_quantize.sum_rows([back[1]]), twins.sum_rows([want_back[1]])
            report.line(
                "check", shape=name, what=kind, codes_differ=int((got[0] != want[0]).sum()), of=got[0].numel(),
                largest_code_step=int((got[0].int() - want[0].int()).abs().max()),
                scale_error=float((got[1] / want[1] - 1).abs().max()),
                gradient_errors=[relative(a, b) for a, b in zip(back, want_back, strict=True)],
            )  # fmt: skip
    with report.caught("check", shape=name, what="product"):
        for matrix, (o, i) in block_matrices(config).items():
            x, w = rand_codes(1000, i, -128, 128), rand_codes(o, i, -1, 2)
            x_scale, w_scale = randn(1000).abs() + 0.01, randn(o).abs() + 0.01
            product = twins.int8_product(x, x_scale, w, w_scale, torch.bfloat16)
            differ = {}
            for tile in matmul.WAYS:
                y = torch.full_like(product, math.nan)
                matmul._product(y, x, x_scale, w, w_scale, tile)
                differ[matmul.name_of(tile)] = int(torch.ne(y, product).sum())
            report.line("check", shape=name, what=f"product {matrix}", differ=differ)
    with report.caught("check", shape=name, what="weights"):
        latents = [randn(o, i) * 0.02 for o, i in block_matrices(config).values()]
        tensors = [
            (w, torch.empty_like(w, dtype=torch.int8), torch.empty(len(w), device=DEVICE)) for w in latents
        ]
        weights.ternarize_all(weights.TernaryTable.of(tensors))
        report.line(
            "check", shape=name, what="weights",
            codes_differ=sum(int((c != ternarize(w)[0]).sum()) for w, c, _ in tensors),
            scales_differ=sum(int((s != ternarize(w)[1]).sum()) for w, _, s in tensors),
        )  # fmt: skip
    for tau in (1.0, 5.0):
        with report.caught("check", shape=name, what="head"):
            hidden, t_hidden = randn(301, d).bfloat16(), randn(301, d).bfloat16()
            table, t_table = (randn(2, config.vocab_size, d) * 0.05).bfloat16()
            targets = torch.randint(0, config.vocab_size, (301,), device=DEVICE)
            targets[7] = -100
            arguments = (hidden, table, targets, t_hidden, t_table, 0.3, 0.7, tau)
            pairs = zip(
                head.fused_language_model_chunk(*arguments), language_model_chunk(*arguments), strict=True
            )
            report.line(
                "check", shape=name, what=f"head tau {tau}", errors=[relative(a, b) for a, b in pairs]
            )
    with report.caught("check", shape=name, what="student"):
        small = AutoConfig.for_model(shape.model_type, **{**shape.options, "num_hidden_layers": 2})
        student = refine(AutoModelForCausalLM.from_config(small).to(DEVICE), gains="ones").train()
        ids = torch.randint(0, small.vocab_size, (2, 512), device=DEVICE)

        def run() -> tuple[Tensor, list[Tensor]]:
            with torch.autocast("cuda", dtype=torch.bfloat16):
                hidden = final_hidden(student, ids)
                loss = hidden.float().square().mean() + hidden[:, ::7].float().mean()
            found = torch.autograd.grad(loss, list(student.model.layers.parameters()))
            return hidden.detach(), list(found)

        plain, plain_grads = run()
        with fused_layers(student):
            fused, grads = run()
        cosines = [cosine(a, b) for a, b in zip(grads, plain_grads, strict=True)]
        report.line(
            "check",
            shape=name,
            what="student",
            hidden_error=relative(fused, plain),
            lowest_gradient_cosine=min(cosines),
        )


def relative(got: Tensor, want: Tensor) -> float:
    return float((got.double() - want.double()).norm() / want.double().norm().clamp_min(1e-30))


def cosine(a: Tensor, b: Tensor) -> float:
    return float(torch.nn.functional.cosine_similarity(a.flatten().double(), b.flatten().double(), dim=0))


def section_ceilings(report: Report, shape: Shape, name: str) -> None:
    """The rates of large products: what MFU can be measured against."""
    for size in (4096, 8192):
        with report.caught("ceilings", size=size):
            a, b = (torch.randn(size, size, device=DEVICE, dtype=torch.bfloat16) for _ in range(2))
            bf16 = 2 * size**3 / milliseconds(lambda: a @ b.t()) / 1e9
            x, w = rand_codes(size, size, -128, 128), rand_codes(size, size, -1, 2)
            int8 = 2 * size**3 / milliseconds(lambda: torch._int_mm(x, w.t())) / 1e9
            report.line("ceilings", size=size, bf16_tflops=bf16, int8_tops=int8)


def section_gemm(report: Report, shape: Shape, name: str) -> None:
    """Every way of the int8 product, and what plain bfloat16 takes, by matrix."""
    from bitdistill.kernels import matmul

    n = shape.rows * shape.length
    for matrix, (o, i) in block_matrices(shape.config()).items():
        with report.caught("gemm", shape=name, matrix=matrix):
            x, w = rand_codes(n, i, -128, 128), rand_codes(o, i, -1, 2)
            x_scale, w_scale = torch.rand(n, device=DEVICE), torch.rand(o, device=DEVICE)
            y = torch.empty(n, o, device=DEVICE, dtype=torch.bfloat16)
            times = matmul.measure(y, x, x_scale, w, w_scale)
            x16, w16 = x.bfloat16(), w.bfloat16()
            report.line(
                "gemm", shape=name, matrix=matrix, n=n, o=o, i=i,
                int8_ms={matmul.name_of(t): round(v, 4) for t, v in times.items()},
                int_mm_alone_ms=milliseconds(lambda: torch._int_mm(x, w.t())),
                bf16_ms=milliseconds(lambda: x16 @ w16.t()),
                bf16_dgrad_ms=milliseconds(lambda: y @ w16), bf16_wgrad_ms=milliseconds(lambda: y.t() @ x16),
                best_int8_tops=2 * n * o * i / min(times.values()) / 1e9,
            )  # fmt: skip


def section_rows(report: Report, shape: Shape, name: str) -> None:
    """Norm and quantization kernels, forward and backward, as bytes a second; weights of the whole model."""
    from bitdistill.kernels import norm_quantize, weights

    config, n = shape.config(), shape.rows * shape.length
    d, inner = config.hidden_size, config.intermediate_size
    for what, columns, activation, dtype in (
        ("norm", d, "none", torch.float32),
        ("subln o", config.num_attention_heads * config.head_dim, "none", torch.bfloat16),
        ("gate subln down", inner, "silu", torch.bfloat16),
    ):
        with report.caught("rows", shape=name, what=what):
            wide = columns * (1 if activation == "none" else 2)
            x = torch.randn(n, wide, device=DEVICE).to(dtype)
            gain, grad_scale, out_scale = (torch.ones(k, device=DEVICE) for k in (columns, 1, 2 * columns))
            grad = torch.randn(n, columns, device=DEVICE).bfloat16()
            codes, scale, rrms = norm_quantize.norm_quantize(x, gain, 1e-5, 0.0, activation)
            forward = milliseconds(lambda: norm_quantize.norm_quantize(x, gain, 1e-5, 0.0, activation))
            backward = milliseconds(
                lambda: norm_quantize.norm_quantize_backward(
                    grad, grad_scale, x, gain, rrms, codes, scale, out_scale, 0.0, activation
                )
            )
            bytes_forward = x.nbytes + codes.nbytes
            bytes_backward = 2 * x.nbytes + codes.nbytes + 2 * grad.nbytes
            report.line(
                "rows", shape=name, what=what, forward_ms=forward, backward_ms=backward,
                forward_gb_s=bytes_forward / forward / 1e6, backward_gb_s=bytes_backward / backward / 1e6,
            )  # fmt: skip
    with report.caught("rows", shape=name, what="weights"):
        sizes = list(block_matrices(config).values()) * config.num_hidden_layers
        latents = [torch.randn(o, i, device=DEVICE) for o, i in sizes]
        tensors = [
            (w, torch.empty_like(w, dtype=torch.int8), torch.empty(len(w), device=DEVICE)) for w in latents
        ]
        table = weights.TernaryTable.of(tensors)
        report.line(
            "rows", shape=name, what="all weights", ms=milliseconds(lambda: weights.ternarize_all(table))
        )


def section_attention(report: Report, shape: Shape, name: str) -> None:
    """sdpa backends, forward and forward + backward of one layer."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    config = shape.config()
    heads, kv, size = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    for backend in (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION):
        with report.caught("attention", shape=name, backend=backend.name), sdpa_kernel([backend]):
            q, k, v = (
                torch.randn(shape.rows, shape.length, h, size, device=DEVICE, dtype=torch.bfloat16)
                .transpose(1, 2)
                .requires_grad_()
                for h in (heads, kv, kv)
            )

            def forward(q: Tensor = q, k: Tensor = k, v: Tensor = v) -> Tensor:
                return torch.nn.functional.scaled_dot_product_attention(
                    q, k, v, is_causal=True, enable_gqa=True
                )

            grad = torch.randn_like(forward())

            def both(g: Tensor = grad, q: Tensor = q, k: Tensor = k, v: Tensor = v) -> None:
                torch.autograd.grad(forward(q, k, v), (q, k, v), g)

            report.line(
                "attention", shape=name, backend=backend.name, forward_ms=milliseconds(forward),
                both_ms=milliseconds(both),
            )  # fmt: skip


def section_head(report: Report, shape: Shape, name: str) -> None:
    """Head and losses over all tokens of a batch: plain chunk, compiled chunk, fused chunk."""
    from bitdistill.kernels.head import fused_language_model_chunk, rows_loss_

    config, n = shape.config(), shape.rows * shape.length
    hidden = torch.randn(n, config.hidden_size, device=DEVICE, requires_grad=True)
    table = (torch.randn(config.vocab_size, config.hidden_size, device=DEVICE) * 0.05).requires_grad_()
    t_hidden, t_table = hidden.detach().bfloat16(), table.detach().bfloat16()
    targets = torch.randint(0, config.vocab_size, (n,), device=DEVICE)
    for kl in (1.0, 0.0):
        for way, chunk in (
            ("compiled", torch.compile(language_model_chunk)),
            ("fused", fused_language_model_chunk),
        ):
            with report.caught("head", shape=name, way=way, kl=kl):

                def both(chunk: Any = chunk, kl: float = kl) -> Any:
                    with torch.autocast("cuda", dtype=torch.bfloat16):
                        loss, _, _ = chunked_language_model_loss(
                            hidden, table, targets, teacher_hidden_NH=t_hidden if kl else None,
                            teacher_head_VH=t_table if kl else None, lm_weight=1.0 - kl, kl_weight=kl,
                            chunk_function=chunk,
                        )  # fmt: skip
                    return torch.autograd.grad(loss, (hidden, table))

                torch.cuda.reset_peak_memory_stats()
                report.line(
                    "head", shape=name, way=way, kl=kl, tokens=n, ms=milliseconds(both, rounds=3, calls=2),
                    peak_gb=torch.cuda.max_memory_allocated() / 1e9,
                )  # fmt: skip
    with report.caught("head", shape=name, way="rows kernel"):
        rows = min(n, tokens_of_a_chunk(config.vocab_size))
        z, t = (torch.randn(rows, config.vocab_size, device=DEVICE, dtype=torch.bfloat16) for _ in range(2))
        time_ms = milliseconds(lambda: rows_loss_(z, t, targets[:rows], 0.0, 1.0))
        report.line(
            "head", shape=name, way="rows kernel", rows=rows, ms=time_ms, gb_s=3 * z.nbytes / time_ms / 1e6
        )


KERNEL_SECTIONS = {
    "check": section_check,
    "ceilings": section_ceilings,
    "gemm": section_gemm,
    "rows": section_rows,
    "attention": section_attention,
    "head": section_head,
}
