"""Records as they occur: every known shape becomes one `Record`, anything else a reason for quarantine."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Any

import orjson

from so8t_helpers.dataset.fields import Given, Picked, column_of, pick, text_of
from so8t_helpers.dataset.labels import NUMBERS, parse_label
from so8t_helpers.dataset.quarantine import RejectedError
from so8t_helpers.dataset.shapes import Said, read_shape, split_thought
from so8t_helpers.dataset.worked import split_solution
from so8t_helpers.settings.inputs import value_key
from so8t_helpers.thinking.format import contains_markers, parse
from so8t_helpers.thinking.language import language_of
from so8t_helpers.thinking.spelling import ENGLISH_THINKING

TEXT_FIELDS = ("question", "answer", "reasoning", "safety", "policy", "system", "task", "domain")
CHECK_KINDS = ("exact", "contains", "number", "refusal")
_TRUE_WORDS = {"true", "yes", "1", "nsfw", "unsafe", "harmful", "toxic"}
_CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\u2028\u2029\ufeff]")


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
    # The turns before the question, the user's and the assistant's in turn.
    history: tuple[str, ...] = ()
    group: str | None = None  # a key: records that have the same one stay on one side of the split
    source: str | None = None  # where the entry of its file says that it comes from
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
        if not _is_text(raw):
            raise RejectedError("bad_encoding", "bytes that are not valid in the file's encoding") from None
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


def normalise(data: dict[str, Any], given: Given | None = None) -> Record:
    """Turn an object of a known shape (see `shapes`) into a `Record`, fields by the names in `FIELDS`.

    A worked problem (see `worked`) has its reasoning and its check in the answer, and is allowed. `given` is
    what the record's file is said to be.

    Raises:
        RejectedError: unknown shape, wrong type, empty part, unknown label.
    """
    picked = pick(data if given is None else given.renamed(data))
    said = read_shape(picked)
    thought, answer = split_thought(said.answer)
    reasoning = text_of(picked, "reasoning") or said.reasoning or thought
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
    if not said.question:
        raise RejectedError("empty_question", "the record has no question")
    if not answer:
        raise RejectedError("empty_answer", "the record has no answer")
    system, task, domain, licence, url = (
        text_of(picked, name) or None for name in ("system", "task", "domain", "licence", "url")
    )
    return Record(
        question=said.question,
        answer=answer,
        label=_label(picked, given),
        reasoning=reasoning,
        system=said.system or system,
        task=task,
        domain=domain,
        licence=licence or (given.licence if given else None),
        url=url,
        check=check,
        flagged=_flag(picked),
        safety=safety,
        policy=policy,
        language=language_of(said.question, answer),
        history=said.history,
        group=_group(data, picked, said, given),
        source=given.source if given else None,
        context=said.context,
    )


def _label(picked: Picked, given: Given | None) -> str:
    """Return the label: the record's own, as the entry of its file says that its values are to be read."""
    key, value = picked.get("label", ("label", None))
    if given is not None and given.labels is not None:
        name = value_key(value)
        own = value if type(value) is str and parse_label(value) else None
        value = given.label if name is None else given.labels.get(name, own)
        if value is None and name is not None:
            raise RejectedError("unknown_label", f"a `{key}` that `labels` of its entry does not name")
    elif given is not None and given.label is not None:
        value = given.label
    if value is None:
        raise RejectedError("missing_label", "expected `label`: ALLOW, ESCALATION, DENY or REFUSE")
    if (label := parse_label(value)) is None:
        number = type(value) in {int, float} or (type(value) is str and value.strip().isdigit())
        hint = f"; it is a number: {NUMBERS}" if number else ""
        raise RejectedError("unknown_label", f"`{key}` is none of ALLOW, ESCALATION, DENY, REFUSE{hint}")
    return label


def _group(data: dict[str, Any], picked: Picked, said: Said, given: Given | None) -> str | None:
    """Return what other records may share: the entry's column, its article, its dialogue's opening."""
    if given is not None and given.group is not None:
        value = column_of(data, given.group)
    else:
        value = picked["group"][1] if "group" in picked else None
    empty = value is None or (type(value) is float and math.isnan(value)) or not str(value).strip()
    return (said.topic or "\n".join(said.history[:2]) or None) if empty else str(value)


def labelled_text(raw: bytes | None, encoding: str) -> tuple[str, bool]:
    """Return the text of a record for the classifier's training, and whether it says it is unsafe.

    Raises:
        RejectedError: not a record, no text, or no flag.
    """
    picked = pick(parse_json(raw, encoding))
    if "flag" not in picked:
        raise RejectedError("missing_label", "expected a flag such as `nsfw`: true or false")
    text = "\n".join(
        filter(
            None, (text_of(picked, name) for name in ("instruction", "question", "given", "text", "answer"))
        )
    )
    if not text:
        raise RejectedError("unknown_shape", "expected `text`, or `instruction` with `output`")
    return text, _flag(picked) is not None


def _flag(picked: Picked) -> str | None:
    """Return the key by which the record itself says that it is unsafe."""
    if "flag" not in picked:
        return None
    key, value = picked["flag"]
    said = value.strip().lower() in _TRUE_WORDS if type(value) is str else value is True
    return key if said or (type(value) in {int, float} and value >= 0.5) else None


def _check(picked: Picked) -> dict[str, str] | None:
    if "check" not in picked:
        return None
    value = picked["check"][1]
    if type(value) is not dict or value.get("kind") not in CHECK_KINDS:
        kinds = ", ".join(CHECK_KINDS)
        raise RejectedError("wrong_type", f"`check` must be an object with a kind of {kinds}")
    return {"kind": value["kind"], "value": str(value.get("value", ""))}


def _is_text(raw: bytes) -> bool:
    try:
        raw.decode()
    except UnicodeDecodeError:
        return False
    return True


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
