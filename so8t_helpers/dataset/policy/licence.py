"""Licences as people write them, as SPDX names; which are allowed is a setting."""

from __future__ import annotations

import re
from functools import lru_cache

_SPELLINGS = {
    "Apache-2.0": "apache apache2 apache20 apachelicense20",
    "MIT": "mitlicense themitlicense",
    "CC0-1.0": "cc0 creativecommonszero publicdomain パブリックドメイン",
    "CC-BY-4.0": "ccby creativecommonsattribution40",
    "CC-BY-SA-4.0": "ccbysa creativecommonsattributionsharealike40",
    "self-made": "selfmade own 自作",
}
_ALIASES = {spelling: name for name, spellings in _SPELLINGS.items() for spelling in spellings.split()}
_CREATIVE_COMMONS = re.compile(r"creativecommons\.org/(licenses|publicdomain)/([a-z-]+)/([0-9.]+)")


@lru_cache(maxsize=4096)
def canonical(name: str, allowed: tuple[str, ...]) -> str | None:
    """Return the entry of `allowed` that `name` means, or None: a licence nobody allowed."""
    if url := _CREATIVE_COMMONS.search(name.lower()):
        name = f"cc0-{url[3]}" if url[1] == "publicdomain" else f"cc-{url[2]}-{url[3]}"
    key = _key(name)
    spelled = {_key(entry): entry for entry in allowed}
    return spelled.get(key) or spelled.get(_key(_ALIASES.get(key, "")))


def _key(name: str) -> str:
    return re.sub(r"[\s_.()-]+", "", name.lower())
