"""Why a line is not used: the reasons, and its entry in quarantine.jsonl, which never quotes the line."""

from __future__ import annotations

from dataclasses import asdict, dataclass

import orjson

REASONS = {
    "line_too_long": "the line is over 10 MiB",
    "bad_encoding": "the bytes are not valid in the file's encoding",
    "empty_line": "the line is empty",
    "bad_json": "the line is not valid JSON",
    "not_an_object": "the line is JSON, but not an object",
    "unknown_shape": "none of the known record shapes",
    "wrong_type": "a value has the wrong type",
    "empty_question": "no question",
    "empty_answer": "no answer",
    "missing_label": "no label",
    "unknown_label": "a label that is none of the four",
    "label_conflict": "the reasoning decides otherwise than the label",
    "broken_format": "think markers that are not well formed",
    "format_markers": "text that holds the format's own markers",
    "licence_missing": "no licence given",
    "licence_not_allowed": "a licence that the profile does not allow",
    "bad_url": "a source URL that is none",
    "robots_disallow": "robots.txt of the source forbids it",
    "robots_unknown": "no robots.txt known for the source's host",
    "personal_data": "personal or confidential data",
    "unsafe_label": "unsafe content with a label that allows it",
    "unsafe_answer": "unsafe content with an answer that does not refuse",
    "too_long": "longer than the sequence length, even with the thinking cut",
    "no_system_turn": "system words, for which the base's chat template has no place",
    "duplicate": "question, context and label of an earlier record",
    "near_duplicate": "nearly the question and the context of an earlier record, with its label",
}
# What helps where a reason has kept every line out.
REMEDIES = {
    "licence_missing": "give each record a `licence`, or its entry in dataset.inputs `licence:`, or set "
    "dataset.default_licence (self-made for records of your own)",
    "licence_not_allowed": "name the licence in dataset.licences, if it is one that you may use",
    "missing_label": "give each record a `label`, or its entry in dataset.inputs `label:`, such as "
    "{path: …, label: ALLOW}",
    "unknown_label": "say in the entry in dataset.inputs what the values mean, such as "
    "{path: …, labels: {0: ALLOW, 1: REFUSE}}",
    "unknown_shape": "say in the entry in dataset.inputs which column is which, such as "
    "{path: …, columns: {question: …, answer: …}}",
    "wrong_type": "a field holds no text, quarantine.jsonl says which: say in the entry in dataset.inputs "
    "where the text is, in an object by dots, such as {path: …, columns: {answer: answer.value}}",
    "empty_answer": "records need an answer; say in the entry in dataset.inputs which column it is, such as "
    "{path: …, columns: {answer: …}}",
}


class RejectedError(Exception):
    """A record that cannot become a sample: a reason from `REASONS` and a detail without its content."""

    def __init__(self, reason: str, detail: str):
        super().__init__(reason, detail)
        self.reason, self.detail = reason, detail


@dataclass(slots=True)
class Quarantined:
    """A line that is not used: reason, detail, and the hash of its bytes."""

    reason: str
    detail: str
    sha256: str

    def entry(self, file: str, line: int) -> bytes:
        """Return its line of quarantine.jsonl."""
        return orjson.dumps({"file": file, "line": line, **asdict(self)}, option=orjson.OPT_APPEND_NEWLINE)
