"""Writing past the system's cache: every byte where it belongs, on systems that allow it and that do not."""

from __future__ import annotations

import errno
import itertools
import os
import sys
from pathlib import Path

import pytest
import torch

from so8t_helpers.bake.direct import PAGE, DirectWriter, aligned_buffer

SIZE = 40 * PAGE + 1234
# Borders of pieces: on a page, beside one, twice within one page, pages apart.
BORDERS = [0, 8, 100, PAGE, PAGE + 8, 3 * PAGE, 9 * PAGE - 8, 9 * PAGE + 6, 30 * PAGE + 2000, SIZE]


def refuse(*_: object) -> int:
    raise OSError(errno.EINVAL, "Invalid argument")


@pytest.mark.parametrize("system", ["as it is", "refuses the write", "refuses to open", "has no such flag"])
def test_pieces_in_any_order_make_the_file(tmp_path: Path, system: str, monkeypatch: pytest.MonkeyPatch):
    if system != "as it is" and not hasattr(os, "O_DIRECT"):
        pytest.skip("this system has no O_DIRECT to take away")
    if system == "refuses the write":
        monkeypatch.setattr(os, "pwrite", refuse)
    if system == "refuses to open":
        monkeypatch.setattr(os, "open", refuse)
    if system == "has no such flag":
        monkeypatch.setattr(sys, "platform", "darwin")
    content = torch.randint(0, 256, (SIZE,), dtype=torch.uint8, generator=torch.Generator().manual_seed(5))
    path = tmp_path / "weights"
    path.write_bytes(bytes(SIZE))
    pieces = list(itertools.pairwise(BORDERS))
    cached = 0
    with DirectWriter([path]) as writer:
        for start, stop in pieces[::2] + pieces[1::2]:
            piece = aligned_buffer(start % PAGE + stop - start)[start % PAGE :]
            piece.copy_(content[start:stop])
            cached += writer.write(path, start, piece)
    assert path.read_bytes() == content.numpy().tobytes()
    # All but the two ends of each piece, less than a page each, where the file system takes part.
    assert cached == SIZE if system != "as it is" else cached in {SIZE, *range(2 * PAGE * len(pieces))}
