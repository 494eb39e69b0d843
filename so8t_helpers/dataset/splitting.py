"""The split: what belongs together stays on one side, and each label has its share held out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from so8t_helpers.dataset.duplicates import ALIKE, ALIKE_ESTIMATE
from so8t_helpers.dataset.sample import FORMATS
from so8t_helpers.thinking.format import LABELS

# Links are followed from the strongest on: where a step would make a cluster too large to be held out with
# others, the rows stay apart as the step before left them.
STEPS = (0.9, 0.8, 0.7, 0.6, ALIKE, ALIKE_ESTIMATE)
LARGEST = 4  # a cluster made of links has at most one in so many of the rows to hold out
SHOWN = 20  # questions with two labels that the card names
_BLOCK = 2**16


@dataclass
class Links:
    """Pairs of rows that are alike, (n, 2) int64, how alike, (n,), and comparisons left out by search."""

    pairs: np.ndarray = field(default_factory=lambda: np.zeros((0, 2), dtype=np.int64))
    alike: np.ndarray = field(default_factory=lambda: np.zeros(0))
    left_out: dict[str, int] | None = None  # None: not looked for


@dataclass
class Clusters:
    """Which rows stay on one side of the split.

    `of` is the first row of each row's cluster, (N,) int64; `cut` says which rows have a link
    that could not be followed, (N,) bool.
    """

    of: np.ndarray
    cut: np.ndarray

    def described(self, index: np.ndarray, held: np.ndarray, found: Links) -> dict[str, Any]:
        """Return what the card says of the split."""
        sizes = np.bincount(self.of) if len(self.of) else np.zeros(0, dtype=np.int64)
        a, b = found.pairs[found.alike >= ALIKE].T
        across = held[a] != held[b]
        doubled = np.unique(np.where(held[a], a, b)[across])
        return {
            "groups": len(np.unique(index["group"][index["group"] != 0])),
            "lines in groups": int((index["group"] != 0).sum()),
            "lines in clusters": int(sizes[sizes > 1].sum()),
            "largest cluster": int(sizes.max(initial=0)),
            "held out": int(held.sum()),
            "held out with one alike in train": None if found.left_out is None else len(doubled),
            "alike from": ALIKE,
            "comparisons left out": found.left_out,
        }


def clusters(index: np.ndarray, kept: np.ndarray, found: Links, share: float) -> Clusters:
    """Put together what has the same group or question, and what is alike as far as it can be held out."""
    count = len(index)
    rows = np.flatnonzero(kept)
    grouped = rows[index["group"][rows] != 0]
    same = [
        np.stack([own, own[_first_with(index[key][own])]], axis=1)
        for key, own in (("question", rows), ("group", grouped))
    ]
    of = _connected(np.arange(count), np.concatenate(same))
    largest = max(2, round(share * len(rows) / LARGEST))
    for step in STEPS if len(found.pairs) else ():
        joined = _connected(of, found.pairs[found.alike >= step])
        fits = (np.bincount(joined, kept, count) <= largest)[joined]
        of = np.where(fits, joined, of)
    cut = np.zeros(count, dtype=bool)
    apart = of[found.pairs[:, 0]] != of[found.pairs[:, 1]]
    cut[found.pairs[apart].ravel()] = True
    return Clusters(of, cut)


def held_out(index: np.ndarray, kept: np.ndarray, together: Clusters, share: float) -> np.ndarray:
    """Return which of the `kept` rows are for evaluation: (N,) bool.

    They are the `share` of each label with the smallest hashes, and at least one where a label has two or
    more, by whole clusters; none of those that have a row without thinking. A cluster has its first row's
    hash, so that rows added later move few. Clusters with a link that was cut come last.
    """
    chosen = np.zeros(len(index), dtype=bool)
    rows = np.flatnonzero(kept)
    _, first, own = np.unique(together.of[rows], return_index=True, return_inverse=True)
    labels = index["label"][rows]
    per_label = np.bincount(labels, minlength=len(LABELS))
    left = [min(max(round(share * n), 1 if share > 0 and n > 1 else 0), n) for n in per_label.tolist()]
    counts = np.empty((len(first), len(LABELS)), dtype=np.int32)
    for label in range(len(LABELS)):
        counts[:, label] = np.bincount(own[labels == label], minlength=len(first))
    group = index["group"][rows[first]]
    hashes = np.where(group != 0, group, index["question"][rows[first]])
    plain = np.bincount(own, index["format"][rows] == FORMATS.index("plain"), len(first)) > 0
    cut = np.bincount(own, together.cut[rows], len(first)) > 0
    order = np.lexsort((hashes, cut))
    order = order[~plain[order]]
    taken = np.zeros(len(first), dtype=bool)
    for block in np.split(order, range(_BLOCK, len(order), _BLOCK)):
        if not any(left):
            break
        for cluster, has in zip(block.tolist(), counts[block].tolist(), strict=True):
            if all(n <= room for n, room in zip(has, left, strict=True)):
                taken[cluster] = True
                left = [room - n for n, room in zip(has, left, strict=True)]
    for label in range(len(LABELS)):
        # Where nothing is small enough, the smallest: a label is better held out by too much than not at all.
        mine = order[(counts[order, label] > 0) & (counts[order, label] < per_label[label])]
        if left[label] and len(mine) and not counts[taken, label].any():
            taken[mine[np.argmin(counts[mine].sum(axis=1))]] = True
    chosen[rows] = taken[own]
    return chosen


def two_labels(index: np.ndarray, kept: np.ndarray, where: Callable[[int], str]) -> dict[str, Any]:
    """Return which questions (with their context) are kept with more than one label, and where they are."""
    rows = np.flatnonzero(kept)
    rows = rows[np.argsort(index["question"][rows], kind="stable")]
    first, label = _first_with(index["question"][rows]), index["label"][rows]
    several = np.isin(first, first[label != label[first]])
    found = np.split(rows[several], np.flatnonzero(np.diff(first[several])) + 1) if several.any() else []
    found.sort(key=lambda same: int(same[0]))
    return {
        "questions": len(found),
        "lines": sum(map(len, found)),
        "shown": [
            [{"where": where(int(row)), "label": LABELS[index["label"][row]]} for row in same[:SHOWN]]
            for same in found[:SHOWN]
        ],
    }


def _first_with(keys: np.ndarray) -> np.ndarray:
    """Return for each key the place of the first that equals it: (n,) int64."""
    _, first, inverse = np.unique(keys, return_index=True, return_inverse=True)
    return first[inverse]


def _connected(of: np.ndarray, pairs: np.ndarray) -> np.ndarray:
    """Return what clusters `of` becomes when the pairs' rows come together: each row's first one, (N,)."""
    from scipy.sparse import coo_array  # noqa: PLC0415  (a tenth of a second that an import need not cost)
    from scipy.sparse.csgraph import connected_components  # noqa: PLC0415

    a, b = of[pairs].T
    graph = coo_array((np.ones(len(a), dtype=bool), (a, b)), (len(of), len(of)))
    joined = connected_components(graph, directed=False)[1][of]
    first = np.zeros(len(of), dtype=np.int64)
    first[joined[::-1]] = np.arange(len(of))[::-1]  # of several that write one place the last one counts
    return first[joined]
