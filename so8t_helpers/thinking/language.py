"""Which language a text is in, as far as it decides in which words we think for it: Japanese, or English."""

from __future__ import annotations

import re

LANGUAGES = ("ja", "en")

# Kana (half-width ones too), the signs among them, and Chinese characters.
_JAPANESE = re.compile(
    "[\u3005-\u3007\u3040-\u30ff\u31f0-\u31ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
    "\uff66-\uff9f\U00020000-\U0003ffff]"
)


def language_of(*texts: str) -> str:
    """Return "ja" where any text holds kana or Chinese characters, else "en"."""
    for text in texts:
        if not text.isascii() and _JAPANESE.search(text):
            return "ja"
    return "en"
