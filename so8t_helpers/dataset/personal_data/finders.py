"""The forms of personal data, as regexes over folded text; where two overlap, the earlier one here wins.

Every repetition is bounded, so that no text makes a search take more than linear time.
"""

from __future__ import annotations

import re

from stdnum.jp import cn, in_

from so8t_helpers.dataset.personal_data.checks import Accept, is_card, is_ip, is_phone, is_secret, near

_PREFECTURE = (
    "(?:東京都|北海道|(?:大阪|京都)府|(?:青森|岩手|宮城|秋田|山形|福島|茨城|栃木|群馬|埼玉|千葉|神奈川|新潟|"
    "富山|石川|福井|山梨|長野|岐阜|静岡|愛知|三重|滋賀|兵庫|奈良|和歌山|鳥取|島根|岡山|広島|山口|徳島|香川|愛媛|"
    "高知|福岡|佐賀|長崎|熊本|大分|宮崎|鹿児島|沖縄)県)"
)
_CITY = r" ?[^\s、。,「」()\n0-9]{1,14}?[市区町村郡]"
_NUMERAL = "[0-9一二三四五六七八九十]{1,5}"
_JOINT = "(?:丁目|番地の?|番|号|の|-)"
_TOWN = "[ ]?[一-龠々〆ヶァ-ヺーぁ-ん]{0,14}?[ ]?"
_BUILDING = (
    r"(?:[ ]?[^\s、。,「」()\n]{1,16}?(?:ビル|ビルディング|タワー|マンション|ハイツ|コーポ|アパート|荘)"
    r"(?:[ ]?[0-9]{1,4}(?:号室|階|F)?)?|[ ]?[0-9]{1,4}号室)?"
)
_HOUSE = rf"{_TOWN}{_NUMERAL}(?:{_JOINT}{_NUMERAL}){{0,4}}(?:丁目|番地|番|号)?{_BUILDING}"
_HOUSE_SURE = rf"{_TOWN}{_NUMERAL}(?:{_JOINT}{_NUMERAL}){{1,4}}(?:番地|番|号)?{_BUILDING}"
_STREET = (
    "(?:Street|St|Avenue|Ave|Road|Rd|Boulevard|Blvd|Lane|Ln|Drive|Dr|Court|Ct|Way|Place|Pl|Square|Sq|Parkway)"
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
    r"|(?<![A-Za-z])[A-Za-z]{0,12}[_-]?(?:token|passwd|password|pwd|secret)(?:[_-]?key)?|パスワード|(?:API|アクセス|シークレット|秘密)キー|秘密鍵|トークン|シークレット)"
    r"\s?(?:は|が|:|=|\"\s?:|\bis\b)[\s:=「『\"']{0,3}(?P<value>[A-Za-z0-9!#$%&*+./=?@^_~-]{6,200})"
)
_PIN = r"暗証番号\s?(?:は|が|:|=)?[\s「]{0,2}(?P<value>[0-9]{4,8})(?![0-9])"
_EMAIL = (
    r"(?<![A-Za-z0-9._%+-])[A-Za-z0-9][A-Za-z0-9._%+'-]{0,63}(?:@|\s?[(\[](?:at|アット)[)\]]\s?)"
    r"(?:[A-Za-z0-9ぁ-んァ-ヶー一-龠々-]{1,63}\.){1,8}[A-Za-z]{2,24}(?![A-Za-z0-9-])"
)
_POSTAL = r"(?:〒\s?[0-9]{3}-?[0-9]{4}|(?<![0-9-])[0-9]{3}-[0-9]{4})(?![0-9-])"
_US_ADDRESS = (
    rf"(?<![0-9A-Za-z])[0-9]{{1,5}} (?:[A-Z][A-Za-z.']{{0,20}} ){{1,4}}{_STREET}(?![A-Za-z])\.?,? ?"
    r"(?:[A-Z][A-Za-z.#]{0,20} ?[0-9]{0,4},? ){1,4}[A-Z]{2},? [0-9]{5}(?:-[0-9]{4})?(?![0-9])"
)
_JP_ADDRESS_IN_ENGLISH = (
    r"(?<![0-9A-Za-z-])[0-9]{1,4}(?:-[0-9]{1,4}){1,3},? [A-Z][A-Za-z-]{1,30}(?:,? [A-Z][A-Za-z-]{1,30}){0,4}"
    r",? [0-9]{3}-[0-9]{4}(?![0-9-])"
)
_CARD = (  # 15 digits American Express, 14 Diners, 16 Visa, Mastercard, JCB, Discover
    r"(?<![0-9])(?:3[47][0-9]{2}[ -]?[0-9]{6}[ -]?[0-9]{5}"
    r"|3(?:0[0-5]|[68][0-9])[0-9][ -]?[0-9]{6}[ -]?[0-9]{4}"
    r"|(?:4[0-9]{3}|5[1-5][0-9]{2}|2[2-7][0-9]{2}|35[2-8][0-9]|6(?:011|[245][0-9]{2}))(?:[ -]?[0-9]{4}){3})"
    r"(?![0-9])"
)
_PHONE = (
    r"(?<![0-9+.-])(?:\+[0-9]{1,3}[ -]?(?:\(0\) ?)?[0-9]{1,4}(?:[ -]?[0-9]{2,4}){1,3}"
    r"|\(0[0-9]{1,4}\) ?[0-9]{1,4}[ -]?[0-9]{3,4}"
    r"|0[0-9]{1,4}\([0-9]{1,4}\)[ -]?[0-9]{3,4}"
    r"|0[0-9]{1,4}(?P<s>[ -]|\.)[0-9]{1,4}(?P=s)[0-9]{3,4}"
    r"|0[0-9]{2}-[0-9]{8}|0[0-9]{1,3}-[0-9]{6,8}|0[0-9]{9,10})(?![0-9]|[.-][0-9])"
)
_BEARER = r"(?i:bearer)\s{1,3}(?P<value>[A-Za-z0-9._~+/-]{20,2000}=*)"
_POSTAL_AND_PREFECTURE = (
    rf"{_POSTAL}[\s、,:)]{{0,3}}{_PREFECTURE}{_CITY}(?:{_HOUSE}|[一-龠々ヶァ-ヺー]{{0,12}})"
)
_POSTAL_AND_CITY = rf"{_POSTAL}[\s、,:)]{{0,3}}[一-龠々ヶ]{{1,8}}?[市区町村郡]{_HOUSE}"
_POSTAL_MARK = r"〒\s?[0-9]{3}-?[0-9]{4}(?![0-9])"
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
        ("email", "at", _EMAIL, None),
        ("secret", "secret", _SAID, is_secret),
        ("secret", "secret", _PIN, None),
        ("address", "digits", _POSTAL_AND_PREFECTURE, None),
        ("address", "digits", _POSTAL_AND_CITY, None),
        ("address", "prefecture", rf"{_PREFECTURE}{_CITY}{_HOUSE_SURE}", None),
        ("address", "zip", _US_ADDRESS, None),
        ("address", "digits", _JP_ADDRESS_IN_ENGLISH, None),
        ("address", "digits", _POSTAL_MARK, None),
        ("credit_card", "digits", _CARD, is_card),
        ("my_number", "digits", _MY_NUMBER, _is_my_number),
        ("corporate_number", "digits", _CORPORATE_NUMBER, _is_corporate_number),
        ("phone", "digits", _PHONE, is_phone),
        ("ip_address", "dots", _IPV4, is_ip),
        ("ip_address", "colon", _IPV6, is_ip),
    )
)
