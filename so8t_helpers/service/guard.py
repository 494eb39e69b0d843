"""What every request passes through, and how an error looks: without anything that was asked or written."""

from __future__ import annotations

import logging
import math
import uuid
from collections.abc import Awaitable, Callable
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from so8t_helpers.service.answering import AnswerError
from so8t_helpers.service.limits import is_loopback
from so8t_helpers.service.metrics import Metrics
from so8t_helpers.settings import Settings

log = logging.getLogger("so8t.serve")


def error_body(code: str, message: str, request_id: str) -> dict[str, Any]:
    """Return the body of every error."""
    return {"error": {"code": code, "message": message, "request_id": request_id}}


def guard(settings: Settings, metrics: Metrics) -> Callable[..., Awaitable[Response]]:
    """Give each request its id, count it, and keep out foreign host names and bodies that are too large."""
    # JSON may write a character as `\\uXXXX` twice.
    largest = 12 * settings.serve.max_query_chars + 4096
    loopback = is_loopback(settings.serve.host)

    async def pass_on(request: Request, call_next: Callable[[Request], Awaitable[Response]]) -> Response:
        request_id = request.state.request_id = uuid.uuid4().hex
        length = request.headers.get("content-length", "")
        response: Response
        if loopback and not is_loopback(request.url.hostname or ""):
            # A page in the user's browser could reach us under a name of its own (DNS rebinding).
            response = error_response(421, "host", "this service answers to loopback names only", request_id)
        elif request.method == "POST" and not length.isdigit():
            response = error_response(411, "length", "a Content-Length header is needed", request_id)
        elif length.isdigit() and int(length) > largest:
            response = error_response(413, "too_long", f"the body is over {largest} bytes", request_id)
        else:
            try:
                response = await call_next(request)
            except Exception as error:
                # The message of an unknown error might quote what the model wrote: its type must do.
                log.error("request %s failed: %s", request_id, type(error).__name__)
                response = error_response(500, "internal", "internal error", request_id)
        response.headers["X-Request-Id"] = request_id
        metrics.request(response.status_code)
        return response

    return pass_on


def add_error_handlers(app: FastAPI) -> None:
    """Let the application answer every kind of error in the one form."""

    @app.exception_handler(AnswerError)
    async def answer_error(request: Request, error: AnswerError) -> Response:
        headers = {"Retry-After": str(math.ceil(error.retry_after))} if error.retry_after else None
        return error_response(error.status, error.code, error.message, request.state.request_id, headers)

    @app.exception_handler(HTTPException)
    async def http_error(request: Request, error: HTTPException) -> Response:
        headers = dict(error.headers or {})
        return error_response(error.status_code, "http", error.detail, request.state.request_id, headers)

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Response:
        # The input itself is left out: an error is no place for what somebody asked.
        places = [f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors()[:5]]
        return error_response(422, "invalid", "; ".join(places), request.state.request_id)


def error_response(
    status: int, code: str, message: str, request_id: str, headers: dict[str, str] | None = None
) -> JSONResponse:
    """Return an error as a response."""
    return JSONResponse(error_body(code, message, request_id), status, headers)
