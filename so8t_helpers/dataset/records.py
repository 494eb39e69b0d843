"""Records as they occur: every known shape becomes one `Record`, anything else a reason for quarantine."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import orjson

from so8t_helpers import chat_format
from so8t_helpers.dataset.labels import parse_label

REASONING_KEYS = (
    "reasoning",
    "thinking",
    "rationale",
    "thought",
    "chain_of_thought",
    "reasoning_content",
    "cot",
    "思考",
    "理由",
)
LABEL_KEYS = ("label", "decision", "safety_label", "safety_judgment", "four_class_label", "判定", "ラベル")
ANSWER_KEYS = ("output", "answer", "response", "completion", "出力", "回答")
QUESTION_KEYS = ("instruction", "prompt", "question", "query", "指示", "質問")
FLAG_KEYS = ("nsfw", "is_nsfw", "nsfw_label", "unsafe", "is_unsafe", "harmful", "flagged", "toxic")
CHECK_KINDS = ("exact", "contains", "number", "refusal")
_CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\u2028\u2029\ufeff]")


class RejectedError(Exception):
    """A record that cannot become a sample: a reason from `REASONS` and a detail without its content."""

    def __init__(self, reason: str, detail: str):
        super().__init__(reason, detail)
        self.reason, self.detail = reason, detail


@dataclass(slots=True)
class Record:
    """One record in the one shape that the rest of the stage reads."""

    question: str
    answer: str
    label: str
    reasoning: str
    system: str | None
    task: str | None
    domain: str | None
    licence: str | None
    url: str | None
    check: dict[str, str] | None
    flagged: str | None
    parts: chat_format.ThinkText | None


def parse_json(text: bytes | str) -> dict[str, Any]:
    """Parse one line.

    Raises:
        RejectedError: not JSON, or not an object.
    """
    try:
        data = orjson.loads(text)
    except orjson.JSONDecodeError as error:
        # The message may quote nothing of the line: it is a position and a kind of error.
        raise RejectedError("bad_json", f"not valid JSON: {error.msg} at column {error.colno}") from None
    if type(data) is not dict:
        raise RejectedError("not_an_object", f"expected a JSON object, got {type(data).__name__}")
    return data


def normalise(data: dict[str, Any]) -> Record:
    """Turn an object of a known shape into a `Record`.

    Shapes: `instruction`/`input`/`output` (and the usual other names), `text` with `title` or `keyword`,
    chat `messages`; the answer may already be in either think format.

    Raises:
        RejectedError: unknown shape, wrong type, empty part, unknown label.
    """
    if "messages" in data or "conversations" in data:
        system, question, answer, reasoning = _from_messages(data)
    else:
        system, (question, answer), reasoning = (
            _text(data, ("system", "system_prompt")),
            _from_fields(data),
            "",
        )
    reasoning = _text(data, REASONING_KEYS) or reasoning
    parts = None
    if chat_format.contains_markers(answer):
        parts = _ready_format(answer)
        answer = parts.final
        reasoning = parts.thinking or "\n".join((parts.task, parts.safety, parts.policy))
    if not question:
        raise RejectedError("empty_question", "the record has no question")
    if not answer:
        raise RejectedError("empty_answer", "the record has no answer")
    return Record(
        question,
        answer,
        _label(data),
        reasoning,
        system or None,
        _text(data, ("task", "task_type")) or None,
        _text(data, ("domain", "category", "field")) or None,
        _text(data, ("licence", "license")) or None,
        _text(data, ("url", "source_url")) or None,
        _check(data.get("check")),
        _flag(data),
        parts,
    )


def _from_fields(data: dict[str, Any]) -> tuple[str, str]:
    answer = _text(data, ANSWER_KEYS)
    question = _text(data, QUESTION_KEYS)
    if question:
        given = _text(data, ("input", "context", "入力"))
        return (f"{question}\n{given}" if given else question), answer
    if "text" in data:
        topic = _text(data, ("title", "keyword"))
        if not topic:
            raise RejectedError("unknown_shape", "`text` needs `title` or `keyword` to make a question")
        return f"「{topic}」について説明してください。", answer or _text(data, ("text",))
    if any(key in data for key in QUESTION_KEYS):
        return "", answer
    raise RejectedError(
        "unknown_shape",
        "expected `instruction` with `output`, `messages`, or `text` with `title` or `keyword`",
    )


def _from_messages(data: dict[str, Any]) -> tuple[str, str, str, str]:
    """Read a chat of one user turn and one assistant turn, with a system turn before or not."""
    messages = data.get("messages", data.get("conversations"))
    if not isinstance(messages, list) or not all(isinstance(m, dict) for m in messages):
        raise RejectedError("wrong_type", "`messages` must be a list of objects")
    roles, texts, reasoning = [], [], ""
    for message in messages:
        role = _text(message, ("role", "from"))
        roles.append({"human": "user", "gpt": "assistant"}.get(role, role))
        texts.append(_text(message, ("content", "value")))
        reasoning = _text(message, REASONING_KEYS) or reasoning
    if roles == ["system", "user", "assistant"]:
        return texts[0], texts[1], texts[2], reasoning
    if roles == ["user", "assistant"]:
        return "", texts[0], texts[1], reasoning
    raise RejectedError(
        "unknown_shape", f"`messages` must be [system,] user, assistant; this one has {len(roles)} turns"
    )


def _ready_format(answer: str) -> chat_format.ThinkText:
    """Take apart an answer that already is in a think format; it must build back to itself."""
    parsed = chat_format.parse(answer)
    if parsed.style is None or parsed.final is None or not parsed.well_formed:
        raise RejectedError("broken_format", "the answer has think markers but is not well formed")
    if parsed.style == "seed":
        return chat_format.ThinkText("seed", parsed.final, parsed.thinking)
    return chat_format.ThinkText("quadruple", parsed.final, "", parsed.task, parsed.safety, parsed.policy)


def _label(data: dict[str, Any]) -> str:
    for key in LABEL_KEYS:
        if data.get(key) is not None:
            label = parse_label(data[key])
            if label is None:
                raise RejectedError("unknown_label", f"`{key}` is none of ALLOW, ESCALATION, DENY, REFUSE")
            return label
    raise RejectedError("missing_label", f"expected `label` (or one of {', '.join(LABEL_KEYS[1:])})")


def _text(data: dict[str, Any], keys: tuple[str, ...]) -> str:
    """Return the first of `keys` that has text, stripped; "" where none has.

    Raises:
        RejectedError: for a value that is not text (lists of text parts, as in chat records, are joined).
    """
    for key in keys:
        value = data.get(key)
        if value is None:
            continue
        if type(value) is list and all(type(v) is dict and type(v.get("text")) is str for v in value):
            value = "\n".join(v["text"] for v in value)
        if type(value) is not str:
            raise RejectedError("wrong_type", f"`{key}` must be text, got {type(value).__name__}")
        value = value.replace("\r\n", "\n").strip()
        if _CONTROL.search(value):
            value = _CONTROL.sub("", value).strip()
        if value:
            return str(value)
    return ""


def _flag(data: dict[str, Any]) -> str | None:
    """Return the key by which the record itself says that it is unsafe."""
    for key in FLAG_KEYS:
        value: Any = data.get(key)
        if value is True or (type(value) in (int, float) and value >= 0.5):
            return key
        if type(value) is str and value.strip().lower() in {
            "true",
            "yes",
            "1",
            "nsfw",
            "unsafe",
            "harmful",
            "toxic",
        }:
            return key
    return None


def _check(value: Any) -> dict[str, str] | None:
    if value is None:
        return None
    if type(value) is not dict or value.get("kind") not in CHECK_KINDS:
        raise RejectedError(
            "wrong_type", f"`check` must be an object with a kind of {', '.join(CHECK_KINDS)}"
        )
    return {"kind": value["kind"], "value": str(value.get("value", ""))}
