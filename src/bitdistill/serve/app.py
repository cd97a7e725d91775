"""The HTTP application: routes, streaming, errors in OpenAI's form.

Answers are computed by one `Batcher`; its thread hands text over to the event loop, which never waits for the model.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import logging
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from concurrent.futures import Future
from functools import partial
from importlib import resources
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from bitdistill.data.readers import no_constant
from bitdistill.data.tasks import Example, as_rows, renderer, template_fields, text_field
from bitdistill.engine.batcher import Batcher, Closed, Overloaded, Ticket
from bitdistill.engine.engine import Engine
from bitdistill.engine.generation import Generation
from bitdistill.engine.labels import Answer, Classifier
from bitdistill.errors import ArtifactError, BitDistillError, DataError, ModelError
from bitdistill.serve.forms import Chat, Completion, Form
from bitdistill.serve.schema import TAKES, ChatRequest, ClassifyRequest, CompletionRequest, Fields, Sampling

MAX_BODY_BYTES = 4 << 20
CLASSIFY_BATCH = 16
"""Texts that are labelled between two tokens of running generations."""

log = logging.getLogger("bitdistill.serve")
Body = TypeVar("Body", bound=BaseModel)
Handler = Callable[[Request], Awaitable[Response]]
Arrivals = asyncio.Queue[tuple[int, str | None]]
"""(choice, new text), or (choice, None) when that choice has ended."""


class Refused(Exception):
    """A request that is answered with an error."""

    def __init__(
        self, status: int, message: str, kind: str = "invalid_request_error", param: str | None = None
    ) -> None:
        super().__init__(message)
        self.status, self.kind, self.param = status, kind, param


def _error_body(message: str, kind: str, param: str | None = None) -> dict[str, Any]:
    return {"error": {"message": message, "type": kind, "param": param, "code": None}}


def _error(status: int, message: str, kind: str, param: str | None = None) -> JSONResponse:
    headers = {"Retry-After": "1"} if status in (429, 503) else {}
    if status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    return JSONResponse(_error_body(message, kind, param), status, headers)


@dataclasses.dataclass(frozen=True)
class Settings:
    """Of one server.

    name: what the model is called in answers. max_new_tokens: where a request says nothing. api_key: needed by all
    routes but /health and the page, if not None. cors_origins: web pages of other origins that may call.
    """

    name: str
    max_new_tokens: int = 512
    api_key: str | None = None
    cors_origins: Sequence[str] = ()


def make_app(engine: Engine, batcher: Batcher, settings: Settings) -> Starlette:
    """The application around a running batcher; it closes the batcher when it shuts down."""
    routes = Routes(engine, batcher, settings)

    @contextlib.asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(batcher.close)

    middleware = []
    if settings.cors_origins:
        middleware.append(
            Middleware(
                CORSMiddleware,
                allow_origins=list(settings.cors_origins),
                allow_methods=["GET", "POST"],
                allow_headers=["authorization", "content-type"],
            )
        )
    middleware.append(Middleware(_LastWord))
    return Starlette(
        routes=[
            Route("/", routes.page),
            Route("/health", routes.health),
            Route("/v1/models", routes.guarded(routes.models)),
            Route("/v1/models/{name:path}", routes.guarded(routes.model)),
            Route("/v1/chat/completions", routes.guarded(routes.chat), methods=["POST"]),
            Route("/v1/completions", routes.guarded(routes.completions), methods=["POST"]),
            Route("/v1/classify", routes.guarded(routes.classify), methods=["POST"]),
        ],
        middleware=middleware,
        exception_handlers={HTTPException: _http_error},
        lifespan=lifespan,
    )


class _LastWord:
    """Answers the requests that uvicorn cancels when their time to finish is over, in OpenAI's form too."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        started = ended = False

        async def watched(message: Message) -> None:
            nonlocal started, ended
            started = True
            await send(message)
            ended = message["type"] == "http.response.body" and not message.get("more_body", False)

        try:
            await self.app(scope, receive, watched)
        except asyncio.CancelledError:
            if scope["type"] != "http":
                raise
            if ended:  # the batcher, closed meanwhile, failed it first, or it was done
                return
            status, message, kind = _status_of(Closed("the server is shutting down"))
            with contextlib.suppress(asyncio.CancelledError):  # the client does not read: no word reaches it
                if started:  # only a stream is written for long enough to be met here
                    event = _event(_error_body(message, kind)).encode()
                    await send({"type": "http.response.body", "body": event})
                else:
                    await _error(status, message, kind)(scope, receive, send)


async def _http_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    hints = {
        404: "no such route; there are /v1/chat/completions, /v1/completions, /v1/classify, /v1/models, /health",
        405: "this route takes another method",
    }
    return _error(error.status_code, hints.get(error.status_code, error.detail), "invalid_request_error")


class Routes:
    """The handlers."""

    def __init__(self, engine: Engine, batcher: Batcher, settings: Settings) -> None:
        self.engine, self.batcher, self.settings = engine, batcher, settings
        self.started = int(time.time())
        self.page_text = resources.files("bitdistill.serve").joinpath("page.html").read_text("utf-8")
        self.classifier: Classifier | None = None
        with contextlib.suppress(ArtifactError, DataError):  # no task stored, or one of generation
            self.classifier = engine.classifier()

    def guarded(self, handler: Handler) -> Handler:
        """Key and errors around a handler."""

        async def answer(request: Request) -> Response:
            try:
                self._check_key(request)
                return await handler(request)
            except Refused as error:
                return _error(error.status, str(error), error.kind, error.param)
            except ClientDisconnect:
                return Response(status_code=499)  # nobody reads it
            except Exception as error:
                return _error(*_status_of(error))

        return answer

    def _check_key(self, request: Request) -> None:
        key = self.settings.api_key
        if key is None:
            return
        given = request.headers.get("authorization", "")
        if not secrets.compare_digest(given.encode(), f"Bearer {key}".encode()):
            message = "missing or wrong API key; send Authorization: Bearer KEY"
            raise Refused(401, message, "authentication_error")

    # ------------------------------------------------------------------------------------------ small ones

    async def page(self, _: Request) -> Response:
        """A page to try the model, with nothing from elsewhere."""
        policy = (
            "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'"
        )
        headers = {
            "Content-Security-Policy": policy,
            "X-Content-Type-Options": "nosniff",
            "Referrer-Policy": "no-referrer",
        }
        return HTMLResponse(self.page_text, headers=headers)

    async def health(self, _: Request) -> Response:
        """That it runs, and what it has done."""
        return JSONResponse({"status": "ok", **dataclasses.asdict(self.batcher.counters())})

    def _describe(self) -> dict[str, Any]:
        return {
            "id": self.settings.name,
            "object": "model",
            "created": self.started,
            "owned_by": "bitdistill",
            "context": self.engine.facts["max_positions"] or None,
            "chat": self.engine.tokenizer.chat_template is not None,
            "task": None if self.classifier is None else _task_facts(self.classifier),
        }

    async def models(self, _: Request) -> Response:
        """The one model, with what it can do."""
        return JSONResponse({"object": "list", "data": [self._describe()]})

    async def model(self, request: Request) -> Response:
        """The model by its name."""
        self._check_name(request.path_params["name"])
        return JSONResponse(self._describe())

    def _check_name(self, name: str | None) -> None:
        if name is not None and name != self.settings.name:
            message = f"no model {name!r} here; the one that is served is {self.settings.name!r}"
            raise Refused(404, message, param="model")

    # ------------------------------------------------------------------------------------------ generation

    async def chat(self, request: Request) -> Response:
        """A conversation's next turn."""
        body = await read(request, ChatRequest)
        self._check_name(body.model)
        if self.engine.tokenizer.chat_template is None:
            raise Refused(400, "this model has no chat template, so it cannot chat; use /v1/completions")
        messages = [message.plain() for message in body.messages]
        ids = await asyncio.to_thread(self.engine.chat_ids, messages)
        limit = body.max_completion_tokens or body.max_tokens
        return await self._generate(request, body, [ids], limit, Chat(self.settings.name))

    async def completions(self, request: Request) -> Response:
        """A text continued."""
        body = await read(request, CompletionRequest)
        self._check_name(body.model)
        form = Completion(self.settings.name)
        return await self._generate(request, body, body.prompts(), body.max_tokens, form)

    async def _generate(
        self,
        request: Request,
        body: Sampling,
        prompts: Sequence[str | list[int]],
        limit: int | None,
        form: Form,
    ) -> Response:
        self._check_choices(len(prompts), body.n or 1)
        arrivals: Arrivals = asyncio.Queue()
        loop = asyncio.get_running_loop()

        def hand_over(choice: int, text: str | Future[Generation]) -> None:
            new = text if isinstance(text, str) else None
            with contextlib.suppress(RuntimeError):  # the loop is gone: nobody listens
                loop.call_soon_threadsafe(arrivals.put_nowait, (choice, new))

        submit = partial(
            self.batcher.submit,
            max_new_tokens=limit or self.settings.max_new_tokens,
            temperature=body.temperature or 0.0,
            top_k=body.top_k or 0,
            top_p=1.0 if body.top_p is None else body.top_p,
            seed=secrets.randbits(62) if body.seed is None else body.seed,
            stop=body.stop,
        )
        tickets: list[Ticket] = []
        try:
            for prompt in prompts:
                ids = await asyncio.to_thread(self.engine.prompt_ids, prompt)
                for draw in range(body.n or 1):
                    listener = partial(hand_over, len(tickets))
                    ticket = submit(ids, draw=draw, on_text=listener if body.stream else None)
                    tickets.append(ticket)
                    if body.stream:
                        ticket.future.add_done_callback(listener)
            if body.stream:
                pieces = self._pieces(arrivals, tickets, form, body.with_usage)
                headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}  # proxies must not wait
                return StreamingResponse(pieces, media_type="text/event-stream", headers=headers)
            return JSONResponse(form.whole(await self._finished(request, tickets)))
        except BaseException:
            for ticket in tickets:
                ticket.cancel()
            raise

    def _check_choices(self, prompts: int, n: int) -> None:
        """More than may wait would be told to try again for ever, also by an idle server."""
        choices, most = prompts * n, self.batcher.max_waiting
        if choices > most:
            place = "n" if prompts == 1 else "prompt"
            message = (
                f"{place}: {prompts} prompt{'s' * (prompts > 1)} with n {n} ask for {choices} choices, at most {most} "
                "may wait; send several requests, or start the server with a larger --max-waiting"
            )
            raise Refused(400, message, param=place)

    @staticmethod
    async def _finished(request: Request, tickets: Sequence[Ticket]) -> list[Generation]:
        """All generations.

        Raises:
            ClientDisconnect: the client went away.
        """
        gone = asyncio.ensure_future(_gone(request))
        done = asyncio.gather(*(asyncio.wrap_future(ticket.future) for ticket in tickets))
        # Cancelled below, it holds an error that nobody awaits; asyncio logs those unless they were looked at.
        done.add_done_callback(lambda ended: None if ended.cancelled() else ended.exception())
        both: set[asyncio.Future[Any]] = {gone, done}
        try:
            await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
            if not done.done():
                raise ClientDisconnect
            return await done
        finally:
            gone.cancel()
            done.cancel()

    @staticmethod
    async def _pieces(
        arrivals: Arrivals, tickets: Sequence[Ticket], form: Form, with_usage: bool
    ) -> AsyncIterator[str]:
        """Server-sent events. When the client goes away this generator is closed, and the requests end."""
        try:
            for choice in range(len(tickets)):
                for opening in form.opening(choice):
                    yield _event(opening)
            left = len(tickets)
            while left:
                choice, text = await arrivals.get()
                if text is not None:
                    yield _event(form.piece(choice, text))
                    continue
                left -= 1
                error = tickets[choice].future.exception()
                if error is not None:
                    _, message, kind = _status_of(error)
                    yield _event(_error_body(message, kind))
                    return
                yield _event(form.closing(choice, tickets[choice].future.result()))
            if with_usage:
                yield _event(form.usage_piece([ticket.future.result() for ticket in tickets]))
            yield "data: [DONE]\n\n"
        finally:
            for ticket in tickets:
                ticket.cancel()

    # -------------------------------------------------------------------------------------- classification

    async def classify(self, request: Request) -> Response:
        """Labels with probabilities, by the task that the student was made for."""
        body = await read(request, ClassifyRequest)
        self._check_name(body.model)
        classifier = self.classifier
        if classifier is None:
            raise Refused(400, "this model was made for no classification task; use /v1/completions")
        examples, truncated = await asyncio.to_thread(self._encode, classifier, body.inputs())
        answers: list[Answer] = []
        for start in range(0, len(examples), CLASSIFY_BATCH):
            part = examples[start : start + CLASSIFY_BATCH]
            call = self.batcher.call(partial(self.engine.predict, classifier.task, part))
            # Shielded: the batcher ends its calls itself, and cannot end one that was cancelled.
            predictions = await asyncio.shield(asyncio.wrap_future(call))
            answers += classifier.answers(part, predictions)
        data = [
            {
                "index": index,
                "label": answer.label,
                "word": answer.text,
                "probabilities": answer.probabilities,
                "truncated": cut,
            }
            for index, (answer, cut) in enumerate(zip(answers, truncated, strict=True))
        ]
        facts = {"object": "list", "model": self.settings.name, "task": classifier.task.name}
        return JSONResponse({**facts, "data": data})

    def _encode(
        self, classifier: Classifier, inputs: Sequence[str | Fields]
    ) -> tuple[list[Example], list[bool]]:
        """Inputs as examples, and for each whether text was cut from it to fit the task's max_length."""
        task = classifier.task
        rows = as_rows(task, inputs)
        examples = classifier.encode(rows, self.engine.facts["vocab_size"])
        fields, render = template_fields(task), renderer(task)
        whole = [render({name: text_field(task, row, name) for name in fields}) for row in rows]
        return examples, [example.prompt != prompt for example, prompt in zip(examples, whole, strict=True)]


def _task_facts(classifier: Classifier) -> dict[str, Any]:
    task = classifier.task
    return {
        "name": task.name,
        "fields": template_fields(task),
        "labels": list(task.labels),
        "max_length": classifier.max_length,
    }


async def _gone(request: Request) -> None:
    """Return when the client has gone away; its request was read."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _status_of(error: BaseException) -> tuple[int, str, str]:
    """HTTP status, message and type of an error; what no client can mend goes to the log."""
    message = " ".join(str(error).split("\n"))
    if isinstance(error, Overloaded):
        return 429, message, "overloaded_error"
    if isinstance(error, Closed):
        return 503, message, "unavailable_error"
    if isinstance(error, ModelError | DataError):
        return 400, message, "invalid_request_error"
    log.error("a request failed", exc_info=error)
    known = isinstance(error, BitDistillError)
    return 500, message if known else "internal error; the server's log says more", "server_error"


def _event(value: Mapping[str, Any]) -> str:
    return f"data: {json.dumps(value, ensure_ascii=False, separators=(',', ':'))}\n\n"


async def read(request: Request, kind: type[Body]) -> Body:
    """The body of a request.

    Raises:
        Refused: not JSON, too long, or not what the route takes; the message names the field.
    """
    # A web page of another origin may send text/plain without being asked about it, but not this.
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise Refused(415, "send Content-Type: application/json")
    data = bytearray()
    async for chunk in request.stream():
        data += chunk
        if len(data) > MAX_BODY_BYTES:
            raise Refused(413, f"the request passes {MAX_BODY_BYTES >> 20} MB; send less")
    try:
        value = json.loads(bytes(data), parse_constant=no_constant)
    except (ValueError, RecursionError) as error:
        raise Refused(400, f"the body is not JSON: {str(error)[:200]}") from error
    try:
        return kind.model_validate(value)
    except ValidationError as error:
        place, message = _first_mistake(error)
        raise Refused(400, f"{place}: {message}" if place else message, param=place or None) from error


def _first_mistake(error: ValidationError) -> tuple[str, str]:
    errors = error.errors(include_url=False)
    # Each branch of a union complains. One that has the right type says more than those that the type rules out.
    telling = [each for each in errors if not each["type"].endswith("_type")]
    first = (telling or errors)[0]
    # Names of a union's branches are pydantic's, not the sender's.
    names = [str(part) for part in first["loc"] if isinstance(part, int) or str(part).isidentifier()]
    names = [name for name in names if name not in ("str", "ContentPart", "Fields")]
    return ".".join(names), _mistake(first, TAKES.get(names[-1]) if names and not telling else None)


def _mistake(error: ErrorDetails, takes: str | None) -> str:
    """What is wrong, with the value and what to do; `takes` is what a field of several types takes."""
    kind, given, limits = error["type"], error["input"], error.get("ctx", {})
    if kind == "extra_forbidden":
        return "unknown field; docs/serve.md lists those that are known"
    if kind == "too_short":
        return f"is empty; give at least {limits['min_length']}"
    if kind == "too_long":
        return f"has {limits['actual_length']} items, at most {limits['max_length']} are taken; send fewer"
    if kind in ("missing", "value_error"):
        return error["msg"].removeprefix("Value error, ")
    message = f"Input should be {takes}" if takes else error["msg"]
    return f"{message}, not {given!r:.60}" if isinstance(given, str | int | float) else message
