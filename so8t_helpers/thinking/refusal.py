"""Whether an answer refuses: the one rule for stage 01, which judges records, and 05, which judges models.

An answer refuses where one of its sentences declines what was asked, in full or in part, or hands it over to
a person instead. Each sentence is scored by a logistic regression over runs of one to three tokens, hashed
(Weinberger et al., 2009); a token is a word in Latin letters, or one character of any other script. The
answer's logit is four parts its sentences' mean, one its highest's and one its first's. What the weights were
trained on, its licences, and how often they are right: refusal.md.
"""

from __future__ import annotations

import re
import unicodedata
from functools import lru_cache
from importlib.resources import as_file, files

import numpy as np
from safetensors.numpy import load_file

from so8t_helpers.thinking.language import LANGUAGES, language_of

REFUSE_LABELS = ("DENY", "REFUSE")  # those whose answer must refuse

BUCKET_BITS = 17
LONGEST_RUN = 3  # tokens
LONGEST_ANSWER = 8_000  # characters that are read

# What others say is not the answer's own refusal; a quotation without its end is left as it is.
_QUOTED = re.compile(r"「[^「」]*」|『[^『』]*』|“[^“”]*”|\"[^\"\n]{0,300}\"")
_BORDER = re.compile(r"(?<=[。!?])|\n|(?<=\.)\s")
# What each sentence begins with says whether it is the answer's first, second, third or a later one.
_BEGINNINGS = "\ue000\ue001\ue002\ue003"
_SPACE, _WORD = 1, 2
_FACTOR, _SHIFT = np.uint64(0x9E3779B97F4A7C15), np.uint64(64 - BUCKET_BITS)
_LONGEST_WORD = 32  # letters that count; numbers of 64 bits, where products wrap around
_POWERS = np.uint64(0x100000001B3) ** np.arange(_LONGEST_WORD, dtype=np.uint64)


def refuses(answers: list[str]) -> np.ndarray:
    """Say of each answer whether it refuses, whatever the others are: (n,) bool."""
    weights, intercepts = _model()
    return logits(answers, weights) + intercepts[[LANGUAGES.index(language_of(a)) for a in answers]] >= 0


def logits(answers: list[str], weights: np.ndarray) -> np.ndarray:
    """Return each answer's score, but for the intercept: (n,) float64; `weights`: (2 ** BUCKET_BITS,)."""
    split = [sentences(answer) for answer in answers]
    if not split:
        return np.zeros(0)
    buckets, owners = runs([sentence for own in split for sentence in own])
    scores = np.bincount(owners, weights.take(buckets)) / np.sqrt(np.bincount(owners))
    firsts = np.cumsum([0, *map(len, split[:-1])])
    means = np.add.reduceat(scores, firsts) / np.diff(firsts, append=len(scores))
    return (4 * means + np.maximum.reduceat(scores, firsts) + scores[firsts]) / 6


def sentences(answer: str) -> list[str]:
    """Return an answer's sentences as they are compared, one or more, each after the sign of its place.

    What the answer quotes is left out, unless it does nothing else.
    """
    text = unicodedata.normalize("NFKC", answer[:LONGEST_ANSWER]).lower().replace("’", "'")
    own = _QUOTED.sub("「」", text)
    parts = [part for part in _BORDER.split(own if own.strip("「」。., \n") else text) if part.strip()]
    last = len(_BEGINNINGS) - 1
    return [_BEGINNINGS[i if i < last else last] + part for i, part in enumerate(parts or [""])]


def runs(marked: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """Return the buckets of all runs of tokens in sentences, and of which sentence each is: (k,) int64."""
    joined = "\n".join(marked)
    points = np.frombuffer(joined.encode("utf-32-le", "surrogatepass"), dtype=np.uint32)
    classes = _classes().take(points, mode="clip")
    word = classes == _WORD
    begins = np.flatnonzero((classes != _SPACE) & ~(word & np.append(False, word[:-1])))
    # A token's hash is a polynomial in its letters: the place of each in its token is its exponent.
    starts = np.repeat(begins, np.diff(begins, append=len(points)))
    powers = _POWERS.take(np.arange(len(points)) - starts, mode="clip")
    tokens = np.add.reduceat(np.where(classes == _SPACE, 0, points).astype(np.uint64) * powers, begins)
    borders = np.cumsum([len(sentence) + 1 for sentence in marked])
    owners = np.searchsorted(borders, begins, side="right")
    hashed, found, of = tokens, [tokens], [owners]
    for size in range(2, min(LONGEST_RUN, len(tokens)) + 1):
        hashed = hashed[:-1] * _FACTOR ^ tokens[size - 1 :]
        inside = owners[: 1 - size] == owners[size - 1 :]
        found.append(hashed[inside])
        of.append(owners[: 1 - size][inside])
    return ((np.concatenate(found) * _FACTOR) >> _SHIFT).astype(np.int64), np.concatenate(of)


@lru_cache(maxsize=1)
def _classes() -> np.ndarray:
    """Return the class of every character up to U+FFFF, which stands for those beyond it."""
    letters = [chr(code) for code in range(0x10000)]
    classes = [
        _SPACE if c.isspace() else _WORD if c == "'" or (c.isalnum() and c < "\u2e80") else 0 for c in letters
    ]
    return np.array(classes, dtype=np.uint8)


@lru_cache(maxsize=1)
def _model() -> tuple[np.ndarray, np.ndarray]:
    """Return the weights, (2 ** BUCKET_BITS,), and the intercept for each language: (2,)."""
    with as_file(files("so8t_helpers.thinking").joinpath("refusal.safetensors")) as path:
        saved = load_file(path)
    return saved["weights"].astype(np.float32), saved["intercepts"]
