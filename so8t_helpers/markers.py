"""The marks that part thinking from answer, and the one scanner that finds them.

Parsing (what an evaluation scores) and redaction (what a service sends) both run this scanner, so they cannot
disagree. It works on a stream, in linear time, and what it says never depends on how the stream was cut.

The rule of the gate: **what opens a final part must be exact, what ends one may be approximate.**
A tag counts as exact in any case, width and with white space at its edges (`＜ FINAL ＞`), since its meaning
is plain; a misspelt one (`<thnk-task>`, `<final`) only ever takes permission away. Every thinking block that
was opened must be closed by its own name before a final part can begin; after a final part nothing counts.
"""

from __future__ import annotations

import re
import unicodedata
from functools import lru_cache
from typing import NamedTuple

SEED_THINKING = "# 思考ステップ"
SEED_FINAL = "# 最終回答"
THINK_TAGS = ("think-task", "think-safety", "think-policy")
FINAL_TAG = "final"

# No decision needs more characters than this after the first of a mark: it bounds what is held back.
WINDOW = 64

_EXACT_TAGS = frozenset({*THINK_TAGS, "think", FINAL_TAG})
# What models and serving stacks call private text; longest first, so that a prefix match is specific.
_PRIVATE_NAMES = ("thinksafety", "thinkpolicy", "thinktask", "reasoning", "thinking", "thought", "think")
_NAMES = (*_PRIVATE_NAMES, FINAL_TAG)
# Letters that a name, or a name with one slip in its first two letters, begins with.
_FIRST, _SECOND = frozenset("tfrhie"), frozenset("tfrhie")
_OPENING = "<‹〈《⟨❮"
_CLOSING = ">›〉》⟩❯"
_CANDIDATE = re.compile(r"[<＜﹤‹〈〈《⟨❮&＆\[［【#＃﹟思]")
_DECORATION = frozenset(" \t\r\u3000#*_>-・【「")


class Marker(NamedTuple):
    """One mark found in a text.

    Attributes:
        kind: "open", "close" (a thinking block), "final", "final_close", "special" (`<|end|>` and the like).
        name: the block's name: "think-task", "seed", a misspelt one as written without its punctuation.
        exact: whether it may open a final part or close a block; an inexact mark only takes permission away.
        length: characters from the first of the mark to the end of what belongs to it.
    """

    kind: str
    name: str
    exact: bool
    length: int


class _More:
    """The window ends before it is clear whether a mark is there."""


MORE = _More()


class Scanner:
    """Cut a stream into (part, text) pieces.

    Parts: "final", a thinking block's name ("seed", "think-task", …) and "outside". Text of a mark belongs to
    no part. `style` is that of the first mark: "seed", "quadruple", or None so far.
    """

    def __init__(self) -> None:
        self.style: str | None = None
        self.marks = 0
        self._held = ""
        self._open: list[str] = []
        self._state = "outside"
        self._line_blank = True
        self._line_decorated = True

    @property
    def part(self) -> str:
        """The part that the next text belongs to."""
        if self._state == "outside" and self._open:
            return self._open[-1]
        return self._state

    @property
    def ended(self) -> bool:
        """True when a final part is over: nothing after it counts."""
        return self._state == "ended"

    def feed(self, chunk: str) -> list[tuple[str, str]]:
        """Take the next characters; return what they settle."""
        return self._scan(chunk, at_end=False)

    def close(self) -> list[tuple[str, str]]:
        """Settle what was held back: no more text will come."""
        return self._scan("", at_end=True)

    def _scan(self, chunk: str, at_end: bool) -> list[tuple[str, str]]:
        if self._state == "ended":
            return []
        text, position = self._held + chunk, 0
        pieces: list[tuple[str, str]] = []
        self._held = ""
        search_from = 0
        while found := _CANDIDATE.search(text, search_from):
            start = found.start()
            self._take(text[position:start], pieces)
            position = start
            marker = find_marker(text[start : start + WINDOW], at_end, self._line_blank, self._line_decorated)
            if isinstance(marker, _More):
                self._held = text[start:]
                return pieces
            if marker is None:
                search_from = start + 1
                continue
            self._apply(marker)
            if self._state == "ended":
                return pieces
            self._follow_line(text[start : start + marker.length])
            position = search_from = start + marker.length
        self._take(text[position:], pieces)
        return pieces

    def _take(self, text: str, pieces: list[tuple[str, str]]) -> None:
        if text:
            pieces.append((self.part, text))
            self._follow_line(text)

    def _follow_line(self, text: str) -> None:
        """Keep track of what stands on the current line, since a heading counts at a line's start only."""
        tail = text.rpartition("\n")[2]
        fresh = len(tail) != len(text)
        self._line_blank = (fresh or self._line_blank) and not tail.strip()
        self._line_decorated = (fresh or self._line_decorated) and _DECORATION.issuperset(tail)

    def _apply(self, marker: Marker) -> None:
        self.marks += 1
        if self.style is None and marker.kind != "special":
            self.style = "seed" if marker.name == "seed" else "quadruple"
        if self._state == "final" or marker.kind == "special":
            self._state = "ended"
        elif marker.kind == "open":
            self._open.append(marker.name)
        elif marker.kind == "close" and marker.exact and marker.name in self._open:
            self._open.reverse()
            self._open.remove(marker.name)
            self._open.reverse()
        elif marker.kind == "final" and marker.exact:
            # The seed format's final heading is also what closes its thinking.
            still_open = [n for n in self._open if n != "seed"] if marker.name == "seed" else self._open
            if not still_open:
                self._open = []
                self._state = "final"


def contains_markers(text: str) -> bool:
    """Say whether `text` holds anything that a scanner would take for a mark, exact or not."""
    scanner = Scanner()
    scanner.feed(text)
    scanner.close()
    return scanner.marks > 0


def find_marker(window: str, at_end: bool, line_blank: bool, line_decorated: bool) -> Marker | _More | None:
    """Decide what begins at the first character of `window`.

    Args:
        window: at most `WINDOW` characters; fewer only where the text (so far) ends.
        at_end: no more text will come.
        line_blank: only white space stands before it on its line.
        line_decorated: only white space and list, quote or heading signs stand before it on its line.
    """
    complete = at_end or len(window) == WINDOW
    first = fold(window[0])
    if first == "#":
        return _heading(window, complete, at_end, line_blank)
    if first == "思":
        return _bare_heading(window, complete, at_end) if line_decorated else None
    if first == "&":
        folded = "".join(map(fold, window[:4]))
        if folded == "&lt;":
            return _tag(window, 4, complete, bracket="&")
        return MORE if "&lt;".startswith(folded) and not complete else None
    return _tag(window, 1, complete, bracket=first)


@lru_cache(maxsize=4096)
def fold(character: str) -> str:
    """Return the plain form of one character: NFKD, lower case, no invisible or combining signs.

    Brackets and dashes of all kinds become `<`, `>`, `[`, `]` and `-`.
    """
    plain = unicodedata.normalize("NFKD", character).casefold()
    kept = []
    for c in plain:
        category = unicodedata.category(c)
        if c in _OPENING:
            kept.append("<")
        elif c in _CLOSING:
            kept.append(">")
        elif c in "【】":
            kept.append("[" if c == "【" else "]")
        elif category == "Pd" or c == "−":
            kept.append("-")
        elif c in "⁄∕\\":
            kept.append("/")
        elif category not in {"Mn", "Me", "Cf"}:
            kept.append(c)
    return "".join(kept)


def _tag(window: str, start: int, complete: bool, bracket: str) -> Marker | _More | None:
    """Read a tag whose bracket ends before `start`: slash, name, closing bracket."""
    name, slash, terminator, end = "", False, "", len(window)
    for index in range(start, len(window)):
        c = fold(window[index])
        if not name.strip() and c == "/":
            slash = True
        elif c == "|" and not name.strip() and bracket in "<&":
            return _special(window, index + 1, complete)
        elif c == "" or c.isspace() or c in "-_" or (c.isascii() and c.isalpha()):
            name += " " if c.isspace() else c
        else:
            terminator, end = c, index
            break
        letters = re.sub("[^a-z]", "", name)
        if len(letters) > 1 and letters[0] not in _FIRST and letters[1] not in _SECOND:
            return None
    if not terminator and not complete:
        return MORE
    word = name.strip()
    private = _private_name(word)
    if private is None:
        return None
    closed = terminator == ("]" if bracket == "[" else ">")
    if bracket == "[" and not (closed and word.replace("-", "") in _NAMES):
        return None
    exact = closed and bracket == "<" and word in _EXACT_TAGS
    final = private == FINAL_TAG
    kind = ("final_close" if slash else "final") if final else ("close" if slash else "open")
    return Marker(kind, word if exact else private, exact, end + closed)


def _private_name(word: str) -> str | None:
    """Return the known name that a tag's word is or was meant to be, None for any other tag."""
    letters = re.sub("[^a-z]", "", word)
    for name in _NAMES:
        if letters.startswith(name):
            return _tag_name(name)
    first = re.sub("[^a-z]", "", word.split(" ", 1)[0])
    for name in _NAMES:
        if abs(len(first) - len(name)) <= 2 and _slips(first, name) <= (1 if len(name) < 9 else 2):
            return _tag_name(name)
    return None


def _tag_name(letters: str) -> str:
    """Spell the letters of a known name as its tag is spelt."""
    return next((tag for tag in THINK_TAGS if tag.replace("-", "") == letters), letters)


def _slips(a: str, b: str) -> int:
    """Count the slips between two words: letters left out, put in, replaced, swapped."""
    before: list[int] = []
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        above, before, row = before, row, [i]
        for j, y in enumerate(b, 1):
            cost = min(before[j] + 1, row[j - 1] + 1, before[j - 1] + (x != y))
            if i > 1 and j > 1 and x == b[j - 2] and a[i - 2] == y:
                cost = min(cost, above[j - 2] + 1)
            row.append(cost)
    return row[-1]


def _special(window: str, start: int, complete: bool) -> Marker | _More | None:
    """Read a chat template's control token, `<|name|>` (any width of bar): nothing goes on after it."""
    for index in range(start, len(window)):
        c = fold(window[index])
        if c in {"|", ">"} and index > start:
            return Marker("special", "", True, index + 1)
        if c and not (c.isascii() and c.isalnum()) and c not in "_-▁":
            return None
    return None if complete else MORE


_TITLES = tuple(
    ("".join(map(fold, title)), kind)
    for title, kind in (
        ("最終回答", "final"),
        ("思考ス", "open"),
        ("思考プロセス", "open"),
        ("思考過程", "open"),
        ("思考手順", "open"),
    )
)
_STEP_TITLE = "".join(map(fold, "思考ステップ"))


def _heading(window: str, complete: bool, at_end: bool, line_blank: bool) -> Marker | _More | None:
    """Read a heading of the seed format; only a whole line `# 最終回答` opens a final part."""
    index, plain = 1, True
    while index < len(window) and (c := fold(window[index])) in {"", "#", " ", "\t", "*", "_", "[", "「"}:
        plain = plain and c in {"#", " "}
        index += 1
    title = ""
    for end in range(index, len(window) + 1):
        for known, kind in _TITLES:
            if title.startswith(known):
                rest = _STEP_TITLE if kind == "open" else known
                return _heading_end(window, index, rest, kind, complete, at_end, line_blank and plain)
        if not any(known.startswith(title) for known, _ in _TITLES):
            return None
        if end < len(window):
            title += fold(window[end])
    return None if complete else MORE


def _heading_end(  # noqa: PLR0917
    window: str, index: int, title: str, kind: str, complete: bool, at_end: bool, plain: bool
) -> Marker | _More:
    """Follow a heading that is one for sure to where its title ends, and see whether the line ends there."""
    read = ""
    while index < len(window) and title.startswith(read + fold(window[index])):
        read += fold(window[index])
        index += 1
    while index < len(window) and window[index] in " \t\r\u3000":
        index += 1
    if index == len(window) and not complete:
        return MORE
    at_line_end = (index == len(window) and at_end) or window[index : index + 1] == "\n"
    exact = plain and at_line_end and read == title
    return Marker(kind, "seed", exact, index + (exact and index < len(window)))


def _bare_heading(window: str, complete: bool, at_end: bool) -> Marker | _More | None:
    """Read `思考ステップ` without its `#`: it begins thinking where it stands alone or before a colon."""
    read, index = "", 0
    while index < len(window) and read != _STEP_TITLE:
        read += fold(window[index])
        index += 1
        if not _STEP_TITLE.startswith(read):
            return None
    while index < len(window) and fold(window[index]) in {"", " ", "\t", "\r", "*", "_", "]", "」"}:
        index += 1
    if index == len(window) and not complete:
        return MORE
    if read == _STEP_TITLE and (fold(window[index : index + 1] or "\n") in {"\n", ":"}):
        return Marker("open", "seed", False, index)
    return None
