"""How alike two records are: exactly after normalisation, or by the character 3-grams that they share.

Japanese has no spaces, hence characters, not words. A record's question and its context are compared apart:
many records ask the same of different contexts, or different things of one.
"""

from __future__ import annotations

import re
import unicodedata

from so8t_helpers.dataset.policy.harm import normalised

NGRAM = 3
APART = "\0"  # between a record's normalised question and its normalised context
# Punctuation and spaces say nothing, but where a number, a sign or a name would be another without them: all
# of Unicode's symbols (+, <, =, ×, emoji), these always, and the rest of these beside a digit or a symbol.
_ALWAYS, _BESIDE = "#&@*%/\\", "-!()[]{}'"
_POINTS = ".,:"  # between two digits alone
_SYMBOLS = {c for c in map(chr, range(0x10000)) if unicodedata.category(c)[0] == "S"} | set(_ALWAYS)
_BLANK = {
    code: None
    for code in range(0x10000)
    if unicodedata.category(chr(code)) in {"Pc", "Pd", "Pe", "Pf", "Pi", "Po", "Ps", "Cc", "Cf"}
    and chr(code) not in _ALWAYS + _BESIDE + _POINTS
}
_APART_FROM_DIGITS = re.compile(r"\s+(?!\d)|(?<!\d)\s+")
_DIGITS_APART = re.compile(r"\d\s+\d")
_DOUBTFUL = re.compile(rf"[{_POINTS}]|[{re.escape(_BESIDE)}]+")
_NUMBERS, _NOT_LETTERS = re.compile("[0-9]+"), re.compile(r"[\W\d_]+")


def compared_parts(question: str, context: str, history: tuple[str, ...], already: bool) -> list[str]:
    """Return what is compared of a record, normalised: its question, and what that is about or comes after.

    Args:
        context: the end of the question, where it was given apart.
        history: the turns of a dialogue before the question.
        already: as `normalise_question` has it.
    """
    if context and question.endswith(context):
        question = question[: -len(context)]
    else:
        context = ""
    background = "\n".join(filter(None, (*history, context)))
    return [normalise_question(part, already) for part in (question, background) if part]


def normalise_question(question: str, already: bool = False) -> str:
    """Return a text without what does not matter when two are compared: width, case, punctuation, spaces.

    What tells 3+5, 3×5 and 35, x>3 and x<3, or C and C++ apart stays. `already` says that the text is
    known to be in NFKC and lower case.
    """
    text = question if already else normalised(question)
    # Most noise is a few signs, and taking those out first leaves nothing for the regexes to do.
    letters = text.replace("、", "").replace("。", "").replace("\n", "").replace(" ", "")
    plain = letters.isalnum()
    apart = (len(letters) < len(text) or not plain) and _DIGITS_APART.search(text) is not None
    if plain and not apart:
        return letters
    letters = " ".join(_APART_FROM_DIGITS.sub("", text).split()) if apart else "".join(text.split())
    return _DOUBTFUL.sub(_where_it_says_something, letters.translate(_BLANK)) or text


def _where_it_says_something(match: re.Match[str]) -> str:
    before, after = (match.string[max(at, 0) : at + 1] for at in (match.start() - 1, match.end()))
    if match[0] in _POINTS:
        return match[0] if before.isdecimal() and after.isdecimal() else ""
    return match[0] if any(c.isdecimal() or c in _SYMBOLS for c in (before, after)) else ""


def exactly(text: str) -> str:
    """Return what two normalised texts must have in common to be near-duplicates: numbers and signs."""
    return "" if text.isalpha() else "|".join((_NUMBERS if text.isalnum() else _NOT_LETTERS).findall(text))


def jaccard(a: str, b: str) -> float:
    """Return the Jaccard similarity of two normalised texts' 3-gram sets; of two empty ones, 1."""
    x, y = (
        {text[i : i + NGRAM] for i in range(max(len(text) - NGRAM + 1, min(len(text), 1)))} for text in (a, b)
    )
    return len(x & y) / len(x | y) if x or y else 1.0


def alike(a: str, b: str, threshold: float) -> bool:
    """Say whether both the questions of two records and their contexts are alike by `threshold` or more."""
    parts = zip(a.partition(APART), b.partition(APART), strict=True)
    return all(jaccard(one, other) >= threshold for one, other in parts)
