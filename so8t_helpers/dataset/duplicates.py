"""Near-duplicates among many records, and links between those that are alike, by MinHash.

MinHash and its banding follow Broder (1997) and Leskovec, Rajaraman & Ullman, "Mining of Massive Datasets",
ch. 3; what is compared, and what being alike means, is in `likeness`.
"""

from __future__ import annotations

import mmap
import sys
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path

import numpy as np

from so8t_helpers.dataset.likeness import APART, NGRAM, alike

TABLES, BINS = 4, 64
PERMUTATIONS = TABLES * BINS
KEPT = 128  # minima kept, as their low byte, to estimate a pair's similarity
# From here on two records are too alike to be on two sides of the split. Where the estimate is lower by two
# standard errors they are taken for such a pair: to keep some more together costs nothing.
ALIKE, ALIKE_ESTIMATE = 0.5, 0.4
ALIKE_BANDS = (64, 4)  # 98% of the pairs at 0.5 share a band, 10% of those at 0.2
_rng = np.random.default_rng(20240229)
# Hash functions x -> a x modulo 2^32 (Dietzfelbinger's multiply-shift), with odd a: one for each table.
_MULTIPLIERS = _rng.integers(0, 2**32, TABLES, dtype=np.uint32) | np.uint32(1)
_BIN_SHIFT = np.uint32(32 - 6)
_EMPTY = np.uint32(0xFFFFFFFF)
# For each bin the order in which it looks at the others where it is empty: (BINS, BINS).
_PROBES = _rng.permuted(np.tile(np.arange(BINS), (BINS, 1)), axis=1)
_POWERS = [np.uint64(0x9E3779B97F4A7C15 ** (k + 1) % 2**64) for k in range(NGRAM)]


def shingles(texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """Hash the character 3-grams of normalised texts.

    Returns:
        hashes: (n,) uint32, those of the first text, then of the second, ...; at least one for each.
        starts: (len(texts),) where each text's begin.
    """
    # Closing zeros: a text of m characters has m windows, the last ones padded, none shared with another.
    joined = "".join(text + "\0" * (NGRAM - 1) for text in texts)
    points = np.frombuffer(joined.encode("utf-32-le", "surrogatepass"), dtype=np.uint32).astype(np.uint64)
    lengths = np.array([len(text) + NGRAM - 1 for text in texts])
    count = len(points) - NGRAM + 1
    hashed = np.zeros(count, dtype=np.uint64)
    for k, power in enumerate(_POWERS):
        hashed += points[k : k + count] * power
    # Windows that end in padding count only in a text shorter than three characters, which has no others.
    ends = np.cumsum(lengths)
    starts = ends - lengths
    whole = np.ones(count, dtype=bool)
    for back in range(1, NGRAM):
        padded = ends - NGRAM + 1 - back
        whole[padded[padded > starts]] = False
        beyond = ends - NGRAM + back
        whole[beyond[beyond < count]] = False
    kept = np.concatenate(([0], np.cumsum(whole)))
    return (_mix(hashed[whole]) >> np.uint64(32)).astype(np.uint32), kept[starts]


def compared(texts: list[str], kinds: np.ndarray, threshold: float) -> tuple[np.ndarray, np.ndarray]:
    """Return what records are compared by: normalised texts (see `alike`) and their kinds, (n,) uint32.

    Returns:
        keys: (n, bands) uint32. In the first of `banding(threshold)` bands those of one kind agree whose
            question and context, each by itself, are alike; in the `ALIKE_BANDS` after them all that are
            alike as a whole.
        low: (n, KEPT) uint8, the low bytes of the whole's signature.
    """
    asked = [text.partition(APART)[0] for text in texts]
    number = {text: i for i, text in enumerate(dict.fromkeys(asked))}  # many records ask one thing
    least, own = least_hashes(list(number)), [number[text] for text in asked]
    near = band_keys(signatures(least), *banding(threshold))[own] ^ kinds[:, None]
    least = least[own]
    if parted := [i for i, text in enumerate(texts) if APART in text]:
        context = least_hashes([texts[i].partition(APART)[2] for i in parted])
        near[parted] ^= band_keys(signatures(context), *banding(threshold)) * np.uint32(3)
        least[parted] = np.minimum(least[parted], context)  # a set's minima are the lesser of its parts'
    whole = signatures(least)
    return np.hstack([near, band_keys(whole, *ALIKE_BANDS)]), whole[:, :KEPT].astype(np.uint8)


def least_hashes(texts: list[str]) -> np.ndarray:
    """Return the least hash in each bin, `_EMPTY` where it has none: (len(texts), TABLES, BINS) uint32.

    One permutation hashing (Li, Owen & Zhang, 2012): a hash's high bits choose a bin, and each bin keeps its
    least hash; so a text costs four hash functions, not 256.
    """
    hashes, starts = shingles(texts)
    own = np.repeat(np.arange(len(texts)) * BINS, np.diff(starts, append=len(hashes)))
    kept = np.empty((len(texts), TABLES, BINS), dtype=np.uint32)
    for table in range(TABLES):
        hashed = hashes * _MULTIPLIERS[table]
        least = np.full(len(texts) * BINS, _EMPTY)
        np.minimum.at(least, own + (hashed >> _BIN_SHIFT), hashed)
        kept[:, table] = least.reshape(-1, BINS)
    return kept


def signatures(least: np.ndarray) -> np.ndarray:
    """Return the MinHash signatures of texts from their `least_hashes`: (texts, 256) uint32.

    A bin that stays empty takes what the first other bin has that is not, in an order of its own
    (Shrivastava's optimal densification, 2017).
    """
    flat = least.reshape(-1, BINS)
    filled = flat.copy()
    text, empty = np.nonzero(flat == _EMPTY)
    for attempt in range(BINS):
        if not len(text):
            break
        found = flat[text, _PROBES[empty, attempt]]
        filled[text, empty] = found
        still = found == _EMPTY
        text, empty = text[still], empty[still]
    return filled.reshape(len(least), PERMUTATIONS)


def banding(threshold: float) -> tuple[int, int]:
    """Return (bands, rows): the most rows with which 99% of the pairs at `threshold` share a band."""
    for rows in range(16, 1, -1):
        bands = PERMUTATIONS // rows
        if 1.0 - (1.0 - threshold**rows) ** bands >= 0.99:
            return bands, rows
    return PERMUTATIONS, 1


def band_keys(signature: np.ndarray, bands: int, rows: int) -> np.ndarray:
    """Return what two texts must share one of to be compared: (texts, bands) uint32."""
    used = signature[:, : bands * rows].reshape(len(signature), bands, rows).astype(np.uint64)
    keys = np.zeros(used.shape[:2], dtype=np.uint64)
    for row in range(rows):
        keys = _mix(keys ^ used[:, :, row])
    return (keys >> np.uint64(32)).astype(np.uint32)


def _mix(x: np.ndarray) -> np.ndarray:
    """The finaliser of SplitMix64 (Steele, Lea & Flood, 2014)."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


# An estimate from `KEPT` minima has a standard error of 0.05 at most (short texts); beyond three it decides.
MARGIN = 0.15
MOST_LINKS, FEWEST_LINKS = 16, 2**22  # comparisons for links: for each row, and for all however few they are
# Comparisons in one band, per row: more means a band that (nearly) all rows share, which says nothing.
MOST_COMPARISONS = 300
_BLOCK, _FEW = 2**16, 2**13
# Of 16 minima a pair at similarity 0.7 agrees on fewer than 5 once in 20,000 times; most candidates do. One
# at 0.5 agrees on fewer than 3 twice in 1,000 times.
_FIRST, _FEWEST, _FEWEST_LINKED = 16, 5, 3


class NearFiles:
    """Band keys and 8-bit signatures of all rows, in files.

    Eight bits of each minimum are enough to compare two: by chance 1 in 256 agree (Li & Koenig, 2010).
    `parts` are the keys (n, bands) uint32 and signatures (n, KEPT) uint8 of some of the rows each; `parted`
    says which of all rows have a context: (count,) bool.
    """

    def __init__(
        self, folder: Path, parted: np.ndarray, bands: int, parts: Iterable[tuple[np.ndarray, np.ndarray]]
    ):
        self.parted, self.count, self.keys_path = parted, (count := len(parted)), folder / "keys"
        # (bands, count), so that one band is read in one go.
        by_band = np.memmap(self.keys_path, np.uint32, "w+", shape=(bands, count))
        self.low = np.memmap(folder / "low", np.uint8, "w+", shape=(count, KEPT))
        self.head = np.empty((count, _FIRST), dtype=np.uint8)
        start = 0
        for keys, low in parts:
            rows = slice(start, start + len(keys))
            by_band[:, rows], self.low[rows], self.head[rows] = keys.T, low, low[:, :_FIRST]
            _forget(by_band)
            _forget(self.low)
            start = rows.stop
        by_band.flush()

    def band(self, number: int) -> np.ndarray:
        """Return one band's keys: (count,) uint32."""
        return np.fromfile(self.keys_path, np.uint32, self.count, offset=4 * number * self.count)


def near_duplicates(
    files: NearFiles, bands: range, alive: np.ndarray, threshold: float, text_of: Callable[[int], str]
) -> tuple[np.ndarray, int]:
    """Find for each row an earlier one that it nearly equals.

    Args:
        files: keys and signatures of all rows.
        bands: those of the files' bands to compare by.
        alive: (N,) bool; only these are compared.
        threshold: similarity from which two rows are near-duplicates, see `alike`.
        text_of: a row's normalised text, asked for where the estimate cannot decide.

    Returns:
        earlier: (N,) int64, -1 where there is none.
        skipped: comparisons left out in bands that too many rows share.
    """
    earlier = np.full(files.count, -1, dtype=np.int64)
    skipped = 0
    texts = lru_cache(maxsize=4096)(text_of)
    for members, keys in _by_band(files, bands, np.flatnonzero(alive)):
        unmatched = earlier[members] < 0
        rows, first = _followers(members[unmatched], keys[unmatched])
        budget = MOST_COMPARISONS * files.count
        while len(rows):
            near = _nearly_equal(files, rows, first, threshold, texts)
            earlier[rows[near]] = first[near]
            budget -= len(rows)
            # What is left of each group is compared with the first of what is left.
            rows, first = _followers(rows[~near], first[~near])
            if budget < 0:
                skipped += len(rows)
                break
    return earlier, skipped


def links(files: NearFiles, bands: range, alive: np.ndarray) -> tuple[np.ndarray, np.ndarray, int]:
    """Find pairs of rows that are alike, question and context together: enough of them to connect all.

    Returns:
        pairs: (n, 2) int64.
        estimates: (n,) float64, how alike each is.
        skipped: comparisons left out, as in `near_duplicates`.
    """
    found, skipped = [(np.zeros((0, 2), np.int64), np.zeros(0))], 0
    partner = np.full(files.count, -1, dtype=np.int64)  # the last one found: most bands only say it again
    for members, keys in _by_band(files, bands, np.flatnonzero(alive)):
        rows, first = _followers(members, keys)
        budget = max(MOST_LINKS * files.count, FEWEST_LINKS) // len(bands)
        while len(rows) and budget > 0:
            skipped += max(len(rows) - budget, 0)
            rows, first = rows[:budget], first[:budget]
            budget -= len(rows)
            known = partner[rows] == first
            asked = np.flatnonzero(~known)
            estimate = _estimates(files, rows[asked], first[asked], _FEWEST_LINKED)
            near = asked[estimate >= ALIKE_ESTIMATE]
            partner[rows[near]] = first[near]
            found.append((np.stack([rows[near], first[near]], axis=1), estimate[estimate >= ALIKE_ESTIMATE]))
            known[near] = True
            rows, first = _followers(rows[~known], first[~known])
        skipped += len(rows)
    pairs, estimates = zip(*found, strict=True)
    return np.concatenate(pairs), np.concatenate(estimates), skipped


def _by_band(files: NearFiles, bands: range, rows: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield of each band the rows in the order of their keys: int64 and uint64 (rows,) each."""
    with ThreadPoolExecutor(1) as pool:  # numpy sorts without the interpreter: the next band meanwhile
        ahead = pool.submit(_sorted, files, bands.start, rows.astype(np.uint64))
        for number in bands:
            by_key = ahead.result()
            if number + 1 < bands.stop:
                ahead = pool.submit(_sorted, files, number + 1, rows.astype(np.uint64))
            yield (by_key & np.uint64(0xFFFFFFFF)).astype(np.int64), by_key >> np.uint64(32)


def _sorted(files: NearFiles, number: int, rows: np.ndarray) -> np.ndarray:
    """Return one band's keys above, rows below, sorted: (rows,) uint64."""
    by_key = files.band(number)[rows.astype(np.int64)].astype(np.uint64) << np.uint64(32) | rows
    by_key.sort()
    return by_key


def _followers(rows: np.ndarray, keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the rows whose (sorted) key an earlier row has too, and the first row that has it."""
    if not len(rows):
        return rows, rows
    new = np.r_[True, keys[1:] != keys[:-1]]
    # Most groups are of one row: those that are not are few.
    later, starts = np.flatnonzero(~new), np.flatnonzero(new)
    return rows[later], rows[starts[np.searchsorted(starts, later) - 1]]


def _nearly_equal(
    files: NearFiles, a: np.ndarray, b: np.ndarray, threshold: float, text_of: Callable[[int], str]
) -> np.ndarray:
    """Return which of the pairs (a, b) are near-duplicates: (n,) bool."""
    estimate = _estimates(files, a, b, _FEWEST)
    near = estimate >= threshold
    unsure = np.abs(estimate - threshold) < MARGIN
    # The estimate is of question and context together: where there are both, it is no more than a hint.
    for i in np.flatnonzero(unsure | (near & (files.parted[a] | files.parted[b]))):
        near[i] = alike(text_of(int(a[i])), text_of(int(b[i])), threshold)
    return near


def _estimates(files: NearFiles, a: np.ndarray, b: np.ndarray, fewest: int) -> np.ndarray:
    """Return how alike the pairs (a, b) are, by their signatures: (n,) float64, 0 where hardly at all."""
    agree = np.zeros(len(a))
    for start in range(0, len(a), _BLOCK):
        part = slice(start, start + _BLOCK)
        likely = start + np.flatnonzero(_agreements(files.head[a[part]], files.head[b[part]]) >= fewest)
        for at in range(0, len(likely), _FEW):
            few = likely[at : at + _FEW]
            agree[few] = _agreements(files.low[a[few]], files.low[b[few]]) / KEPT
            _forget(files.low)
    return (agree - 1 / 256) / (1 - 1 / 256)


def _agreements(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Return on how many minima pairs agree: (n,) of (n, minima) uint8 each."""
    return (a == b).sum(axis=1, dtype=np.uint8)


def _forget(mapped: np.memmap) -> None:
    """Let the system drop a mapping's pages: they are in the file, and would count as ours."""
    base = mapped.base
    if sys.platform != "win32" and isinstance(base, mmap.mmap):
        base.madvise(mmap.MADV_DONTNEED)
