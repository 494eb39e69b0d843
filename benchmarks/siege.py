"""Connections that never ask, for `service.py`: half-open ones and slow bodies, opened again whenever closed.

`python benchmarks/siege.py PORT SECONDS HALF_OPEN SLOW_BODIES` prints what became of them as JSON.
"""

from __future__ import annotations

import asyncio
import json
import resource
import sys
import time
from collections import Counter

HALF = b"POST /think HTTP/1.1\r\nHost: local"
SLOW = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 5000\r\n\r\n"
AGAIN_SECONDS = 1.0  # until a connection that was closed is opened again


async def besiege(port: int, until: float, said: bytes, trickle: bytes, ends: Counter[str]) -> None:
    """Keep one connection open: say something, then a byte a second, until the time is up."""
    while time.monotonic() < until:
        try:
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
        except OSError as error:
            ends[type(error).__name__] += 1
            await asyncio.sleep(AGAIN_SECONDS)
            continue
        ends["opened"] += 1
        try:
            writer.write(said)
            while (left := until - time.monotonic()) > 0:
                try:
                    answer = await asyncio.wait_for(reader.read(4096), min(1.0, left))
                    ends[answer.split()[1].decode() if answer else "closed"] += 1
                    break
                except TimeoutError:
                    writer.write(trickle)
            else:
                ends["held to the end"] += 1
        except (OSError, IndexError) as error:
            ends[type(error).__name__] += 1
        writer.close()
        await asyncio.sleep(AGAIN_SECONDS)


async def main() -> None:
    port, seconds, half, slow = (int(argument) for argument in sys.argv[1:])
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    until, ends = time.monotonic() + seconds, {"half-open": Counter[str](), "slow body": Counter[str]()}
    await asyncio.gather(
        *(besiege(port, until, HALF, b"", ends["half-open"]) for _ in range(half)),
        *(besiege(port, until, SLOW, b"x", ends["slow body"]) for _ in range(slow)),
    )
    print(json.dumps(ends))


if __name__ == "__main__":
    asyncio.run(main())
