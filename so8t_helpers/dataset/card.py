"""The dataset card: what came in, what was kept, what was not and why; its counts add up."""

from __future__ import annotations

from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import numpy as np

from so8t_helpers.dataset.chunks import ChunkResult
from so8t_helpers.dataset.inputs.files import InputFile
from so8t_helpers.dataset.personal_data.limits import not_covered
from so8t_helpers.dataset.policy.harm import FINDS, MEASURED, PURPOSE
from so8t_helpers.dataset.quarantine import REASONS
from so8t_helpers.dataset.sample import FORMATS
from so8t_helpers.run.files import HashCache
from so8t_helpers.settings import DatasetSettings
from so8t_helpers.thinking.format import LABELS
from so8t_helpers.thinking.language import LANGUAGES

SPLITS = ("train", "eval")
OUTPUTS = (*SPLITS, "quarantine")
LENGTH_BINS = 60
# More of the harmless records than this flagged as unsafe is worth a warning, where there are enough to tell.
MOST_HARMLESS_FLAGGED, FEWEST_JUDGED = 0.05, 20
LEAST_DISTINCT = 0.25  # share of distinct thinkings below which they are a template
# What is counted of each split -> the field of the chunks' index.
_COUNTED = {
    "labels": "label",
    "formats": "format",
    "languages": "language",
    "domains": "domain",
    "licences": "licence",
}


class Tally:
    """Counts of rows by split, filled chunk by chunk."""

    def __init__(self, limit: int):
        self.reasons: Counter[str] = Counter()
        self.other: defaultdict[str, Counter[str]] = defaultdict(Counter)
        self.flags: Counter[tuple[str, str]] = Counter()  # see `Sampler.flags`
        self.lines = 0
        self.split: dict[str, Any] = {}  # see `splitting.Clusters.described`
        self.two_labels: dict[str, Any] = {}
        self.thinkings = np.zeros(0, dtype=np.int64)  # how many samples have each distinct one, most first
        self.by_split: dict[str, dict[str, Counter[str]]] = {
            split: {group: Counter() for group in _COUNTED} for split in SPLITS
        }
        self.edges = np.linspace(0, limit, LENGTH_BINS + 1)
        self.lengths = np.zeros((len(LABELS), LENGTH_BINS), dtype=np.int64)

    def add_chunk(self, result: ChunkResult) -> None:
        """Add what the first pass counted."""
        self.lines += result.lines
        self.flags += result.flags
        for (group, name), number in result.counts.items():
            (self.reasons if group == "reason" else self.other[group])[name] += number

    def add_rows(self, split: str, index: np.ndarray, result: ChunkResult) -> None:
        """Add a chunk's rows that went to one split."""
        own = {"domains": list(result.domains), "licences": list(result.licences)}
        names = {"labels": LABELS, "formats": FORMATS, "languages": LANGUAGES} | own
        for group, counts in self.by_split[split].items():
            values, numbers = np.unique(index[_COUNTED[group]], return_counts=True)
            for value, number in zip(values.tolist(), numbers.tolist(), strict=True):
                counts[names[group][value]] += number
        measured = index[index["tokens"] > 0]
        for label in range(len(LABELS)):
            tokens = measured["tokens"][measured["label"] == label]
            self.lengths[label] += np.histogram(tokens, self.edges)[0]

    def total(self, split: str) -> int:
        """Return how many rows a split has."""
        return self.by_split[split]["labels"].total()


def describe(
    tally: Tally,
    files: list[InputFile],
    directory: Path,
    hashes: HashCache,
    settings: DatasetSettings,
    classifier: dict[str, Any] | None,
) -> dict[str, Any]:
    """Return the card; `directory` holds the outputs, `classifier` the trained classifier's figures.

    Raises:
        AssertionError: where a line was lost or doubled; that is a bug of ours.
    """
    train, held = tally.total("train"), tally.total("eval")
    quarantined = tally.reasons.total()
    assert train + held + quarantined == tally.lines, (train, held, quarantined, tally.lines)
    return {
        "purpose": PURPOSE,
        "lines": {"read": tally.lines, "train": train, "eval": held, "quarantine": quarantined},
        "quarantine": {
            reason: {"lines": number, "meaning": REASONS[reason]}
            for reason, number in tally.reasons.most_common()
        },
        **{
            split: {k: dict(c.most_common(100)) for k, c in groups.items()}
            for split, groups in tally.by_split.items()
        },
        "split": tally.split | {"warning": _not_held_out(tally, settings.eval_share)},
        "two labels": tally.two_labels,
        "thinkings": _thinkings(tally),
        "refusals": _refusals(tally),
        "counted": {group: dict(counts.most_common()) for group, counts in tally.other.items()},
        "lengths": {
            "unit": "tokens of the whole sample",
            "measured": int(tally.lengths.sum()),
            "edges": tally.edges.tolist(),
            "counts": {label: tally.lengths[i].tolist() for i, label in enumerate(LABELS)},
        },
        "unsafe": _unsafe(tally.flags, classifier),
        "classifier": classifier,
        "not_covered": not_covered(settings.personal_names),
        "inputs": [
            {
                "name": file.name,
                "sha256": hashes.sha256(file.path),
                "bytes": file.path.stat().st_size,
                "format": file.format,
                "compression": file.compression,
                "encoding": "utf-8-sig" if file.bom else file.encoding,
                "entry": file.entry.model_dump(exclude_defaults=True),
            }
            for file in files
        ],
        "outputs": {f"{name}.jsonl": hashes.sha256(directory / f"{name}.jsonl") for name in OUTPUTS},
        "settings": settings.model_dump(mode="json"),
    }


def _unsafe(flags: Counter[tuple[str, str]], classifier: dict[str, Any] | None) -> dict[str, Any]:
    """Return what was flagged as unsafe by label, what the word list is worth, and what looks wrong."""
    judged = {label: sum(n for (own, _), n in flags.items() if own == label) for label in LABELS}
    table = {
        name: {label: flags[label, name] for label in LABELS} for name in sorted({n for _, n in flags if n})
    }
    shares = {
        f"records labelled ALLOW flagged as `{name}`": row["ALLOW"] / judged["ALLOW"]
        for name, row in table.items()
        if judged["ALLOW"] >= FEWEST_JUDGED
    }
    if classifier is not None:
        shares["harmless records that the classifier was measured on"] = classifier[
            "share of the harmless flagged"
        ]
    return {
        "finds": FINDS,
        "measured": MEASURED,
        "judged": judged,
        "flagged": table,
        "warnings": [
            f"{share:.0%} of the {what}: harmless text is taken for unsafe. Raise `dataset.nsfw_threshold`, "
            "add harmless records like these to `dataset.nsfw_training`, or take words off your list."
            for what, share in shares.items()
            if share > MOST_HARMLESS_FLAGGED
        ],
    }


def _not_held_out(tally: Tally, share: float) -> str | None:
    """Warn of labels without a held-out row, where a share of them was to be."""
    train, held = (tally.by_split[split]["labels"] for split in SPLITS)
    missing = [label for label in LABELS if train[label] and not held[label]]
    if not (share and missing):
        return None
    which = f"no row of {', '.join(missing)} is" if held.total() else "nothing is"
    return (
        f"{which} held out, so nothing is measured on it: a label whose rows are all in one group, alike, or "
        "one alone cannot be parted; give the records finer groups, or add others"
    )


def _thinkings(tally: Tally) -> dict[str, Any]:
    """Say how many of the samples' thinkings differ, and warn where one is much like the other."""
    samples, distinct = int(tally.thinkings.sum()), len(tally.thinkings)
    share = distinct / max(samples, 1)
    few = samples and share < LEAST_DISTINCT
    return {
        "samples": samples,
        "distinct": distinct,
        "share": share,
        "share of the four commonest": int(tally.thinkings[:4].sum()) / max(samples, 1),
        "warning": f"only {share:.1%} of the thinkings are distinct, so a model learns a template; "
        "give the records reasoning of their own, or set dataset.teacher"
        if few
        else None,
    }


def _refusals(tally: Tally) -> dict[str, Any]:
    """Say of all answers to DENY and REFUSE, flagged as unsafe or not, how many refuse."""
    judged = tally.other["answers to DENY and REFUSE"]
    comply = judged["comply"]
    return {
        "judged": judged.total(),
        "comply": comply,
        "judge": "so8t_helpers/thinking/refusal.md says how often it is right",
        "warning": f"{comply:,} of {judged.total():,} answers to DENY and REFUSE seem to comply: "
        "they would teach to say one thing and do another"
        if comply
        else None,
    }
