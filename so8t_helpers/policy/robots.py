"""robots.txt (RFC 9309): may a record that came from a URL be used?

A folder holds one file for each host, `<host>.txt` (`<host>_<port>.txt` for another port), given by the user
or fetched and cached there by `robots_fetch`. Matching is Protego's, which follows Google's rules: the
longest match wins, `*` and `$` are known, groups of one agent are merged.
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from urllib.parse import urlsplit

from protego import Protego

MAX_BYTES = 500 * 1024  # RFC 9309, 2.5: at least this much is parsed


class Robots:
    """Decide about URLs from the robots.txt files of a folder."""

    def __init__(self, directory: Path | None, agent: str):
        self.directory, self.agent = directory, agent
        self._parsed = lru_cache(maxsize=4096)(self._read)

    def decide(self, url: str) -> str | None:
        """Return None where `url` may be used, else robots_disallow, robots_unknown or bad_url."""
        name = file_name(url)
        if name is None:
            return "bad_url"
        rules = self._parsed(name)
        if rules is None:
            return "robots_unknown"
        return None if rules.can_fetch(url, self.agent) else "robots_disallow"

    def _read(self, name: str) -> Protego | None:
        if self.directory is None or not (self.directory / name).is_file():
            return None
        with (self.directory / name).open("rb") as file:
            return parse(file.read(MAX_BYTES))


def parse(content: bytes) -> Protego:
    """Parse a robots.txt file; a byte order mark is skipped, bytes that are not UTF-8 are replaced."""
    return Protego.parse(content.decode("utf-8-sig", errors="replace"))


def file_name(url: str) -> str | None:
    """Return the name under which the file of a URL's host is kept; None for what is no web address."""
    try:
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port
    except ValueError:
        return None
    if parts.scheme not in {"http", "https"} or not host:
        return None
    safe = "".join(c if c.isascii() and (c.isalnum() or c in ".-") else "_" for c in host.lower())
    default = {"http": 80, "https": 443}[parts.scheme]
    return f"{safe}.txt" if port in {None, default} else f"{safe}_{port}.txt"
