"""The thinking part of a sample: the record's own reasoning, else what its labels say; cut at a sentence.

What we say ourselves is in the record's language: English where neither question nor answer holds Japanese.
An answer is never cut in two to pass for thinking.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace

from so8t_helpers.dataset.quarantine import RejectedError
from so8t_helpers.dataset.records import Record
from so8t_helpers.thinking.format import HEADED, ThinkText, decision_of, ends_decided, with_decision


@dataclass(frozen=True)
class Words:
    """What is said of a record in one language; `answers`, `labels`, `policies` are by label."""

    task: str
    domain: str
    harm: str
    label: str  # with the places {label} and {name}
    answers: dict[str, str]  # what is done with a request of which nothing is said
    labels: dict[str, str]
    policies: dict[str, str]


WORDS = {
    "ja": Words(
        task="依頼の種類",
        domain="分野",
        harm="有害な内容の印",
        label="安全性のラベル: {label}（{name}）",
        answers={
            "ALLOW": "依頼に答える。",
            "ESCALATION": "依頼を引き継ぐ。",
            "DENY": "依頼を断る。",
            "REFUSE": "依頼を断る。",
        },
        labels={"ALLOW": "許可", "ESCALATION": "エスカレーション", "DENY": "不許可", "REFUSE": "拒否"},
        policies={
            "ALLOW": "回答してよい。",
            "ESCALATION": "自分では決めず、担当者に引き継ぐ。",
            "DENY": "方針により応じない。",
            "REFUSE": "危険なため拒否する。",
        },
    ),
    "en": Words(
        task="Kind of request",
        domain="Field",
        harm="Mark of harmful content",
        label="Safety label: {label} ({name})",
        answers={
            "ALLOW": "Answer the request.",
            "ESCALATION": "Hand the request over.",
            "DENY": "Decline the request.",
            "REFUSE": "Decline the request.",
        },
        labels={"ALLOW": "allowed", "ESCALATION": "to be escalated", "DENY": "denied", "REFUSE": "refused"},
        policies={
            "ALLOW": "It may be answered.",
            "ESCALATION": "Do not decide this; hand it over to the person in charge.",
            "DENY": "Policy does not allow to comply.",
            "REFUSE": "Refuse, since it is dangerous.",
        },
    ),
}
_SENTENCE_END = re.compile(r"(?<=[。！？!?\n])|(?<=\. )")


def build(record: Record, style: str, reasoning: str, harm: str | None) -> ThinkText:
    """Return the sample's assistant turn in parts; where `reasoning` is "", its labels make the thinking.

    Raises:
        RejectedError: where the reasoning states another decision than the record's label.
    """
    private = "\n".join(filter(None, (reasoning, record.safety, record.policy)))
    stated = decision_of(private)
    if stated not in {None, record.label}:
        raise RejectedError("label_conflict", f"the reasoning decides {stated}, the label is {record.label}")
    words = WORDS[record.language]
    if style == "quadruple":
        return ThinkText(
            style,
            record.answer,
            task=_undecided(reasoning) or about(record) or words.answers[record.label],
            safety=record.safety or safety(record, harm),
            policy=_decided(record.policy or words.policies[record.label], record.label, style),
        )
    thinking = private or "\n".join(filter(None, (about(record), safety(record, harm))))
    return ThinkText(style, record.answer, _decided(thinking, record.label, style))


def about(record: Record) -> str:
    """Say what the record says of its task and domain; "" where it says nothing."""
    words = WORDS[record.language]
    named = ((words.task, record.task), (words.domain, record.domain))
    return "\n".join(f"{name}: {value}" for name, value in named if value)


def safety(record: Record, harm: str | None) -> str:
    """Say what the record's label and flags say about safety."""
    words = WORDS[record.language]
    flagged = f"{words.harm}: {harm}\n" if harm else ""
    return flagged + words.label.format(label=record.label, name=words.labels[record.label])


def private_text(text: ThinkText) -> str:
    """Return all that is private in a turn, as `format.parse` gives it."""
    return text.thinking if text.style in HEADED else f"{text.task}\n{text.safety}\n{text.policy}"


def cut(text: ThinkText, fits: Callable[[ThinkText], bool], label: str) -> ThinkText | None:
    """Shorten the thinking to the most leading sentences that fit; None where not even one does."""
    whole = _undecided(text.thinking if text.style in HEADED else text.task)
    sentences = [s for s in _SENTENCE_END.split(whole) if s]
    low, high = 0, len(sentences) - 1
    best = None
    while low < high:
        middle = (low + high + 1) // 2
        thought = "".join(sentences[:middle]).strip()
        headed = text.style in HEADED
        changed = {"thinking": _decided(thought, label, text.style)} if headed else {"task": thought}
        shorter = replace(text, **changed)
        if fits(shorter):
            low, best = middle, shorter
        else:
            high = middle - 1
    return best


def _decided(thinking: str, label: str, style: str) -> str:
    """Return the thinking with its decision as `style` states it at its end, in place of one that differs."""
    if decision_of(thinking) is None:
        return with_decision(thinking, label, style)
    if decision_of(thinking, style) == label and ends_decided(thinking, style):
        return thinking
    return with_decision(_undecided(thinking), label, style)


def _undecided(thinking: str) -> str:
    before, _, last = thinking.rstrip().rpartition("\n")
    return before if decision_of(last) else thinking
