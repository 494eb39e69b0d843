"""Unsafe content: detected so that it is refused, never generated.

Three looks: what the record says of itself, a word list by category that users extend, and (where the
profile names them) classifiers. A flagged record may enter training only with a label and an answer that
refuse or escalate.
"""

from __future__ import annotations

import re
import unicodedata
from importlib.resources import files
from pathlib import Path

from so8t_helpers.settings import SettingsError, resolve

PURPOSE = (
    "Unsafe records serve detection and refusal only: they enter training with the labels DENY, REFUSE or "
    "ESCALATION and an answer that refuses or escalates. Nothing here is meant for generating such content."
)
SAFE_LABELS_FOR_UNSAFE = ("DENY", "REFUSE", "ESCALATION")
_CANNOT = (
    "でき|出来|応じ(?:られ|かね)|答えられ|お答え(?:でき|しかね)|お手伝い(?:でき|しかね)|対応(?:でき|しかね)|"
    "提供(?:でき|しかね)|教え(?:られ|かね)|認められ|許可され"
)
_REFUSES = re.compile(
    rf"(?:{_CANNOT})[^。\n]{{0,4}}(?:ません|ない|かねます|できかね)"
    r"|かねます|お断り|拒否し|控え(?:させ|ます)|禁止されて|差し控え|いけません"
    r"|(?:担当|専門|責任|管理)(?:者|家|部署|窓口|医)|相談(?:して|窓口|員)|引き継|エスカレー|上司"
    r"|人間の?(?:確認|判断|担当)|確認が必要|警察|医師"
    r"|\b(?:can(?:'|no|’)t|cannot|unable to|won['’]t|will not|not able to|must decline|decline to|refuse"
    r"|sorry|escalat|not allowed|against (?:our|the) polic|human (?:review|operator)|specialist|supervisor"
    r"|professional help)",
    re.IGNORECASE,
)


class HarmWords:
    """The word list, ours and the user's: one regex, longest word first."""

    def __init__(self, paths: list[str]):
        self.categories: dict[str, str] = {}
        own = files("so8t_helpers.policy").joinpath("harm_words.tsv").read_text(encoding="utf-8")
        self._add(own, "harm_words.tsv")
        for name in paths:
            path = resolve(name)
            if not path.is_file():
                raise SettingsError(
                    f"dataset.nsfw_words: no file {path}; expected lines of category<TAB>word"
                )
            self._add(path.read_text(encoding="utf-8-sig"), str(path))
        self._pattern = re.compile("|".join(map(re.escape, sorted(self.categories, key=len, reverse=True))))

    def find(self, text: str) -> str | None:
        """Return the category of the first listed word in a text that `plain` made, None where none is."""
        start = 0
        while match := self._pattern.search(text, start):
            if not match.group().isascii() or _whole_word(text, match):
                return self.categories[match.group()]
            start = match.start() + 1
        return None

    def _add(self, lines: str, source: str) -> None:
        for number, line in enumerate(lines.splitlines(), 1):
            if not line.strip() or line.startswith("#"):
                continue
            category, separator, word = line.partition("\t")
            if not separator or not category.strip() or not word.strip():
                raise SettingsError(f"{source}:{number}: expected category<TAB>word")
            self.categories[plain(word.strip())] = category.strip()


def refuses(answer: str) -> bool:
    """Say whether an answer refuses or hands over to a person."""
    return _REFUSES.search(answer) is not None


def plain(text: str) -> str:
    """Return `text` as the word list compares it: NFKC, lower case."""
    return unicodedata.normalize("NFKC", text).lower()


# Looking for borders inside the big pattern would make it a hundred times slower.
_LATIN = frozenset("abcdefghijklmnopqrstuvwxyz0123456789")


def _whole_word(text: str, match: re.Match[str]) -> bool:
    before, after = text[match.start() - 1 : match.start()], text[match.end() : match.end() + 1]
    return before not in _LATIN and after not in _LATIN


def word_list_path() -> Path:
    """Return the path of our own list, as a model for the user's."""
    return Path(str(files("so8t_helpers.policy").joinpath("harm_words.tsv")))
