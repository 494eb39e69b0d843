"""The door that every request passes, and how an error looks: without anything that was asked or written."""

from __future__ import annotations

import logging
import math
import uuid
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from so8t_helpers.service.draft import AnswerError
from so8t_helpers.service.limits import RateLimit, is_loopback, names_loopback, rate_key, token_fits
from so8t_helpers.service.metrics import Metrics
from so8t_helpers.settings import ServeSettings

log = logging.getLogger("so8t.serve")

# What anybody may see who reaches the service: that it runs, and its description.
_OPEN = frozenset({"/healthz", "/docs", "/openapi.json"})


class Door:
    """Give each request its id, count it, and let in what may come in, the cheapest question first.

    Host name, token, rate, size by the header: all of them before a byte of the body is read.
    """

    def __init__(self, app: ASGIApp, settings: ServeSettings, metrics: Metrics, token: str) -> None:
        self._app, self._metrics, self._token = app, metrics, token
        # JSON may write a character as `\uXXXX` twice.
        self._largest = 12 * settings.max_query_chars + 4096
        self._loopback = is_loopback(settings.host)
        self._rate = RateLimit(settings.requests_per_minute)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id = scope.setdefault("state", {})["request_id"] = uuid.uuid4().hex
        begun = False

        async def reply(message: Message) -> None:
            nonlocal begun
            if message["type"] == "http.response.start":
                begun = True
                message["headers"] = [*message.get("headers", []), (b"x-request-id", request_id.encode())]
                self._metrics.request(message["status"])
            await send(message)

        try:
            self._judge(scope)
            await self._app(scope, await _with_body(receive), reply)
        except AnswerError as error:
            await answer_response(error, request_id)(scope, receive, reply)
        except _GoneError:
            return
        except Exception as error:
            # The message of an unknown error might quote what the model wrote: its type must do.
            log.error("request %s failed: %s", request_id, type(error).__name__)
            if not begun:
                await error_response(500, "internal", "internal error", request_id)(scope, receive, reply)

    def _judge(self, scope: Scope) -> None:
        headers = Headers(scope=scope)
        close = {"Connection": "close"}
        # First of all: a chunked body tells no size; with a Content-Length beside it, a proxy may see another
        # request in what follows on this connection.
        if "transfer-encoding" in headers:
            raise AnswerError(411, "length", "a Content-Length header alone is needed", headers=close)
        if self._loopback and not names_loopback(scope["headers"]):
            raise AnswerError(421, "host", "this service answers to loopback names only")
        closed = self._token and scope["path"] not in _OPEN
        if closed and not token_fits(headers.get("authorization"), self._token):
            challenge = {"WWW-Authenticate": "Bearer"}
            raise AnswerError(401, "token", "a valid bearer token is needed", headers=challenge)
        asks = scope["method"] == "POST"
        if asks and (wait := self._rate.wait(rate_key((scope["client"] or ("",))[0]))):
            raise AnswerError(429, "rate_limit", "too many requests from this address", wait)
        length = headers.get("content-length", "")
        if asks and not length:
            raise AnswerError(411, "length", "a Content-Length header alone is needed", headers=close)
        if length and int(length) > self._largest:
            raise AnswerError(413, "too_long", f"the body is over {self._largest} bytes")


class _GoneError(Exception):
    """The client went before its request was here."""


async def _with_body(receive: Receive) -> Receive:
    """Read the whole body, for which the connection has a time limit; return what gives it once more."""
    body: list[bytes] = []
    more = True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise _GoneError
        body.append(message.get("body", b""))
        more = message.get("more_body", False)

    async def again() -> Message:
        if body:
            whole = b"".join(body)
            body.clear()
            return {"type": "http.request", "body": whole, "more_body": False}
        return await receive()

    return again


def add_error_handlers(app: FastAPI) -> None:
    """Let the application answer every kind of error in the one form."""

    @app.exception_handler(AnswerError)
    async def answer_error(request: Request, error: AnswerError) -> Response:
        return answer_response(error, request.state.request_id)

    @app.exception_handler(HTTPException)
    async def http_error(request: Request, error: HTTPException) -> Response:
        headers = dict(error.headers or {})
        return error_response(error.status_code, "http", error.detail, request.state.request_id, headers)

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Response:
        # The input itself is left out, names of unknown fields too: an error is no place for what was asked.
        places = [(e["loc"][: -1 if e["type"] == "extra_forbidden" else None], e) for e in error.errors()[:5]]
        text = "; ".join(f"{'.'.join(map(str, place))}: {e['msg']}" for place, e in places)
        return error_response(422, "invalid", text, request.state.request_id)


def error_body(code: str, message: str, request_id: str) -> dict[str, Any]:
    """Return the body of every error."""
    return {"error": {"code": code, "message": message, "request_id": request_id}}


def error_response(
    status: int, code: str, message: str, request_id: str, headers: dict[str, str] | None = None
) -> JSONResponse:
    """Return an error as a response."""
    return JSONResponse(error_body(code, message, request_id), status, headers)


def answer_response(error: AnswerError, request_id: str) -> JSONResponse:
    """Return what says that a question got no answer."""
    retry = {"Retry-After": str(math.ceil(error.retry_after))} if error.retry_after else {}
    return error_response(error.status, error.code, error.message, request_id, {**retry, **error.headers})
