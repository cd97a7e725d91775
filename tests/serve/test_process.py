"""`bitdistill serve` as a process: real sockets, clients that go away, signals."""

from __future__ import annotations

import json
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import pytest


@contextmanager
def server(student: Path, *options: str) -> Iterator[tuple[str, subprocess.Popen[str], list[str]]]:
    """Address, process and the lines of stderr so far."""
    process = subprocess.Popen(
        [sys.executable, "-m", "bitdistill.cli.main", "serve", str(student), "--port", "0", *options],
        stderr=subprocess.PIPE,
        text=True,
    )
    lines: list[str] = []
    assert process.stderr is not None
    reader = threading.Thread(target=lambda: lines.extend(process.stderr), daemon=True)  # type: ignore[arg-type]
    reader.start()
    try:
        while process.poll() is None and not any("Application startup complete" in line for line in lines):
            time.sleep(0.02)
        (address,) = re.findall(r"on (http://\S+) ", "".join(lines))
        yield address, process, lines
    finally:
        process.kill()
        process.wait()
        reader.join(10)


def ask(url: str, body: Any = None) -> Any:
    data = None if body is None else json.dumps(body).encode()
    with urlopen(Request(url, data, {"content-type": "application/json"}), timeout=60) as answer:
        return json.loads(answer.read())


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_answers_until_a_signal_ends_it(student: Path, number: signal.Signals) -> None:
    with server(student, "--name", "tiny", "--threads", "1") as (address, process, lines):
        assert ask(f"{address}/v1/models")["data"][0]["id"] == "tiny"
        answer = ask(f"{address}/v1/completions", {"prompt": "How do I", "max_tokens": 4})
        assert answer["usage"]["completion_tokens"] == 4
        process.send_signal(number)
        assert process.wait(timeout=60) == (0 if number == signal.SIGINT else -signal.SIGTERM)
        assert "Traceback" not in "".join(lines)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_running_requests_in_openais_form(student: Path, number: signal.Signals) -> None:
    options = ("--threads", "1", "--max-sequences", "1", "--max-waiting", "512")
    with server(student, *options) as (address, process, lines):
        # One after the other, which takes longer than the five seconds that running requests get.
        long = {"prompt": ["How do I"] * 16, "max_tokens": 1000, "n": 16}
        stream, plain = (slow(address, "completions", {**long, "stream": on}) for on in (True, False))
        while ask(f"{address}/health")["requests"] < 512:
            time.sleep(0.005)
        process.send_signal(number)
        status, text = stream()
        *_, last = [event for event in text.split("\n\n") if event]
        assert status == 200
        assert "shutting down" in json.loads(last.removeprefix("data: "))["error"]["message"]
        status, text = plain()
        assert status == 503
        assert "shutting down" in json.loads(text)["error"]["message"]
        assert process.wait(timeout=60) == (0 if number == signal.SIGINT else -signal.SIGTERM)
    log = "".join(lines)
    assert "Traceback" not in log
    assert "never retrieved" not in log


def slow(address: str, route: str, body: Any) -> Callable[[], tuple[int, str]]:
    """Send a request in a thread; the result waits for status and text."""
    request = Request(
        f"{address}/v1/{route}", json.dumps(body).encode(), {"content-type": "application/json"}
    )
    got: list[tuple[int, str]] = []

    def send() -> None:
        try:
            with urlopen(request, timeout=60) as answer:
                got.append((answer.status, answer.read().decode()))
        except HTTPError as error:
            got.append((error.code, error.read().decode()))

    thread = threading.Thread(target=send)
    thread.start()

    def result() -> tuple[int, str]:
        thread.join(60)
        return got[0]

    return result


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_goes_away_ends_its_requests(student: Path, stream: bool) -> None:
    """Sixteen long answers, one after the other: most are never begun."""
    with server(student, "--threads", "1", "--max-sequences", "1") as (address, _, lines):
        host, port = address.removeprefix("http://").split(":")
        body = json.dumps({"prompt": "How do I", "max_tokens": 1000, "n": 16, "stream": stream}).encode()
        head = (
            "POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
            f"content-length: {len(body)}\r\n\r\n"
        )
        with socket.create_connection((host, int(port))) as connection:
            connection.sendall(head.encode() + body)
            while ask(f"{address}/health")["requests"] < 16:
                time.sleep(0.005)
        while True:
            health = ask(f"{address}/health")
            if not health["active"] and not health["waiting"]:
                break
            time.sleep(0.02)
        assert health["cancelled"] >= 1
        assert health["failed"] == 0
        assert health["new_tokens"] < 16 * 900
        assert ask(f"{address}/v1/completions", {"prompt": "x", "max_tokens": 2})["choices"]
    assert "never retrieved" not in "".join(lines)


def test_many_clients_at_once_get_what_each_gets_alone(student: Path) -> None:
    prompts = [f"My card number {n} was" for n in range(12)]
    with server(student, "--threads", "2") as (address, _, _lines):
        alone = [
            ask(f"{address}/v1/completions", {"prompt": prompt, "max_tokens": 12})["choices"]
            for prompt in prompts
        ]
        together: dict[int, Any] = {}

        def one(n: int) -> None:
            body = {"prompt": prompts[n], "max_tokens": 12}
            together[n] = ask(f"{address}/v1/completions", body)["choices"]

        threads = [threading.Thread(target=one, args=(n,)) for n in range(len(prompts))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert [together[n] for n in range(len(prompts))] == alone


def test_an_empty_key_is_no_key(student: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BITDISTILL_API_KEY", "")
    done = run(str(student), "--port", "0")
    assert done.returncode == 2
    assert "BITDISTILL_API_KEY" in done.stderr
    assert "unset it" in done.stderr
    done = run(str(student), "--port", "0", "--api-key", "")
    assert done.returncode == 2
    assert "leave the option out" in done.stderr
    with server(student, "--threads", "1", "--api-key", "sesame") as (address, _, _lines):
        assert ask(f"{address}/health")["status"] == "ok"


def test_the_key_may_come_from_the_environment(student: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BITDISTILL_API_KEY", "sesame")
    with server(student, "--threads", "1") as (address, _, lines):
        with pytest.raises(HTTPError) as caught:
            ask(f"{address}/v1/models")
        assert caught.value.code == 401
        assert "sesame" not in "".join(lines)


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "bitdistill.cli.main", "serve", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


def test_what_cannot_be_served_is_one_line(student: Path, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        done = run(str(student), "--port", port)
        assert (done.returncode, done.stderr.count("\n")) == (2, 1)
        assert f"127.0.0.1:{port}" in done.stderr
        assert "choose another --port" in done.stderr
    done = run(str(tmp_path / "none"), "--port", "0")
    assert (done.returncode, done.stderr.count("\n")) == (5, 1)
    done = run(str(student), "--host", "no.such.host.invalid", "--port", "0")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)


def test_no_torch_is_loaded() -> None:
    code = (
        "import sys, bitdistill.serve.app, bitdistill.cli.serve\n"
        "assert not {'torch', 'transformers'} & set(sys.modules), sorted(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
