"""Ternary tensors in GGUF: codes and one scale, to bytes and back, with no code changed.

Types (n weights a row, all codes of a tensor share one scale):

    TQ1_0   blocks of 256 weights in 54 bytes: 5 codes a byte (base 3, as a fraction of 256), float16 scale
    TQ2_0   blocks of 256 weights in 66 bytes: weights i, i + 32, i + 64, i + 96 of each 128 in one byte, low bits
            first, code + 1; float16 scale
    I2_S    bitnet.cpp: weights i, i + 32, i + 64, i + 96 of each 128 in one byte, high bits first, code + 1;
            after the last row 32 bytes, of which the first 4 are the float32 scale
    Q4_0    blocks of 32 weights in 18 bytes: float16 scale, then code + 8 in 4 bits; not a ternary type, but
            it holds codes exactly, for rows that fill no block of the others

TQ1_0 and TQ2_0 are written by the `gguf` package and checked by reading them back. Q4_0 is not: the usual quantizer
puts the largest weight on -8 and so gives +scale and -scale different magnitudes (7 and 8 steps).
Readers refuse what no writer makes: value 3 in 2 bits, bytes of TQ1_0 outside the image of 3^5 codes, scales that
differ between blocks, or are not positive and finite (0 in a block whose codes are all 0 is allowed: quantizers
that look for a block's largest weight write it).

Shape legend: O out features, I in features.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
from numpy.typing import NDArray

from bitdistill.errors import ModelError
from bitdistill.models.gguf_header import I2_S

TernaryType = Literal["tq1_0", "tq2_0", "i2_s", "q4_0"]
Bytes = NDArray[np.uint8]
Codes = NDArray[np.int8]

# Name -> ggml's number, weights a block, bytes a block.
TYPES: dict[TernaryType, tuple[int, int, int]] = {
    "tq1_0": (34, 256, 54),
    "tq2_0": (35, 256, 66),
    "i2_s": (I2_S, 128, 32),
    "q4_0": (2, 32, 18),
}
NAMES: dict[int, TernaryType] = {number: name for name, (number, _, _) in TYPES.items()}
I2_S_TAIL = 32
# Relative error of a float16 scale, at most: half a unit in the last of 11 bits.
FLOAT16_ERROR = 2.0**-11


def encode(kind: TernaryType, codes_OI: Codes, scale: float) -> Bytes:
    """Bytes of a ternary tensor.

    Args:
        codes_OI: int8 in {-1, 0, 1}, shape [out, in]; in must fill blocks of the type.
        scale: positive; rounded to float16, except by i2_s.

    Returns:
        uint8, [out, bytes of a row], or one dimension for i2_s.

    Raises:
        ModelError: rows do not fill blocks, or the scale does not fit float16.
        MissingDependencyError: the `gguf` package is not installed.
    """
    block = TYPES[kind][1]
    if codes_OI.shape[1] % block:
        raise ModelError(f"{kind}: rows of {codes_OI.shape[1]} weights do not fill blocks of {block}")
    if kind == "i2_s":
        return _to_i2_s(codes_OI, scale)
    with np.errstate(over="ignore"):
        half = np.float16(scale)
    if not abs(float(half) - scale) <= FLOAT16_ERROR * scale:  # also NaN, infinity, subnormal halves
        raise ModelError(f"{kind}: scale {scale} does not fit float16; choose i2_s, or format packed")
    if kind == "q4_0":
        return _to_q4_0(codes_OI, half)
    raw = _quantize(kind, codes_OI.astype(np.float32))
    # The package derives a block's scale from its weights. Codes go in as +-1 and the scale is set here: so the
    # division by it cannot round a code away, and blocks of zeros have the scale of all others.
    blocks = raw.reshape(-1, TYPES[kind][2])
    blocks[:, -2:] = np.array([half]).view(np.uint8)
    if not np.array_equal(_from_tq(kind, blocks, "")[0].reshape(codes_OI.shape), codes_OI):
        raise ModelError(
            f"{kind}: the gguf package wrote other codes than it was given; install another version"
        )
    return raw


def decode(kind: TernaryType, raw: Bytes, shape: tuple[int, int], where: str) -> tuple[Codes, float]:
    """Codes [out, in] and the scale of a ternary tensor.

    Args:
        raw: uint8, all bytes of the tensor.
        shape: out, in.
        where: file and tensor, for messages.

    Raises:
        ModelError: the wrong number of bytes, a code that is none, or scales that are not one scale.
    """
    wanted = tensor_bytes(kind, shape)
    if raw.size != wanted:
        raise ModelError(
            f"{where}: {raw.size} bytes of {kind}, {shape[0]} x {shape[1]} weights take {wanted}"
        )
    flat = np.ascontiguousarray(raw).reshape(-1)
    if kind == "i2_s":
        return _from_i2_s(flat, shape, where)
    blocks = flat.reshape(-1, TYPES[kind][2])
    codes, scales = _from_q4_0(blocks, where) if kind == "q4_0" else _from_tq(kind, blocks, where)
    return codes.reshape(shape), _one_scale(codes, scales, where)


def tensor_bytes(kind: TernaryType, shape: tuple[int, int]) -> int:
    """Bytes of a tensor of `shape` (out, in), whose rows fill blocks."""
    _, block, size = TYPES[kind]
    return shape[0] * (shape[1] // block) * size + (I2_S_TAIL if kind == "i2_s" else 0)


def _quantize(kind: str, weights: NDArray[np.float32]) -> Bytes:
    from bitdistill.interop.gguf_package import gguf

    package = gguf()
    return np.array(package.quants.quantize(weights, package.GGMLQuantizationType[kind.upper()]))


def _one_scale(codes: Codes, scales: NDArray[np.float32], where: str) -> float:
    """The scale that all blocks [blocks, weights] with a code other than 0 share."""
    used = scales[np.abs(codes).max(axis=1) > 0]
    empty = scales[np.abs(codes).max(axis=1) == 0]
    if not np.isfinite(scales).all() or (used <= 0).any() or (empty < 0).any():
        bad = next(float(s) for s in (*scales[~np.isfinite(scales)], *used[used <= 0], *empty[empty < 0]))
        raise ModelError(f"{where}: block scale {bad} is not positive and finite; the file is damaged")
    if used.size and (used != used[0]).any():
        raise ModelError(
            f"{where}: block scales differ ({used.min():g} to {used.max():g}); bitdistill runs one scale a tensor"
        )
    if used.size:
        return float(used[0])
    if not (empty > 0).any():
        raise ModelError(f"{where}: all codes and scales are 0; the file is damaged")
    return float(empty.max())


def _from_tq(kind: str, blocks: Bytes, where: str) -> tuple[Codes, NDArray[np.float32]]:
    scales = np.ascontiguousarray(blocks[:, -2:]).view(np.float16).reshape(-1).astype(np.float32)
    count = len(blocks)
    if kind == "tq2_0":
        halves = blocks[:, :64].reshape(count, 2, 1, 32)
        values: Bytes = (halves >> np.array([0, 2, 4, 6], np.uint8).reshape(1, 1, 4, 1)) & np.uint8(3)
        _refuse_three(values, where)
        return values.reshape(count, 256).astype(np.int8) - np.int8(1), scales
    five, four = base3_tables()
    parts = []
    for start, stop, digits, table in ((0, 32, 5, five), (32, 48, 5, five), (48, 52, 4, four)):
        values = table[blocks[:, start:stop]]  # [blocks, bytes, digits], 3 where no writer puts the byte
        if (values == 3).any():
            raise ModelError(f"{where}: a byte that holds no {digits} ternary codes; the file is damaged")
        parts.append(values.transpose(0, 2, 1).reshape(count, -1))
    return np.concatenate(parts, axis=1).astype(np.int8) - np.int8(1), scales


def base3_tables() -> tuple[Bytes, Bytes]:
    """Byte -> digits 0..2 of TQ1_0, first weight first: uint8 [256, 5] and [256, 4]; 3 for bytes of no code group.

    A group of digits is the integer q < 243 in base 3, most significant first (four digits are followed by a 0),
    and is stored as ceil(256 q / 243).
    """
    five = np.full((256, 5), 3, np.uint8)
    four = np.full((256, 4), 3, np.uint8)
    for q in range(243):
        byte = -(-q * 256 // 243)
        digits = [q // 3**k % 3 for k in (4, 3, 2, 1, 0)]
        five[byte] = digits
        if digits[4] == 0:
            four[byte] = digits[:4]
    return five, four


def _to_i2_s(codes_OI: Codes, scale: float) -> Bytes:
    values = (codes_OI + 1).astype(np.uint8).reshape(-1, 4, 32)
    packed = values[:, 0] << 6 | values[:, 1] << 4 | values[:, 2] << 2 | values[:, 3]
    tail = np.zeros(I2_S_TAIL, np.uint8)
    tail[:4] = np.array([scale], "<f4").view(np.uint8)
    return np.concatenate([packed.reshape(-1), tail])


def _from_i2_s(flat: Bytes, shape: tuple[int, int], where: str) -> tuple[Codes, float]:
    shifts = np.array([6, 4, 2, 0], np.uint8).reshape(1, 4, 1)
    values: Bytes = (flat[:-I2_S_TAIL].reshape(-1, 1, 32) >> shifts) & np.uint8(3)
    _refuse_three(values, where)
    scale = float(flat[-I2_S_TAIL : -I2_S_TAIL + 4].copy().view("<f4")[0])
    if not (np.isfinite(scale) and scale > 0):
        raise ModelError(f"{where}: scale {scale} is not positive and finite; the file is damaged")
    return values.reshape(shape).astype(np.int8) - np.int8(1), scale


def _to_q4_0(codes_OI: Codes, half: np.float16) -> Bytes:
    values = (codes_OI + 8).astype(np.uint8).reshape(-1, 2, 16)
    scales = np.full((len(values), 1), half, np.float16).view(np.uint8)
    packed = np.concatenate([scales, values[:, 0] | values[:, 1] << 4], axis=1)
    return packed.reshape(codes_OI.shape[0], -1)


def _from_q4_0(blocks: Bytes, where: str) -> tuple[Codes, NDArray[np.float32]]:
    scales = np.ascontiguousarray(blocks[:, :2]).view(np.float16).reshape(-1).astype(np.float32)
    values = np.concatenate([blocks[:, 2:] & 15, blocks[:, 2:] >> 4], axis=1).astype(np.int8) - np.int8(8)
    if (np.abs(values) > 1).any():
        raise ModelError(f"{where}: 4-bit weights other than -1, 0 and 1 times the scale; it is not ternary")
    return values, scales


def _refuse_three(values: Bytes, where: str) -> None:
    if (values == 3).any():
        raise ModelError(f"{where}: holds the value 3, which is no ternary code; the file is damaged")
