"""One request for an answer: the question, and what comes back from the engine's thread, step by step."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

from fastapi import Request

from so8t_helpers.service.answering import Answering
from so8t_helpers.service.draft import Answer, AnswerError, Asked, Question

log = logging.getLogger("so8t.serve")

STREAM_HEADERS = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
_KEEP_ALIVE_SECONDS = 10.0

# A piece of the text; None where there is nothing yet; at last the answer or an error.
Step = str | None | Answer | AnswerError


class Call:
    """A question under way; whoever made it takes `whole` or `steps`, once.

    Raises:
        AnswerError: 503, the queue is full.
    """

    def __init__(self, answering: Answering, asked: Asked, request_id: str) -> None:
        loop = asyncio.get_running_loop()
        self._deadline = time.monotonic() + answering.settings.serve.timeout_seconds
        self._pieces: asyncio.Queue[str | None] = asyncio.Queue()
        release = lambda text: _tell(loop, self._pieces, text)
        self._question = Question(request_id, asked, self._deadline, release)
        self._future = asyncio.wrap_future(answering.submit(self._question))
        self._future.add_done_callback(lambda _: self._pieces.put_nowait(None))

    async def whole(self, request: Request) -> Answer:
        """Wait for the whole answer, for the client to go, or for the time to be up."""
        gone = asyncio.ensure_future(_disconnected(request))
        try:
            either: list[asyncio.Future[Any]] = [self._future, gone]
            await asyncio.wait(either, timeout=self._left(), return_when="FIRST_COMPLETED")
            if self._future.done():
                return self._future.result()
            if gone.done():
                raise AnswerError(503, "dropped", "the client has gone")
            raise _too_late()
        finally:
            gone.cancel()
            self._drop()

    async def steps(self) -> AsyncIterator[Step]:
        """Yield what happens; the last step is the answer or an error, and nothing is raised."""
        try:
            while True:
                try:
                    patience = min(self._left(), _KEEP_ALIVE_SECONDS)
                    piece = await asyncio.wait_for(self._pieces.get(), timeout=patience)
                except TimeoutError:
                    if self._left() <= 0:
                        raise _too_late() from None
                    yield None
                    continue
                if piece is None:
                    yield self._future.result()
                    return
                yield piece
        except AnswerError as error:
            yield error
        except Exception as error:
            # The message of an unknown error might quote what the model wrote: its type must do.
            log.error("request %s failed: %s", self._question.request_id, type(error).__name__)
            yield AnswerError(500, "internal", "internal error")
        finally:
            self._drop()

    async def events(self, write: Callable[[Step], str]) -> AsyncIterator[str]:
        """Yield the steps as a dialect writes them."""
        async for step in self.steps():
            yield ": waiting\n\n" if step is None else write(step)

    def _left(self) -> float:
        return max(0.0, self._deadline - time.monotonic())

    def _drop(self) -> None:
        """Nobody waits any more: the engine may stop. Its thread keeps its place until it has."""
        self._question.dropped.set()
        if not self._future.done():
            self._future.add_done_callback(lambda future: future.cancelled() or future.exception())


def _tell(loop: asyncio.AbstractEventLoop, pieces: asyncio.Queue[str | None], text: str) -> None:
    if not loop.is_closed():
        loop.call_soon_threadsafe(pieces.put_nowait, text)


def _too_late() -> AnswerError:
    return AnswerError(504, "timeout", "the model did not answer in time")


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
