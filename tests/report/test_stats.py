"""The statistics against scipy, published values, enumeration, simulation and what must always hold."""

import itertools
import math
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binom, binomtest

from report import stats

counts = st.integers(0, 60)


# ---- one proportion, one pair of arms


@pytest.mark.parametrize(
    ("k", "n", "low", "high"),
    [(0, 10, 0.0, 0.2775), (10, 10, 0.7225, 1.0), (81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605)],
)
def test_wilson_gives_the_published_intervals(k, n, low, high):
    # the last two: Newcombe 1998, Statistics in Medicine 17:857, method 3
    assert stats.wilson(k, n) == pytest.approx((low, high), abs=5e-5)


@given(n=st.integers(1, 500), share=st.floats(0, 1))
def test_wilson_contains_the_proportion_and_its_ends_are_where_the_score_test_turns(n, share):
    k = round(share * n)
    low, high = stats.wilson(k, n)
    assert 0 <= low <= k / n <= high <= 1
    for end, edge in ((low, 0.0), (high, 1.0)):
        z = abs(k / n - end) / math.sqrt(end * (1 - end) / n) if 0 < end < 1 else 1.959963984540054
        assert z == pytest.approx(1.959963984540054, rel=1e-6) and (0 < end < 1 or end == edge)


def test_nothing_seen_says_nothing():
    assert stats.wilson(0, 0) == (0, 1) and stats.mcnemar(0, 0) == 1


@given(counts, counts)
def test_mcnemar_sums_the_tails_of_a_fair_coin_and_is_symmetric(b, c):
    tail = sum(math.comb(b + c, i) for i in range(min(b, c) + 1)) / 2 ** (b + c)
    assert stats.mcnemar(b, c) == pytest.approx(min(1, 2 * tail)) == stats.mcnemar(c, b)


@pytest.mark.parametrize(
    ("cells", "low", "high"),
    [
        ((36, 12, 2, 0), 0.0569, 0.3404),  # Newcombe 1998, Statistics in Medicine 17:2635, method 10
        ((1, 1, 7, 12), -0.507, -0.026),  # Fagerland, Lydersen, Laake 2014: airway hyper-responsiveness
        # Where the outcomes are uncorrelated it is the unpaired interval, here of 9/10 - 3/10, 6/7 - 2/7 and
        # 10/10 - 0/10: Newcombe 1998, Statistics in Medicine 17:873, method 10.
        ((3, 6, 0, 1), 0.1705, 0.8090),
        ((2, 4, 0, 1), 0.0582, 0.8062),
        ((0, 10, 0, 0), 0.6075, 1.0),
    ],
)
def test_newcombe_gives_the_published_intervals(cells, low, high):
    decimals = 4 if cells != (1, 1, 7, 12) else 3
    assert [round(x, decimals) for x in stats.newcombe(*cells)] == [low, high]


@given(counts, counts, counts, st.integers(1, 60))
def test_newcombe_contains_the_difference_and_turns_with_the_sides(both, a, b, neither):
    low, high = stats.newcombe(both, a, b, neither)
    difference = (a - b) / (both + a + b + neither)
    assert -1 <= low <= difference + 1e-12 and difference - 1e-12 <= high <= 1
    assert stats.newcombe(both, b, a, neither) == pytest.approx((-high, -low))


# ---- several tests


def test_holm_multiplies_by_what_is_left_and_never_falls():
    assert stats.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert stats.holm([0.9, 0.8]) == [1.0, 1.0]
    assert stats.holm([]) == []


@given(st.lists(st.floats(0, 1), min_size=1, max_size=12))
def test_holm_keeps_the_order_and_lies_between_raw_and_bonferroni(ps):
    corrected = stats.holm(ps)
    assert all(p <= q <= min(1, len(ps) * p) for p, q in zip(ps, corrected, strict=True))
    for (p, q), (p2, q2) in itertools.combinations(zip(ps, corrected, strict=True), 2):
        assert (q <= q2 or p > p2) and (q2 <= q or p2 > p)
    # the definition: the smallest is rejected at alpha / m, the next at alpha / (m - 1), up to the first miss
    rejected = list(itertools.takewhile(lambda ip: ip[1] * (len(ps) - ip[0]) <= 0.05, enumerate(sorted(ps))))
    assert sum(q <= 0.05 for q in corrected) == len(rejected)


# ---- what can be detected


def enumerated_power(n: int, d: float, psi: float, alpha: float) -> float:
    """Sum the probabilities of all outcomes (only A, only B, alike) that scipy's test finds significant."""
    up, down, total = (psi + d) / 2, (psi - d) / 2, 0.0
    for a in range(n + 1):
        for b in range(n + 1 - a):
            if a + b and binomtest(a, a + b).pvalue <= alpha:
                ways = math.comb(n, a) * math.comb(n - a, b)
                total += ways * up**a * down**b * (1 - psi) ** (n - a - b)
    return total


@pytest.mark.parametrize(
    ("n", "d", "psi", "alpha"),
    [(12, 0.5, 0.6, 0.05), (30, 0.2, 0.3, 0.05), (25, 0.4, 0.4, 0.01), (9, 0, 1, 0.05)],
)
def test_power_is_that_of_all_outcomes_enumerated(n, d, psi, alpha):
    assert stats.mcnemar_power(n, d, psi, alpha) == pytest.approx(
        enumerated_power(n, d, psi, alpha), abs=1e-9
    )


@pytest.mark.parametrize(("n", "psi", "alpha"), [(30, 0.5, 0.05), (30, None, 0.05), (35, 0.4, 0.01)])
def test_smallest_detectable_difference_is_where_the_enumerated_power_crosses(n, psi, alpha):
    d = stats.smallest_detectable(n, psi, alpha)
    reached, below = (enumerated_power(n, x, x if psi is None else psi, alpha) for x in (d, d - 1e-4))
    assert below < 0.8 <= reached + 1e-9


def test_smallest_detectable_difference_has_the_power_it_claims():
    d = stats.smallest_detectable(20)
    # one way only: significant from 6 discordant pairs on, since 2 / 2**6 < 0.05 < 2 / 2**5
    assert binom.sf(5, 20, d) == pytest.approx(0.8, abs=1e-3)
    assert stats.smallest_detectable(5) is None
    assert stats.smallest_detectable(20, 0.0) is None
    few, many, best = (stats.smallest_detectable(200, psi) for psi in (0.1, 0.3, None))
    assert many > few > best
    assert (
        stats.smallest_detectable(200, 0.3, alpha=0.01)
        > many
        > stats.smallest_detectable(200, 0.3, power=0.5)
    )


# ---- over seeds


def simulated(rng: np.random.Generator, seeds: int, sizes: tuple[int, ...], tau: float) -> list[np.ndarray]:
    """Draw differences with mean 0.05 whose seeds vary by tau and whose init states vary by 0.3."""
    seed, out = rng.normal(0, tau, (seeds, 1)), []
    for n in sizes:
        d = np.clip(0.05 + seed + rng.choice([-0.3, 0.3], n), -0.5, 0.5)
        u = rng.random((seeds, n))
        out.append(np.where(u < (0.5 + d) / 2, 1, np.where(u > 1 - (0.5 - d) / 2, -1, 0)))
    return out


def test_bootstrap_covers_the_truth_with_unequal_tasks_and_init_states_that_seeds_share(monkeypatch):
    monkeypatch.setattr(stats, "BOOTSTRAP_DRAWS", 600)
    rng, hits = np.random.default_rng(0), 0
    for _ in range(200):
        low, high = stats.bootstrap(simulated(rng, 5, (40, 5, 15), 0.05))
        hits += low <= 0.05 <= high
    assert 0.92 <= hits / 200 <= 0.995


@pytest.mark.parametrize("alpha", [0.05, 0.3, 0.6, 0.9])
def test_bootstrap_is_what_all_resamples_of_seeds_and_init_states_give(alpha, monkeypatch):
    # two seeds, tasks of two and one init states: 4 x 4 x 1 resamples, all equally likely
    tasks = [np.array([[1, -1], [1, 0]]), np.array([[0], [1]])]
    means = []
    for seeds in itertools.product(range(2), repeat=2):
        for states in itertools.product(range(2), repeat=2):
            means.append(np.mean([[*(tasks[0][s, i] for i in states), tasks[1][s, 0]] for s in seeds]))
    monkeypatch.setattr(stats, "ALPHA", alpha)
    expected = np.quantile(means, (alpha / 2, 1 - alpha / 2), method="inverted_cdf")
    assert stats.bootstrap(tasks) == pytest.approx(tuple(expected))


def test_bootstrap_over_seeds_is_wider_when_seeds_disagree():
    half, ones, zeros = [1] * 5 + [0] * 5, [1] * 10, [0] * 10
    (low, high) = stats.bootstrap([np.array([half] * 3)])
    (wide_low, wide_high) = stats.bootstrap([np.array([ones, half, zeros])])
    assert 0 < low < 0.5 < high < 1
    assert wide_high - wide_low > 1.5 * (high - low)
    assert stats.bootstrap([np.array([ones, ones])]) == (1, 1)


# ---- contrasts


def run_of(arm: str, seed: int, results: dict[str, dict[tuple, bool | None]], fusion=("late",)) -> stats.Run:
    """Make a run from memory mode -> (task, init state) -> success; None is a crash."""
    episodes = [
        {"suite": "goal", "task_id": task, "init_state": state, "memory": mode, "steps": 9}
        | {"success": success, "crash": "died" if success is None else None}
        for mode, outcomes in results.items()
        for (task, state), success in outcomes.items()
    ]
    own = next(iter(results), "pred")
    name = f"{arm}-s{seed}"
    return stats.Run(name, arm, seed, 64, fusion, own, False, "", (1, 1), tuple(episodes), (), ())


def test_seeds_are_pooled_over_the_pairs_that_all_have():
    keys = [(t, i) for t in (1, 2) for i in range(5)]
    win, lose = dict.fromkeys(keys, True), dict.fromkeys(keys, False)
    short = dict.fromkeys(keys[:7], True) | {keys[0]: None}  # a crash, and three episodes still to come
    panel = [run_of("E2", 0, {"pred": win}), run_of("E2", 1, {"pred": short}), run_of("E2", 2, {"pred": win})]
    panel += [run_of("E0", s, {"off": lose}, ()) for s in (0, 1)]  # seed 2 has no partner
    rows = stats.compare(panel, "E2", "pred", "E0", "off")
    assert [(row.seed, row.counts) for row in rows] == [
        ("0", (0, 10, 0, 0)), ("1", (0, 6, 0, 0)), ("all", (0, 12, 0, 0)),
    ]  # fmt: skip


def test_pairs_share_task_and_init_state_whatever_the_order():
    a = {(1, 0): True, (1, 1): False, (2, 0): True, (2, 1): False}
    b = {(2, 1): True, (2, 0): False, (1, 1): False, (1, 0): True, (3, 0): True}
    (row,) = stats.compare([run_of("A", 0, {"x": a}), run_of("B", 0, {"x": b})], "A", "x", "B", "x")
    assert row.counts == (1, 1, 1, 1) and row.p == 1 and row.difference == 0


def test_seeds_without_a_common_pair_stand_for_nothing():
    panel = []
    for seed in (0, 1):
        keys = [(seed, i) for i in range(20)]
        panel += [run_of("E2", seed, {"pred": dict.fromkeys(keys, True)})]
        panel += [run_of("E0", seed, {"off": dict.fromkeys(keys, False)}, ())]
    rows = stats.all_contrasts(panel)
    assert [row.seed for row in rows] == ["0", "1"] and not any(row.shown for row in rows)
    assert all(row.p < 1e-5 and row.p_holm is None for row in rows)


def test_seeds_that_disagree_are_not_shown_however_small_the_pooled_p():
    n, panel = 200, []
    for seed, wins in enumerate((100, 0, 2)):
        results = {(1, i): i < wins for i in range(n)}
        panel += [
            run_of("E2", seed, {"pred": results}),
            run_of("E0", seed, {"off": dict.fromkeys(results, False)}, ()),
        ]
    row = stats.all_contrasts(panel)[-1]
    assert row.p_holm < 1e-6 and row.interval[0] <= 0 < row.interval[1] and not row.shown
    assert "not shown" in row.verdict


def test_only_contrasts_that_the_runs_can_answer_are_in_the_family():
    keys = [(1, i) for i in range(10)]
    win, lose = dict.fromkeys(keys, True), dict.fromkeys(keys, False)
    panel = [
        run_of("B4ensemble", 0, {"pred": win, "off": lose, "best1": win, "dup": win, "random": lose}),
        run_of("E0", 0, {"off": lose}, ()),
        run_of("E2", 0, {"pred": win, "off": lose, "zero": lose, "signflip": lose}),
        run_of("F2", 0, {"pred": win, "off": lose, "zero": lose}),
        run_of("F3a", 0, {}),  # not evaluated yet
    ]
    contrasts = stats.all_contrasts(panel)
    assert [(c.a, c.b) for c in contrasts] == [
        ("E2", "E0"), ("F2", "E0"), ("F2", "E2"), ("B4ensemble", "E2"),
        ("B4ensemble pred", "B4ensemble off"), ("B4ensemble pred", "B4ensemble best1"),
        ("B4ensemble pred", "B4ensemble dup"),
        ("E2 pred", "E2 off"), ("E2 pred", "E2 zero"), ("F2 pred", "F2 off"),
    ]  # fmt: skip
    assert [c.p_holm for c in contrasts] == stats.holm([c.p for c in contrasts])


def test_contrasts_are_named_once_and_only_arms_of_the_matrix_are():
    assert max(Counter(frozenset(pair) for pair in stats.CONTRASTS).values()) == 1
    table = (Path(stats.__file__).parents[1] / "run_matrix.sh").read_text()
    arms = set(re.findall(r"^(\w+) +\|", table, re.MULTILINE))
    named = {arm for pair in stats.CONTRASTS for arm in pair}
    assert named - set(stats.BANKS) <= arms, "a contrast names an arm that run_matrix.sh lacks"
