"""Inductor's kernels wait before they read back what they stored, and blocks so compiled have the eager gradients."""

from __future__ import annotations

import copy
import logging

import pytest
import torch
from torch import Tensor, nn
from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm, apply_rotary_pos_emb

from bitdistill.train.compile import CACHE_TAG, compiled, put_barriers, with_barriers

LOOPS = """
import triton.language as tl

@heuristics(
    size_hints={'x': 16384, 'r0_': 256},
)
@triton.jit
def kernel(in_ptr0, out_ptr0, out_ptr1, xnumel, r0_numel, XBLOCK : tl.constexpr, R0_BLOCK : tl.constexpr):
    xindex = tl.program_id(0) * XBLOCK + tl.arange(0, XBLOCK)[:, None]
    total = tl.full([XBLOCK, R0_BLOCK], 0, tl.float32)
    for r0_offset in tl.range(0, r0_numel, R0_BLOCK):
        r0_index = r0_offset + tl.arange(0, R0_BLOCK)[None, :]
        tmp0 = tl.load(in_ptr0 + (r0_index + 256*xindex), None)
        total = total + tmp0
        tl.store(out_ptr0 + (r0_index + 256*xindex), tmp0 * 2, None)
    tmp1 = tl.sum(total, 1)[:, None]
    for r0_offset in tl.range(0, r0_numel, R0_BLOCK):
        r0_index = r0_offset + tl.arange(0, R0_BLOCK)[None, :]
        tmp2 = tl.load(READ + (r0_index + 256*xindex), None)
        tl.store(out_ptr1 + (r0_index + 256*xindex), tmp1 + tmp2, None)
"""


def test_a_loop_that_reads_back_waits() -> None:
    source = LOOPS.replace("READ", "out_ptr0")
    guarded = with_barriers(source).split("\n")
    at = guarded.index("    tl.debug_barrier()")
    assert guarded[at - 1].startswith("    tmp1 = tl.sum")
    assert guarded[at + 1].startswith("    for r0_offset")
    assert [line for n, line in enumerate(guarded) if n != at] == source.split("\n")
    assert with_barriers("\n".join(guarded)) == "\n".join(guarded)


def test_other_sources_stay() -> None:
    assert with_barriers(LOOPS.replace("READ", "in_ptr0")) == LOOPS.replace("READ", "in_ptr0")
    two = LOOPS.replace("READ", "in_ptr0") + LOOPS.replace("READ", "in_ptr0").replace(
        "in_ptr0", "out_ptr0", 2
    )
    assert with_barriers(two) == two  # pointers of one kernel are not those of the next


def test_block_pointers_and_single_statements() -> None:
    lines = [
        "def k(out_ptr0):",
        "    tl.store(tl.make_block_ptr(out_ptr0, shape=[8]), x)",
        "    y = tl.load(out_ptr0 + i, None)",
    ]
    assert with_barriers("\n".join(lines)).split("\n") == [*lines[:2], "    tl.debug_barrier()", lines[2]]


def test_inductor_writes_through_it(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._inductor.codegen.triton import TritonKernel

    put_barriers()
    write = TritonKernel.codegen_kernel
    put_barriers()
    assert TritonKernel.codegen_kernel is write
    assert torch.compiler.config.cache_key_tag.split().count(CACHE_TAG) == 1
    source = LOOPS.replace("READ", "out_ptr0")
    monkeypatch.setattr(
        TritonKernel, "codegen_kernel", lambda self, name=None: source if name is None else name
    )
    put_barriers()
    assert TritonKernel.codegen_kernel(None) == with_barriers(source)  # type: ignore[arg-type]
    assert TritonKernel.codegen_kernel(None, name="x") == "x"  # type: ignore[arg-type]


class _NormedKey(nn.Module):
    """Gemma 3's norm and rotary embedding of a key: [B, T, H, D] to [B, H, T, D]."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.norm = Gemma3RMSNorm(size)
        nn.init.normal_(self.norm.weight)

    def forward(self, x_BTHD: Tensor, cos_1TD: Tensor, sin_1TD: Tensor) -> Tensor:
        x_BHTD = self.norm(x_BTHD.transpose(1, 2))
        return apply_rotary_pos_emb(x_BHTD, x_BHTD, cos_1TD, sin_1TD)[0].to(x_BTHD.dtype).contiguous()


def _poison(device: torch.device) -> None:
    """What the allocator hands out next holds NaN."""
    held = [torch.full((1 << 26,), float("nan"), device=device) for _ in range(4)]
    torch.cuda.synchronize(device)
    del held


@pytest.mark.gpu
@pytest.mark.parametrize(("rows", "heads", "guarded"), [(16, 1, True), (16, 4, False), (128, 1, True)])
def test_the_backward_of_a_keys_norm_reads_nothing_unwritten(
    rows: int, heads: int, guarded: bool, caplog: pytest.LogCaptureFixture
) -> None:
    device, size, tokens = torch.device("cuda"), 256, 16384 // rows
    torch.manual_seed(0)
    module = _NormedKey(size).to(device)
    x = torch.randn(rows, tokens, heads, size, device=device, dtype=torch.bfloat16)
    grad = torch.randn(rows, heads, tokens, size, device=device, dtype=torch.bfloat16)
    cos, sin = torch.randn(2, 1, tokens, size, device=device)

    def gradients(run) -> list[Tensor]:  # type: ignore[no-untyped-def]
        leaf = x.clone().requires_grad_()
        out = run(leaf, cos, sin)
        return list(torch.autograd.grad(out, (leaf, module.norm.weight), grad))

    want = gradients(module)
    torch.compiler.reset()
    run = compiled(copy.copy(module), True)
    # A row in registers is not read back. Which of the two inductor writes is its own choice, so it is made here.
    looped = torch._inductor.config.patch(
        {"triton.persistent_reductions": False, "force_disable_caches": True}
    )
    with looped, caplog.at_level(logging.DEBUG, "bitdistill.train.compile"):
        gradients(run)
    if guarded:  # of one head the rotation is stored and read back; of four (an H200, torch 2.11) it was not
        assert "a barrier is put into a kernel" in caplog.text  # else there is nothing to see here
    for _ in range(20):
        _poison(device)
        for a, b in zip(gradients(run), want, strict=True):
            assert bool(a.isfinite().all())
            assert float((a.float() - b.float()).norm() / b.float().norm()) < 0.02
