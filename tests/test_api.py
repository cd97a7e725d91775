"""The public names, and that importing them is cheap and registers with transformers."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import torch

import bitdistill as bd


def test_every_public_name_resolves() -> None:
    for name in bd.__all__:
        assert getattr(bd, name) is not None
        assert name in dir(bd)
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        bd.nonsense  # noqa: B018


def test_version_is_the_projects() -> None:
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
    assert bd.__version__ == project["version"]


def test_quantizers_are_the_reference() -> None:
    codes, scale = bd.ternarize(torch.tensor([[1.0, -1.0, 0.25, -0.25]]))
    assert codes.tolist() == [[1, -1, 0, 0]]
    assert scale.item() == 0.625
    codes, scale = bd.quantize_activations(torch.tensor([[127.0, -63.5, 1.0]]))
    assert codes.tolist() == [[127, -64, 1]]
    assert scale.tolist() == [[1.0]]


REGISTERED = "from transformers.quantizers import auto; ok = 'bitdistill' in auto.AUTO_QUANTIZER_MAPPING"


@pytest.mark.parametrize(
    "code",
    [
        "import bitdistill, sys; ok = not {'torch', 'transformers', 'numpy'} & set(sys.modules)",
        f"import bitdistill; {REGISTERED}",
        f"import bitdistill.models.hf; {REGISTERED}",
    ],
    ids=["no torch", "before transformers", "hf itself first"],
)
def test_import_in_a_fresh_process(code: str) -> None:
    code += "\nassert ok"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
