"""robots.txt (RFC 9309): may a record that came from a URL be used?

A folder holds one file for each host, given by the user or fetched by `robots_fetch`. Matching is Protego's,
which follows Google's rules.
"""

from __future__ import annotations

import ipaddress
import json
import math
import socket
import time
from functools import lru_cache
from pathlib import Path
from urllib.parse import urlsplit

import httpx
from protego import Protego

from so8t_helpers.run.files import atomic_path, write_json

MAX_BYTES = 500 * 1024  # RFC 9309, 2.5: at least this much is parsed


class Robots:
    """Decide about URLs from the robots.txt files of a folder."""

    def __init__(self, directory: Path | None, agent: str):
        self.directory, self.agent = directory, agent
        self._parsed = lru_cache(maxsize=4096)(self._read)

    def decide(self, url: str) -> str | None:
        """Return None where `url` may be used, else robots_disallow, robots_unknown or bad_url."""
        if (name := file_name(url)) is None:
            return "bad_url"
        if (rules := self._parsed(name)) is None:
            return "robots_unknown"
        return None if rules.can_fetch(url, self.agent) else "robots_disallow"

    def _read(self, name: str) -> Protego | None:
        if self.directory is None or not (self.directory / name).is_file():
            return None
        with (self.directory / name).open("rb") as file:
            return Protego.parse(file.read(MAX_BYTES).decode("utf-8-sig", errors="replace"))


def file_name(url: str) -> str | None:
    """Return `<host>.txt` (`<host>_<port>.txt` for another port); None for what is no web address."""
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


MAX_REDIRECTS = 5  # RFC 9309, 2.3.1.2
CACHE_SECONDS = 24 * 3600  # RFC 9309, 2.4
DISALLOW_ALL = b"User-agent: *\nDisallow: /\n"


def fetch(url: str, directory: Path, agent: str, public_only: bool = True) -> None:
    """Fetch the robots.txt that governs `url` into the folder, unless one is there and fresh enough.

    A file that the user gave (without the `.json` that a fetch leaves with it) is never replaced. 4xx means
    that all may be crawled, 5xx and network errors that nothing may. `public_only` refuses hosts that resolve
    to addresses inside a private network.
    """
    if (name := file_name(url)) is None:
        return
    path, note = directory / name, directory / f"{name}.json"
    if path.is_file():
        fetched = json.loads(note.read_text(encoding="utf-8"))["fetched"] if note.is_file() else math.inf
        if time.time() - fetched <= CACHE_SECONDS:
            return
    scheme, authority, *_ = urlsplit(url)
    status, content = _get(f"{scheme}://{authority.rpartition('@')[2]}/robots.txt", agent, public_only)
    if status is None or status >= 500:
        content = DISALLOW_ALL
    elif status >= 300:
        content = b""
    with atomic_path(path) as scratch:
        scratch.write_bytes(content)
    write_json(note, {"url": url, "status": status, "fetched": time.time()})


def _get(url: str, agent: str, public_only: bool) -> tuple[int | None, bytes]:
    """Return (status, at most MAX_BYTES of content); status None for a network error."""
    try:
        with httpx.Client(headers={"User-Agent": agent}, timeout=10.0, trust_env=False) as client:
            for _ in range(MAX_REDIRECTS + 1):
                if public_only and not _is_public(url):
                    return None, b""
                with client.stream("GET", url) as response:
                    if response.is_redirect and response.next_request is not None:
                        url = str(response.next_request.url)
                        continue
                    content = b""
                    for block in response.iter_bytes():
                        content += block
                        if len(content) >= MAX_BYTES:
                            break
                    return response.status_code, content[:MAX_BYTES]
    except (httpx.HTTPError, httpx.InvalidURL, OSError):
        return None, b""
    # More redirects than that: RFC 9309 lets a crawler take the file for unavailable, as with 4xx.
    return 404, b""


def _is_public(url: str) -> bool:
    """Say whether a URL's host lies in the public internet: records must not steer us inside."""
    parts = urlsplit(url)
    found = socket.getaddrinfo(parts.hostname, parts.port or 443, type=socket.SOCK_STREAM)
    return all(ipaddress.ip_address(address[4][0]).is_global for address in found)
