"""Kinds that only the words beside them tell: accounts, documents, birth dates, as regexes over folded text.

The cue comes first, then a short gap of signs and small words, then the value: every repetition is bounded.
"""

from __future__ import annotations

import re

from stdnum import luhn

from so8t_helpers.dataset.personal_data.checks import digits_of, near

# What `looks` searches for (normalised, lower case): without one of these a group's patterns find nothing.
CUES = {
    "bank": ("口座", "普通", "当座", "貯蓄", "(普)", "(当)", "記号", "銀行", "支店", "account", "acct"),
    "passport": ("パスポート", "旅券", "passport"),
    "insured": ("保険", "国保", "社保", "insur"),
    "birth": (
        *("生年月日", "誕生", "生まれ", "日生", *(f"{digit}生" for digit in range(10))),
        *("birth", "born ", "born:", "dob"),
    ),
    "account": (
        *("ライン", "ツイッター", "インスタ", "ディスコ", "フェイスブック", "スカイプ", "カカオ", "ユーザー"),
        *(
            "フレンドコード",
            "line id",
            "lineid",
            "lineの",
            "lineで",
            "lineは",
            "line:",
            "twitter",
            "instagram",
        ),
        *(
            "discord",
            "facebook",
            "tiktok",
            "github",
            "skype",
            "telegram",
            "kakao",
            "slack",
            "mixi",
            "threads",
        ),
        *("psn", "steam", "youtube", "whatsapp", "wechat", "x.com", "sw-", "snapchat", "bluesky", "mastodon"),
        *(
            "misskey",
            "pixiv",
            "linkedin",
            "my insta",
            "line→",
            "line@",
            "line(",
            "uidは",
            "uid:",
            "プレイヤーid",
        ),
    ),
    "code": ("セキュリティ", "cvv", "cvc", "pin:", "pinは", "pinコード", "pin番号", "pin code"),
}
# Where these follow, the number counts something.
_ENDS = r"(?![0-9A-Za-z]|[-.][0-9]|,[0-9]{3}|\s?[桁円人件個年歩回台冊部票名社点兆億万千%])"
_SMALL = r"(?:[^0-9A-Za-z\n。]|(?i:numbers?|num|no|id|is|was)(?![A-Za-z]))"
_DIGIT_VALUE = r"(?<![0-9A-Za-z-])"


def _cued(cue: str, value: str, gap: int = 12, small: str = _SMALL) -> str:
    return rf"(?i:{cue}){small}{{0,{gap}}}?{_DIGIT_VALUE}(?P<value>{value}){_ENDS}"


ACCOUNT_NUMBER = _cued("口座", "[0-9]{6,8}", 16)
ACCOUNT_OF_SORT = _cued(
    r"普通(?:預金|口座)?|当座(?:預金)?|貯蓄(?:預金)?|\(普\)|\(当\)",
    "[0-9]{6,8}",
    5,
    r"(?:口座番号|番号|[\s:()「」、の])",
)
ACCOUNT_AT_BANK = _cued("銀行|支店", "[0-9]{7}", 3, "[ の:]")
ACCOUNT_IN_ENGLISH = _cued("(?:account|acct|a/c)", "[0-9]{6,12}", 8)
YUCHO_SYMBOL = r"記号[\s:は]{0,3}(?P<value>1[0-9]{3}0)(?=[\s、,]{0,3}番号)"
YUCHO_NUMBER = r"記号[\s:は]{0,3}1[0-9]{3}0[\s、,]{0,3}番号[\s:は]{0,3}(?P<value>[0-9]{6,8})" + _ENDS
YUCHO_BOTH = r"記号番号[\s:は]{0,3}(?P<value>1[0-9]{3}0-[0-9]{6,8})" + _ENDS
IBAN = r"(?<![A-Za-z0-9])[A-Z]{2}[0-9]{2}(?: ?[A-Z0-9]{4}){2,7}(?: ?[A-Z0-9]{1,3})?(?![A-Za-z0-9])"

PASSPORT = _cued("パスポート|旅券|passport", "[A-Z]{2} ?[0-9]{7}|[A-Z][0-9]{8}|[A-Z][A-Z0-9]{8}|[0-9]{9}")
LICENCE = r"(?<![0-9-])[0-9](?:[ -]?[0-9]){11}(?!-?[0-9])"
INSURER = _cued("保険者番号|保険証番号|insur(?:er|ance) number", "[0-9]{10}|[0-9]{8}|[0-9]{6}")
INSURER_AFTER = r"(?<![0-9-])[0-9]{8}(?![0-9-])"
INSURED_SYMBOL = r"(?i:記号|symbol)[\s:は「]{0,3}(?P<value>[一-龠]{0,3}[0-9]{1,8})" + _ENDS
INSURED_NUMBER = r"(?i:番号|number)[\s:は「]{0,3}(?P<value>[0-9]{1,10})" + _ENDS
INSURED_BOTH = r"記号・番号[\s:は「]{0,3}(?P<value>[0-9]{1,8}-[0-9]{1,8})" + _ENDS
PENSION = r"(?<![0-9-])[0-9]{4}[ -]?[0-9]{6}(?![0-9-])"

_SERVICE = (
    r"(?:(?<![A-Za-z_.])(?:LINE(?=\s?(?:ID|[のではが@→]))|(?-i:LINE)(?=[:(])|Twitter|Insta(?:gram)?|Discord|Facebook|TikTok|GitHub|Skype"
    r"|Telegram|Kakao(?:Talk)?|Slack|mixi|Threads|PSN|Steam|YouTube|WhatsApp|WeChat|Snapchat|Bluesky|Mastodon|Misskey"
    r"|pixiv|LinkedIn)(?![a-z])"
    "|ライン|ツイッター|インスタ(?:グラム)?|ディスコ(?:ード)?|フェイスブック|スカイプ|カカオ(?:トーク)?)"
)
_WHOSE = "(?:ID|アカウント名?|ユーザー(?:名|ID)|名|handle|user ?(?:name|id)|account)"
_HANDLE = r"@?[A-Za-z0-9_](?:[A-Za-z0-9_.:-]{1,38}[A-Za-z0-9_])(?:#[0-9]{4})?"
_LEADS = r"(?:\s?[はが:=「(→]|\sis\s)"
HANDLE_OF_ID = (
    rf"(?i:{_SERVICE}|ユーザー|プレイヤー)[^\n。A-Za-z0-9]{{0,12}}?"
    rf"(?i:{_WHOSE}){_LEADS}?\s?「?(?P<value>{_HANDLE})"
)
HANDLE_AFTER_AT = (
    rf"(?i:{_SERVICE})(?:[^@\n。0-9A-Za-z]|(?i:is|handle|me|on|at)(?![A-Za-z])){{0,16}}?(?<![A-Za-z0-9])"
    r"(?P<value>@(?!(?:everyone|here|channel|username|user|all)(?![a-z]))[A-Za-z0-9_](?:[A-Za-z0-9_.-]{0,28}[A-Za-z0-9_]))"
)
HANDLE_OF_X = (
    r"(?<![A-Za-z])X(?:\(旧?(?:Twitter|ツイッター)\))?(?:の?(?:ID|アカウント))?[はので:(「 ]{1,2}"
    r"(?P<value>@[A-Za-z0-9_]{3,15})(?![A-Za-z0-9_])"
)
HANDLE_SAID = rf"(?i:{_SERVICE})(?:\s?[はが:「→]|\sis\s)\s?(?P<value>{_HANDLE})"
UID = r"(?<![A-Za-z])UID(?:は|:)\s?(?P<value>[0-9]{8,10})(?![0-9])"
PROFILE = (
    r"(?i:(?<![A-Za-z0-9.-])(?:www\.|m\.)?(?:x|twitter|instagram|facebook|tiktok|youtube|threads|mixi)\.(?:com|net|jp)/)"
    r"(?!(?i:home|i|p|watch|explore|share|hashtag|search|intent|login|about|settings|reel|channel|c|playlist"
    r"|groups|pages|events|help|policies)(?![A-Za-z0-9_.]))(?P<value>@?[A-Za-z0-9_](?:[A-Za-z0-9_.-]{1,38}[A-Za-z0-9_]))"
)
FRIEND_CODE = r"SW-[0-9]{4}-[0-9]{4}-[0-9]{4}(?![0-9-])"

_KANJI = "[一二三四五六七八九十]{1,3}"
_NUMBER = rf"(?:[0-9]{{1,2}}|元|{_KANJI})"
_ERA = rf"(?:(?:大正|昭和|平成|令和)\s?{_NUMBER}|(?<![A-Za-z])[TSHR]\.?[0-9]{{1,2}})"
_YEAR = r"(?:19[0-9]{2}|20[0-4][0-9])"
_DAY = rf"\s?[年./-]\s?{_NUMBER}\s?[月./-]\s?(?:{_KANJI}|[0-9]{{1,2}})(?:\s?日)?"
_MONTH = "(?:Jan|Feb|Mar|Apr|May|June?|July?|Aug|Sept?|Oct|Nov|Dec)[a-z]{0,6}\\.?"
_IN_ENGLISH = (
    rf"(?:{_MONTH} [0-9]{{1,2}}(?:st|nd|rd|th)?,? {_YEAR}|[0-9]{{1,2}}(?:st|nd|rd|th)? {_MONTH},? {_YEAR})"
)
_DATE = (
    rf"(?:(?<![0-9])(?:{_ERA}|{_YEAR}){_DAY}|{_IN_ENGLISH}|[0-9]{{1,2}}/[0-9]{{1,2}}/{_YEAR}"
    r"|(?<![0-9])(?:19|20)[0-9]{2}[01][0-9][0-3][0-9])(?![0-9])"
)
BIRTH_LABEL = (
    rf"(?i:生年月日|誕生日|(?<![a-z])dob(?![a-z])|date of birth|birth ?date|birthday)"
    rf"(?:[^0-9A-Za-z\n。]|(?i:is|was)(?![A-Za-z])){{0,10}}?(?P<value>{_DATE})"
)
BIRTH_DAY_ONLY = (
    r"(?:^|[\n。、「]|[私僕俺彼女母父息子娘妻夫君様]の|さんの|ちゃんの|くんの)誕生日[はが:]?\s?"
    r"(?P<value>[0-9]{1,2}月[0-9]{1,2}日)"
)
_BORN_YEAR = r"(?:19[2-9][0-9]|20[0-4][0-9])"
BIRTH_SAID = (
    rf"(?P<value>(?<![0-9])(?:{_ERA}|{_BORN_YEAR}){_DAY})\s?(?:に?生まれ|生(?=[、。,.()\s]|$))"
    r"(?!の[^\n。]{0,12}(?:家|手|優|者|選手|監督|王|帝|皇|人物|タレント|モデル|アイドル))"
)
BIRTH_IN_ENGLISH = rf"(?i:born)(?: on)?:? (?P<value>{_IN_ENGLISH})"

SECURITY_CODE = (
    r"(?:(?i:セキュリティ(?:コード|番号)|CVV2?|CVC2?)|(?<![A-Za-z])PIN(?:コード|番号| code)?(?=[は:]))"
    rf"[\s:はが「(]{{0,3}}(?P<value>[0-9]{{3,6}}){_ENDS}"
)


def licence_valid(digits: str) -> bool:
    """Check digit of a Japanese driving licence: the eleventh, modulo 11 of the ten before it.

    The weights are 5 4 3 2 7 6 5 4 3 2, as drivers found out; the twelfth digit counts reissues. Remainders
    0 and 10 share the digit 1: there are eleven of them.
    """
    weights = (5, 4, 3, 2, 7, 6, 5, 4, 3, 2)
    rest = sum(int(d) * w for d, w in zip(digits, weights, strict=False)) % 11
    return int(digits[10]) == (11 - rest) % 10


is_licence = near(r"免許|運転経歴|licen[cs]e", licence_valid)
# An insurer's number closes with Luhn's digit; the words may follow it.
is_insurer = near("保険者番号", luhn.is_valid)
is_pension = near(
    r"年金(?:手帳|証書)?(?:に記載)?(?:の)?番号|年金手帳|pension num", lambda digits: len(digits) == 10
)

_INSURED = re.compile(r"保険|被保険者|国保|社保|insur", re.IGNORECASE)


def is_insured(match: re.Match[str], text: str) -> bool:
    """A symbol or number is an insurance card's where insurance is named shortly before it."""
    return _INSURED.search(text[max(0, match.start() - 44) : match.start()]) is not None


def is_handle(match: re.Match[str], text: str) -> bool:
    """A name of an account, not a word: it has a digit or a sign, or a particle or a colon leads to it."""
    value = match.group("value")
    if text.startswith("/", match.end()) or re.search(r"\.(?:com|net|org|jp|me|io|html?)$", value):
        return False  # an address on the web
    if not re.search("[A-Za-z]", value):
        return len(value) >= 8
    if re.search(r"[0-9_.#@:-]", value):
        return len(value) > 3
    return text[match.start("value") - 1] in "はが:「→" or not text[match.end() : match.end() + 2].isascii()


def is_passport(match: re.Match[str], text: str) -> bool:
    """Half of its nine characters are digits at least."""
    return len(digits_of(match.group("value"))) >= 5
