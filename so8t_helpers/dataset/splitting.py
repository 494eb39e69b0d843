"""Which kept rows are held out: by a hash of the question, so that a row never changes side by chance."""

from __future__ import annotations

import numpy as np


def held_out(index: np.ndarray, kept: np.ndarray, plain_format: int, share: float) -> np.ndarray:
    """Return which rows are for evaluation: of each label the `share` with the smallest hash.

    Args:
        index: (N,) with fields `question` (hash), `label`, `format`.
        kept: (N,) bool, the rows that are not duplicates.
        plain_format: number of the format without thinking, which is never held out.
        share: of each label's kept rows; at least one row where a label has two or more.

    The same question has the same hash: where one label holds it out, all do.
    """
    chosen = np.zeros(len(index), dtype=bool)
    for label in np.unique(index["label"]):
        of_label = np.flatnonzero(kept & (index["label"] == label))
        candidates = of_label[index["format"][of_label] != plain_format]
        wanted = round(share * len(of_label))
        wanted = max(wanted, 1) if share > 0 and len(of_label) > 1 else wanted
        wanted = min(wanted, len(candidates))
        if wanted:
            hashes = index["question"][candidates]
            cutoff = np.partition(hashes, wanted - 1)[wanted - 1]
            chosen[candidates[hashes <= cutoff]] = True
    return kept & np.isin(index["question"], index["question"][chosen])
