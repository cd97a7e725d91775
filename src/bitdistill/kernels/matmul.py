"""int8 product with the scales in its epilogue (Triton), and the faster of two ways by size.

    y[n, o] = float32(sum_i x[n, i] w[o, i]) * (x_scale[n] * w_scale[o])

The sum is exact in int32, the product of the scales is rounded once and multiplied once: bit for bit
`quant.linear`. The other way is cuBLASLt's product (torch._int_mm) with the scaling in a kernel of its own; which
of the two is faster depends on the shape, so the first call of a shape times both.

Persistent programs with the tensor memory accelerator were tried and brought nothing (docs/log.md, runs 12 and 13).

Shape legend: N tokens, O out features, I in features.
"""

from __future__ import annotations

import logging

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

log = logging.getLogger("bitdistill")
# BLOCK_N, BLOCK_O, BLOCK_I, warps, stages
TILES: list[tuple[int, int, int, int, int]] = [
    (128, 128, 64, 4, 4),
    (128, 128, 128, 8, 3),
    (256, 128, 128, 8, 3),
    (64, 128, 64, 4, 4),
    (128, 64, 128, 4, 4),
    (256, 64, 64, 8, 4),
    (128, 64, 64, 4, 4),
]
INT_MM = -1
WAYS = (INT_MM, *range(len(TILES)))
"""What can make a product: cuBLASLt, or an index of TILES."""
_chosen: dict[tuple[int, int, int, torch.dtype], int] = {}


@triton.jit
def _product_kernel(
    x_ptr,
    w_ptr,
    x_scale_ptr,
    w_scale_ptr,
    y_ptr,
    n_rows,
    n_out,
    n_in,
    GROUP: tl.constexpr,
    WHOLE_I: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_I: tl.constexpr,
):
    # Programs in groups of GROUP row tiles that walk through all column tiles, so that tiles of w stay in L2.
    pid = tl.program_id(0)
    tiles_n = tl.cdiv(n_rows, BLOCK_N)
    tiles_o = tl.cdiv(n_out, BLOCK_O)
    first = pid // (GROUP * tiles_o) * GROUP
    size = tl.minimum(tiles_n - first, GROUP)
    tile_n = first + (pid % (GROUP * tiles_o)) % size
    tile_o = (pid % (GROUP * tiles_o)) // size

    n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    o = tile_o * BLOCK_O + tl.arange(0, BLOCK_O)
    i = tl.arange(0, BLOCK_I)
    # Rows past the end read row 0 again; only the store is masked.
    x_at = x_ptr + tl.where(n < n_rows, n, 0).to(tl.int64)[:, None] * n_in + i[None, :]
    w_at = w_ptr + tl.where(o < n_out, o, 0).to(tl.int64)[None, :] * n_in + i[:, None]
    total = tl.zeros([BLOCK_N, BLOCK_O], tl.int32)
    for start in range(0, n_in, BLOCK_I):
        if WHOLE_I:
            x = tl.load(x_at)
            w = tl.load(w_at)
        else:
            x = tl.load(x_at, mask=(start + i < n_in)[None, :], other=0)
            w = tl.load(w_at, mask=(start + i < n_in)[:, None], other=0)
        total = tl.dot(x, w, total, out_dtype=tl.int32)
        x_at += BLOCK_I
        w_at += BLOCK_I
    x_scale = tl.load(x_scale_ptr + n, mask=n < n_rows, other=0.0)
    w_scale = tl.load(w_scale_ptr + o, mask=o < n_out, other=0.0)
    y = total.to(tl.float32) * (x_scale[:, None] * w_scale[None, :])
    y_at = y_ptr + n.to(tl.int64)[:, None] * n_out + o[None, :]
    tl.store(y_at, y.to(y_ptr.dtype.element_ty), mask=(n < n_rows)[:, None] & (o < n_out)[None, :])


@triton.jit
def _scale_kernel(
    product_ptr,
    x_scale_ptr,
    w_scale_ptr,
    y_ptr,
    n_rows,
    n_out,
    stride,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    n = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    o = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = (n < n_rows)[:, None] & (o < n_out)[None, :]
    total = tl.load(product_ptr + n.to(tl.int64)[:, None] * stride + o[None, :], mask=inside, other=0)
    x_scale = tl.load(x_scale_ptr + n, mask=n < n_rows, other=0.0)
    w_scale = tl.load(w_scale_ptr + o, mask=o < n_out, other=0.0)
    y = total.to(tl.float32) * (x_scale[:, None] * w_scale[None, :])
    y_at = y_ptr + n.to(tl.int64)[:, None] * n_out + o[None, :]
    tl.store(y_at, y.to(y_ptr.dtype.element_ty), mask=inside)


def _product(y: Tensor, x: Tensor, x_scale: Tensor, w: Tensor, w_scale: Tensor, tile: int) -> None:
    """One way of the product."""
    (n, i), o = x.shape, w.shape[0]
    if tile == INT_MM:
        total = _int_mm(x, w)
        grid = (triton.cdiv(n, 8), triton.cdiv(o, 512))
        _scale_kernel[grid](total, x_scale, w_scale, y, n, o, total.stride(0), ROWS=8, BLOCK=512)
        return
    block_n, block_o, block_i, warps, stages = TILES[tile]
    _product_kernel[(triton.cdiv(n, block_n) * triton.cdiv(o, block_o),)](
        x,
        w,
        x_scale,
        w_scale,
        y,
        n,
        o,
        i,
        GROUP=8,
        WHOLE_I=i % block_i == 0,
        BLOCK_N=block_n,
        BLOCK_O=block_o,
        BLOCK_I=block_i,
        num_warps=warps,
        num_stages=stages,
    )


def name_of(way: int) -> str:
    """For tables."""
    return "int_mm" if way == INT_MM else str(TILES[way])


def _int_mm(x: Tensor, w: Tensor) -> Tensor:
    """int32 [at least N, at least O] by cuBLASLt, which wants more than 16 rows and multiples of 8."""
    pad_n, pad_i, pad_o = max(0, 17 - x.shape[0]), -x.shape[1] % 8, -w.shape[0] % 8
    if pad_n or pad_i:
        x = F.pad(x, (0, pad_i, 0, pad_n))
    if pad_o or pad_i:
        w = F.pad(w, (0, pad_i, 0, pad_o))
    return torch._int_mm(x, w.t())


def int8_product(
    x_NI: Tensor, x_scale_N: Tensor, w_OI: Tensor, w_scale_O: Tensor, dtype: torch.dtype
) -> Tensor:
    """y [N, O] of `dtype`; see the module docstring. The way is the fastest measured one of this shape."""
    x_NI, w_OI = x_NI.contiguous(), w_OI.contiguous()
    (n, i), o = x_NI.shape, w_OI.shape[0]
    y = torch.empty(n, o, dtype=dtype, device=x_NI.device)
    if n == 0:
        return y
    key = (n, o, i, dtype)
    if key not in _chosen:
        capturing = x_NI.is_cuda and torch.cuda.is_current_stream_capturing()
        if not x_NI.is_cuda or capturing:
            _product(y, x_NI, x_scale_N, w_OI, w_scale_O, 0)
            return y
        _chosen[key] = _fastest(y, x_NI, x_scale_N, w_OI, w_scale_O)
    _product(y, x_NI, x_scale_N, w_OI, w_scale_O, _chosen[key])
    return y


def measure(y: Tensor, x: Tensor, x_scale: Tensor, w: Tensor, w_scale: Tensor) -> dict[int, float]:
    """Milliseconds of every way at this shape, the best of three rounds of five calls (synchronises)."""
    times: dict[int, float] = {}
    for tile in WAYS:
        try:
            for _ in range(2):
                _product(y, x, x_scale, w, w_scale, tile)
            rounds = []
            for _ in range(3):
                start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                start.record()
                for _ in range(5):
                    _product(y, x, x_scale, w, w_scale, tile)
                end.record()
                end.synchronize()
                rounds.append(start.elapsed_time(end) / 5)
        except (RuntimeError, triton.runtime.errors.OutOfResources) as error:
            log.debug("int8 product: way %s is left out: %s", tile, error)
            continue
        times[tile] = min(rounds)
    return times


def _fastest(y: Tensor, x: Tensor, x_scale: Tensor, w: Tensor, w_scale: Tensor) -> int:
    """The fastest way of this shape whose result is cuBLASLt's, bit for bit."""
    times = measure(y, x, x_scale, w, w_scale)
    _product(y, x, x_scale, w, w_scale, INT_MM)
    for tile in sorted(times, key=lambda tile: times[tile]):
        other = torch.empty_like(y)
        _product(other, x, x_scale, w, w_scale, tile)
        if tile == INT_MM or torch.equal(other, y):
            log.debug("int8 product [%d x %d x %d]: %s ms, way %d", *x.shape, w.shape[0], times, tile)
            return tile
        log.warning("int8 product [%d x %d x %d]: way %d is wrong here, left out", *x.shape, w.shape[0], tile)
    return INT_MM
