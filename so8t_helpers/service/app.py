"""The FastAPI application: /think, /healthz, /metrics, and the OpenAPI page, which needs no network."""

import asyncio
import json
import logging
import os
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Annotated, Any, TypeAlias

from fastapi import Depends, FastAPI, Request, Response
from fastapi.responses import HTMLResponse, JSONResponse, PlainTextResponse, StreamingResponse
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4
from starlette.exceptions import HTTPException

from so8t_helpers import __version__
from so8t_helpers.engines.base import Engine
from so8t_helpers.service.answering import AnswerError, Answering, Question
from so8t_helpers.service.guard import add_error_handlers, error_body, guard
from so8t_helpers.service.limits import TOKEN_VARIABLE, RateLimit, token_fits
from so8t_helpers.service.metrics import Metrics
from so8t_helpers.service.page import docs_page
from so8t_helpers.service.schema import ErrorAnswer, Health, ThinkAnswer, ThinkQuestion, question_model
from so8t_helpers.settings import Settings
from so8t_helpers.thinking.audit import AuditLog

log = logging.getLogger("so8t.serve")

_STREAM_HEADERS = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
_KEEP_ALIVE_SECONDS = 10.0


def create_app(settings: Settings, engine: Engine, audit: AuditLog, model_sha256: str = "") -> FastAPI:
    """Return the service over an open engine and log; `model_sha256` is of the model's file.

    The environment variable SO8T_TOKEN, where set, is the bearer token that every call but /healthz needs.
    """
    metrics = Metrics()
    answering = Answering(settings, engine, audit, metrics, model_sha256)
    metrics.watch(lambda: answering.pending, lambda: max(0, answering.pending - engine.parallel))
    limit = RateLimit(settings.serve.requests_per_minute)
    token = os.environ.get(TOKEN_VARIABLE)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(answering.close)

    app = FastAPI(title="SO8T /think", version=__version__, lifespan=lifespan, docs_url=None, redoc_url=None)
    add_error_handlers(app)
    app.middleware("http")(guard(settings, metrics))

    def authorised(given: Annotated[HTTPAuthorizationCredentials | None, Depends(_bearer)]) -> None:
        if token and not token_fits(f"Bearer {given.credentials}" if given else None, token):
            raise HTTPException(401, "a valid bearer token is needed", {"WWW-Authenticate": "Bearer"})

    needs_token = [Depends(authorised)] if token else []
    # The limits that the body's type states are this service's own: the type is made here, and the annotation
    # is evaluated here, since this module has no `from __future__ import annotations`.
    if TYPE_CHECKING:
        Limited: TypeAlias = ThinkQuestion
    else:
        Limited = question_model(settings.serve)

    @app.post(
        "/think",
        dependencies=needs_token,
        responses=_responses(401, 413, 422, 429, 500, 502, 503, 504) | {200: _ANSWER},
        summary="Ask; get the final part of the answer and the decision",
    )
    async def think(body: Limited, request: Request) -> Response:
        if wait := limit.wait(body.user_id):
            raise AnswerError(429, "rate_limit", "too many requests from this user", wait)
        call = _Call(settings, answering, body, request.state.request_id)
        if body.options.stream:
            return StreamingResponse(call.events(), media_type="text/event-stream", headers=_STREAM_HEADERS)
        answer = await call.whole(request)
        return JSONResponse(answer.model_dump(), headers={"Cache-Control": "no-store"})

    @app.get(
        "/healthz", responses=_responses(500, 503), summary="Whether it runs, with what, and the audit head"
    )
    async def healthz() -> Health:
        if answering.failing:
            raise AnswerError(503, "engine", "the engine broke off at the last question")
        name = f"{engine.name} {engine.version}"
        return Health(engine=name, model=engine.model, model_sha256=model_sha256, audit_head=audit.head)

    @app.get(
        "/metrics",
        dependencies=needs_token,
        response_class=PlainTextResponse,
        responses={status: {**answer, **_JSON_ERROR} for status, answer in _responses(401).items()},
        summary="Counters in the Prometheus text format",
    )
    async def show_metrics() -> PlainTextResponse:
        return PlainTextResponse(metrics.text(), headers={"Content-Type": CONTENT_TYPE_PLAIN_0_0_4})

    @app.get("/docs", include_in_schema=False)
    async def docs() -> HTMLResponse:
        page, policy = docs_page(app.openapi())
        return HTMLResponse(page, headers={"Content-Security-Policy": policy})

    return app


_bearer = HTTPBearer(auto_error=False)


class _Call:
    """One /think request: its question, and the pieces that come back from the engine's thread."""

    def __init__(
        self, settings: Settings, answering: Answering, body: ThinkQuestion, request_id: str
    ) -> None:
        loop = asyncio.get_running_loop()
        self.deadline = time.monotonic() + settings.serve.timeout_seconds
        self.pieces: asyncio.Queue[str | None] = asyncio.Queue()
        limit = body.options.max_tokens or settings.serve.max_new_tokens
        release = lambda text: _tell(loop, self.pieces, text)
        self.question = Question(request_id, body, limit, self.deadline, release)
        self.future = asyncio.wrap_future(answering.submit(self.question))
        self.future.add_done_callback(lambda _: self.pieces.put_nowait(None))

    async def whole(self, request: Request) -> ThinkAnswer:
        """Wait for the whole answer, for the client to go, or for the time to be up."""
        gone = asyncio.ensure_future(_disconnected(request))
        try:
            either: list[asyncio.Future[Any]] = [self.future, gone]
            await asyncio.wait(either, timeout=self._left(), return_when="FIRST_COMPLETED")
            if self.future.done():
                return self.future.result()
            if gone.done():
                raise AnswerError(503, "dropped", "the client has gone")
            raise _too_late()
        finally:
            gone.cancel()
            self._drop()

    async def events(self) -> AsyncIterator[str]:
        """Server-sent events: `text` with each released piece, then `done` with the answer, or `error`."""
        try:
            while True:
                try:
                    patience = min(self._left(), _KEEP_ALIVE_SECONDS)
                    piece = await asyncio.wait_for(self.pieces.get(), timeout=patience)
                except TimeoutError:
                    if self._left() > 0:
                        yield ": waiting\n\n"
                        continue
                    raise _too_late() from None
                if piece is None:
                    yield _event("done", self.future.result().model_dump())
                    return
                yield _event("text", {"text": piece})
        except AnswerError as error:
            yield _event("error", error_body(error.code, error.message, self.question.request_id))
        except Exception as error:
            log.error("request %s failed: %s", self.question.request_id, type(error).__name__)
            yield _event("error", error_body("internal", "internal error", self.question.request_id))
        finally:
            self._drop()

    def _left(self) -> float:
        return max(0.0, self.deadline - time.monotonic())

    def _drop(self) -> None:
        """Nobody waits any more: the engine may stop. Its thread keeps its place until it has."""
        self.question.dropped.set()
        if not self.future.done():
            self.future.add_done_callback(lambda future: future.cancelled() or future.exception())


def _tell(loop: asyncio.AbstractEventLoop, pieces: asyncio.Queue[str | None], text: str) -> None:
    if not loop.is_closed():
        loop.call_soon_threadsafe(pieces.put_nowait, text)


def _too_late() -> AnswerError:
    return AnswerError(504, "timeout", "the model did not answer in time")


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _event(name: str, data: dict[str, Any]) -> str:
    return f"event: {name}\ndata: {json.dumps(data, ensure_ascii=False)}\n\n"


_EVENT: dict[str, Any] = {
    "type": "object",
    "required": ["event", "data"],
    "properties": {
        "event": {"enum": ["text", "done", "error"]},
        "data": {"type": "string", "contentMediaType": "application/json"},
    },
}
_ANSWER: dict[str, Any] = {
    "model": ThinkAnswer,
    "description": "The answer; with `options.stream` as events `text`, then `done` or `error`.",
    "content": {"text/event-stream": {"schema": _EVENT}},
}
_REASONS = {
    401: "No valid bearer token.",
    411: "No Content-Length.",
    413: "Body or question too long.",
    421: "Not a loopback name.",
    422: "Not a valid question.",
    429: "Too many requests from this user; see Retry-After.",
    500: "Internal error.",
    502: "The engine failed.",
    503: "The queue is full, see Retry-After; or the engine has failed.",
    504: "No answer in time.",
}

# Said outright where the answer itself is not JSON.
_JSON_ERROR = {"content": {"application/json": {"schema": {"$ref": "#/components/schemas/ErrorAnswer"}}}}


def _responses(*statuses: int) -> dict[int | str, dict[str, Any]]:
    return {s: {"model": ErrorAnswer, "description": _REASONS[s]} for s in (411, 421, *statuses)}
