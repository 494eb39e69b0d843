"""What keeps a request out: no token, too many from one user, a body that is too large."""

from __future__ import annotations

import hmac
import ipaddress
import time
from collections import OrderedDict
from collections.abc import Callable

TOKEN_VARIABLE = "SO8T_TOKEN"
# Users remembered at once; whoever was not seen for longest is forgotten, and has a full allowance again.
_USERS = 10_000


class RateLimit:
    """A token bucket for each user: `per_minute` requests at once, refilled evenly; `clock` is in seconds."""

    def __init__(self, per_minute: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._size = float(per_minute)
        self._rate = per_minute / 60.0
        self._clock = clock
        self._buckets: OrderedDict[str, tuple[float, float]] = OrderedDict()

    def wait(self, user: str) -> float:
        """Take one request from the user's bucket; return 0, or the seconds until there is one to take."""
        now = self._clock()
        level, then = self._buckets.pop(user, (self._size, now))
        level = min(self._size, level + (now - then) * self._rate)
        allowed = level >= 1.0
        self._buckets[user] = (level - 1.0 if allowed else level, now)
        if len(self._buckets) > _USERS:
            self._buckets.popitem(last=False)
        return 0.0 if allowed else (1.0 - level) / self._rate


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
