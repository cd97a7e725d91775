"""`bitdistill serve`: the native engine behind HTTP. No torch."""

from __future__ import annotations

import errno
import logging
import os
import socket
from typing import Annotated

import typer

from bitdistill.cli.native import (
    MOST_TOKENS,
    Folder,
    Head,
    HeadName,
    Isa,
    Kv,
    KvName,
    LayoutName,
    LayoutOption,
    Threads,
    load_engine,
)
from bitdistill.cli.options import stderr
from bitdistill.errors import UsageError

KEY_VARIABLE = "BITDISTILL_API_KEY"


def serve(
    model: Folder,
    host: Annotated[
        str, typer.Option(help="Address to listen on; 0.0.0.0 for other machines too.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port; 0: a free one.")] = 8000,
    name: Annotated[
        str | None,
        typer.Option(help="What clients call the model; default: its folder's name.", show_default=False),
    ] = None,
    max_sequences: Annotated[
        int, typer.Option(min=1, max=1024, help="Answers written at the same time.")
    ] = 8,
    max_waiting: Annotated[
        int, typer.Option(min=1, max=MOST_TOKENS, help="Requests that may wait; more get status 429.")
    ] = 64,
    keep: Annotated[
        int,
        typer.Option(
            min=0, max=MOST_TOKENS, help="Finished conversations whose keys and values stay in memory."
        ),
    ] = 8,
    max_new_tokens: Annotated[
        int,
        typer.Option(
            "--max-new-tokens",
            "-n",
            min=1,
            max=MOST_TOKENS,
            help="Longest answer where a request says nothing.",
        ),
    ] = 512,
    api_key: Annotated[
        str | None,
        typer.Option(envvar=KEY_VARIABLE, help="Refuse requests without this key.", show_default=False),
    ] = None,
    cors_origin: Annotated[
        list[str] | None,
        typer.Option(metavar="ORIGIN", help="Let web pages of this origin call. Repeat.", show_default=False),
    ] = None,
    threads: Threads = None,
    isa: Isa = None,
    layout: LayoutOption = LayoutName.two_bit,
    kv: Kv = KvName.float32,
    head: Head = HeadName.screened4,
) -> None:
    """Serve a model over HTTP: OpenAI's chat and completion routes, classification, and a page to try it."""
    import uvicorn

    from bitdistill.engine.batcher import Batcher
    from bitdistill.serve.app import Settings, make_app

    # click takes an empty variable for none, which would open the server without a word.
    if api_key == "" or (api_key is None and os.environ.get(KEY_VARIABLE) == ""):
        place, remedy = ("--api-key", "leave the option out") if api_key == "" else (KEY_VARIABLE, "unset it")
        raise typer.BadParameter(f"an empty key protects nothing; give one, or {remedy}", param_hint=place)
    listener = listen(host, port)
    with listener:
        engine = load_engine(model, threads, isa, layout, kv, head)
        batcher = Batcher(engine, max_sequences=max_sequences, max_waiting=max_waiting, kept_sequences=keep)
        settings = Settings(
            name=name or model.resolve().name,
            max_new_tokens=max_new_tokens,
            api_key=api_key,
            cors_origins=cors_origin or (),
        )
        app = make_app(engine, batcher, settings)
        logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(levelname)s %(message)s")
        address, at = listener.getsockname()[:2]
        shown = f"[{address}]" if ":" in address else address
        stderr().print(
            f"{settings.name} on http://{shown}:{at} ({engine.isa}, {engine.facts['threads']} threads); Ctrl-C ends it",
            markup=False,
        )
        if api_key is None and not _only_here(address):
            stderr().print(
                f"warning: {address} is open to other machines and needs no key; see --api-key", markup=False
            )
        config = uvicorn.Config(
            app, log_config=None, access_log=True, timeout_graceful_shutdown=5, lifespan="on"
        )
        try:
            uvicorn.Server(config).run(sockets=[listener])
        except KeyboardInterrupt:  # uvicorn hands the signal on when everything is closed
            return


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens there, before a large model is loaded for nothing.

    Raises:
        UsageError: the address cannot be had.
    """
    try:
        family, _, _, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        return socket.create_server(address[:2], family=family)
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno and error.errno > 0 else str(error)
        remedy = (
            "choose another --port" if error.errno == errno.EADDRINUSE else "choose another --host or --port"
        )
        raise UsageError(f"{host}:{port}: {reason}; {remedy}") from error


def _only_here(address: str) -> bool:
    return address.startswith("127.") or address == "::1"
