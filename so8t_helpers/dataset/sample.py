"""The per-record function: one line in, one sample or one reason for quarantine out.

The same function runs in one process, in several, and on Ray; it depends on the line and the plan alone.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson

from so8t_helpers.dataset import personal_data, records, thinking
from so8t_helpers.dataset.duplicates import normalise_question
from so8t_helpers.dataset.fitting import Fitter
from so8t_helpers.dataset.policy import harm, licence, robots
from so8t_helpers.dataset.policy.detector import Detector
from so8t_helpers.dataset.records import REASONS, Record, RejectedError
from so8t_helpers.dataset.screening import EVERYTHING, MARKS, PERSONAL, WORDS, Screen
from so8t_helpers.dataset.teacher import Thoughts
from so8t_helpers.settings import DatasetSettings
from so8t_helpers.thinking import format as think_format
from so8t_helpers.thinking.markers import CANDIDATE

FORMATS = ("seed", "quadruple", "plain")


@dataclass(frozen=True)
class Plan:
    """What the per-record function needs to know; picklable.

    Attributes:
        settings: the profile's dataset section.
        seed: of hashes that decide splits and formats.
        limit: longest sample in tokens.
        tokenizer: the base's tokenizer.json.
        robots: folder of robots.txt files.
        thoughts: cache of the teacher's thinking.
        classifier: the trained n-gram classifier of unsafe text.
        length_share: share of samples whose token length is counted even where it cannot decide.
    """

    settings: DatasetSettings
    seed: int
    limit: int
    tokenizer: Path
    length_share: float
    robots: Path | None
    thoughts: Path | None = None
    classifier: Path | None = None


@dataclass(slots=True)
class Sample:
    """A kept record: its row as a JSON line with its line end, and what the later passes need of it."""

    row: bytes
    question: str
    label: int
    question_hash: int
    format: int
    domain: str
    licence: str
    tokens: int
    masked: list[str]
    harm: str | None
    cut: bool
    thinking: str


@dataclass(slots=True)
class Quarantined:
    """A record that is not used: the line for quarantine.jsonl."""

    reason: str
    detail: str
    sha256: str


class Sampler:
    """The per-record function with its word lists, rules and tokenizer loaded."""

    def __init__(self, plan: Plan):
        self.settings = plan.settings
        self.detector = Detector(plan.settings, plan.classifier)
        self.screen = Screen(self.detector.words)
        self.thoughts = Thoughts(plan.thoughts) if plan.thoughts else None
        self.robots = robots.Robots(plan.robots, plan.settings.robots_agent)
        self.fitter = Fitter(plan.settings, plan.tokenizer, plan.limit, plan.length_share)
        self.allowed = tuple(plan.settings.licences)
        key = plan.seed.to_bytes(8, "little", signed=True)
        self.hasher = hashlib.blake2b(digest_size=8, key=key)
        self.plain_from = 1.0 - plan.settings.plain_share * (1.0 - plan.settings.eval_share)

    def __call__(self, raw: bytes | None, encoding: str, file: str, line: int) -> Sample | Quarantined:
        """Judge one line; `raw` is None for one that was too long to read."""
        return self.batch([(line, raw)], encoding, file)[0]

    def batch(
        self, lines: list[tuple[int, bytes | None]], encoding: str, file: str
    ) -> list[Sample | Quarantined]:
        """Judge many lines at once, each as if it were alone: what looks at characters costs less so."""
        outcomes: list[_Read | Quarantined] = []
        digests = [hashlib.sha256(raw).hexdigest() if raw is not None else "" for _, raw in lines]
        for (_, raw), digest in zip(lines, digests, strict=True):
            try:
                if raw is None:
                    raise RejectedError("line_too_long", "longer than 10 MiB")
                outcomes.append(self._read(raw, encoding))
            except RejectedError as rejected:
                outcomes.append(Quarantined(rejected.reason, rejected.detail, digest))
        self._look([outcome for outcome in outcomes if isinstance(outcome, _Read)])
        judged: list[Sample | Quarantined] = []
        for outcome, (line, _), digest in zip(outcomes, lines, digests, strict=True):
            if isinstance(outcome, Quarantined):
                judged.append(outcome)
                continue
            try:
                judged.append(self._sample(outcome, file, line, digest))
            except RejectedError as rejected:
                judged.append(Quarantined(rejected.reason, rejected.detail, digest))
        return judged

    def needs_teacher(self, raw: bytes | None, encoding: str) -> Record | None:
        """Return the record, as policy leaves it, where a teacher is to think for it; None for all others."""
        try:
            read = self._read(raw or b"", encoding)
            self._look([read])
            judged = self._judge(read)
        except RejectedError:
            return None
        return judged.record if _says_only_its_label(judged) else None

    def _read(self, raw: bytes, encoding: str) -> _Read:
        """Read one line: its shape, licence and source."""
        record = records.normalise(records.parse_json(records.to_utf8(raw, encoding)))
        licence_name = self._source(record)
        return _Read(record, licence_name, record.texts())

    def _look(self, batch: list[_Read]) -> None:
        """Look for marks, personal data and unsafe content in many records at once."""
        if not batch:
            return
        seen, plain = self.screen([read.joined for read in batch])
        found = self.detector.find(plain, [bool(flags & WORDS) for flags in seen])
        for read, flags, text, category in zip(batch, seen, plain, found, strict=True):
            read.worth, read.plain, read.harm = flags, text, category

    def _judge(self, read: _Read) -> _Judged:
        """Apply policy to what was found in one record."""
        record = read.record
        if read.worth & MARKS and CANDIDATE.search(read.joined):
            _no_markers(record)
        masked = self._personal_data(record, read.plain) if read.worth & PERSONAL else []
        return _Judged(
            record, read.licence, masked, self._harm(record, read.harm), not (read.worth & MARKS or masked)
        )

    def _sample(self, read: _Read, file: str, line: int, digest: str) -> Sample:
        judged = self._judge(read)
        record = judged.record
        reasoning, source = record.reasoning, "the record's own"
        if not reasoning:
            source = "from its labels"
            if self.thoughts is not None and _says_only_its_label(judged):
                reasoning = self._thought(record)
                source = "a teacher's" if reasoning else source
        unchanged = read.plain is read.joined and not judged.masked
        question = normalise_question(record.question, unchanged)
        draw = self._draw(question)
        unthinking = draw / 2**64 >= self.plain_from
        style = self._style(draw)
        parts = thinking.build(record, style, reasoning, judged.harm)
        # A teacher's words and a category's name were not looked through.
        clean = judged.clean and judged.harm is None and reasoning is record.reasoning
        fitted = self.fitter.fit(record, parts, unthinking, draw, clean)
        row: dict[str, Any] = {
            "id": digest[:16],
            "label": record.label,
            "task": record.task,
            "domain": record.domain,
            "format": "plain" if unthinking else style,
            "messages": fitted.messages,
            "text": fitted.text,
            "question": record.question,
            "prompt": fitted.messages[-2]["content"],
            "thinking": "" if unthinking else thinking.private_text(fitted.parts),
            "final": record.answer,
            "check": record.check,
            "source": {"file": file, "line": line, "sha256": digest, "licence": judged.licence},
        }
        return Sample(
            orjson.dumps(row, option=orjson.OPT_APPEND_NEWLINE),
            question,
            think_format.LABELS.index(record.label),
            draw,
            FORMATS.index(row["format"]),
            record.domain or "",
            judged.licence,
            fitted.tokens,
            judged.masked,
            judged.harm,
            fitted.parts is not parts,
            source,
        )

    def _thought(self, record: Record) -> str:
        """Return the teacher's thinking with personal data masked, "" where there is none to use."""
        assert self.thoughts is not None
        text = self.thoughts.get(record) or ""
        return personal_data.mask(text, personal_data.find(text))

    def _source(self, record: Record) -> str:
        name = record.licence or self.settings.default_licence
        if not name:
            raise RejectedError("licence_missing", "no `licence`, and dataset.default_licence is not set")
        known = licence.canonical(name, self.allowed)
        if known is None:
            raise RejectedError("licence_not_allowed", f"licence {name[:60]!r} is not in dataset.licences")
        if record.url:
            reason = self.robots.decide(record.url)
            if reason:
                raise RejectedError(reason, REASONS[reason])
        return known

    def _personal_data(self, record: Record, plain: str) -> list[str]:
        """Mask personal data in place; return the kinds found."""
        if self.settings.personal_data == "off":
            return []
        if not personal_data.looks(plain):
            return []
        kinds: list[str] = []
        for name in records.TEXT_FIELDS:
            value = getattr(record, name)
            found = personal_data.find(value) if value else []
            if found:
                kinds += [place.kind for place in found]
                setattr(record, name, personal_data.mask(value, found))
        if kinds and self.settings.personal_data == "quarantine":
            raise RejectedError("personal_data", f"found: {', '.join(sorted(set(kinds)))}")
        if kinds and record.check:
            value = record.check["value"]
            record.check = {**record.check, "value": personal_data.mask(value, personal_data.find(value))}
        return kinds

    def _harm(self, record: Record, found: str | None) -> str | None:
        category = record.flagged or found
        if category is None:
            return None
        if record.label not in harm.SAFE_LABELS_FOR_UNSAFE:
            raise RejectedError("unsafe_label", f"flagged as {category}, but labelled {record.label}")
        if not harm.refuses(record.answer):
            raise RejectedError(
                "unsafe_answer", f"flagged as {category}; the answer neither refuses nor escalates"
            )
        return category

    def _draw(self, question: str) -> int:
        """Return 64 bits that decide split, format and share: the same for the same question."""
        hasher = self.hasher.copy()
        hasher.update(question.encode("utf-8", "surrogatepass"))
        return int.from_bytes(hasher.digest(), "little")

    def _style(self, draw: int) -> str:
        wanted = self.settings.think_format
        return think_format.STYLES[draw & 1] if wanted == "both" else wanted


@dataclass(slots=True)
class _Read:
    record: Record
    licence: str
    joined: str
    plain: str = ""
    worth: int = EVERYTHING
    harm: str | None = None


@dataclass(slots=True)
class _Judged:
    record: Record
    licence: str
    masked: list[str]
    harm: str | None
    clean: bool


def _no_markers(record: Record) -> None:
    """Refuse text that holds a marker: no record may break out of its part."""
    for name in records.TEXT_FIELDS:
        value = getattr(record, name)
        if value and think_format.contains_markers(value):
            raise RejectedError("format_markers", f"the {name} holds a marker of the think formats")


def _says_only_its_label(judged: _Judged) -> bool:
    """Say whether a teacher may think for a record: it is safe, and nothing but its label tells why."""
    record = judged.record
    return not (record.reasoning or record.task or record.domain or judged.harm)
