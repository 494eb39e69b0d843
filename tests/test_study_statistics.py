"""A study's statistics: against independent formulas, and on simulated losses of which the truth is known."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from scipy import stats

from so8t_helpers.study import statistics
from so8t_helpers.study.statistics import Difference, paired_difference

SEEDS, DOCUMENTS = 6, 60


@pytest.fixture(autouse=True)
def _fewer_resamples(monkeypatch: pytest.MonkeyPatch):
    """300 resamples know a standard error to within 4%, little beside what a few seeds know of it."""
    monkeypatch.setattr(statistics, "RESAMPLES", 300)


def simulated(
    generator: np.random.Generator, effect: float, spread: tuple[float, float] = (1.0, 1.0)
) -> Difference:
    """A comparison whose true difference is `effect` nats a token.

    `spread` multiplies how seeds, and how documents, differ in what the arm does to them.
    """
    counts = generator.integers(5, 40, DOCUMENTS).astype(float)
    control = 2.0 + 0.5 * generator.standard_normal(DOCUMENTS) + 0.02 * generator.standard_normal((SEEDS, 1))
    by_seed = spread[0] * 0.01 * generator.standard_normal((SEEDS, 1))
    by_document = spread[1] * 0.05 * generator.standard_normal(DOCUMENTS)
    noise = 0.02 * generator.standard_normal((SEEDS, DOCUMENTS))
    arm = control + effect + by_seed + by_document + noise
    return paired_difference(arm * counts, control * counts, counts, int(generator.integers(2**31)))


@pytest.mark.parametrize("spread", [(1.0, 1.0), (1.0, 0.0), (0.0, 1.0)])
def test_intervals_hold_the_truth_in_about_95_of_100_studies(spread: tuple[float, float]):
    """300 studies: the share has a standard error of 1.3 points, and 91% is three of them below.

    Above there is no such bound: where seeds hardly differ the crossed bootstrap counts noise more than once.
    """
    generator = np.random.default_rng(11)
    found = [simulated(generator, 0.03, spread=spread) for _ in range(300)]
    assert np.mean([d.low <= 0.03 <= d.high for d in found]) >= 0.91


def test_equal_arms_are_told_apart_in_at_most_8_of_100_studies():
    """Each study has three arms and two endpoints, all equal; p is corrected for the six comparisons."""
    generator, wrong = np.random.default_rng(3), 0
    for _ in range(100):
        p_values = statistics.holm([simulated(generator, 0.0).p for _ in range(6)])
        wrong += min(p_values) < 0.05
    assert wrong <= 8


def test_a_planted_effect_is_found_as_often_as_the_detectable_one_says():
    """The effect that 80 of 100 studies should find, planted 200 times: 3 standard errors are 8.5 points."""
    generator = np.random.default_rng(5)
    known = [simulated(generator, 0.0) for _ in range(50)]
    effect = np.median([statistics.detectable(d.error, d.freedom) for d in known])
    found = np.mean([simulated(generator, effect).p < 0.05 for _ in range(200)])
    assert 0.70 <= found <= 0.90


def test_the_spread_of_seeds_alone_gives_students_t():
    """Documents that all say the same leave nothing but the seeds: then the paired t test must come out."""
    generator = np.random.default_rng(7)
    differences = 0.1 + 0.05 * generator.standard_normal(8)
    counts = np.full(40, 10.0)
    control = np.full((8, 40), 20.0)
    found = paired_difference(control + differences[:, None] * 10.0, control, counts)
    wanted = stats.ttest_1samp(differences, 0.0)
    interval = wanted.confidence_interval(0.95)
    half = (interval.high - interval.low) / 2
    assert found.value == pytest.approx(differences.mean())
    # 300 resamples give a standard error to within 4%; three of those.
    assert found.error == pytest.approx(stats.sem(differences), rel=0.12)
    assert found.high - found.value == found.value - found.low == pytest.approx(half, rel=0.15)


def test_documents_alone_give_the_ratio_estimators_error():
    """Seeds that all say the same leave nothing but the documents: Cochran's error of a ratio."""
    generator = np.random.default_rng(8)
    counts = generator.integers(5, 40, 500).astype(float)
    by_document = counts * (0.1 + 0.5 * generator.standard_normal(500))
    found = paired_difference(np.stack([by_document] * 4), np.zeros((4, 500)), counts)
    residual = by_document - by_document.sum() / counts.sum() * counts
    error = np.sqrt((residual**2).sum() * 500 / 499) / counts.sum()
    assert found.value == pytest.approx(by_document.sum() / counts.sum())
    assert found.error == pytest.approx(error, rel=0.12)  # as above


def test_flips_of_sign_are_counted_exactly():
    differences = np.array([0.3, 0.1, 0.4, -0.05, 0.2])
    means = [abs(np.dot(signs, differences)) for signs in itertools.product((1, -1), repeat=5)]
    assert statistics.exact_p(differences) == sum(m >= abs(differences.sum()) - 1e-12 for m in means) / 32
    for seeds in (3, 5, 6):
        assert statistics.exact_p(np.full(seeds, 0.1)) == statistics.smallest_p(seeds) == 2 / 2**seeds
    assert statistics.smallest_p(5) > 0.05 > statistics.smallest_p(6)
    assert statistics.exact_p(np.zeros(4)) == 1.0


def test_holm_multiplies_the_smallest_by_all_and_never_falls():
    assert statistics.holm([0.04, 0.01, 0.03]) == pytest.approx([0.06, 0.03, 0.06])
    assert statistics.holm([0.9, 0.8]) == [1.0, 1.0]


@pytest.mark.parametrize(("freedom", "comparisons"), [(5.0, 1), (2.0, 9), (30.0, 3)])
def test_the_detectable_difference_is_found_by_8_of_10_simulated_t_tests(freedom: float, comparisons: int):
    effect = statistics.detectable(1.0, freedom, comparisons)
    generator = np.random.default_rng(9)
    errors = np.sqrt(generator.chisquare(freedom, 200_000) / freedom)
    t = (effect + generator.standard_normal(200_000)) / errors
    found = (2 * stats.t.sf(np.abs(t), freedom) < 0.05 / comparisons).mean()
    assert found == pytest.approx(0.8, abs=0.005)  # five standard errors of 200,000 draws


def test_arms_that_are_the_same_differ_by_nothing():
    sums = np.random.default_rng(1).random((3, 5))
    found = paired_difference(sums, sums, np.ones(5))
    assert (found.value, found.low, found.high, found.p, found.exact_p) == (0.0, 0.0, 0.0, 1.0, 1.0)
    assert found.inside
    assert statistics.detectable(found.error, found.freedom) == 0.0


@pytest.mark.parametrize("shape", [(1, 5), (3, 4)])
def test_sums_that_do_not_fit_are_refused(shape: tuple[int, int]):
    with pytest.raises(ValueError, match="needs"):
        paired_difference(np.ones(shape), np.ones(shape), np.ones(5))


@pytest.mark.parametrize("seeds", [6, 8])
def test_what_flips_of_sign_find_is_as_large_as_said(seeds: int):
    generator = np.random.default_rng(21)
    found = simulated(generator, 0.0)
    effect = statistics.detectable_by_flips(found, seeds) / found.spread
    drawn = effect + generator.standard_normal((1500, seeds))
    share = np.mean([statistics.exact_p(one) < 0.05 for one in drawn])
    assert share == pytest.approx(0.8, abs=0.045)  # three standard errors of 1,500 and of 2,000 studies
    if seeds == 6:  # all six must fall on one side
        assert stats.norm.cdf(effect) ** 6 == pytest.approx(0.8, abs=0.03)


def test_fewer_than_six_seeds_can_find_nothing_by_flips():
    found = simulated(np.random.default_rng(2), 0.0)
    assert statistics.detectable_by_flips(found, 5) == float("inf")
