"""One plain form for every character: what looks alike, or reads alike, counts as the same in a mark.

A model can write any character of Unicode, a mark in look-alike letters is still read as a mark, and a
later step (NFKC, an HTML page) may turn one into the other.
"""

from __future__ import annotations

import unicodedata

# Stands for what is not seen: it is skipped inside a mark.
FILLER = "\u200b"
# Brackets and slashes that may stand for "<", ">", "[" and "/" in a mark, but never in an exact one.
OPENING = "‹〈《⟨❮◁«≪⋘≺⋖˂ᐸ❬❰⟪⦑⧀⧼⪡⫷⏴◀◂◃◄◅⯇≲≤≦⩽"
_CLOSING = "›〉》⟩❯▷»≫⋙≻⋗˃ᐳ❭❱⟫⦒⧁⧽⪢⫸⏵▶▸▹►▻⯈≳≥≧⩾"
_SQUARE, _SQUARE_END = "【〔⟦〚", "】〕⟧〛"
# Whatever else is folded into the first character of a mark.
OTHER_FORMS = _SQUARE + "［﹇︻︹﹝🄪🉀🉁🉂🉃🉄🉅🉆🉇🉈＜﹤≮≰≴⊀\u2329︽︿＆﹠＃﹟％﹪＼﹨"
_SLASHES = "⁄∕\\∖⧵⧸⧹⟋⟍╱╲"
_PLAIN = (
    dict.fromkeys(OPENING, "«")
    | dict.fromkeys(_CLOSING, "»")
    | dict.fromkeys(_SQUARE, "[")
    | dict.fromkeys(_SQUARE_END, "]")
    | dict.fromkeys(_SLASHES, "/")
    | {"−": "-", "\ufffd": "*"}
)
# Hangul fillers and the empty Braille cell are letters and signs by their category, and yet not seen.
_UNSEEN = "\u115f\u1160\u2800"
# A letter of a mark, then letters of other alphabets that look like it. They become that letter in upper
# case, which nothing else stays: such a mark is recognised, but never exact.
_LOOK_ALIKES = (
    "Aаαɑᴀ Cсᴄ Dԁđᴅ Eеєεɛᴇ Fƒꜰғ Gɡɢ Hһнħʜη Iіιıɪӏ Kкκᴋ Lłʟ Nпɴո Oоοøᴏ Pрρᴘ Rгʀ Sѕꜱ Tтτŧᴛ Uυսᴜ Yуγүʏ"
)
_LETTER_OF = {look: letters[0] for letters in _LOOK_ALIKES.split() for look in letters[1:]}
_REMEMBERED = 20_000  # characters: more than a text in any language uses


class _Folding(dict[int, str]):
    """Map a character to its plain form: NFKD, lower case; one form each of brackets, dashes, slashes."""

    def __missing__(self, code: int) -> str:
        plain = unicodedata.normalize("NFKD", chr(code)).casefold()[:1]
        category = unicodedata.category(plain)
        if category in {"Mn", "Me", "Cf"} or plain in _UNSEEN:
            folded = FILLER
        elif category == "Cc" and not plain.isspace():
            folded = "*"
        elif category == "Pd":
            folded = "-"
        else:
            folded = _PLAIN.get(plain) or _LETTER_OF.get(plain, plain)
        if len(self) < _REMEMBERED:
            self[code] = folded
        return folded


_FOLDING = _Folding()


def fold(text: str) -> str:
    """Return `text` with every character in its plain form, one for one: positions stay what they are.

    A ligature keeps its first letter only (`ﬁnal` becomes `fnal`): what is lost counts as a slip.
    """
    return text.translate(_FOLDING)
