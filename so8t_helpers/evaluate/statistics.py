"""Figures over many answers, each with its uncertainty: bootstrap intervals, macro F1, paired differences."""

from __future__ import annotations

from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray
from scipy.stats import beta, binomtest

from so8t_helpers.thinking.format import LABELS

Floats: TypeAlias = NDArray[np.float64]
Ints: TypeAlias = NDArray[np.int64]


def resamples(n: int, samples: int, seed: int) -> Ints:
    """Indices of `samples` bootstrap samples of n prompts, (samples, n); one set for all models, paired."""
    return np.random.default_rng(seed).integers(0, n, size=(samples, n))


def interval(values: Floats, draws: Ints) -> list[float] | None:
    """The 95% percentile interval of the mean (Efron 1979); NaN values are left out of each sample's mean."""
    if not np.isfinite(values).any():
        return None
    chosen = values[draws]
    counted = np.isfinite(chosen)
    count, total = counted.sum(axis=1), np.where(counted, chosen, 0.0).sum(axis=1)
    return percentiles(total[count > 0] / count[count > 0])


def percentiles(estimates: Floats) -> list[float]:
    """The 2.5% and 97.5% percentiles of bootstrap estimates."""
    low, high = np.nanpercentile(estimates, [2.5, 97.5])
    return [float(low), float(high)]


def median_interval(values: Floats, draws: Ints) -> list[float] | None:
    """The 95% bootstrap interval of the median; NaN values are left out."""
    finite = np.isfinite(values)
    if not finite.any():
        return None
    return percentiles(np.array([np.nanmedian(values[d]) for d in draws if finite[d].any()]))


def rate_interval(rate: float, tokens: Floats, seconds: Floats, draws: Ints) -> list[float]:
    """The 95% bootstrap interval of a throughput over prompts that ran several at once.

    The rate is scaled by each sample's tokens over its seconds, the ratio estimator: resampling says how much
    the choice of prompts matters, not how much the machine's load does.
    """
    per_second = tokens.sum() / seconds.sum()
    return percentiles(rate * tokens[draws].sum(axis=1) / seconds[draws].sum(axis=1) / per_second)


def exact_interval(count: int, n: int) -> list[float]:
    """The exact 95% interval of a share (Clopper and Pearson 1934): bootstraps are blind to no event."""
    low = float(beta.ppf(0.025, count, n - count + 1)) if count else 0.0
    high = float(beta.ppf(0.975, count + 1, n - count)) if count < n else 1.0
    return [low, high]


def confusion(truth: list[str], stated: list[str | None]) -> Ints:
    """Counts, a row for each true label, a column for each stated one and a last for none, (4, 5)."""
    table = np.zeros((len(LABELS), len(LABELS) + 1), dtype=np.int64)
    for label, decision in zip(truth, stated, strict=True):
        table[LABELS.index(label), LABELS.index(decision) if decision in LABELS else -1] += 1
    return table


def macro_f1(table: Ints) -> float:
    """Mean F1 over the labels that occur as truth; an answer that states none is wrong for its label."""
    square = table[:, : len(LABELS)]
    hits = np.diag(square).astype(float)
    truth, stated = table.sum(axis=1), square.sum(axis=0)
    present = truth > 0
    return float(np.mean(2 * hits[present] / (truth + stated)[present])) if present.any() else float("nan")


def macro_f1_interval(truth: list[str], stated: list[str | None], draws: Ints) -> list[float]:
    """The 95% bootstrap interval of `macro_f1`."""
    rows = np.array([LABELS.index(label) for label in truth])
    columns = np.array([LABELS.index(d) if d in LABELS else len(LABELS) for d in stated])
    cells = rows * (len(LABELS) + 1) + columns
    size = len(LABELS) * (len(LABELS) + 1)
    tables = [np.bincount(cells[draw], minlength=size).reshape(len(LABELS), -1) for draw in draws]
    return percentiles(np.array([macro_f1(table) for table in tables]))


def paired(before: Floats, after: Floats, draws: Ints) -> dict[str, Any]:
    """Compare two models prompt by prompt: 0 or 1 for each, NaN where it does not count.

    Returns:
        `difference` of the means with its bootstrap interval `ci`, prompts `gained` and `lost`, and `mcnemar`
        of those two counts.
    """
    both = np.isfinite(before) & np.isfinite(after)
    change = np.where(both, after - before, np.nan)
    gained, lost = int((change > 0).sum()), int((change < 0).sum())
    return {
        "difference": float(np.mean(change[both])) if both.any() else None,
        "ci": interval(change, draws),
        "gained": gained,
        "lost": lost,
        "p": mcnemar(gained, lost),
    }


def mcnemar(gained: int, lost: int) -> float:
    """Two-sided exact p-value of McNemar's test: gains and losses would be even under no difference."""
    return float(binomtest(gained, gained + lost).pvalue) if gained + lost else 1.0


def mean(values: Floats) -> float | None:
    """Mean of the finite values, None where there are none."""
    finite = values[np.isfinite(values)]
    return float(finite.mean()) if len(finite) else None
