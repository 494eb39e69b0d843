"""What each error status means, for the OpenAPI description."""

from __future__ import annotations

from typing import Any

from so8t_helpers.service.schema import ErrorAnswer

# What may come back instead of an answer to a question.
ASKING = (400, 401, 408, 413, 422, 429, 500, 502, 503, 504)
_REASONS = {
    400: "The body is no text.",
    401: "No valid bearer token.",
    408: "The request did not come in time.",
    411: "No Content-Length, or a Transfer-Encoding.",
    413: "Body or question too long.",
    421: "Not a loopback name.",
    422: "Not a valid question.",
    429: "Too many requests from this address; see Retry-After.",
    500: "Internal error.",
    502: "The engine failed.",
    503: "The queue or the house is full, see Retry-After; or the engine has failed.",
    504: "No answer in time.",
}
# Said outright where the answer itself is not JSON.
JSON_ERROR = {"content": {"application/json": {"schema": {"$ref": "#/components/schemas/ErrorAnswer"}}}}


def responses(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """Return the description of those error answers, and of the two that any request may get."""
    return {s: {"model": ErrorAnswer, "description": _REASONS[s]} for s in (411, 421, *statuses)}
