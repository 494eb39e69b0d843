"""The forms of personal data, as regexes over folded text; where two overlap, the earlier one here wins.

Every repetition is bounded, so that no text makes a search take more than linear time.
"""

from __future__ import annotations

import re

from stdnum import iban
from stdnum.jp import cn, in_

from so8t_helpers.dataset.personal_data import addresses, cued, plates
from so8t_helpers.dataset.personal_data.checks import (
    Accept,
    is_card,
    is_ip,
    is_phone,
    is_secret,
    near,
    says_at,
)

_PEM = r"-----BEGIN [A-Z ]{0,20}PRIVATE KEY-----[\s\S]{0,4000}?(?:-----END [A-Z ]{0,20}PRIVATE KEY-----|$)"
_ISSUED = (  # tokens that their issuers mark with a prefix
    r"(?<![A-Za-z0-9_-])(?:sk-[A-Za-z0-9_-]{20,200}|[sr]k_(?:live|test)_[A-Za-z0-9]{16,99}"
    r"|gh[pousr]_[A-Za-z0-9]{30,99}|github_pat_[A-Za-z0-9_]{22,99}|glpat-[A-Za-z0-9_-]{18,60}"
    r"|hf_[A-Za-z0-9]{30,60}|npm_[A-Za-z0-9]{30,60}|(?:AKIA|ASIA)[0-9A-Z]{16}|AIza[0-9A-Za-z_-]{35}"
    r"|xox[abeprs]-[A-Za-z0-9-]{10,200}"
    r"|eyJ[A-Za-z0-9_-]{8,2000}\.[A-Za-z0-9_-]{8,4000}\.[A-Za-z0-9_-]{8,1000})(?![A-Za-z0-9_-])"
)
_SAID = (  # "the password is ..."
    r"(?i:(?<![A-Za-z])(?:api|access|secret|private)[ _-]?(?:access[ _-]?)?key"
    r"|(?<![A-Za-z])[A-Za-z]{0,12}[_-]?(?:token|passwd|password|pwd|secret)(?:[_-]?key)?|(?<![A-Za-z])PW|パスワード|(?:API|アクセス|シークレット|秘密)キー|秘密鍵|トークン|シークレット)"
    r"\s?(?:は|が|:|=|\"\s?:|\bis\b)[\s:=「『\"']{0,3}(?P<value>[A-Za-z0-9!#$%&*+./=?@^_~-]{6,200})"
)
_PIN = r"暗証番号\s?(?:は|が|:|=)?[\s「]{0,2}(?P<value>[0-9]{4,8})(?![0-9])"
_TLD = "(?:com|net|org|jp|co|io|dev|me|info|edu|gov|uk|de|fr|app|biz)"
_OPEN, _CLOSE = r"\s?[(\[{<【]\s?", r"\s?[)\]}>】]\s?"
_DOT = rf"(?:\.|{_OPEN}(?i:dot|ドット|どっと){_CLOSE})"
_EMAIL = (
    rf"(?<![A-Za-z0-9._%+-])[A-Za-z0-9][A-Za-z0-9._%+'-]{{0,63}}(?:@|{_OPEN}(?i:at|アット(?:マーク)?|あっと|@){_CLOSE})"
    rf"(?:[A-Za-z0-9ぁ-んァ-ヶー一-龠々-]{{1,63}}{_DOT}){{1,8}}[A-Za-z]{{2,24}}(?![A-Za-z0-9-])"
)
_LOCAL = r"(?<![A-Za-z0-9._%+-])[A-Za-z0-9][A-Za-z0-9.%+'-]{0,63}"
_DOMAIN = rf"(?:[A-Za-z0-9-]{{1,63}}\.){{1,4}}{_TLD}(?![A-Za-z0-9-])"
_EMAIL_SPACED = rf"{_LOCAL} @ ?{_DOMAIN}"
_EMAIL_SWAPPED = rf"{_LOCAL}(?:[★☆●■◆◎#]|_at_){_DOMAIN}"
_EMAIL_IN_WORDS = (
    r"(?<![A-Za-z0-9._%+-])[A-Za-z0-9][A-Za-z0-9._%+'-]{0,63}(?: dot [A-Za-z0-9]{1,30}){0,2} at "
    rf"(?:[A-Za-z0-9-]{{1,63}} dot ){{1,4}}{_TLD}(?![A-Za-z0-9-])"
)
_EMAIL_AFTER_COLON = rf"(?<=: )[A-Za-z0-9][A-Za-z0-9._%+-]{{0,63}} at {_DOMAIN}"
_CARD = (  # 15 digits American Express, 14 Diners, 16 Visa, Mastercard, JCB, Discover
    r"(?<![0-9])(?:3[47][0-9]{2}[ -]?[0-9]{6}[ -]?[0-9]{5}"
    r"|3(?:0[0-5]|[68][0-9])[0-9][ -]?[0-9]{6}[ -]?[0-9]{4}"
    r"|(?:4[0-9]{3}|5[1-5][0-9]{2}|2[2-7][0-9]{2}|35[2-8][0-9]|6(?:011|[245][0-9]{2}))(?:[ -]?[0-9]{4}){3})"
    r"(?![0-9])"
)
_PHONE = (
    r"(?<![0-9+.-])(?:\+[0-9]{1,3}[ -]?(?:\(0\) ?)?[0-9]{1,4}(?:[ -]?[0-9]{2,4}){1,3}"
    r"|\((?:0[0-9]{1,4}|[2-9][0-9]{2}(?=\) ?[0-9]{3}-))\) ?[0-9]{1,4}[ -]?[0-9]{3,4}"
    r"|0[0-9]{1,4}\([0-9]{1,4}\)[ -]?[0-9]{3,4}"
    r"|0[0-9]{1,4}(?P<s>[ -]|\.)[0-9]{1,4}(?P=s)[0-9]{3,4}"
    r"|[2-9][0-9]{2}(?P<u>[ .-])[0-9]{3}(?P=u)[0-9]{4}"
    r"|0[0-9]{2}-[0-9]{8}|0[0-9]{1,3}-[0-9]{6,8}|0[0-9]{9,10})(?![0-9]|[.-][0-9])"
)
_BEARER = r"(?i:bearer)\s{1,3}(?P<value>[A-Za-z0-9._~+/-]{20,2000}=*)"
_MY_NUMBER = r"(?<![0-9-])[0-9]{4}[ -]?[0-9]{4}[ -]?[0-9]{4}(?![0-9]|-[0-9])"
_CORPORATE_NUMBER = r"(?<![0-9-])[0-9](?:[ -]?[0-9]{4}){3}(?![0-9]|-[0-9])"
_IPV4 = r"(?<![0-9A-Za-z.:])(?:[0-9]{1,3}\.){3}[0-9]{1,3}(?![0-9A-Za-z]|\.[0-9])"
_IPV6 = r"(?<![0-9A-Za-z:])(?:[0-9A-Fa-f]{0,4}:){2,7}[0-9A-Fa-f]{0,4}(?![0-9A-Za-z:])"
_is_my_number = near(r"マイナンバー|個人番号|my ?number|individual number", in_.is_valid)
_is_corporate_number = near(r"法人番号|corporate number", cn.is_valid)

# (kind, which of `looks` must have found something, pattern, what else must hold)
FINDERS: tuple[tuple[str, str, re.Pattern[str], Accept | None], ...] = tuple(
    (kind, look, re.compile(pattern), accept)
    for kind, look, pattern, accept in (
        ("secret", "secret", _PEM, None),
        ("secret", "secret", _ISSUED, None),
        ("secret", "secret", _BEARER, None),
        ("email", "at", _EMAIL, lambda match, _: not match.group().startswith("git@")),
        ("email", "at", _EMAIL_SPACED, None),
        ("email", "at", _EMAIL_SWAPPED, says_at),
        ("email", "at", _EMAIL_IN_WORDS, None),
        ("email", "at", _EMAIL_AFTER_COLON, None),
        ("secret", "secret", _SAID, is_secret),
        ("secret", "secret", _PIN, None),
        ("secret", "code", cued.SECURITY_CODE, None),
        ("address", "digits", addresses.POSTAL_AND_PREFECTURE, None),
        ("address", "digits", addresses.POSTAL_AND_CITY, None),
        ("address", "prefecture", addresses.PREFECTURE_AND_HOUSE, None),
        ("address", "zip", addresses.US, None),
        ("address", "digits", addresses.JP_IN_ENGLISH, None),
        ("address", "ku", addresses.JP_IN_ENGLISH_WITHOUT_POSTAL, None),
        ("address", "digits", addresses.POSTAL_MARK, None),
        ("address", "house", addresses.CITY_AND_NUMBERS, None),
        ("address", "house", addresses.CITY_AND_HOUSE, addresses.says_address),
        ("number_plate", "plate", plates.PLATE, None),
        ("bank_account", "digits", cued.IBAN, lambda match, _: iban.is_valid(match.group())),
        ("driving_licence", "digits", cued.LICENCE, cued.is_licence),
        ("credit_card", "digits", _CARD, is_card),
        ("my_number", "digits", _MY_NUMBER, _is_my_number),
        ("corporate_number", "digits", _CORPORATE_NUMBER, _is_corporate_number),
        ("pension_number", "digits", cued.PENSION, cued.is_pension),
        ("birth_date", "birth", cued.BIRTH_LABEL, None),
        ("birth_date", "birth", cued.BIRTH_DAY_ONLY, None),
        ("birth_date", "birth", cued.BIRTH_SAID, None),
        ("birth_date", "birth", cued.BIRTH_IN_ENGLISH, None),
        ("passport", "passport", cued.PASSPORT, cued.is_passport),
        ("health_insurance", "insured", cued.INSURER, None),
        ("health_insurance", "digits", cued.INSURER_AFTER, cued.is_insurer),
        ("health_insurance", "insured", cued.INSURED_BOTH, cued.is_insured),
        ("health_insurance", "insured", cued.INSURED_SYMBOL, cued.is_insured),
        ("health_insurance", "insured", cued.INSURED_NUMBER, cued.is_insured),
        ("bank_account", "bank", cued.YUCHO_SYMBOL, None),
        ("bank_account", "bank", cued.YUCHO_NUMBER, None),
        ("bank_account", "bank", cued.YUCHO_BOTH, None),
        ("bank_account", "bank", cued.ACCOUNT_NUMBER, None),
        ("bank_account", "bank", cued.ACCOUNT_OF_SORT, None),
        ("bank_account", "bank", cued.ACCOUNT_AT_BANK, None),
        ("bank_account", "bank", cued.ACCOUNT_IN_ENGLISH, None),
        ("account", "account", cued.FRIEND_CODE, None),
        ("account", "account", cued.PROFILE, None),
        ("account", "account", cued.HANDLE_OF_ID, cued.is_handle),
        ("account", "account", cued.HANDLE_AFTER_AT, None),
        ("account", "at", cued.HANDLE_OF_X, None),
        ("account", "account", cued.UID, None),
        ("account", "account", cued.HANDLE_SAID, cued.is_handle),
        ("phone", "digits", _PHONE, is_phone),
        ("ip_address", "dots", _IPV4, is_ip),
        ("ip_address", "colon", _IPV6, is_ip),
    )
)
