"""The fuzz targets built and run: native/fuzz/run.sh, with libFuzzer or the plain driver."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

FUZZ = Path(__file__).resolve().parents[2] / "native/fuzz"
TARGETS = ("json", "safetensors", "config", "codes", "folder")
RUNS = {"json": 200_000, "safetensors": 100_000, "config": 150_000, "codes": 10_000, "folder": 40_000}
"""500,000 inputs together."""


def seeds(folder: Path) -> Path:
    subprocess.run([sys.executable, FUZZ / "seeds.py", folder], check=True)
    return folder


def test_seeds_are_small_and_the_same_every_time(tmp_path: Path) -> None:
    one, two = seeds(tmp_path / "one"), seeds(tmp_path / "two")
    files = sorted(p.relative_to(one) for p in one.rglob("*") if p.is_file())
    assert {f.parts[0] for f in files} == set(TARGETS)
    for file in files:
        assert (one / file).read_bytes() == (two / file).read_bytes()
        assert (one / file).stat().st_size < 8192


def test_good_seeds_load_and_damaged_ones_are_refused(tmp_path: Path) -> None:
    """The folder seeds, unpacked: those named by a family run, the others are refused."""
    native = pytest.importorskip("bitdistill.engine._native", reason="the native engine is not built")
    from bitdistill.errors import ArtifactError, ModelError

    names = ("config.json", "bitdistill.json", "model.safetensors", "model.safetensors.index.json")
    loaded = 0
    for seed in sorted((seeds(tmp_path / "seeds") / "folder").iterdir()):
        folder, data, at = tmp_path / seed.name, seed.read_bytes(), 1
        folder.mkdir()
        for name in names:
            length = int.from_bytes(data[at : at + 3], "little")
            at += 3
            if length != 0xFFFFFF:
                (folder / name).write_bytes(data[at : at + length])
                at += length
        good = seed.name.endswith(("-packed", "-float"))
        try:
            model = native.Model.load(str(folder), threads=1, layout="2bit", kv="float32", head="float")
        except (ArtifactError, ModelError):
            assert not good, seed.name
        else:
            assert good, seed.name
            assert model.facts["vocab_size"] == 5
            loaded += 1
    assert loaded == 10


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("compiler", ["clang++", "g++"])
def test_half_a_million_inputs(tmp_path: Path, compiler: str) -> None:
    if shutil.which(compiler) is None or shutil.which("cmake") is None:
        pytest.skip(f"{compiler} or cmake is not installed")
    for target, runs in RUNS.items():
        if compiler == "g++":
            runs //= 10  # the driver without coverage: a tenth, to see that it works
        done = subprocess.run(
            ["sh", FUZZ / "run.sh", "3000", target],
            env={**os.environ, "BUILD": str(tmp_path), "CXX": compiler, "RUNS": str(runs)},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
        counted = re.search(r"(?:number_of_executed_units: |Done )(\d+)", done.stdout)
        assert counted is not None
        assert int(counted[1]) >= runs
