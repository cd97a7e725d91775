"""Ternary codes and scales of many matrices in two launches (Triton); the slow twin is `quant.ternary.ternarize`.

    scale = max(mean|W|, 1e-5), summed in float64 and rounded once;  code = (W > scale / 2) - (W < -scale / 2)

Matrices lie anywhere in memory: the kernels read their addresses from a table. Each matrix is cut into PARTS
pieces; every program of the second launch adds up the partial sums of its matrix in the same order.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

PARTS = 64
_EPSILON = tl.constexpr(1e-5)


@triton.jit
def _sums_kernel(weight_ptrs, sizes_ptr, partial_ptr, PARTS: tl.constexpr, BLOCK: tl.constexpr):
    matrix = tl.program_id(0)
    part = tl.program_id(1)
    weight_ptr = tl.load(weight_ptrs + matrix).to(tl.pointer_type(tl.float32))
    weight_ptr = tl.multiple_of(weight_ptr, 16)
    size = tl.load(sizes_ptr + matrix)
    blocks = tl.cdiv(size, BLOCK)
    total = tl.zeros([BLOCK], tl.float64)
    for block in range(part, blocks, PARTS):
        at = block * BLOCK + tl.arange(0, BLOCK).to(tl.int64)
        weight = tl.load(weight_ptr + at, mask=at < size, other=0.0)
        total += tl.abs(weight).to(tl.float64)
    tl.store(partial_ptr + matrix * PARTS + part, tl.sum(total, 0))


@triton.jit
def _codes_kernel(
    weight_ptrs,
    code_ptrs,
    scale_ptrs,
    sizes_ptr,
    outs_ptr,
    partial_ptr,
    PARTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    matrix = tl.program_id(0)
    part = tl.program_id(1)
    weight_ptr = tl.load(weight_ptrs + matrix).to(tl.pointer_type(tl.float32))
    weight_ptr = tl.multiple_of(weight_ptr, 16)
    code_ptr = tl.load(code_ptrs + matrix).to(tl.pointer_type(tl.int8))
    scale_ptr = tl.load(scale_ptrs + matrix).to(tl.pointer_type(tl.float32))
    size = tl.load(sizes_ptr + matrix)
    sums = tl.load(partial_ptr + matrix * PARTS + tl.arange(0, PARTS))
    mean = (tl.sum(sums, 0) / size.to(tl.float64)).to(tl.float32)
    # A NaN mean stays NaN, as in the twin: the comparison is false for it.
    scale = tl.where(mean < _EPSILON, _EPSILON, mean)
    half = scale * 0.5
    blocks = tl.cdiv(size, BLOCK)
    for block in range(part, blocks, PARTS):
        at = block * BLOCK + tl.arange(0, BLOCK).to(tl.int64)
        weight = tl.load(weight_ptr + at, mask=at < size, other=0.0)
        code = (weight > half).to(tl.int8) - (weight < -half).to(tl.int8)
        tl.store(code_ptr + at, code, mask=at < size)
    outs = tl.load(outs_ptr + matrix)
    for block in range(part, tl.cdiv(outs, BLOCK), PARTS):
        at = block * BLOCK + tl.arange(0, BLOCK)
        tl.store(scale_ptr + at, tl.zeros([BLOCK], tl.float32) + scale, mask=at < outs)


@dataclass(frozen=True)
class TernaryTable:
    """Addresses of matrices (float32), of their codes (int8) and of their scales (one float32 an output row).

    Holds the tensors whose addresses it lists.
    """

    tensors: tuple[tuple[Tensor, Tensor, Tensor], ...]
    addresses: Tensor
    sizes: Tensor
    outs: Tensor
    partial: Tensor

    @classmethod
    def of(cls, tensors: Sequence[tuple[Tensor, Tensor, Tensor]]) -> TernaryTable:
        """A table of (weight [O, I], codes [O, I], scales [O]).

        Raises:
            ValueError: a dtype or layout that the kernels do not read.
        """
        for weight, codes, scales in tensors:
            right = (weight.dtype, codes.dtype, scales.dtype) == (torch.float32, torch.int8, torch.float32)
            dense = all(t.is_contiguous() for t in (weight, codes, scales))
            if not right or not dense or weight.data_ptr() % 16 or codes.shape != weight.shape:
                raise ValueError(
                    f"weight {weight.dtype} {tuple(weight.shape)}, codes {codes.dtype} {tuple(codes.shape)}, "
                    f"scales {scales.dtype}: contiguous float32 (16-byte aligned), int8 and float32 are needed"
                )
        device = tensors[0][0].device
        addresses = [[t.data_ptr() for t in row] for row in tensors]
        return cls(
            tuple(tensors),
            torch.tensor(addresses, dtype=torch.int64).t().contiguous().to(device),
            torch.tensor([w.numel() for w, _, _ in tensors], dtype=torch.int64, device=device),
            torch.tensor([s.numel() for _, _, s in tensors], dtype=torch.int64, device=device),
            torch.empty(len(tensors), PARTS, dtype=torch.float64, device=device),
        )

    def fits(self, tensors: Sequence[tuple[Tensor, Tensor, Tensor]]) -> bool:
        """Whether these tensors still lie where the table says."""
        return len(tensors) == len(self.tensors) and all(
            a.data_ptr() == b.data_ptr()
            for old, new in zip(self.tensors, tensors, strict=True)
            for a, b in zip(old, new, strict=True)
        )


def ternarize_all(table: TernaryTable) -> None:
    """Write codes and scales of every matrix of the table; nothing is allocated and nothing read back."""
    grid = (len(table.tensors), PARTS)
    weights, codes, scales = table.addresses
    _sums_kernel[grid](weights, table.sizes, table.partial, PARTS=PARTS, BLOCK=1024)
    _codes_kernel[grid](
        weights, codes, scales, table.sizes, table.outs, table.partial, PARTS=PARTS, BLOCK=1024
    )
