"""Duplicates among questions: exact after normalisation, near by MinHash over character 5-grams.

Japanese has no spaces, hence characters, not words. MinHash and its banding follow Broder (1997) and
Leskovec, Rajaraman & Ullman, "Mining of Massive Datasets", ch. 3. What is here belongs to single texts;
`near.py` compares them.
"""

from __future__ import annotations

import re
import unicodedata

import numpy as np

NGRAM = 5
TABLES, BINS = 4, 64
PERMUTATIONS = TABLES * BINS
KEPT = 128  # minima kept, as their low byte, to estimate a pair's similarity
_NOISE = re.compile(r"[\W_]+")
_rng = np.random.default_rng(20240229)
# Hash functions x -> a x modulo 2^32 (Dietzfelbinger's multiply-shift), with odd a: one for each table.
_MULTIPLIERS = _rng.integers(0, 2**32, TABLES, dtype=np.uint32) | np.uint32(1)
_BIN_SHIFT = np.uint32(32 - 6)
_EMPTY = np.uint32(0xFFFFFFFF)
# For each bin the order in which it looks at the others where it is empty: (BINS, BINS).
_PROBES = _rng.permuted(np.tile(np.arange(BINS), (BINS, 1)), axis=1)
_POWERS = [np.uint64(0x9E3779B97F4A7C15 ** (k + 1) % 2**64) for k in range(NGRAM)]


def normalise_question(question: str, plain: bool = False) -> str:
    """Return a question without what does not matter when two are compared: width, case, signs, spaces.

    Args:
        question: the text.
        plain: it is known to be in NFKC and lower case.
    """
    text = question if plain else unicodedata.normalize("NFKC", question).lower()
    # Most noise is a few signs, and taking those out first leaves nothing for the regex to do.
    letters = text.replace("、", "").replace("。", "").replace("\n", "").replace(" ", "")
    return letters if letters.isalnum() else _NOISE.sub("", letters) or text


def shingles(texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """Hash the character 5-grams of normalised texts.

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
    # Windows that end in padding count only in a text shorter than five characters, which has no others.
    ends = np.cumsum(lengths)
    starts = ends - lengths
    whole = np.ones(count, dtype=bool)
    for back in range(1, NGRAM):
        padded = ends - NGRAM + 1 - back
        whole[padded[padded > starts]] = False
    for back in range(NGRAM - 1):
        beyond = ends - NGRAM + 1 + back
        whole[beyond[beyond < count]] = False
    kept = np.concatenate(([0], np.cumsum(whole)))
    return (_mix(hashed[whole]) >> np.uint64(32)).astype(np.uint32), kept[starts]


def signatures(texts: list[str]) -> np.ndarray:
    """Return the MinHash signatures of normalised texts: (len(texts), 256) uint32.

    One permutation hashing (Li, Owen & Zhang, 2012): a hash's high bits choose a bin, and each bin keeps its
    least hash; so a text costs four hash functions, not 256. A bin that stays empty takes what the first
    other bin has that is not, in an order of its own (Shrivastava's optimal densification, 2017).
    """
    hashes, starts = shingles(texts)
    own = np.repeat(np.arange(len(texts)) * BINS, np.diff(starts, append=len(hashes)))
    signature = np.empty((len(texts), TABLES, BINS), dtype=np.uint32)
    for table in range(TABLES):
        hashed = hashes * _MULTIPLIERS[table]
        least = np.full(len(texts) * BINS, _EMPTY)
        np.minimum.at(least, own + (hashed >> _BIN_SHIFT), hashed)
        signature[:, table] = _filled(least.reshape(-1, BINS))
    return signature.reshape(len(texts), PERMUTATIONS)


def _filled(least: np.ndarray) -> np.ndarray:
    """Fill the empty bins of (texts, BINS) uint32 from those that are not."""
    filled = least.copy()
    text, empty = np.nonzero(least == _EMPTY)
    for attempt in range(BINS):
        if not len(text):
            break
        found = least[text, _PROBES[empty, attempt]]
        filled[text, empty] = found
        still = found == _EMPTY
        text, empty = text[still], empty[still]
    return filled


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


def jaccard(a: str, b: str) -> float:
    """Return the Jaccard similarity of two normalised texts' 5-gram sets."""
    x, y = (set(shingles([text])[0].tolist()) for text in (a, b))
    return len(x & y) / len(x | y)


def _mix(x: np.ndarray) -> np.ndarray:
    """The finaliser of SplitMix64 (Steele, Lea & Flood, 2014)."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
