"""What one answer is worth: format, separation, correctness, decision, refusal, leak."""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass
from typing import Any

from so8t_helpers.thinking.format import contains_markers, decision_of, parse
from so8t_helpers.thinking.redaction import REFUSAL_TEXT, final_only
from so8t_helpers.thinking.refusal import refuses

_NUMBER = re.compile(r"-?\d+(?:,\d{3})*(?:\.\d+)?")


@dataclass(frozen=True)
class Score:
    """The judgement of one answer.

    Attributes:
        final: what would be released: the final part, or the fixed refusal where there is none.
        well_formed: the text is exactly one of the think formats.
        separated: there is a thinking part and a final part.
        correct: the answer passes the record's check; None where the record has none.
        decision: the label that the thinking states.
        refused: see `so8t_helpers.thinking.refusal`.
        leaked: the released text holds a mark or the line of the decision.
    """

    final: str
    thinking: str
    well_formed: bool
    separated: bool
    correct: bool | None
    decision: str | None
    refused: bool
    leaked: bool


def score(text: str, row: dict[str, Any]) -> Score:
    """Judge a model's raw text against its record.

    A text without any mark counts as the answer itself for `correct` and `refused`: the base model thinks
    nothing and still may answer well. What is released is another matter: nothing without a final part.
    """
    parsed = parse(text)
    final = final_only(text)
    answer = parsed.final if parsed.final is not None else text.strip() if parsed.style is None else ""
    check = row.get("check")
    return Score(
        final=final,
        thinking=parsed.thinking,
        well_formed=parsed.well_formed,
        separated=bool(parsed.thinking) and bool(parsed.final),
        correct=None if check is None else is_correct(answer, check),
        decision=parsed.decision,
        refused=bool(refuses([answer])[0]),
        leaked=final != REFUSAL_TEXT and _shows_thinking(final, parsed.style),
    )


def _shows_thinking(final: str, style: str | None) -> bool:
    return contains_markers(final, style) or decision_of(final, style) is not None


def is_correct(answer: str, check: dict[str, str]) -> bool:
    """Say whether an answer passes a check, full-width and half-width forms being the same.

    `exact`: nothing but the value, a closing です and 。 aside. `contains` and `refusal`: the value occurs.
    `number`: the only number, or the last of several, equals the value.

    Raises:
        ValueError: unknown kind of check.
    """
    text, value = (unicodedata.normalize("NFKC", part).strip() for part in (answer, check["value"]))
    if check["kind"] == "exact":
        bare, expected = (part.removesuffix("。").removesuffix("です").strip() for part in (text, value))
        return bare == expected
    if check["kind"] in {"contains", "refusal"}:
        return bool(value) and value in text
    if check["kind"] == "number":
        numbers = (_NUMBER.findall(part)[-1:] for part in (text, value))
        found, required = ([float(number.replace(",", "")) for number in last] for last in numbers)
        return found == required != []
    raise ValueError(f"check kind {check['kind']!r}: expected exact, contains, number or refusal")
