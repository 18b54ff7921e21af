"""The statistics against scipy, published values, enumeration, simulation and what must always hold."""

import itertools
import math
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import t, ttest_1samp

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


# ---- over seeds


@given(st.lists(st.integers(-40, 40), min_size=3, max_size=12).filter(lambda d: len(set(d)) > 1))
def test_seeds_are_tested_by_t_with_its_interval_and_the_two_one_sided_bound(wins):
    d = np.array(wins) / 40
    p, (low, high), excluded = stats.over_seeds(d)
    mean, error, freedom = d.mean(), d.std(ddof=1) / math.sqrt(len(d)), len(d) - 1
    assert p == pytest.approx(2 * t.sf(abs(mean) / error, freedom))
    assert (low, high) == pytest.approx(
        (mean - t.isf(0.025, freedom) * error, mean + t.isf(0.025, freedom) * error)
    )
    # the smallest bound whose two one-sided tests both reject at 5 %
    assert max(t.sf((excluded - mean) / error, freedom), t.sf((excluded + mean) / error, freedom)) == (
        pytest.approx(0.05)
    )


@pytest.mark.parametrize("wins", [(9,), (9, 3), (5, 5, 5), (0, 0, 0, 0), (7, 7)])
def test_fewer_than_three_seeds_or_seeds_that_are_alike_give_no_verdict(wins):
    p, interval, excluded = stats.over_seeds(np.array(wins) / 40)
    assert np.isnan([p, *interval, excluded]).all()


def test_variances_of_seeds_starts_and_the_rest_are_found_again():
    rng, found = np.random.default_rng(0), []
    for _ in range(400):
        x = rng.normal(0, 0.3, (6, 1)) + rng.normal(0, 0.5, (1, 30)) + rng.normal(0, 0.7, (6, 30))
        found.append(stats.partition(x))
    assert np.mean(found, axis=0) == pytest.approx((0.09, 0.25, 0.49), rel=0.1)
    assert stats.partition(np.eye(3)) == (0, 0, pytest.approx(1 / 3 * 3 / 2))


def equal_arms(rng: np.random.Generator, studies: int, seeds: int, spread: float) -> np.ndarray:
    """Draw successes (studies, 11, S, 40) of arms that are equal: seeds vary by `spread`, starts by .15."""
    level = 0.75 + rng.normal(0, spread, (studies, 11, seeds, 1)) + rng.normal(0, 0.15, (studies, 1, 1, 40))
    return rng.random((studies, 11, seeds, 40)) < level


def false_verdicts(won: np.ndarray) -> np.ndarray:
    """Return for each study whether any of ten arms is said to differ from the first: Holm's first step."""
    p = stats.over_seeds((won[:, 1:].sum(-1) - won[:, :1].sum(-1, dtype=int)) / 40).p  # (studies, 10)
    return np.nan_to_num(p, nan=1.0).min(1) * 10 < stats.ALPHA


@pytest.mark.parametrize("seeds", [3, 5])
@pytest.mark.parametrize("spread", [0, 0.03, 0.05])
def test_equal_arms_give_a_false_verdict_in_at_most_five_per_cent_of_studies(seeds, spread):
    rng, studies = np.random.default_rng(0), 4000
    rate = np.concatenate([false_verdicts(equal_arms(rng, 1000, seeds, spread)) for _ in range(4)]).mean()
    assert 0 < rate <= 0.05 + 2.6 * math.sqrt(0.05 * 0.95 / studies)  # Monte-Carlo error, one-sided 0.5 %


def test_an_effect_is_found_so_that_the_rule_is_not_silent():
    rng = np.random.default_rng(0)
    won = equal_arms(rng, 200, 5, 0.03)
    won[:, 0] = rng.random((200, 5, 40)) < 0.25
    assert false_verdicts(won).mean() > 0.95


def test_the_simulated_rule_is_the_reports(monkeypatch):
    names = ("E0", *(f"A{i}" for i in range(1, 11)))
    monkeypatch.setattr(stats, "NAMED", dict.fromkeys(names[1:], ("E0",)))
    rng = np.random.default_rng(5)
    won = equal_arms(rng, 40, 3, 0.2)
    won[:20, 0] = rng.random((20, 3, 40)) < 0.1
    said = []
    for study in won:
        panel = [
            run_of(name, seed, {"pred": {(1, i): bool(x) for i, x in enumerate(row)}})
            for name, arm in zip(names, study, strict=True)
            for seed, row in enumerate(arm)
        ]
        said.append(any(c.shown for c in stats.all_contrasts(panel)))
    assert said == list(false_verdicts(won)) and 5 < sum(said) < 35


# ---- contrasts


def run_of(arm: str, seed: int, results: dict[str, dict[tuple, bool | None]], fusion=("late",), **config):
    """Make a run from memory mode -> (task, init state) -> success; None is a crash. The first is its own."""
    episodes = [
        {"suite": "goal", "task_id": task, "init_state": state, "memory": mode, "steps": 9}
        | {"success": success, "crash": "died" if success is None else None}
        for mode, outcomes in results.items()
        for (task, state), success in outcomes.items()
    ]
    own = next(iter(results), "pred")
    name = f"{arm}-s{seed}"
    return stats.Run(name, arm, seed, 64, fusion, own, False, "", (1, 1), tuple(episodes), (), (), config)


def compare(panel: list[stats.Run], a: str, b: str, modes=("pred", "off")) -> list[stats.Contrast]:
    return [*stats.compare(panel, stats.Named("primary", a, modes[0], b, modes[1], ""))]


def test_seeds_are_compared_on_the_pairs_that_all_have():
    keys = [(t, i) for t in (1, 2) for i in range(5)]
    win, lose = dict.fromkeys(keys, True), dict.fromkeys(keys, False)
    short = dict.fromkeys(keys[:7], True) | {keys[0]: None}  # a crash, and three episodes still to come
    panel = [run_of("E2", 0, {"pred": win}), run_of("E2", 1, {"pred": short}), run_of("E2", 2, {"pred": win})]
    panel += [run_of("E0", s, {"off": lose}, ()) for s in (0, 1)]  # seed 2 has no partner
    (c,) = compare(panel, "E2", "E0")
    assert (c.seeds, c.n, c.cells(0), c.difference) == ((0, 1), 6, (0, 6, 0, 0), 1)


def test_pairs_share_task_and_init_state_whatever_the_order():
    a = {(1, 0): True, (1, 1): False, (2, 0): True, (2, 1): False}
    b = {(2, 1): True, (2, 0): False, (1, 1): False, (1, 0): True, (3, 0): True}
    (c,) = compare([run_of("A", 0, {"x": a}), run_of("B", 0, {"x": b})], "A", "B", ("x", "x"))
    assert c.cells(0) == (1, 1, 1, 1) and c.difference == 0 and not c.told


def panel_of(wins: dict[str, tuple[int, ...]], n: int = 40, **modes: tuple[int, ...]) -> list[stats.Run]:
    """Return a run a seed and arm that solves the first so many of n starts; modes: of E2 at rollout."""
    solved = lambda k: {(1, i): i < k for i in range(n)}  # noqa: E731
    return [
        run_of(
            arm,
            seed,
            {"off" if arm == "E0" else "pred": solved(k)}
            | {mode: solved(of[seed]) for mode, of in modes.items() if arm == "E2"},
            () if arm == "E0" else ("late",),
        )
        for arm, of in wins.items()
        for seed, k in enumerate(of)
    ]


def test_the_estimate_is_the_mean_of_seeds_and_its_p_that_of_a_t_test():
    (c,) = stats.all_contrasts(panel_of({"E2": (36, 34, 35), "E0": (20, 20, 21)}))
    assert (c.a, c.b, c.seeds, c.role) == ("E2", "E0", (0, 1, 2), "none")
    assert c.difference == pytest.approx((16 + 14 + 14) / 120)
    assert c.p_holm == pytest.approx(ttest_1samp([16, 14, 14], 0).pvalue) and c.verdict == "higher"


def test_seeds_that_disagree_are_not_shown_and_the_bound_says_what_is_excluded():
    (c,) = stats.all_contrasts(panel_of({"E2": (40, 20, 21), "E0": (20, 20, 20)}))
    assert c.verdict == "not shown" and c.p_holm > 0.3
    assert f"beyond {100 * c.test.excluded:.0f} excluded" in str(c) and c.test.excluded > c.difference


@pytest.mark.parametrize(("seeds", "why"), [(1, "1 of 3 seeds"), (2, "2 of 3 seeds"), (3, "all seeds alike")])
def test_no_verdict_on_arms_from_few_seeds_or_from_seeds_that_are_alike(seeds, why):
    (c,) = stats.all_contrasts(panel_of({"E2": (40,) * seeds, "E0": (0,) * seeds}))
    assert c.verdict == "no verdict" and not c.shown and f"no verdict ({why})" in str(c)


def test_within_a_checkpoint_mcnemar_is_exact_and_one_seed_has_a_verdict():
    contrasts = stats.all_contrasts(panel_of({"E2": (40, 20)}, off=(20, 20), shuffle=(40, 21), random=(0, 0)))
    found = {(c.family, c.b, c.seeds): c for c in contrasts}
    assert all(c.within for c in contrasts) and len(found) == 6
    off = found["checks", "E2 off", (0,)]
    assert off.test.p == stats.mcnemar(20, 0) and off.p_holm == 4 * off.test.p and off.verdict == "higher"
    assert found["checks", "E2 shuffle", (0,)].p_holm == 1
    assert found["signals", "E2 random", (0,)].p_holm == 2 * stats.mcnemar(40, 0)  # a family of its own


def test_families_are_named_beforehand_and_corrected_apart():
    arms = ("E0", "E0b", "E1s", "E2", "E2n", "E2h", "F2", "F2n", "B4dup", "B4min", "X")
    panel = []
    for i, arm in enumerate(arms):
        for run in panel_of({"E2": (20 + i, 22 + i, 21)}, off=(9, 8, 7), stale=(9, 8, 7), zero=(1, 1, 1)):
            kept = (
                run.episodes
                if arm in ("E2", "F2")
                else tuple(e for e in run.episodes if e["memory"] == "pred")
            )
            config = {"F2n": {"lambda_world": 0}, "E2n": {"lambda_world": 0}, "X": {"compared_with": ["E0"]}}
            memory = {"E1s": "shuffle", "E2h": "history"}.get(arm, "pred")
            kept = tuple(e | {"memory": memory} if e["memory"] == "pred" else e for e in kept)
            panel.append(replace(run, arm=arm, memory=memory, episodes=kept, config=config.get(arm, {})))
    for i, run in enumerate(panel):
        if run.arm in ("E0", "E0b"):
            episodes = tuple(e | {"memory": "off"} for e in run.episodes)
            panel[i] = replace(run, fusion=(), episodes=episodes, blind=run.arm == "E0b")
    contrasts = stats.all_contrasts(panel)
    of = lambda family: [(c.a, c.b) for c in contrasts if c.family == family]  # noqa: E731
    assert of("primary") == [
        ("E2", "E0"), ("E2", "E1s"), ("E2", "E2n"), ("E2", "E2h"), ("F2", "E0"), ("F2", "F2n"),
        ("B4min", "B4dup"), ("B4min", "E2"), ("X", "E0"),
    ]  # fmt: skip
    assert of("checks")[0] == ("E0", "E0b")
    assert Counter(of("checks")[1:]) == dict.fromkeys(
        [(f"{a} pred", f"{a} {mode}") for a in ("E2", "F2") for mode in ("off", "stale")], 1
    )
    assert set(of("signals")) == {("E2 pred", "E2 zero"), ("F2 pred", "F2 zero")}
    for family in stats.FAMILIES:
        rows = [c for c in contrasts if c.family == family]
        assert [c.p_holm for c in rows] == pytest.approx(stats.holm([float(c.test.p) for c in rows]))


def test_a_memory_arm_of_no_table_is_compared_with_e0_e2_and_its_own_controls():
    panel = panel_of({"E2": (9, 8, 7), "E0": (1, 2, 3), "Mine": (9, 9, 8), "Minen": (3, 3, 4)})
    panel = [replace(r, config={"lambda_world": 0}) if r.arm == "Minen" else r for r in panel]
    pairs = [(c.a, c.b, c.role) for c in stats.all_contrasts(panel)]
    assert pairs == [
        ("E2", "E0", "none"),
        *(("Mine", "E0", "none"), ("Mine", "E2", "treated"), ("Mine", "Minen", "lambda 0")),
    ]


@pytest.mark.parametrize(
    ("own", "dropout", "unmet"),
    [
        ("pred", 0, {"off", "zero"}),
        ("pred", None, {"off", "zero"}),
        ("pred", 0.2, {"zero"}),
        ("zero", 0, {"off"}),
    ],
)
def test_modes_that_training_never_met_are_known(own, dropout, unmet):
    run = run_of("E2", 0, {own: {}}, memory_dropout=dropout)
    assert {mode for mode in ("off", "zero", "shuffle", "pred") if run.unmet(mode)} == unmet
    assert not run_of("E0", 0, {"off": {}}, ()).unmet("off")
