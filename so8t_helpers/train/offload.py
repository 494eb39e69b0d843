"""Where the layers' inputs wait between the forward and the backward loop: on the device, or on the host."""

from __future__ import annotations

import torch
from torch import Tensor

_SLOTS = 2  # one in use, one on its way


class DeviceInputs:
    """Keeps inputs where they are."""

    def __init__(self, count: int):
        self.kept: list[Tensor | None] = [None] * count

    def begin(self) -> None:
        """Start a new forward loop."""

    def save(self, index: int, x: Tensor) -> None:
        """Keep the input of segment `index`."""
        self.kept[index] = x

    def load(self, index: int) -> Tensor:
        """Give it back; each is asked for once, in reverse order."""
        x, self.kept[index] = self.kept[index], None
        assert x is not None
        return x


class HostInputs:
    """Keeps inputs in pinned host memory; copies run on a stream of their own while layers compute.

    All buffers are static and the copies are ordered by events alone, so a CUDA graph can capture them.
    """

    def __init__(self, count: int, like: Tensor):
        self.host = torch.empty((count, *like.shape), dtype=like.dtype, pin_memory=True)
        # The first input comes from `like`, which is free again as soon as it has been saved.
        self.slots = [like, *(torch.empty_like(like) for _ in range(_SLOTS - 1))]
        self.stream = torch.cuda.Stream()
        self.begin()

    def begin(self) -> None:
        """Start a new forward loop; events of an earlier one must not enter a capture."""
        self.free: list[torch.cuda.Event | None] = [None] * _SLOTS
        self.ready: dict[int, torch.cuda.Event] = {}

    def save(self, index: int, x: Tensor) -> None:
        """Copy the input of segment `index` to the host."""
        main, slot = torch.cuda.current_stream(), index % _SLOTS
        self._wait(main, self.free[slot])
        if x is not self.slots[slot]:
            self.slots[slot].copy_(x)
        self._wait(self.stream, main.record_event())
        with torch.cuda.stream(self.stream):
            self.host[index].copy_(self.slots[slot], non_blocking=True)
        self.free[slot] = self.stream.record_event()

    def load(self, index: int) -> Tensor:
        """Give it back and start to fetch the ones before it."""
        main = torch.cuda.current_stream()
        if not self.ready:  # the first of the backward loop
            self._fetch(index)
        else:  # the slot of the segment just finished can be filled again
            self.free[(index + 1) % _SLOTS] = main.record_event()
        if index:
            self._fetch(index - 1)
        self._wait(main, self.ready[index])
        return self.slots[index % _SLOTS]

    def _fetch(self, index: int) -> None:
        slot = index % _SLOTS
        self._wait(self.stream, self.free[slot])
        with torch.cuda.stream(self.stream):
            self.slots[slot].copy_(self.host[index], non_blocking=True)
        self.ready[index] = self.stream.record_event()

    @staticmethod
    def _wait(stream: torch.cuda.Stream, event: torch.cuda.Event | None) -> None:
        if event is not None:
            stream.wait_event(event)
