"""Differences between two arms that were trained on the same seeds and judged by the same documents.

A seed is one training of each arm, with the same data in the same order; so differences are paired twice,
by seed and by document. Both are samples of what could have been: intervals count the spread of both.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from functools import cache
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray
from scipy import optimize, stats

Floats: TypeAlias = NDArray[np.float64]
LEVEL, POWER = 0.95, 0.8
SIGNIFICANT = 0.05
RESAMPLES = 2000
_FEW = 8  # seeds whose flips of sign are simulated
_PARTS = 2000  # of the distribution of a standard error


@dataclass(frozen=True)
class Difference:
    """An arm less the control.

    Attributes:
        value, low, high: the mean over seeds, and its 95% interval.
        error, freedom: its standard error and the degrees of freedom of the interval's t.
        p: two-sided, by the same t.
        spread: standard deviation of the seeds' own differences.
        exact_p: two-sided, by the flips of sign of the seeds' differences, which assumes no distribution.
    """

    value: float
    low: float
    high: float
    error: float
    freedom: float
    p: float
    spread: float
    exact_p: float

    @property
    def inside(self) -> bool:
        """Whether the interval holds no difference at all."""
        return self.low <= 0.0 <= self.high


def paired_difference(arm: Floats, control: Floats, counts: Floats, seed: int = 0) -> Difference:
    """Compare two arms over the same seeds and documents.

    Seeds and documents are drawn anew with replacement, independently, since every seed is judged by all
    documents (the bootstrap for crossed factors: Owen 2007, The pigeonhole bootstrap, Annals of Applied
    Statistics 1). The bootstrap of few seeds comes out too narrow (Hesterberg 2015, The American
    Statistician 69): their share of the variance is multiplied by S/(S - 1), and the interval is that of
    Student's t, with degrees of freedom after Satterthwaite (1946) from S - 1 and D - 1.

    Args:
        arm, control: (S, D), sums by seed and document.
        counts: (D,), what sums over documents are divided by.

    Raises:
        ValueError: fewer than two seeds, or shapes that do not fit.
    """
    if arm.shape != control.shape or arm.ndim != 2 or len(arm) < 2 or counts.shape != arm.shape[1:]:
        raise ValueError(
            f"sums of {arm.shape} and {control.shape}, counts of {counts.shape}; needs (S > 1, D)"
        )
    by_document = arm - control  # (S, D)
    by_seed = by_document.sum(1) / counts.sum()  # (S,)
    value, seeds = float(by_seed.mean()), len(by_seed)
    of_seeds = float(by_seed.var(ddof=1)) / seeds
    total = _crossed_variance(by_document, counts, seed) + of_seeds / seeds
    of_documents = max(total - of_seeds, 0.0)
    documents = max(int((counts > 0).sum()), 2)
    if total == 0.0:
        return Difference(value, value, value, 0.0, seeds - 1, float(value == 0), 0.0, exact_p(by_seed))
    freedom = total**2 / (of_seeds**2 / (seeds - 1) + of_documents**2 / (documents - 1))
    error = math.sqrt(total)
    half = float(stats.t.ppf((1 + LEVEL) / 2, freedom)) * error
    p = 2 * float(stats.t.sf(abs(value) / error, freedom))
    spread = float(by_seed.std(ddof=1))
    return Difference(value, value - half, value + half, error, freedom, p, spread, exact_p(by_seed))


def _crossed_variance(by_document: Floats, counts: Floats, seed: int) -> float:
    """Variance of the mean difference where seeds and documents are both drawn anew."""
    generator = np.random.default_rng(seed)
    seeds, documents = by_document.shape
    drawn = generator.multinomial(documents, np.full(documents, 1 / documents), size=RESAMPLES)  # (B, D)
    weights = generator.multinomial(seeds, np.full(seeds, 1 / seeds), size=RESAMPLES) / seeds  # (B, S)
    below = drawn @ counts  # (B,)
    above = ((drawn @ by_document.T) * weights).sum(1)
    usable = below > 0  # by chance none of the documents that count may have been drawn
    return float((above[usable] / below[usable]).var())


def exact_p(differences: Floats) -> float:
    """Return the two-sided p of no difference, by all flips of sign (Fisher 1935); at least 2 / 2^S."""
    flips = np.array(list(itertools.product((1.0, -1.0), repeat=len(differences))))  # (2^S, S)
    means = np.abs(flips @ differences)
    # Rounding must not part a flip from its mirror image.
    return float((means >= means[0] * (1 - 1e-12)).mean())


@cache
def _flips_detectable(seeds: int) -> float:
    """The difference that flips of sign find in 8 of 10 studies, in standard deviations of a seed's.

    By 2,000 simulated studies; with many seeds the test is as strong as Student's.
    """
    if smallest_p(seeds) >= SIGNIFICANT:
        return math.inf
    if seeds > _FEW:
        return detectable(1 / math.sqrt(seeds), seeds - 1)
    drawn = np.random.default_rng(0).standard_normal((2000, seeds))

    def lacking(shift: float) -> float:
        return float(np.mean([exact_p(one + shift) < SIGNIFICANT for one in drawn])) - POWER

    return float(optimize.brentq(lacking, 0.0, 20.0, xtol=1e-3))


def detectable_by_flips(found: Difference, seeds: int) -> float:
    """Return the true difference that flips of sign would have found in 8 of 10 repetitions, or infinity."""
    return _flips_detectable(seeds) * found.spread if smallest_p(seeds) < SIGNIFICANT else math.inf


def smallest_p(seeds: int) -> float:
    """Return the smallest p that flips of sign can give with so many seeds."""
    return 2.0 ** (1 - seeds)


def holm(p_values: list[float]) -> list[float]:
    """Return p values corrected for their number (Holm 1979, Scandinavian Journal of Statistics 6)."""
    order = sorted(range(len(p_values)), key=lambda i: p_values[i])
    found, highest = [0.0] * len(p_values), 0.0
    for place, i in enumerate(order):
        highest = max(highest, min(1.0, (len(p_values) - place) * p_values[i]))
        found[i] = highest
    return found


def detectable(error: float, freedom: float, comparisons: int = 1) -> float:
    """Return the true difference that a study would have found in 8 of 10 repetitions.

    At the level 5% / comparisons, which is what Holm's correction asks of the first. The power of Student's t
    is the normal one, averaged over what the standard error may come out as (SciPy's noncentral t gives no
    number far out with few degrees of freedom).
    """
    if error == 0.0:
        return 0.0
    limit = float(stats.t.isf((1 - LEVEL) / 2 / comparisons, freedom))
    parts = (np.arange(_PARTS) + 0.5) / _PARTS
    limits = limit * np.sqrt(stats.chi2.ppf(parts, freedom) / freedom)

    def lacking(shift: float) -> float:
        return float((stats.norm.sf(limits - shift) + stats.norm.cdf(-limits - shift)).mean()) - POWER

    return float(optimize.brentq(lacking, 0.0, 3 * limit + 20.0)) * error
