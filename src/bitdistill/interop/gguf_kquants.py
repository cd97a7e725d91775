"""Float tables (embedding, output head) as Q8_0, Q6_K or Q4_K blocks of GGUF.

The `gguf` package writes Q8_0; of the k-quants it only reads, so they are made here. A super-block is 256 weights:

    Q6_K   16 groups of 16; w = d * sc * q, q in [-32, 31], sc int8, d float16; 210 bytes:
           low 4 bits [128], high 2 bits [64], sc [16], d
    Q4_K   8 groups of 32; w = d * sc * q - dmin * m, q in [0, 15], sc and m 6 bits, d and dmin float16; 144 bytes:
           d, dmin, sc and m [12], q [128]

A group's scale comes from its largest magnitude (Q6_K) or its range (Q4_K), improved by a least-squares fit to the
rounded values; the group scales are then rounded to multiples of d, and the weights rounded again for those.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
from numpy.typing import NDArray

from bitdistill.errors import ModelError

TableType = Literal["f16", "q8_0", "q6_k", "q4_k"]
# Name -> weights a block (rows must fill blocks).
BLOCKS: dict[TableType, int] = {"f16": 1, "q8_0": 32, "q6_k": 256, "q4_k": 256}
_ROWS_AT_ONCE = 2048
_Floats = NDArray[np.float32]


def encode_table(kind: TableType, table: _Floats, where: str) -> NDArray:
    """A float table [rows, columns] as `kind`: float16 [rows, columns], or uint8 [rows, bytes of a row].

    Raises:
        ModelError: rows do not fill blocks, or a value does not fit float16.
        MissingDependencyError: q8_0 without the `gguf` package.
    """
    block = BLOCKS[kind]
    if table.shape[1] % block:
        smaller = " or ".join(name for name, size in BLOCKS.items() if table.shape[1] % size == 0)
        raise ModelError(
            f"{where}: rows of {table.shape[1]} do not fill {kind}'s blocks of {block}; "
            f"set export.gguf.table to {smaller}"
        )
    if not np.abs(table).max() <= np.finfo(np.float16).max:
        raise ModelError(f"{where}: a value does not fit float16, which GGUF's {kind} needs")
    if kind == "f16":
        return table.astype(np.float16)
    quantize = {"q8_0": _q8_0, "q6_k": _q6_k, "q4_k": _q4_k}[kind]
    parts = []
    for start in range(0, len(table), _ROWS_AT_ONCE):
        rows = table[start : start + _ROWS_AT_ONCE]
        parts.append(quantize(np.ascontiguousarray(rows, np.float32)).reshape(len(rows), -1))
    return np.concatenate(parts)


def _q8_0(rows: _Floats) -> NDArray[np.uint8]:
    from bitdistill.interop.gguf_package import gguf

    package = gguf()
    return np.array(package.quants.quantize(rows, package.GGMLQuantizationType.Q8_0))


def _divide(a: _Floats, b: _Floats) -> _Floats:
    """a / b, and 0 where b is 0."""
    return np.divide(a, b, out=np.zeros(np.broadcast_shapes(a.shape, b.shape), np.float32), where=b != 0)


def _q6_k(rows: _Floats) -> NDArray[np.uint8]:
    x = rows.reshape(-1, 16, 16)
    at = np.abs(x).argmax(axis=2, keepdims=True)
    # The largest magnitude goes to -32, the end of the range that reaches further.
    scale = np.take_along_axis(x, at, axis=2) / np.float32(-32)
    q = np.clip(np.rint(_divide(x, scale)), -32, 31)
    scale = _divide((x * q).sum(axis=2, keepdims=True), (q * q).sum(axis=2, keepdims=True))[..., 0]
    largest = np.take_along_axis(scale, np.abs(scale).argmax(axis=1, keepdims=True), axis=1)
    d = (largest / np.float32(-128)).astype(np.float16)
    sc = np.clip(np.rint(_divide(scale, d.astype(np.float32))), -128, 127)
    step = (d.astype(np.float32) * sc)[..., None]
    values = (np.clip(np.rint(_divide(x, step)), -32, 31) + 32).astype(np.uint8).reshape(-1, 2, 4, 32)
    low = values & 15
    ql = np.concatenate([low[:, :, 0] | low[:, :, 2] << 4, low[:, :, 1] | low[:, :, 3] << 4], axis=2)
    high = values >> 4
    qh = high[:, :, 0] | high[:, :, 1] << 2 | high[:, :, 2] << 4 | high[:, :, 3] << 6
    count = len(x)
    return np.concatenate(
        [ql.reshape(count, 128), qh.reshape(count, 64), sc.astype(np.int8).view(np.uint8), d.view(np.uint8)],
        axis=1,
    )


def _q4_k(rows: _Floats) -> NDArray[np.uint8]:
    x = rows.reshape(-1, 8, 32)
    low = np.minimum(x.min(axis=2, keepdims=True), 0)  # the offset is subtracted and cannot be negative
    scale = (x.max(axis=2, keepdims=True).clip(min=0) - low) / np.float32(15)
    q = np.clip(np.rint(_divide(x - low, scale)), 0, 15)
    # Least squares of x = scale * q - minimum over the group; kept only where both come out positive.
    q_mean, x_mean = q.mean(axis=2, keepdims=True), x.mean(axis=2, keepdims=True)
    fitted = _divide(
        ((q - q_mean) * x).sum(axis=2, keepdims=True), np.square(q - q_mean).sum(axis=2, keepdims=True)
    )
    offset = fitted * q_mean - x_mean
    good = (fitted > 0) & (offset >= 0)
    scale, minimum = np.where(good, fitted, scale)[..., 0], np.where(good, offset, -low)[..., 0]
    d = (scale.max(axis=1, keepdims=True) / np.float32(63)).astype(np.float16)
    dmin = (minimum.max(axis=1, keepdims=True) / np.float32(63)).astype(np.float16)
    sc = np.clip(np.rint(_divide(scale, d.astype(np.float32))), 0, 63).astype(np.uint8)
    m = np.clip(np.rint(_divide(minimum, dmin.astype(np.float32))), 0, 63).astype(np.uint8)
    step = (d.astype(np.float32) * sc)[..., None]
    shift = (dmin.astype(np.float32) * m)[..., None]
    values = np.clip(np.rint(_divide(x + shift, step)), 0, 15).astype(np.uint8).reshape(-1, 4, 2, 32)
    packed = (values[:, :, 0] | values[:, :, 1] << 4).reshape(len(x), 128)
    # 6-bit scales: four whole bytes each for groups 0..3, whose top bits hold those of groups 4..7.
    first = sc[:, :4] | (sc[:, 4:] >> 4) << 6
    second = m[:, :4] | (m[:, 4:] >> 4) << 6
    third = (sc[:, 4:] & 15) | (m[:, 4:] & 15) << 4
    return np.concatenate([d.view(np.uint8), dmin.view(np.uint8), first, second, third, packed], axis=1)
