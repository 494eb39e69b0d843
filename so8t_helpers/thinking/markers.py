"""The marks that part thinking from answer: how they are spelt, how they are misspelt, how one is recognised.

The rule of the gate: **what opens a final part must be exact, what ends one may be approximate.**
A tag counts as exact in any case, width and with white space at its edges (`＜ FINAL ＞`), since its meaning
is plain; a misspelt one (`<thnk-task>`, `<final`) only ever takes permission away.
"""

from __future__ import annotations

import re
from functools import lru_cache

import regex

from so8t_helpers.thinking.folding import FILLER, OPENING, OTHER_FORMS, fold
from so8t_helpers.thinking.headings import (
    ENGLISH_LETTERS,
    bare_heading,
    decision_line,
    english_heading,
    heading,
)
from so8t_helpers.thinking.spelling import (
    FINAL_TAG,
    LINE_START,
    MORE,
    THINK_TAGS,
    WINDOW,
    Marker,
    More,
    slips,
)

# Where a mark may begin. Most of what looks like one is ruled out here, where it costs least: by a character
# that cannot go on a mark, a name too short for one (`<td>`, `a < b です`), or a heading's first two letters.
_PLAIN_LETTER = "(?:(?![思考最終回])[0-9a-zぁ-ゖ一-鿿])"
_MAY_FOLLOW = r"""a-z0-9\-_*'"`.!?,:;~+$@^\x00-\x1f\x7f-\U0010ffff"""
_OTHERS = OTHER_FORMS + OPENING
MARK_STARTS = r"<&[#\%思判Dd" + _OTHERS  # a text without any of these holds no mark
# Control tokens of some vocabularies that are spelt like an HTML element.
_TOKENS = ("s", "unk", "pad", "bos", "eos")
CANDIDATE = re.compile(
    # The set comes first, outside of the case-blind part: so the search jumps from one of it to the next.
    rf"""[<&\[\#\\%思判Dd{_OTHERS}](?i:"""
    rf"""(?<=<)(?!(?!/?(?:{"|".join(_TOKENS)}|sys)>)"""
    rf"""[\s/]{{0,4}}[a-z0-9]{{0,3}}\s{{0,2}}[=()%&#<>\]{{}}ぁ-ゖァ-ヺ一-鿿])(?![^\s/\\|{_MAY_FOLLOW}])"""
    r"""|(?<=d)(?![^e\x80-\U0010ffff])(?!e[^c\x80-\U0010ffff])(?!ec[^i\x80-\U0010ffff])"""
    r"""|(?<=&)(?![^al#\x80-\U0010ffff])|(?<=\[)(?![^\s/\\trfisa\-_*'"`\x80-\U0010ffff])"""
    rf"""|(?<=\#)(?![^#\s*_\[{ENGLISH_LETTERS}\x80-\U0010ffff])"""
    rf"""(?![#\ *_]{{0,8}}(?!.?[{ENGLISH_LETTERS}]){_PLAIN_LETTER}{{2}})"""
    r"""|(?<=\\)(?![^ux0])(?!u[^0{])(?!x[^325])(?!0[^7])|(?<=%)(?![^32u])(?!3[^c])(?!2[^56])(?!u[^0])"""
    rf"""|(?<=思)(?!考?[ぁ-ん])|(?<=判)(?![ぁ-ん一-鿿](?<!定))|(?<=[{_OTHERS}]))"""
)

# What models and serving stacks call private text; longest first, so that a prefix match is specific.
_NAMES = ("thinksafety", "thinkpolicy", "thinktask", "reasoning", "thinking", "thought", "think", FINAL_TAG)
_TAG_OF = {name: name for name in _NAMES} | {tag.replace("-", ""): tag for tag in THINK_TAGS}
# Others' names for it are looked for as they are spelt, and so are the marks of other models' templates.
_WHOLE_NAMES = ("analysis", "reflection", "scratchpad", "monologue")
_EXACT_TAGS = frozenset((*_TAG_OF.values(), *_WHOLE_NAMES))
# Words that are one slip from a name, or go on after one, and mean what they say: `Vec<Thing>`.
ORDINARY = {
    *("chink", "finale", "finalise", "finalist", "finalize", "finally", "finals"),
    *("seasoning", "thank", "thick", "thin", "thing", "thinker", "thinning", "though", "thunk"),
}
# What makes a mark of a word that goes on after `final`: `<final_answer>`, but not `<finalPrice>`.
_FINAL_WHAT = (
    *("analysis", "answer", "assistant", "block", "channel", "conclusion", "content", "decision", "draft"),
    *("final", "message", "note", "output", "part", "reason", "reply", "response", "result", "section"),
    *("solution", "step", "summary", "tag", "text", "think", "thought", "verdict"),
)
# One of the first two letters of a name stays within these even after one slip.
_EARLY_LETTERS = frozenset("tfrhie")


def find_marker(window: str, at_end: bool, line: str, style: str | None) -> Marker | More | None:
    """Decide what begins at the first character of `window`.

    Args:
        window: at most `WINDOW` characters; fewer only where the text (so far) ends.
        line: what stands before it on its line, at least the first `LINE_START` characters.
        style: of the text so far, None before its first mark.
    """
    if canonical := _CANONICAL.match(window):
        return _CANONICAL_MARKERS[canonical.group()]
    folded = fold(window)
    first = folded[0]
    if first == "#":
        line_blank = len(line) < LINE_START and not line.strip()
        found = heading(folded, at_end, line_blank)
        if found is None and style in {None, "english"}:
            found = english_heading(window, folded, at_end, line_blank, style is None)
        return found
    if first == "思":
        return bare_heading(folded, at_end, fold(line)) if len(line) < LINE_START else None
    if first in "判d":
        return decision_line(folded, at_end, fold(line)) if len(line) < LINE_START else None
    if first in "&/%":
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

_TAG = re.compile(
    rf"([\s{FILLER}]*/?[\s{FILLER}/]*(?:[a-z]{{1,12}}:)?)([a-zA-Z0-9\s\-_*'\"`.!?,:;~+$@^{FILLER}]*)"
)
_NOT_LETTERS = re.compile("[^a-zA-Z0-9]")
_CONTROL = re.compile(rf"\s?([a-z0-9_\-▁{FILLER}]*)\s?")
# Names of control tokens of Phi-3.5, Phi-4 and their like: these count without their closing bar too.
_ROLES = frozenset({"end", "user", "assistant", "system", "endoftext", "im_start", "im_sep", "im_end"})
# What other models' templates write in brackets without bars.
_FOREIGN = {
    "<": ("sys", "start_of_turn", "end_of_turn", "tool_call", "tool_response"),
    "[": ("inst", "system_prompt", "available_tools", "tool_calls", "tool_results"),
}
_BRACKETED = {
    bracket: {
        **dict.fromkeys(names, "special"),
        **(dict.fromkeys(_TOKENS, "token") if bracket == "<" else {}),
    }
    for bracket, names in _FOREIGN.items()
}
# The first letters of what is looked for as it is spelt.
_WHOLE_STARTS = frozenset(
    letters[:n]
    for word in (*_WHOLE_NAMES, *_TOKENS, *_FOREIGN["<"], *_FOREIGN["["])
    if (letters := word.replace("_", ""))
    for n in range(2, len(letters) + 1)
)


def _tag(folded: str, start: int, at_end: bool, bracket: str) -> Marker | More | None:
    """Read a tag whose bracket ends before `start`: slash, name, closing bracket."""
    found = _TAG.match(folded, start)
    assert found  # Every part of the pattern may be empty.
    lead, name = found.groups()
    end = found.end()
    if not name and bracket in "<«" and folded[end : end + 1] == "|":
        return _control_token(folded, end + 1, at_end)
    letters = _NOT_LETTERS.sub("", name).lower()
    unsettled = end == len(folded) and end < WINDOW and not at_end
    colon_may_follow = unsettled and ":" not in lead and len(name) < 13 and name.isalpha()
    early = _EARLY_LETTERS.isdisjoint(letters[:2]) and letters not in _WHOLE_STARTS
    if len(letters) > 1 and early and not colon_may_follow:
        return None
    if unsettled:
        return MORE
    word = name.replace(FILLER, "").strip()
    terminator = folded[end : end + 1]
    closed = terminator != "" and terminator in ("]" if bracket == "[" else ">»")
    foreign = _BRACKETED["[" if bracket == "[" else "<"].get(word.lower())
    if foreign and closed and not lead.strip(f"/{FILLER}"):
        return Marker(foreign, "", True, end + 1)
    known = _meant_name(letters, name.lower())
    if known is None:
        return None
    if bracket == "[" and not (closed and word.replace("-", "") in _NAMES):
        return None
    if not closed and any(c.isspace() for c in lead):
        return None  # `i < final_count` is arithmetic
    if lead[:1].isspace() and "\n" in name.strip():
        return None  # `< old` and, some lines on, `> new` are a difference
    plain = lead.count("/") < 2 and ":" not in lead
    exact = bracket == "<" and terminator == ">" and word in _EXACT_TAGS and plain
    close = "/" in lead
    kind = ("final_close" if close else "final") if known == FINAL_TAG else ("close" if close else "open")
    return Marker(kind, known, exact, end + closed)


_SEMICOLON = "(?:;|%(?:25)*3b)"
_AMPERSAND = rf"(?:&|%(?:25)*26|/+(?:u0026|x26))(?:(?:amp|#0*38|#x0*26){_SEMICOLON}?)*"
_ESCAPE = regex.compile(  # a backslash is folded to a slash
    rf"{_AMPERSAND}(?:lt|#0*60|#x0*3c){_SEMICOLON}?|%(?:25)*(?:u00)?3c"
    r"|/+(?:(?:u005c|x5c)/*)*(?:u003c|u\{0*3c\}|x3c|074)"
)


def _escaped_tag(folded: str, at_end: bool) -> Marker | More | None:
    """Read a tag whose bracket is an entity or an escape, or one of one: what shows it may undo that."""
    unsettled = len(folded) < WINDOW and not at_end
    found = _ESCAPE.match(folded, partial=unsettled)
    if found is None:
        return None
    after = folded[found.end() :]
    if unsettled and (found.partial or regex.fullmatch(f"{_SEMICOLON}?", after, partial=True)):
        return MORE
    return _tag(folded, found.end(), at_end, "&")


@lru_cache(maxsize=4096)
def _meant_name(letters: str, name: str) -> str | None:
    """Return the known tag that a name is or was meant to be, None for any other tag."""
    words = name.split(maxsplit=1)
    first = _NOT_LETTERS.sub("", words[0]) if words else ""
    if words and (words[0] in ORDINARY or _pointed(words[0])):
        return None
    if first in _WHOLE_NAMES:
        return "think"
    if _goes_on(first):
        return None
    for known in _NAMES:
        if letters.startswith(known) and known != "think":
            return _TAG_OF[known]
    for known in _NAMES:
        allowed = 1 if len(known) < 9 else 2
        if abs(len(first) - len(known)) <= allowed and slips(first, known) <= allowed:
            return _TAG_OF[known]
    return "think" if letters.startswith("think") else None


def _pointed(word: str) -> bool:
    """Say whether this is a type as in `<Thing*>` or `<Thing, U>`; `<thin*>` may be half a mark."""
    return word[-1] in ",*" and word[:-1] in ORDINARY and not any(n.startswith(word[:-1]) for n in _NAMES)


def _goes_on(word: str) -> bool:
    """Say whether a word goes on after `final` as no mark does: far from it, and from what is said of one."""
    rest = word.removeprefix(FINAL_TAG)
    if rest == word or len(rest) < 3:
        return False
    return not any(
        slips(rest[: len(what) + extra], what) <= 1 for what in _FINAL_WHAT for extra in (-1, 0, 1)
    )


def _control_token(folded: str, start: int, at_end: bool) -> Marker | More | None:
    """Read a chat template's control token, `<|name|>` (any width of bar): nothing goes on after it."""
    found = _CONTROL.match(folded, start)
    assert found  # Every part of the pattern may be empty.
    end, name = found.end(), found.group(1).replace(FILLER, "")
    if end == len(folded) and end < WINDOW and not at_end:
        return MORE
    if name in _ROLES or (name and folded[end : end + 1] in {"|", ">"}):
        return Marker("special", "", True, end)
    return None
