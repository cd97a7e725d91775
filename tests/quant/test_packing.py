"""The 2-bit codec: every byte there is, odd widths, and the golden of docs/format.md."""

from __future__ import annotations

import hashlib
import itertools
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from bitdistill.quant.packing import pack_2bit, packed_width, unpack_2bit

GOLDEN = Path(__file__).parent / "golden" / "packed_3x10.safetensors"
GOLDEN_SHA256 = "8b3ab083c3cd1aa935ed08afd53fd1477ff77865c29a7b0917b2f1669e850a50"
GOLDEN_CODES = [
    [1, 0, -1, 1, 0, 0, 0, 0, -1, -1],
    [-1, -1, -1, -1, 1, 1, 1, 1, 0, 1],
    [0, 1, 0, -1, 0, 1, 0, -1, 1, 0],
]
GOLDEN_BYTES = [[0x86, 0x55, 0x50], [0x00, 0xAA, 0x59], [0x19, 0x19, 0x56]]


def slow_pack(row: list[int]) -> bytes:
    """One row, straight from the words of the format document."""
    packed = bytearray(-(-len(row) // 4))
    for i in range(4 * len(packed)):
        value = row[i] + 1 if i < len(row) else 1
        packed[i // 4] |= value << (2 * (i % 4))
    return bytes(packed)


def test_all_81_legal_bytes_round_trip() -> None:
    groups = torch.tensor(list(itertools.product((-1, 0, 1), repeat=4)), dtype=torch.int8)
    packed = pack_2bit(groups)
    assert packed.dtype == torch.uint8
    assert packed.shape == (81, 1)
    assert len(set(packed.flatten().tolist())) == 81
    assert [bytes([b]) for b in packed.flatten().tolist()] == [slow_pack(g) for g in groups.tolist()]
    assert torch.equal(unpack_2bit(packed, 4), groups)


def test_the_other_175_bytes_are_refused() -> None:
    legal = {slow_pack(list(g))[0] for g in itertools.product((-1, 0, 1), repeat=4)}
    refused = 0
    for byte in set(range(256)) - legal:
        with pytest.raises(ValueError, match="value 3 at row 0, column"):
            unpack_2bit(torch.tensor([[byte]], dtype=torch.uint8), 4)
        refused += 1
    assert refused == 175


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 5), st.integers(1, 23), st.integers(0, 2**32 - 1))
def test_any_width_round_trips_and_equals_the_slow_twin(rows: int, width: int, seed: int) -> None:
    codes = torch.randint(
        -1, 2, (rows, width), generator=torch.Generator().manual_seed(seed), dtype=torch.int8
    )
    packed = pack_2bit(codes)
    assert packed.shape == (rows, packed_width(width))
    assert [bytes(row) for row in packed.tolist()] == [slow_pack(row) for row in codes.tolist()]
    assert torch.equal(unpack_2bit(packed, width), codes)


def test_golden() -> None:
    assert hashlib.sha256(GOLDEN.read_bytes()).hexdigest() == GOLDEN_SHA256
    tensors = load_file(GOLDEN)
    assert tensors["layer.codes"].tolist() == GOLDEN_BYTES
    assert unpack_2bit(tensors["layer.codes"], 10).tolist() == GOLDEN_CODES
    assert torch.equal(pack_2bit(torch.tensor(GOLDEN_CODES, dtype=torch.int8)), tensors["layer.codes"])
    assert tensors["layer.scale"].dtype == torch.float32
    assert tensors["layer.scale"].item() == 0.0625


def test_non_contiguous_codes() -> None:
    codes = torch.randint(-1, 2, (9, 6), generator=torch.Generator().manual_seed(0), dtype=torch.int8)
    assert torch.equal(unpack_2bit(pack_2bit(codes.t()), 9), codes.t())
    assert torch.equal(unpack_2bit(pack_2bit(codes)[::2], 6), codes[::2])


@pytest.mark.parametrize(
    ("codes", "message"),
    [
        (torch.zeros(2, 4), "torch.float32"),
        (torch.zeros(4, dtype=torch.int8), r"shape \(4,\)"),
        (torch.tensor([[0, 0], [0, 2]], dtype=torch.int8), r"code \[1, 1\] is 2"),
        (torch.tensor([[-128]], dtype=torch.int8), r"code \[0, 0\] is -128"),
    ],
)
def test_pack_refuses(codes: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pack_2bit(codes)


@pytest.mark.parametrize(
    ("packed", "width", "message"),
    [
        (torch.zeros(2, 1, dtype=torch.int8), 4, "torch.int8"),
        (torch.zeros(2, dtype=torch.uint8), 4, r"shape \(2,\)"),
        (torch.zeros(2, 2, dtype=torch.uint8), 4, "rows hold 2 bytes; 4 codes need 1"),
        (torch.zeros(2, 1, dtype=torch.uint8), 5, "rows hold 1 bytes; 5 codes need 2"),
        (torch.tensor([[0b01010101], [0b00010101]], dtype=torch.uint8), 3, "padding of row 1 is not value 1"),
    ],
)
def test_unpack_refuses(packed: torch.Tensor, width: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        unpack_2bit(packed, width)
