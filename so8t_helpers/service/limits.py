"""What keeps a request out: a foreign name, no token, too many from one address."""

from __future__ import annotations

import hmac
import ipaddress
import re
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable

# Addresses remembered at once; whoever was not seen for longest is forgotten, and has a full allowance again.
_ADDRESSES = 10_000
_LOOPBACK_HOST = re.compile(rb"(?:localhost|127(?:\.[0-9]{1,3}){3}|\[::1\])(?::[0-9]{1,5})?", re.IGNORECASE)


class RateLimit:
    """A token bucket for each key: `per_minute` requests at once, refilled evenly; `clock` is in seconds."""

    def __init__(self, per_minute: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._size = float(per_minute)
        self._rate = per_minute / 60.0
        self._clock = clock
        self._buckets: OrderedDict[str, tuple[float, float]] = OrderedDict()

    def wait(self, key: str) -> float:
        """Take one request from the key's bucket; return 0, or the seconds until there is one to take."""
        now = self._clock()
        level, then = self._buckets.pop(key, (self._size, now))
        level = min(self._size, level + (now - then) * self._rate)
        allowed = level >= 1.0
        self._buckets[key] = (level - 1.0 if allowed else level, now)
        if len(self._buckets) > _ADDRESSES:
            self._buckets.popitem(last=False)
        return 0.0 if allowed else (1.0 - level) / self._rate


def rate_key(address: str) -> str:
    """Return what is counted for an address: itself; of IPv6 its /64 network, which one user has whole."""
    try:
        found = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return address
    return address if found.version == 4 else str(ipaddress.ip_network((found, 64), strict=False))


def token_fits(header: str | None, token: str) -> bool:
    """Say whether an Authorization header carries the token, in a time that does not tell how nearly."""
    scheme, _, given = (header or "").partition(" ")
    return scheme.lower() == "bearer" and hmac.compare_digest(given.strip().encode(), token.encode())


def is_loopback(host: str) -> bool:
    """Say whether a host that the service listens on can be reached from this machine alone."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def names_loopback(headers: Iterable[tuple[bytes, bytes]]) -> bool:
    """Say whether the one Host header is a loopback name; what cannot be read, is missing or doubled is not.

    A page in the user's browser can reach a loopback service under a name of its own (DNS rebinding).
    """
    hosts = [value for name, value in headers if name == b"host"]
    return len(hosts) == 1 and _LOOPBACK_HOST.fullmatch(hosts[0]) is not None
