"""Connections: few at once, each with little time to say what it wants, and never one too many to answer.

uvicorn has no time-out for a request's head or body, its own limit counts connections that never ask, and
asyncio goes astray where no file can be opened any more. So a new connection pushes out the oldest that has
not yet asked, and a spare file is kept to say 503 with.
"""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import socket
import sys
import time
from asyncio import TimerHandle, Transport
from http import HTTPStatus
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

log = logging.getLogger("so8t.serve")

LARGEST_HEAD = 16384  # bytes
# Connections that asyncio lets in at once, before the first of them is counted.
BURST = 16
_QUEUE = 1024  # connections that wait in the system
_SPARE_FILES = 64  # for the log, its lock, the engine and what Python itself opens
_LINGER_SECONDS = 0.1
_MOST_LINGERING = 16  # each is an open file, and a flood turns away thousands a second


class Seldom:
    """A warning that may come up any number of times a second, and is written once."""

    def __init__(self, message: str) -> None:
        self._message, self._count, self._then = message, 0, 0.0

    def __call__(self) -> None:
        self._count += 1
        if (now := time.monotonic()) - self._then >= 1.0:
            log.warning(self._message, self._count)
            self._count, self._then = 0, now


class Pool:
    """The open connections, at most `limit`; `seconds` is the time for a head, and again for a body."""

    def __init__(self, limit: int, seconds: float) -> None:
        self.limit, self.seconds, self.lingering = limit, seconds, 0
        self._open: set[Connection] = set()
        # Those whose request is not here yet, oldest first: of strangers, and of those answered before.
        self._strangers: dict[Connection, None] = {}
        self._known: dict[Connection, None] = {}
        self._full = Seldom("too many connections: %d turned away that had not asked yet")

    def add(self, new: Connection) -> None:
        """Take a connection in; one over the limit costs the oldest that has not asked, at last itself."""
        self._open.add(new)
        self._strangers[new] = None
        if len(self._open) > self.limit:
            self._full()
            next(iter(self._strangers or self._known)).turn_away(503, "busy", "too many connections")

    def move(self, connection: Connection, waits: bool) -> None:
        """Note that a connection's request has come in whole, or that it may send the next."""
        self._strangers.pop(connection, None)
        self._known.pop(connection, None)
        if waits and connection in self._open:
            self._known[connection] = None

    def remove(self, connection: Connection) -> None:
        self._open.discard(connection)
        self.move(connection, False)


class Connection(H11Protocol):
    """One connection of a pool."""

    def __init__(self, pool: Pool, **given: Any) -> None:
        super().__init__(**given)
        self._pool = pool
        self._stage = "head"  # what is awaited; "" while the answer is
        self._heard = self._left = False
        self._timer: TimerHandle | None = None

    def connection_made(self, transport: Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._start_clock()
        self._pool.add(self)

    def connection_lost(self, exc: Exception | None) -> None:
        self._leave()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        self._heard = True
        if not self._left:
            super().data_received(data)
            self._look()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._look()

    def turn_away(self, status: int, code: str, message: str) -> None:
        """Answer with an error, unless the request at hand has an answer already, and close."""
        self._leave()
        if self.cycle is not None:
            self.cycle.disconnected = True
        if self.conn.our_state in {h11.IDLE, h11.SEND_RESPONSE}:
            self.transport.write(refusal(status, code, message))
        if self._heard or self._pool.lingering >= _MOST_LINGERING:
            self.transport.close()
        else:
            # A request may be on its way. Closed before it is read, the answer would be lost with it.
            self._pool.lingering += 1
            self.loop.call_later(_LINGER_SECONDS, self._close)

    def _close(self) -> None:
        self._pool.lingering -= 1
        self.transport.close()

    def _look(self) -> None:
        """Start the clock anew where another part of the request is awaited than before."""
        if self._left:
            return
        cycle = self.cycle
        stage = "head" if cycle is None or cycle.response_complete else "body" if cycle.more_body else ""
        if stage == self._stage:
            return
        if not (stage and self._stage):
            self._pool.move(self, bool(stage))
        self._stage = stage
        self._heard = self._heard and stage != "head"
        self._stop_clock()
        if stage:
            self._start_clock()

    def _late(self) -> None:
        if self._heard:
            self.turn_away(408, "timeout", f"the request's {self._stage} did not come in time")
        else:
            self._leave()
            self.transport.close()

    def _leave(self) -> None:
        self._left = True
        self._stop_clock()
        self._pool.remove(self)

    def _start_clock(self) -> None:
        self._timer = self.loop.call_later(self._pool.seconds, self._late)

    def _stop_clock(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None


class Listener(socket.socket):
    """A listening socket that answers 503 where the process may open no further file."""

    def __init__(self, host: str, port: int) -> None:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        made = socket.create_server((host, port), family=family, backlog=_QUEUE)
        super().__init__(fileno=made.detach())
        self._spare: int | None = os.open(os.devnull, os.O_RDONLY)
        self._out = Seldom("out of file descriptors: %d connections answered 503; raise `ulimit -n`")

    def accept(self) -> tuple[socket.socket, Any]:
        """Return a new connection.

        Raises:
            BlockingIOError: nobody is waiting, or could be let in; asyncio then looks again later.
        """
        try:
            return super().accept()
        except OSError as error:
            if error.errno not in {errno.EMFILE, errno.ENFILE}:
                raise
        self._out()
        if self._spare is None:
            time.sleep(0.01)  # another thread took it: without a pause this would spin
        else:
            os.close(self._spare)
            with contextlib.suppress(OSError):
                connection, _ = super().accept()
                with connection:
                    connection.setblocking(False)
                    connection.sendall(refusal(503, "busy", "out of file descriptors"))
                    connection.recv(65536)  # a request left unread would take the answer with it
        self._spare = None
        with contextlib.suppress(OSError):
            self._spare = os.open(os.devnull, os.O_RDONLY)
        raise BlockingIOError

    def listen(self, backlog: int = _QUEUE) -> None:
        """Keep the system's queue as long as it is: asyncio's own `backlog` is `BURST`, for both."""
        super().listen(_QUEUE)

    def close(self) -> None:
        super().close()
        if self._spare is not None:
            os.close(self._spare)
            self._spare = None


def most_connections(wanted: int) -> int:
    """Return how many connections may be open at once, by the setting and by `ulimit -n`."""
    if sys.platform == "win32":
        return wanted
    import resource  # noqa: PLC0415  POSIX alone has it

    files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return wanted if files == resource.RLIM_INFINITY else max(1, min(wanted, files - _SPARE_FILES))


def refusal(status: int, code: str, message: str) -> bytes:
    """Return a whole response in the form of every error, for where no application answers."""
    body = json.dumps({"error": {"code": code, "message": message, "request_id": ""}}).encode()
    lines = [
        f"HTTP/1.1 {status} {HTTPStatus(status).phrase}",
        "Content-Type: application/json",
        f"Content-Length: {len(body)}",
        "Connection: close",
        *(["Retry-After: 1"] if status == HTTPStatus.SERVICE_UNAVAILABLE else []),
    ]
    return "\r\n".join([*lines, "", ""]).encode() + body
