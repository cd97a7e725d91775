"""The split of SST-2's training rows by sentence: nothing of a scored sentence is left in training."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "scripts/sst2_sentences.py"


def sentence(n: int) -> str:
    return f"film {n} is a very long and often funny thing {n} ."


def split(tmp_path: Path, texts: list[str], *options: str) -> tuple[list[str], list[str]]:
    source, out = tmp_path / "rows.jsonl", tmp_path / "out"
    source.write_text("".join(json.dumps({"sentence": text, "label": 0}) + "\n" for text in texts))
    command = [sys.executable, str(SCRIPT), str(source), "--out", str(out), *options]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    train, scored = (
        [json.loads(line)["sentence"] for line in (out / name).read_text().splitlines()]
        for name in ("train.jsonl", "held-out.jsonl")
    )
    assert done.stdout == f"{len(train)} training rows of {len(texts)}, {len(scored)} sentences to score\n"
    return train, scored


def test_scored_sentences_have_no_phrase_in_training(tmp_path: Path) -> None:
    texts = [sentence(n) for n in range(40)]
    phrases = [f"funny  thing {n} " for n in range(40)]
    train, scored = split(
        tmp_path, [*texts, *phrases, "film", "often funny", "too short a text", "thing 99"], "--rows", "8"
    )
    assert len(scored) == 8
    numbers = {text.split()[1] for text in scored}
    assert sorted(set(texts) - set(train)) == sorted(scored)
    assert {p for p in phrases if p not in train} == {p for p in phrases if p.split()[2] in numbers}
    # Single words stay, and phrases of no scored sentence; one that all sentences have goes.
    assert [text for text in train if text not in texts and text not in phrases] == [
        "film",
        "too short a text",
        "thing 99",
    ]


def test_the_split_repeats_and_does_not_depend_on_the_order_of_rows(tmp_path: Path) -> None:
    texts = [sentence(n) for n in range(30)]
    _, scored = split(tmp_path, texts, "--rows", "5")
    _, again = split(tmp_path, texts[::-1], "--rows", "5")
    assert scored == again[::-1]


def test_more_sentences_than_there_are_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(subprocess.CalledProcessError) as caught:
        split(tmp_path, [sentence(1), "a phrase"], "--rows", "2")
    assert "error: --rows: 2, but only 1 sentences have 8 words or more" in caught.value.stderr


def test_files_that_do_not_fit_are_an_error_of_one_line(tmp_path: Path) -> None:
    (tmp_path / "other.jsonl").write_text('{"text": "a row"}\n')
    for name, message in (
        ("gone.jsonl", "no such file"),
        ("other.jsonl", "a row without the field `sentence`"),
    ):
        command = [sys.executable, str(SCRIPT), str(tmp_path / name), "--out", str(tmp_path / "out")]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 2
        assert message in done.stderr.splitlines()[-1]
        assert "Traceback" not in done.stderr
        assert not (tmp_path / "out").exists()
