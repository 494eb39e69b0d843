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

from so8t_helpers.dataset.personal_data.cued import CUES
from so8t_helpers.dataset.personal_data.finders import FINDERS
from so8t_helpers.dataset.personal_data.names import NameFinder
from so8t_helpers.dataset.personal_data.plates import PLACES
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
    "bank_account": "[口座番号]",
    "passport": "[旅券番号]",
    "driving_licence": "[免許証番号]",
    "health_insurance": "[保険証番号]",
    "pension_number": "[年金番号]",
    "number_plate": "[車両番号]",
    "account": "[アカウント]",
    "birth_date": "[生年月日]",
    "name": "[氏名]",
}
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
DASHES = "-‐‑‒–—―−ー"
NO_LETTER = re.compile(r"[0-9\Wー]")
_DIGITS = re.compile(rf"[0-9](?:[{DASHES} ().]{{0,2}}[0-9]){{6}}")
_DOTS = re.compile(r"[0-9]\.[0-9]{1,3}\.[0-9]")
_PREFECTURE = re.compile(r"[都道府県].{0,20}[市区町村郡].{0,24}[丁番号の0-9-]")
_ZIP = re.compile(r"[a-z]{2},? [0-9]{5}")
_SECRETS = (
    *("key", "token", "passw", "pw", "secret", "bearer"),
    *("パスワード", "キー", "秘密鍵", "トークン", "シークレット", "暗証番号"),
    *("sk-", "k_live_", "k_test_", "ghp_", "gho_", "ghu_", "ghs_", "ghr_", "github_pat_", "glpat-", "hf_"),
    *("npm_", "akia", "asia", "aiza", "xox", "eyj", "-----begin"),
)
_SECRET = re.compile("|".join(_SECRETS))
_EVERY_CUE = [word for words in CUES.values() for word in words]
_ASCII_CUES = tuple(filter(str.isascii, _EVERY_CUE))
_CUE = re.compile("|".join(re.escape(word) for word in _EVERY_CUE if not word.isascii()))
_PLATE = re.compile(f"(?:{'|'.join(PLACES)})[ 0-9]")
_HOUSE = re.compile(rf"[0-9][{DASHES}][0-9]|丁目|[0-9]番|町[0-9]")
_TOWN = re.compile("[市区町村郡]")
_KU = re.compile("[0-9]-[0-9].{0,70}-(?:ku|shi|cho|machi|mura|gun)(?![a-z])")
_AT = re.compile(r"@|at[)\]}>】]|アット|あっと| dot |_at_|: [a-z0-9._%+-]{1,64} at ")
# What `looks` needs to find anything, besides a run of digits, or a dot, dash or 番 after one: one of these
# signs, the first two characters of one of these words, or the first three of one of `WORDS`.
SIGNS = "〒@:都道府県"
AFTER_DIGIT = f".番{DASHES}"
BEGINNINGS = (*_SECRETS, ", ", "t)", "t]", "t}", "t>", "t】", "アット", "丁目")
WORDS = (
    *(*_EVERY_CUE, "あっと", " dot ", "_at_", *(f"町{digit}" for digit in range(10))),
    *(place + after for place in PLACES for after in " 0123456789"),
)


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
        "at": _AT.search(text),
        "house": _TOWN.search(text) and _HOUSE.search(text),
        "ku": "-" in text and _KU.search(text),
        "plate": _PLATE.search(text),
        "secret": _SECRET.search(text),
        "colon": ":" in text,
    }
    found = {name for name, hit in hits.items() if hit}
    # A regex is fastest where few characters begin a word, substrings where most letters do.
    if _CUE.search(text) or any(word in text for word in _ASCII_CUES):
        found |= {group for group, words in CUES.items() if any(word in text for word in words)}
    return found


def find(text: str, names: NameFinder | None = None) -> list[Found]:
    """Return the places of personal data in `text`, in order, without overlaps; `names` finds people's."""
    hit = looks(normalised(text))
    if not hit and names is None:
        return []
    folded = halfwidth(text)
    found: list[Found] = []
    taken = bytearray(len(text))  # 1 where something was found: a look there takes no time
    for kind, look, pattern, accept in FINDERS:
        for match in pattern.finditer(folded) if look in hit else ():
            start, end = match.span("value") if "value" in pattern.groupindex else match.span()
            if taken.find(1, start, end) < 0 and (accept is None or accept(match, folded)):
                found.append(Found(kind, start, end))
                taken[start:end] = b"\1" * (end - start)
    for start, end in names(text) if names else ():
        if taken.find(1, start, end) < 0:
            found.append(Found("name", start, end))
            taken[start:end] = b"\1" * (end - start)
    return sorted(found, key=lambda place: place.start)


def mask(text: str, found: list[Found]) -> str:
    """Return `text` with each found place replaced by the name of its kind."""
    parts, end = [], 0
    for place in found:
        parts += [text[end : place.start], MASKS[place.kind]]
        end = place.end
    return "".join([*parts, text[end:]])
