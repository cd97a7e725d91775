"""The HTTP routes, in process."""

from __future__ import annotations

import ast
import asyncio
import json
import re
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from bitdistill.engine import Engine
from bitdistill.engine.batcher import Batcher
from bitdistill.serve.app import MAX_BODY_BYTES, Settings, _LastWord, make_app
from tests.serve.conftest import TEMPLATE

DOCUMENT = Path(__file__).parents[2] / "docs" / "serve.md"
ASKED = {"role": "user", "content": "How do I"}
CHAT = {"messages": [ASKED], "max_tokens": 12}


@pytest.fixture(scope="module")
def client(engine: Engine) -> Iterator[TestClient]:
    batcher = Batcher(engine, max_sequences=4, max_waiting=8)
    with TestClient(make_app(engine, batcher, Settings("tiny"))) as client:
        yield client


def events(response: Any) -> list[dict[str, Any]]:
    lines = [line for line in response.text.split("\n\n") if line]
    assert lines[-1] == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]


def refused(response: Any, status: int, *words: str) -> None:
    error = response.json()["error"]
    assert response.status_code == status, error
    assert "\n" not in error["message"]
    for word in words:
        assert word in error["message"]


def test_chat_is_the_engines_chat(client: TestClient, engine: Engine) -> None:
    answer = client.post("/v1/chat/completions", json=CHAT).json()
    alone = engine.chat(CHAT["messages"], max_new_tokens=12)  # type: ignore[arg-type]
    (choice,) = answer["choices"]
    assert choice["message"] == {"role": "assistant", "content": alone.text}
    assert choice["finish_reason"] == "length"
    assert answer["usage"]["prompt_tokens"] == len(engine.chat_ids(CHAT["messages"]))  # type: ignore[arg-type]
    assert answer["usage"]["completion_tokens"] == 12
    assert (answer["object"], answer["model"]) == ("chat.completion", "tiny")


def test_chat_streams_the_same_text(client: TestClient) -> None:
    whole = client.post("/v1/chat/completions", json=CHAT).json()
    options = {"stream": True, "stream_options": {"include_usage": True}}
    streamed = client.post("/v1/chat/completions", json={**CHAT, **options})
    assert streamed.headers["content-type"].startswith("text/event-stream")
    *pieces, last = events(streamed)
    assert pieces[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    text = "".join(piece["choices"][0]["delta"].get("content", "") for piece in pieces)
    assert text == whole["choices"][0]["message"]["content"]
    assert pieces[-1]["choices"][0]["finish_reason"] == "length"
    assert len({piece["id"] for piece in [*pieces, last]}) == 1
    assert last["choices"] == []
    assert last["usage"]["completion_tokens"] == 12


def test_messages_of_parts_and_developers(client: TestClient) -> None:
    parts = [{"type": "text", "text": "How "}, {"type": "text", "text": "do I"}]
    got = client.post("/v1/chat/completions", json={**CHAT, "messages": [{"role": "user", "content": parts}]})
    want = client.post("/v1/chat/completions", json=CHAT)
    assert got.json()["choices"] == want.json()["choices"]
    messages = [{"role": "developer", "content": "Be kind"}, *CHAT["messages"]]  # type: ignore[misc]
    assert client.post("/v1/chat/completions", json={**CHAT, "messages": messages}).status_code == 200


def test_completions_of_several_prompts_and_draws(client: TestClient, engine: Engine) -> None:
    prompts = ["How do I", "My card"]
    answer = client.post("/v1/completions", json={"prompt": prompts, "max_tokens": 8}).json()
    assert [choice["text"] for choice in answer["choices"]] == [
        engine.generate(prompt, max_new_tokens=8).text for prompt in prompts
    ]
    ids = engine.encode("How do I")
    by_ids = client.post("/v1/completions", json={"prompt": ids, "max_tokens": 8}).json()
    assert by_ids["choices"][0]["text"] == answer["choices"][0]["text"]
    drawn = {"prompt": "How do I", "max_tokens": 8, "temperature": 1.5, "seed": 3, "n": 2}
    first, again = (client.post("/v1/completions", json=drawn).json()["choices"] for _ in range(2))
    assert first == again
    assert first[0]["text"] != first[1]["text"]
    assert first[0]["text"] == engine.generate("How do I", max_new_tokens=8, temperature=1.5, seed=3).text


def test_without_a_seed_draws_differ(client: TestClient) -> None:
    body = {"prompt": "How do I", "max_tokens": 16, "temperature": 2.0}
    assert len({client.post("/v1/completions", json=body).json()["choices"][0]["text"] for _ in range(4)}) > 1


def test_stop_strings_end_and_are_cut(client: TestClient, engine: Engine) -> None:
    text = engine.generate("How do I", max_new_tokens=20).text
    stop = text.split()[3]
    answer = client.post(
        "/v1/completions", json={"prompt": "How do I", "max_tokens": 20, "stop": stop}
    ).json()
    assert answer["choices"][0] == {
        "index": 0,
        "text": text[: text.index(stop)],
        "logprobs": None,
        "finish_reason": "stop",
    }


def test_classify(client: TestClient, engine: Engine) -> None:
    texts = [f"my card has not arrived after {n} weeks" for n in range(20)]  # more than one batch
    answer = client.post("/v1/classify", json={"input": texts}).json()
    want = engine.classify(texts)
    assert [row["label"] for row in answer["data"]] == [one.label for one in want]
    assert [row["index"] for row in answer["data"]] == list(range(20))
    assert answer["data"][0]["probabilities"] == pytest.approx(want[0].probabilities)
    one = client.post("/v1/classify", json={"input": {"text": texts[0]}}).json()
    assert one["data"][0]["label"] == answer["data"][0]["label"]
    refused(client.post("/v1/classify", json={"input": {"txt": "x"}}), 400, "input 1", "text")
    refused(client.post("/v1/classify", json={"input": []}), 400, "input")


def test_classify_says_what_it_cut(client: TestClient, engine: Engine) -> None:
    long = "my card has not arrived " * 500
    texts = [*["my card"] * 16, long, "my card"]  # the cut one in the second batch
    data = client.post("/v1/classify", json={"input": texts}).json()["data"]
    assert [item["truncated"] for item in data] == [False] * 16 + [True, False]
    assert data[16]["label"] == engine.classify([long])[0].label
    (model,) = client.get("/v1/models").json()["data"]
    assert model["task"]["max_length"] == engine.classifier().max_length
    refused(client.post("/v1/classify", json={"input": [*["x"] * 16, {"txt": "x"}]}), 400, "input 17")


def test_models_health_and_page(client: TestClient) -> None:
    (model,) = client.get("/v1/models").json()["data"]
    assert (model["id"], model["chat"], model["task"]["name"]) == ("tiny", True, "banking77")
    assert len(model["task"]["labels"]) == 77
    assert client.get("/v1/models/tiny").json()["id"] == "tiny"
    refused(client.get("/v1/models/other"), 404, "'other'", "'tiny'")
    health = client.get("/health").json()
    assert health["status"] == "ok"
    assert health["requests"] >= 1
    page = client.get("/")
    assert "<script>" in page.text
    assert "http://" not in page.text.replace("http://www.w3.org", "")
    assert "default-src 'none'" in page.headers["content-security-policy"]


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({}, ("messages", "required")),
        ({"messages": []}, ("messages",)),
        ({"messages": [{"role": "robot", "content": "x"}]}, ("messages.0.role",)),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, ("messages.0.content",)),
        ({**CHAT, "temperatur": 1}, ("temperatur", "unknown field")),
        ({**CHAT, "temperature": "hot"}, ("temperature",)),
        ({**CHAT, "temperature": -1}, ("temperature",)),
        ({**CHAT, "top_p": 0}, ("top_p",)),
        ({**CHAT, "max_tokens": 0}, ("max_tokens",)),
        ({**CHAT, "max_tokens": True}, ("max_tokens",)),
        ({**CHAT, "n": 99}, ("n: ",)),
        ({**CHAT, "stop": [""]}, ("stop",)),
        ({**CHAT, "logprobs": True}, ("logprobs is not supported",)),
        ({**CHAT, "tools": [{}]}, ("tools is not supported",)),
        ({**CHAT, "response_format": {"type": "json_object"}}, ("response_format is not supported",)),
        ({**CHAT, "messages": [{**ASKED, "tool_calls": [{}]}]}, ("messages.0: tool_calls is not supported",)),
        ([], ("object", "dictionary")),
    ],
)
def test_mistakes_are_named(client: TestClient, body: Any, words: tuple[str, ...]) -> None:
    response = client.post("/v1/chat/completions", json=body)
    message = response.json()["error"]["message"]
    assert any(word in message for word in words), message
    refused(response, 400)


@pytest.mark.parametrize(
    ("route", "body", "message"),
    [
        ("classify", {"input": []}, "input: is empty; give at least 1"),
        ("classify", {"input": ["x"] * 257}, "input: has 257 items, at most 256 are taken; send fewer"),
        (
            "classify",
            {"input": 5},
            "input: Input should be a text, an object of fields, or a list of up to 256",
        ),
        ("completions", {"prompt": ["x"] * 17}, "prompt: has 17 items, at most 16 are taken; send fewer"),
        ("completions", {"prompt": []}, "prompt: is empty; give at least 1"),
        ("completions", {"prompt": [-1]}, "prompt.0: Input should be greater than or equal to 0, not -1"),
        ("completions", {"prompt": None}, "prompt: Input should be a text, a list of token ids, or"),
        ("completions", {"prompt": "x", "n": 17}, "n: Input should be less than or equal to 16, not 17"),
        ("completions", {"prompt": "x", "logprobs": 0}, "logprobs is not supported; leave it out"),
        (
            "chat/completions",
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
            "messages.0.content.0: a part of type 'image_url'; the model reads text alone, send parts of type text",
        ),
        (
            "chat/completions",
            {"messages": [{"role": "user", "content": 5}]},
            "messages.0.content: Input should be a text or a list of text parts, not 5",
        ),
    ],
)
def test_mistakes_in_fields_of_several_types(
    client: TestClient, route: str, body: dict[str, Any], message: str
) -> None:
    response = client.post(f"/v1/{route}", json=body)
    refused(response, 400)
    assert response.json()["error"]["message"].startswith(message)
    assert "not supported" in message or response.json()["error"]["param"] == message.partition(":")[0]


def test_more_choices_than_may_wait(client: TestClient) -> None:
    before = client.get("/health").json()["requests"]
    body = {"prompt": ["x", "y", "z"], "n": 3, "max_tokens": 2}
    response = client.post("/v1/completions", json=body)
    refused(response, 400, "prompt: 3 prompts with n 3", "9 choices", "at most 8", "--max-waiting")
    assert response.json()["error"]["param"] == "prompt"
    refused(client.post("/v1/chat/completions", json={**CHAT, "n": 9}), 400, "n: 1 prompt with n 9")
    assert client.get("/health").json()["requests"] == before
    whole = client.post("/v1/completions", json={**body, "prompt": ["x", "y", "z", "a"], "n": 2})
    assert len(whole.json()["choices"]) == 8


def test_neutral_and_harmless_fields_are_taken(client: TestClient) -> None:
    more = {
        "logprobs": False,
        "presence_penalty": 0,
        "user": "me",
        "tools": [],
        "stop": None,
        "temperature": None,
    }
    answer = client.post("/v1/chat/completions", json={**CHAT, **more, "model": "tiny"})
    assert answer.status_code == 200
    unsaid: dict[str, Any] = {
        "refusal": None,
        "annotations": [],
        "audio": None,
        "function_call": None,
        "tool_calls": None,
    }
    answer = client.post("/v1/chat/completions", json={**CHAT, "messages": [{**ASKED, **unsaid}]})
    assert answer.status_code == 200
    refused(client.post("/v1/chat/completions", json={**CHAT, "model": "gpt-4"}), 404, "'gpt-4'", "'tiny'")


def test_bodies_that_are_no_requests(client: TestClient) -> None:
    route, kind = "/v1/completions", {"content-type": "application/json"}
    refused(client.post(route, content=b"{", headers=kind), 400, "not JSON")
    refused(client.post(route, content=b"\xff\xfe", headers=kind), 400, "not JSON")
    refused(client.post(route, content=b"[" * 100_000, headers=kind), 400, "not JSON")
    refused(client.post(route, content=b'{"prompt": "x", "temperature": NaN}', headers=kind), 400, "not JSON")
    refused(
        client.post(route, content=b"{}", headers={"content-type": "text/plain"}), 415, "application/json"
    )
    refused(client.post(route, content=b" " * (MAX_BODY_BYTES + 1), headers=kind), 413, "4 MB")
    refused(client.get(route), 405, "another method")
    refused(client.post("/v2/completions", json={}), 404, "no such route")
    refused(client.post(route, json={"prompt": [5, 10**8]}), 400, "vocabulary")
    refused(client.post(route, json={"prompt": ""}), 400, "no tokens")


def test_too_long_a_prompt(client: TestClient, engine: Engine) -> None:
    prompt = [1] * (engine.facts["max_positions"] + 1)
    refused(client.post("/v1/completions", json={"prompt": prompt}), 400, "context", "shorten")


def test_a_key_is_needed_where_one_is_set(engine: Engine) -> None:
    batcher = Batcher(engine)
    with TestClient(make_app(engine, batcher, Settings("tiny", api_key="sesame"))) as client:
        refused(client.post("/v1/chat/completions", json=CHAT), 401, "Authorization: Bearer")
        wrong = {"authorization": "Bearer sesam\u00e9".encode()}
        refused(client.get("/v1/models", headers=wrong), 401)  # type: ignore[arg-type]
        right = {"authorization": "Bearer sesame"}
        assert client.post("/v1/chat/completions", json=CHAT, headers=right).status_code == 200
        assert client.get("/health").status_code == 200
        assert client.get("/").status_code == 200


def test_pages_of_other_origins(engine: Engine) -> None:
    ask = {"origin": "https://app.example", "access-control-request-method": "POST"}
    for origins, allowed in (((), None), (("https://app.example",), "https://app.example")):
        batcher = Batcher(engine)
        with TestClient(make_app(engine, batcher, Settings("tiny", cors_origins=origins))) as client:
            got = client.options("/v1/completions", headers=ask)
            assert got.headers.get("access-control-allow-origin") == allowed


def test_overload_and_shutdown(engine: Engine) -> None:
    batcher = Batcher(engine, max_sequences=1, max_waiting=1)
    release = threading.Event()
    batcher.call(release.wait)
    while batcher.counters().waiting:
        time.sleep(0.001)
    with TestClient(make_app(engine, batcher, Settings("tiny"))) as client:
        waiting = batcher.submit("x", max_new_tokens=2)
        response = client.post("/v1/completions", json={"prompt": "y"})
        refused(response, 429, "waiting")
        assert response.headers["retry-after"] == "1"
        release.set()
        waiting.future.result(timeout=30)
    with TestClient(make_app(engine, batcher, Settings("tiny"))) as client:  # closed by now
        refused(client.post("/v1/completions", json={"prompt": "y"}), 503, "shutting down")


def test_a_cancelled_classification_is_answered_and_leaves_the_batcher_whole(engine: Engine) -> None:
    """As uvicorn cancels it, while the batcher has not begun it."""
    batcher = Batcher(engine)
    release = threading.Event()
    batcher.call(release.wait)
    while batcher.counters().waiting:
        time.sleep(0.001)
    app = make_app(engine, batcher, Settings("tiny"))
    scope = {"type": "http", "method": "POST", "path": "/v1/classify", "query_string": b"", "root_path": ""}
    scope["headers"] = [(b"content-type", b"application/json")]
    sent: list[Any] = []

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": b'{"input": "my card"}'}

    async def send(message: Any) -> None:
        sent.append(message)

    async def cancelled() -> None:
        task = asyncio.ensure_future(app(scope, receive, send))
        while not batcher._calls:
            await asyncio.sleep(0.001)
        task.cancel()
        await task

    asyncio.run(cancelled())
    assert sent[0]["status"] == 503
    assert "shutting down" in sent[1]["body"].decode()
    (call,) = batcher._calls
    assert not call.future.cancelled()  # which `close` would stumble over
    release.set()
    batcher.close()


@pytest.mark.parametrize("more", [True, False])
def test_a_stream_cancelled_at_its_end_is_not_ended_twice(more: bool) -> None:
    sent: list[Any] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"", "more_body": more})
        raise asyncio.CancelledError

    async def send(message: Any) -> None:
        sent.append(message)

    async def receive() -> dict[str, Any]:
        return {"type": "http.disconnect"}

    asyncio.run(_LastWord(app)({"type": "http"}, receive, send))
    assert [message.get("more_body", False) for message in sent[1:]] == [True, False][not more :]


def test_bugs_are_logged_and_not_shown(
    client: TestClient, engine: Engine, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(messages: Any) -> list[int]:
        raise RuntimeError("secret path /etc")

    monkeypatch.setattr(engine, "chat_ids", broken)
    response = client.post("/v1/chat/completions", json=CHAT)
    refused(response, 500, "log")
    assert "secret" not in response.text
    assert "secret path" in caplog.text


def test_a_model_without_template_or_task(
    tmp_path_factory: pytest.TempPathFactory, demo_student: Any
) -> None:
    engine = Engine(demo_student, threads=1, verify=False)
    with TestClient(make_app(engine, Batcher(engine), Settings("plain"))) as client:
        (model,) = client.get("/v1/models").json()["data"]
        assert (model["chat"], model["task"]) == (False, None)
        refused(client.post("/v1/chat/completions", json=CHAT), 400, "chat template", "/v1/completions")
        refused(client.post("/v1/classify", json={"input": "x"}), 400, "no classification task")
        assert client.post("/v1/completions", json={"prompt": "x", "max_tokens": 2}).status_code == 200


def test_the_documented_client_suits_the_demos_students(demo_student: Any) -> None:
    snippet = re.findall(r"```python\n(.*?)```", DOCUMENT.read_text("utf-8"), re.DOTALL)[0]
    (call,) = [
        node
        for node in ast.walk(ast.parse(snippet))
        if isinstance(node, ast.Call) and ast.unparse(node.func).endswith(".create")
    ]
    resource = ast.unparse(call.func).removeprefix("client.").removesuffix(".create")
    body = {each.arg: ast.literal_eval(each.value) for each in call.keywords}
    engine = Engine(demo_student, threads=1, verify=False)
    with TestClient(make_app(engine, Batcher(engine), Settings("packed"))) as client:
        response = client.post("/v1/" + resource.replace(".", "/"), json=body)
        assert response.status_code == 200, response.text
        assert "".join(piece["choices"][0]["text"] for piece in events(response))


def test_the_template_may_refuse(client: TestClient, engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine.tokenizer, "chat_template", TEMPLATE + "{{ raise_exception('no such turn') }}")
    refused(client.post("/v1/chat/completions", json=CHAT), 400, "no such turn")
