"""`generate`, `chat` and `bench` before a model is loaded: what is refused."""

from __future__ import annotations

import pytest
from typer.testing import CliRunner

from bitdistill.cli.main import app
from bitdistill.errors import DataError


def test_a_prompt_that_is_not_utf_8_is_named_by_line():
    done = CliRunner().invoke(app, ["generate", "gone"], input=b"a\ncaf\xe9\n")
    assert isinstance(done.exception, DataError)
    assert str(done.exception).startswith("stdin:2: byte 3 is not UTF-8")
