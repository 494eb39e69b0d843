"""Duplicates among questions: exact after normalisation, near by MinHash over character 5-grams.

Japanese has no spaces, hence characters, not words. MinHash and its banding follow Broder (1997) and
Leskovec, Rajaraman & Ullman, "Mining of Massive Datasets", ch. 3. All arrays lie in files and are worked on
band by band, so memory does not grow with what MinHash keeps.
"""

from __future__ import annotations

import hashlib
import re
import unicodedata

import numpy as np

NGRAM = 5
PERMUTATIONS = 128
_NOISE = re.compile(r"[\W_]+")
_rng = np.random.default_rng(20240229)
_MULTIPLIERS = _rng.integers(0, 2**64, PERMUTATIONS, dtype=np.uint64) | np.uint64(1)
_ADDENDS = _rng.integers(0, 2**64, PERMUTATIONS, dtype=np.uint64)
_POWERS = np.array([0x9E3779B97F4A7C15**k % 2**64 for k in range(NGRAM)], dtype=np.uint64)


def normalise_question(question: str) -> str:
    """Return a question without what does not matter when two are compared: width, case, signs, spaces."""
    plain = unicodedata.normalize("NFKC", question).lower()
    return _NOISE.sub("", plain) or plain.strip()


def shingles(text: str) -> np.ndarray:
    """Return the hashes of the character 5-grams of a normalised text: (n,) uint64, n >= 1."""
    points = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype=np.uint32).astype(np.uint64)
    if len(points) < NGRAM:
        points = np.pad(points, (0, NGRAM - len(points)))
    windows = np.lib.stride_tricks.sliding_window_view(points, NGRAM)  # (n, 5)
    hashed = (windows * _POWERS).sum(axis=1, dtype=np.uint64)
    return _mix(hashed)


def signature(text: str) -> np.ndarray:
    """Return the MinHash signature of a normalised text: (128,) uint32."""
    hashed = shingles(text)
    permuted = (hashed[:, None] * _MULTIPLIERS + _ADDENDS) >> np.uint64(32)  # (n, 128)
    return permuted.min(axis=0).astype(np.uint32)


def signatures(texts: list[str]) -> np.ndarray:
    """Return the signatures of several normalised texts: (len(texts), 128) uint32."""
    return np.stack([signature(text) for text in texts])


def exact_hash(text: str) -> int:
    """Return 64 bits of a normalised text; two of a million texts collide with a chance of 3e-8."""
    return int.from_bytes(
        hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little"
    )


def banding(threshold: float) -> tuple[int, int]:
    """Return (bands, rows): the most rows with which 98% of the pairs at `threshold` share a band."""
    for rows in range(16, 1, -1):
        bands = PERMUTATIONS // rows
        if 1.0 - (1.0 - threshold**rows) ** bands >= 0.98:
            return bands, rows
    return PERMUTATIONS, 1


def jaccard(a: str, b: str) -> float:
    """Return the exact Jaccard similarity of two normalised texts' 5-gram sets."""
    x, y = set(shingles(a).tolist()), set(shingles(b).tolist())
    return len(x & y) / len(x | y)


def exact_duplicates(hashes: np.ndarray) -> np.ndarray:
    """Return for each record the first one with the same hash (its own index where it is first): (N,)."""
    _, first, inverse = np.unique(hashes, return_index=True, return_inverse=True)
    return first[inverse]


def near_duplicates(signatures: np.ndarray, alive: np.ndarray, threshold: float) -> np.ndarray:
    """Return for each record an earlier one that it nearly equals, or -1.

    Args:
        signatures: (N, 128) uint32, in memory or mapped.
        alive: (N,) bool; only these are compared.
        threshold: estimated Jaccard similarity from which two are near-duplicates.
    """
    bands, rows = banding(threshold)
    found = np.full(len(signatures), -1, dtype=np.int64)
    for band in range(bands):
        members = np.flatnonzero(alive & (found < 0))
        keys = _band_keys(signatures, members, band, rows)
        order = np.argsort(keys, kind="stable")
        keys, members = keys[order], members[order]
        starts = np.flatnonzero(np.r_[True, keys[1:] != keys[:-1]])
        sizes = np.diff(np.r_[starts, len(keys)])
        for start, size in zip(starts[sizes > 1], sizes[sizes > 1], strict=True):
            _resolve(members[start : start + size], signatures, found, threshold)
    return found


def _resolve(group: np.ndarray, signatures: np.ndarray, found: np.ndarray, threshold: float) -> None:
    """Within records that share a band, mark those that an earlier one nearly equals."""
    own = np.asarray(signatures[group])
    left = np.arange(len(group))
    while len(left) > 1:
        first, rest = left[0], left[1:]
        near = (own[rest] == own[first]).mean(axis=1) >= threshold
        found[group[rest[near]]] = group[first]
        left = rest[~near]


def _band_keys(signatures: np.ndarray, members: np.ndarray, band: int, rows: int) -> np.ndarray:
    keys = np.full(len(members), band, dtype=np.uint64)
    for row in range(rows):
        keys = _mix(keys ^ np.asarray(signatures[members, band * rows + row]).astype(np.uint64))
    return keys


def _mix(x: np.ndarray) -> np.ndarray:
    """The finaliser of SplitMix64 (Steele, Lea & Flood, 2014)."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
