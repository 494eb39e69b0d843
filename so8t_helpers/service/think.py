"""The /think dialect: one question, the final part and the decision."""

import json
from typing import TYPE_CHECKING, Any, TypeAlias

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse

from so8t_helpers.service.answering import Answering
from so8t_helpers.service.call import STREAM_HEADERS, Call, Step
from so8t_helpers.service.draft import Answer, AnswerError, Asked
from so8t_helpers.service.guard import error_body
from so8t_helpers.service.reasons import ASKING, responses
from so8t_helpers.service.schema import ThinkAnswer, ThinkQuestion, question_model


def add_think(app: FastAPI, answering: Answering, needs_token: list[Any]) -> None:
    """Add POST /think."""
    serve = answering.settings.serve
    # The limits that the body's type states are this service's own: the type is made here, and the annotation
    # is evaluated here, since this module has no `from __future__ import annotations`.
    if TYPE_CHECKING:
        Limited: TypeAlias = ThinkQuestion
    else:
        Limited = question_model(serve)

    @app.post(
        "/think",
        dependencies=needs_token,
        responses=responses(*ASKING) | {200: _ANSWER},
        summary="Ask; get the final part of the answer and the decision",
    )
    async def think(body: Limited, request: Request) -> Response:
        options = body.options
        asked = Asked(
            "think",
            body.user_id,
            [{"role": "user", "content": body.query}],
            options.max_tokens or serve.max_new_tokens,
            options.temperature,
            options.seed,
        )
        request_id = request.state.request_id
        call = Call(answering, asked, request_id)
        if options.stream:
            events = call.events(lambda step: _event(step, request_id))
            return StreamingResponse(events, media_type="text/event-stream", headers=STREAM_HEADERS)
        answer = await call.whole(request)
        return JSONResponse(_answer(answer), headers={"Cache-Control": "no-store"})


def _answer(answer: Answer) -> dict[str, Any]:
    found = ThinkAnswer(request_id=answer.request_id, answer=answer.text, decision=answer.decision)
    return found.model_dump()


def _event(step: Step, request_id: str) -> str:
    """Write a server-sent event: `text` with each released piece, then `done` with the answer, or `error`."""
    if isinstance(step, Answer):
        name, data = "done", _answer(step)
    elif isinstance(step, AnswerError):
        name, data = "error", error_body(step.code, step.message, request_id)
    else:
        name, data = "text", {"text": step}
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
