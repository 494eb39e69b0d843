"""The headings that part thinking from answer, Japanese and English: how they are recognised in a text.

English headings are ordinary words, so they count only in a text whose first mark is the whole line
`# Thinking`; every other text is read as if there were no English format. In such a text `# Final answer`, a
whole line written just so, opens the final part. A heading takes permission away where the title or one like
it is all that stands on its line, or is followed by a colon, a full stop, a dash or what begins a mark:
`## thinking`, `#Final Answer:`, `# Thinking steps`, but neither `# Thinking about trees` nor `# Final answers
and scores`.
Without a `#` the words are no mark.

The line of the decision (`判定: ALLOW`, `Decision: ALLOW`) is a mark as well, in a text of any style.
"""

from __future__ import annotations

import re
from functools import lru_cache

import regex

from so8t_helpers.thinking.folding import FILLER, fold
from so8t_helpers.thinking.spelling import (
    DECISION_LINES,
    ENGLISH_FINAL,
    ENGLISH_THINKING,
    LABELS,
    MORE,
    SEED_FINAL,
    SEED_THINKING,
    WINDOW,
    Marker,
    More,
    slips,
)

ENGLISH_LETTERS = "thfin"  # one of a title's first two letters is among them even after one slip
_NOT_LETTERS = re.compile("[^a-zA-Z0-9]")


def _reading(title: str) -> str:
    """Return a title in full-size katakana, so that `すてっぷ` and `ステツプ` read like `ステップ`."""
    return title.translate(_KANA)


_HIRAGANA = {code: chr(code + 0x60) for code in range(0x3041, 0x3097)}
_SMALL = dict(zip("ァィゥェォッャュョ", "アイウエオツヤユヨ", strict=True))
_KANA = {code: _SMALL.get(kana, kana) for code, kana in _HIRAGANA.items()} | str.maketrans(_SMALL)
_STEP_TITLE, _FINAL_TITLE = fold(SEED_THINKING[2:]), fold(SEED_FINAL[2:])
_TITLES = ((_reading(_STEP_TITLE), "open"), (_reading(_FINAL_TITLE), "final"))
# Other words for the same, Chinese ones among them: the base model's languages run into each other.
_OTHER_TITLES = ("思考プロセス", "思考過程", "思考过程", "思考手順", "思考内容", "思考步骤")
_TITLE_STARTS = tuple(_reading(fold(title)) for title in ("思考ス", "思考步", *_OTHER_TITLES))
_THINKING_ALONE = re.compile(r"思考[\W\d]*(?:$|:)")
# What one of a title's first two characters is even after one slip.
_EARLY_TITLE = frozenset(_STEP_TITLE[:3] + _FINAL_TITLE[:3])
_TITLE_LENGTH = 8  # one more than the longest title with a slip
_HEADING_LEAD = re.compile(rf"[# \t*_\[「{FILLER}]+")
_UNSEEN = re.compile(rf"[\s{FILLER}]+")
_SIGNS = r"(?:[^\w\n:]|_)*"
# `regex` says of a text that it may yet become a match (`partial`); `re` cannot.
_BARE_TITLES = "|".join(_reading(fold(title)) for title in (SEED_THINKING[2:], *_OTHER_TITLES))
_BARE = regex.compile(rf"(?:{_BARE_TITLES}){_SIGNS}\d*{_SIGNS}")
_BRACKETED = re.compile(rf"思{FILLER}*考[\s{FILLER}]*[>»\]]")
_BRACKET_BEFORE = re.compile(rf"[<«\[/][\s{FILLER}]*$")
# An HTML element before a heading on its line, as in `<details><summary>`: it is none of its words.
_ELEMENT = re.compile(r"(?:<|&lt;)/?[a-zA-Z][^<>&\n]*(?:>|&gt;)")
_DECISION = regex.compile(
    rf"(?:({fold(DECISION_LINES['seed'][:-2])})|{fold(DECISION_LINES['english'][:-2])}){_SIGNS}:[\W_]*?"
    rf"(?:{'|'.join(LABELS)})",
    regex.IGNORECASE,
)


def heading(folded: str, at_end: bool, line_blank: bool) -> Marker | More | None:
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
    whole = line.replace(FILLER, "").strip() in {_STEP_TITLE, _FINAL_TITLE}
    at_line_end = bool(newline) or (at_end and not full)
    if whole and at_line_end and line_blank and not lead.group().strip(f"# \t{FILLER}"):
        return Marker(kind, "seed", True, lead.end() + len(line) + len(newline))
    return Marker(kind, "seed", False, lead.end())


@lru_cache(maxsize=4096)
def _meant_title(title: str) -> str | None:
    """Return "open" or "final" where a heading begins with a title, or one with one slip; else None."""
    read = _reading(title)
    for known, kind in _TITLES:
        lengths = (len(known) - 1, len(known), len(known) + 1)
        if any(slips(read[:length], known) <= 1 for length in lengths):
            return kind
    return "open" if read.startswith(_TITLE_STARTS) or _THINKING_ALONE.match(title) else None


_ENGLISH_EXACT = re.compile(rf"(?:({ENGLISH_THINKING})|{ENGLISH_FINAL})[ \t\r]*(?:(\n)|$)")
_ENGLISH_TITLES = {
    **dict.fromkeys(("thinking", "thinkingsteps", "thinkingprocess", "thought", "thoughts"), "open"),
    **dict.fromkeys(("thoughtprocess", "chainofthought"), "open"),
    "finalanswer": "final",
}
_ENGLISH_LENGTH = 16  # one more than the longest of them; no slip of a longer title is looked for
_ENGLISH_EARLY, _DIGITS = frozenset(ENGLISH_LETTERS), "0123456789"
# Where a mark may begin too: it would end the text there, and leave the title alone on its line.
_TITLE_END = re.compile(r"[:.|=#<«\[&%/思]|\s-")


def english_heading(
    window: str, folded: str, at_end: bool, line_blank: bool, first: bool
) -> Marker | More | None:
    """Read a heading of the English format; before the first mark there is none but its exact opening."""
    full = len(window) == WINDOW
    unsettled = not (at_end or full)
    if line_blank and (exact := _ENGLISH_EXACT.match(window)):
        opening, newline = exact.groups()
        if newline or (at_end and not full):
            if opening or not first:
                return Marker("open" if opening else "final", "english", True, exact.end())
        elif unsettled:
            return MORE
    if first:
        return MORE if unsettled and line_blank and ENGLISH_THINKING.startswith(window) else None
    lead = _HEADING_LEAD.match(folded)
    assert lead  # The first character is "#".
    line, newline, _ = folded[lead.end() :].partition("\n")
    letters = _NOT_LETTERS.sub("", line).lower()
    if len(letters) > 1 and _ENGLISH_EARLY.isdisjoint(letters[:2]):
        return None
    title, *rest = _TITLE_END.split(line, maxsplit=1)
    kind = _meant_in_english(_NOT_LETTERS.sub("", title).lower()) if rest else None
    if kind is None:
        if unsettled and not newline and len(letters.rstrip(_DIGITS)) <= _ENGLISH_LENGTH:
            return MORE
        kind = _meant_in_english(letters)
    return Marker(kind, "english", False, lead.end()) if kind else None


@lru_cache(maxsize=4096)
def _meant_in_english(title: str) -> str | None:
    """Return "open" or "final" where a title's letters are one of ours, or one with a slip; else None."""
    title = title.rstrip(_DIGITS)
    if len(title) > _ENGLISH_LENGTH:
        return None
    return next((kind for known, kind in _ENGLISH_TITLES.items() if slips(title, known) <= 1), None)


def bare_heading(folded: str, at_end: bool, line: str) -> Marker | More | None:
    """Read `思考ステップ` without its `#`: it begins thinking where it stands alone or before a colon.

    Bullets, numbers, brackets and HTML elements may stand before it, and some signs after it; so may other
    words for it (`思考過程:`), and `<思考>` counts as well.
    """
    unsettled = len(folded) < WINDOW and not at_end
    if _BRACKET_BEFORE.search(line):
        if _BRACKETED.match(folded):
            return Marker("open", "seed", False, 2)
        if unsettled and _BRACKETED_SO_FAR.fullmatch(folded):
            return MORE
    if _words_before(line):
        return None
    plain = _reading(folded.replace(FILLER, ""))
    title = _BARE.match(plain, partial=unsettled)
    if title is None:
        return None
    end = title.end()
    if end == len(plain) and unsettled:
        return MORE
    alone = plain[end : end + 1] in {"", "\n", ":"} or any(sign in title.group() for sign in "-=|<«[#&/%")
    return Marker("open", "seed", False, 2) if alone else None


def _words_before(line: str) -> bool:
    """Say whether words stand on a line before what may be a heading: then it is none."""
    return any(map(str.isalpha, _ELEMENT.sub("", line) if "<" in line or "&" in line else line))


def decision_line(folded: str, at_end: bool, line: str) -> Marker | More | None:
    """Read the line of the decision; exact where nothing else but a full stop stands on it, in plain letters.

    Signs, numbers and HTML elements may stand before one that is not exact, anything but letters after it.
    """
    if _words_before(line):
        return None
    cut = len(folded) == WINDOW
    unsettled = not (at_end or cut)
    plain = folded.replace(FILLER, "")
    found = _DECISION.match(plain, partial=unsettled)
    if found is None:
        return None
    rest, newline, _ = plain[found.end() :].partition("\n")
    if unsettled and (found.partial or not newline):
        return MORE
    if rest[:1].isascii() and rest[:1].isalnum():
        return None
    whole = (newline or (at_end and not cut)) and not (line.strip() or rest.strip(" \t\r.。"))
    name, length = "seed" if found.group(1) else "english", found.end() + len(rest)
    plainly = found.group().islower() and folded[:length] == plain[:length]
    if whole and plainly and not {"_", "\n"} & {*found.group()}:
        return Marker("decision", name, True, length)
    return Marker("decision", name, False, 1)


_BRACKETED_SO_FAR = re.compile(rf"思{FILLER}*(?:考[\s{FILLER}]*)?")
