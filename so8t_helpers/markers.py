"""The marks that part thinking from answer: how they are spelt, how they are misspelt, how one is recognised.

The rule of the gate: **what opens a final part must be exact, what ends one may be approximate.**
A tag counts as exact in any case, width and with white space at its edges (`＜ FINAL ＞`), since its meaning
is plain; a misspelt one (`<thnk-task>`, `<final`) only ever takes permission away.
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
# With more before it on its line, even if blank, nothing is a heading.
LINE_START = 80

# Where a mark may begin. An ASCII character (a kana after 思) that cannot go on a mark, or
# a tag of three letters, rules it out at once. The first class stands outside of the case-blind part: then
# the engine skips to one of its characters, which halves the time on a text that has none.
CANDIDATE = re.compile(
    r"""[<&＜﹤‹〈〈《⟨❮◁［【＃﹟＆\[#思](?i:"""
    r"""(?<=<)(?!/?[a-z]{1,3}>)(?![^\s/\\|a-z\-_*'"`\x80-\U0010ffff])|(?<=&)(?![^l#\x80-\U0010ffff])"""
    r"""|(?<=[＜﹤‹〈〈《⟨❮◁［【＃﹟＆])|(?<=\[)(?![^\s/\\trf\-_*'"`\x80-\U0010ffff])"""
    r"""|(?<=\#)(?![^#\ \t*_\[\x80-\U0010ffff])|(?<=思)(?![ぁ-ん]))"""
)

# What models and serving stacks call private text; longest first, so that a prefix match is specific.
_NAMES = ("thinksafety", "thinkpolicy", "thinktask", "reasoning", "thinking", "thought", "think", FINAL_TAG)
_TAG_OF = {name: name for name in _NAMES} | {tag.replace("-", ""): tag for tag in THINK_TAGS}
_EXACT_TAGS = frozenset(_TAG_OF.values())
# One of the first two letters of a name stays within these even after one slip.
_EARLY_LETTERS = frozenset("tfrhie")

_FILLER = "\u200b"
_DECORATION = frozenset(" \t\r\u3000#*_>-・【「")
# Brackets that are no form of "<" may stand for it in a mark, but never in an exact one.
_BRACKETS = dict.fromkeys("‹〈《⟨❮◁", "«") | dict.fromkeys("›〉》⟩❯▷", "»") | {"【": "[", "】": "]"}
_REMEMBERED = 20_000  # characters: more than a text in any language uses
_SLASHES = "⁄∕\\"


class Marker(NamedTuple):
    """One mark found in a text.

    Attributes:
        kind: "open", "close" (a thinking block), "final", "final_close", "special" (`<|end|>` and the like).
        name: the block's name: "think-task", "seed" for a heading, "final".
        exact: whether it may open a final part or close a block; an inexact mark only takes permission away.
        length: characters from the first of the mark to the end of what belongs to it.
    """

    kind: str
    name: str
    exact: bool
    length: int


class More:
    """The window ends before it is clear whether a mark is there."""


MORE = More()


class _Folding(dict[int, str]):
    """Map a character to its plain form: NFKD, lower case; one form each of brackets, dashes, slashes."""

    def __missing__(self, code: int) -> str:
        plain = unicodedata.normalize("NFKD", chr(code)).casefold()[:1]
        category = unicodedata.category(plain)
        if category in {"Mn", "Me", "Cf"}:
            plain = _FILLER
        elif category == "Pd" or plain == "−":
            plain = "-"
        elif plain in _SLASHES:
            plain = "/"
        folded = _BRACKETS.get(plain, plain)
        if len(self) < _REMEMBERED:
            self[code] = folded
        return folded


_FOLDING = _Folding()


def fold(text: str) -> str:
    """Return `text` with every character in its plain form, one for one: positions stay what they are.

    A ligature keeps its first letter only (`ﬁnal` becomes `fnal`): what is lost counts as a slip.
    """
    return text.translate(_FOLDING)


def find_marker(window: str, at_end: bool, line: str) -> Marker | More | None:
    """Decide what begins at the first character of `window`.

    Args:
        window: at most `WINDOW` characters; fewer only where the text (so far) ends.
        at_end: no more text will come.
        line: what stands before it on its line, at least the first `LINE_START` characters.
    """
    if canonical := _CANONICAL.match(window):
        return _CANONICAL_MARKERS[canonical.group()]
    folded = fold(window)
    first = folded[0]
    if first == "#":
        return _heading(folded, at_end, len(line) < LINE_START and not line.strip())
    if first == "思":
        decorated = len(line) < LINE_START and _DECORATION.issuperset(line)
        return _bare_heading(folded, at_end) if decorated else None
    if first == "&":
        return _escaped_tag(folded, at_end)
    return _tag(folded, 1, at_end, first)


# Most marks are written as they should be: the short way to the same answer.
_CANONICAL = re.compile(f"</?(?:{'|'.join(THINK_TAGS)}|{FINAL_TAG})>")
_CANONICAL_MARKERS = {
    **{f"<{tag}>": Marker("open", tag, True, len(tag) + 2) for tag in THINK_TAGS},
    **{f"</{tag}>": Marker("close", tag, True, len(tag) + 3) for tag in THINK_TAGS},
    f"<{FINAL_TAG}>": Marker("final", FINAL_TAG, True, len(FINAL_TAG) + 2),
    f"</{FINAL_TAG}>": Marker("final_close", FINAL_TAG, True, len(FINAL_TAG) + 3),
}

_TAG = re.compile(rf"([\s{_FILLER}]*/?[\s{_FILLER}/]*)([a-z\s\-_*'\"`{_FILLER}]*)")
_NOT_LETTERS = re.compile("[^a-z]")
_CONTROL = re.compile(r"[a-z0-9_\-▁\u200b]+")


def _tag(folded: str, start: int, at_end: bool, bracket: str) -> Marker | More | None:
    """Read a tag whose bracket ends before `start`: slash, name, closing bracket."""
    found = _TAG.match(folded, start)
    assert found  # Every part of the pattern may be empty.
    lead, name = found.groups()
    end = found.end()
    if not name and bracket in "<«" and folded[end : end + 1] == "|":
        return _control_token(folded, end + 1, at_end)
    letters = _NOT_LETTERS.sub("", name)
    if len(letters) > 1 and _EARLY_LETTERS.isdisjoint(letters[:2]):
        return None
    if end == len(folded) and end < WINDOW and not at_end:
        return MORE
    known = _meant_name(letters, name)
    if known is None:
        return None
    word = name.replace(_FILLER, "").strip()
    terminator = folded[end : end + 1]
    closed = terminator != "" and terminator in ("]" if bracket == "[" else ">»")
    if bracket == "[" and not (closed and word.replace("-", "") in _NAMES):
        return None
    if not closed and any(c.isspace() for c in lead):
        return None  # `i < final_count` is arithmetic
    exact = bracket == "<" and terminator == ">" and word in _EXACT_TAGS and lead.count("/") < 2
    close = "/" in lead
    kind = ("final_close" if close else "final") if known == FINAL_TAG else ("close" if close else "open")
    return Marker(kind, known, exact, end + closed)


def _escaped_tag(folded: str, at_end: bool) -> Marker | More | None:
    """Read a tag whose bracket is written as an HTML entity: a page would show it as one."""
    for entity in ("&lt;", "&#60;", "&#x3c;"):
        if folded.startswith(entity):
            return _tag(folded, len(entity), at_end, "&")
        if not at_end and entity.startswith(folded):
            return MORE
    return None


@lru_cache(maxsize=4096)
def _meant_name(letters: str, name: str) -> str | None:
    """Return the known tag that a name is or was meant to be, None for any other tag."""
    for known in _NAMES:
        if letters.startswith(known) and known != "think":
            return _TAG_OF[known]
    words = name.split(maxsplit=1)
    first = _NOT_LETTERS.sub("", words[0]) if words else ""
    for known in _NAMES:
        allowed = 1 if len(known) < 9 else 2
        if abs(len(first) - len(known)) <= allowed and _slips(first, known) <= allowed:
            return _TAG_OF[known]
    return "think" if letters.startswith("think") else None


def _slips(a: str, b: str) -> int:
    """Count the slips between two words: letters left out, put in, replaced, swapped with the next."""
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


def _control_token(folded: str, start: int, at_end: bool) -> Marker | More | None:
    """Read a chat template's control token, `<|name|>` (any width of bar): nothing goes on after it."""
    found = _CONTROL.match(folded, start)
    end = found.end() if found else start
    if end == len(folded):
        return MORE if end < WINDOW and not at_end else None
    return Marker("special", "", True, end + 1) if found and folded[end] in "|>" else None


_STEP_TITLE, _FINAL_TITLE = fold(SEED_THINKING[2:]), fold(SEED_FINAL[2:])
_TITLE_STARTS = dict.fromkeys(map(fold, ("思考ス", "思考プロセス", "思考過程")), "open")
# What one of a title's first two characters is even after one slip.
_EARLY_TITLE = frozenset(_STEP_TITLE[:3] + _FINAL_TITLE[:3])
_TITLE_LENGTH = 8  # one more than the longest title with a slip
_HEADING_LEAD = re.compile(rf"[# \t*_\[「{_FILLER}]+")
_UNSEEN = re.compile(rf"[\s{_FILLER}]+")
_BARE_STEP = re.compile(f"{_FILLER}*".join(_STEP_TITLE) + rf"[ \t\r*_\]」{_FILLER}]*")


def _heading(folded: str, at_end: bool, line_blank: bool) -> Marker | More | None:
    """Read a heading of the seed format; only a whole line `# 最終回答` opens a final part."""
    lead = _HEADING_LEAD.match(folded)
    assert lead  # The first character is "#".
    line, newline, _ = folded[lead.end() :].partition("\n")
    title = _UNSEEN.sub("", line)
    if len(title) > 1 and _EARLY_TITLE.isdisjoint(title[:2]):
        return None
    full = len(folded) == WINDOW
    if not (newline or len(title) >= _TITLE_LENGTH or full or at_end):
        return MORE
    kind = _meant_title(title[:_TITLE_LENGTH])
    if kind is None:
        return None
    whole = line.replace(_FILLER, "").strip() in {_STEP_TITLE, _FINAL_TITLE}
    at_line_end = bool(newline) or (at_end and not full)
    if whole and at_line_end and line_blank and not lead.group().strip(f"# \t{_FILLER}"):
        return Marker(kind, "seed", True, lead.end() + len(line) + len(newline))
    return Marker(kind, "seed", False, lead.end())


@lru_cache(maxsize=4096)
def _meant_title(title: str) -> str | None:
    """Return "open" or "final" where a heading begins with a title, or one with one slip; else None."""
    for known, kind in ((_STEP_TITLE, "open"), (_FINAL_TITLE, "final")):
        lengths = (len(known) - 1, len(known), len(known) + 1)
        if any(_slips(title[:length], known) <= 1 for length in lengths):
            return kind
    return next((kind for start, kind in _TITLE_STARTS.items() if title.startswith(start)), None)


def _bare_heading(folded: str, at_end: bool) -> Marker | More | None:
    """Read `思考ステップ` without its `#`: it begins thinking where it stands alone or before a colon."""
    unsettled = len(folded) < WINDOW and not at_end
    title = _BARE_STEP.match(folded)
    if title is None:
        return MORE if unsettled and _STEP_TITLE.startswith(folded.replace(_FILLER, "")) else None
    end = title.end()
    if end == len(folded) and unsettled:
        return MORE
    return Marker("open", "seed", False, end) if folded[end : end + 1] in {"", "\n", ":"} else None
