"""One cheap look at many texts at once: which of them any of the dear looks could find something in.

Most records hold no mark, no personal data and no listed word, and what they would need for one is a matter
of single characters and pairs of them. A table of character classes says so for a whole batch in a few numpy
calls; only where it finds something does a regex run. It never misses what the regexes would find.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache

import numpy as np

from so8t_helpers import personal_data
from so8t_helpers.markers import MARK_STARTS

MARKS, PERSONAL, WORDS = 1, 2, 4
EVERYTHING = MARKS | PERSONAL | WORDS

# Bits of a character's class. A pair is a first (bit n) before a second (bit n + 1).
_NO_LETTER, _DIGIT, _SIGN, _FIRST, _SECOND, _WORD_FIRST, _WORD_SECOND, _WORD = (1 << n for n in range(8))
_OUTSIDE = 0xFFFF  # stands for every character beyond it, and so for whatever one of them may be
_RUN = personal_data.FEWEST_IN_A_ROW


class Screen:
    """Character classes for the looks of the stage.

    Args:
        words: what the word list looks for, as `harm.plain` made them.
    """

    def __init__(self, words: Iterable[str]):
        self._classes = _personal_classes().copy()
        pairs = set()
        for word in words:
            if len(word) == 1:
                self._classes[_codes(word)] |= _WORD
            else:
                first, second = _codes(word[:2])
                self._classes[first] |= _WORD_FIRST
                self._classes[second] |= _WORD_SECOND
                pairs.add(first << 16 | second)
        self._pairs = np.array(sorted(pairs), dtype=np.uint32)

    def __call__(self, texts: list[str], plain: list[str]) -> list[int]:
        """Return for each text which of MARKS, PERSONAL and WORDS are worth a look.

        Args:
            texts: as they are.
            plain: the same as `harm.plain` made them.
        """
        points, starts = _points(texts)
        marks = np.bitwise_or.reduceat(_mark_starts().take(points), starts)
        points, starts = _points(plain)
        classes = self._classes.take(points)
        seen = classes & (_SIGN | _WORD)
        paired = classes[:-1] & (classes[1:] >> 1)
        seen[:-1] |= paired & _FIRST
        # Some hundred words have many first and second characters: which go together is looked up.
        maybe = np.flatnonzero(paired & _WORD_FIRST)
        known = np.isin(points[maybe] << 16 | points[maybe + 1], self._pairs)
        seen[maybe[known]] |= _WORD
        seen[: 1 - _RUN] |= (classes[: 1 - _RUN] & _DIGIT) & (_in_a_row(classes & _NO_LETTER) << 1)
        seen = np.bitwise_or.reduceat(seen, starts)
        personal = (seen & (_SIGN | _FIRST | _DIGIT)) != 0
        words = (seen & _WORD) != 0
        return (marks * MARKS + personal * PERSONAL + words * WORDS).tolist()


def _in_a_row(wanted: np.ndarray) -> np.ndarray:
    """Return where `_RUN` (seven) ones in a row begin: (n - 6,) of the same type."""
    two = wanted[:-1] & wanted[1:]
    four = two[:-2] & two[2:]
    return four[: 1 - _RUN + 3] & four[_RUN - 4 :]


def _points(texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """Return the texts' code points, up to `_OUTSIDE`, in one row, and where each text begins.

    A line end closes each text, and some more the last one, so that there is room for every window.
    """
    joined = "\n".join(texts) + "\n" * _RUN
    points = np.frombuffer(joined.encode("utf-32-le", "surrogatepass"), dtype=np.uint32)
    lengths = np.array([len(text) + 1 for text in texts])
    return np.minimum(points, _OUTSIDE), np.cumsum(lengths) - lengths


@lru_cache(maxsize=1)
def _mark_starts() -> np.ndarray:
    table = np.zeros(_OUTSIDE + 1, dtype=np.uint8)
    table[_codes(MARK_STARTS)] = 1
    table[_OUTSIDE] = 1
    return table


@lru_cache(maxsize=1)
def _personal_classes() -> np.ndarray:
    table = np.zeros(_OUTSIDE + 1, dtype=np.uint8)
    every = "".join(chr(code) for code in range(_OUTSIDE))
    table[_codes("".join(personal_data.NO_LETTER.findall(every)))] |= _NO_LETTER
    table[_codes("0123456789")] |= _DIGIT | _FIRST
    table[_codes(".")] |= _SECOND
    table[_codes(personal_data.SIGNS)] |= _SIGN
    table[_codes("".join(word[0] for word in personal_data.BEGINNINGS))] |= _FIRST
    table[_codes("".join(word[1] for word in personal_data.BEGINNINGS))] |= _SECOND
    table[_OUTSIDE] = _NO_LETTER | _DIGIT | _SIGN
    return table


def _codes(characters: str) -> np.ndarray:
    return np.minimum([ord(character) for character in characters], _OUTSIDE)
