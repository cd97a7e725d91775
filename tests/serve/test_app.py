"""The HTTP routes, in process."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
from starlette.testclient import TestClient

from bitdistill.engine import Engine
from bitdistill.engine.batcher import Batcher
from bitdistill.serve.app import MAX_BODY_BYTES, Settings, make_app
from tests.serve.conftest import TEMPLATE

CHAT = {"messages": [{"role": "user", "content": "How do I"}], "max_tokens": 12}


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
        ([], ("object", "dictionary")),
    ],
)
def test_mistakes_are_named(client: TestClient, body: Any, words: tuple[str, ...]) -> None:
    response = client.post("/v1/chat/completions", json=body)
    message = response.json()["error"]["message"]
    assert any(word in message for word in words), message
    refused(response, 400)


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
        refused(client.post("/v1/chat/completions", json=CHAT), 400, "chat template")
        refused(client.post("/v1/classify", json={"input": "x"}), 400, "no classification task")
        assert client.post("/v1/completions", json={"prompt": "x", "max_tokens": 2}).status_code == 200


def test_the_template_may_refuse(client: TestClient, engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine.tokenizer, "chat_template", TEMPLATE + "{{ raise_exception('no such turn') }}")
    refused(client.post("/v1/chat/completions", json=CHAT), 400, "no such turn")
