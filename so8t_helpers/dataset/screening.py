"""One cheap scan of many texts: in which of them an expensive search could find anything.

What a mark, personal data or a listed word needs is a matter of single characters and pairs of them. A table
of character classes finds these for a whole batch in a few numpy calls; only there does a regex run. It never
misses what the regexes would find.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable
from functools import lru_cache
from typing import Any

import numpy as np

from so8t_helpers.dataset import personal_data
from so8t_helpers.dataset.policy.harm import normalised
from so8t_helpers.thinking.markers import MARK_STARTS

MARKS, PERSONAL, WORDS = 1, 2, 4

# Bits of a character's class. A pair is a first (bit n) before a second (bit n + 1).
_NO_LETTER, _DIGIT, _SIGN, _FIRST, _SECOND, _WORD_FIRST, _WORD_SECOND, _WORD = (1 << n for n in range(8))
_MARK_START, _CHANGES = 1, 2  # the latter: NFKC or lower case may change it
_OUTSIDE = 0xFFFF  # stands for every character beyond it, and so for whatever one of them may be
_RUN = personal_data.FEWEST_IN_A_ROW


class Screen:
    """Character classes for the stage's searches; `words` are the word list's, normalised."""

    def __init__(self, words: Iterable[str]):
        self._classes = _personal_classes().copy()
        single = {word for word in words if len(word) == 1}
        self._classes[_codes("".join(single))] |= _WORD
        # Bit of a class -> the pairs and triples that the words it stands for begin with.
        self._mixed = np.zeros(_OUTSIDE + 1, dtype=bool)  # see `_mix`
        self._known = {
            _WORD: self._beginnings(set(words) - single),
            _SIGN: self._beginnings(personal_data.WORDS),
        }

    def __call__(self, texts: list[str]) -> tuple[list[int], list[str]]:
        """Return for each text which of MARKS, PERSONAL and WORDS to search it for, and its normalised form.

        That is what `harm.normalised` makes of it: the very same object where that changes nothing.
        """
        points, starts = _points(texts)
        seen = np.bitwise_or.reduceat(_text_classes().take(points), starts)
        marks, changes = seen & _MARK_START, (seen & _CHANGES) != 0
        if changes.any():
            texts = [normalised(t) if change else t for t, change in zip(texts, changes, strict=True)]
            points, starts = _points(texts)
        classes = self._classes.take(points)
        seen = classes & (_SIGN | _WORD)
        paired = classes[:-1] & (classes[1:] >> 1)
        seen[:-1] |= paired & _FIRST
        # Some hundred words have many first and second characters: which go together is looked up.
        maybe = np.flatnonzero(paired & _WORD_FIRST)
        maybe = maybe[self._mixed.take(_mix(points[maybe], points[maybe + 1]))]
        pairs = points[maybe].astype(np.uint64) << np.uint64(16) | points[maybe + 1]
        triples = pairs << np.uint64(16) | points[maybe + 2]
        for bit, (known_pairs, known_triples) in self._known.items():
            known = _among(pairs, known_pairs) | _among(triples, known_triples)
            seen[maybe[known]] |= bit
        seen[: 1 - _RUN] |= (classes[: 1 - _RUN] & _DIGIT) & (_in_a_row(classes & _NO_LETTER) << 1)
        seen = np.bitwise_or.reduceat(seen, starts)
        personal = (seen & (_SIGN | _FIRST | _DIGIT)) != 0
        words = (seen & _WORD) != 0
        return (marks * MARKS + personal * PERSONAL + words * WORDS).tolist(), texts

    def _beginnings(self, words: Iterable[str]) -> tuple[np.ndarray, np.ndarray]:
        """Return the words of two characters and the first three of all others, as numbers; note classes."""
        pairs, triples = set(), set()
        for word in words:
            first, second, *rest = _codes(word[:3]).tolist()
            self._classes[first] |= _WORD_FIRST
            self._classes[second] |= _WORD_SECOND
            self._mixed[_mix(first, second)] = True
            if rest:
                triples.add(first << 32 | second << 16 | rest[0])
            else:
                pairs.add(first << 16 | second)
        return np.array(sorted(pairs), dtype=np.uint64), np.array(sorted(triples), dtype=np.uint64)


def _among(values: np.ndarray, known: np.ndarray) -> np.ndarray:
    """Return which values are among the sorted `known` ones: faster than np.isin where these are many."""
    if not known.size:
        return np.zeros(len(values), dtype=bool)
    return known[np.searchsorted(known, values).clip(max=known.size - 1)] == values


def _mix(first: Any, second: Any) -> Any:
    """Return one number of 16 bits for two characters: most pairs of no word are passed over by it alone."""
    return (first * 31 ^ second) & _OUTSIDE


def _in_a_row(ones: np.ndarray) -> np.ndarray:
    """Return where `_RUN` (seven) ones in a row begin: (n - 6,) of the same type."""
    two = ones[:-1] & ones[1:]
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
def _text_classes() -> np.ndarray:
    table = np.zeros(_OUTSIDE + 1, dtype=np.uint8)
    table[_codes(MARK_STARTS)] |= _MARK_START
    # What NFKC or lower case changes, alone or (marks, and letters of Korean) with the character before it.
    for code in range(_OUTSIDE):
        letter = chr(code)
        mark = unicodedata.category(letter)[0] == "M"
        if normalised(letter) != letter or mark or 0x1100 <= code < 0x1200:
            table[code] |= _CHANGES
    table[_OUTSIDE] = _MARK_START | _CHANGES
    return table


@lru_cache(maxsize=1)
def _personal_classes() -> np.ndarray:
    table = np.zeros(_OUTSIDE + 1, dtype=np.uint8)
    every = "".join(chr(code) for code in range(_OUTSIDE))
    table[_codes("".join(personal_data.NO_LETTER.findall(every)))] |= _NO_LETTER
    table[_codes("0123456789")] |= _DIGIT | _FIRST
    table[_codes(personal_data.AFTER_DIGIT)] |= _SECOND
    table[_codes(personal_data.SIGNS)] |= _SIGN
    table[_codes("".join(word[0] for word in personal_data.BEGINNINGS))] |= _FIRST
    table[_codes("".join(word[1] for word in personal_data.BEGINNINGS))] |= _SECOND
    table[_OUTSIDE] = _NO_LETTER | _DIGIT | _SIGN
    return table


def _codes(characters: str) -> np.ndarray:
    return np.minimum(np.array([*map(ord, characters)], dtype=np.int64), _OUTSIDE)
