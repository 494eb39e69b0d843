"""A small classifier of unsafe text: character n-grams into scikit-learn's logistic regression.

It is trained from the user's own labelled records, so it knows their language and their limits. Features are
hashed (Weinberger et al., 2009): nothing of the training text is kept in the file.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file

from so8t_helpers.settings import SettingsError

BUCKETS = 2**18
SIZES = (2, 3, 4)
FEWEST = 20  # labelled records of each side; with fewer, precision and recall say nothing
_FACTOR, _SHIFT = np.uint32(0x9E3779B1), np.uint32(32 - 18)


def features(text: str) -> np.ndarray:
    """Return the buckets of a normalised text's 2-, 3- and 4-grams, as often as they occur: (k,) int64."""
    return np.concatenate(list(_buckets(f"^{text}$"))).astype(np.int64)


def _buckets(marked: str) -> Iterator[np.ndarray]:
    """Yield the buckets of a text's 2-grams, 3-grams and 4-grams, as far as it has any: (k,) uint32 each."""
    hashed = points = np.frombuffer(marked.encode("utf-32-le", "surrogatepass"), dtype=np.uint32)
    for size in SIZES:
        if len(points) < size:
            break
        hashed = hashed[:-1] * _FACTOR ^ points[size - 1 :]
        yield (hashed * _FACTOR) >> _SHIFT


class NgramClassifier:
    """A trained classifier: `scores` are the probabilities that texts are unsafe."""

    def __init__(self, path: Path):
        saved = load_file(path)
        self.weights, self.intercept = saved["weights"], float(saved["intercept"][0])
        self.threshold = float(saved["threshold"][0])

    def scores(self, texts: list[str]) -> np.ndarray:
        """Return for each normalised text a number from 0 to 1, whatever the others are: (n,) float64."""
        marked = [f"^{text}$" for text in texts]
        lengths = np.array([len(text) for text in marked])
        ends = np.cumsum(lengths)
        total, count = np.zeros(len(texts), dtype=np.float32), np.zeros(len(texts), dtype=np.int64)
        # All texts in one row: what reaches over a border is left out of the sums.
        for size, buckets in zip(SIZES, _buckets("".join(marked)), strict=False):
            weights = self.weights.take(buckets, mode="clip")
            own = lengths >= size
            edges = np.stack([ends - lengths, ends - size + 1], axis=1)[own]
            if not len(edges):
                break
            sums = np.add.reduceat(np.append(weights, np.float32(0)), edges.ravel())[::2]
            total[own] += sums
            count[own] += lengths[own] - size + 1
        logits = np.clip(total / np.sqrt(count) + self.intercept, -60, 60)
        return 1 / (1 + np.exp(-logits))


def train(
    texts: list[str], unsafe: list[bool], path: Path, seed: int, threshold: float | None
) -> dict[str, Any]:
    """Train on three fifths of normalised texts, measure on the last fifth, save; return the figures.

    Without a `threshold`, the one with the best F1 on the fourth fifth is taken.

    Raises:
        SettingsError: fewer than `FEWEST` records of one side.
    """
    from scipy.sparse import csr_matrix  # noqa: PLC0415  (only who trains a classifier pays for these)
    from sklearn.linear_model import LogisticRegression  # noqa: PLC0415

    labels = np.array(unsafe)
    if min(labels.sum(), (~labels).sum()) < FEWEST:
        raise SettingsError(
            f"dataset.nsfw_training: {labels.sum()} unsafe and {(~labels).sum()} safe records; "
            f"at least {FEWEST} of each are needed"
        )
    columns = [features(text) for text in texts]
    values = np.concatenate([np.full(len(c), 1 / np.sqrt(len(c))) for c in columns])
    starts = np.cumsum([0, *map(len, columns)])
    matrix = csr_matrix((values, np.concatenate(columns), starts), shape=(len(texts), BUCKETS))
    fifth = _fifths(labels, seed)
    choosing, held = fifth == 3, fifth == 4
    model = LogisticRegression(C=30.0, class_weight="balanced", max_iter=400)
    model.fit(matrix[fifth < 3], labels[fifth < 3])
    scores = model.predict_proba(matrix)[:, 1]
    # Chosen where it is measured, a threshold would look better than it is.
    chosen = threshold if threshold is not None else _best_threshold(scores[choosing], labels[choosing])
    save_file(
        {
            "weights": model.coef_[0].astype(np.float32),
            "intercept": model.intercept_.astype(np.float32),
            "threshold": np.array([chosen], dtype=np.float32),
        },
        path,
    )
    said, unsafe_held = scores[held] >= chosen, labels[held]
    right, wrong = int((said & unsafe_held).sum()), int((said & ~unsafe_held).sum())
    there, harmless = int(unsafe_held.sum()), int((~unsafe_held).sum())
    return {
        "precision": right / max(right + wrong, 1),
        "recall": right / max(there, 1),
        "share of the harmless flagged": wrong / max(harmless, 1),
        "threshold": float(chosen),
        "trained on": int((fifth < 3).sum()),
        "threshold chosen on": int(choosing.sum()) if threshold is None else 0,
        "measured on": int(held.sum()),
        "unsafe, flagged": right,
        "unsafe, passed": there - right,
        "harmless, flagged": wrong,
        "harmless, passed": harmless - wrong,
    }


def _fifths(labels: np.ndarray, seed: int) -> np.ndarray:
    """Return for each record which fifth it is in, both sides spread evenly: (n,) int64."""
    fifth = np.zeros(len(labels), dtype=np.int64)
    rng = np.random.default_rng(seed)
    for side in (False, True):
        members = rng.permutation(np.flatnonzero(labels == side))
        fifth[members] = np.arange(len(members)) * 5 // len(members)
    return fifth


def _best_threshold(scores: np.ndarray, labels: np.ndarray) -> float:
    """Return the middle between two neighbouring scores that gives the best F1."""
    candidates = np.unique(scores)
    middles = np.r_[candidates[0] / 2, (candidates[1:] + candidates[:-1]) / 2]
    f1 = [2 * (labels & (scores >= t)).sum() / ((scores >= t).sum() + labels.sum()) for t in middles]
    return float(middles[int(np.argmax(f1))])
