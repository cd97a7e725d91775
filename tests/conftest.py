"""What tests of several folders share.

Without a GPU, Triton kernels run in its interpreter; it must be chosen before triton is first imported.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(autouse=True)
def _logging_as_before() -> Iterator[None]:
    """Commands set handlers and propagation of the package's logger; the next test wants its own."""
    logger = logging.getLogger("bitdistill")
    before = logger.handlers[:], logger.level, logger.propagate
    logger.propagate = True
    yield
    logger.handlers[:], logger.level, logger.propagate = before


@pytest.fixture(scope="session")
def demo_student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shipped ternary base, packed: a trained student whose likely tokens stand out."""
    from bitdistill.models.hf import plan_of
    from bitdistill.models.student import load_student, pack, save_student
    from bitdistill.stages.demo import demo_folder

    folder = tmp_path_factory.mktemp("demo") / "packed"
    latent, tokenizer, _ = load_student(demo_folder() / "base")
    plan = plan_of(latent)
    save_student(
        pack(latent, "bfloat16"),
        tokenizer,
        folder,
        kind="packed",
        plan=plan,
        recipe={"name": "demo"},
        extra={"key": "k"},
        float_dtype="bfloat16",
    )
    return folder
