"""Unsafe content: the word list by category, which users extend.

A flagged record may enter training only with a label and an answer that refuse or escalate.
"""

from __future__ import annotations

import re
import unicodedata
from importlib.resources import files

from so8t_helpers.settings import SettingsError, resolve

PURPOSE = (
    "Unsafe records serve detection and refusal only: they enter training with the labels DENY, REFUSE or "
    "ESCALATION and an answer that refuses or escalates. Nothing here is meant for generating such content."
)
SAFE_LABELS_FOR_UNSAFE = ("DENY", "REFUSE", "ESCALATION")
_LATIN = frozenset("abcdefghijklmnopqrstuvwxyz0123456789")


class HarmWords:
    """The word list, ours and the user's: one regex, longest word first."""

    def __init__(self, paths: list[str]):
        self.categories: dict[str, str] = {}
        own = files("so8t_helpers.dataset.policy").joinpath("harm_words.tsv").read_text(encoding="utf-8")
        self._add(own, "harm_words.tsv")
        for name in paths:
            path = resolve(name)
            if not path.is_file():
                expected = "expected lines of category<TAB>word"
                raise SettingsError(f"dataset.nsfw_words: no file {path}; {expected}")
            self._add(path.read_text(encoding="utf-8-sig"), str(path))
        self._pattern = re.compile("|".join(map(re.escape, sorted(self.categories, key=len, reverse=True))))

    def find(self, text: str) -> str | None:
        """Return the category of the first listed word in a `normalised` text, None where none is."""
        start = 0
        while match := self._pattern.search(text, start):
            # Looking for borders inside the big pattern would make it a hundred times slower.
            before, after = text[match.start() - 1 : match.start()], text[match.end() : match.end() + 1]
            if not match.group().isascii() or not {before, after} & _LATIN:
                return self.categories[match.group()]
            start = match.start() + 1
        return None

    def _add(self, lines: str, source: str) -> None:
        for number, line in enumerate(lines.splitlines(), 1):
            if not line.strip() or line.startswith("#"):
                continue
            category, _, word = map(str.strip, line.partition("\t"))
            if not category or not word:
                raise SettingsError(f"{source}:{number}: expected category<TAB>word")
            self.categories[normalised(word)] = category


def normalised(text: str) -> str:
    """Return `text` as the word list compares it: NFKC, lower case."""
    return unicodedata.normalize("NFKC", text).lower()
