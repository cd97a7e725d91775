"""`generate`, `chat` and `bench`: each option reaches the engine, and what is printed is what the engine said."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from typer.testing import CliRunner

import bitdistill.engine as package
from bitdistill.cli.main import app
from bitdistill.engine import Engine, bench
from bitdistill.errors import BitDistillError, DataError, ModelError

_native = pytest.importorskip("bitdistill.engine._native", reason="the native engine is not built")

PROMPT = "How do I"
TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.fixture(scope="module")
def engine(demo_student: Path) -> Engine:
    return Engine(demo_student, threads=1, verify=False)


@pytest.fixture
def talker(demo_student: Path, tmp_path: Path) -> Path:
    """The student with a chat template."""
    folder = Path(shutil.copytree(demo_student, tmp_path / "talker"))
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder


@pytest.fixture
def engines(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[dict[str, Any]]]:
    """The options of each engine that a command makes; the instruction set is put back."""
    made: list[dict[str, Any]] = []

    class Recorded(Engine):
        def __init__(self, path: Path, **options: Any) -> None:
            made.append({"path": path, **options})
            super().__init__(path, **options)

    monkeypatch.setattr(package, "Engine", Recorded)
    before = _native.current_isa()
    yield made
    _native.set_isa(before)


def run(*arguments: object, stdin: str | None = None) -> str:
    """Standard output of a command; a failing one raises its error."""
    done = CliRunner().invoke(app, [str(a) for a in arguments], input=stdin)
    if isinstance(done.exception, BitDistillError):
        raise done.exception
    assert done.exit_code == 0, done.output
    return done.stdout


@pytest.mark.parametrize(
    ("given", "options"),
    [
        ([], {}),
        (["-n", 7], {"max_new_tokens": 7}),
        (["--temperature", 1.5], {"temperature": 1.5}),
        (["--temperature", 1.5, "--seed", 5], {"temperature": 1.5, "seed": 5}),
        (["--temperature", 1.5, "--top-k", 3], {"temperature": 1.5, "top_k": 3}),
        (["--temperature", 1.5, "--top-p", 0.4], {"temperature": 1.5, "top_p": 0.4}),
    ],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, list) else "",
)
def test_generate_options(
    demo_student: Path, engine: Engine, given: list[Any], options: dict[str, Any]
) -> None:
    """Each as the engine's own argument, and to an effect: without the last option the text is another."""
    options = {"max_new_tokens": 24, **options}
    arguments = given if "-n" in given else [*given, "-n", 24]
    expected = engine.generate(PROMPT, **options)
    assert json.loads(run("generate", demo_student, PROMPT, *arguments, "--threads", 1, "--json")) == {
        "text": expected.text,
        "ids": list(expected.ids),
        "prompt_tokens": expected.prompt_tokens,
        "finish_reason": expected.finish_reason,
    }
    if given:
        without = dict(list(options.items())[:-1])
        assert engine.generate(PROMPT, **without).ids != expected.ids


def test_generate_stops_before_each_text(demo_student: Path, engine: Engine) -> None:
    whole = engine.generate(PROMPT, max_new_tokens=24).text
    middle, end = whole[len(whole) // 2 :][:4], whole[-4:]
    for stops in ([middle], [end, middle], [end, "never written"]):
        flags = [part for stop in stops for part in ("--stop", stop)]
        printed = json.loads(run("generate", demo_student, PROMPT, "-n", 24, *flags, "--json"))
        assert printed["text"] == whole[: min(whole.index(s) for s in stops if s in whole)]
        assert printed["finish_reason"] == "stop"


def test_generate_streams_and_reads_stdin(demo_student: Path, engine: Engine) -> None:
    expected = engine.generate(PROMPT, max_new_tokens=12).text + "\n"
    assert run("generate", demo_student, PROMPT, "-n", 12) == expected
    assert run("generate", demo_student, "-n", 12, stdin=PROMPT) == expected
    for arguments, stdin in (([], ""), ([""], None)):
        with pytest.raises(DataError, match="generate: no prompt; give a text or pipe one in"):
            run("generate", demo_student, *arguments, stdin=stdin)


@pytest.mark.parametrize("command", ["generate", "chat", "bench"])
def test_every_command_makes_the_engine_that_is_asked_for(
    talker: Path, engines: list[dict[str, Any]], command: str
) -> None:
    short = {
        "generate": [PROMPT, "-n", 1],
        "chat": ["-n", 1],
        "bench": ["--prefill-tokens", 2, "--decode-tokens", 1, "--repeats", 1],
    }[command]
    run(command, talker, *short, stdin="")
    asked = {"threads": 2, "isa": "scalar", "layout": "base3", "kv": "int8", "head": "screened4"}
    flags = [part for name, value in asked.items() for part in (f"--{name}", value)]
    run(command, talker, *short, *flags, stdin="")
    plain = {"threads": None, "isa": None, "layout": "2bit", "kv": "float32", "head": "float"}
    assert engines == [{"path": talker, **plain}, {"path": talker, **asked}]


def test_chat_remembers_and_ends_at_an_empty_line(talker: Path) -> None:
    engine = Engine(talker, threads=1, verify=False)
    messages = [{"role": "system", "content": "Be brief."}]
    expected = ""
    for line in ("My card is lost", "And now?"):
        messages.append({"role": "user", "content": line})
        answer = engine.chat(messages, max_new_tokens=12, temperature=1.2, top_k=9, top_p=0.9, seed=4).text
        messages.append({"role": "assistant", "content": answer})
        expected += answer + "\n"
    options = ["--temperature", 1.2, "--top-k", 9, "--top-p", 0.9, "--seed", 4, "-n", 12]
    lines = "My card is lost\nAnd now?\n\nnot asked\n"
    assert run("chat", talker, "--system", "Be brief.", *options, stdin=lines) == expected
    assert run("chat", talker, *options, stdin=lines) != expected


def test_chat_needs_a_template(demo_student: Path) -> None:
    with pytest.raises(ModelError, match="no chat template; use `bitdistill generate`"):
        run("chat", demo_student, stdin="hello\n")


def test_bench_prints_what_it_measured(demo_student: Path, engines: list[dict[str, Any]]) -> None:
    short = ["--prefill-tokens", 7, "--decode-tokens", 3, "--sequences", 2, "--repeats", 2, "--threads", 1]
    facts = json.loads(run("bench", demo_student, *short, "--head", "screened", "--json"))
    asked = {"prefill_tokens": 7, "decode_tokens": 3, "sequences": 2, "repeats": 2, "threads": 1}
    assert {name: facts[name] for name in asked} == asked
    assert (facts["model"], facts["isa"]) == (str(demo_student), _native.current_isa())
    assert facts["weight_bytes_per_step"] == facts["block_bytes"] + facts["head_bytes"]
    assert min(value for value in facts.values() if isinstance(value, int | float)) > 0
    lines = dict(line.split() for line in run("bench", demo_student, *short).splitlines())
    assert lines.keys() == facts.keys()
    assert int(lines["block_bytes"].replace(",", "")) == facts["block_bytes"]
    assert lines["rescored_rows_per_token"] == "0.00"  # nothing is screened
    with pytest.raises(
        ModelError, match="bench: 1025 tokens pass the model's context of 1024; ask for fewer"
    ):
        run("bench", demo_student, "--decode-tokens", 1024)


class Clock:
    """Each look is a second after the last; 100 seconds during the first `slow` looks."""

    def __init__(self, slow: int) -> None:
        self.slow, self.now = slow, 0.0

    def __call__(self) -> float:
        self.slow -= 1
        self.now += 1.0 if self.slow < 0 else 100.0
        return self.now


def test_speeds_are_tokens_over_seconds_without_the_warm_up(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Looks of a run: 2 for prefill, then the start, one after each of 4 steps, and the end."""
    monkeypatch.setattr(bench, "time", SimpleNamespace(perf_counter=Clock(slow=8)))
    facts = bench.measure(engine, prefill_tokens=9, decode_tokens=4, sequences=3, repeats=1)
    assert facts["prefill_tokens_per_s"] == 9 / 1
    assert facts["decode_tokens_per_s"] == 3 * 4 / 5
    assert facts["decode_step_ms_median"] == 1000.0
