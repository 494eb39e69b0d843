"""The fields of a record under the names that data sets have for them, and what an entry says of them."""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from so8t_helpers.dataset.labels import parse_label
from so8t_helpers.dataset.quarantine import RejectedError
from so8t_helpers.settings import InputEntry, SettingsError
from so8t_helpers.thinking.format import LABELS

# A column that is given to a field gets the field's first name. The case of letters does not matter.
FIELDS: dict[str, tuple[str, ...]] = {
    "instruction": ("instruction", "指示"),
    "question": ("question", "prompt", "query", "質問", "問題", "問い", "設問", "q"),
    "given": ("input", "context", "入力", "文脈"),
    "answer": (
        *("output", "answer", "response", "completion", "chosen", "出力", "回答", "答え", "解答", "応答"),
        *("a", "answers"),
    ),
    "reasoning": (
        *("reasoning", "thinking", "rationale", "thought", "chain_of_thought", "reasoning_content", "cot"),
        *("思考", "理由"),
    ),
    "label": ("label", "decision", "safety_label", "safety_judgment", "four_class_label", "判定", "ラベル"),
    "flag": ("nsfw", "is_nsfw", "nsfw_label", "unsafe", "is_unsafe", "harmful", "flagged", "toxic"),
    "messages": ("messages", "conversations", "conversation", "utterances", "dialogue", "dialog"),
    "history": ("history",),
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
# A record has at least one of these.
_SAYS = ("instruction", "question", "given", "answer", "messages", "text")
Picked = dict[str, tuple[str, Any]]
# Records of one file have few sets of keys: what each set can fill, and from which keys, is worked out once.
_layouts: dict[tuple[str, ...], tuple[tuple[str, tuple[str, ...]], ...]] = {}
_MOST_LAYOUTS, _LONGEST_KEYS = 1000, 1000


@dataclass(frozen=True)
class Given:
    """What an entry of `dataset.inputs` says of its records.

    Attributes:
        columns: (our first name of a field, the column that fills it).
        labels: what a label's value means, by `value_key`.
    """

    columns: tuple[tuple[str, str], ...] = ()
    label: str | None = None
    labels: dict[str, str] | None = None
    licence: str | None = None
    source: str | None = None
    group: str | None = None

    @cached_property
    def _taken(self) -> frozenset[str]:
        """The columns that fill no other field by their own names; but a flag stays one whatever it gives."""
        return frozenset({column for _, column in self.columns} - set(FIELDS["flag"]))

    @cached_property
    def _left_out(self) -> tuple[str, ...]:
        """Names whose values are not read: whoever says which column asks means no other beside it."""
        return FIELDS["instruction"] if FIELDS["question"][0] in dict(self.columns) else ()

    def renamed(self, data: dict[str, Any]) -> dict[str, Any]:
        """Return a record whose fields have our names; `meta.title` is `title` within `meta`."""
        if not self.columns:
            return data
        found = {
            name: value for name, column in self.columns if (value := column_of(data, column)) is not None
        }
        taken, left_out = self._taken, self._left_out
        own = (
            (key, value) for key, value in data.items() if key not in taken and key.lower() not in left_out
        )
        return dict(own) | found


def given_by(entry: InputEntry) -> Given:
    """Return what an entry says of its records.

    Raises:
        SettingsError: a field or a label that there is none of; it names the nearest.
    """
    for label in filter(None, (entry.label, *entry.labels.values())):
        if parse_label(label) is None:
            raise SettingsError(f"dataset.inputs: {entry.path}: {label!r} is none of {', '.join(LABELS)}")
    columns = entry.columns if isinstance(entry.columns, dict) else {}
    for field in columns:
        if field not in FIELDS:
            near = difflib.get_close_matches(field, FIELDS, n=1, cutoff=0.0)[0]
            raise SettingsError(
                f"dataset.inputs: {entry.path}: columns has {field!r}; did you mean {near!r}? "
                f"Fields: {', '.join(FIELDS)}"
            )
    named = tuple((FIELDS[field][0], column) for field, column in columns.items())
    return Given(named, entry.label, entry.labels or None, entry.licence, entry.source, entry.group)


def are_known(names: list[str], given: Given) -> bool:
    """Say whether a table with these columns, or an object with these keys, can hold a record."""
    columns = {name for name, column in given.columns if column.partition(".")[0] in names or column in names}
    columns |= {name.lower() for name in names}
    return any(name in columns for field in _SAYS for name in FIELDS[field])


def column_of(data: dict[str, Any], column: str) -> Any:
    """Return a column's value, None where the record has none."""
    if column in data or "." not in column:
        return data.get(column)
    value: Any = data
    for part in column.split("."):
        value = value.get(part) if type(value) is dict else None
    return value


def pick(data: dict[str, Any]) -> Picked:
    """Return field -> (key, value): of several names of one field, the first in `FIELDS` that has a value."""
    keys = tuple(data)
    layout = _layouts.get(keys)
    if layout is None:
        own: dict[str, list[str]] = {}  # a table's head may begin with capitals
        for key in keys:
            own.setdefault(key.lower(), []).append(key)
        found = (
            (
                field,
                tuple(key for name in names for key in sorted(own.get(name.lower(), ()), key=name.__ne__)),
            )
            for field, names in FIELDS.items()
        )
        layout = tuple((field, held) for field, held in found if held)
        if len(_layouts) < _MOST_LAYOUTS and sum(map(len, keys)) < _LONGEST_KEYS:
            _layouts[keys] = layout
    picked: Picked = {}
    for field, candidates in layout:
        for key in candidates:
            if (value := data[key]) is not None and value != "":
                picked[field] = (key, value)
                break
    # An instruction alone is the question; a `prompt` beside it is often the same again, in a template.
    if "instruction" in picked and picked.get("question", ("prompt",))[0].lower() == "prompt":
        picked["question"] = picked.pop("instruction")
    return picked


def text_of(picked: Picked, field: str) -> str:
    """Return a field's text, "" where the record has none."""
    key, value = picked.get(field, ("", ""))
    return value.strip() if type(value) is str else as_text(key, value)


def as_text(key: str, value: Any) -> str:
    """Return a value's text, stripped; the text parts of chat contents are joined.

    Raises:
        RejectedError: for a value that is not text.
    """
    if type(value) is list and all(type(v) is dict and type(v.get("text")) is str for v in value):
        value = "\n".join(v["text"] for v in value)
    if type(value) in {int, float}:
        value = str(value)
    if type(value) is not str:
        raise RejectedError("wrong_type", f"`{key}` must be text, got {type(value).__name__}")
    return value.strip()
