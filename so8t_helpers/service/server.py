"""`so8t serve`: open the model of a run, listen, stop gracefully."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import sys
from collections.abc import Callable, Iterator
from functools import partial
from types import FrameType
from typing import Any

import uvicorn
from fastapi import FastAPI

from so8t_helpers.engines.base import TOKEN_VARIABLE
from so8t_helpers.engines.host import GgufHost, find_gguf
from so8t_helpers.run.files import MachineError, sha256_file
from so8t_helpers.run.stage import Stage
from so8t_helpers.service.app import create_app
from so8t_helpers.service.connections import BURST, LARGEST_HEAD, Connection, Listener, Pool, most_connections
from so8t_helpers.service.limits import is_loopback
from so8t_helpers.settings import ServeSettings, Settings, SettingsError, merge
from so8t_helpers.thinking.audit import AuditLog, service_log


def serve(settings: Settings) -> None:
    """Answer questions with `serve.model` of this run until the process is told to stop (Ctrl+C, SIGTERM).

    The line that says where it listens goes to stdout; the audit head is printed at the end as well.

    Raises:
        SettingsError: no SO8T_TOKEN though the service can be reached from other machines.
        StageError: no such GGUF, or one that is not as its stage left it.
        MachineError: the port is taken.
    """
    chosen = settings.serve
    if not is_loopback(chosen.host) and not os.environ.get(TOKEN_VARIABLE):
        raise SettingsError(
            f"serve.host {chosen.host} can be reached from other machines: set the environment variable "
            f"{TOKEN_VARIABLE} to a bearer token, or serve.host to 127.0.0.1"
        )
    gguf = find_gguf(settings, chosen.model)
    Stage(settings, "serve").check_made(f"04_gguf/{gguf.name}", gguf)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(levelname)s %(message)s")
    logging.getLogger("httpx").setLevel(logging.WARNING)  # a line for every call to the engine says nothing
    # The engine's own patience must not outlast that of the service.
    settings = merge(settings, {"eval": {"timeout_seconds": chosen.timeout_seconds}})
    listener = _listen(chosen.host, chosen.port)
    # Ended while the model still loads, everything that was opened must be closed too.
    with (
        _signals(signal.default_int_handler),
        listener,
        GgufHost(settings) as host,
        host.open(gguf, chosen.model) as engine,
    ):
        audit = AuditLog(service_log(settings))
        app = create_app(settings, engine, audit, sha256_file(gguf))
        port = listener.getsockname()[1]
        name = f"[{chosen.host}]" if ":" in chosen.host else chosen.host
        _say(f"so8t serve: http://{name}:{port} answers with {gguf.name} in {host.description}")
        _say(f"so8t serve: description at /docs, audit log {audit.path}, head {audit.head}")
        _say(f"so8t serve: the log's signatures are those of the public key {audit.public_key}")
        # uvicorn ends on a signal, and then raises it once more: what comes after must still happen.
        with _signals(lambda *_: None):
            http_server(app, chosen).run(sockets=[listener])
        audit.sign()
        _say(f"so8t serve: stopped, audit head {audit.head}")


def http_server(app: FastAPI, chosen: ServeSettings) -> uvicorn.Server:
    """Return the server of an application; it wants a `Listener` to run on."""
    pool = Pool(most_connections(chosen.connections), chosen.receive_seconds)
    return uvicorn.Server(
        uvicorn.Config(
            app,
            http=partial(Connection, pool),  # type: ignore[arg-type]
            ws="none",
            backlog=BURST,
            loop="asyncio",
            h11_max_incomplete_event_size=LARGEST_HEAD,
            # Whoever reaches us on loopback could else name any address as their own.
            proxy_headers=False,
            log_config=None,
            server_header=False,
            timeout_graceful_shutdown=max(1, round(chosen.timeout_seconds)),
        )
    )


def _listen(host: str, port: int) -> Listener:
    try:
        return Listener(host, port)
    except OSError as error:
        message = f"serve.port {port}: cannot listen on {host} ({error}); choose another port"
        raise MachineError(message) from error


@contextlib.contextmanager
def _signals(handler: Callable[[int, FrameType | None], Any]) -> Iterator[None]:
    """Let a handler have the signals that end a process, until the block ends."""
    before = {number: signal.signal(number, handler) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, previous in before.items():
            signal.signal(number, previous)


def _say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()
