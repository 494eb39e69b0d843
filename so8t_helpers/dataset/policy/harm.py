"""Unsafe content: the word list by category, which users extend.

A flagged record may enter training only with a label and an answer that refuse or escalate.
"""

from __future__ import annotations

import re
import unicodedata
from importlib.resources import files
from typing import Any

from so8t_helpers.settings import SettingsError, resolve

PURPOSE = (
    "Unsafe records serve detection and refusal only: they enter training with the labels DENY, REFUSE or "
    "ESCALATION and an answer that refuses or escalates. Nothing here is meant for generating such content."
)
FINDS = (
    "The word list finds words, not intent: it passes over most unsafe requests, which name nothing on it, "
    "and it flags harmless text that does. It is a net under the labels, not a judge of them"
)
# By benchmarks/real_data.py, whose results a test compares with these; the last three sets are harmless.
MEASURED: list[dict[str, Any]] = [
    {"set": name, "texts": texts, "flagged": flagged, "share": f"{flagged / texts:.1%}"}
    for name, texts, flagged in (
        ("XSafety (Japanese), 13 unsafe kinds", 2600, 40),
        ("gsm8k", 8792, 0),
        ("jcommonsenseqa, questions alone", 10058, 9),
        ("instruction_ja", 669, 4),
    )
]
SAFE_LABELS_FOR_UNSAFE = ("DENY", "REFUSE", "ESCALATION")
_LATIN = frozenset("abcdefghijklmnopqrstuvwxyz0123456789")
_KATAKANA = frozenset(map(chr, range(ord("ァ"), ord("ヺ") + 1))) | set("ーヽヾ")


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
            word = match.group()
            before, after = text[match.start() - 1 : match.start()], text[match.end() : match.end() + 1]
            if not (_one_word(before, word[0]) or _one_word(word[-1], after)):
                return self.categories[word]
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


def _one_word(before: str, after: str) -> bool:
    """Say whether two neighbouring characters belong to one word: both of Latin letters or of katakana."""
    return any(before in letters and after in letters for letters in (_LATIN, _KATAKANA))


def normalised(text: str) -> str:
    """Return `text` as the word list compares it: NFKC, lower case."""
    return unicodedata.normalize("NFKC", text).lower()
