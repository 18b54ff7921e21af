"""The statistics against published values and against what must hold for any counts."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binom, binomtest

import stats

counts = st.integers(0, 60)


@pytest.mark.parametrize(
    ("k", "n", "low", "high"),
    [(0, 10, 0.0, 0.2775), (10, 10, 0.7225, 1.0), (81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605)],
)
def test_wilson_gives_the_published_intervals(k, n, low, high):
    # the last two: Newcombe 1998, Statistics in Medicine 17:857, method 3
    assert stats.wilson(k, n) == pytest.approx((low, high), abs=5e-5)


@given(n=st.integers(1, 500), share=st.floats(0, 1))
def test_wilson_contains_the_proportion_and_stays_within_bounds(n, share):
    k = round(share * n)
    low, high = stats.wilson(k, n)
    assert 0 <= low <= k / n <= high <= 1


@given(counts, counts)
def test_mcnemar_is_the_binomial_test_of_discordant_pairs_and_symmetric(b, c):
    expected = binomtest(b, b + c).pvalue if b + c else 1.0
    assert stats.mcnemar(b, c) == pytest.approx(expected) == stats.mcnemar(c, b)


def test_newcombe_gives_the_published_interval():
    # Newcombe 1998, Statistics in Medicine 17:2635, method 10
    assert stats.newcombe(36, 12, 2, 0) == pytest.approx((0.0569, 0.3404), abs=5e-5)


@given(counts, counts, counts, st.integers(1, 60))
def test_newcombe_contains_the_difference_and_turns_with_the_sides(both, a, b, neither):
    low, high = stats.newcombe(both, a, b, neither)
    difference = (a - b) / (both + a + b + neither)
    assert -1 <= low <= difference + 1e-12 and difference - 1e-12 <= high <= 1
    assert stats.newcombe(both, b, a, neither) == pytest.approx((-high, -low))


def test_holm_multiplies_by_what_is_left_and_never_falls():
    assert stats.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert stats.holm([0.9, 0.8]) == [1.0, 1.0]
    assert stats.holm([]) == []


def test_smallest_detectable_difference_has_the_power_it_claims():
    d = stats.smallest_detectable(20)
    # one way only: significant from 6 discordant pairs on, since 2 / 2**6 < 0.05 < 2 / 2**5
    assert binom.sf(5, 20, d) == pytest.approx(0.8, abs=1e-3)
    assert stats.smallest_detectable(5) is None
    assert stats.smallest_detectable(20, 0.0) is None
    assert (
        stats.smallest_detectable(200, 0.3)
        > stats.smallest_detectable(200, 0.1)
        > stats.smallest_detectable(200)
    )


def test_bootstrap_over_seeds_is_wider_when_seeds_disagree():
    task = ("goal", 1)
    alike = {s: {task: [1] * 5 + [0] * 5} for s in range(3)}
    apart = {0: {task: [1] * 10}, 1: {task: [1] * 5 + [0] * 5}, 2: {task: [0] * 10}}
    (low, high), (wide_low, wide_high) = stats.bootstrap(alike), stats.bootstrap(apart)
    assert 0 < low < 0.5 < high < 1
    assert wide_high - wide_low > 1.5 * (high - low)
