"""Byte layouts of ternary GGUF tensors: every code group, goldens, the gguf package as twin, damaged bytes."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable
from typing import Any

import gguf
import numpy as np
import pytest

from bitdistill.errors import ModelError
from bitdistill.interop import gguf_codec, gguf_kquants
from bitdistill.interop.gguf_codec import TYPES, decode, encode

SCALE = 0.0371
KINDS = sorted(TYPES)


def codes_of(rows: int, width: int, seed: int = 0) -> Any:
    return np.random.default_rng(seed).integers(-1, 2, (rows, width)).astype(np.int8)


@pytest.mark.parametrize("kind", KINDS)
def test_codes_come_back_and_the_scale_to_its_precision(kind: Any) -> None:
    codes = codes_of(6, 512)
    codes[2] = 0  # a row whose blocks hold no weight at all
    raw = encode(kind, codes, SCALE)
    assert raw.nbytes == gguf_codec.tensor_bytes(kind, codes.shape)
    got, scale = decode(kind, raw, codes.shape, "t")
    assert np.array_equal(got, codes)
    assert scale == (np.float32(SCALE) if kind == "i2_s" else np.float32(np.float16(SCALE)))


@pytest.mark.parametrize("kind", ["tq1_0", "tq2_0", "q4_0"])
def test_the_gguf_package_reads_the_same_weights(kind: Any) -> None:
    codes = codes_of(5, 768)
    weights = gguf.quants.dequantize(encode(kind, codes, SCALE), gguf.GGMLQuantizationType[kind.upper()])
    assert np.array_equal(weights, codes * np.float32(np.float16(SCALE)))


@pytest.mark.parametrize("kind", ["tq1_0", "tq2_0"])
def test_the_gguf_packages_own_bytes_are_read(kind: Any) -> None:
    """As llama.cpp's quantizer writes them: blocks without a weight have scale 0."""
    codes = codes_of(4, 256)
    codes[1] = 0
    weights = codes * np.float32(np.float16(SCALE))
    raw = np.array(gguf.quants.quantize(weights, gguf.GGMLQuantizationType[kind.upper()]))
    got, scale = decode(kind, raw, codes.shape, "t")
    assert np.array_equal(got, codes)
    assert scale == np.float32(np.float16(SCALE))


def test_every_group_of_five_codes_has_its_byte_in_tq1_0() -> None:
    groups = np.array(list(itertools.product((-1, 0, 1), repeat=5)), np.int8)  # 3^5
    for start in range(0, 243, 32):
        block = np.zeros((1, 256), np.int8)
        some = groups[start : start + 32]
        block[0, :160].reshape(5, 32)[:, : len(some)] = some.T
        raw = encode("tq1_0", block, 1.0)
        for group, byte in zip(some, raw[0, : len(some)], strict=True):
            q = sum((int(code) + 1) * 3**k for code, k in zip(group, (4, 3, 2, 1, 0), strict=True))
            assert byte == -(-256 * q // 243)
        assert np.array_equal(decode("tq1_0", raw, (1, 256), "t")[0], block)


def test_every_byte_of_tq1_0_is_a_group_or_refused() -> None:
    five, four = gguf_codec.base3_tables()
    assert (five[:, 0] < 3).sum() == 243
    assert (four[:, 0] < 3).sum() == 81
    sound = encode("tq1_0", np.zeros((1, 256), np.int8), 1.0)
    # where a byte of each of the three parts lands, and with how many codes
    for at, table, places in (
        (7, five, range(7, 160, 32)),
        (40, five, range(168, 240, 16)),
        (50, four, range(242, 256, 4)),
    ):
        for byte in range(256):
            raw = sound.copy()
            raw[0, at] = byte
            if table[byte, 0] == 3:
                with pytest.raises(ModelError, match="a byte that holds no"):
                    decode("tq1_0", raw, (1, 256), "t")
            else:
                codes, _ = decode("tq1_0", raw, (1, 256), "t")
                assert [int(codes[0, p]) + 1 for p in places] == table[byte].tolist()


@pytest.mark.parametrize(("kind", "shifts"), [("tq2_0", (0, 2, 4, 6)), ("i2_s", (6, 4, 2, 0))])
def test_every_byte_of_two_bit_codes_is_four_codes_or_refused(kind: Any, shifts: tuple[int, ...]) -> None:
    width = TYPES[kind][1]
    sound = encode(kind, np.zeros((1, width), np.int8), 1.0).reshape(-1)
    for byte in range(256):
        raw = sound.copy()
        raw[5] = byte
        values = [byte >> s & 3 for s in shifts]
        if 3 in values:
            with pytest.raises(ModelError, match="value 3"):
                decode(kind, raw, (1, width), "t")
        else:  # 3^4 bytes
            codes, _ = decode(kind, raw, (1, width), "t")
            assert codes[0, 5:128:32].tolist() == [v - 1 for v in values]
            assert np.array_equal(encode(kind, codes, 1.0).reshape(-1), raw)


def test_every_byte_of_q4_0_is_two_codes_or_refused() -> None:
    sound = encode("q4_0", np.zeros((1, 32), np.int8), 1.0)
    legal = 0
    for byte in range(256):
        raw = sound.copy()
        raw[0, 2 + 5] = byte  # low half: weight 5, high half: weight 21
        values = [(byte & 15) - 8, (byte >> 4) - 8]
        if max(map(abs, values)) > 1:
            with pytest.raises(ModelError, match="4-bit weights other than"):
                decode("q4_0", raw, (1, 32), "t")
            continue
        legal += 1
        codes, _ = decode("q4_0", raw, (1, 32), "t")
        assert codes[0, [5, 21]].tolist() == values
        assert np.array_equal(encode("q4_0", codes, 1.0), raw)
    assert legal == 3**2


@pytest.mark.parametrize(
    ("kind", "digest"),
    [
        ("tq1_0", "dc17201a50881d62"),
        ("tq2_0", "5b3ebd9193689e09"),
        ("i2_s", "18a359f8e663da74"),
        ("q4_0", "5b287c1c91caf48d"),
    ],
)
def test_layout_goldens(kind: Any, digest: str) -> None:
    codes = (np.arange(3 * 512).reshape(3, 512) * 7 % 11 % 3 - 1).astype(np.int8)
    assert hashlib.sha256(encode(kind, codes, 0.0625).tobytes()).hexdigest()[:16] == digest


def put(at: int, *values: int) -> Callable[[Any], Any]:
    def change(raw: Any) -> Any:
        raw = raw.copy()
        raw[at : at + len(values)] = values
        return raw

    return change


NAN16, NAN32 = (0x00, 0x7E), (0x00, 0x00, 0xC0, 0x7F)


@pytest.mark.parametrize(
    ("kind", "damage", "words"),
    [
        ("tq1_0", lambda r: r[:-1], "107 bytes of tq1_0, 2 x 256 weights take 108"),
        ("tq2_0", lambda r: np.append(r, r[:1]), "133 bytes of tq2_0"),
        ("i2_s", lambda r: r[:-32], "128 bytes of i2_s, 2 x 256 weights take 160"),
        ("q4_0", lambda r: r[:-18], "270 bytes of q4_0"),
        ("tq1_0", put(52, *NAN16), "scale nan is not positive"),
        ("tq2_0", put(64, 0x00, 0x7C), "scale inf is not positive"),
        ("tq2_0", put(65, 0xAC), "scale -0.0"),
        ("tq2_0", put(64, 0, 0), "scale 0.0 is not positive"),
        ("tq1_0", put(52, 0, 0x40), "block scales differ"),
        ("q4_0", put(0, 0, 0x40), "block scales differ"),
        ("q4_0", put(2, 0x18), "4-bit weights other than"),
        ("i2_s", put(128, *NAN32), "scale nan is not positive"),
        ("i2_s", put(128, 0, 0, 0, 0), "scale 0.0 is not positive"),
        ("i2_s", put(131, 0xBD), "scale -"),
    ],
)
def test_damaged_tensors_are_refused(kind: Any, damage: Any, words: str) -> None:
    raw = encode(kind, codes_of(2, 256), SCALE).reshape(-1)
    with pytest.raises(ModelError, match=words) as caught:
        decode(kind, damage(raw), (2, 256), "m.gguf: blk.0.attn_q.weight")
    assert str(caught.value).startswith("m.gguf: blk.0.attn_q.weight")


def test_what_cannot_be_written_is_refused() -> None:
    with pytest.raises(ModelError, match="rows of 192 weights do not fill blocks of 256"):
        encode("tq2_0", codes_of(2, 192), SCALE)
    for scale in (1e-7, 1e6, float("nan")):
        with pytest.raises(ModelError, match="does not fit float16"):
            encode("tq1_0", codes_of(1, 256), scale)
    empty = encode("tq2_0", np.zeros((1, 256), np.int8), 1.0)
    empty[0, 64:] = 0
    with pytest.raises(ModelError, match="all codes and scales are 0"):
        decode("tq2_0", empty, (1, 256), "t")


@pytest.mark.parametrize(("kind", "relative"), [("q8_0", 1 / 230), ("q6_k", 1 / 28), ("q4_k", 1 / 19)])
def test_tables_lie_within_a_step_of_their_values(kind: Any, relative: float) -> None:
    rng = np.random.default_rng(0)
    table = (rng.standard_normal((70, 512)) * 0.03).astype(np.float32)
    table[3] = 0
    table[4, :300] = 0
    table[5] = np.abs(table[5])
    table[6] = -np.abs(table[6]) - 0.01
    raw = gguf_kquants.encode_table(kind, table, "t")
    got = gguf.quants.dequantize(raw, gguf.GGMLQuantizationType[kind.upper()])
    group = {"q8_0": 32, "q6_k": 16, "q4_k": 32}[kind]
    error = np.abs(got - table).reshape(-1, group)
    groups = table.reshape(-1, group)
    # Group scales are multiples of a coarser step, so groups much smaller than their super-block lose more.
    span = np.abs(groups).max(1) if kind != "q4_k" else groups.max(1).clip(0) - groups.min(1).clip(max=0)
    step = relative * np.maximum(span, np.repeat(span.reshape(-1, 256 // group).max(1) / 8, 256 // group))
    assert (error <= step[:, None] + 1e-12).all()
    assert np.array_equal(got[3], table[3])
    # The error's root mean square over normal values; ggml's own quantizers reach 0.0054, 0.0177, 0.0713.
    ratio = np.sqrt(np.square(got[10:] - table[10:]).mean()) / table[10:].std()
    assert ratio < {"q8_0": 0.0055, "q6_k": 0.019, "q4_k": 0.077}[kind]


STEP = np.float32(2.0**-10)


def exact_q6_k() -> Any:
    """Rows that Q6_K holds exactly: every 6-bit code at every place, every group scale of each sign."""
    at = np.arange(256)
    codes = (at + np.arange(256)[:, None]) % 64 - 32
    for r, row in enumerate(codes):
        row[r // 64 * 4 :: 16] = -32  # each group of 16 has the code its scale comes from
    groups = np.full((256, 16), 128)
    for r, row in enumerate(groups):
        row[r % 16] = max(1, r % 128) * (-1 if r >= 128 else 1)
    return (codes.reshape(256, 16, 16) * groups[..., None] * STEP).reshape(256, 256).astype(np.float32)


def exact_q4_k() -> Any:
    """Rows that Q4_K holds exactly: every 4-bit code at every place, every 6-bit scale and minimum of each group."""
    codes = (np.arange(256) + np.arange(512)[:, None]) % 16
    scales, minima = np.full((512, 8), 63), np.full((512, 8), 63)
    for r in range(512):
        scales[r, r % 8], minima[r, r % 8] = max(1, r // 8), r // 8
    values = codes.reshape(512, 8, 32) * scales[..., None] - minima[..., None]
    return (values.reshape(512, 256) * STEP).astype(np.float32)


def exact_q8_0() -> Any:
    """Rows that Q8_0 holds exactly: every code at every place."""
    codes = (np.arange(64) * 97 + np.arange(510)[:, None]) % 255 - 127
    codes[:255, ::32] = codes[255:, 31::32] = 127  # each group has the code its scale comes from
    return (codes * STEP).astype(np.float32)


@pytest.mark.parametrize(
    ("kind", "table", "bytes_a_block", "digest"),
    [
        ("q6_k", exact_q6_k(), 210, "08be5b0cd21d5af4"),
        ("q4_k", exact_q4_k(), 144, "60b50c7f0714744b"),
        ("q8_0", exact_q8_0(), 34, "ed5cb17ae1fe3a08"),
        ("f16", exact_q6_k()[:8], 2, "69a9bd17878efa2b"),
    ],
)
def test_table_goldens_over_every_code(kind: Any, table: Any, bytes_a_block: int, digest: str) -> None:
    raw = gguf_kquants.encode_table(kind, table, "t")
    assert raw.nbytes == table.size // gguf_kquants.BLOCKS[kind] * bytes_a_block
    got = gguf.quants.dequantize(raw, gguf.GGMLQuantizationType[kind.upper()])
    assert np.array_equal(got, table)
    if kind == "q6_k":
        blocks = raw.reshape(-1, 210)
        low = np.stack([blocks[:, :128] >> s & 15 for s in (0, 4)])
        high = np.stack([blocks[:, 128:192] >> s & 3 for s in (0, 2, 4, 6)])
        assert all(len(np.unique(place)) == 16 for half in low for place in half.T)
        assert all(len(np.unique(place)) == 4 for field in high for place in field.T)
        assert set(blocks[:, 192:208].view(np.int8).ravel().tolist()) == set(range(-128, 128)) - {0}
    if kind == "q8_0":
        assert all(len(np.unique(place)) == 255 for place in raw.reshape(-1, 34)[:, 2:].T)
    if kind == "q4_k":
        blocks = raw.reshape(-1, 144)
        halves = np.stack([blocks[:, 16:] >> s & 15 for s in (0, 4)])
        assert all(len(np.unique(place)) == 16 for half in halves for place in half.T)
        low = blocks[:, 4:12] & 63  # scales and minima of groups 0 to 3
        assert all(len(np.unique(place)) >= 63 for place in low.T)
        # of groups 4 to 7: low bits in the last four bytes, high bits above those of groups 0 to 3
        last = blocks[:, 12:16]
        scales, minima = (last & 15) | blocks[:, 4:8] >> 6 << 4, last >> 4 | blocks[:, 8:12] >> 6 << 4
        assert all(len(np.unique(place)) >= 63 for field in (scales, minima) for place in field.T)
    assert hashlib.sha256(raw.tobytes()).hexdigest()[:16] == digest


def test_tables_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ModelError, match=r"rows of 192 do not fill q6_k's blocks of 256; .* f16 or q8_0"):
        gguf_kquants.encode_table("q6_k", np.zeros((2, 192), np.float32), "t")
    with pytest.raises(ModelError, match="does not fit float16"):
        gguf_kquants.encode_table("f16", np.full((1, 4), 1e5, np.float32), "t")
