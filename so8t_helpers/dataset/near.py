"""Duplicates among all rows: exact by hash, near by MinHash bands, from files, in bounded memory.

A row is dropped when it nearly equals an earlier row; no two rows that are kept and share a band are
near-duplicates. Where the estimate is too near the threshold to decide, the texts themselves do.
"""

from __future__ import annotations

import mmap
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path

import numpy as np

from so8t_helpers.dataset.dedup import KEPT, banding, jaccard

# An estimate from `KEPT` minima has a standard error of 0.05 at most (short texts); beyond three it decides.
MARGIN = 0.15
# Comparisons in one band, per row: more means a band that (nearly) all rows share, which says nothing.
MOST_COMPARISONS = 300
_BLOCK, _FEW = 2**16, 2**13
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
        self.head = np.empty((count, _FIRST), dtype=np.uint8)

    def add(self, keys: np.ndarray, low: np.ndarray) -> None:
        """Append a chunk's band keys (n, bands) and signatures (n, KEPT) uint8."""
        self._keys[:, self._filled : self._filled + len(keys)] = keys.T
        self.head[self._filled : self._filled + len(low)] = low[:, :_FIRST]
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
    rows = np.flatnonzero(alive).astype(np.uint64)
    with ThreadPoolExecutor(1) as pool:  # numpy sorts without the interpreter: the next band meanwhile
        ahead = pool.submit(_sorted, files, 0, rows)
        for number in range(files.bands):
            by_key = ahead.result()
            if number + 1 < files.bands:
                ahead = pool.submit(_sorted, files, number + 1, rows)
            members, first = _groups(by_key, earlier < 0)
            budget = MOST_COMPARISONS * files.count
            while len(members):
                near = _nearly_equal(files.head, low, members, first, threshold, texts)
                earlier[members[near]] = first[near]
                budget -= len(members)
                members, first = _next_round(members[~near], first[~near])
                if budget < 0:
                    skipped += len(members)
                    break
    return earlier, skipped


def _sorted(files: NearFiles, number: int, rows: np.ndarray) -> np.ndarray:
    """Return one band's keys above, rows below, sorted: (rows,) uint64."""
    by_key = files.band(number)[rows.astype(np.int64)].astype(np.uint64) << np.uint64(32) | rows
    by_key.sort()
    return by_key


def _groups(by_key: np.ndarray, alive: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the rows that share a key with an earlier row, in groups, and each one's first of the group."""
    rows = (by_key & np.uint64(0xFFFFFFFF)).astype(np.int64)
    still = alive[rows]
    rows, keys = rows[still], by_key[still] >> np.uint64(32)
    if not len(rows):
        return rows, rows
    new = np.r_[True, keys[1:] != keys[:-1]]
    # Most groups are of one row: those that are not are few.
    later = np.flatnonzero(~new)
    starts = np.flatnonzero(new)
    return rows[later], rows[starts[np.searchsorted(starts, later) - 1]]


def _next_round(members: np.ndarray, first: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Compare what is left of each group with the first of what is left."""
    if not len(members):
        return members, first
    new = np.r_[True, first[1:] != first[:-1]]
    leader = members[np.flatnonzero(new)[np.cumsum(new) - 1]]
    return members[~new], leader[~new]


def _nearly_equal(
    head: np.ndarray,
    low: np.memmap,
    a: np.ndarray,
    b: np.ndarray,
    threshold: float,
    text_of: Callable[[int], str],
) -> np.ndarray:
    """Return which of the pairs (a, b) are near-duplicates: (n,) bool."""
    agree = np.zeros(len(a))
    for start in range(0, len(a), _BLOCK):
        part = slice(start, start + _BLOCK)
        likely = start + np.flatnonzero(_agreements(head[a[part]], head[b[part]]) >= _FEWEST)
        for at in range(0, len(likely), _FEW):
            few = likely[at : at + _FEW]
            agree[few] = _agreements(low[a[few]], low[b[few]]) / KEPT
            _forget(low)
    estimate = (agree - 1 / 256) / (1 - 1 / 256)
    near = estimate >= threshold
    for i in np.flatnonzero(np.abs(estimate - threshold) < MARGIN):
        near[i] = jaccard(text_of(int(a[i])), text_of(int(b[i]))) >= threshold
    return near


def _agreements(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Return on how many minima pairs agree: (n,) of (n, minima) uint8 each."""
    return (a == b).sum(axis=1, dtype=np.uint8)


def _forget(mapped: np.memmap) -> None:
    """Let the system drop a mapping's pages: they are in the file, and would count as ours."""
    base = mapped.base
    if isinstance(base, mmap.mmap) and hasattr(mmap, "MADV_DONTNEED"):
        base.madvise(mmap.MADV_DONTNEED)
