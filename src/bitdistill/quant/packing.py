"""The 2-bit codec of docs/format.md: its slow, exact reference.

A code in {-1, 0, +1} is stored as ``code + 1``; the fourth value, 3, is illegal. Four codes share a byte
along the input dimension: element ``i`` of a row sits in byte ``i // 4`` at bits ``2 * (i % 4)``, low bits
first. A row whose length is not a multiple of 4 is padded with value 1 (code 0): rows start on a byte.

Shape legend: O out features, I in features.
"""

from __future__ import annotations

import torch
from torch import Tensor

CODES_PER_BYTE = 4


def packed_width(in_features: int) -> int:
    """Bytes of one packed row."""
    return -(-in_features // CODES_PER_BYTE)


def pack_2bit(codes_OI: Tensor) -> Tensor:
    """Pack ternary codes.

    Args:
        codes_OI: int8 [out, in], every value -1, 0 or +1.

    Returns:
        uint8 [out, ceil(in / 4)] on the same device.

    Raises:
        ValueError: not a two-dimensional int8 tensor, or a value outside {-1, 0, 1}.
    """
    if codes_OI.dtype != torch.int8 or codes_OI.dim() != 2:
        raise ValueError(
            f"codes are {codes_OI.dtype} with shape {tuple(codes_OI.shape)}; pack_2bit takes int8 [out, in]"
        )
    if bool(((codes_OI < -1) | (codes_OI > 1)).any()):
        row, column = ((codes_OI < -1) | (codes_OI > 1)).nonzero()[0].tolist()
        value = int(codes_OI[row, column])
        raise ValueError(f"code [{row}, {column}] is {value}; ternary codes are -1, 0 and 1")
    rows, width = codes_OI.shape
    values = torch.ones(
        (rows, packed_width(width) * CODES_PER_BYTE), dtype=torch.uint8, device=codes_OI.device
    )
    values[:, :width] = (codes_OI + 1).to(torch.uint8)
    v0, v1, v2, v3 = values.view(rows, -1, CODES_PER_BYTE).unbind(-1)
    return v0 | (v1 << 2) | (v2 << 4) | (v3 << 6)


def unpack_2bit(packed_OB: Tensor, in_features: int) -> Tensor:
    """Unpack what `pack_2bit` wrote.

    Args:
        packed_OB: uint8 [out, ceil(in / 4)].
        in_features: codes of a row, without the padding.

    Returns:
        int8 [out, in_features] on the same device.

    Raises:
        ValueError: wrong dtype or width, the illegal value 3, or padding that is not value 1.
    """
    if packed_OB.dtype != torch.uint8 or packed_OB.dim() != 2:
        raise ValueError(
            f"packed codes are {packed_OB.dtype} with shape {tuple(packed_OB.shape)}; "
            "unpack_2bit takes uint8 [out, bytes]"
        )
    rows, width = packed_OB.shape
    if width != packed_width(in_features):
        raise ValueError(
            f"rows hold {width} bytes; {in_features} codes need {packed_width(in_features)}; "
            "re-export the student"
        )
    values = torch.stack([(packed_OB >> shift) & 3 for shift in (0, 2, 4, 6)], dim=-1).view(
        rows, width * CODES_PER_BYTE
    )
    if bool((values == 3).any()):
        row, column = (values == 3).nonzero()[0].tolist()
        raise ValueError(f"value 3 at row {row}, column {column} is no code (0, 1, 2 are); re-export")
    if bool((values[:, in_features:] != 1).any()):
        row = int((values[:, in_features:] != 1).nonzero()[0, 0])
        raise ValueError(f"padding of row {row} is not value 1; re-export the student")
    return values[:, :in_features].to(torch.int8) - 1
