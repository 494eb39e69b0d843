"""JSON that is not written by lines, arrays and objects over several lines, read value by value."""

from __future__ import annotations

import json
import re
from collections import deque
from collections.abc import Iterator
from itertools import chain, islice
from typing import IO, Any

from so8t_helpers.dataset.fields import Given, are_known
from so8t_helpers.dataset.inputs.files import InputFile
from so8t_helpers.dataset.inputs.kinds import quoted, suggestion
from so8t_helpers.settings import SettingsError

BLOCK = 2**20  # characters read at once
MOST = 10 * 2**20  # characters of one record
# Under these names a file's one object holds its records: SQuAD's own files, and what exports write.
_LISTS = {"data", "rows", "records", "examples", "instances", "items", "train"}
_BLANK = re.compile(r"[\s\ufeff]*")


def records(text: IO[str], file: InputFile) -> Iterator[Any]:
    """Yield the records of a text of JSON: an array's values, one object or several, or the list in one.

    Raises:
        SettingsError: an object with several lists of records, or without the one that its entry names.
        ValueError: what is no JSON, or ends before it is complete; it counts the records before it.
    """
    reader = _Reader(text)
    while first := reader.peek():
        if first == "[":
            for value in reader.array():
                yield from _flat(value)
        elif first == "{":
            yield from _of_object(reader, file)
        else:
            yield reader.value()


def _of_object(reader: _Reader, file: InputFile) -> Iterator[Any]:
    """Yield the records in the list of an object, or the object itself where it holds none or is one."""
    given, chosen = file.given or Given(), file.entry.split
    whole: dict[str, Any] = {}
    listed: list[str] = []
    reader.take("{")
    while reader.peek() != "}":
        key = reader.value()
        reader.take(":")
        is_list = reader.peek() == "["
        if is_list and (key == chosen if chosen else key in _LISTS and not are_known(list(whole), given)):
            values = reader.array()
            begins = [*islice(values, 1)]
            if begins and type(begins[0]) in {dict, list}:
                listed.append(key)
                for value in chain(begins, values):
                    yield from _flat(value)
            else:
                whole[key] = [*begins, *values]
        elif is_list and (listed or chosen):  # it may be long, and what it begins with is enough
            values = reader.array()
            whole[key] = [*islice(values, 1)]
            deque(values, maxlen=0)
        else:
            whole[key] = reader.value()
        if reader.peek() != "}":
            reader.take(",")
    reader.take("}")
    if chosen and not listed:
        raise SettingsError(f"{file.path}: an object without a list of records under {chosen!r}, its `split`")
    if not listed:
        yield whole
    elif not chosen and (lost := [key for key, value in whole.items() if _says(key, value, given)]):
        line = suggestion(file.path, file.entry, f"split: {quoted(listed[0])}")
        raise SettingsError(
            f"{file.path}: an object with records under {listed[0]!r}, and more under "
            f"{', '.join(map(repr, lost))}; {line} (or another of them), or write one record a line"
        )


def _says(key: str, value: Any, given: Given) -> bool:
    """Say whether an object's value is a part of a record, or a list of records."""
    begins = value[0] if type(value) is list and value else None
    return are_known([key], given) or (type(begins) is dict and are_known(list(begins), given))


def _flat(value: Any) -> Iterator[Any]:
    """Yield a value, or the questions of an article as SQuAD's own files have it (Rajpurkar et al. 2016)."""
    listed = value.get("paragraphs") if type(value) is dict else None
    if type(listed) is not list or not all(
        type(p) is dict and "context" in p and type(p.get("qas")) is list for p in listed
    ):
        yield value
        return
    for paragraph in listed:
        about = {"title": value.get("title"), "context": paragraph["context"]}
        for question in paragraph["qas"]:
            yield about | question


class _Reader:
    """A text and the place reached in it; only what one value needs is held."""

    def __init__(self, text: IO[str]):
        self._text, self._buffer, self._at = text, "", 0
        self._decode = json.JSONDecoder(strict=False).raw_decode
        self._count = 0

    def array(self) -> Iterator[Any]:
        """Yield the values of an array that begins here."""
        self.take("[")
        while self.peek() != "]":
            yield self.value()
            self._count += 1
            if self.peek() != "]":
                self.take(",")
        self.take("]")

    def peek(self) -> str:
        """Return the next character that is not white space; "" at the end."""
        while True:
            self._at = _BLANK.match(self._buffer, self._at).end()  # type: ignore[union-attr]
            if self._at < len(self._buffer) or not self._more():
                return self._buffer[self._at : self._at + 1]

    def take(self, expected: str) -> None:
        """Go past a sign."""
        if (found := self.peek()) != expected:
            what = f"{found!r}" if found else "the end"
            raise ValueError(f"{what} instead of {expected!r} after {self._count} records")
        self._at += 1

    def value(self) -> Any:
        """Return the value that begins here."""
        self.peek()
        while True:
            try:
                value, end = self._decode(self._buffer, self._at)
            except (ValueError, RecursionError) as error:
                if len(self._buffer) - self._at < MOST and self._more():
                    continue
                raise ValueError(
                    f"what stands after {self._count} records is no JSON value, or longer than 10 MiB"
                ) from error
            if end < len(self._buffer) or not self._more():  # a number may go on in the next block
                self._at = end
                return value

    def _more(self) -> bool:
        block = self._text.read(BLOCK)
        self._buffer, self._at = self._buffer[self._at :] + block, 0
        return bool(block)
