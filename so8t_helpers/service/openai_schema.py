"""What of OpenAI's chat completions is taken and given; what is not named here is ignored."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, create_model

from so8t_helpers.service.draft import Finish
from so8t_helpers.service.schema import Strict, Whole
from so8t_helpers.settings import ServeSettings


def _truth(value: object) -> object:
    """To Python 0 is False; to JSON Schema it is not."""
    if not isinstance(value, bool):
        raise ValueError("Input should be a valid boolean")
    return value


_Truth = BeforeValidator(_truth)
_StopText = Annotated[str, Field(min_length=1, max_length=64)]


class _Open(BaseModel):
    """Base of what a client sends: it may say more than is understood; types are not converted."""

    model_config = ConfigDict(strict=True)


class StreamOptions(_Open):
    """Of a stream."""

    include_usage: bool | None = None


class ResponseFormat(_Open):
    """Of an answer."""

    type: Literal["text"]


class ChatQuestion(_Open):
    """A chat; the service's own limits are its subclass's."""

    model: str
    messages: list[Any]
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    # Most that are wanted: the service's own limit holds besides.
    max_tokens: Annotated[int, Field(ge=1), Whole] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1), Whole] | None = None
    temperature: Annotated[float, Field(ge=0.0, le=2.0)] | None = None
    seed: Annotated[int, Field(ge=0, le=2**31 - 1), Whole] | None = None
    stop: _StopText | Annotated[list[_StopText], Field(max_length=4)] | None = None
    user: Annotated[str, Field(max_length=128)] | None = None
    # Another value would ask for what is not given: an error is better than another answer.
    n: Annotated[int, Field(ge=1, le=1), Whole] | None = None
    logprobs: Annotated[Literal[False], _Truth] | None = None
    response_format: ResponseFormat | None = None
    # `tools` may be offered, and none is ever used: that is the model's choice, unless it is told to.
    tool_choice: Literal["auto", "none"] | None = None


def chat_model(limits: ServeSettings, model: str) -> type[ChatQuestion]:
    """Return the request body with a service's limits in it, so that the description states them."""
    text = Annotated[str, Field(min_length=1, max_length=limits.max_query_chars, pattern=r"\S")]
    kind: Any = Literal["text"]
    part = create_model("TextPart", __base__=_Open, type=(kind, ...), text=(text, ...))
    content: Any = text | Annotated[list[part], Field(min_length=1, max_length=16)]  # type: ignore[valid-type]
    roles: Any = Literal["user", "assistant"]
    if limits.client_system_turns:
        roles = Literal["user", "assistant", "system", "developer"]
    name: Any = Literal[model]
    message: Any = create_model("Message", __base__=_Open, role=(roles, ...), content=(content, ...))
    return create_model(
        "ChatRequest",
        __base__=ChatQuestion,
        __doc__="A chat whose last turn is the user's. Fields that are not named are ignored.",
        model=(name, ...),
        messages=(Annotated[list[message], Field(min_length=1, max_length=64)], ...),
    )


class ChatMessage(Strict):
    """The final part."""

    role: Literal["assistant"] = "assistant"
    content: str


class Choice(Strict):
    """The one answer."""

    index: Literal[0] = 0
    message: ChatMessage
    finish_reason: Finish


class Usage(Strict):
    """Tokens as the engine counts them; those of the thinking, which is not sent, are among them."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class ChatAnswer(Strict):
    """An answer in OpenAI's form."""

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[Choice]
    usage: Usage


class Model(Strict):
    """The one model."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: Literal["so8t"] = "so8t"


class Models(Strict):
    """The models that answer here."""

    object: Literal["list"] = "list"
    data: list[Model]
