"""Licences as people write them, as SPDX names; which are allowed is a setting."""

from __future__ import annotations

import re
from functools import lru_cache

_ALIASES = {
    "apache": "Apache-2.0",
    "apache2": "Apache-2.0",
    "apache20": "Apache-2.0",
    "apachelicense20": "Apache-2.0",
    "mitlicense": "MIT",
    "themitlicense": "MIT",
    "cc0": "CC0-1.0",
    "creativecommonszero": "CC0-1.0",
    "publicdomain": "CC0-1.0",
    "パブリックドメイン": "CC0-1.0",
    "ccby": "CC-BY-4.0",
    "ccbysa": "CC-BY-SA-4.0",
    "creativecommonsattribution40": "CC-BY-4.0",
    "creativecommonsattributionsharealike40": "CC-BY-SA-4.0",
    "selfmade": "self-made",
    "own": "self-made",
    "自作": "self-made",
}
_CREATIVE_COMMONS = re.compile(r"creativecommons\.org/(licenses|publicdomain)/([a-z-]+)/([0-9.]+)")


@lru_cache(maxsize=4096)
def canonical(name: str, allowed: tuple[str, ...]) -> str | None:
    """Return the entry of `allowed` that `name` means, or None: a licence nobody allowed."""
    url = _CREATIVE_COMMONS.search(name.lower())
    if url:
        kind = "cc0" if url[1] == "publicdomain" else f"cc-{url[2]}"
        name = f"{kind}-{url[3]}"
    key = _key(name)
    spelled = {_key(entry): entry for entry in allowed}
    return spelled.get(key) or spelled.get(_key(_ALIASES.get(key, "")))


def _key(name: str) -> str:
    return re.sub(r"[\s_.()-]+", "", name.lower())
