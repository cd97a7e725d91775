"""Per-row scores as one short text, so that results files alone allow paired tests. No torch import.

Predictions hold the rows' texts, which many data sets do not allow to pass on; scores do not.
"""

from __future__ import annotations

import base64
import binascii
import zlib
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from bitdistill.errors import ArtifactError

UNITS = 10_000
"""A score is stored as a multiple of 1/UNITS: right or wrong exactly, ROUGE to 0.005 points."""
MAX_ROWS = 10_000_000


def encode(scores: Sequence[float]) -> str:
    """Scores (0..1), in row order, as base64 of zlib of little-endian 16-bit multiples of 1/UNITS.

    Raises:
        ValueError: a score outside of 0..1.
    """
    values = np.asarray(scores, dtype=np.float64)
    if not ((values >= 0) & (values <= 1)).all():
        raise ValueError("row scores: a score is not in 0..1")
    return base64.b64encode(zlib.compress(np.rint(values * UNITS).astype("<u2").tobytes(), 9)).decode()


def decode(text: str, n: int, where: str = "row_scores") -> NDArray[np.float64]:
    """Scores in percent, float64 [n].

    Raises:
        ArtifactError: not what `encode` wrote, or not n rows; `where` names the place.
    """
    try:
        if not 0 <= n <= MAX_ROWS:
            raise ValueError(f"{n} rows")
        stream = zlib.decompressobj()
        raw = stream.decompress(base64.b64decode(text, validate=True), 2 * n + 1)
        values = np.frombuffer(raw, dtype="<u2")
        if len(values) != n or not stream.eof or (values > UNITS).any():
            raise ValueError(f"{len(values)} scores of 0..{UNITS} for {n} rows")
    except (ValueError, zlib.error, binascii.Error) as error:
        raise ArtifactError(f"{where}: unreadable row scores ({error}); evaluate again") from None
    return values * (100.0 / UNITS)
