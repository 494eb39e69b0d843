"""Names of people: by the words beside them and a list of surnames, or by named-entity recognition (GiNZA).

Neither tells a private person from a known one; both are off unless `dataset.personal_names` asks for them.
"""

from __future__ import annotations

import importlib.util
import re
import sys
from collections.abc import Callable, Iterator
from importlib.resources import files
from typing import Any, Literal

from so8t_helpers.settings import SettingsError

Span = tuple[int, int]
NameFinder = Callable[[str], list[Span]]
# SudachiPy takes 49,149 bytes at most; a Japanese character has three.
_PIECE = 10_000

_SURNAMES = frozenset(
    files("so8t_helpers.dataset.personal_data").joinpath("surnames.txt").read_text(encoding="utf-8").split()
)
# A search for single characters, then look-ups: an alternation of five hundred names takes ten times as long.
_BEGINS = re.compile(f"[{''.join(sorted({name[0] for name in _SURNAMES}))}]")
_KANJI, _KANA = "[一-龠々]", "[ぁ-んァ-ヴー]"
_IS_KANJI = re.compile(_KANJI)
_GIVEN = rf"(?:[ \u3000]?{_KANJI}{{1,3}}|[ \u3000]{_KANA}{{2,5}})"
_TITLE = (
    "(?:さん(?!プル)|様(?![々子式態相])|さま|氏(?!名|は名)|くん|君(?!が代)|ちゃん|殿(?!下)|先生|先輩|社長|部長|課長|係長|主任|店長"
    "|教授|医師|弁護士|選手|監督|容疑者|被告|巡査|議員|会長|夫人)"
)
# How most Japanese given names end.
_GIVEN_END = (
    "[子美恵香奈菜花華代江里沙織衣月海陽乃希穂郎朗太介助彦夫雄男樹司也哉斗翔輝"
    "弘浩博宏和之行幸人仁志史文一二三治平吾真誠健]"
)
# Two or three signs with a title are a name too, unless they say what one is or where one works.
_DAY = "昨日|今日|本日|先日|昨夜|今朝|先週|今週|来週|先月|担当"
_OTHERS = re.compile(
    rf"(?:{_DAY})?(?P<value>{_KANJI}{{2,3}})(?:さん|様(?![々子式態相])|さま(?!ざま)|くん|ちゃん)"
)
_NO_NAME = re.compile(
    "[屋員者手師家長官生人婦主工係客親父母兄姉弟妹孫婿嫁娘役連達衆猫犬鳥魚神仏王姫殿奥皆坊嬢医士女男童"
    "社店院校行業体先名組局署庁省課室班隊団会館輩妓姑優同仕模多異]$"
    "|^御|^(?:息子|王子|皇子|双子|親子|弟子|迷子|新郎|旦那|稲荷|地蔵|観音|弁天|大黒|閻魔|八幡|太陽|世間|恵比寿|釈迦|苦労|自分)$"
)
_TITLE_AT_END = re.compile(rf"[ \u3000]?(?:{_TITLE})?$")
_TITLED = re.compile(rf"(?P<given>{_GIVEN}??)[ \u3000]?{_TITLE}")
_FULL = re.compile(
    rf"(?P<given>[ \u3000]?(?!第|内海){_KANJI}{{0,2}}{_GIVEN_END})(?!{_KANJI})"
    rf"|(?P<called>{_GIVEN}?)と(?:申し|申す|いいます|言います)"
)
_LABEL = re.compile(
    "(?:氏名|名前|患者名|担当者名|担当者|担当|申請者|契約者|作成者|依頼者|応募者|申込者|受取人|保護者|従業員名|社員名|署名|宛名|名義人|名義"
    r"|世帯主|被保険者|フリガナ|ふりがな)"
    r"(?:\([^)\n]{1,6}\)|（[^）\n]{1,6}）)?[ \u3000]?(?P<colon>[:：])?[はが「『\s]{0,2}"
)
_NAMED = re.compile(rf"(?P<given>{_GIVEN}?)(?!{_KANJI}|{_KANA})|(?P<sure>{_GIVEN})(?!{_KANJI})")
_IN_TWO = re.compile(rf"{_KANJI}{{1,4}}[ \u3000]{_KANJI}{{1,3}}|[ァ-ヴー]{{2,8}}[ \u3000][ァ-ヴー]{{2,8}}")
_FOREIGN = re.compile(rf"(?P<value>[ァ-ヴー]{{2,12}}(?:・[ァ-ヴー]{{2,12}}){{1,2}}){_TITLE}")
_ENGLISH = re.compile(
    r"(?:Mrs\.?|Mr\.?|Ms\.?|Miss|Dr\.?|Prof\.?) (?!(?:Right|Pepper|President|Speaker|Chairman)(?![a-z]))"
    r"(?P<value>[A-Z][a-z]{1,20}(?: [A-Z][a-z]{1,20})?)"
    r"|(?:My name is|my name is|Name:|name:|Customer:|Patient:|Attn:"
    r"|(?:This is|this is|I'm|I am)(?= [A-Z][a-z]{1,20} [A-Z][a-z]{1,20} from)) ?"
    r"(?P<said>[A-Z][a-z]{1,20}(?: [A-Z][a-z]{1,20}){1,2})"
)


def by_cues(text: str) -> list[Span]:
    """Return where a surname stands with a title, a label or a given name, and English names with these."""
    spans = [
        match.span(match.lastgroup or 0)
        for match in _ENGLISH.finditer(text)
        if not text[match.start() - 1 : match.start()].isalpha()
    ]
    if text.isascii():
        return spans
    spans += [match.span("value") for match in _FOREIGN.finditer(text)]
    spans += [span for match in _LABEL.finditer(text) if (span := _after_label(match, text))]
    for other in _OTHERS.finditer(text):
        whole = not _IS_KANJI.match(text[max(0, other.start() - 1) : other.start()])
        if whole and not _NO_NAME.search(other["value"]):
            spans.append(other.span("value"))
    end = 0
    for begin in _BEGINS.finditer(text):
        if begin.start() >= end and (surname := _surname_at(text, begin.start())):
            start, after = begin.start(), begin.start() + len(surname)
            within = bool(_IS_KANJI.match(text[max(0, start - 1) : start]))
            match = _TITLED.match(text, after) if len(surname) > 1 or not within else None
            if match is None and len(surname) > 1 and not within:
                match = _FULL.match(text, after)
            if match is not None and text[start : match.end()] != "王様":
                end = match.end(match.lastgroup or 0)
                spans.append((start, end))
    return spans


def _surname_at(text: str, start: int) -> str | None:
    """Return the longest listed surname that begins at a place."""
    return next((text[start : start + n] for n in (3, 2, 1) if text[start : start + n] in _SURNAMES), None)


def _after_label(label: re.Match[str], text: str) -> Span | None:
    """Return the name that follows a label such as 氏名, None where none does."""
    start = label.end()
    if label["colon"] and (match := _IN_TWO.match(text, start)):
        return match.span()
    surname = _surname_at(text, start)
    match = _NAMED.match(text, start + len(surname)) if surname else None
    if match is None or not (label["colon"] or match.end() > start + len(surname or "")):
        return None
    return start, match.end()


class Entities:
    """GiNZA's named entities of the class Person, then what cues tell; loading takes seconds."""

    def __init__(self) -> None:
        check_installed("ner")
        import ja_ginza  # noqa: PLC0415  only where it is asked for

        unused = ["parser", "morphologizer", "compound_splitter", "bunsetu_recognizer"]
        self._analyse: Any = ja_ginza.load(disable=unused)

    def __call__(self, text: str) -> list[Span]:
        if text.isascii():  # GiNZA knows Japanese
            return by_cues(text)
        found = [
            (start + entity.start_char, start + entity.start_char + len(_TITLE_AT_END.sub("", entity.text)))
            for start, piece in _pieces(text)
            for entity in self._analyse(piece).ents
            if entity.label_ == "Person"
        ]
        return found + by_cues(text)  # which knows English too


def _pieces(text: str) -> Iterator[tuple[int, str]]:
    """Yield (place, piece): at most `_PIECE` characters each, to a sentence's end where there is one."""
    text = re.sub("[\ud800-\udfff]", "?", text)  # half a character of UTF-16: SudachiPy takes none
    start = 0
    while start < len(text):
        end = start + _PIECE
        if end < len(text):
            ends = [text.rfind(sign, start, end) for sign in "。\n"]
            end = max(ends) + 1 if max(ends) > start else end
        yield start, text[start:end]
        start = end


def check_installed(how: Literal["off", "cues", "ner"]) -> None:
    """Raise SettingsError where `dataset.personal_names` asks for GiNZA and it is not here."""
    if how == "ner" and importlib.util.find_spec("ja_ginza") is None:
        raise SettingsError(
            "dataset.personal_names: ja-ginza is not installed; "
            f"`{sys.executable} -m pip install --constraint constraints.txt ja-ginza`, or take cues or off"
        )


def finder(how: Literal["off", "cues", "ner"]) -> NameFinder | None:
    """Return what finds names as `dataset.personal_names` says, None for off."""
    return {"off": lambda: None, "cues": lambda: by_cues, "ner": Entities}[how]()
