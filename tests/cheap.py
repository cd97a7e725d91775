"""How cheaply malformed input is refused (reliability figures: under 100 ms, 64 MB).

The limit is ten times what the slowest takes here (20 to 30 ms), for slower machines; what reads or computes far more
than it must is still caught.
"""

from __future__ import annotations

import time
import tracemalloc
from collections.abc import Callable

import pytest

LIMIT_S, LIMIT_BYTES = 0.3, 64 << 20


def refused_cheaply(call: Callable[[], object], *errors: type[Exception]) -> str:
    """The message of the error that `call` raises each time; its cost is checked.

    Processor time of the best of three calls, so that neighbours do not count; memory as Python and NumPy allocate it.
    """
    costs = []
    for _ in range(3):
        start = time.process_time()
        with pytest.raises(errors) as caught:
            call()
        costs.append(time.process_time() - start)
        if costs[-1] < LIMIT_S:
            break
    assert min(costs) < LIMIT_S, f"refused after {min(costs):.3f} s of processor time"
    tracemalloc.start()
    try:
        with pytest.raises(errors):
            call()
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < LIMIT_BYTES, f"{peak} bytes allocated before it was refused"
    return str(caught.value)
