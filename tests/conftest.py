"""What tests of several folders share.

Without a GPU, Triton kernels run in its interpreter; it must be chosen before triton is first imported.
"""

from __future__ import annotations

import logging
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import settings

from tests.environment import plain

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# The same examples on every machine and at every run: a failure is the change's, not the draw's.
settings.register_profile("same", derandomize=True, database=None)
settings.load_profile("same")


def pytest_sessionstart(session: pytest.Session) -> None:
    """An environment that holds nothing of the user's: no colours forced, empty caches, no hub.

    Before test modules are imported, since typer and huggingface_hub read their variables once, at import; and
    so it holds for fixtures of modules and sessions too.
    """
    caches = tempfile.TemporaryDirectory(prefix="bitdistill-tests-")
    patch = pytest.MonkeyPatch()
    wanted = plain(os.environ)
    for name in os.environ.keys() - wanted.keys():
        patch.delenv(name)
    for name, value in wanted.items():
        patch.setenv(name, value)
    patch.setenv("HF_HOME", f"{caches.name}/hf")
    patch.setenv("HF_HUB_OFFLINE", "1")
    patch.setenv("BITDISTILL_CACHE", f"{caches.name}/imported")
    session.config.add_cleanup(caches.cleanup)
    session.config.add_cleanup(patch.undo)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests of the tier `gpu`, asked for by name, skip where there is none."""
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu") is not None:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device; none is visible"))


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
