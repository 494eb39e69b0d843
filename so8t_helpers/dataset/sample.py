"""The per-record function: one line in, one sample or one reason for quarantine out.

It depends on the line and the plan alone, be it in one process, in several or on Ray.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from operator import attrgetter
from pathlib import Path
from typing import Any, TypeVar

import orjson

from so8t_helpers.dataset import personal_data
from so8t_helpers.dataset.fields import Given
from so8t_helpers.dataset.fitting import Fitter
from so8t_helpers.dataset.likeness import APART, compared_parts, exactly
from so8t_helpers.dataset.masking import mask_record
from so8t_helpers.dataset.personal_data.names import finder
from so8t_helpers.dataset.policy.detector import Detector
from so8t_helpers.dataset.policy.harm import SAFE_LABELS_FOR_UNSAFE
from so8t_helpers.dataset.policy.licence import canonical
from so8t_helpers.dataset.policy.robots import Robots
from so8t_helpers.dataset.quarantine import REASONS, Quarantined, RejectedError
from so8t_helpers.dataset.records import TEXT_FIELDS, Record, normalise, parse_json
from so8t_helpers.dataset.screening import MARKS, PERSONAL, WORDS, Screen
from so8t_helpers.dataset.teacher import Thoughts
from so8t_helpers.dataset.thinking import build, private_text
from so8t_helpers.phi3.chat import EVERY_ANSWER, Dialect
from so8t_helpers.settings import DatasetSettings
from so8t_helpers.thinking.format import LABELS, STYLES, contains_markers
from so8t_helpers.thinking.language import LANGUAGES
from so8t_helpers.thinking.markers import CANDIDATE
from so8t_helpers.thinking.refusal import REFUSE_LABELS, refuses

FORMATS = (*STYLES, "plain")
_texts_of = attrgetter(*TEXT_FIELDS)
# A thinking states its decision. A turn that is not the assistant's may quote one, or name a control token:
# the chat renderer makes ordinary text of it.
_MARKS_OUTSIDE_ANSWERS = {"answer": (), **dict.fromkeys(("reasoning", "safety", "policy"), ("decision",))}


@dataclass(frozen=True)
class Plan:
    """What the per-record function needs to know; picklable."""

    settings: DatasetSettings
    seed: int  # of hashes that decide splits and formats
    limit: int  # longest sample in tokens
    dialect: Dialect  # the base's
    tokenizer: Path  # the base's tokenizer.json
    length_share: float  # of samples whose token length is counted even where it cannot decide
    robots: Path | None  # folder of robots.txt files
    thoughts: Path | None = None  # cache of the teacher's thinking
    prompts: dict[str, str] = field(default_factory=dict)  # what the teacher is asked, by language
    classifier: Path | None = None  # the trained n-gram classifier of unsafe text


@dataclass(slots=True)
class Sample:
    """A kept record: its row as a JSON line with its line end, and what the later passes need of it."""

    row: bytes
    question: str  # normalised, and after `APART` its context
    label: int
    draw: int  # the hash of question and context, see `_sample`
    kind: int  # the hash of what duplicates have in common: label, system words, numbers and signs
    group: int  # the hash of the record's group key, 0 where it has none
    format: int
    domain: str
    licence: str
    tokens: int
    masked: list[str]
    harm: str | None
    cut: bool
    thinking: str  # where it came from, "" for none
    fault: str  # of the teacher's, which is not used then
    thought: int  # a hash of the thinking, 64 bits
    language: int
    refuses: bool | None  # whether the answer to DENY or REFUSE does so; None for the other labels


@dataclass(slots=True)
class _Candidate:
    """A record on its way through policy, and what was found in it."""

    record: Record
    licence: str
    joined: str  # all its text
    normalised: str = ""  # the same object where normalising changes nothing
    worth: int = 0  # which of MARKS, PERSONAL and WORDS it may hold
    harm: str | None = None
    masked: list[str] = field(default_factory=list)  # kinds of personal data
    refuses: bool | None = None  # None: not judged


_Outcome = TypeVar("_Outcome")


class Sampler:
    """The per-record function with its word lists, rules and tokenizer loaded."""

    def __init__(self, plan: Plan):
        self.settings = plan.settings
        self.detector = Detector(plan.settings, plan.classifier)
        self.screen = Screen(self.detector.words.categories)
        self.names = finder(plan.settings.personal_names)
        self.masks = plan.settings.personal_data != "off"
        self.thoughts = Thoughts(plan.thoughts, plan.prompts) if plan.thoughts else None
        self.robots = Robots(plan.robots, plan.settings.robots_agent)
        self.fitter = Fitter(plan.settings, plan.dialect, plan.tokenizer, plan.limit, plan.length_share)
        self.allowed = tuple(plan.settings.licences)
        key = plan.seed.to_bytes(8, "little", signed=True)
        self.hasher = hashlib.blake2b(digest_size=8, key=key)
        # (label, as what a record was found unsafe or "") -> records
        self.flags: Counter[tuple[str, str]] = Counter()
        self.without_thinking_from = 1.0 - plan.settings.plain_share * (1.0 - plan.settings.eval_share)

    def batch(
        self, lines: list[tuple[int, bytes | None]], encoding: str, file: str, given: Given | None = None
    ) -> list[Sample | Quarantined]:
        """Judge (number, line) pairs, each as if it were alone: screening many at once costs less."""
        digests = [hashlib.sha256(raw).hexdigest() if raw is not None else "" for _, raw in lines]
        pairs = zip(lines, digests, strict=True)
        outcomes = [_attempt(digest, self._read, raw, encoding, given) for (_, raw), digest in pairs]
        self._screen([outcome for outcome in outcomes if isinstance(outcome, _Candidate)])
        return [
            _attempt(digest, self._sample, outcome, file, line, digest)
            if isinstance(outcome, _Candidate)
            else outcome
            for outcome, (line, _), digest in zip(outcomes, lines, digests, strict=True)
        ]

    def needs_teacher(self, raw: bytes | None, encoding: str, given: Given | None = None) -> Record | None:
        """Return the record, as policy leaves it, where a teacher is to think for it; None for all others."""
        try:
            candidate = self._read(raw, encoding, given)
            self._screen([candidate])
            self._judge(candidate)
        except RejectedError:
            return None
        asked = _lacks_reasoning(candidate) and not self._drawn(candidate)[-1]
        return candidate.record if asked else None

    def _read(self, raw: bytes | None, encoding: str, given: Given | None) -> _Candidate:
        """Read one line: its shape, licence and source."""
        record = normalise(parse_json(raw, encoding), given)
        checked = record.check["value"] if record.check else ""
        texts = filter(None, (*_texts_of(record), *record.history, checked))
        return _Candidate(record, self._licence(record), "\n".join(texts))

    def _screen(self, batch: list[_Candidate]) -> None:
        """Find out which of many records may hold marks, personal data or unsafe content."""
        if not batch:
            return
        worth, normalised = self.screen([candidate.joined for candidate in batch])
        found = self.detector.find(normalised, [bool(flags & WORDS) for flags in worth])
        for candidate, flags, text, category in zip(batch, worth, normalised, found, strict=True):
            candidate.worth, candidate.normalised, candidate.harm = flags, text, category
        judged = [c for c in batch if c.harm or c.record.flagged or c.record.label in REFUSE_LABELS]
        said = refuses([candidate.record.answer for candidate in judged]).tolist()
        for candidate, verdict in zip(judged, said, strict=True):
            candidate.refuses = verdict

    def _judge(self, candidate: _Candidate) -> None:
        """Apply policy to what was found in one record."""
        record = candidate.record
        if candidate.worth & MARKS and CANDIDATE.search(candidate.joined):
            for name in TEXT_FIELDS:  # no record may break out of its part
                besides = _MARKS_OUTSIDE_ANSWERS.get(name, ("decision", "token"))
                if contains_markers(getattr(record, name) or "", self.settings.think_format, besides):
                    raise RejectedError("format_markers", f"the {name} holds a marker of the think formats")
            for number, text in enumerate(record.history):
                besides = () if number % 2 else ("decision", "token")
                if contains_markers(text, self.settings.think_format, besides):
                    raise RejectedError(
                        "format_markers", "an earlier turn holds a marker of the think formats"
                    )
        worth = candidate.worth & PERSONAL
        # Names have no sign that a cheap scan could find.
        if self.masks and (self.names or (worth and personal_data.looks(candidate.normalised))):
            candidate.masked = mask_record(record, self.settings.personal_data, self.names)
        self.flags[record.label, candidate.harm or ""] += 1
        candidate.harm = record.flagged or candidate.harm
        if candidate.harm and record.label not in SAFE_LABELS_FOR_UNSAFE:
            detail = f"flagged as {candidate.harm}, but labelled {record.label}"
            raise RejectedError("unsafe_label", detail)
        if candidate.harm and not candidate.refuses:
            detail = f"flagged as {candidate.harm}; the answer neither refuses nor escalates"
            raise RejectedError("unsafe_answer", detail)

    def _sample(self, candidate: _Candidate, file: str, line: int, digest: str) -> Sample:
        self._judge(candidate)
        record = candidate.record
        parts, question, draw, group, without_thinking = self._drawn(candidate)
        reasoning, source, fault = record.reasoning, "the record's own", ""
        if not reasoning:
            source = "from its labels"
            if self.thoughts is not None and not without_thinking and _lacks_reasoning(candidate):
                text, fault = self.thoughts.get(record) or ("", "not asked")
                if not fault:
                    found = personal_data.find(text, self.names) if self.masks else []
                    reasoning = personal_data.mask(text, found)
                    source = "a teacher's"
        kind = 0
        if self.settings.deduplicate:
            kind = self._hash("\0".join((record.label, record.system or "", *map(exactly, parts))))
        chosen = self.settings.think_format
        style = STYLES[draw & 1] if chosen == "both" else chosen
        thinking = build(record, style, reasoning, candidate.harm)
        # A teacher's words and a category's name were not screened.
        screened = reasoning is record.reasoning and not (candidate.masked or candidate.harm)
        clean = screened and not candidate.worth & MARKS
        fitted = self.fitter.fit(record, thinking, without_thinking, draw, clean)
        thought = private_text(fitted.parts)
        row_format = "plain" if without_thinking else style
        row: dict[str, Any] = {
            "id": digest[:16],
            "label": record.label,
            "task": record.task,
            "domain": record.domain,
            "format": row_format,
            "messages": fitted.messages,
            "text": fitted.text,
            "question": record.question,
            "prompt": fitted.messages[-2]["content"],
            "thinking": "" if without_thinking else thought,
            "final": record.answer,
            "check": record.check,
            "source": {"file": file, "line": line, "sha256": digest, "licence": candidate.licence},
        }
        if record.source:
            row["source"]["from"] = record.source
        # Of an unsafe dialogue, or one to be refused, only the last answer was judged.
        judged = not candidate.harm and record.label not in REFUSE_LABELS
        if record.history and judged and self.settings.dialogue_answers == "every":
            row["trained"] = EVERY_ANSWER
        return Sample(
            orjson.dumps(row, option=orjson.OPT_APPEND_NEWLINE),
            question,
            LABELS.index(record.label),
            draw,
            kind & 0xFFFFFFFF,
            group,
            FORMATS.index(row_format),
            record.domain or "",
            candidate.licence,
            fitted.tokens,
            candidate.masked,
            candidate.harm,
            fitted.parts is not thinking,
            "" if without_thinking else source,
            fault,
            int.from_bytes(hashlib.blake2b(thought.encode("utf-8", "surrogatepass"), digest_size=8).digest()),
            LANGUAGES.index(record.language),
            candidate.refuses if record.label in REFUSE_LABELS else None,
        )

    def _drawn(self, candidate: _Candidate) -> tuple[list[str], str, int, int, bool]:
        """Return what is compared of a record, in parts and whole, two hashes, and whether it is to be plain.

        The first, of the question, decides split, format and share; the second is its group's, 0 for none.
        """
        record = candidate.record
        unchanged = candidate.normalised is candidate.joined and not candidate.masked
        parts = compared_parts(record.question, record.context, record.history, unchanged)
        draw = self._hash(question := APART.join(parts))
        group = 0 if record.group is None else self._hash(record.group)
        return parts, question, draw, group, self._without_thinking(draw, group)

    def _hash(self, text: str) -> int:
        """Return the 64 bits that the run's seed makes of a text."""
        hasher = self.hasher.copy()
        hasher.update(text.encode("utf-8", "surrogatepass"))
        return int.from_bytes(hasher.digest(), "little")

    def _without_thinking(self, draw: int, group: int) -> bool:
        """Say whether a sample shows no thinking; those with the lowest hashes do, so they can be held out.

        A group is held out whole: those with the lower hashes have none without thinking, the rest more.
        """
        if not group:
            return draw / 2**64 >= self.without_thinking_from
        held, plain = self.settings.eval_share, self.settings.plain_share
        spared = held + (1 - held) * (1 - plain) / 2
        share = plain * (1 - held) / (1 - spared) if spared < 1 else 0.0
        return group / 2**64 >= spared and draw / 2**64 >= 1 - share

    def _licence(self, record: Record) -> str:
        """Return the licence's SPDX name, where it and the source's robots.txt let us use the record."""
        name = record.licence or self.settings.default_licence
        if not name:
            raise RejectedError("licence_missing", "no `licence`, and dataset.default_licence is not set")
        if (known := canonical(name, self.allowed)) is None:
            raise RejectedError("licence_not_allowed", f"licence {name[:60]!r} is not in dataset.licences")
        if record.url and (reason := self.robots.decide(record.url)):
            raise RejectedError(reason, REASONS[reason])
        return known


def _attempt(digest: str, step: Callable[..., _Outcome], *arguments: object) -> _Outcome | Quarantined:
    """Return a step's outcome, or why the line that has this hash goes to quarantine."""
    try:
        return step(*arguments)
    except RejectedError as rejected:
        return Quarantined(rejected.reason, rejected.detail, digest)


def _lacks_reasoning(candidate: _Candidate) -> bool:
    """Say whether a teacher is to think for a record: it is safe, and has no reasoning of its own."""
    return not (candidate.record.reasoning or candidate.harm)
