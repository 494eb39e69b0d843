"""What tells a personal number from any other: check digits, and the words around it."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Callable

from stdnum import luhn

Accept = Callable[[re.Match[str], str], bool]

_PHONE_WORDS = re.compile(
    r"電話|携帯|連絡先|内線|ファックス|ケータイ|スマホ|tel|fax|phone|mobile|cell|call|☎|📞", re.IGNORECASE
)
_OTHER_NUMBER = re.compile(
    r"(?:注文|伝票|会員|管理|追跡|受付|商品|型番|品番|口座|予約|整理|製造|シリアル|識別|登録|学籍|社員|社員証)"
    r"(?:番号|No|ID|コード)?[^0-9A-Za-z]{0,6}$"
    r"|(?:order|tracking|serial|invoice|item|part|product|id|isbn|jan|sku|reference|ref)"
    r"\W*(?:no|number|id|code)?\W*(?:is)?\W*$",
    re.IGNORECASE,
)
_VERSION = re.compile(r"(?:(?<![a-z])v|ver\.?|version|バージョン|版|節|項|section)\s*$", re.IGNORECASE)


def digits_of(text: str) -> str:
    """Return the ASCII digits of a text."""
    return re.sub(r"[^0-9]", "", text)


def near(words: str, valid: Callable[[str], bool]) -> Accept:
    """Accept close after one of `words`; farther off, or before them, only with a valid check digit.

    The words are needed in any case: one number in ten passes My Number's check by chance.
    """
    pattern = re.compile(words, re.IGNORECASE)

    def accept(match: re.Match[str], text: str) -> bool:
        start, end = match.span()
        if pattern.search(text[max(0, start - 16) : start]):
            return True
        return bool(pattern.search(text[max(0, start - 40) : end + 16])) and valid(digits_of(match.group()))

    return accept


def is_phone(match: re.Match[str], text: str) -> bool:
    """A Japanese number has 10 or 11 digits; a landline without separators needs a context word."""
    raw, before = match.group(), text[max(0, match.start() - 14) : match.start()]
    digits = digits_of(raw)
    if _OTHER_NUMBER.search(before):
        return False
    if raw.startswith("+"):
        return 9 <= len(digits) <= 14
    if raw[0] not in "0(":  # as in America: the text must say what it is
        return _PHONE_WORDS.search(before) is not None
    mobile = re.match(r"0[5789]0[1-9]", digits) is not None and not digits.startswith("0800")
    lengths = (11,) if mobile else (10, 11) if digits.startswith("0800") else (10,)
    if len(digits) not in lengths or digits.startswith("00"):
        return False
    return raw != digits or mobile or bool(_PHONE_WORDS.search(before))


def is_card(match: re.Match[str], text: str) -> bool:
    """A card number passes Luhn's check, and nothing before it names another kind of number."""
    digits = digits_of(match.group())
    before = text[max(0, match.start() - 14) : match.start()]
    return luhn.is_valid(digits) and not _OTHER_NUMBER.search(before)


def is_ip(match: re.Match[str], text: str) -> bool:
    """An address of some host: not a version number, a netmask, the loopback or the unspecified one."""
    if _VERSION.search(text[max(0, match.start() - 9) : match.start()]):
        return False
    try:
        address = ipaddress.ip_address(match.group())
    except ValueError:
        return False
    return not (address.is_loopback or address.is_unspecified or match.group().startswith("255."))


def is_secret(match: re.Match[str], text: str) -> bool:
    """What follows a word such as password looks like one: digits with letters, or signs."""
    value = match.group("value")
    mixed = re.search(r"[0-9]", value) and re.search(r"[A-Za-z]", value)
    return bool(mixed) or re.search(r"[!#$%&*]", value) is not None


def says_at(match: re.Match[str], text: str) -> bool:
    """A sign in an e-mail address's @ place: the text says so, or it is spelled out."""
    return (
        "_at_" in match.group() or re.search(r"[@]|アット", text[match.end() : match.end() + 30]) is not None
    )
