"""Rows of the needle task: what is asked is there, once, where it should be; and each seed has its own rows."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from bitdistill.cli.main import app
from bitdistill.data import needle, readers, tasks
from bitdistill.errors import DataError
from bitdistill.recipe import builtin_task


def test_rows_hold_what_they_ask_for() -> None:
    made = list(needle.rows(44, words=300, keys=5, seed=3))
    for row in made:
        context = row["context"]
        assert context.count(f"The pass code of {row['name']} is {row['code']}.") == 1
        assert context.count("The pass code of") == 5
        assert 300 <= len(context.split()) < 315
        place = context.index(f"of {row['name']} is") / len(context)
        assert abs(place - row["depth"]) < 0.12
    assert sorted({row["depth"] for row in made}) == pytest.approx([n / 10 for n in range(11)])
    assert list(needle.rows(44, words=300, keys=5, seed=3)) == made
    other = {row["context"] for row in needle.rows(44, words=300, keys=5, seed=4)}
    assert not other & {row["context"] for row in made}


def test_impossible_rows_are_refused() -> None:
    with pytest.raises(DataError, match="49 keys; choose 1 to 48"):
        list(needle.rows(1, words=9000, keys=49))
    with pytest.raises(DataError, match="4 keys need 84 words or more, not 80"):
        list(needle.rows(1, words=80, keys=4))


def test_the_command_writes_rows_of_the_builtin_task(tmp_path: Path) -> None:
    path = tmp_path / "new/train.jsonl"
    done = CliRunner().invoke(app, ["needle", "--out", str(path), "--rows", "3", "--words", "100"])
    assert done.output.strip() == str(path)
    rows = readers.read_rows(str(path))
    tasks.check_rows(builtin_task("needle"), rows)
    assert [json.loads(line)["depth"] for line in path.read_text().splitlines()] == [0.0, 0.1, 0.2]
