"""The thinking part of a sample: the record's own reasoning, else what its labels say; cut at a sentence.

An answer is never cut in two to pass for thinking.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace

from so8t_helpers.dataset.quarantine import RejectedError
from so8t_helpers.dataset.records import Record
from so8t_helpers.thinking.format import ThinkText, decision_of, with_decision

LABEL_NAMES = {"ALLOW": "許可", "ESCALATION": "エスカレーション", "DENY": "不許可", "REFUSE": "拒否"}
POLICIES = {
    "ALLOW": "回答してよい。",
    "ESCALATION": "自分では決めず、担当者に引き継ぐ。",
    "DENY": "方針により応じない。",
    "REFUSE": "危険なため拒否する。",
}
_SENTENCE_END = re.compile(r"(?<=[。！？!?\n])|(?<=\. )")


def build(record: Record, style: str, reasoning: str, harm: str | None) -> ThinkText:
    """Return the sample's assistant turn in parts; where `reasoning` is "", its labels make the thinking.

    Raises:
        RejectedError: where the reasoning states another decision than the record's label.
    """
    private = "\n".join(filter(None, (reasoning, record.safety, record.policy)))
    stated = _decision(private)
    if stated not in {None, record.label}:
        raise RejectedError("label_conflict", f"the reasoning decides {stated}, the label is {record.label}")
    if style == "quadruple":
        return ThinkText(
            style,
            record.answer,
            task=_undecided(reasoning) or about(record) or "依頼に答える。",
            safety=record.safety or safety(record, harm),
            policy=_decided(record.policy or POLICIES[record.label], record.label),
        )
    thinking = private or "\n".join(filter(None, (about(record), safety(record, harm))))
    return ThinkText(style, record.answer, _decided(thinking, record.label))


def about(record: Record) -> str:
    """Say what the record says of its task and domain; "" where it says nothing."""
    named = (("依頼の種類", record.task), ("分野", record.domain))
    return "\n".join(f"{name}: {value}" for name, value in named if value)


def safety(record: Record, harm: str | None) -> str:
    """Say what the record's label and flags say about safety."""
    flagged = f"有害な内容の印: {harm}\n" if harm else ""
    return f"{flagged}安全性のラベル: {record.label}（{LABEL_NAMES[record.label]}）"


def private_text(text: ThinkText) -> str:
    """Return all that is private in a turn, as `format.parse` gives it."""
    return text.thinking if text.style == "seed" else f"{text.task}\n{text.safety}\n{text.policy}"


def cut(text: ThinkText, fits: Callable[[ThinkText], bool], label: str) -> ThinkText | None:
    """Shorten the thinking to the most leading sentences that fit; None where not even one does."""
    whole = _undecided(text.thinking if text.style == "seed" else text.task)
    sentences = [s for s in _SENTENCE_END.split(whole) if s]
    low, high = 0, len(sentences) - 1
    best = None
    while low < high:
        middle = (low + high + 1) // 2
        thought = "".join(sentences[:middle]).strip()
        changed = {"thinking": _decided(thought, label)} if text.style == "seed" else {"task": thought}
        shorter = replace(text, **changed)
        if fits(shorter):
            low, best = middle, shorter
        else:
            high = middle - 1
    return best


def _decision(thinking: str) -> str | None:
    # No other character folds to 判, and folding a whole text costs much.
    return decision_of(thinking) if "判" in thinking else None


def _decided(thinking: str, label: str) -> str:
    return thinking if _decision(thinking) == label else with_decision(thinking, label)


def _undecided(thinking: str) -> str:
    before, _, last = thinking.rstrip().rpartition("\n")
    return before if _decision(last) else thinking
