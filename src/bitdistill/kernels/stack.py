"""Gradients of linears that share an input, scaled and laid side by side (Triton): what one product needs of them.

Left to torch.compile, the concatenation is fused with what makes the gradients (the rotary embedding's backward), and
every element then runs through the arithmetic of all parts. The slow twin is in `kernels/twins.py`.

Shape legend: N rows, O columns of all parts together.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

MOST_PARTS = 3
ROWS, BLOCK = 4, 256


@triton.jit
def _stack_kernel(
    first_ptr,
    second_ptr,
    third_ptr,
    scale_ptr,
    out_ptr,
    n_rows,
    first_size,
    second_size,
    third_size,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    part = tl.program_id(1)
    source = first_ptr
    size = first_size
    start = 0
    if part == 1:
        source = second_ptr
        size = second_size
        start = first_size
    if part == 2:
        source = third_ptr
        size = third_size
        start = first_size + second_size
    width = first_size + second_size + third_size
    scale = tl.load(scale_ptr + start)
    lanes = tl.arange(0, BLOCK)
    for begin in range(0, size, BLOCK):
        columns = begin + lanes
        inside = (rows < n_rows)[:, None] & (columns < size)[None, :]
        grad = tl.load(source + rows.to(tl.int64)[:, None] * size + columns[None, :], mask=inside, other=0.0)
        at = rows.to(tl.int64)[:, None] * width + start + columns[None, :]
        tl.store(out_ptr + at, (grad.to(tl.float32) * scale).to(out_ptr.dtype.element_ty), mask=inside)


def stack_scaled(parts: Sequence[Tensor], scale_O: Tensor) -> Tensor:
    """[N, O] in the parts' dtype: part p times the scale at its first column, one part beside the other.

    Args:
        parts: two or three of [N, O_p], one dtype.
        scale_O: float32, the same value at all columns of a part.
    """
    n = parts[0].shape[0]
    parts = [part.contiguous() for part in parts]
    sizes = [part.shape[1] for part in parts]
    out = torch.empty(n, sum(sizes), dtype=parts[0].dtype, device=parts[0].device)
    if n:
        fill = MOST_PARTS - len(parts)
        _stack_kernel[(triton.cdiv(n, ROWS), len(parts))](
            *parts, *[parts[0]] * fill, scale_O, out, n, *sizes, *[0] * fill, ROWS=ROWS, BLOCK=BLOCK
        )
    return out
