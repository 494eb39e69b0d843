"""What goes in and out of /think and /healthz, as the OpenAPI description tells it."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, create_model

from so8t_helpers.service.draft import Decision
from so8t_helpers.settings import ServeSettings


def _whole(value: object) -> object:
    """JSON Schema counts 79.0 as an integer, so the service takes it as one."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


Whole = BeforeValidator(_whole)


class Strict(BaseModel):
    """Base of all bodies: unknown fields are errors, types are not converted."""

    model_config = ConfigDict(extra="forbid", strict=True)


class ThinkAnswer(Strict):
    """An answer: of the model's text the final part alone, or the fixed refusal."""

    request_id: str
    answer: str
    decision: Decision = Field(
        description="What the model stated; ESCALATION where it stated nothing, REFUSE for the refusal: "
        "a model's word, which a question can turn. Where serve.on_deny withholds what the model denied: "
        "REFUSE or ESCALATION."
    )


class ErrorBody(Strict):
    """Why a request got no answer."""

    code: str
    message: str
    request_id: str


class ErrorAnswer(Strict):
    """Envelope of every error."""

    error: ErrorBody


class Health(Strict):
    """State of the service; `audit_head` is what `so8t verify` holds the audit log against."""

    status: Literal["ok"] = "ok"
    engine: str
    model: str
    model_sha256: str
    audit_head: str


class ThinkOptions(Strict):
    """How to answer; the service's own limits are its subclass's."""

    stream: Annotated[bool, Field(description="Send server-sent events while the answer is written.")] = False
    max_tokens: Annotated[int, Whole] | None = None
    temperature: Annotated[float, Field(ge=0.0, le=2.0)] = 0.0
    seed: Annotated[int, Field(ge=0, le=2**31 - 1), Whole] = 0


class ThinkQuestion(Strict):
    """A question; the service's own limits are its subclass's."""

    user_id: Annotated[str, Field(pattern=r"^[A-Za-z0-9._@+-]{1,128}$", examples=["taro"])]
    query: str
    options: ThinkOptions = ThinkOptions()


def question_model(limits: ServeSettings) -> type[ThinkQuestion]:
    """Return the request body with a service's limits in it, so that the description states them."""
    limit = Annotated[int, Field(ge=1, le=limits.max_new_tokens), Whole] | None
    options = create_model(
        "ThinkOptionsLimited", __base__=ThinkOptions, __doc__="How to answer.", max_tokens=(limit, None)
    )
    size = {"min_length": 1, "max_length": limits.max_query_chars}
    query = Annotated[str, Field(**size, pattern=r"\S", examples=["9×8は?"])]
    return create_model(
        "ThinkRequest",
        __base__=ThinkQuestion,
        __doc__="A question and how to answer it.",
        query=(query, ...),
        options=(options, options()),
    )
