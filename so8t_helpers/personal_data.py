r"""Personal and confidential data in Japanese and English text: found by form, checksum and context.

Covered: e-mail, telephone (JP and +country), My Number, corporate number, payment cards, postal addresses,
IP addresses, keys and tokens; full-width forms too. Not covered, since they need a model: names of people,
and addresses without a postal code or a prefecture.

The usual regexes fail on Japanese text, where `\b` sees no border between は and taro@example.com; borders
here are ASCII look-arounds. Folding is one character to one character, so that what is found in the folded
text is cut out of the original at the same place.
"""

from __future__ import annotations

import ipaddress
import re
import sys
import unicodedata
from collections.abc import Callable, Iterator
from dataclasses import dataclass

KINDS = ("email", "phone", "my_number", "corporate_number", "credit_card", "address", "ip_address", "secret")
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
NOT_COVERED = "names of people; addresses without a postal code or a prefecture; faces, voices, hand-writing"

_DASHES = "‐‑‒–—―−－ｰ"


def _folds() -> dict[int, str]:
    table = {ord(dash): "-" for dash in _DASHES} | {0x3000: " ", 0xA0: " "}
    for code in range(0x80, sys.maxunicode + 1):
        if code in table or unicodedata.category(chr(code))[0] not in "LNPSZ":
            continue
        folded = unicodedata.normalize("NFKC", chr(code))
        if len(folded) == 1 and folded.isascii():
            table[code] = folded
    return table


_FOLDS = _folds()
# The cheap looks that most texts end with, on NFKC in lower case: where none matches, nothing below does.
_HINT_DIGITS = re.compile(r"\d(?:[\Wー]{0,2}\d){6}|\d\.\d{1,3}\.\d")
_HINT_ADDRESS = re.compile(r"[都道府県][^\n]{0,20}[市区町村郡][^\n]{0,24}[丁番号\d]")
_HINT_HEX = re.compile(r"[0-9a-f:]:[0-9a-f]{0,4}:")
_HINT_WORDS = (
    *("@", "〒", "(at)", "[at]", "(アット)", "[アット]"),
    *(
        "key",
        "token",
        "passw",
        "pwd",
        "secret",
        "bearer",
        "パスワード",
        "キー",
        "秘密鍵",
        "トークン",
        "シークレット",
    ),
    *(
        "sk-",
        "k_live_",
        "k_test_",
        "gh",
        "glpat-",
        "hf_",
        "npm_",
        "akia",
        "asia",
        "aiza",
        "xox",
        "eyj",
        "-----begin",
    ),
)

_PREFECTURE = (
    "(?:東京都|北海道|(?:大阪|京都)府|(?:青森|岩手|宮城|秋田|山形|福島|茨城|栃木|群馬|埼玉|千葉|神奈川|新潟|富山|石川|福井|山梨|長野|"
    "岐阜|静岡|愛知|三重|滋賀|兵庫|奈良|和歌山|鳥取|島根|岡山|広島|山口|徳島|香川|愛媛|高知|福岡|佐賀|長崎|熊本|大分|宮崎|鹿児島|沖縄)県)"
)
_STREET_NUMBER = (
    r"[0-9一二三四五六七八九十]+(?:丁目|番地?|号|の|-)[0-9一二三四五六七八九十番号丁目地の-]*[0-9番号地]"
)
_STREET = r"(?:Street|St|Avenue|Ave|Road|Rd|Boulevard|Blvd|Lane|Ln|Drive|Dr|Court|Ct|Way|Place|Pl|Square|Sq)"


@dataclass(frozen=True, slots=True)
class Found:
    """One place of personal data: `text[start:end]` is of `kind`."""

    kind: str
    start: int
    end: int


def fold(text: str) -> str:
    """Return `text` with full-width and styled ASCII made plain, character by character."""
    return text if text.isascii() else text.translate(_FOLDS)


def hinted(text: str) -> bool:
    """Say, fast, whether `find` may find anything in `text`."""
    plain = unicodedata.normalize("NFKC", text).lower()
    return (
        _HINT_DIGITS.search(plain) is not None
        or any(word in plain for word in _HINT_WORDS)
        or _HINT_ADDRESS.search(plain) is not None
        or (":" in plain and _HINT_HEX.search(plain) is not None)
    )


def find(text: str) -> list[Found]:
    """Return the places of personal data in `text`, in order, without overlaps."""
    if not hinted(text):
        return []
    folded = fold(text)
    found: list[Found] = []
    for kind, pattern, accept in _FINDERS:
        for match in pattern.finditer(folded):
            start, end = match.span("value") if "value" in pattern.groupindex else match.span()
            if not accept(match, folded):
                continue
            if all(end <= other.start or start >= other.end for other in found):
                found.append(Found(kind, start, end))
    return sorted(found, key=lambda f: f.start)


def mask(text: str, found: list[Found]) -> str:
    """Return `text` with each found place replaced by the name of its kind."""
    for place in reversed(found):
        text = text[: place.start] + MASKS[place.kind] + text[place.end :]
    return text


def luhn_valid(digits: str) -> bool:
    """Luhn's check of a card number (ISO/IEC 7812-1)."""
    doubled = (int(d) * 2 for d in digits[-2::-2])
    return (sum(map(int, digits[-1::-2])) + sum(d - 9 if d > 9 else d for d in doubled)) % 10 == 0


def my_number_valid(digits: str) -> bool:
    """Check digit of a 12-digit My Number (Ordinance 85 of 2014, Internal Affairs Ministry, art. 5)."""
    weights = (6, 5, 4, 3, 2, 7, 6, 5, 4, 3, 2)
    rest = sum(int(d) * w for d, w in zip(digits, weights, strict=False)) % 11
    return int(digits[11]) == (0 if rest <= 1 else 11 - rest)


def corporate_number_valid(digits: str) -> bool:
    """Check digit of a 13-digit corporate number (Ordinance 70 of 2014 of the Ministry of Finance)."""
    body = sum(int(d) * (1 if i % 2 == 0 else 2) for i, d in enumerate(reversed(digits[1:])))
    return int(digits[0]) == 9 - body % 9


def _digits(text: str) -> str:
    return re.sub(r"\D", "", text)


def _always(match: re.Match[str], text: str) -> bool:
    return True


def _near(
    words: str, near: int, far: int, valid: Callable[[str], bool]
) -> Callable[[re.Match[str], str], bool]:
    """Accept where a context word stands close before; farther off only with a valid check digit."""
    pattern = re.compile(words, re.IGNORECASE)

    def accept(match: re.Match[str], text: str) -> bool:
        before = text[max(0, match.start() - near) : match.start()]
        if pattern.search(before):
            return True
        around = text[max(0, match.start() - far) : match.end() + near]
        return bool(pattern.search(around)) and valid(_digits(match.group()))

    return accept


_PHONE_WORDS = re.compile(
    r"電話|携帯|連絡先|内線|ファックス|ケータイ|スマホ|tel|fax|phone|mobile|call|☎|📞", re.IGNORECASE
)
_OTHER_NUMBER = re.compile(
    r"(?:注文|伝票|会員|管理|追跡|受付|商品|型番|品番|口座|予約|問い合わせ|整理|製造|シリアル)(?:番号|No|ID|コード)?\D{0,6}$"
    r"|(?:order|tracking|serial|invoice|item|part|product|id|isbn|jan|sku)\W*(?:no|number|id|code)?\W*(?:is)?\W*$",
    re.IGNORECASE,
)


def _is_phone(match: re.Match[str], text: str) -> bool:
    """A Japanese number has 10 or 11 digits; a landline without separators needs a context word."""
    raw, before = match.group(), text[max(0, match.start() - 14) : match.start()]
    if raw.startswith("+"):
        return 9 <= len(_digits(raw)) <= 14
    digits = _digits(raw)
    mobile = re.match(r"0[5789]0", digits) is not None
    if len(digits) not in ((11,) if mobile else (10, 11) if digits.startswith("0800") else (10,)):
        return False
    if _OTHER_NUMBER.search(before):
        return False
    return raw != digits or mobile or bool(_PHONE_WORDS.search(before))


def _is_card(match: re.Match[str], text: str) -> bool:
    digits = _digits(match.group())
    return len(set(digits)) > 1 and luhn_valid(digits)


def _is_ip(match: re.Match[str], text: str) -> bool:
    if re.search(
        r"(?:\bv|ver\.?|version|バージョン|版)\s*$", text[max(0, match.start() - 9) : match.start()], re.I
    ):
        return False
    try:
        address = ipaddress.ip_address(match.group())
    except ValueError:
        return False
    return not (address.is_loopback or address.is_unspecified or match.group().startswith("255."))


def _is_secret(match: re.Match[str], text: str) -> bool:
    """What follows a word such as password must look like one: 6 characters or more, not a plain word."""
    value = match.group("value")
    return bool(re.search(r"[0-9]", value) and re.search(r"[A-Za-z]", value)) or bool(
        re.search(r"[!#$%&*]", value)
    )


_FINDERS: tuple[tuple[str, re.Pattern[str], Callable[[re.Match[str], str], bool]], ...] = (
    (
        "secret",
        re.compile(
            r"-----BEGIN [A-Z ]{0,20}PRIVATE KEY-----[\s\S]*?(?:-----END [A-Z ]{0,20}PRIVATE KEY-----|$)"
        ),
        _always,
    ),
    (
        "secret",
        re.compile(
            r"(?<![A-Za-z0-9_-])(?:sk-[A-Za-z0-9_-]{20,200}|[sr]k_(?:live|test)_[A-Za-z0-9]{16,99}|gh[pousr]_[A-Za-z0-9]{30,99}"
            r"|github_pat_[A-Za-z0-9_]{22,99}|glpat-[A-Za-z0-9_-]{18,60}|hf_[A-Za-z0-9]{30,60}|npm_[A-Za-z0-9]{30,60}"
            r"|(?:AKIA|ASIA)[0-9A-Z]{16}|AIza[0-9A-Za-z_-]{35}|xox[abeprs]-[A-Za-z0-9-]{10,200}"
            r"|eyJ[A-Za-z0-9_-]{8,2000}\.[A-Za-z0-9_-]{8,4000}\.[A-Za-z0-9_-]{8,1000})(?![A-Za-z0-9_-])"
        ),
        _always,
    ),
    ("secret", re.compile(r"(?i:bearer)\s+(?P<value>[A-Za-z0-9._~+/-]{20,2000}=*)"), _always),
    (
        "secret",
        re.compile(
            r"(?i:(?<![A-Za-z])(?:api|access|secret|private)[ _-]?(?:access[ _-]?)?key|(?<![A-Za-z])(?:token|passwd|password|pwd|secret)"
            r"|パスワード|アクセスキー|APIキー|秘密鍵|トークン|シークレット)"
            r"\s?(?:は|が|:|=|\bis\b)[\s:=「『\"']{0,3}(?P<value>[A-Za-z0-9!#$%&*+./=?@^_~-]{6,200})"
        ),
        _is_secret,
    ),
    (
        "email",
        re.compile(
            r"(?<![A-Za-z0-9._%+-])[A-Za-z0-9][A-Za-z0-9._%+'-]{0,63}(?:@|\s?[(\[](?:at|アット)[)\]]\s?)"
            r"(?:[A-Za-z0-9-]{1,63}\.){1,8}[A-Za-z]{2,24}(?![A-Za-z0-9-])"
        ),
        _always,
    ),
    (
        "address",
        re.compile(
            rf"(?:〒\s?|(?<![0-9-]))[0-9]{{3}}-?[0-9]{{4}}(?![0-9-])[\s、,:)]{{0,3}}{_PREFECTURE}[^\s、。,「」()\n]{{2,40}}"
            r"(?:[ 　][^\s、。,「」()\n]{2,20}(?:ビル|タワー|号室|階|マンション|ハイツ|荘|[0-9]F?))?"
        ),
        _always,
    ),
    ("address", re.compile(r"〒\s?[0-9]{3}-?[0-9]{4}(?![0-9])"), _always),
    (
        "address",
        re.compile(
            rf"{_PREFECTURE}[^\s、。,「」()0-9\n]{{1,14}}?[市区町村郡][^\s、。,「」()\n]{{0,20}}?{_STREET_NUMBER}"
        ),
        _always,
    ),
    (
        "address",
        re.compile(
            rf"(?<![0-9A-Za-z])[0-9]{{1,5}} (?:[A-Z][A-Za-z.']{{0,20}} ){{1,4}}{_STREET}\b\.?,? ?(?:[A-Z][A-Za-z.# ]{{0,30}},? ){{1,3}}"
            r"[A-Z]{2} [0-9]{5}(?:-[0-9]{4})?(?![0-9])"
        ),
        _always,
    ),
    (
        "address",
        re.compile(
            r"(?<![0-9A-Za-z-])[0-9]{1,4}(?:-[0-9]{1,4}){1,3},? [A-Z][A-Za-z-]{1,30}(?:,? [A-Z][A-Za-z-]{1,30}){0,3},? [0-9]{3}-[0-9]{4}(?![0-9-])"
        ),
        _always,
    ),
    (
        "credit_card",
        re.compile(
            r"(?<![0-9])(?:3[47][0-9]{2}[ -]?[0-9]{6}[ -]?[0-9]{5}|3(?:0[0-5]|[68][0-9])[0-9][ -]?[0-9]{6}[ -]?[0-9]{4}"
            r"|(?:4[0-9]{3}|5[1-5][0-9]{2}|2[2-7][0-9]{2}|35[2-8][0-9]|6(?:011|[245][0-9]{2}))(?:[ -]?[0-9]{4}){3})(?![0-9])"
        ),
        _is_card,
    ),
    (
        "my_number",
        re.compile(r"(?<![0-9])[0-9]{4}[ -]?[0-9]{4}[ -]?[0-9]{4}(?![0-9])"),
        _near(r"マイナンバー|個人番号|my ?number|individual number", 16, 40, my_number_valid),
    ),
    (
        "corporate_number",
        re.compile(r"(?<![0-9])[0-9](?:[ -]?[0-9]{4}){3}(?![0-9])"),
        _near(r"法人番号|corporate number", 16, 40, corporate_number_valid),
    ),
    (
        "phone",
        re.compile(
            r"(?<![0-9+.-])(?:\+[0-9]{1,3}[ -]?(?:\(0\) ?)?[0-9]{1,4}(?:[ -]?[0-9]{2,4}){1,3}"
            r"|\(0[0-9]{1,4}\) ?[0-9]{1,4}[ -]?[0-9]{3,4}"
            r"|0[0-9]{1,4}\([0-9]{1,4}\)[ -]?[0-9]{3,4}"
            r"|0[0-9]{1,4}(?P<s>[ -]|\.)[0-9]{1,4}(?P=s)[0-9]{3,4}"
            r"|0[0-9]{2}-[0-9]{8}|0[0-9]{9,10})(?![0-9]|[.-][0-9])"
        ),
        _is_phone,
    ),
    (
        "ip_address",
        re.compile(r"(?<![0-9A-Za-z.:])(?:[0-9]{1,3}\.){3}[0-9]{1,3}(?![0-9A-Za-z:]|\.[0-9])"),
        _is_ip,
    ),
    (
        "ip_address",
        re.compile(r"(?<![0-9A-Za-z:])(?:[0-9A-Fa-f]{0,4}:){2,7}[0-9A-Fa-f]{0,4}(?![0-9A-Za-z:])"),
        _is_ip,
    ),
)


def kinds(found: list[Found]) -> Iterator[str]:
    """Yield the kind of each found place."""
    return (place.kind for place in found)
