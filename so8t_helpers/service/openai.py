"""OpenAI's dialect: /v1/chat/completions and /v1/models, over the same core as /think."""

import json
import time
from typing import TYPE_CHECKING, Any, TypeAlias

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse

from so8t_helpers.service.answering import Answering
from so8t_helpers.service.call import STREAM_HEADERS, Call, Step
from so8t_helpers.service.draft import Answer, AnswerError, Asked
from so8t_helpers.service.guard import error_body
from so8t_helpers.service.openai_schema import (
    ChatAnswer,
    ChatMessage,
    ChatQuestion,
    Choice,
    Model,
    Models,
    Usage,
    chat_model,
)
from so8t_helpers.service.reasons import ASKING, responses
from so8t_helpers.settings import ServeSettings


def add_openai(app: FastAPI, answering: Answering, needs_token: list[Any]) -> None:
    """Add POST /v1/chat/completions and GET /v1/models."""
    serve, model = answering.settings.serve, answering.engine.model
    started = int(time.time())
    if TYPE_CHECKING:
        Limited: TypeAlias = ChatQuestion
    else:
        Limited = chat_model(serve, model)

    @app.post(
        "/v1/chat/completions",
        dependencies=needs_token,
        responses=responses(*ASKING) | {200: _ANSWER},
        summary="Ask as OpenAI's clients do; get the final part alone",
    )
    async def chat_completions(body: Limited, request: Request) -> Response:
        asked = _asked(body, serve)
        if asked.turns[-1]["role"] != "user":
            raise AnswerError(422, "turns", "messages: the last turn must be the user's")
        call = Call(answering, asked, request.state.request_id)
        if body.stream:
            usage = bool(body.stream_options and body.stream_options.include_usage)
            chunks = call.events(_Chunks(request.state.request_id, model, usage).write)
            return StreamingResponse(chunks, media_type="text/event-stream", headers=STREAM_HEADERS)
        found = _answer(await call.whole(request), model)
        return JSONResponse(found.model_dump(), headers={"Cache-Control": "no-store"})

    @app.get(
        "/v1/models",
        dependencies=needs_token,
        responses=responses(401),
        summary="The one model that answers here",
    )
    async def models() -> Models:
        return Models(data=[Model(id=model, created=started)])


def _asked(body: ChatQuestion, serve: ServeSettings) -> Asked:
    turns: list[dict[str, str]] = []
    for message in body.messages:
        role = "system" if message.role == "developer" else message.role
        content = message.content
        text = content if isinstance(content, str) else "\n".join(part.text for part in content)
        if turns and turns[-1]["role"] == role:  # as after a question that got no answer
            turns[-1]["content"] += f"\n\n{text}"
        else:
            turns.append({"role": role, "content": text})
    stops = body.stop or []
    return Asked(
        "openai",
        body.user or "",
        turns,
        min(body.max_completion_tokens or body.max_tokens or serve.max_new_tokens, serve.max_new_tokens),
        body.temperature or 0.0,
        body.seed or 0,
        (stops,) if isinstance(stops, str) else tuple(stops),
        counted=True,
    )


def _answer(answer: Answer, model: str) -> ChatAnswer:
    choice = Choice(message=ChatMessage(content=answer.text), finish_reason=answer.finish)
    return ChatAnswer(
        id=_name(answer.request_id),
        created=int(time.time()),
        model=model,
        choices=[choice],
        usage=_usage(answer),
    )


def _usage(answer: Answer) -> Usage:
    prompt, written = answer.prompt_tokens, answer.tokens
    return Usage(prompt_tokens=prompt, completion_tokens=written, total_tokens=prompt + written)


def _name(request_id: str) -> str:
    return f"chatcmpl-{request_id}"


class _Chunks:
    """The chunks of one streamed answer."""

    def __init__(self, request_id: str, model: str, usage: bool) -> None:
        self._request_id, self._usage, self._begun = request_id, usage, False
        self._common = {
            "id": _name(request_id),
            "object": "chat.completion.chunk",
            "created": int(time.time()),
            "model": model,
        }

    def write(self, step: Step) -> str:
        """Write a step as `data:` lines; the role comes with the first piece, the reason at the end."""
        if isinstance(step, AnswerError):
            return _data(error_body(step.code, step.message, self._request_id))
        if not isinstance(step, Answer):
            role = {} if self._begun else {"role": "assistant"}
            self._begun = True
            return self._choice({**role, "content": step}, None)
        last = self._choice({}, step.finish)
        if self._usage:
            last += _data({**self._common, "choices": [], "usage": _usage(step).model_dump()})
        return last + "data: [DONE]\n\n"

    def _choice(self, delta: dict[str, Any], finish: str | None) -> str:
        return _data({**self._common, "choices": [{"index": 0, "delta": delta, "finish_reason": finish}]})


def _data(data: dict[str, Any]) -> str:
    return f"data: {json.dumps(data, ensure_ascii=False)}\n\n"


_EVENT: dict[str, Any] = {"type": "object", "required": ["data"], "properties": {"data": {"type": "string"}}}
_ANSWER: dict[str, Any] = {
    "model": ChatAnswer,
    "description": "The answer; with `stream` as `chat.completion.chunk` events, then `[DONE]`.",
    "content": {"text/event-stream": {"schema": _EVENT}},
}
