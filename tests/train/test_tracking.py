"""Progress of work that is no training, where there is a terminal and where there is none."""

from __future__ import annotations

import io
import re

import pytest
from rich.console import Console

from bitdistill.train import tracking
from bitdistill.train.tracking import WorkProgress


def work(monkeypatch: pytest.MonkeyPatch, *, terminal: bool, every_s: float, quiet: bool = False) -> str:
    stream = io.StringIO()
    monkeypatch.setenv("TERM", "xterm")

    def console(stderr: bool, quiet: bool) -> Console:
        assert stderr
        return Console(file=stream, force_terminal=terminal, color_system=None, quiet=quiet, width=90)

    monkeypatch.setattr(tracking, "Console", console)
    monkeypatch.setattr(tracking, "LINE_EVERY_S", every_s)
    with WorkProgress("answers", quiet=quiet) as progress:
        for done in (0, 512, 1024, 1500):
            progress(done, 1500)
            if terminal:
                progress._bar.refresh()  # which a thread does four times a second
    return stream.getvalue()


def test_lines_now_and_then_without_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = work(monkeypatch, terminal=False, every_s=0.0).splitlines()
    assert lines[0] == "answers     0/1500 rows"  # nothing can be said of the rate yet
    assert [line.split(" rows")[0].split()[-1] for line in lines] == ["0/1500", "512/1500", "1024/1500"]
    assert all(re.search(r" rows  [0-9.]+[kM]?/s  ETA [0-9]+s$", line) for line in lines[1:])
    assert work(monkeypatch, terminal=False, every_s=15.0) == ""  # short work says nothing


def test_a_bar_in_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    shown = work(monkeypatch, terminal=True, every_s=0.0)
    for part in ("answers", "1500/1500", "rows  "):
        assert part in shown


def test_quiet_is_quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    for terminal in (True, False):
        assert work(monkeypatch, terminal=terminal, every_s=0.0, quiet=True) == ""


def test_the_clock_starts_when_all_is_ready(monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter([0.0, 60.0, 80.0])
    monkeypatch.setattr(tracking.time, "monotonic", lambda: next(now))
    with WorkProgress("perplexity", "tok") as progress:
        stream = progress.console.file = io.StringIO()
        progress(0, 4000)  # the models were loading for a minute
        progress(1000, 4000)
    assert stream.getvalue().splitlines()[-1] == "perplexity  1000/4000 tok  50/s  ETA 60s"
