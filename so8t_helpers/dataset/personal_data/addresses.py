"""Addresses, Japanese and American, as regexes over folded text; every repetition is bounded."""

from __future__ import annotations

import re

PREFECTURE = (
    "(?:東京都|北海道|(?:大阪|京都)府|(?:青森|岩手|宮城|秋田|山形|福島|茨城|栃木|群馬|埼玉|千葉|神奈川|新潟|"
    "富山|石川|福井|山梨|長野|岐阜|静岡|愛知|三重|滋賀|兵庫|奈良|和歌山|鳥取|島根|岡山|広島|山口|徳島|香川|愛媛|"
    "高知|福岡|佐賀|長崎|熊本|大分|宮崎|鹿児島|沖縄)県)"
)
_CITY = r" ?[^\s、。,「」()\n0-9]{1,14}?[市区町村郡]"
_NUMERAL = "[0-9一二三四五六七八九十]{1,5}"
_JOINT = "(?:丁目|番地の?|番|号|の|-)"
_TOWN = "[ ]?[一-龠々〆ヶァ-ヺーぁ-ん]{0,14}?[ ]?"
_BUILDING = (
    r"(?:[ ]?(?![にのはがをでとへや])[^\s、。,「」()\n]{1,16}?"
    "(?:ビル|ビルディング|タワー|マンション|ハイツ|コーポ|アパート|荘)"
    r"(?:[ ]?[0-9]{1,4}(?:号室|階|F)?)?|[ ]?[0-9]{1,4}号室)?"
)
_HOUSE = rf"{_TOWN}{_NUMERAL}(?:{_JOINT}{_NUMERAL}){{0,4}}(?:丁目|番地|番|号)?{_BUILDING}"
_HOUSE_SURE = rf"{_TOWN}{_NUMERAL}(?:{_JOINT}{_NUMERAL}){{1,4}}(?:番地|番|号)?{_BUILDING}"
_STREET = (
    "(?:Street|St|Avenue|Ave|Road|Rd|Boulevard|Blvd|Lane|Ln|Drive|Dr|Court|Ct|Way|Place|Pl|Square|Sq|Parkway"
    "|Terrace|Circle|Highway)"
)

POSTAL = r"(?:〒\s?[0-9]{3}-?[0-9]{4}|(?<![0-9-])[0-9]{3}-[0-9]{4})(?![0-9-])"
POSTAL_MARK = r"〒\s?[0-9]{3}-?[0-9]{4}(?![0-9])"
POSTAL_AND_PREFECTURE = rf"{POSTAL}[\s、,:)]{{0,3}}{PREFECTURE}{_CITY}(?:{_HOUSE}|[一-龠々ヶァ-ヺー]{{0,12}})"
POSTAL_AND_CITY = rf"{POSTAL}[\s、,:)]{{0,3}}[一-龠々ヶ]{{1,8}}?[市区町村郡]{_HOUSE}"
PREFECTURE_AND_HOUSE = rf"{PREFECTURE}{_CITY}{_HOUSE_SURE}"
US = (
    rf"(?<![0-9A-Za-z])[0-9]{{1,5}} (?:[A-Z][A-Za-z.']{{0,20}} ){{1,4}}{_STREET}(?![A-Za-z])\.?,? ?"
    r"(?:[A-Z][A-Za-z.#]{0,20} ?[0-9]{0,4},? ){1,4}[A-Z]{2},? [0-9]{5}(?:-[0-9]{4})?(?![0-9])"
)
JP_IN_ENGLISH = (
    r"(?<![0-9A-Za-z-])[0-9]{1,4}(?:-[0-9]{1,4}){1,3},? [A-Z][A-Za-z-]{1,30}(?:,? [A-Z][A-Za-z-]{1,30}){0,4}"
    r",? [0-9]{3}-[0-9]{4}(?![0-9-])"
)
JP_IN_ENGLISH_WITHOUT_POSTAL = (
    r"(?<![0-9A-Za-z-])[0-9]{1,4}(?:-[0-9]{1,4}){1,3},? (?:[A-Z][A-Za-z]{1,30},? ){0,2}"
    r"[A-Z][a-z]{1,30}-(?:ku|shi|cho|machi|mura|gun)(?:, [A-Z][A-Za-z-]{1,30}){0,3}"
)
# No prefecture before it: a city or ward by its signs, a town that begins with one, three numbers or a 丁目.
_SPELLED_CITY = "(?:さいたま|つくば|いわき|みどり|うるま|さくら|むつ|ひたちなか|あきる野|ふじみ野)市"
_PLACE = (
    rf"(?:(?:{_SPELLED_CITY}|[一-龠々ヶァ-ヴー]{{1,6}}?[市郡])(?:[一-龠々ヶ]{{1,5}}?[区町村])?"
    r"|[一-龠々ヶ]{1,5}?区)"
)
_TOWN_OF_SIGNS = (
    "(?:[一-龠々ヶケァ-ヴー]{1,7}(?:[のがと][一-龠々]{1,4})?(?:(?:上る|下る|東入る?|西入る?)[一-龠々]{1,6})?"
    "|みなとみらい|[東西南北]?[0-9]{1,2}条[東西南北]?)"
)
_SPELLED_TOWN = "(?:(?![でにはのがをともやかへ])[ぁ-んァ-ヴー]{2,7}[一-龠]{0,3})"
_N = "[0-9一二三四五六七八九十]{1,4}"
_NUMBERS = (
    rf"(?:[0-9]{{1,4}}(?:-[0-9]{{1,4}}){{2,3}}|{_N}丁目{_N}(?:(?:番地?|-){_N}(?:号|-{_N})?)?"
    r"|(?<=町)[0-9]{1,5}-[0-9]{1,4}|[0-9]{1,5}番地?(?:の?[0-9]{1,4}号?)?)"
)
_NO_COUNT = "(?![0-9]|-[0-9]|[位点対回戦節線月])"
CITY_AND_NUMBERS = rf"{_PLACE}{_TOWN_OF_SIGNS} ?{_NUMBERS}{_NO_COUNT}{_BUILDING}"
CITY_AND_HOUSE = (
    rf"{_PLACE}(?:{_TOWN_OF_SIGNS}|{_SPELLED_TOWN}) ?"
    rf"[0-9]{{1,5}}(?:-[0-9]{{1,4}}){{0,3}}{_NO_COUNT}{_BUILDING}"
)
ADDRESS_WORDS = re.compile(
    "住所|住[まみん]|本籍|送り先|届け|宛|転居|引っ越|引越|自宅|実家|勤務先|郵送|所在地"
)


def says_address(match: re.Match[str], text: str) -> bool:
    """Two numbers after a town are a house's where an address is spoken of, else a score."""
    return ADDRESS_WORDS.search(text[max(0, match.start() - 12) : match.end() + 12]) is not None
