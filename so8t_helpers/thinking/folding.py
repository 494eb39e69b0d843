"""One plain form for every character: what looks alike, or reads alike, counts as the same in a mark.

A model can write any character of Unicode, a mark in look-alike letters is still read as a mark, and a
later step (NFKC, an HTML page) may turn one into the other.
"""

from __future__ import annotations

import unicodedata
from itertools import chain

import regex
from confusable_homoglyphs.confusables import confusables_data

# Stands for what is not seen: it is skipped inside a mark.
FILLER = "\u200b"


def _alike(sign: str) -> str:
    """Return the single characters that Unicode's table (UTS 39) says look like `sign`.

    Not ASCII, which stands for itself, and not what Japanese text is written with (`ノ` for a slash).
    """
    pairs = (entry["c"] for entry in confusables_data.get(sign, ()))
    return "".join(c for c in pairs if len(c) == 1 and c > "\x7f" and not "⺀" <= c <= "鿿")


# Brackets and slashes that may stand for "<", ">", "[" and "/" in a mark, but never in an exact one.
OPENING = "‹〈《⟨❮◁«≪⋘≺⋖˂ᐸ❬❰⟪⦑⧀⧼⪡⫷⏴◀◂◃◄◅⯇≲≤≦⩽" + _alike("<")
_CLOSING = "›〉》⟩❯▷»≫⋙≻⋗˃ᐳ❭❱⟫⦒⧁⧽⪢⫸⏵▶▸▹►▻⯈≳≥≧⩾" + _alike(">")
_SQUARE, _SQUARE_END = "【〔⟦〚", "】〕⟧〛"
# Whatever else is folded into the first character of a mark.
OTHER_FORMS = _SQUARE + "［﹇︻︹﹝🄪🉀🉁🉂🉃🉄🉅🉆🉇🉈＜﹤≮≰≴⊀\u2329︽︿＆﹠＃﹟％﹪＼﹨" + _alike("&")
_SLASHES = "\\╱╲" + _alike("/") + _alike("\\")
_PLAIN = (
    dict.fromkeys(OPENING, "«")
    | dict.fromkeys(_CLOSING, "»")
    | dict.fromkeys(_SQUARE, "[")
    | dict.fromkeys(_SQUARE_END, "]")
    | dict.fromkeys(_SLASHES, "/")
    | {look: sign for sign in "&-:_" for look in _alike(sign)}
    | {"\ufffd": "*"}
)
# What is not seen by its property (it takes in the Hangul fillers and code points that are not assigned yet);
# the empty Braille cell and the empty note head are signs, and yet blank.
_UNSEEN = regex.compile(r"[\p{Default_Ignorable_Code_Point}\p{Cn}\p{Co}\p{Cs}\u2800\U0001d159]")
# A letter of a mark, then letters of other alphabets that look like it and are not in Unicode's table. All
# such become that letter in upper case, which nothing else stays: a mark is recognised, but never exact.
_MORE_ALIKE = "Aᴀ Dđᴅ Eєεɛᴇ Fƒꜰғ Gɢ Hнħʜη Kкκᴋ Lłʟ Nпɴ Oø Pᴘ Rʀ Tтτŧᴛ"
_LETTER_OF = (
    {
        look: letter
        for letter in "ZYXWVUTSRQPONMLKJHGFEDCBAI"  # what looks like I and l is an I
        for look in chain(_alike(letter), _alike(letter.lower()))
    }
    | {look: letters[0] for letters in _MORE_ALIKE.split() for look in letters[1:]}
)
_REMEMBERED = 20_000  # characters: more than a text in any language uses


class _Folding(dict[int, str]):
    """Map a character to its plain form: NFKD, lower case; one form each of brackets, dashes, slashes."""

    def __missing__(self, code: int) -> str:
        plain = unicodedata.normalize("NFKD", chr(code)).casefold()[:1]
        category = unicodedata.category(plain)
        unprinted = category in {"Mn", "Me", "Cf"} or (category == "Cc" and not plain.isspace())
        if unprinted or _UNSEEN.match(plain):
            folded = FILLER
        elif category == "Pd":
            folded = "-"
        else:
            # A capital may look like a letter where its small form does not.
            itself = "" if plain.isascii() and plain.isalnum() else chr(code)
            folded = _PLAIN.get(plain) or _LETTER_OF.get(plain) or _LETTER_OF.get(itself, plain)
        if len(self) < _REMEMBERED:
            self[code] = folded
        return folded


_FOLDING = _Folding({ord("ſ"): "F"})  # its compatible form is s, and yet it looks like an f
# Whatever may end a line where a text is shown; these are the ends that `str.splitlines` knows.
_FOLDING |= dict.fromkeys(map(ord, "\r\v\f\x1c\x1d\x1e\x85\u2028\u2029"), "\n")


def fold(text: str) -> str:
    """Return `text` with every character in its plain form, one for one: positions stay what they are.

    A ligature keeps its first letter only (`ﬁnal` becomes `fnal`): what is lost counts as a slip.
    """
    return text.translate(_FOLDING)
