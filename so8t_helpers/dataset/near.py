"""Duplicates among all rows: exact by hash, near by MinHash bands, from files, in bounded memory.

A row is dropped when it nearly equals an earlier row; no two rows that are kept and share a band are
near-duplicates. Where the estimate is too near the threshold to decide, the texts themselves do.
"""

from __future__ import annotations

import mmap
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

import numpy as np

from so8t_helpers.dataset.dedup import KEPT, banding, jaccard

# An estimate from `KEPT` minima has a standard error of 0.05 at most (short texts); beyond three it decides.
MARGIN = 0.15
# Comparisons in one band, per row: more means a band that (nearly) all rows share, which says nothing.
MOST_COMPARISONS = 300
_BLOCK = 2**16
# Of 16 minima a pair at similarity 0.7 agrees on fewer than 5 once in 20,000 times; most candidates do.
_FIRST, _FEWEST = 16, 5


class NearFiles:
    """The files that the first pass fills and the second reads: band keys and 8-bit signatures.

    Eight bits of each minimum are enough to compare two: by chance 1 in 256 agree (Li & Koenig, 2010).
    """

    def __init__(self, folder: Path, count: int, threshold: float):
        self.count, self.bands = count, banding(threshold)[0]
        self.keys_path, self.low_path = folder / "keys", folder / "low"
        self._filled = 0
        # (bands, count), so that one band is read in one go.
        self._keys = np.memmap(self.keys_path, np.uint32, "w+", shape=(self.bands, max(count, 1)))
        self._low = self.low_path.open("wb")

    def add(self, keys: np.ndarray, low: np.ndarray) -> None:
        """Append a chunk's band keys (n, bands) and signatures (n, KEPT) uint8."""
        self._keys[:, self._filled : self._filled + len(keys)] = keys.T
        self._filled += len(keys)
        self._low.write(low.tobytes())
        _forget(self._keys)

    def close(self) -> None:
        """Finish writing."""
        self._keys.flush()
        self._low.close()

    def band(self, number: int) -> np.ndarray:
        """Return one band's keys: (count,) uint32."""
        return np.fromfile(self.keys_path, np.uint32, self.count, offset=4 * number * max(self.count, 1))

    def low(self) -> np.memmap:
        """Return the 8-bit signatures, mapped: (count, KEPT) uint8."""
        return np.memmap(self.low_path, np.uint8, "r", shape=(self.count, KEPT))


def exact_duplicates(hashes: np.ndarray) -> np.ndarray:
    """Return for each row the first one with the same hash, its own index where it is first: (N,) int64."""
    _, first, inverse = np.unique(hashes, return_index=True, return_inverse=True)
    return first[inverse]


def near_duplicates(
    files: NearFiles, alive: np.ndarray, threshold: float, text_of: Callable[[int], str]
) -> tuple[np.ndarray, int]:
    """Find for each row an earlier one that it nearly equals.

    Args:
        files: keys and signatures of all rows.
        alive: (N,) bool; only these are compared.
        threshold: Jaccard similarity of 5-grams from which two rows are near-duplicates.
        text_of: a row's normalised text, asked for where the estimate cannot decide.

    Returns:
        earlier: (N,) int64, -1 where there is none.
        skipped: comparisons left out in bands that too many rows share.
    """
    earlier = np.full(files.count, -1, dtype=np.int64)
    if not files.count:
        return earlier, 0
    low, skipped = files.low(), 0
    texts = lru_cache(maxsize=4096)(text_of)
    for number in range(files.bands):
        members, first = _groups(files.band(number), alive & (earlier < 0))
        budget = MOST_COMPARISONS * files.count
        while len(members):
            near = _nearly_equal(low, members, first, threshold, texts)
            earlier[members[near]] = first[near]
            budget -= len(members)
            members, first = _next_round(members[~near], first[~near])
            if budget < 0:
                skipped += len(members)
                break
    return earlier, skipped


def _groups(keys: np.ndarray, alive: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the rows that share a key with an earlier row, in groups, and each one's first of the group."""
    rows = np.flatnonzero(alive)
    order = np.argsort(keys[rows], kind="stable")
    rows = rows[order]
    keys = keys[rows]
    new = np.r_[True, keys[1:] != keys[:-1]]
    first = rows[np.flatnonzero(new)[np.cumsum(new) - 1]]
    return rows[~new], first[~new]


def _next_round(members: np.ndarray, first: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Compare what is left of each group with the first of what is left."""
    if not len(members):
        return members, first
    new = np.r_[True, first[1:] != first[:-1]]
    leader = members[np.flatnonzero(new)[np.cumsum(new) - 1]]
    return members[~new], leader[~new]


def _nearly_equal(
    low: np.memmap, a: np.ndarray, b: np.ndarray, threshold: float, text_of: Callable[[int], str]
) -> np.ndarray:
    """Return which of the pairs (a, b) are near-duplicates: (n,) bool."""
    agree = np.empty(len(a))
    for start in range(0, len(a), _BLOCK):
        part = slice(start, start + _BLOCK)
        agree[part] = _agreement(low, a[part], b[part])
        _forget(low)
    estimate = (agree - 1 / 256) / (1 - 1 / 256)
    near = estimate >= threshold
    for i in np.flatnonzero(np.abs(estimate - threshold) < MARGIN):
        near[i] = jaccard(text_of(int(a[i])), text_of(int(b[i]))) >= threshold
    return near


def _agreement(low: np.memmap, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Return the share of minima on which pairs agree; 0 for those far apart by their first few."""
    first = np.count_nonzero(low[a, :_FIRST] == low[b, :_FIRST], axis=1)
    agree = np.zeros(len(a))
    likely = np.flatnonzero(first >= _FEWEST)
    agree[likely] = np.count_nonzero(low[a[likely]] == low[b[likely]], axis=1) / KEPT
    return agree


def _forget(mapped: np.memmap) -> None:
    """Let the system drop a mapping's pages: they are in the file, and would count as ours."""
    base = mapped.base
    if isinstance(base, mmap.mmap) and hasattr(mmap, "MADV_DONTNEED"):
        base.madvise(mmap.MADV_DONTNEED)
