"""What the interpreter cannot show: that the kernels compile, and to which instructions."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="triton is not installed")


@pytest.mark.slow
@pytest.mark.skipif(
    platform.system() != "Linux" or platform.machine() != "x86_64",
    reason="triton brings its assembler on Linux x86-64",
)
def test_kernels_compile_for_sm_90_with_exact_divisions_and_int8_tensor_cores(tmp_path: Path) -> None:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    script = Path(__file__).with_name("compile_sm90.py")
    done = subprocess.run(
        [sys.executable, str(script)], capture_output=True, text=True, check=False, env=environment
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = {line["kernel"]: line for line in map(json.loads, done.stdout.splitlines())}
    assert len(found) == 15
    assert all(line["bytes"] > 0 for line in found.values())
    assert found["product"]["int8_tensor_cores"]
    # Codes and scales are the reference's only with IEEE division; sigmoid and the backward may approximate.
    assert found["norm"]["exact_division"]
    assert not found["norm"]["approximate_division"]
    assert found["gate"]["exact_division"]
