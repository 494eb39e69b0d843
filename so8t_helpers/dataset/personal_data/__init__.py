r"""Personal and confidential data in Japanese and English text: found by form, checksum and context.

The usual regexes fail on Japanese text, where `\b` sees no border between は and taro@example.com; borders
here are ASCII look-arounds. Folding is one character to one character, so that what is found in the folded
text is cut out of the original at the same place.
"""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass
from itertools import chain

from so8t_helpers.dataset.personal_data.finders import FINDERS
from so8t_helpers.dataset.policy.harm import normalised

MASKS = {
    "email": "[メールアドレス]",
    "phone": "[電話番号]",
    "my_number": "[個人番号]",
    "corporate_number": "[法人番号]",
    "credit_card": "[カード番号]",
    "address": "[住所]",
    "ip_address": "[IPアドレス]",
    "secret": "[認証情報]",
}
NOT_COVERED = (
    "names of people; addresses without a postal code or house number; anything in pictures or sound"
)

_LONG_VOWEL_AS_DASH = re.compile(r"(?<=[0-9])ー(?=[0-9])")


# Signs, full-width forms, mathematical letters and digits: the blocks that hold styled ASCII.
_STYLED = (range(0x80, 0x3100), range(0xFE00, 0x10000), range(0x1D400, 0x1D800), range(0x1FBF0, 0x1FBFA))
_FOLDS = {
    code: folded
    for code in chain(*_STYLED)
    if unicodedata.category(chr(code))[0] in "LNPSZ"
    and len(folded := unicodedata.normalize("NFKC", chr(code))) == 1
    and folded.isascii()
} | {0x3000: " ", 0xA0: " ", **{ord(dash): "-" for dash in "‐‑‒–—―−－ｰ"}}

# Cheap searches of normalised text (NFKC, lower case): a finder runs only where its own finds something.
FEWEST_IN_A_ROW = 7  # digits and signs that a number of any kind has at least
NO_LETTER = re.compile(r"[0-9\Wー]")
_DIGITS = re.compile(r"[0-9](?=[0-9\Wー]{6})(?:[\Wー]{0,2}[0-9]){6}")
_DOTS = re.compile(r"[0-9]\.[0-9]{1,3}\.[0-9]")
_PREFECTURE = re.compile(r"[都道府県].{0,20}[市区町村郡].{0,24}[丁番号の0-9-]")
_ZIP = re.compile(r"[a-z]{2},? [0-9]{5}")
_SECRETS = (
    *("key", "token", "passw", "pwd", "secret", "bearer"),
    *("パスワード", "キー", "秘密鍵", "トークン", "シークレット", "暗証番号"),
    *("sk-", "k_live_", "k_test_", "ghp_", "gho_", "ghu_", "ghs_", "ghr_", "github_pat_", "glpat-", "hf_"),
    *("npm_", "akia", "asia", "aiza", "xox", "eyj", "-----begin"),
)
_SECRET = re.compile("|".join(_SECRETS))
# What `looks` needs to find anything, besides a run of digits or a dot after one: one of these signs, or the
# first two characters of one of these words.
SIGNS = "〒@:都道府県"
BEGINNINGS = (*_SECRETS, ", ", "t)", "t]", "アット")


@dataclass(frozen=True, slots=True)
class Found:
    """One place of personal data: `text[start:end]` is of `kind`."""

    kind: str
    start: int
    end: int


def halfwidth(text: str) -> str:
    """Return `text` with full-width and styled ASCII made plain, character by character."""
    return text if text.isascii() else _LONG_VOWEL_AS_DASH.sub("-", text.translate(_FOLDS))


def looks(text: str) -> set[str]:
    """Return which finders are worth running on a text, which is `normalised`."""
    hits = {
        "digits": "〒" in text or _DIGITS.search(text),
        "dots": "." in text and _DOTS.search(text),
        "prefecture": _PREFECTURE.search(text),
        "zip": ", " in text and _ZIP.search(text),
        "at": "@" in text or "at)" in text or "at]" in text or "アット" in text,
        "secret": _SECRET.search(text),
        "colon": ":" in text,
    }
    return {name for name, hit in hits.items() if hit}


def find(text: str) -> list[Found]:
    """Return the places of personal data in `text`, in order, without overlaps."""
    hit = looks(normalised(text))
    if not hit:
        return []
    folded = halfwidth(text)
    found: list[Found] = []
    for kind, look, pattern, accept in FINDERS:
        for match in pattern.finditer(folded) if look in hit else ():
            start, end = match.span("value") if "value" in pattern.groupindex else match.span()
            free = all(end <= other.start or start >= other.end for other in found)
            if free and (accept is None or accept(match, folded)):
                found.append(Found(kind, start, end))
    return sorted(found, key=lambda place: place.start)


def mask(text: str, found: list[Found]) -> str:
    """Return `text` with each found place replaced by the name of its kind."""
    for place in reversed(found):
        text = text[: place.start] + MASKS[place.kind] + text[place.end :]
    return text
