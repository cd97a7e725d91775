"""A small trained student with a task and a chat template, and an engine on it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from bitdistill.engine import Engine
from bitdistill.engine.batcher import Batcher

TEMPLATE = (
    "{% for m in messages %}"
    "{% if m.role not in ['system', 'user', 'assistant'] %}{{ raise_exception('role') }}{% endif %}"
    "<{{ m.role }}>{{ m.content }}\n{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.fixture(scope="session")
def student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shipped ternary base, packed, with the demo's task and a chat template."""
    from bitdistill.models.hf import plan_of
    from bitdistill.models.student import load_student, pack, save_student
    from bitdistill.recipe import load_recipe
    from bitdistill.stages.demo import demo_folder

    folder = tmp_path_factory.mktemp("serve") / "student"
    latent, tokenizer, _ = load_student(demo_folder() / "base")
    tokenizer.chat_template = TEMPLATE
    recipe = load_recipe(demo_folder() / "recipe.yaml")
    save_student(
        pack(latent, "bfloat16"),
        tokenizer,
        folder,
        kind="packed",
        plan=plan_of(latent),
        recipe={
            "task": recipe.task.model_dump(mode="json", by_alias=True),
            "data": {"max_length": recipe.data.max_length},
        },
        extra={"key": "k"},
        float_dtype="bfloat16",
    )
    return folder


@pytest.fixture(scope="session")
def engine(student: Path) -> Engine:
    return Engine(student, threads=1, verify=False)


@pytest.fixture
def batcher(engine: Engine) -> Iterator[Batcher]:
    batcher = Batcher(engine, max_sequences=4, max_waiting=8)
    yield batcher
    batcher.close()
