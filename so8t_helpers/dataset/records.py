"""Records as they occur: every known shape becomes one `Record`, anything else a reason for quarantine."""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass
from typing import Any

import orjson

from so8t_helpers.dataset.quarantine import RejectedError
from so8t_helpers.dataset.worked import split_solution
from so8t_helpers.thinking.format import LABELS, contains_markers, parse
from so8t_helpers.thinking.language import language_of
from so8t_helpers.thinking.spelling import ENGLISH_THINKING

FIELDS: dict[str, tuple[str, ...]] = {
    "question": ("instruction", "prompt", "question", "query", "指示", "質問"),
    "given": ("input", "context", "入力"),
    "answer": ("output", "answer", "response", "completion", "出力", "回答"),
    "reasoning": (
        *("reasoning", "thinking", "rationale", "thought", "chain_of_thought", "reasoning_content", "cot"),
        *("思考", "理由"),
    ),
    "label": ("label", "decision", "safety_label", "safety_judgment", "four_class_label", "判定", "ラベル"),
    "flag": ("nsfw", "is_nsfw", "nsfw_label", "unsafe", "is_unsafe", "harmful", "flagged", "toxic"),
    "messages": ("messages", "conversations"),
    "text": ("text",),
    "topic": ("title", "keyword"),
    "system": ("system", "system_prompt"),
    "task": ("task", "task_type"),
    "domain": ("domain", "category", "field"),
    "licence": ("licence", "license"),
    "url": ("url", "source_url"),
    "check": ("check",),
    "group": ("group", "group_id"),
}
TEXT_FIELDS = ("question", "answer", "reasoning", "safety", "policy", "system", "task", "domain")
CHECK_KINDS = ("exact", "contains", "number", "refusal")
_TRUE_WORDS = {"true", "yes", "1", "nsfw", "unsafe", "harmful", "toxic"}
_CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\u2028\u2029\ufeff]")
_Picked = dict[str, tuple[str, Any]]
# Records of one file have few sets of keys: what each set can fill, and from which keys, is worked out once.
_layouts: dict[tuple[str, ...], tuple[tuple[str, tuple[str, ...]], ...]] = {}
_MOST_LAYOUTS, _LONGEST_KEYS = 1000, 1000


@dataclass(slots=True)
class Record:
    """One record in the one shape that the rest of the stage reads.

    `safety` and `policy` are parts of a ready quadruple format, whose task part is then the `reasoning`.
    """

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
    safety: str = ""
    policy: str = ""
    language: str = "ja"  # of question and answer as they came, see `language_of`
    group: str | None = None  # a key: records that have the same one stay on one side of the split
    context: str = ""  # the end of `question`, where it was given apart


def parse_json(raw: bytes | None, encoding: str = "utf-8") -> dict[str, Any]:
    """Parse one line, None being one that is too long; control characters are taken out of its texts.

    Raises:
        RejectedError: no or too long a line, not valid in the file's encoding, not JSON, or not an object.
    """
    if raw is None:
        raise RejectedError("line_too_long", "longer than 10 MiB")
    if not raw or raw.isspace():
        raise RejectedError("empty_line", "the line is empty")
    try:
        if encoding != "utf-8":
            raw = raw.decode(encoding).encode()
        data = orjson.loads(raw)
    except UnicodeDecodeError as error:
        raise RejectedError("bad_encoding", f"not valid {encoding} at byte {error.start}") from None
    except orjson.JSONDecodeError as error:
        # The message quotes nothing of the line: it is a position and a kind of error.
        raise RejectedError("bad_json", f"not valid JSON: {error.msg} at column {error.colno}") from None
    if type(data) is not dict:
        raise RejectedError("not_an_object", f"expected a JSON object, got {type(data).__name__}")
    if _may_hold_controls(raw):
        try:
            data = _without_controls(data)
        except RecursionError:
            raise RejectedError("bad_json", "nested too deeply") from None
    return data


def normalise(data: dict[str, Any]) -> Record:
    """Turn an object of a known shape into a `Record`: fields by the names in `FIELDS`, or chat `messages`.

    A worked problem (see `worked`) has its reasoning and its check in the answer, and is allowed.

    Raises:
        RejectedError: unknown shape, wrong type, empty part, unknown label.
    """
    picked = _pick(data)
    system, reasoning = _text(picked, "system"), _text(picked, "reasoning")
    if "messages" in picked:
        system, question, answer, own = _from_messages(picked["messages"][1])
        context, reasoning = "", reasoning or own
    else:
        question, answer, context = _from_fields(picked)
    check = _check(picked)
    if not reasoning and (worked := split_solution(answer)) is not None:
        reasoning, answer = worked
        check = check or {"kind": "number", "value": answer}
        picked.setdefault("label", ("label", "ALLOW"))
    safety = policy = ""
    ready = parse(answer) if answer.startswith(ENGLISH_THINKING) else None
    if contains_markers(answer) or (
        ready and ready.well_formed
    ):  # it is in a think format already, and must build back to itself
        ready = ready or parse(answer)
        if ready.final is None or not ready.well_formed:
            raise RejectedError("broken_format", "the answer has think markers but is not well formed")
        answer, reasoning = ready.final, ready.task or ready.thinking
        safety, policy = ready.safety, ready.policy
    if not question:
        raise RejectedError("empty_question", "the record has no question")
    if not answer:
        raise RejectedError("empty_answer", "the record has no answer")
    if "label" not in picked:
        raise RejectedError("missing_label", "expected `label`: ALLOW, ESCALATION, DENY or REFUSE")
    label = parse_label(picked["label"][1])
    if label is None:
        key = picked["label"][0]
        raise RejectedError("unknown_label", f"`{key}` is none of ALLOW, ESCALATION, DENY, REFUSE")
    task, domain, licence, url = (
        _text(picked, name) or None for name in ("task", "domain", "licence", "url")
    )
    return Record(
        question,
        answer,
        label,
        reasoning,
        system or None,
        task,
        domain,
        licence,
        url,
        check,
        _flag(picked),
        safety,
        policy,
        language_of(question, answer),
        str(picked["group"][1]) if "group" in picked else None,
        context,
    )


def labelled_text(raw: bytes | None, encoding: str) -> tuple[str, bool]:
    """Return the text of a record for the classifier's training, and whether it says it is unsafe.

    Raises:
        RejectedError: not a record, no text, or no flag.
    """
    picked = _pick(parse_json(raw, encoding))
    if "flag" not in picked:
        raise RejectedError("missing_label", "expected a flag such as `nsfw`: true or false")
    text = "\n".join(filter(None, (_text(picked, name) for name in ("question", "given", "text", "answer"))))
    if not text:
        raise RejectedError("unknown_shape", "expected `text`, or `instruction` with `output`")
    return text, _flag(picked) is not None


def _pick(data: dict[str, Any]) -> _Picked:
    """Return field -> (key, value): of several names of one field, the first in `FIELDS` that has a value."""
    keys = tuple(data)
    layout = _layouts.get(keys)
    if layout is None:
        found = ((field, tuple(key for key in names if key in data)) for field, names in FIELDS.items())
        layout = tuple((field, held) for field, held in found if held)
        if len(_layouts) < _MOST_LAYOUTS and sum(map(len, keys)) < _LONGEST_KEYS:
            _layouts[keys] = layout
    picked: _Picked = {}
    for field, candidates in layout:
        for key in candidates:
            if (value := data[key]) is not None and value != "":
                picked[field] = (key, value)
                break
    return picked


def _from_fields(picked: _Picked) -> tuple[str, str, str]:
    """Return question, answer and context: what the question is about, and ends with."""
    question, answer = _text(picked, "question"), _text(picked, "answer")
    if question:
        given = _text(picked, "given")
        return (f"{question}\n{given}" if given else question), answer, given
    if "text" in picked:
        topic = _text(picked, "topic")
        if not topic:
            raise RejectedError("unknown_shape", "`text` needs `title` or `keyword` to make a question")
        return f"「{topic}」について説明してください。", answer or _text(picked, "text"), ""
    if answer:
        return "", answer, ""
    expected = "`instruction` with `output`, `messages`, or `text` with `title` or `keyword`"
    raise RejectedError("unknown_shape", f"expected {expected}")


def _from_messages(messages: Any) -> tuple[str, str, str, str]:
    """Return a chat's system text ("" where it has none), question, answer and reasoning ("" likewise)."""
    if type(messages) is not list or not all(type(m) is dict for m in messages):
        raise RejectedError("wrong_type", "`messages` must be a list of objects")
    roles, texts, reasoning = [], [], ""
    for message in messages:
        role = message.get("role", message.get("from"))
        roles.append({"human": "user", "gpt": "assistant"}.get(role, role) if type(role) is str else "")
        texts.append(_as_text("content", message.get("content", message.get("value")) or ""))
        reasoning = _text(_pick(message), "reasoning") or reasoning
    if roles == ["user", "assistant"]:
        roles, texts = ["system", *roles], ["", *texts]
    if roles != ["system", "user", "assistant"]:
        detail = f"`messages` must be [system,] user, assistant; this one has {len(roles)} turns"
        raise RejectedError("unknown_shape", detail)
    return texts[0], texts[1], texts[2], reasoning


def _text(picked: _Picked, field: str) -> str:
    """Return a field's text, "" where the record has none."""
    key, value = picked.get(field, ("", ""))
    return value.strip() if type(value) is str else _as_text(key, value)


def _as_text(key: str, value: Any) -> str:
    """Return a value's text, stripped; the text parts of chat contents are joined.

    Raises:
        RejectedError: for a value that is not text.
    """
    if type(value) is list and all(type(v) is dict and type(v.get("text")) is str for v in value):
        value = "\n".join(v["text"] for v in value)
    if type(value) is not str:
        raise RejectedError("wrong_type", f"`{key}` must be text, got {type(value).__name__}")
    return value.strip()


def _flag(picked: _Picked) -> str | None:
    """Return the key by which the record itself says that it is unsafe."""
    if "flag" not in picked:
        return None
    key, value = picked["flag"]
    said = value.strip().lower() in _TRUE_WORDS if type(value) is str else value is True
    return key if said or (type(value) in {int, float} and value >= 0.5) else None


def _check(picked: _Picked) -> dict[str, str] | None:
    if "check" not in picked:
        return None
    value = picked["check"][1]
    if type(value) is not dict or value.get("kind") not in CHECK_KINDS:
        kinds = ", ".join(CHECK_KINDS)
        raise RejectedError("wrong_type", f"`check` must be an object with a kind of {kinds}")
    return {"kind": value["kind"], "value": str(value.get("value", ""))}


def _may_hold_controls(raw: bytes) -> bool:
    """Look for how a control character can stand in a line of JSON, escaped or not; most lines hold none."""
    escaped = b"\\" in raw and (b"\\u" in raw or b"\\r" in raw or b"\\b" in raw or b"\\f" in raw)
    separators = b"\xe2" in raw and b"\xe2\x80" in raw
    mark = b"\xef" in raw and b"\xef\xbb\xbf" in raw
    return escaped or separators or mark or b"\x7f" in raw


def _without_controls(value: Any) -> Any:
    if type(value) is str:
        return _CONTROL.sub("", value.replace("\r\n", "\n").replace("\r", "\n"))
    if type(value) is list:
        return [_without_controls(v) for v in value]
    if type(value) is dict:
        return {key: _without_controls(v) for key, v in value.items()}
    return value


_SPELLINGS = {
    "ALLOW": "allow allowed permit permitted safe ok accept 許可 許容 可 安全 承認",
    "ESCALATION": "escalation escalate escalated エスカレーション エスカレート 要確認 上申 引き継ぎ 保留",
    "DENY": "deny denied disallow disallowed forbid forbidden block blocked 不許可 禁止 否認 却下 否",
    "REFUSE": "refuse refused refusal reject rejected 拒否 拒絶 お断り 断る",
}
# Numbers follow the order in which the seed names the labels.
KNOWN: dict[str, str] = {
    word: label for label, words in _SPELLINGS.items() for word in (*words.split(), label.lower())
} | {str(number): label for number, label in enumerate(LABELS)}


def parse_label(value: Any) -> str | None:
    """Return the label that `value` spells, or None where it spells none; 0 to 3 follow `LABELS`."""
    if isinstance(value, str):
        if value in LABELS:
            return value
        return KNOWN.get(unicodedata.normalize("NFKC", value).strip().strip("[]「」<>").lower())
    whole = type(value) is int or (isinstance(value, float) and value.is_integer())
    return KNOWN.get(str(int(value))) if whole else None
