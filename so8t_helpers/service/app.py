"""The FastAPI application: two dialects, /healthz, /metrics, and the OpenAPI page, which needs no network."""

import asyncio
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import Depends, FastAPI
from fastapi.responses import HTMLResponse, PlainTextResponse
from fastapi.security import HTTPBearer
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4

from so8t_helpers import __version__
from so8t_helpers.engines.base import TOKEN_VARIABLE, Engine
from so8t_helpers.service.answering import Answering
from so8t_helpers.service.draft import AnswerError
from so8t_helpers.service.guard import Door, add_error_handlers
from so8t_helpers.service.metrics import Metrics
from so8t_helpers.service.openai import add_openai
from so8t_helpers.service.page import docs_page
from so8t_helpers.service.reasons import JSON_ERROR, responses
from so8t_helpers.service.schema import Health
from so8t_helpers.service.think import add_think
from so8t_helpers.settings import Settings
from so8t_helpers.thinking.audit import AuditLog


def create_app(settings: Settings, engine: Engine, audit: AuditLog, model_sha256: str = "") -> FastAPI:
    """Return the service over an open engine and log; `model_sha256` is of the model's file.

    The environment variable SO8T_TOKEN, where set, is the bearer token that every call needs but /healthz and
    the description.
    """
    metrics = Metrics()
    answering = Answering(settings, engine, audit, metrics, model_sha256)
    metrics.watch(lambda: answering.pending, lambda: max(0, answering.pending - engine.parallel))
    token = os.environ.get(TOKEN_VARIABLE, "")

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(answering.close)

    app = FastAPI(title="SO8T /think", version=__version__, lifespan=lifespan, docs_url=None, redoc_url=None)
    add_error_handlers(app)
    app.add_middleware(Door, settings=settings.serve, metrics=metrics, token=token)
    # The door has looked at the token before anything was read: this is for the description alone.
    needs_token = [Depends(HTTPBearer(auto_error=False))] if token else []
    add_think(app, answering, needs_token)
    add_openai(app, answering, needs_token)

    @app.get(
        "/healthz", responses=responses(500, 503), summary="Whether it runs, with what, and the audit head"
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
        responses={status: {**answer, **JSON_ERROR} for status, answer in responses(401).items()},
        summary="Counters in the Prometheus text format",
    )
    async def show_metrics() -> PlainTextResponse:
        return PlainTextResponse(metrics.text(), headers={"Content-Type": CONTENT_TYPE_PLAIN_0_0_4})

    @app.get("/docs", include_in_schema=False)
    async def docs() -> HTMLResponse:
        page, policy = docs_page(app.openapi())
        return HTMLResponse(page, headers={"Content-Security-Policy": policy})

    return app
