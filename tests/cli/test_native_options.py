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


@pytest.mark.parametrize(
    "option",
    [
        ["--seed", "99999999999999999999"],
        ["--top-k", "99999999999"],
        ["--top-p", "2"],
        ["--top-p", "0"],
        ["--top-p", "nan"],
        ["--temperature", "nan"],
        ["--temperature", "inf"],
        ["--stop", ""],
        ["--threads", "100000"],
        ["--isa", "foo"],
        ["-n", "99999999999999999999"],
    ],
)
def test_options_out_of_range_are_wrong_usage(option):
    assert CliRunner().invoke(app, ["generate", "gone", "x", *option]).exit_code == 2


def test_bench_and_serve_are_bounded_too():
    assert CliRunner().invoke(app, ["bench", "gone", "--sequences", "1000000000000"]).exit_code == 2
    assert CliRunner().invoke(app, ["serve", "gone", "-n", "99999999999999999999"]).exit_code == 2
